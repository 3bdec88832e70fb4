"""Argument checks. Each raises a typed error that names the function and quotes the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import le
from typing import cast

import torch
from torch import Tensor

from gck.errors import (
    ArgumentError,
    AutogradError,
    DeviceMismatchError,
    DtypeError,
    LayoutError,
    ShapeMismatchError,
)
from gck.memory import in_jit_trace
from gck.statistics import FIELDS, Statistics
from gck.values import MOST_FP32, ZERO_FP32, plain_real, shown
from gck.wire import has_memory

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRAD_DTYPES = frozenset(GRAD_DTYPES)
_FP32, _STRIDED = torch.float32, torch.strided


def check_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise DtypeError(f"{function}: {name} must be a tensor, got {shown(value)}")
    if in_jit_trace():
        raise AutogradError(
            f"{function}: torch.jit.trace cannot record it; use torch.compile or torch.export"
        )
    if value.is_nested:
        raise LayoutError(f"{function}: {name} must be contiguous, got {shown(value)}")
    if value.layout is not torch.strided or not value.is_contiguous():
        raise LayoutError(
            f"{function}: {name} must be contiguous, got shape {tuple(value.shape)} "
            + (f"with strides {value.stride()}" if value.layout == torch.strided else f"as {value.layout}")
            + ("; to_dense() makes it so" if value.is_sparse else "")
        )


def check_grad(function: str, grad: Tensor, name: str = "grad") -> None:
    check_tensor(function, name, grad)
    if grad.dtype not in GRAD_DTYPES:
        raise DtypeError(f"{function}: {name} must be float32, bfloat16 or float16, got {grad.dtype}")
    check_not_recorded(function, name, grad)


def check_fp32(function: str, name: str, value: Tensor) -> None:
    check_tensor(function, name, value)
    if value.dtype != torch.float32:
        raise DtypeError(f"{function}: {name} must be float32, got {value.dtype}")
    check_not_recorded(function, name, value)
    if not torch.compiler.is_compiling() and value.is_neg():  # all that must be fp32 is written to
        raise LayoutError(f"{function}: {name} is negated lazily, and cannot be written to")


def check_not_recorded(function: str, name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise AutogradError(
            f"{function}: {name} requires grad in a recorded graph; pass {name}.detach(), the .grad of a "
            "parameter, or call under torch.no_grad()"
        )


def check_same(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """`value` must have the number of elements and the device of `like`."""
    if value.numel() != like.numel():
        raise ShapeMismatchError(
            f"{function}: {name} must have as many elements as {like_name}, "
            f"got {value.numel()} and {like.numel()}"
        )
    check_device(function, name, value, like_name, like)


def check_device(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise DeviceMismatchError(
            f"{function}: {name} must be on the device of {like_name}, got {value.device} and {like.device}"
        )


def check_pair(function: str, grad: Tensor, err: Tensor) -> None:
    if not acceptable(grad, err):
        check_grad(function, grad)
        check_fp32(function, "err", err)
        check_same(function, "err", err, "grad", grad)


def acceptable(grad: Tensor, err: Tensor) -> bool:
    """Whether these would pass `check_grad`, `check_fp32` and `check_same`, told in a fraction of the time.
    False means that it is for them to tell."""
    return (
        isinstance(grad, Tensor)
        and isinstance(err, Tensor)
        and grad.dtype in GRAD_DTYPES
        and err.dtype is _FP32
        and grad.layout is _STRIDED is err.layout
        and grad.is_contiguous()
        and err.is_contiguous()
        and grad.numel() == err.numel()
        and ((grad.is_cpu and err.is_cpu) or grad.device == err.device)
        and not ((grad.requires_grad or err.requires_grad) and torch.is_grad_enabled())
        and not (grad.is_nested or err.is_nested)
        and (torch.compiler.is_compiling() or not err.is_neg())
        and not in_jit_trace()
    )


def acceptable_pairs(grads: Sequence[Tensor], errs: Sequence[Tensor]) -> bool:
    """`acceptable` of many: every gradient and its residual, and all of them on one device."""
    if torch.compiler.is_compiling() or in_jit_trace():
        return False
    tensors = [*grads, *errs]
    return (
        {torch.strided}.issuperset([tensor.layout for tensor in tensors])
        and False not in [tensor.is_contiguous() for tensor in tensors]
        and _GRAD_DTYPES.issuperset([grad.dtype for grad in grads])
        and {torch.float32}.issuperset([err.dtype for err in errs])
        and True not in [tensor.is_nested for tensor in tensors]
        and True not in [err.is_neg() for err in errs]
        and [grad.numel() for grad in grads] == [err.numel() for err in errs]
        and len({tensor.device for tensor in tensors}) == 1
        and not (torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in tensors])
    )


def apart(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors have memory, and share none: told of many much faster than by
    `check_no_overlap`, which is to tell which do not. Only of tensors on one device, none of them fake."""
    if len(tensors) == 2:  # by far the most calls
        a, b = tensors
        a_start, b_start = a.data_ptr(), b.data_ptr()
        if (not a_start and a.nbytes) or (not b_start and b.nbytes):
            return False
        if a_start < b_start:
            return a_start + a.nbytes <= b_start or not b.nbytes
        return b_start + b.nbytes <= a_start or not a.nbytes
    filled = [tensor for tensor in tensors if tensor.nbytes]
    starts = [tensor.data_ptr() for tensor in filled]
    if 0 in starts:
        return False
    ends = sorted([start + tensor.nbytes for start, tensor in zip(starts, filled, strict=True)])
    starts.sort()
    # In order, each one ends before the next starts exactly if no point lies in two of them.
    return all(map(le, ends, starts[1:]))


def check_no_overlap(function: str, **tensors: Tensor) -> None:
    """Contiguous tensors must have memory, and share none. Fake tensors have none and always pass."""
    if torch.compiler.is_compiling():
        return
    spans = []
    for name, tensor in tensors.items():
        nbytes = tensor.nbytes
        if nbytes == 0 or tensor.is_meta:
            continue
        try:
            start = tensor.data_ptr()
        except RuntimeError:  # a fake tensor
            continue
        if start == 0:
            raise LayoutError(
                f"{function}: {name} has no memory: its storage was freed, or it is zeros of forward-mode "
                f"differentiation; got {shown(tensor)}"
            )
        spans.append((start, start + nbytes, name))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end and tensors[first].device == tensors[second].device:
            raise LayoutError(f"{function}: {first} and {second} overlap in memory")


def check_nonfinite(function: str, nonfinite: Tensor | None, like: Tensor, like_name: str = "grad") -> None:
    check_scalar(function, "nonfinite", nonfinite, torch.int64, like, like_name)


def check_scalar(
    function: str,
    name: str,
    value: Tensor | None,
    dtype: torch.dtype,
    like: Tensor,
    like_name: str = "grad",
) -> None:
    """`value`, which a kernel writes to, must be one element of dtype on the device of `like`, or None."""
    if value is not None:
        check_written(function, name, value, dtype, 1, like, like_name)


def check_written(
    function: str,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    numel: int,
    like: Tensor,
    like_name: str = "grad",
) -> None:
    """`value`, which a kernel writes to, must be `numel` elements of dtype on the device of `like`."""
    check_elements(function, name, value, dtype, numel, like, like_name)
    # Tracing cannot ask.
    if not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
        raise AutogradError(
            f"{function}: {name} was made in inference mode, got a tensor that cannot be written to here"
        )


def check_elements(
    function: str,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    numel: int,
    like: Tensor,
    like_name: str = "grad",
) -> None:
    """`value` must be `numel` elements of dtype on the device of `like`."""
    check_tensor(function, name, value)
    if value.dtype != dtype:
        raise DtypeError(f"{function}: {name} must be {str(dtype).removeprefix('torch.')}, got {value.dtype}")
    if value.numel() != numel:
        wanted = "one element" if numel == 1 else f"{numel} elements"
        raise ShapeMismatchError(f"{function}: {name} must have {wanted}, got shape {tuple(value.shape)}")
    check_device(function, name, value, like_name, like)


def check_bodies(function: str, bodies: object, like: Tensor, like_name: str = "grad") -> int:
    """`bodies` must be rows of bytes, usable as words, on the device of `like`; returns how many."""
    if not isinstance(bodies, Tensor):
        raise DtypeError(f"{function}: bodies must be a tensor, got {shown(bodies)}")
    if bodies.dtype != torch.uint8 or bodies.dim() != 2 or bodies.shape[0] < 1:
        raise ShapeMismatchError(
            f"{function}: bodies must be (shards, nbytes) uint8 with at least one row, "
            f"got {tuple(bodies.shape)} of {bodies.dtype}"
        )
    check_device(function, "bodies", bodies, like_name, like)
    rows, nbytes = bodies.shape
    aligned = bodies.storage_offset() % 16 == 0 and (rows == 1 or bodies.stride(0) % 16 == 0)
    apart = rows == 1 or bodies.stride(0) >= nbytes
    if nbytes and not (bodies.stride(1) == 1 and apart and aligned):
        raise LayoutError(
            f"{function}: rows of bodies must be contiguous, apart, and start at multiples of 16 bytes, "
            f"got strides {bodies.stride()} at offset {bodies.storage_offset()}"
        )
    if not has_memory(bodies):
        raise LayoutError(f"{function}: bodies have no memory, got {shown(bodies)}")
    return rows


def check_ratio(function: str, ratio: object) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise DtypeError(f"{function}: ratio must be a number, got {shown(ratio)}")
    if not 0 < ratio <= 1:  # False for NaN
        hint = "; a number of entries is given as k=" if ratio > 1 else ""
        raise ArgumentError(f"{function}: ratio must be in (0, 1], got {ratio}{hint}")
    return float(ratio)


def check_seed(function: str, seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise DtypeError(f"{function}: seed must be an int, got {shown(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"{function}: seed must be in [-2**63, 2**63), got {seed}")


def check_alpha(function: str, alpha: object) -> float:
    alpha = plain_real(alpha)
    # torch.compile cannot trace math.isfinite of a default argument that it made symbolic.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not -MOST_FP32 <= alpha <= MOST_FP32:
        raise ArgumentError(f"{function}: alpha must be a finite number of fp32, got {alpha!r}")
    return float(alpha)


def clip_of(clip: float, device: torch.device) -> Tensor:
    """One fp32 element. What is above the numbers of fp32 bounds none of them: it is infinite."""
    limit = 1.0 * clip if clip <= MOST_FP32 else math.inf
    return torch.full((1,), limit, dtype=torch.float32, device=device)


def _in_fp32(value: float) -> str:
    return " as fp32 rounds it" if 0 < value <= ZERO_FP32 else ""


def check_residual(function: str, decay: object, clip: object) -> None:
    """Raises unless decay is a number in (0, 1], and clip None or a number above 0, in fp32, too."""
    if clip is None and type(decay) is float and decay == 1:  # by far the most calls
        return
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise DtypeError(f"{function}: decay must be a number, got {shown(decay)}")
    if not ZERO_FP32 < decay <= 1:  # False for NaN
        raise ArgumentError(f"{function}: decay must be in (0, 1]{_in_fp32(decay)}, got {decay}")
    if clip is None:
        return
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        # Functions have taken tensors away before they ask.
        kind = "a number; functions take tensors, too" if isinstance(clip, Tensor) else "a number or a tensor"
        raise DtypeError(f"{function}: clip must be {kind}, got {shown(clip)}")
    if not clip > ZERO_FP32:
        raise ArgumentError(f"{function}: clip must be above 0{_in_fp32(clip)}, got {clip}")


def residual_options(
    function: str, grad: Tensor, decay: object, clip: object, stats: object
) -> tuple[float, Tensor | None, Tensor | None]:
    """Decay, the clip on the device of grad, and the values of the statistics; raises unless all are fit.

    A clip that is a tensor is not looked at: that would wait for the device.
    """
    if clip is None and stats is None and type(decay) is float and decay == 1:
        return decay, None, None
    decay, clip = plain_real(decay), plain_real(clip)
    check_residual(function, decay, None if isinstance(clip, Tensor) else clip)
    if isinstance(clip, Tensor):
        check_elements(function, "clip", clip, torch.float32, 1, grad)
        check_not_recorded(function, "clip", clip)
    elif isinstance(clip, (int, float)):
        clip = clip_of(clip, grad.device)
    if stats is None:
        return float(cast("float", decay)), cast("Tensor | None", clip), None
    if not isinstance(stats, Statistics):
        raise DtypeError(f"{function}: stats must be a gck.Statistics, got {shown(stats)}")
    values = stats.values
    check_written(function, "stats", values, torch.float64, len(FIELDS), grad)
    if values.dim() != 1:
        raise ShapeMismatchError(
            f"{function}: stats must have shape ({len(FIELDS)},), got shape {tuple(values.shape)}"
        )
    check_not_recorded(function, "stats", values)
    # In quotes, for torch.compile of torch 2.6.
    return float(cast("float", decay)), cast("Tensor | None", clip), values


def check_power_of_two(function: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
    if not low <= value <= high or value & (value - 1):
        raise ArgumentError(f"{function}: {name} must be a power of two in [{low}, {high}], got {value}")
    return value
