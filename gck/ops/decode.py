"""Payloads back to dense vectors."""

from __future__ import annotations

from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor

from gck import interop
from gck.coded_layout import INDEX_CODECS
from gck.compressor import compressor_class
from gck.errors import AllocationError, ArgumentError, CorruptPayloadError, DtypeError, ShapeMismatchError
from gck.kernels.chunk_topk import check_options
from gck.kernels.common import checks
from gck.kernels.index_codecs import check_index_codec
from gck.kernels.low_rank import LowRank
from gck.kernels.low_rank import check_options as check_low_rank
from gck.kernels.quantize import SCALES, check_format
from gck.kernels.sign import check_chunk_size
from gck.memory import copy_, empty
from gck.ops import direct
from gck.ops.registration import Array, plain, register
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
from gck.values import shown
from gck.wire import ALIGNMENT, body_of, layout_of

__all__ = ["decompress", "decompress_add_"]


A = TypeVar("A", bound=Array)


@overload
def decompress(payload: Payload | list[Any], out: None = None) -> Tensor: ...
@overload
def decompress(payload: Payload | list[Any], out: A) -> A: ...
def decompress(payload: Payload | list[Any], out: Any = None) -> Any:
    """The dense vector that a receiver of `payload` sees; of several payloads, the sum of theirs.

    Args:
        payload: any payload of gck, or a list of them, such as `gck.sparse_all_gather` returns: at least one,
            all made by one compressor, its seed, k and dtypes included, from vectors of one size. They are
            added in their order, to zeros, one rounding each: the same bits on every rank and device. On the
            CPU they are read where they lie, with torch 2.10 or later, unless a mode or a profiler looks on,
            or fields of one have other distances than in the first; and so are those at equal distances in
            one buffer, as collectives leave them. Else they are copied into one first; those with coded
            indices are decoded.
        out: (payload.numel elements) fp32, contiguous, on the payload's device; overwritten.

    Returns:
        out, an array where it is one, or a new (numel,) fp32 tensor; on the CPU its storage cannot be resized
        where it is large.

    Single payloads trace under torch.compile; lists, whose place in memory is looked at, do not.

    Raises:
        ShapeMismatchError: out has another number of elements than the payload, or payloads differ.
        AllocationError: there is no room for so many elements, on the CPU.
        CorruptPayloadError: the payload contradicts itself. On CUDA, where looking at the indices would
            stop the stream, those out of range are skipped instead.
    """
    done = direct.decompress(payload, out, 1.0, False)
    if done is not None:
        return done
    payload = _own(payload)
    _, fields, _ = _parts("decompress", _first("decompress", payload))
    if out is None:
        numel = _first("decompress", payload).numel
        try:
            out = empty(numel, torch.float32, fields[0].device)
        except AllocationError as error:
            raise AllocationError(
                f"decompress: {error}; of bytes from elsewhere, give gck.from_bytes a max_numel"
            ) from error
    return _decode("decompress", out, payload, 1.0, False)


def decompress_add_(out: A, payload: Payload | list[Any], alpha: float | list[float] = 1.0) -> A:
    """Adds alpha * decompress(payload) to out: one product and one sum in fp32 an element.

    Of several payloads, one product and one sum each, in their order.

    Args and errors as for `decompress`. alpha: finite; of a list of payloads a list of as many numbers, too,
    such as weights of clients: in one pass where payloads are read where they lie, else one after the other
    on a copy of out, all or nothing. Returns out.
    """
    if isinstance(alpha, (tuple, list)):  # not `tuple | list`: see `kernels.low_rank.check_options`
        return _add_weighted("decompress_add_", out, _own(payload), [*alpha])
    done = None if out is None else direct.decompress(payload, out, alpha, True)
    return _decode("decompress_add_", out, _own(payload), alpha, True) if done is None else cast("A", done)


def _own(payload: Any) -> Any:
    """A list of our own: whoever holds the other one may change it meanwhile, on another thread."""
    return [*payload] if isinstance(payload, list) else payload


def _first(function: str, payload: Payload | list[Any]) -> Payload:
    if not isinstance(payload, list):
        return payload
    if not payload:
        raise ArgumentError(f"{function}: payload must be a payload or a list of at least one, got []")
    return cast("Payload", payload[0])


def _parts(function: str, payload: object) -> tuple[str, list[Tensor], list[int]]:
    """(compressor's name, fields, options) of a payload that is well formed as far as shapes tell."""
    # Spelled out by type: older versions of torch.compile cannot trace a NamedTuple's properties.
    if isinstance(payload, SparseGrad):
        name, fields = "topk", [payload.values, payload.indices]
        options: list[int] = []
    elif isinstance(payload, CodedSparse):
        name = "topk"
        fields, options = _coded(function, payload)
    elif isinstance(payload, PackedSigns):
        name, fields, options = "sign", [payload.words, payload.scales], [payload.chunk_size]
        check_chunk_size(function, payload.chunk_size)
    elif isinstance(payload, ChunkSparse):
        name, fields = "chunk_topk", [payload.values, payload.scales, payload.indices]
        options = [payload.chunk_size, payload.k, payload.value_bits]
        check_options(function, payload.k, payload.chunk_size, payload.value_bits)
    elif isinstance(payload, Quantized):
        name, fields = "quantize", [payload.codes, payload.scales]
        check_format(function, payload.bits, payload.chunk_size, payload.scale)
        options = [payload.bits, payload.chunk_size, SCALES.index(payload.scale)]
    elif isinstance(payload, SeededValues):
        name, fields, options = "random_k", [payload.values], [payload.seed]
        checks.check_seed(function, payload.seed)
    elif isinstance(payload, LowRankFactors):
        name, fields, options = "low_rank", [payload.left, payload.right], [payload.columns]
    else:
        hint = "; several are given as a list" if isinstance(payload, (tuple, set)) else ""
        raise DtypeError(f"{function}: payload must be a payload of gck, got {shown(payload)}{hint}")
    for index, field in enumerate(fields):
        checks.check_tensor(function, f"payload field {index}", field)
        checks.check_not_recorded(function, f"payload field {index}", field)
    if isinstance(payload.numel, bool) or not isinstance(payload.numel, (int, torch.SymInt)):
        raise DtypeError(f"{function}: payload.numel must be an int, got {shown(payload.numel)}")
    if payload.numel < 0:
        raise ArgumentError(f"{function}: payload.numel must be at least 0, got {payload.numel}")
    if isinstance(payload, LowRankFactors):
        _check_factors(function, payload)
    return name, fields, options


def _check_factors(function: str, payload: LowRankFactors) -> None:
    """Of factors shapes tell all that can be wrong; by hand, they could be those of others in one buffer."""
    left, right, numel, columns = payload
    if columns is None:  # which compressors choose by themselves, and payloads say
        raise DtypeError(f"{function}: columns must be an int, got None")
    if numel or type(columns) is not int or columns:  # of nothing there are none
        check_low_rank(function, 1, columns)
    if left.dim() != 2 or right.dim() != 2 or columns > numel:
        raise CorruptPayloadError(
            f"{function}: payload left of {tuple(left.shape)} and right of {tuple(right.shape)} do not fit "
            f"{numel} elements in rows of {columns}"
        )
    LowRank.for_fields((left, right), (columns,)).check_fields(function, numel, (left, right))


def _coded(function: str, payload: CodedSparse) -> tuple[list[Tensor], list[int]]:
    check_index_codec(function, payload.index_codec)
    for name, value in (("k", payload.k), ("value_bits", payload.value_bits)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{function}: payload.{name} must be an int, got {shown(value)}")
    if payload.k < 0 or payload.value_bits not in (0, 4, 8):
        raise ArgumentError(
            f"{function}: payload.k must be at least 0 and payload.value_bits 0, 4 or 8, got {payload.k} and "
            f"{payload.value_bits}"
        )
    if payload.index_codec == "int32" and not payload.value_bits:
        return [payload.values, payload.index_low], []
    options = [payload.k, payload.value_bits, INDEX_CODECS.index(payload.index_codec)]
    return [payload.values, payload.scales, payload.index_low, payload.index_high], options


def _decode(function: str, out: A, payload: Payload | list[Any], alpha: float, accumulate: bool) -> A:
    first = _first(function, payload)
    name, fields, options = _parts(function, first)
    if not isinstance(out, Tensor):
        with interop.borrowed(function, ("out",), out=out) as (tensor,):
            if direct.decompress(payload, tensor, alpha, accumulate) is None:
                _decode(function, tensor, payload, alpha, accumulate)
        return out
    checks.check_fp32(function, "out", out)
    if out.numel() != first.numel:
        raise ShapeMismatchError(
            f"{function}: out has {out.numel()} elements, the payload is of {first.numel}"
        )
    alpha = checks.check_alpha(function, alpha)
    if isinstance(payload, list):
        bodies = _bodies(function, out, payload, fields, options)
        add = _decompress_sum if plain(out, bodies, *fields) else torch.ops.gck.decompress_sum_
        add(out, bodies, name, fields, options, alpha, accumulate)
    else:
        call = _decompress if plain(out, *fields) else torch.ops.gck.decompress_
        call(out, name, fields, options, alpha, accumulate)
    return out


def _add_weighted(function: str, out: A, payloads: Any, alphas: list[Any]) -> A:
    if not isinstance(payloads, list) or len(payloads) != len(alphas):
        given = f"{len(payloads)} payloads" if isinstance(payloads, list) else "one payload"
        raise ArgumentError(
            f"{function}: alpha must be a number, or a list of one for each payload of a list, got "
            f"{len(alphas)} numbers and {given}"
        )
    if not isinstance(out, Tensor):
        with interop.borrowed(function, ("out",), out=out) as (tensor,):
            _add_weighted(function, tensor, payloads, alphas)
        return out
    alphas = [checks.check_alpha(function, alpha) for alpha in alphas]
    if direct.decompress(payloads, out, alphas, True) is not None:
        return out
    first = _first(function, payloads)
    _, fields, options = _parts(function, first)
    checks.check_fp32(function, "out", out)
    _check_alike(function, out, payloads, fields, options)
    total = out.clone()
    for index, (payload, alpha) in enumerate(zip(payloads, alphas, strict=True)):
        try:
            _decode(function, total, payload, alpha, True)
        except CorruptPayloadError as error:
            said = str(error).removeprefix(f"{function}: ")
            raise CorruptPayloadError(f"{function}: payload {index}: {said}") from None
    out.copy_(total)
    return out


def _check_alike(
    function: str, out: Tensor, payloads: list[Any], fields: list[Tensor], options: list[int]
) -> list[list[Tensor]]:
    """The fields of all payloads, which must be of the kind, options and size of the first, whose fields and
    options are given, and share no memory with out."""
    of_all = []
    for index, payload in enumerate(payloads):
        _, own, own_options = _parts(f"{function}: payload {index}", payload)
        alike = type(payload) is type(payloads[0]) and own_options == options
        if not alike or payload.numel != payloads[0].numel or layout_of(*own) != layout_of(*fields):
            raise ShapeMismatchError(
                f"{function}: payload {index} must be of the kind, options and size of payload 0, got "
                f"{_described(payload)} and {_described(payloads[0])}"
            )
        checks.check_device(function, f"payload {index}", own[0], "payload 0", fields[0])
        for place, field in enumerate(own):  # of copies no one could tell any more
            checks.check_no_overlap(function, **{"out": out, f"payload {index} field {place}": field})
        of_all.append(own)
    return of_all


def _bodies(
    function: str, out: Tensor, payloads: list[Any], fields: list[Tensor], options: list[int]
) -> Tensor:
    """(W, nbytes) uint8: the payloads' bodies, in one buffer. Copied unless they lie in one already."""
    bodies = [body_of(*own) for own in _check_alike(function, out, payloads, fields, options)]
    stride = bodies[1].data_ptr() - bodies[0].data_ptr() if len(bodies) > 1 else 0
    storage = bodies[0].untyped_storage()
    aligned = stride % ALIGNMENT == 0 and bodies[0].storage_offset() % ALIGNMENT == 0
    in_place = (
        aligned
        and stride >= bodies[0].numel()
        and all(
            body.untyped_storage().data_ptr() == storage.data_ptr()
            and body.data_ptr() - bodies[0].data_ptr() == index * stride
            for index, body in enumerate(bodies)
        )
    )
    if not in_place:
        return _stacked(function, bodies)
    return bodies[0].as_strided((len(bodies), bodies[0].numel()), (stride, 1))


def _stacked(function: str, bodies: list[Tensor]) -> Tensor:
    """torch.stack(bodies), on the CPU in memory that results have freed: fresh pages would take several times
    as long as the decoding."""
    if not bodies[0].is_cpu:
        return torch.stack(bodies)
    try:
        rows = empty(len(bodies) * bodies[0].numel(), torch.uint8, bodies[0].device)
    except AllocationError as error:
        raise AllocationError(f"{function}: payloads cannot be put into one buffer: {error}") from error
    rows = rows.view(len(bodies), -1)
    for row, body in zip(rows, bodies, strict=True):
        copy_(row, body)
    return rows


def _described(payload: Payload) -> str:
    parts = (
        f"{name}={tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{name}={value}"
        for name, value in zip(payload._fields, payload, strict=True)
    )
    return f"{type(payload).__name__}({', '.join(parts)})"


def _decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    decoder = compressor_class(compressor).for_fields(tuple(fields), tuple(options))
    decoder.decompress(
        "decompress_add_" if accumulate else "decompress", out, tuple(fields), alpha, accumulate
    )
    torch.autograd.graph.increment_version(out)


def _fake_decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    return None


def _decompress_sum(
    out: Tensor,
    bodies: Tensor,
    compressor: str,
    fields: list[Tensor],
    options: list[int],
    alpha: float,
    accumulate: bool,
) -> None:
    """`fields` are those of one payload, and tell what the bodies hold."""
    function = "decompress_add_" if accumulate else "decompress"
    decoder = compressor_class(compressor).for_fields(tuple(fields), tuple(options))
    decoder.decompress_sum(function, out, bodies, layout_of(*fields), alpha, accumulate)
    torch.autograd.graph.increment_version(out)


def _fake_decompress_sum(
    out: Tensor,
    bodies: Tensor,
    compressor: str,
    fields: list[Tensor],
    options: list[int],
    alpha: float,
    accumulate: bool,
) -> None:
    return None


register(
    "decompress_sum_(Tensor(a!) out, Tensor bodies, str compressor, Tensor[] fields, SymInt[] options,"
    " float alpha, bool accumulate) -> ()",
    _decompress_sum,
    _fake_decompress_sum,
)
register(
    "decompress_(Tensor(a!) out, str compressor, Tensor[] fields, SymInt[] options, float alpha,"
    " bool accumulate) -> ()",
    _decompress,
    _fake_decompress,
)
