"""Triton's interpreter, without most of what it does again and again, and with the NumPy of today.

At every call of a function, from within kernels as well, it looks through all of triton.language for what to
replace, which was a third to a half of the time of these tests. What a kernel has replaced stays so for the
functions that it calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Replaces a private function of Triton's; does nothing where it is another than is known here."""
    scope = getattr(interpreter, "_LangPatchScope", None)
    if hasattr(scope, "restore") and hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once(interpreter._patch_lang, scope)


def admit_numpy() -> None:
    """Triton 3.6, of torch 2.10 and 2.11, takes arrays of one element for numbers; NumPy 2.5 does not."""
    of_tensors = getattr(interpreter, "_patch_lang_tensor", None)
    if of_tensors is None or list(inspect.signature(of_tensors).parameters) != ["tensor", "scope"]:
        return

    def replace(tensor: Any, scope: Any) -> None:
        of_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = replace


def _once(replace: Callable[[Any], Any], scope: Callable[[], Any]) -> Callable[[Any], Any]:
    replaced: set[str] = set()  # modules

    def replace_once(fn: Any) -> Any:
        modules = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= replaced:
            return scope()
        made, new = replace(fn), modules - replaced
        restore = made.restore

        def restored() -> None:  # not called for what a kernel calls: Triton leaves that as it is
            replaced.difference_update(new)
            restore()

        made.restore = restored
        replaced.update(new)
        return made

    return replace_once
