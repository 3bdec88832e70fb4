"""Memory of results on the CPU: what is freed is kept for the next one.

A large tensor that is fresh from the system costs a page fault, and zeroing, for each page as it is first
written to; of a dense result that takes longer than decoding into it. Training makes results of the same
sizes step after step, so the process keeps up to 256 MiB of what they have freed (bindings/results.hpp),
which `gck.collectives.empty_cache` gives back. Such tensors cannot be resized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gck._native import load, num_threads, sees_tensors
from gck.errors import AllocationError

__all__ = ["LARGE", "WATCHERS", "copy_", "dlpack_type", "drop_results", "empty", "in_jit_trace", "unwatched"]

LARGE = 1 << 17  # bytes, as in bindings/results.hpp

_DLPACK = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.uint16: (1, 16),
    torch.uint32: (1, 32),
}

# Each answers with something true while a mode looks on, a transform is at work, the profiler runs, or
# torch.jit.trace records. Looked up once: of a call on few elements, looking is a good part.
WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._is_tracing,
)
_modes, _transforms, _profiler_enabled, _is_tracing = WATCHERS


def dlpack_type(dtype: torch.dtype) -> tuple[int, int]:
    """(type code, bits) as DLPack numbers them."""
    return _DLPACK[dtype]


def unwatched() -> bool:
    """Whether nobody traces, transforms or profiles, and no mode looks on."""
    if torch.compiler.is_compiling():
        return False
    return not (_modes() or _transforms() is not None or _profiler_enabled() or _is_tracing())


def in_jit_trace() -> bool:
    """Whether torch.jit.trace is recording, which sees nothing of what works on memory by itself."""
    return not torch.compiler.is_compiling() and bool(_is_tracing())


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new (numel,) tensor of any content; a large one on the CPU from memory that results have freed.

    Raises:
        AllocationError: on the CPU, there is no room for so many. torch has errors of its own for devices.
    """
    small = numel < LARGE // dtype.itemsize
    if small or device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    try:
        if not (unwatched() and sees_tensors()):
            return torch.empty(numel, dtype=dtype, device=device)
        tensor: Tensor = load().new_tensor(*_DLPACK[dtype], numel)
    except (MemoryError, RuntimeError, OverflowError, TypeError) as error:  # the last of the compiled module
        raise AllocationError(f"{numel} elements of {dtype} do not fit into memory: {error}") from error
    return tensor


def copy_(to: Tensor, source: Tensor) -> None:
    """`to.copy_(source)`; what is large, on the CPU and of one dtype is written past the caches, which takes
    two thirds of the time."""
    plain = (
        source.nbytes >= LARGE
        and to.is_cpu
        and source.is_cpu
        and to.dtype is source.dtype
        and to.shape == source.shape
        and to.is_contiguous()
        and source.is_contiguous()
        and not (to.is_neg() or source.is_neg())
        and unwatched()
    )
    if not plain:
        to.copy_(source)
        return
    load().copy_large(to.data_ptr(), source.data_ptr(), source.nbytes, num_threads())
    torch.autograd.graph.increment_version(to)


def drop_results() -> None:
    """Gives the memory that freed results have left back to the system."""
    if sees_tensors():
        load().drop_results()
