"""Asynchronous collectives on simulated ranks: results, order, and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    Work,
    all_reduce_,
    all_reduce_many_,
    packed_all_reduce_,
    sparse_all_gather,
)
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveMismatchError,
    DtypeError,
    GroupUnusableError,
    PeerLostError,
    StateMismatchError,
    WaitTimeoutError,
)
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives import scenarios
from tests.collectives.fragile import Fragile
from tests.collectives.gate import SOON, Gate, one_rank, reduce, until, worker_of
from tests.collectives.test_transaction import contents, unchanged, used_state


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_bits_of_synchronous_calls(world_size: int) -> None:
    """Every collective; in all scenarios of two steps, the state is in flight twice."""
    group = SimulatedGroup(world_size, timeout=60)
    expected = group.run(lambda m: scenarios.run(m.rank, world_size, m))
    assert group.run(lambda m: scenarios.run(m.rank, world_size, m, in_flight=True)) == expected


def test_what_wait_returns() -> None:
    def rank_main(member: SimulatedMember) -> None:
        grad, server = torch.ones(64), torch.zeros(32)
        work = all_reduce_(grad, ErrorFeedback(), Sign(32), member, async_op=True)
        assert isinstance(work, Work)
        assert work.wait() is grad
        assert work.wait(SOON) is grad
        assert work.is_completed()
        assert work.exception() is None
        assert repr(work) == "<Work all_reduce_: completed>"
        assert all_reduce_many_([grad], None, Sign(32), member, async_op=True).wait() is None
        assert all_reduce_many_([], None, Sign(32), member, async_op=True).wait() is None
        packed = packed_all_reduce_(grad, torch.zeros(64), server, 32, member, async_op=True)
        assert packed.wait() is grad
        payload = gck.topk(torch.arange(50.0) + member.rank, 0.1)
        gathered = sparse_all_gather(payload, member, async_op=True).wait()
        for ours, theirs in zip(gathered, sparse_all_gather(payload, member), strict=True):
            assert same_bytes(ours.values, theirs.values)

    SimulatedGroup(2, timeout=60).run(rank_main)


def test_messages_and_ends_are_in_the_order_of_the_calls() -> None:
    """Among them synchronous calls and other computation; ranks are out of step."""
    asynchronous = [True, True, True, True, False, True, False]
    algorithms = ["two_phase", "dense", "one_phase", "two_phase", "dense", "one_phase", "two_phase"]

    def rank_main(member: SimulatedMember, flying: bool) -> tuple[list[str], list[int], list[Tensor]]:
        gate, ended = Gate(Sign(32)), list[int]()
        works, grads = [], [scenarios.gradient(member.rank, 300, step=step) for step in range(7)]
        state = ErrorFeedback()
        for step, (algorithm, async_op) in enumerate(zip(algorithms, asynchronous, strict=True)):
            if not async_op or not flying:
                gate.opened.set()  # what came before is in the line by now
                all_reduce_(grads[step], state, gate, member, "sum", algorithm)
                ended.append(step)
            else:
                work = all_reduce_(grads[step], state, gate, member, "sum", algorithm, async_op=True)
                work.get_future().add_done_callback(lambda _, step=step: ended.append(step))
                works.append(work)
            torch.randn(50, 50) @ torch.randn(50, 50)
            time.sleep(0.01 * member.rank)
        for work in works:
            work.wait(SOON)
        until(lambda: len(ended) == 7)
        return list(member._tickets), ended, [*grads, state.worker, state.server]

    expected = SimulatedGroup(3, timeout=60).run(rank_main, False)
    for ours, theirs in zip(SimulatedGroup(3, timeout=60).run(rank_main, True), expected, strict=True):
        assert ours[0] == theirs[0]
        assert [step for step in ours[1] if asynchronous[step]] == [0, 1, 2, 3, 5]
        assert all(same_bytes(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


def test_synchronous_calls_wait_for_their_turn() -> None:
    member, gate, first_ended = one_rank(), Gate(Sign(32)), []
    first = reduce(torch.ones(64), None, gate, member)

    def second() -> None:
        all_reduce_(torch.ones(64), None, Sign(32), member)
        first_ended.append(first.is_completed() or len(member.calls.queue._line) < 2)

    thread = threading.Thread(target=second)
    thread.start()
    until(lambda: len(member.calls.queue._line) == 2)
    third = reduce(torch.ones(64), None, Sign(32), member)
    assert not first_ended
    assert not first.is_completed()
    assert repr(third) == "<Work all_reduce_: in flight>"
    gate.opened.set()
    third.wait(SOON)
    thread.join(SOON)
    assert first_ended == [True]
    assert not member.calls.queue._line


def test_a_wait_that_ends_early_spoils_nothing() -> None:
    member, gate = one_rank(), Gate(Sign(32))
    grad = torch.ones(64)
    work = reduce(grad, ErrorFeedback(), gate, member)
    with pytest.raises(WaitTimeoutError, match=r"all_reduce_ is still in flight after 0.05 s"):
        work.wait(0.05)
    assert work.exception() is None
    assert not work.is_completed()
    for wrong in (0, -1, "1", float("inf")):
        with pytest.raises(ArgumentError, match="timeout must be a positive number"):
            work.wait(wrong)
    gate.opened.set()
    assert work.wait() is grad
    all_reduce_(grad, None, Sign(32), member)


def test_wrong_arguments_are_the_callers() -> None:
    member, payload = one_rank(), gck.topk(torch.ones(9), 0.5)
    wrong: list[tuple[type[Exception], Any]] = [
        (DtypeError, lambda: all_reduce_(torch.ones(9).double(), None, Sign(32), member, async_op=True)),
        (ArgumentError, lambda: all_reduce_(torch.ones(9), None, Sign(32), member, "max", async_op=True)),
        (ArgumentError, lambda: all_reduce_(torch.ones(9), None, TopK(k=10), member, async_op=True)),
        (StateMismatchError, lambda: reduce(torch.ones(9), used_state(0, 8), Sign(32), member)),
        (ArgumentError, lambda: all_reduce_many_([], None, Sign(32), member, validate="no", async_op=True)),
        (ArgumentError, lambda: sparse_all_gather((1,), member, async_op=True)),
        (ArgumentError, lambda: sparse_all_gather(payload, member, validate="no", async_op=True)),
    ]  # fmt: skip
    for error, call in wrong:
        with pytest.raises(error):
            call()
    for value in (1, None):
        with pytest.raises(DtypeError, match="all_reduce_: async_op must be a bool, got"):
            all_reduce_(torch.ones(9), None, Sign(32), member, async_op=value)
    assert worker_of(member) is None


def test_a_mismatch_is_raised_everywhere_and_what_follows_goes_on() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        grads = [torch.ones(500), torch.ones(500 + member.rank), torch.ones(500)]
        states = [ErrorFeedback() for _ in grads]
        works = [
            all_reduce_(grad, state, Sign(32), member, "sum", validate="always", async_op=True)
            for grad, state in zip(grads, states, strict=True)
        ]
        with pytest.raises(CollectiveMismatchError, match=r"differs from .* in numel"):
            works[1].wait()
        with pytest.raises(CollectiveMismatchError):
            works[1].get_future().wait()
        assert isinstance(works[1].exception(), CollectiveMismatchError)
        assert repr(works[1]).startswith("<Work all_reduce_: failed: CollectiveMismatchError(")
        assert bool((grads[1] == 1).all())
        assert states[1].worker is None
        works[2].wait()
        return grads[2]

    assert all(bool((grad == 2).all()) for grad in SimulatedGroup(2, timeout=60).run(rank_main))


@pytest.mark.parametrize("failure", ["peer", "kernel"])
def test_a_failure_ends_all_that_is_queued(failure: str) -> None:
    def rank_main(member: SimulatedMember) -> None:
        if failure == "peer" and member.rank == 1:
            return
        grads = [torch.ones(64) for _ in range(4)]
        states = [used_state(member.rank, 64) for _ in grads]
        before = [contents(state) for state in states]
        compressor = Fragile(Sign(32), 1 if member.rank == 0 and failure == "kernel" else 0)
        works = [
            all_reduce_(grad, state, compressor, member, algorithm="two_phase", async_op=True)
            for grad, state in zip(grads, states, strict=True)
        ]
        expected = MemoryError if failure == "kernel" and member.rank == 0 else PeerLostError
        with pytest.raises(expected):
            works[0].wait(SOON)
        for work in works[1:]:
            with pytest.raises(GroupUnusableError):
                work.wait(SOON)
        with pytest.raises(GroupUnusableError):
            all_reduce_(grads[0], states[0], Sign(32), member)
        assert all(bool((grad == 1).all()) for grad in grads)
        assert all(unchanged(b, contents(s)) for b, s in zip(before, states, strict=True))

    SimulatedGroup(2, timeout=60).run(rank_main)


def test_errors_that_only_show_when_it_is_its_turn() -> None:
    """A state that has become another tensor's meanwhile."""
    member, state, gate = one_rank(), ErrorFeedback(), Gate(Sign(32))
    reduce(torch.ones(64), None, gate, member)
    works = [
        all_reduce_(torch.ones(numel), state, Sign(32), member, algorithm="two_phase", async_op=True)
        for numel in (64, 96, 64)
    ]
    gate.opened.set()
    works[0].wait(SOON)
    with pytest.raises(StateMismatchError, match="belongs to 64 elements, got a gradient of 96"):
        works[1].wait(SOON)
    with pytest.raises(GroupUnusableError, match="all_reduce_ failed: worker residual"):
        works[2].wait(SOON)


def test_futures() -> None:
    def rank_main(member: SimulatedMember) -> None:
        gate, grad = Gate(Sign(32)), torch.full((64,), 1.0 + member.rank)
        # Callbacks run on the worker thread: the gate holds up what they are called by.
        first = reduce(grad, None, gate, member)
        later = reduce(torch.ones(64), None, Sign(32), member)
        future = first.get_future()
        doubled = future.then(lambda done: done.value() * 2)
        raised: list[Exception] = []

        def refused(call: Callable[[], Any]) -> None:
            with pytest.raises(CollectiveError, match="from a callback of asynchronous work") as error:
                call()
            raised.append(error.value)

        calls = [
            lambda: all_reduce_(grad, None, Sign(32), member),
            lambda: reduce(grad, None, Sign(32), member),
            later.wait,
        ]
        ends = [future.then(lambda _, call=call: refused(call)) for call in calls]
        itself = future.then(lambda _: first.wait())
        gate.opened.set()
        assert bool((doubled.wait() == 3).all())
        for end in ends:
            end.wait()
        assert len(raised) == 3
        assert itself.wait() is grad
        assert later.wait(SOON) is later.get_future().value()

    SimulatedGroup(2, timeout=60).run(rank_main)
