# Addresses are tensor.data_ptr(); dtypes are numbered as in kernels/common/native.py.

def isa() -> str: ...
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
) -> int: ...
def topk_compress_flat(
    runs: list[tuple[int, int, int, int]],
    k: int,
    values: int,
    value_dtype: int,
    indices: int,
    wide_indices: bool,
    threads: int,
) -> int: ...
def topk_compress_each(
    runs: list[tuple[int, int, int, int]],
    places: list[tuple[int, int, int, bool]],
    value_dtype: int,
    threads: int,
) -> int: ...
def sparse_decompress(
    bodies: int,
    rows: int,
    row_stride: int,
    count: int,
    value_dtype: int,
    indices_offset: int,
    wide_indices: bool,
    out: int,
    numel: int,
    alpha: float,
    accumulate: bool,
    threads: int,
) -> tuple[int, int]: ...
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
) -> int: ...
def sign_decompress(
    words: int,
    scales: int,
    out: int,
    numel: int,
    chunk_size: int,
    alpha: float,
    accumulate: bool,
    threads: int,
) -> None: ...
