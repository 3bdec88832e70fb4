"""One rank of tests/test_ddp.py: every `check_*` of three modules, in order."""

from __future__ import annotations

import traceback
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
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break  # ranks may be out of step now
    launcher.report(directory, rank, results)
    launcher.leave()
