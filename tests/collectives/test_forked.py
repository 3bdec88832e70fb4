"""A forked process has its parent's groups, and can use none of them."""

from __future__ import annotations

from pathlib import Path

from tests.collectives.launcher import run_ranks


def test_a_child_says_so_at_once_and_spoils_nothing(tmp_path: Path) -> None:
    for result in run_ranks("tests.collectives.forked_worker", 2, tmp_path):
        assert len(result["child"]) == 5
        for call in result["child"]:
            kind, text = call["error"]
            assert kind == "GroupUnusableError"
            assert "forked after the group was made" in text
            assert call["seconds"] < 2
        assert result["same"]  # by the parents' group, afterwards
