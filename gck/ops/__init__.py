"""The functional API, registered as torch.library operators: a file a family of compressors.

Each operator returns the payload's body, one uint8 buffer; the public functions check what can be checked
without looking at memory and give the body its typed views. So they trace under
`torch.compile(fullgraph=True)`, and in eager mode cost one dispatch.
"""

from gck.ops.chunk_topk import chunk_topk, chunk_topk_ef_
from gck.ops.decode import decompress, decompress_add_
from gck.ops.index_codecs import encode_indices
from gck.ops.low_rank import low_rank, low_rank_ef_
from gck.ops.quantize import quantize, quantize_ef_
from gck.ops.random_k import random_k, random_k_ef_
from gck.ops.sign import sign_ef_
from gck.ops.topk import topk, topk_ef_

__all__ = [
    "chunk_topk",
    "chunk_topk_ef_",
    "decompress",
    "decompress_add_",
    "encode_indices",
    "low_rank",
    "low_rank_ef_",
    "quantize",
    "quantize_ef_",
    "random_k",
    "random_k_ef_",
    "sign_ef_",
    "topk",
    "topk_ef_",
]
