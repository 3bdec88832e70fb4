"""gck: gradient compression kernels.

>>> import gck
>>> payload = gck.topk_ef_(grad, err, ratio=0.01)
"""

from gck import checkpoint, errors
from gck.checkpoint import load_state, save_state, saved_steps
from gck.collectives import (
    HierarchicalGroup,
    NcclCommunicator,
    SimulatedGroup,
    all_reduce_,
    all_reduce_many_,
    packed_all_reduce_,
    sparse_all_gather,
)
from gck.compressor import Compressor, shard_numel
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.integrations import ddp, diloco, fsdp
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.low_rank import LowRank
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from gck.message import from_bytes, to_bytes
from gck.nonfinite import skip_nonfinite
from gck.ops import (
    chunk_topk,
    chunk_topk_ef_,
    decompress,
    decompress_add_,
    encode_indices,
    low_rank,
    low_rank_ef_,
    quantize,
    quantize_ef_,
    random_k,
    random_k_ef_,
    sign_ef_,
    topk,
    topk_ef_,
)
from gck.payload import (
    ChunkSparse,
    CodedSparse,
    LowRankFactors,
    PackedSigns,
    Payload,
    Quantized,
    SeededValues,
    SparseGrad,
)
from gck.statistics import Statistics
from gck.version import __version__ as __version__

__all__ = [
    "ChunkSparse",
    "ChunkTopK",
    "CodedSparse",
    "Compressor",
    "ErrorFeedback",
    "ErrorFeedbackMap",
    "HierarchicalGroup",
    "LowRank",
    "LowRankFactors",
    "NcclCommunicator",
    "PackedSigns",
    "Payload",
    "Quantize",
    "Quantized",
    "RandomK",
    "SeededValues",
    "Sign",
    "SimulatedGroup",
    "SparseGrad",
    "Statistics",
    "TopK",
    "all_reduce_",
    "all_reduce_many_",
    "checkpoint",
    "chunk_topk",
    "chunk_topk_ef_",
    "ddp",
    "decompress",
    "decompress_add_",
    "diloco",
    "encode_indices",
    "errors",
    "from_bytes",
    "fsdp",
    "load_state",
    "low_rank",
    "low_rank_ef_",
    "packed_all_reduce_",
    "quantize",
    "quantize_ef_",
    "random_k",
    "random_k_ef_",
    "save_state",
    "saved_steps",
    "shard_numel",
    "sign_ef_",
    "skip_nonfinite",
    "sparse_all_gather",
    "to_bytes",
    "topk",
    "topk_ef_",
]
