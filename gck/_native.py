"""The one place that loads the compiled module `gck._C`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from gck.errors import BackendUnavailableError

__all__ = ["load", "num_threads", "sees_tensors"]


@cache
def load() -> Any:
    """The compiled module; `_C.pyi` has its typing.

    torch is imported above, before it: the loader then binds our OpenMP calls to the runtime that
    torch brought, and the process has one thread pool.

    Raises:
        BackendUnavailableError: the package was not built, or GCK_ISA names no instruction set that this
            machine has; says what to do.
    """
    try:
        native = import_module("gck._C")
    except ImportError as error:
        raise BackendUnavailableError(
            f"gck._C: the compiled module cannot be loaded ({error}). Install the package with "
            "`pip install .`, or build it in place with `cmake -S . -B build/local && "
            "cmake --build build/local && cmake --install build/local --prefix .`"
        ) from error
    try:
        native.isa()
    except RuntimeError as error:
        raise BackendUnavailableError(
            f"gck._C: {error}. Unset this environment variable, and the best set is taken"
        ) from error
    return native


@cache
def sees_tensors() -> bool:
    """Whether the compiled module can look at tensors itself, and make some: torch has DLPack's table of
    functions since 2.10. Without it all goes by addresses, which takes a few microseconds longer."""
    return bool(load().find_tensors(torch.Tensor))


def num_threads() -> int:
    """Threads that CPU kernels use: torch's intra-op setting."""
    return torch.get_num_threads()
