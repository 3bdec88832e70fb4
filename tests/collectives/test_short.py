"""A message that is shorter than what a rank waits for, which gloo takes without a word."""

from __future__ import annotations

from pathlib import Path

from tests.collectives.launcher import run_ranks


def test_a_message_that_is_too_short_is_no_result(tmp_path: Path) -> None:
    result = run_ranks("tests.collectives.short_worker", 2, tmp_path)[0]
    assert result["error"] == "CollectiveMismatchError", result
    assert "rank 1 sent less than was waited for" in result["text"]
    assert result["unchanged"]
    assert result["after"] == "GroupUnusableError"
