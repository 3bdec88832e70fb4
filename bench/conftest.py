"""Turns each case of a bench file into a pytest item, and collects the records."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import CLOCK, Pool, drive
from bench.suite import Case, Plan, measure

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
POOLS: dict[tuple[int, torch.dtype, str], Pool] = {}
# What fits the caches stays there: a call on little is short because its tensors were just made.
SMALL = 500_000


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gck")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="small and few: shows that the suite works")
    group.addoption("--records", default=None, help="JSON file for the records of all cases")


def _plan(config: pytest.Config) -> Plan:
    return Plan(torch.device(config.getoption("--device")), config.getoption("--quick"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark: as of pytest-benchmark, which is not installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.cases(_plan(metafunc.config)), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--records")
    if path is not None:
        Path(path).write_text(json.dumps(session.config.stash[RECORDS]))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Measures a case; with pytest-benchmark, if that is installed, as the driver."""
    config = request.config
    plan = _plan(config)

    def run(case: Case) -> None:
        def pedantic(target: Callable[[], Any], **options: Any) -> None:
            # Asked for no earlier: the plugin minds a fixture that a failed verification leaves unused.
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = f"{case.kernel} {case.n}"
            benchmark.pedantic(target, **options)

        driver = pedantic if config.pluginmanager.hasplugin("benchmark") else drive
        topic = request.path.stem.removeprefix("bench_")
        config.stash[RECORDS].append({"topic": topic, **measure(case, _pool(case, plan), plan, driver)})

    return run


def _pool(case: Case, plan: Plan) -> Pool:
    """The buffers of a case; kept while cases share them, since several sets at once may not fit."""
    beyond_cache = not plan.quick and case.n > SMALL
    key = (case.n, case.dtype, case.inputs)
    if key not in POOLS:
        POOLS.clear()
        gc.collect()
        POOLS[key] = Pool(case.n, case.dtype, plan.device, beyond_cache=beyond_cache, inputs=case.inputs)
    return POOLS[key]
