"""Kernels against their references in plain torch, byte by byte: on the machine that will train."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gck.errors import BackendUnavailableError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.low_rank import LowRank
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK

__all__ = ["NUMEL", "differences"]

NUMEL = 100_003  # the last chunk is cut short
COMPRESSORS: dict[str, Any] = {
    "top-k": TopK(ratio=0.01),
    "chunk top-k": ChunkTopK(value_bits=2),
    "codes": Quantize(bits=4, rounding="stochastic", seed=1),
    "signs": Sign(),
    "random-k": RandomK(ratio=0.01, seed=1),
    "low rank": LowRank(),
}


def differences(device: torch.device) -> dict[str, str]:
    """What is wrong with the kernels of which compressors; none where all give the references' bytes.

    Raises:
        BackendUnavailableError: there are no kernels for the device.
    """
    wrong = {}
    for name, compressor in COMPRESSORS.items():
        try:
            part = _difference(compressor, device)
        except BackendUnavailableError:
            raise
        except Exception as error:
            part = f"{type(error).__name__}: {error}"
        if part:
            wrong[name] = part
    return wrong


def _difference(compressor: Any, device: torch.device) -> str:
    generator = torch.Generator().manual_seed(7)
    grad, err = (torch.randn(NUMEL, generator=generator) for _ in range(2))
    reference = import_module(f"{type(compressor).__module__}.reference")
    fields, left, _ = reference.compress(compressor, grad, err)
    dense = reference.decompress(compressor, fields, NUMEL)

    ours, decoded = err.to(device), torch.empty(NUMEL, device=device)
    layout = compressor.layout(NUMEL)
    body = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    compressor.compress_(grad.to(device), ours, body.unsqueeze(0))
    compressor.decompress_(decoded, body)
    if not all(_same(a, b) for a, b in zip(layout.views(body), fields, strict=True)):
        return "the payload differs"
    if not _same(ours, left):
        return "the residual differs"
    return "" if _same(decoded, dense) else "what is decoded differs"


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
