"""Whatever goes wrong in NCCL or in a peer: a typed error with its text, in time; nothing has changed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import gck
from gck.collectives import all_reduce_
from gck.collectives.transports.nccl_operations import orphans
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    CollectiveError,
    CollectiveTimeoutError,
    GckError,
    GroupUnusableError,
    PeerLostError,
)
from gck.kernels.sign import Sign
from tests.nccl.ranks import on_threads

pytestmark = pytest.mark.usefixtures("fake")

TIMEOUT = 1.0
LONG = 20.0  # where no timeout is expected: a busy machine may keep a thread waiting for a second
LATE = 2.0  # what a typed error may take beyond the timeout


def join(rank: int, world_size: int, unique_id: bytes, timeout: float = TIMEOUT) -> gck.NcclCommunicator:
    return gck.NcclCommunicator(unique_id, rank, world_size, timeout=timeout)


def outcome(call: Callable[[], Any]) -> tuple[str, str, float]:
    """(error's type, its text, seconds) of a call."""
    began = time.monotonic()
    try:
        call()
    except GckError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", time.monotonic() - began


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def inject(**faults: float) -> None:
        for name, value in faults.items():
            monkeypatch.setenv(f"FAKE_NCCL_{name}", str(value))

    return inject


FAULTS = {
    "STALL_AT": {"CollectiveTimeoutError", "PeerLostError"},
    "HANG_AT": {"CollectiveTimeoutError", "PeerLostError"},
    "REMOTE_ERROR_AT": {"PeerLostError"},
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("at", [1, 2, 3])  # the handshake, the all-to-all, the all-gather
def test_an_operation_that_fails(name: str, at: int, fault: Any) -> None:
    """On rank 1 alone: the other two learn of it, and all keep what they had."""
    fault(**{name: at, "RANK": 1})
    unique_id = gck.NcclCommunicator.create_unique_id()

    def rank_main(rank: int) -> tuple[str, str, float]:
        comm = join(rank, 3, unique_id, timeout=LONG if name == "REMOTE_ERROR_AT" else TIMEOUT)
        grad, state = torch.randn(1000), ErrorFeedback()
        state.worker_for(grad).normal_()
        before = grad.clone(), state.worker.clone()
        error = outcome(lambda: all_reduce_(grad, state, Sign(32), comm, algorithm="two_phase"))
        assert torch.equal(grad, before[0])
        assert torch.equal(state.worker, before[1])
        assert state.server is None
        # With the first error's own text, at once.
        kind, text, seconds = outcome(comm.barrier)
        assert kind == "GroupUnusableError"
        assert error[1].partition(": ")[2] in text
        assert seconds < 1
        comm.close()
        comm.close()
        return error

    for kind, text, seconds in on_threads(3, rank_main):
        assert kind in FAULTS[name], text
        assert seconds < TIMEOUT + LATE
        if kind == "PeerLostError":
            assert "remote process exited or there was a network error" in text  # NCCL's words
            assert "injected: a remote process exited" in text or "closed its connection" in text
    assert len(orphans) == 0


def test_slow_is_not_wrong(fault: Any) -> None:
    fault(INIT_SECONDS=0.4, OP_SECONDS=0.3)
    unique_id = gck.NcclCommunicator.create_unique_id()

    def rank_main(rank: int) -> float:
        with join(rank, 2, unique_id, timeout=20) as comm:
            tensor = torch.ones(3)
            comm.all_reduce(tensor)
            return tensor[0].item()

    began = time.monotonic()
    assert on_threads(2, rank_main) == [2.0, 2.0]
    assert time.monotonic() - began > 0.7


def test_an_initialisation_that_fails(fault: Any) -> None:
    fault(INIT_FAILS=1, RANK=1)
    unique_id = gck.NcclCommunicator.create_unique_id()
    outcomes = on_threads(2, lambda rank: outcome(lambda: join(rank, 2, unique_id)))
    assert outcomes[1][0] == "CollectiveError"
    assert "unhandled system error: injected: the initialisation failed" in outcomes[1][1]
    assert outcomes[0][0] in ("CollectiveTimeoutError", "PeerLostError")


def test_an_initialisation_that_is_too_slow(fault: Any) -> None:
    fault(INIT_SECONDS=30, RANK=1)
    unique_id = gck.NcclCommunicator.create_unique_id()
    for kind, text, seconds in on_threads(2, lambda rank: outcome(lambda: join(rank, 2, unique_id))):
        assert kind == "CollectiveTimeoutError"
        assert text.startswith("init on rank ")
        assert TIMEOUT <= seconds < TIMEOUT + LATE


def test_a_rank_that_gives_up_during_the_initialisation() -> None:
    """Rank 0 waits for rank 2 no longer than rank 1 does, which then closes its connections."""
    unique_id = gck.NcclCommunicator.create_unique_id()
    timeouts = [20.0, 0.3]

    def rank_main(rank: int) -> tuple[str, str, float]:
        if rank == 2:
            time.sleep(0.8)
            return outcome(lambda: join(2, 3, unique_id, timeout=TIMEOUT))
        # The tests' library lets rank 0 join once all have called; it then finds that rank 1 is gone.
        return outcome(lambda: join(rank, 3, unique_id, timeout=timeouts[rank]).barrier())

    outcomes = on_threads(3, rank_main)
    assert outcomes[1][0] == "CollectiveTimeoutError"
    assert "no answer after 0." in outcomes[1][1]
    # The last one finds rank 0 but not rank 1.
    assert outcomes[2][0] in ("CollectiveTimeoutError", "PeerLostError")
    assert outcomes[0][0] == "PeerLostError"
    assert outcomes[0][2] < 20
    assert all(outcomes[rank][1].startswith(f"init on rank {rank} of 3") for rank in (1, 2))


def test_wrong_worlds() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()
    outcomes = on_threads(2, lambda rank: outcome(lambda: join(rank, 2 + rank, unique_id, timeout=LONG)))
    assert {kind for kind, _, _ in outcomes} <= {"CollectiveError", "PeerLostError", "CollectiveTimeoutError"}
    texts = "rank 1 is one of 3, this is one of 2", "rank 0 is one of 2, this is one of 3"
    assert any(text in outcome[1] for outcome in outcomes for text in texts)


def test_wrong_ids() -> None:
    ids = [gck.NcclCommunicator.create_unique_id() for _ in range(2)]
    for kind, text, seconds in on_threads(2, lambda rank: outcome(lambda: join(rank, 2, ids[rank]))):
        assert (kind, seconds < TIMEOUT + LATE) == ("CollectiveTimeoutError", True), text


def test_an_id_is_for_one_communicator() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()
    join(0, 1, unique_id).close()
    with pytest.raises(CollectiveError, match="the unique id was used before"):
        join(0, 1, unique_id)


def test_two_that_take_the_same_rank() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()
    outcomes = on_threads(2, lambda _: outcome(lambda: join(1, 2, unique_id, timeout=3)))
    assert sorted(kind for kind, _, _ in outcomes) == ["CollectiveError", "CollectiveTimeoutError"]
    assert any("rank 1 of this unique id is taken" in text for _, text, _ in outcomes)


def test_an_error_between_operations_is_found(fault: Any) -> None:
    fault(ERROR_AFTER=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    # Whoever waits for the operation may see it already; if not, the watch does, within a moment.
    kinds = [outcome(comm.barrier)[0]]
    time.sleep(0.5)
    kinds.append(outcome(comm.synchronize)[0])
    assert PeerLostError.__name__ in kinds
    with pytest.raises(GroupUnusableError, match="injected: an error after the operation"):
        comm.barrier()


def test_the_watch_finds_an_error_when_nobody_waits(fault: Any) -> None:
    fault(ERROR_LATER=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id(), timeout=LONG)
    comm.barrier()  # well
    time.sleep(1.0)
    kind, text, seconds = outcome(comm.barrier)
    assert (kind, seconds < LATE) == ("PeerLostError", True)
    assert "between operations (" in text
    assert "injected: an error later" in text


class InAThread:
    """Holds a group of the communicator open on a thread of its own, until told."""

    def __init__(self, comm: gck.NcclCommunicator) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run, args=(comm,))
        self.thread.start()
        assert self.inside.wait(LONG)

    def run(self, comm: gck.NcclCommunicator) -> None:
        with suppress(GckError), comm.group():
            self.inside.set()
            self.leave.wait(LONG)

    def end(self) -> None:
        self.leave.set()
        self.thread.join(LONG)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("call", ["barrier", "close", "synchronize", "all_reduce_", "split"])
def test_a_wait_for_the_turn_is_bounded(call: str) -> None:
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    holder = InAThread(comm)
    calls = {
        "all_reduce_": lambda: all_reduce_(torch.ones(100), None, Sign(), comm),
        "split": lambda: comm.split(0),
    }
    kind, text, seconds = outcome(calls.get(call, getattr(comm, call, None)))
    assert (kind, TIMEOUT <= seconds < TIMEOUT + LATE) == ("CollectiveTimeoutError", True)
    assert text.endswith("another call had the group for 1 s")
    holder.end()
    assert outcome(comm.barrier)[0] == "GroupUnusableError"


def test_an_abort_ends_a_wait_for_the_turn() -> None:
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id(), timeout=LONG)
    holder = InAThread(comm)
    threading.Timer(0.3, lambda: comm.abort("by a third thread")).start()
    kind, text, seconds = outcome(comm.barrier)
    assert (kind, seconds < LATE) == ("GroupUnusableError", True)
    assert "by a third thread" in text
    holder.end()


def test_a_line_that_moves_is_waited_for(fault: Any) -> None:
    """Each call has the timeout after the one before it, however many there are."""
    fault(OP_SECONDS=0.6)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    outcomes = on_threads(4, lambda _: outcome(comm.barrier))
    assert [kind for kind, _, _ in outcomes] == ["none"] * 4
    assert max(seconds for _, _, seconds in outcomes) > 1.5 * TIMEOUT


def test_ranks_that_expect_other_sizes() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()

    def rank_main(rank: int) -> tuple[str, str, float]:
        comm = join(rank, 2, unique_id, timeout=LONG)
        return outcome(lambda: comm.all_reduce(torch.ones(3 + rank)))

    outcomes = on_threads(2, rank_main)
    assert any("sent another number of bytes" in text for _, text, _ in outcomes)
    assert {kind for kind, _, _ in outcomes} <= {"CollectiveError", "PeerLostError"}


def test_abort_from_another_thread() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()
    here = threading.Barrier(2)

    def rank_main(rank: int) -> tuple[str, str, float]:
        comm = join(rank, 2, unique_id, timeout=30)
        here.wait()
        if rank == 1:
            time.sleep(1)  # it never takes part
            return outcome(comm.barrier)
        threading.Timer(0.3, comm.abort, ["enough"]).start()
        return outcome(comm.barrier)

    first, second = on_threads(2, rank_main)
    assert first[0] == "GroupUnusableError"
    assert "aborted: enough" in first[1]
    assert first[2] < 3
    assert second[0] == "PeerLostError"


def test_an_exception_aborts() -> None:
    unique_id = gck.NcclCommunicator.create_unique_id()

    def rank_main(rank: int) -> tuple[str, str, float]:
        comm = join(rank, 2, unique_id, timeout=30)
        if rank == 1:
            return outcome(comm.barrier)
        with pytest.raises(KeyError), comm:
            raise KeyError("broken model")
        return outcome(comm.barrier)

    first, second = on_threads(2, rank_main)
    assert "aborted: KeyError left its block" in first[1]
    assert (second[0], second[2] < 3) == ("PeerLostError", True)


def test_an_exception_in_a_group() -> None:
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    tensor = torch.ones(3)
    with pytest.raises(KeyError), comm.group():
        comm.send(tensor, {}["broken model"])
    with pytest.raises(GroupUnusableError, match="KeyError left a group"):
        comm.barrier()
    # Groups of this thread's start and end as before.
    with join(0, 1, gck.NcclCommunicator.create_unique_id()) as other:
        other.barrier()


def test_an_abort_that_hangs_keeps_the_buffers(fault: Any) -> None:
    fault(STALL_AT=1, ABORT_HANGS=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    tensor = torch.ones(3)
    kind, _, seconds = outcome(lambda: comm.all_reduce(tensor))
    assert (kind, seconds < TIMEOUT + LATE) == ("CollectiveTimeoutError", True)
    assert any(kept is tensor for kept in orphans)
    orphans.clear()


def test_the_interpreter_runs_on_while_one_waits(fault: Any) -> None:
    fault(STALL_AT=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id())
    counted = 0
    waiter = threading.Thread(target=outcome, args=[comm.barrier])
    waiter.start()
    while waiter.is_alive():
        counted += 1
        time.sleep(0.001)
    assert counted > 100


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals")
def test_an_interrupt_ends_a_wait(fault: Any) -> None:
    fault(STALL_AT=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id(), timeout=30)
    began = time.monotonic()
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        comm.barrier()
    assert time.monotonic() - began < 5
    with pytest.raises(GroupUnusableError, match="all_reduce was interrupted"):
        comm.barrier()


def test_the_unique_id_appears_in_no_text(fault: Any) -> None:
    fault(STALL_AT=2)
    unique_id = gck.NcclCommunicator.create_unique_id()
    secret = unique_id.rstrip(b"\0").decode()
    comm = join(0, 1, unique_id)
    comm.barrier()
    texts = [repr(comm), outcome(comm.barrier)[1], outcome(comm.barrier)[1], repr(comm)]
    texts.append(outcome(lambda: join(0, 1, unique_id))[1])
    assert texts[1].startswith("all_reduce on rank 0 of 1: no answer after")
    for text in texts:
        assert secret not in text
        assert secret[-12:] not in text


def test_timeout_of_one_operation(fault: Any) -> None:
    fault(STALL_AT=1)
    comm = join(0, 1, gck.NcclCommunicator.create_unique_id(), timeout=60)
    kind, _, seconds = outcome(comm.with_timeout(0.2).barrier)
    assert kind == CollectiveTimeoutError.__name__
    assert 0.2 <= seconds < 0.2 + LATE
