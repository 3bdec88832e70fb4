"""What the interpreter cannot check about a launch: its grid, and that a compiled kernel would take it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}


def recorded(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, grid, keyword arguments) of each launch; positional arguments are checked on the way."""
    from triton.runtime.interpreter import InterpretedFunction

    launches = []
    launch = InterpretedFunction.run

    def spy(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        inspect.signature(self.fn).bind(*args, **named)  # a compiled launch refuses what is too much
        launches.append((self.fn, grid, kwargs))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", spy)
    run()
    monkeypatch.undo()
    return launches
