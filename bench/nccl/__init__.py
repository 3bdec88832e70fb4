"""NCCL through gck, beside torch.distributed and CuPy: `python -m bench.nccl`."""
