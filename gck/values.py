"""Values that callers give: numbers of other libraries made plain, flags checked, and how errors quote what
they refuse."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from reprlib import Repr
from typing import Any

from torch import Tensor

from gck.errors import DtypeError

__all__ = [
    "MOST_FP32",
    "MOST_FP64",
    "ZERO_FP32",
    "check_flags",
    "make_plain",
    "plain_int",
    "plain_real",
    "shown",
]

MOST = 80  # characters of a value's text
MOST_FP32 = (2 - 2**-23) * 2.0**127  # the largest number of fp32
ZERO_FP32 = 2.0**-150  # the largest number that fp32 rounds to 0
MOST_FP64 = sys.float_info.max


def plain_int(value: Any) -> Any:
    """The plain int of a whole number of another class, such as NumPy's; anything else is returned as it is,
    for the caller to check: also a bool, which is no number here."""
    if type(value) is int or value is None:  # by far the most calls
        return value
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def plain_real(value: Any) -> Any:
    """The plain float of a real number of another class, such as NumPy's, or the int of a whole one; anything
    else is returned as it is, see `plain_int`."""
    if type(value) is float or type(value) is int or value is None:
        return value
    if isinstance(value, Integral):
        return plain_int(value)
    try:
        return float(value) if isinstance(value, Real) else value
    except OverflowError:  # of a fraction
        return value


def make_plain(options: object, wholes: Iterable[str], reals: Iterable[str]) -> None:
    """Makes these fields of a frozen dataclass plain: it then compares, prints and is saved as if it had been
    given plain numbers."""
    for kind, convert, names in ((int, plain_int, wholes), (float, plain_real, reals)):
        for name in names:
            given = getattr(options, name)
            if given is not None and type(given) is not kind:
                object.__setattr__(options, name, convert(given))


def check_flags(function: str, **flags: object) -> None:
    """Raises DtypeError unless each of these arguments is True or False: "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise DtypeError(f"{function}: {name} must be a bool, got {shown(value)}")


def shown(value: Any) -> str:
    """How an error quotes a value that it refuses: as Python writes it, cut short, and of which type it is.

    Of tensors and of other libraries' arrays never the contents: they may be on a device, and would be waited
    for. Never raises.
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    try:
        if isinstance(value, Tensor):
            if value.is_nested:  # its shape may be none
                return f"a nested tensor, {value.dtype}, {value.device}"
            return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.device}"
        if _is_array(value):
            return f"an array of shape {tuple(value.shape)}, {value.dtype} ({kind})"
        text = _SHORT.repr(value)
    except Exception:  # its repr is the caller's, as are those of what it holds
        return f"an object that cannot be shown ({kind})"
    if len(text) > MOST:
        text = f"{text[: MOST - 3]}..."
    return f"{text} ({kind})"


def _is_array(value: Any) -> bool:
    """Whether it is memory that may be on a device, with a shape and a dtype."""
    shared = hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")
    return shared and hasattr(value, "shape") and hasattr(value, "dtype")


class _Short(Repr):
    """Short texts, of tensors and arrays without what is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = MOST

    def repr1(self, x: Any, level: int) -> str:
        name = type(x).__name__
        if isinstance(x, Tensor) or _is_array(x):
            return f"<{name} of shape {tuple(x.shape)}>"
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return self._named(name, dict(zip(x._fields, x, strict=True)), level)
        if is_dataclass(x):
            return self._named(name, {f.name: getattr(x, f.name) for f in fields(x) if f.repr}, level)
        for kind in (dict, list, tuple):  # also classes made of these
            if isinstance(x, kind):
                text: str = getattr(self, f"repr_{kind.__name__}")(x, level)
                return text
        if isinstance(x, bytes | bytearray):
            return repr(x[:MOST])
        written: Any = type(x).__repr__
        if written is object.__repr__:  # an address, which is another one in every process
            return f"<{name} object>"
        return super().repr1(x, level)

    def _named(self, name: str, values: dict[str, Any], level: int) -> str:
        if level <= 0:
            return f"{name}(...)"
        parts = (f"{key}={self.repr1(value, level - 1)}" for key, value in values.items())
        return f"{name}({', '.join(parts)})"


_SHORT = _Short()
