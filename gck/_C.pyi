# Addresses are tensor.data_ptr(); dtypes are numbered as in kernels/common/native.py.
# options: (decay, clip, statistics), the latter two 0 where there are none.

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def isa() -> str: ...
def copy_large(to: int, source: int, nbytes: int, threads: int) -> None: ...

class BodyLayout:
    def __init__(self, fields: list[tuple[int, int, int, tuple[int, ...]]], nbytes: int) -> None: ...

class Direct:
    def decompress(
        self,
        payloads: list[Any],
        out: Tensor,
        alphas: Sequence[float],
        clear: bool,
        add: bool,
        seed: int,
        threads: int,
    ) -> bool: ...

def direct_topk(numel: int, layout: BodyLayout, value_dtype: int) -> Direct: ...
def direct_sign(numel: int, layout: BodyLayout, chunk_size: int) -> Direct: ...
def direct_quantize(
    numel: int, layout: BodyLayout, chunk_size: int, bits: int, two_levels: bool, stochastic: bool
) -> Direct: ...
def direct_chunk_topk(
    numel: int, layout: BodyLayout, chunk_size: int, k: int, value_bits: int, index_bits: int
) -> Direct: ...
def direct_random_k(numel: int, layout: BodyLayout, value_dtype: int) -> Direct: ...
def payload_maker(
    find: Callable[..., tuple[Direct, type, tuple[object, ...]] | None],
    watchers: tuple[Callable[[], object], ...],
    num_threads: Callable[[], int],
    written: Callable[[tuple[Tensor, ...]], object],
) -> Callable[..., Any]: ...
def find_tensors(tensor_type: type) -> bool: ...
def drop_results() -> None: ...
def new_tensor(code: int, bits: int, numel: int) -> Tensor: ...
def topk_compress(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    k: int,
    values: int,
    value_dtype: int,
    indices: int,
    wide_indices: bool,
    hint: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def topk_preview(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    k: int,
    values: int,
    value_dtype: int,
    indices: int,
    wide_indices: bool,
    threads: int,
) -> bool: ...
def topk_compress_flat(
    runs: list[tuple[int, int, int, int]],
    k: int,
    values: int,
    value_dtype: int,
    indices: int,
    wide_indices: bool,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def topk_compress_each(
    runs: list[tuple[int, int, int, int]],
    places: list[tuple[int, int, int, bool]],
    value_dtype: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def residual_measure(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> None: ...
def sparse_decompress(
    bodies: list[int],
    count: int,
    value_dtype: int,
    indices_offset: int,
    wide_indices: bool,
    out: int,
    numel: int,
    alpha: float,
    clear: bool,
    add: bool,
    threads: int,
    divisor: float,
) -> tuple[int, int]: ...
def chunk_topk_compress(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    chunk_size: int,
    k: int,
    value_bits: int,
    index_bits: int,
    bodies: int,
    row_stride: int,
    chunks_per_row: int,
    scales_offset: int,
    indices_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def chunk_topk_decompress(
    bodies: list[int],
    scales_offset: int,
    indices_offset: int,
    chunk_size: int,
    k: int,
    value_bits: int,
    index_bits: int,
    out: int,
    numel: int,
    alpha: float,
    clear: bool,
    add: bool,
    divisor: float,
    threads: int,
) -> int: ...
def chunk_topk_reduce(
    bodies: list[int],
    scales_offset: int,
    indices_offset: int,
    chunk_size: int,
    k: int,
    value_bits: int,
    index_bits: int,
    divisor: float,
    err: int,
    numel: int,
    server_k: int,
    server_value_bits: int,
    server_index_bits: int,
    body: int,
    server_scales_offset: int,
    server_indices_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> tuple[int, int]: ...
def quantize_compress(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    chunk_size: int,
    bits: int,
    two_levels: bool,
    stochastic: bool,
    seed: int,
    first: int,
    bodies: int,
    row_stride: int,
    chunks_per_row: int,
    scales_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def quantize_decompress(
    bodies: list[int],
    scales_offset: int,
    chunk_size: int,
    bits: int,
    two_levels: bool,
    out: int,
    numel: int,
    alpha: float,
    clear: bool,
    add: bool,
    threads: int,
) -> None: ...
def random_k_compress(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    k: int,
    seed: int,
    factor: float,
    values: int,
    value_dtype: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def random_k_decompress(
    bodies: list[int],
    k: int,
    value_dtype: int,
    seed: int,
    out: int,
    numel: int,
    alpha: float,
    clear: bool,
    add: bool,
    threads: int,
) -> None: ...
def random_k_indices(seed: int, numel: int, k: int, first: int, count: int, out: int) -> None: ...
def low_rank_basis(seed: int, count: int, basis: int) -> None: ...

class LowRankMatrices:
    """Of each matrix (numel, columns, rank); lists have an address for each."""

    def __init__(self, shapes: list[tuple[int, int, int]]) -> None: ...
    def project(
        self,
        grads: list[int],
        dtypes: list[int],
        errs: list[int],
        accs: list[int],
        decay: float,
        clip: int,
        bases: list[int],
        lefts: list[int],
        threads: int,
    ) -> None: ...
    def orthonormalise(self, lefts: list[int], threads: int) -> None: ...
    def back_project(self, accs: list[int], lefts: list[int], rights: list[int], threads: int) -> None: ...
    def next_basis(
        self, bases: list[int], rights: list[int], followings: list[int], threads: int
    ) -> None: ...
    def settle(
        self,
        accs: list[int],
        errs: list[int],
        lefts: list[int],
        rights: list[int],
        cleared: int,
        threads: int,
    ) -> None: ...
    def decompress(
        self,
        lefts: list[int],
        rights: list[int],
        outs: list[int],
        alpha: float,
        add: bool,
        threads: int,
    ) -> None: ...

def quantize_reduce(
    bodies: list[int],
    scales_offset: int,
    chunk_size: int,
    bits: int,
    two_levels: bool,
    divisor: float,
    err: int,
    numel: int,
    server_bits: int,
    server_two_levels: bool,
    stochastic: bool,
    seed: int,
    first: int,
    body: int,
    server_scales_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def sign_compress(
    grad: int,
    grad_dtype: int,
    err: int,
    numel: int,
    chunk_size: int,
    bodies: int,
    row_stride: int,
    chunks_per_row: int,
    scales_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...
def sign_decompress(
    bodies: list[int],
    scales_offset: int,
    chunk_size: int,
    out: int,
    numel: int,
    alpha: float,
    clear: bool,
    add: bool,
    threads: int,
) -> None: ...
def sign_reduce(
    bodies: list[int],
    scales_offset: int,
    chunk_size: int,
    divisor: float,
    err: int,
    numel: int,
    body: int,
    server_scales_offset: int,
    threads: int,
    options: tuple[float, int, int] | None,
) -> int: ...

# What is wrong, as enum class IndexFault in bindings/cpu/index_codecs.hpp numbers it; 0: nothing.
def elias_fano_encode(
    indices: int,
    wide: bool,
    count: int,
    numel: int,
    low_bits: int,
    low: int,
    low_bytes: int,
    high: int,
    high_bits: int,
    threads: int,
) -> int: ...
def elias_fano_decode(
    indices: int,
    wide: bool,
    count: int,
    numel: int,
    low_bits: int,
    low: int,
    low_bytes: int,
    high: int,
    high_bits: int,
    threads: int,
) -> int: ...
def block16_encode(
    indices: int, wide: bool, count: int, numel: int, locals: int, ends: int, threads: int
) -> int: ...
def block16_decode(
    indices: int, wide: bool, count: int, numel: int, locals: int, ends: int, threads: int
) -> int: ...

# NCCL; dtypes and reductions are numbered as in nccl.h. Waits are in seconds.
def nccl_open(wheels: list[str]) -> tuple[int, str, str]: ...
def nccl_unique_id(wheels: list[str]) -> bytes: ...

class NcclCommunicator:
    def __init__(
        self, wheels: list[str], unique_id: bytes, rank: int, world_size: int, timeout: float
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def quiescent(self) -> bool: ...
    def group_start(self, timeout: float) -> None: ...
    def group_end(self, timeout: float) -> None: ...
    def all_gather(self, fields: list[tuple[int, int, int]], stream: int, timeout: float) -> None: ...
    def all_to_all(
        self, peers: list[tuple[int, int, int, int, int]], stream: int, timeout: float
    ) -> None: ...
    def all_to_all_rows(self, send: int, recv: int, row_nbytes: int, stream: int, timeout: float) -> None: ...
    def all_reduce(
        self, send: int, recv: int, count: int, dtype: int, op: int, stream: int, timeout: float
    ) -> None: ...
    def reduce_scatter(
        self, send: int, recv: int, recv_count: int, dtype: int, op: int, stream: int, timeout: float
    ) -> None: ...
    def broadcast(
        self, send: int, recv: int, nbytes: int, root: int, stream: int, timeout: float
    ) -> None: ...
    def check(self, operation: str) -> None: ...
    def split(self, color: int, key: int, timeout: float) -> NcclCommunicator | None: ...
    def abort(self, why: str) -> None: ...
    def close(self, timeout: float) -> None: ...
