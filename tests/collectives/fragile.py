"""A compressor that breaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fragile:
    """A compressor whose n-th kernel call fails, after it wrote."""

    inner: Any
    fail_at: int = field(compare=False, repr=False)
    calls: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        return "fragile"

    @property
    def shard_unit(self) -> int | None:
        return self.inner.shard_unit

    def layout(self, numel: int) -> Any:
        return self.inner.layout(numel)

    def compress_(self, *args: Any, **kwargs: Any) -> None:
        self.inner.compress_(*args, **kwargs)
        self._count("compress_")

    def decompress_(self, *args: Any, **kwargs: Any) -> None:
        self.inner.decompress_(*args, **kwargs)
        self._count("decompress_")

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self.fail_at:
            raise MemoryError(f"call {self.fail_at}: {name}")


@dataclass(frozen=True)
class FragileInOnePass(Fragile):
    """The same of a compressor that reduces in one pass."""

    def reduce_(self, *args: Any, **kwargs: Any) -> None:
        self.inner.reduce_(*args, **kwargs)
        self._count("reduce_")
