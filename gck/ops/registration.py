"""How a function becomes an operator of the `gck` namespace, and what operators that compress share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from gck.kernels.common.base import KernelCompressor
from gck.memory import unwatched

__all__ = ["Array", "compress", "fake_body", "plain", "register"]

_library = torch.library.Library("gck", "DEF")


class Array(Protocol):
    """A torch tensor, or anything that speaks DLPack: NumPy and CuPy arrays among them."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator: `kernel` runs on the CPU and on CUDA, `fake` tells shapes while tracing."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"gck::{name}", fake, lib=_library)


def plain(*tensors: Tensor | None) -> bool:
    """Whether dispatching an operator on these tensors would do nothing but call its kernel.

    That is: it is `unwatched`, and no tensor is of a class of its own or negated lazily. Calling the kernel
    directly then spares more than a small kernel's own time.
    """
    if not unwatched():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


def compress(
    function: str,
    compressor: KernelCompressor,
    grad: Tensor,
    err: Tensor | None,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    **options: Tensor | None,
) -> Tensor:
    """The new body that `compressor` makes of grad and err, on behalf of a public function.

    Inputs must have passed `compressor.check_inputs`; see `KernelCompressor.run` for the options.
    """
    # Not zeroed as a whole: kernels write all of a single body's fields, and it may be large.
    body = compressor.layout(grad.numel()).empty_body(grad.device)
    bodies = body if compressor.shard_unit is None else body.unsqueeze(0)
    compressor.run(function, grad, err, bodies, nonfinite, clip, **options)
    torch.autograd.graph.increment_version([t for t in (err, nonfinite, *options.values()) if t is not None])
    return body


def fake_body(compressor: KernelCompressor, grad: Tensor) -> Tensor:
    """What `compress` returns, as far as tracing needs to know."""
    return grad.new_empty((compressor.layout(grad.numel()).nbytes,), dtype=torch.uint8)
