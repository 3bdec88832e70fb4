"""One rank of tests/test_ddp.py: every `check_*` of three modules, in order."""

from __future__ import annotations

from collections.abc import Callable

from tests.collectives import ddp_errors, ddp_states, ddp_training, launcher

CHECKS: dict[str, Callable[[], None]] = {
    name: check
    for module in (ddp_training, ddp_states, ddp_errors)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


if __name__ == "__main__":
    directory, rank, _ = launcher.init()
    launcher.report(directory, rank, launcher.run_checks(CHECKS))
    launcher.leave()
