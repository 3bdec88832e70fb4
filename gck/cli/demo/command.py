"""`gck demo`: checks its options, runs the demo, and says in one line what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gck.cli.demo.configurations import CONFIGURATIONS
from gck.cli.demo.runner import run
from gck.cli.demo.settings import Settings
from gck.cli.links import parse_rate
from gck.cli.messages import stop
from gck.cli.signals import Terminated
from gck.errors import ArgumentError, GckError

__all__ = ["main"]


def main(
    *, steps: int, workers: int, rate: str, out: Path, use_links: bool, only: Sequence[str], limit: float
) -> int:
    """Returns the exit status: 0, 1 after a failure, 2 for wrong options, 128 + signal if interrupted."""
    console = Console()
    settings = Settings(workers=workers, steps=steps)
    try:
        parse_rate(rate)
        run(console, settings, _chosen(only), rate=rate, use_links=use_links, out=out, limit=limit)
    except ArgumentError as error:
        return stop("gck demo", str(error), 2)
    except GckError as error:
        return stop("gck demo", str(error), 1)
    except KeyboardInterrupt:
        return stop("gck demo", "interrupted; no worker and no namespace is left", 130)
    except Terminated as ended:
        return stop(
            "gck demo",
            f"ended by signal {ended.number}; no worker and no namespace is left",
            128 + ended.number,
        )
    return 0


def _chosen(only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in CONFIGURATIONS:
            raise ArgumentError(f"--only must be one of {', '.join(CONFIGURATIONS)}, got {name!r}")
    return [name for name in CONFIGURATIONS if not only or name in only]
