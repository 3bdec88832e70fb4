"""Top-k of a list of tensors, in a number of launches that does not depend on their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gck import interop
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks
from gck.kernels.common.base import backend
from gck.kernels.topk import TopK, check_options, resolve_k
from gck.kernels.topk.lists import bodies_of
from gck.memory import empty
from gck.ops.registration import Array, plain, register
from gck.payload import SparseGrad
from gck.values import plain_int, plain_real, shown

__all__ = ["topk_ef_list_"]

FUNCTION = "topk_ef_"


def topk_ef_list_(
    grads: Sequence[Array],
    errs: Sequence[Array],
    ratio: float | None = None,
    *,
    k: int | Sequence[int] | None = None,
    flat: bool = False,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
) -> list[SparseGrad] | SparseGrad:
    """What `gck.topk_ef_` does with lists; see there."""
    for name, value in (("grad", grads), ("err", errs)):
        if not isinstance(value, (list, tuple)):
            raise DtypeError(f"{FUNCTION}: grad and err must both be lists, got {name} as {shown(value)}")
    if len(grads) != len(errs):
        raise ShapeMismatchError(
            f"{FUNCTION}: lists must be of one length, got {len(grads)} gradients and {len(errs)} residuals"
        )
    tensors = [array for array in grads if isinstance(array, Tensor)]
    residuals = [array for array in errs if isinstance(array, Tensor)]
    if len(tensors) + len(residuals) < 2 * len(grads):
        with interop.borrowed(FUNCTION, tuple(_named(errs, "err")), **_named(grads, "grad"),
                              **_named(errs, "err")) as borrowed:  # fmt: skip
            g, e = borrowed[: len(grads)], borrowed[len(grads) :]
            options: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip}
            return topk_ef_list_(g, e, ratio, k=k, flat=flat, value_dtype=value_dtype, **options)
    _check_tensors(tensors, residuals, nonfinite)
    sizes = [grad.numel() for grad in tensors]
    counts = _counts(sizes, ratio, k, flat, value_dtype)
    like = tensors[0] if tensors else torch.empty(0)
    beta, limit, _ = checks.residual_options(FUNCTION, like, decay, clip, None)
    if not tensors:
        return _nothing(value_dtype) if flat else []
    call = _topk_ef_list if plain(*tensors, *residuals, nonfinite, limit) else torch.ops.gck.topk_ef_list_
    memory = call(tensors, residuals, counts, flat, value_dtype, nonfinite, beta, limit)
    numels = [sum(sizes)] if flat else sizes
    values, indices = bodies_of(numels, counts, value_dtype).fields(memory)
    payloads = list(map(SparseGrad, values, indices, numels))
    return payloads[0] if flat else payloads


def _nothing(value_dtype: torch.dtype) -> SparseGrad:
    return SparseGrad(torch.empty(0, dtype=value_dtype), torch.empty(0, dtype=torch.int32), 0)


A = TypeVar("A", bound=Array)


def _named(arrays: Sequence[A], name: str) -> dict[str, A]:
    return {f"{name}[{i}]": array for i, array in enumerate(arrays)}


def _check_tensors(grads: list[Tensor], errs: list[Tensor], nonfinite: Tensor | None) -> None:
    if not checks.acceptable_pairs(grads, errs):
        for i, (grad, err) in enumerate(zip(grads, errs, strict=True)):
            checks.check_grad(FUNCTION, grad, f"grad[{i}]")
            checks.check_fp32(FUNCTION, f"err[{i}]", err)
            checks.check_same(FUNCTION, f"err[{i}]", err, f"grad[{i}]", grad)
            checks.check_device(FUNCTION, f"grad[{i}]", grad, "grad[0]", grads[0])
    if grads:
        checks.check_nonfinite(FUNCTION, nonfinite, grads[0])


def _counts(
    sizes: list[int],
    ratio: float | None,
    k: int | Sequence[int] | None,
    flat: bool,
    value_dtype: torch.dtype,
) -> list[int]:
    """How many entries each payload keeps: one number where they are selected together, else one a tensor."""
    ratio = plain_real(ratio)
    if isinstance(k, (list, tuple)):
        if flat or len(k) != len(sizes) or ratio is not None:
            wanted = "one int for a flat list" if flat else f"an int or {len(sizes)} ints, without a ratio"
            raise ArgumentError(f"{FUNCTION}: k must be {wanted}, got {list(k)}")
        check_options(FUNCTION, None, 1, value_dtype)
        each: list[int | None] = [plain_int(count) for count in k]
    else:
        one: int | None = plain_int(k)
        check_options(FUNCTION, ratio, one, value_dtype)
        if flat:
            return [resolve_k(FUNCTION, sum(sizes), ratio, one)]
        if one is None:
            return [resolve_k(FUNCTION, size, ratio, None) for size in sizes]
        each = [one] * len(sizes)
    counts = []
    for i, (size, count) in enumerate(zip(sizes, each, strict=True)):
        if size:  # of an empty tensor nothing is kept, whatever was asked for
            check_options(f"{FUNCTION}: grad[{i}]", ratio, count, value_dtype)
        counts.append(resolve_k(f"{FUNCTION}: grad[{i}]", size, ratio, count))
    return counts


def _topk_ef_list(
    grads: list[Tensor],
    errs: list[Tensor],
    ks: list[int],
    flat: bool,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
) -> Tensor:
    written = errs if nonfinite is None else [*errs, nonfinite]
    given = {"nonfinite": nonfinite, "clip": clip}
    others = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not checks.apart([*grads, *errs, *others.values()]):
        checks.check_no_overlap(FUNCTION, **_named(grads, "grad"), **_named(errs, "err"), **others)
    numels = [grad.numel() for grad in grads]
    total = sum(numels)
    bodies = bodies_of([total] if flat else numels, ks, value_dtype)
    # Zeroed as a whole: to zero the padding of each payload would take a launch each.
    memory = empty(bodies.nbytes, torch.uint8, grads[0].device).zero_()
    kernels = backend(FUNCTION, TopK.package, grads[0].device)
    if total and flat:
        compressor = TopK(k=ks[0], value_dtype=value_dtype, decay=decay)
        kernels.compress_flat_(compressor, grads, errs, memory.unsqueeze(0), nonfinite, clip)
    elif total:
        kernels.compress_list_(bodies, grads, errs, memory, nonfinite, decay, clip)
    torch.autograd.graph.increment_version(written)
    return memory


def _fake_topk_ef_list(
    grads: list[Tensor],
    errs: list[Tensor],
    ks: list[int],
    flat: bool,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
) -> Tensor:
    numels = [grad.numel() for grad in grads]
    nbytes = bodies_of([sum(numels)] if flat else numels, ks, value_dtype).nbytes
    return grads[0].new_empty((nbytes,), dtype=torch.uint8)


register(
    "topk_ef_list_(Tensor[] grads, Tensor(a!)[] errs, SymInt[] ks, bool flat, ScalarType value_dtype,"
    " Tensor(b!)? nonfinite, float decay=1.0, Tensor? clip=None) -> Tensor",
    _topk_ef_list,
    _fake_topk_ef_list,
)
