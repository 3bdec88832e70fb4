"""The soak, short; and that it sees what it is there to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.soak import __main__ as command
from bench.soak.plan import FAULTS, FREEZE_TIMEOUT, STOPS, frozen, plan
from bench.soak.verdict import Verdict


def test_a_short_soak(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    options = [
        "--operations",
        "80",
        "--kills",
        "1",
        "--freezes",
        "1",
        "--rate",
        "0.5",
        "--out",
        str(tmp_path),
        "--workers",
        "3",
    ]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["wrong"] == []
    assert report["operations"] >= 80
    assert set(report["injected"]) == set(FAULTS)
    assert report["injected"] == report["detected"]
    assert report["kills"] == 1
    assert sum(report["survivors"].values()) == 2
    assert report["freezes"] == 1
    assert sum(report["frozen"].values()) == 3
    assert report["slowest_frozen"] < FREEZE_TIMEOUT + 2


def reports(**changes: Any) -> dict[int, dict[str, Any]]:
    of_rank = {"error": "", "injected": False, "result": "r", "state": "s", "unchanged": True}
    made = dict.fromkeys(range(3), of_rank | changes)
    made[0] |= {"right": ("r", ["s", "s", "s"]), "near": False}
    return made


def spoilt(name: str, value: Any, **changes: Any) -> dict[int, dict[str, Any]]:
    """Rank 1 differs."""
    made = reports(**changes)
    made[1] = made[1] | {name: value}
    return made


@pytest.mark.parametrize(
    ("faulty", "told", "wrong"),
    [
        (False, reports(), 0),
        (False, spoilt("result", "x"), 1),
        (False, reports(result="x"), 1),
        (False, spoilt("state", "x"), 1),
        (False, spoilt("error", "PeerLostError"), 1),
        (True, reports(injected=True), 1),  # nobody noticed
        (True, reports(injected=True, error="CorruptPayloadError"), 0),
        (True, spoilt("error", "", injected=True, error="CorruptPayloadError"), 1),
        (True, spoilt("unchanged", False, injected=True, error="CorruptPayloadError"), 1),
    ],
)
def test_verdict(faulty: bool, told: dict[int, dict[str, Any]], wrong: int) -> None:
    planned = plan(3, 400, 3, 0.5)
    damaged = next(o for o in planned if o.fault and o.fault.kind == "flip")
    healthy = next(o for o in planned if o.fault is None)
    verdict = Verdict()
    verdict.add(damaged if faulty else healthy, told)
    assert len(verdict.wrong) == wrong, verdict.wrong


def test_survivors_of_a_kill() -> None:
    operation, verdict = plan(3, 1, 3, 0.0)[0], Verdict()
    good = {"error": "PeerLostError", "unchanged": True, "seconds": 0.5}
    verdict.add_killed(operation, 2, {0: good, 1: good}, 3)
    assert (verdict.wrong, verdict.kills, verdict.slowest) == ([], 1, 0.5)
    verdict.add_killed(operation, 2, {0: good}, 3)
    verdict.add_killed(operation, 2, {0: good, 1: good | {"unchanged": False}}, 3)
    assert len(verdict.wrong) == 2


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, 0),
        ({"error": ""}, 1),
        ({"error": "CorruptPayloadError"}, 1),
        ({"unchanged": False}, 1),
        ({"seconds": FREEZE_TIMEOUT + 2.1}, 1),
        ({"injected": False}, 1),
    ],
)
def test_a_rank_that_is_frozen(changes: dict[str, Any], wrong: int) -> None:
    operation = frozen(plan(3, 4, 3, 0.0), 3, 3, every=4)[2]
    assert operation.fault is not None
    assert operation.fault.kind == "frozen"
    told = reports(error="CollectiveTimeoutError", seconds=FREEZE_TIMEOUT, injected=True)
    victim = operation.fault.rank
    told[victim] = told[victim] | {"seconds": STOPS["frozen"] + 0.1}
    changed = victim if "injected" in changes else (victim + 1) % 3
    told[changed] = told[changed] | changes
    verdict = Verdict()
    verdict.add(operation, told)
    assert len(verdict.wrong) == wrong, verdict.wrong
    assert verdict.freezes == 1


def test_plans_are_the_same_everywhere() -> None:
    assert plan(5, 50, 4, 0.1) == plan(5, 50, 4, 0.1)
    assert plan(5, 50, 4, 0.1) != plan(6, 50, 4, 0.1)
