"""Reductions in pieces: every bit is that of one piece, and no failure between pieces shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    all_reduce_,
    all_reduce_many_,
)
from gck.collectives.pieces import Decoding, Slice, cut, pipelined
from gck.collectives.transports import Started, start_all_to_all
from gck.compressor import Compressor, compressor_at
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveMismatchError, CorruptPayloadError, PeerLostError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from tests.collectives import oracle
from tests.collectives.fragile import Fragile
from tests.collectives.scenarios import digest, gradient

COMPRESSORS = [
    Sign(32),
    Sign(64, decay=0.9, clip=0.5),
    ChunkTopK(k=5, chunk_size=32, value_bits=2),
    ChunkTopK(k=6, chunk_size=64),
    Quantize(8, 64),
    Quantize(4, 32),
    Quantize(2, 32, scale="mean"),
    Quantize(8, 32, "stochastic", seed=7),
    Quantize(4, 64, "stochastic", seed=-7),
    Quantize(2, 32, "stochastic", seed=1 << 40),
]


class Blocking:
    """A transport with nothing but the methods of the protocol."""

    def __init__(self, member: SimulatedMember) -> None:
        self.rank, self.world_size, self.timeout, self.calls = (
            member.rank,
            member.world_size,
            member.timeout,
            member.calls,
        )
        self.with_timeout = member.with_timeout
        self.all_gather_bytes = member.all_gather_bytes
        self.all_to_all_bytes = member.all_to_all_bytes
        self.all_reduce = member.all_reduce
        self.barrier, self.synchronize, self.abort = member.barrier, member.synchronize, member.abort


def three_steps(
    compressor: Any,
    numels: Sequence[int],
    world_size: int,
    piece_numels: Sequence[int],
    blocking: bool = False,
    algorithm: str = "two_phase",
) -> list[list[str]]:
    """Digests by rank: of the results of every step, and of all that is kept after it.

    Args:
        piece_numels: of each step.
    """

    def rank_main(member: SimulatedMember) -> list[str]:
        states, found = [ErrorFeedback() for _ in numels], []
        for step, piece_numel in enumerate(piece_numels):
            grads = [
                gradient(member.rank, n, (torch.float32, torch.bfloat16)[step % 2], step) for n in numels
            ]
            op = "sum" if step == 1 else "avg"
            group = Blocking(member) if blocking else member
            all_reduce_many_(
                grads, states, compressor, group, op, algorithm=algorithm, piece_numel=piece_numel
            )
            kept = [t for s in states for t in (s.worker, s.server, s.nonfinite)]
            found.append(digest(*grads) + digest(*kept))
        assert all((state.binding is not None) == (algorithm == "two_phase") for state in states)
        return found

    return SimulatedGroup(world_size, timeout=30).run(rank_main)


@pytest.mark.parametrize("algorithm", ["one_phase", "two_phase"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_same_bits_in_any_pieces(compressor: Any, world_size: int, algorithm: str) -> None:
    for numels in ((1001,), (9,), (333, 0, 320, 1)):
        whole = three_steps(compressor, numels, world_size, (0, 0, 0), algorithm=algorithm)
        for piece_numel in (1, 100 * world_size, 500):
            pieces = three_steps(compressor, numels, world_size, (piece_numel,) * 3, algorithm=algorithm)
            assert pieces == whole, (numels, piece_numel)


def test_pieces_may_come_and_go() -> None:
    """The residuals of a run without pieces are those of a run with them."""
    compressor = Quantize(4, 32, "stochastic", seed=3)
    whole = three_steps(compressor, (700, 90), 3, (0, 0, 0))
    assert three_steps(compressor, (700, 90), 3, (200, 0, 333)) == whole


def test_digests_can_differ() -> None:
    assert three_steps(Sign(32), (700,), 3, (0, 0)) != three_steps(Sign(64), (700,), 3, (0, 0))


def test_a_part_that_is_not_told_its_place_rounds_otherwise() -> None:
    """What the method `at` is for."""

    class Lost(Quantize):
        def at(self, start: int) -> Quantize:
            return self

    stochastic = {"bits": 4, "chunk_size": 32, "rounding": "stochastic", "seed": 0}
    whole = three_steps(Quantize(**stochastic), (700,), 3, (0,))
    assert three_steps(Quantize(**stochastic), (700,), 3, (200,)) == whole
    assert three_steps(Lost(**stochastic), (700,), 3, (200,)) != whole


def test_transports_without_operations_that_start() -> None:
    expected = three_steps(Sign(32), (700, 90), 3, (0, 0))
    assert three_steps(Sign(32), (700, 90), 3, (200, 200), blocking=True) == expected


def test_against_the_oracle() -> None:
    """Not only what one piece gives."""
    n, world_size, compressor = 777, 3, Quantize(4, 32, "stochastic", seed=5)
    grads = [gradient(rank, n) for rank in range(world_size)]
    zeros = [torch.zeros(n)] * world_size
    servers = [torch.zeros(m) for m in oracle.valid_numels(n, 32, world_size)]
    result, errs, servers = oracle.two_phase(compressor, grads, zeros, servers, "avg")

    def rank_main(member: SimulatedMember) -> None:
        grad, state = grads[member.rank].clone(), ErrorFeedback()
        all_reduce_(grad, state, compressor, member, algorithm="two_phase", piece_numel=150)
        assert state.worker is not None
        assert state.server is not None
        assert oracle.same(grad, result)
        assert oracle.same(state.worker, errs[member.rank])
        assert oracle.same(state.server[: len(servers[member.rank])], servers[member.rank])

    SimulatedGroup(world_size, timeout=30).run(rank_main)


@pytest.mark.parametrize("algorithm", ["one_phase", "two_phase"])
def test_it_sends_in_pieces_what_it_sends_at_once(algorithm: str) -> None:
    def sent(piece_numel: int) -> int:
        group = SimulatedGroup(4, timeout=30)
        group.run(
            lambda member: all_reduce_(
                torch.ones(1 << 14),
                None,
                Sign(32),
                member,
                "avg",
                algorithm,
                piece_numel=piece_numel,
                validate="off",
            )
        )
        return group.bytes_sent[0]

    assert sent(4096) == sent(0) > 0


@settings(max_examples=200, deadline=None)
@given(
    units=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    cut_short=st.integers(0, 31),
    world_size=st.integers(1, 4),
    piece_numel=st.integers(0, 3000),
)
def test_cut(units: list[int], cut_short: int, world_size: int, piece_numel: int) -> None:
    numels = [32 * count for count in units]
    if world_size == 1 and numels[0]:
        numels[0] -= cut_short
    pieces = cut(numels, 32, world_size, piece_numel)
    slices = [part for piece in pieces for part in piece]
    for tensor, numel in enumerate(numels):
        parts = [part for part in slices if part.tensor == tensor]
        assert sum(part.numel for part in parts) == numel
        assert all(part.numel > 0 and part.start % 32 == 0 for part in parts)
        starts = [sum(part.numel for part in parts[:i]) for i in range(len(parts))]
        assert [part.start for part in parts] == starts
    assert [part.tensor for part in slices] == sorted(part.tensor for part in slices)
    most = piece_numel + 32 * world_size - 1 if piece_numel else world_size * sum(numels)
    assert all(world_size * sum(part.numel for part in piece) <= most for piece in pieces)
    assert len(pieces) == 1 or all(pieces)


def test_cut_by_hand() -> None:
    assert len(cut([24_415 * 256], 256, 4, 25_000_000 // 4)) == 4
    assert cut([96, 0, 64], 32, 2, 128) == [
        [Slice(0, 0, 64)],
        [Slice(0, 64, 32), Slice(2, 0, 32)],
        [Slice(2, 32, 32)],
    ]
    assert cut([0], 32, 2, 0) == cut([0], 32, 2, 5) == [[]]


SHORT = "abort: MemoryError in a piece"


def corrupt(on_all_ranks: bool) -> CorruptPayloadError:
    error = CorruptPayloadError("it is damaged")
    error.on_all_ranks = on_all_ranks
    return error


class Wire:
    """A transport that keeps a list of what is called."""

    rank = 0

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.log: list[str] = []

    def _start(self, kind: str, send: Tensor) -> Started:
        log, name = self.log, f"{kind} {int(send)}"
        log.append(f"start {name}")

        class Pending:
            def wait(self) -> Tensor:
                log.append(f"wait {name}")
                return send

        return Pending()

    def start_all_to_all_bytes(self, send: Tensor) -> Started:
        return self._start("swap", send)

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        return self._start("gather", send)

    def abort(self, reason: str) -> None:
        self.log.append(f"abort: {reason}")


def run_on(wire: Any, fails: str = "", error: BaseException | None = None) -> list[str]:
    """Three pieces; the step named `fails` raises `error`."""

    def step(name: str, piece: Any) -> Tensor:
        wire.log.append(f"{name} {piece[0].start}")
        if wire.log[-1] == fails and error is not None:
            raise error
        return torch.tensor(piece[0].start)

    pipelined(
        wire,
        [[Slice(0, j, 1)] for j in range(3)],
        lambda piece: start_all_to_all(wire, step("compress", piece)),
        lambda piece, received: step("reduce", piece),
        Decoding(lambda piece, gathered: [step("decode", piece), None][1], lambda piece: [], [], None),
    )
    return list(wire.log)


def test_pieces_are_under_way_while_one_is_waited_for() -> None:
    assert run_on(Wire()) == [
        *("compress 0", "start swap 0", "compress 1", "start swap 1", "compress 2", "start swap 2"),
        *("wait swap 0", "reduce 0", "start gather 0", "wait swap 1", "reduce 1", "start gather 1"),
        *("wait swap 2", "reduce 2", "start gather 2"),
        *("wait gather 0", "decode 0", "wait gather 1", "decode 1", "wait gather 2", "decode 2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fails", "error", "tail"),
    [
        ("compress 0", MemoryError(), [SHORT]),
        ("compress 1", MemoryError(), [SHORT]),
        ("reduce 0", MemoryError(), [SHORT]),
        ("reduce 2", MemoryError(), [SHORT]),
        ("decode 0", MemoryError(), [SHORT]),
        ("decode 2", MemoryError(), [SHORT]),
        ("reduce 1", corrupt(False), ["abort: a piece failed: it is damaged"]),  # who alone has it
        ("reduce 1", corrupt(True), ["wait swap 2", "wait gather 0"]),
        ("decode 0", corrupt(True), ["wait gather 1", "wait gather 2"]),
        ("reduce 1", KeyboardInterrupt(), ["abort: KeyboardInterrupt in a piece"]),
        ("reduce 1", PeerLostError(), ["abort: a piece failed: "]),
    ],
)
def test_after_an_error_nothing_is_under_way_or_the_group_is_given_up(
    fails: str, error: BaseException, tail: list[str]
) -> None:
    wire = Wire()
    with pytest.raises(type(error)):
        run_on(wire, fails, error)
    assert wire.log[wire.log.index(fails) + 1 :] == tail


@pytest.mark.parametrize("fresh", [True, False])
def test_failure_at_every_kernel_call(fresh: bool) -> None:
    """Three pieces, each of W chunks to compress, W to add and one to compress for the owner, W to decode."""
    world_size, n = 3, 288
    total = 3 * (3 + 3 + 1 + 3)

    class Cut(Fragile):
        def at(self, start: int) -> Compressor:
            return self

    def rank_main(member: SimulatedMember, fail_at: int) -> str:
        grad, state = gradient(member.rank, n), ErrorFeedback()
        if not fresh:
            all_reduce_(gradient(member.rank, n, step=1), state, Sign(32), member, algorithm="two_phase")
        copy, before = grad.clone(), digest(state.worker, state.server, state.nonfinite)
        fragile = Cut(Sign(32), fail_at if member.rank == 1 else 0)
        try:
            all_reduce_(grad, state, fragile, member, algorithm="two_phase", piece_numel=96)
        except (MemoryError, PeerLostError) as error:
            assert torch.equal(grad, copy)
            assert digest(state.worker, state.server, state.nonfinite) == before
            return type(error).__name__
        return "done"

    for fail_at in range(1, total + 1):
        outcome = SimulatedGroup(world_size, timeout=20).run(rank_main, fail_at)
        assert outcome[1] == "MemoryError"
        assert {outcome[0], outcome[2]} <= {"PeerLostError", "done"}
    assert SimulatedGroup(world_size, timeout=20).run(rank_main, total + 1) == ["done"] * 3


def test_ranks_notice_other_pieces() -> None:
    def rank_main(member: SimulatedMember) -> None:
        options: dict[str, Any] = {"piece_numel": 320 if member.rank else 0, "validate": "always"}
        for algorithm in ("one_phase", "two_phase"):
            with pytest.raises(CollectiveMismatchError, match=r"differs from .* in compressor"):
                all_reduce_(torch.ones(640), None, Sign(32), member, algorithm=algorithm, **options)

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_who_cannot_be_cut_goes_at_once() -> None:
    """Whatever the caller wants: it is for compressors to say that they can."""
    fragile = Fragile(Sign(32), 0)
    assert compressor_at(fragile, 0) is None
    assert compressor_at(RandomK(k=3), 0) is None
    SimulatedGroup(1).run(
        lambda m: all_reduce_(torch.ones(640), None, fragile, m, algorithm="two_phase", piece_numel=64)
    )
    assert fragile.calls.count("compress_") == 2  # as a worker and as an owner
