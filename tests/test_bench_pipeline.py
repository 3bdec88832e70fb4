"""The benchmark of pieces, on two ranks over loopback."""

from __future__ import annotations

import json
from pathlib import Path

from bench import pipeline


def test_two_ranks(tmp_path: Path) -> None:
    pipeline.main(
        link=["loopback"],
        numel=[5000],
        pieces="1,3",
        compressor=["sign, 256"],
        ranks=2,
        repeats=2,
        limit=60,
        out=tmp_path,
    )
    (record,) = json.loads((tmp_path / "pipeline.json").read_text())["records"]
    assert record["same_bits"]
    assert record["piece_numels"] == [0, 1667]
    assert all(seconds > 0 for seconds in record["seconds"])
    # The interface is shared, and carries headers and barriers too.
    assert record["sent"] > 2 * record["nbytes"]
