"""Whatever goes wrong, wherever: gradients, residuals and counters are as they were."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    all_reduce_,
    all_reduce_many_,
    packed_all_reduce_,
    reduction,
)
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    ArgumentError,
    AutogradError,
    DeviceMismatchError,
    DtypeError,
    GroupUnusableError,
    LayoutError,
    PeerLostError,
    ShapeMismatchError,
    StateMismatchError,
)
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile, FragileInOnePass


def used_state(rank: int, n: int) -> ErrorFeedback:
    """A state with a residual and a count."""
    state = ErrorFeedback()
    generator = torch.Generator().manual_seed(rank)
    state.worker_for(torch.zeros(n)).normal_(generator=generator)
    state.nonfinite_for(torch.device("cpu")).fill_(3)
    return state


def contents(state: ErrorFeedback) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in (state.worker, state.server, state.nonfinite)]


def unchanged(before: list[Tensor | None], after: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize(
    ("compressor", "algorithm"),
    [(Sign(32), "two_phase"), (Sign(32), "one_phase"), (TopK(ratio=0.1), "one_phase")],
    ids=str,
)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("fails", [Fragile, FragileInOnePass])
def test_failure_at_every_kernel_call(
    compressor: Any, algorithm: str, fails: type[Fragile], fresh: bool
) -> None:
    world_size, numels = 3, (200, 70)
    # Both vectors: a worker message and W decodes; two phases: an owner's message and W more decodes, or
    # the owner's message in one pass.
    total = 2 * (1 + world_size)
    if algorithm == "two_phase":
        total += 2 * (1 + world_size if fails is Fragile else 1)

    def rank_main(member: SimulatedMember, fail_at: int) -> str:
        rank = member.rank
        grads = [torch.randn(m, generator=torch.Generator().manual_seed(rank)) for m in numels]
        grads[0][5] = math.nan
        states = [ErrorFeedback() if fresh else used_state(rank, m) for m in numels]
        copies, before = [g.clone() for g in grads], [contents(s) for s in states]
        fragile = fails(compressor, fail_at if rank == 1 else 0)
        try:
            all_reduce_many_(grads, states, fragile, member, algorithm=algorithm)
        except (MemoryError, PeerLostError) as error:
            assert all(same_bytes(g, c) for g, c in zip(grads, copies, strict=True))
            assert all(unchanged(b, contents(s)) for b, s in zip(before, states, strict=True))
            return type(error).__name__
        return "done"

    for fail_at in range(1, total + 1):
        outcome = SimulatedGroup(world_size, timeout=20).run(rank_main, fail_at)
        assert outcome[1] == "MemoryError"
        assert {outcome[0], outcome[2]} <= {"PeerLostError", "done"}
    assert SimulatedGroup(world_size, timeout=20).run(rank_main, total + 1) == ["done"] * 3


class Interrupted(TorchFunctionMode):
    """Ctrl-C right after the n-th write of this thread by `copy_`, `_foreach_copy_` or `Interruptible`."""

    active: ClassVar[Interrupted | None] = None

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.writes = at, 0

    def __enter__(self) -> Any:
        Interrupted.active = self
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        Interrupted.active = None
        super().__exit__(*given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.copy_, torch._foreach_copy_):
            self.written()
        return result

    def written(self) -> None:
        self.writes += 1
        if self.writes == self.at:
            raise KeyboardInterrupt


class Interruptible(Sign):
    """Decodes, to the gradients themselves, are writes that may be followed by Ctrl-C."""

    def decompress(self, *args: Any) -> None:
        super().decompress(*args)
        self._written()

    def decompress_mean_(self, *args: Any) -> None:
        super().decompress_mean_(*args)
        self._written()

    def _written(self) -> None:
        if Interrupted.active is not None:
            Interrupted.active.written()


@pytest.mark.parametrize("algorithm", ["one_phase", "two_phase", "dense"])
def test_interrupt_at_every_write(algorithm: str) -> None:
    at = finished = 0
    while True:
        at += 1
        member = SimulatedGroup(1).members[0]
        grads = [torch.arange(70.0), torch.arange(90.0)]
        copies, states = [grad.clone() for grad in grads], [used_state(0, 70), used_state(0, 90)]
        before = [contents(state) for state in states]
        try:
            with Interrupted(at):
                all_reduce_many_(grads, states, Interruptible(32), member, algorithm=algorithm)
            break
        except KeyboardInterrupt:
            same = [same_bytes(g, c) for g, c in zip(grads, copies, strict=True)]
            same += [unchanged(b, contents(s)) for b, s in zip(before, states, strict=True)]
            assert all(same) or not any(same), f"write {at}"
            finished += not any(same)
            if all(same):  # peers may wait for what never came
                with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
                    member.barrier()
    assert at > 2
    assert finished == 2  # after the write to either gradient: the other one is written all the same
    assert not any(same_bytes(g, c) for g, c in zip(grads, copies, strict=True))


class Exhausted(Sign):
    """Decoding runs out of memory in the second tensor."""

    calls: ClassVar[list[int]] = []

    def decompress(self, *args: Any) -> None:
        Exhausted.calls.append(1)
        if len(Exhausted.calls) == 2:
            raise MemoryError
        super().decompress(*args)


def test_results_that_cannot_be_written_give_the_group_up() -> None:
    """Nothing else can fail once gradients are written to. Residuals are as they were, and nobody goes on."""
    member, states = SimulatedGroup(1).members[0], [used_state(0, 70), used_state(0, 90)]
    before = [contents(state) for state in states]
    Exhausted.calls.clear()
    grads = [torch.arange(70.0), torch.arange(90.0)]
    with pytest.raises(MemoryError):
        all_reduce_many_(grads, states, Exhausted(32), member, algorithm="two_phase")
    assert all(unchanged(b, contents(s)) for b, s in zip(before, states, strict=True))
    with pytest.raises(GroupUnusableError, match="MemoryError in all_reduce_many_"):
        member.barrier()


def test_interrupt_as_the_decoding_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, state, member = torch.arange(70.0), used_state(0, 70), SimulatedGroup(1).members[0]
    copy, before, interrupts = grad.clone(), contents(state), iter([KeyboardInterrupt])
    two_phase = reduction.two_phase

    def begin(*args: Any, **options: Any) -> Any:
        finish = two_phase(*args, **options)

        def interrupted() -> None:
            for error in interrupts:
                raise error
            finish()

        return interrupted

    monkeypatch.setattr(reduction, "two_phase", begin)
    with pytest.raises(KeyboardInterrupt):
        all_reduce_many_([grad], [state], Sign(32), member, algorithm="two_phase")
    assert not same_bytes(grad, copy)
    assert not unchanged(before, contents(state))
    member.barrier()  # it is done, and the group in order


def call(grad: Any = None, state: Any = None, compressor: Any = None, **options: Any) -> Any:
    grad = torch.ones(600) if grad is None else grad
    state = ErrorFeedback() if state is None else state
    return lambda member: all_reduce_(grad, state, compressor or Sign(64), member, **options)


def state_of(numel: int) -> ErrorFeedback:
    state = ErrorFeedback()
    state.worker_for(torch.zeros(numel))
    return state


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (call(op="mean"), ArgumentError, r'all_reduce_: op must be "avg" or "sum", got \'mean\''),
        (call(algorithm="ring"), ArgumentError, "algorithm must be one of .*, got 'ring'"),
        (
            call(compressor=TopK(k=3), algorithm="two_phase"),
            ArgumentError,
            "needs a compressor that works on",
        ),
        (
            call(compressor=TopK(k=601)),
            ArgumentError,
            "k must be at most the number of elements 600, got 601",
        ),
        (call(compressor=TopK(k=601), algorithm="one_phase"), ArgumentError, "k must be at most"),
        (call(compressor="sign"), DtypeError, r"compressor must be a Compressor, got 'sign' \(str\)"),
        (call(compressor=TopK), DtypeError, "compressor must be a Compressor, got the class TopK"),
        (call(checksum=1), DtypeError, r"checksum must be a bool, got 1 \(int\)"),
        (call(state="none"), DtypeError, r"state must be an ErrorFeedback, got 'none' \(str\)"),
        (call(grad=torch.ones(600).double()), DtypeError, "grad must be float32, bfloat16 or float16"),
        (call(grad=[1.0]), DtypeError, r"grad must be a tensor, got \[1.0\] \(list\)"),
        (call(grad=torch.ones(20, 30).t()), LayoutError, "grad must be contiguous"),
        (call(grad=torch.ones(600, requires_grad=True)), AutogradError, "grad requires grad"),
        (call(state=state_of(599)), StateMismatchError, "belongs to 599 elements, got a gradient of 600"),
    ],
)
def test_wrong_arguments(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SimulatedGroup(1).run(wrong)


def test_arrays_are_reduced_where_they_lie() -> None:
    numpy = pytest.importorskip("numpy")

    def rank_main(member: SimulatedMember, array: bool) -> list[Any]:
        generator = torch.Generator().manual_seed(member.rank)
        tensors = [torch.randn(600, generator=generator) for _ in range(3)]
        grad, packed, err = (tensor.numpy() for tensor in tensors) if array else tensors
        server = numpy.zeros(320, numpy.float32) if array else torch.zeros(320)
        assert all_reduce_(grad, ErrorFeedback(), Sign(64), member) is grad
        assert packed_all_reduce_(packed, err, server, 64, member) is packed
        return [numpy.asarray(buffer).tobytes() for buffer in (grad, packed, err, server)]

    assert SimulatedGroup(2).run(rank_main, True) == SimulatedGroup(2).run(rank_main, False)
    fixed = numpy.ones(600, numpy.float32)
    member = SimulatedGroup(1).members[0]
    with pytest.raises(
        ArgumentError,
        match=r"all_reduce_: async_op=True takes tensors, got an array of shape \(600,\), float32 \(nda",
    ):
        all_reduce_(fixed, None, Sign(64), member, async_op=True)
    fixed.flags.writeable = False
    with pytest.raises(LayoutError, match="all_reduce_: grad is a read-only array and would be written to"):
        all_reduce_(fixed, None, Sign(64), member)


def test_wrong_lists() -> None:
    member = SimulatedGroup(1).members[0]
    one, two = torch.ones(64), torch.ones(64)
    shared = ErrorFeedback()
    with pytest.raises(ShapeMismatchError, match="states must be as many as grads, got 1 and 2"):
        all_reduce_many_([one, two], [shared], Sign(64), member)
    with pytest.raises(ArgumentError, match="must not share one ErrorFeedback"):
        all_reduce_many_([one, two], [shared, shared], Sign(64), member)
    with pytest.raises(LayoutError, match="overlap"):
        all_reduce_many_([one, one[3:]], None, Sign(64), member)
    with pytest.raises(DeviceMismatchError, match=r"grads\[1\] must be on the device of grads\[0\]"):
        all_reduce_many_([one, torch.ones(64, device="meta")], None, Sign(64), member)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chunk_size": 48}, ArgumentError, "chunk_size must be a power of two"),
        (
            {"err": torch.zeros(99)},
            ShapeMismatchError,
            "err must have as many elements as grad, got 99 and 100",
        ),
        ({"err": torch.zeros(100).half()}, DtypeError, "err must be float32"),
        (
            {"server_err": torch.zeros(128)},
            ShapeMismatchError,
            "server_err must have 100 elements .* got 128",
        ),
        ({"server_err": torch.zeros(100).bfloat16()}, DtypeError, "server_err must be float32"),
        ({"nonfinite": torch.zeros(1)}, DtypeError, "nonfinite must be"),
        ({"op": "max"}, ArgumentError, 'packed_all_reduce_: op must be "avg" or "sum", got'),
    ],
)
def test_wrong_packed_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {
        "grad": torch.ones(100),
        "err": torch.zeros(100),
        "server_err": torch.zeros(100),
        "chunk_size": 64,
        "group": SimulatedGroup(1).members[0],
    }
    with pytest.raises(error, match=text):
        packed_all_reduce_(**(arguments | change))


def test_packed_arguments_must_not_overlap() -> None:
    memory = torch.zeros(200)
    with pytest.raises(LayoutError, match="overlap"):
        packed_all_reduce_(memory[:100], memory[99:199], torch.zeros(100), 64, SimulatedGroup(1).members[0])


def test_server_residual_of_another_world() -> None:
    state = ErrorFeedback()
    SimulatedGroup(1).run(lambda m: all_reduce_(torch.ones(600), state, Sign(64), m, algorithm="two_phase"))
    before = contents(state)

    def rank_main(member: SimulatedMember) -> None:
        grad = torch.ones(600)
        with pytest.raises(StateMismatchError, match=r"belongs to .*world_size=1"):
            all_reduce_(grad, state, Sign(64), member, algorithm="two_phase")
        assert unchanged(before, contents(state))

    SimulatedGroup(2).run(rank_main)
