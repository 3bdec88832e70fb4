"""A message that is shorter than what a rank waits for, which gloo takes without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collectives.launcher import run_ranks


@pytest.mark.parametrize(("numel", "part"), [(1 << 15, 0), *((1 << 20, part) for part in range(3))])
def test_a_message_that_is_too_short_is_no_result(numel: int, part: int, tmp_path: Path) -> None:
    """Or a part of a long one."""
    result, peer = run_ranks("tests.collectives.short_worker", 2, tmp_path, str(numel), str(part))
    assert result["error"] == "CollectiveMismatchError", result
    assert "rank 1 sent less than was waited for" in result["text"]
    assert result["unchanged"]
    assert result["after"] == "GroupUnusableError"
    assert peer["told"] < 10  # the group's timeout is 30
