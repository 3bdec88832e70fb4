"""Which compressor is for which parameter: one for all, or by the parameters' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from gck.compressor import Compressor, check_compressor, describe
from gck.errors import ArgumentError, DtypeError
from gck.values import shown

__all__ = ["Choosable", "CompressorChoice"]

Choosable = Compressor | Mapping[str, Compressor | None]


class CompressorChoice:
    """One compressor for every name, or that of the first pattern which a name matches.

    Args:
        function: for texts of errors.
        compressor: one; or patterns as of the shell ("embed.*", "*.weight", "*") to a compressor, or to None,
            which is for parameters that are not compressed. Copied.

    Attributes:
        by_name: whether names count.
        compressors: in the order in which they were given, each once.

    Raises:
        DtypeError: what is no Compressor, or a pattern that is no string.
        ArgumentError: no pattern has a compressor.
    """

    def __init__(self, function: str, compressor: object) -> None:
        self.by_name = isinstance(compressor, Mapping)
        patterns = dict(compressor) if isinstance(compressor, Mapping) else {"*": compressor}
        self.compressors: list[Compressor] = []
        self._patterns: dict[str, Compressor | None] = {}
        self._chosen: dict[str, Compressor | None] = {}
        for pattern, one in patterns.items():
            if not isinstance(pattern, str):
                raise DtypeError(f"{function}: compressor must have names for keys, got {shown(pattern)}")
            none = one is None and self.by_name
            self._patterns[pattern] = None if none else self._one_for_equals(check_compressor(function, one))
        if not self.compressors:
            raise ArgumentError(
                f"{function}: compressor must name a compressor, got {shown(compressor)}; to send all "
                'gradients without compression, algorithm="dense"'
            )

    @property
    def given(self) -> Choosable:
        """The compressor, or the patterns, which can't be changed."""
        return MappingProxyType(self._patterns) if self.by_name else self.compressors[0]

    def _one_for_equals(self, compressor: Compressor) -> Compressor:
        """One that is in `compressors`, so that parameters of equal ones share messages."""
        found = next((known for known in self.compressors if _same(known, compressor)), None)
        if found is None:
            self.compressors.append(compressor)
        return found or compressor

    def of(self, function: str, name: str) -> Compressor | None:
        """That of a parameter; None: it is not compressed.

        Raises:
            ArgumentError: no pattern matches.
        """
        if name not in self._chosen:
            matching = (pattern for pattern in self._patterns if not self.by_name or _matches(name, pattern))
            pattern = next(matching, None)
            if pattern is None:
                raise ArgumentError(
                    f'{function}: no pattern of compressor matches {name!r}; "*" matches the rest'
                )
            self._chosen[name] = self._patterns[pattern]
        return self._chosen[name]

    def check_names(self, function: str, names: Iterable[str]) -> None:
        """Finds patterns that are misspelt, or come too late.

        Raises:
            ArgumentError: a pattern is not the first that matches for any of the names.
        """
        if not self.by_name:
            return
        names = list(names)
        left = set(names)
        for pattern in self._patterns:
            matched = {name for name in names if _matches(name, pattern)}
            if not matched:
                close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise ArgumentError(
                    f"{function}: model has no parameter for {pattern!r} of compressor, but "
                    f"{', '.join(close)}; parameters that modules share have the name of the first"
                )
            if not matched & left:
                raise ArgumentError(
                    f"{function}: {pattern!r} of compressor comes too late: patterns before it match all "
                    "that it does, and the first counts"
                )
            left -= matched

    def describe(self) -> str:
        """The same text in every process, without fields that are others at every step."""
        if not self.by_name:
            return describe(self.compressors[0], of_a_step=False)
        texts = (
            f"{pattern!r}: {None if one is None else describe(one, of_a_step=False)}"
            for pattern, one in self._patterns.items()
        )
        return f"{{{', '.join(texts)}}}"


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _same(a: Any, b: Any) -> bool:
    """Also in what does not count in comparisons, such as the seed of a rounding."""
    if a is b:
        return True
    fields = dataclasses.fields(a) if dataclasses.is_dataclass(a) and type(a) is type(b) else ()
    try:
        return bool(fields) and all(getattr(a, field.name) == getattr(b, field.name) for field in fields)
    except Exception:  # of a field whose comparison is no truth, as of tensors
        return False
