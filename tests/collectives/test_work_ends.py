"""Asynchronous work that nobody waits for, the thread that does it, and the end of both."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings

import pytest
import torch

from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.errors import GroupUnusableError, PeerLostError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.collectives.gate import SOON, Gate, gone, one_rank, reduce, until, worker_of


def test_a_dropped_handle_does_not_stop_it() -> None:
    member, grad, gate = one_rank(), torch.arange(64.0), Gate(Sign(32))
    expected = reduce(grad.clone(), None, Sign(32), one_rank()).wait()
    reduce(grad, None, gate, member)
    gc.collect()
    gate.opened.set()
    assert member.calls.queue.drain(SOON)
    assert same_bytes(grad, expected)


def test_the_error_of_a_dropped_handle_is_warned_about_at_once() -> None:
    """While the worker thread lives, and without the garbage collector."""
    members = SimulatedGroup(2, timeout=60).members
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for member in members:
                reduce(torch.ones(64 + member.rank), None, Sign(32), member)
            until(lambda: len(warned) == 2)
    finally:
        gc.enable()
    for warning in warned:
        text = str(warning.message)
        assert text.startswith("all_reduce_: failed, and nobody waited for it: CollectiveMismatchError: ")


@pytest.mark.parametrize("seen", [False, True])
def test_errors_of_dropped_handles_are_warned_about(seen: bool) -> None:
    """Unless somebody has seen them; what fails because of an earlier failure is no news."""

    def rank_main(member: SimulatedMember) -> None:
        all_reduce_(torch.ones(64 + member.rank), None, Sign(32), member, async_op=True)
        failing = reduce(torch.ones(64), None, Fragile(Sign(32), 1), member)
        reduce(torch.ones(64), None, Sign(32), member)
        if seen:
            with pytest.raises((MemoryError, PeerLostError)):
                failing.wait(SOON)

    group = SimulatedGroup(2, timeout=60)
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            group.run(rank_main)
            for member in group.members:
                assert gone(member.calls.queue._worker)
    finally:
        gc.enable()
    texts = sorted(str(warning.message).partition(" waited for it: ")[2][:12] for warning in warned)
    assert [warning.category for warning in warned] == [RuntimeWarning] * len(warned)
    assert texts[:2] == ["CollectiveMi"] * 2
    assert len(texts) == (2 if seen else 4)


def test_the_worker_computes_as_the_caller_would() -> None:
    member, gate = one_rank(), Gate(Sign(32))
    gate.opened.set()
    threads = torch.get_num_threads()
    works = []
    try:
        torch.set_num_threads(1)
        for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
            with context:
                works.append(reduce(torch.ones(64), None, gate, member))
        torch.set_num_threads(3)
        works.append(reduce(torch.ones(64), None, gate, member))
        for work in works:
            work.wait()
    finally:
        torch.set_num_threads(threads)
    assert {entry[0].name for entry in gate.seen} == {"gck collectives"}
    assert [entry[1:] for entry in gate.seen] == [
        (1, False, False), (1, True, False), (1, False, True), (3, True, False),
    ]  # fmt: skip


def test_the_worker_ends_with_its_group() -> None:
    group = SimulatedGroup(1, timeout=60)
    all_reduce_(torch.ones(64), None, Sign(32), group.members[0], async_op=True).wait()
    worker = worker_of(group.members[0])
    assert worker is not None
    assert worker.daemon
    assert worker.is_alive()
    all_reduce_(torch.ones(64), None, Sign(32), group.members[0], async_op=True).wait()
    assert worker_of(group.members[0]) is worker
    del group
    gc.collect()
    assert gone(worker)

    aborted = one_rank()
    all_reduce_(torch.ones(64), None, Sign(32), aborted, async_op=True).wait()
    worker = worker_of(aborted)
    assert worker is not None
    aborted.abort("no reason")
    assert gone(worker)
    with pytest.raises(GroupUnusableError, match="no reason"):
        all_reduce_(torch.ones(64), None, Sign(32), aborted, async_op=True).wait()


EXIT = """
import sys, torch, gck
from gck.collectives import SimulatedGroup, all_reduce_
alone, pair = SimulatedGroup(1).members[0], SimulatedGroup(2, timeout=600)
grads = [torch.arange(100000.0) for _ in range(20)]
for grad in grads:
    all_reduce_(grad, gck.ErrorFeedback(), gck.Sign(), alone, async_op=True)
if sys.argv[1] == "waits":  # for a peer that never comes
    for grad in grads[:3]:
        all_reduce_(torch.ones(9), gck.ErrorFeedback(), gck.Sign(), pair.members[0], async_op=True)
sys.stderr.write("end of the program\\n")
"""


@pytest.mark.parametrize(("mode", "given_up"), [("ends", 0), ("waits", 3)])
def test_exit_with_work_in_flight(mode: str, given_up: int) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, mode],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    said = "gck: 3 asynchronous collectives were in flight at the end, and given up\n" if given_up else ""
    assert run.stderr == "end of the program\n" + said
    assert run.returncode == 0
