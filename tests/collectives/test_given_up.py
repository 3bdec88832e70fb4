"""A group that is given up, over gloo, while an exchange of large messages is under way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collectives.launcher import run_ranks


@pytest.mark.parametrize("exchange", ["gather", "swap"])
def test_a_wait_ends_and_what_still_comes_is_taken(exchange: str, tmp_path: Path) -> None:
    """Where nobody held what was asked for, gloo's thread would be busy for ever with what comes."""
    result = run_ranks("tests.collectives.given_up_worker", 2, tmp_path, exchange)[0]
    assert result["error"] == "GroupUnusableError"
    assert result["seconds"] < 10  # the group's timeout is 30
    assert result["busy"] < 0.5
