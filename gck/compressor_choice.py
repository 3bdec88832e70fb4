"""Which compressor is for which parameter: one for all, or by the parameters' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

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
        self._patterns: dict[str, Compressor | None] = {}
        for pattern, one in patterns.items():
            if not isinstance(pattern, str):
                raise DtypeError(f"{function}: compressor must have names for keys, got {shown(pattern)}")
            none = one is None and self.by_name
            self._patterns[pattern] = None if none else check_compressor(function, one)
        self.compressors: list[Compressor] = []
        for given in self._patterns.values():
            if given is not None and not any(given is known for known in self.compressors):
                self.compressors.append(given)
        if not self.compressors:
            raise ArgumentError(f"{function}: compressor must name a compressor, got {shown(compressor)}")

    def of(self, function: str, name: str) -> Compressor | None:
        """That of a parameter; None: it is not compressed.

        Raises:
            ArgumentError: no pattern matches.
        """
        for pattern, compressor in self._patterns.items():
            if not self.by_name or fnmatchcase(name, pattern):
                return compressor
        raise ArgumentError(f'{function}: no pattern of compressor matches {name!r}; "*" matches the rest')

    def check_names(self, function: str, names: Iterable[str]) -> None:
        """Finds patterns that are misspelt.

        Raises:
            ArgumentError: one matches none of the names.
        """
        names = list(names)
        for pattern in self._patterns:
            if self.by_name and not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(f"{function}: model has no parameter for {pattern!r} of compressor")

    def describe(self) -> str:
        """The same text in every process, without fields that are others at every step."""
        if not self.by_name:
            return describe(self.compressors[0], of_a_step=False)
        texts = (
            f"{pattern!r}: {None if one is None else describe(one, of_a_step=False)}"
            for pattern, one in self._patterns.items()
        )
        return f"{{{', '.join(texts)}}}"
