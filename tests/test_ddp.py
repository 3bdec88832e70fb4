"""The DDP hook: on two real ranks (collectives/ddp_worker.py), and alone with made-up buckets."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gck.collectives import Link, SimulatedGroup, SimulatedMember
from gck.errors import ArgumentError, DtypeError, GroupUnusableError, ShapeMismatchError
from gck.integrations import ddp
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_worker import CHECKS
from tests.collectives.fragile import Fragile
from tests.collectives.launcher import assert_passed, run_ranks
from tests.collectives.test_transaction import Interrupted, Interruptible


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks("tests.collectives.ddp_worker", 2, tmp_path_factory.mktemp("ddp"), timeout=150)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, reports: list[dict[str, str]]) -> None:
    assert_passed(check, reports)


@dataclass
class Bucket:
    """What the hook uses of torch's GradBucket."""

    held: list[Tensor]
    flat: Tensor
    last: bool = True

    def index(self) -> int:
        return 0

    def buffer(self) -> Tensor:
        return self.flat

    def parameters(self) -> list[Tensor]:
        return self.held

    def is_last(self) -> bool:
        return self.last


def bucket_of(rank: int, *shapes: tuple[int, ...], last: bool = True) -> Bucket:
    held = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    numel = sum(parameter.numel() for parameter in held)
    return Bucket(held, torch.randn(numel, generator=torch.Generator().manual_seed(rank)), last)


def test_steps_are_counted_by_last_buckets() -> None:
    state = ddp.HookState(Sign(32), group=SimulatedGroup(1).members[0])
    for last in (False, False, True, False, True):
        ddp.hook(state, bucket_of(0, (40, 40), last=last))
    assert state.step == 2


def test_small_tensors_share_one_message() -> None:
    shapes = [(5,), (40, 40), (3, 4), (2000,), (0, 7)]

    def rank_main(member: SimulatedMember) -> tuple[Bucket, int]:
        state = ddp.HookState(Sign(32), group=member, algorithm="two_phase", validate="off")
        bucket = bucket_of(member.rank, *shapes)
        future = ddp.hook(state, bucket)
        assert future.done()
        assert future.value().data_ptr() == bucket.flat.data_ptr()
        # One dense message, and two phases.
        assert member._tickets == ["all_reduce", "all_to_all", "all_gather"]
        return bucket, len(state.residuals)

    exact = (bucket_of(0, *shapes).flat + bucket_of(1, *shapes).flat) / 2
    for bucket, residuals in SimulatedGroup(2, timeout=20).run(rank_main):
        assert residuals == 1
        assert same_bytes(bucket.flat[:5], exact[:5])
        assert same_bytes(bucket.flat[1605:], exact[1605:])
        assert not torch.equal(bucket.flat[5:1605], exact[5:1605])


def test_a_slow_link_is_sent_pieces() -> None:
    def rank_main(member: SimulatedMember, link: Link | None) -> tuple[Tensor, int]:
        state = ddp.HookState(Sign(), group=member, validate="off", link=link)
        bucket = bucket_of(member.rank, (500, 600), (1000, 700))
        ddp.hook(state, bucket)
        return bucket.flat, len(member._tickets)

    flats, counts = [], []
    for link in (None, Link.ethernet(1e6)):
        for flat, count in SimulatedGroup(2, timeout=20).run(rank_main, link):
            flats.append(flat)
            counts.append(count)
    assert counts == [1, 1, 4, 4]  # 141 kB, of which a piece's message has 30 KiB or more
    assert all(same_bytes(flat, flats[0]) for flat in flats)


def test_what_is_compressed_is_measured_while_asked_for() -> None:
    def rank_main(member: SimulatedMember) -> None:
        state = ddp.HookState(Sign(32), group=member, algorithm="two_phase", measure=True)
        bucket = bucket_of(member.rank, (5,), (40, 40), (33, 64))
        given = bucket.flat.clone()
        ddp.hook(state, bucket)
        taken = state.residuals.statistics()
        assert [int(each.selected) for each in taken.values()] == [1600, 2112]  # not of what is bypassed
        for each, grad in zip(taken.values(), given[5:].split([1600, 2112]), strict=True):
            assert math.isclose(float(each.acc_sq), float(grad.double().square().sum()), rel_tol=1e-12)
            assert 0 < float(each.err_sq) < float(each.acc_sq)
        before = [each.values.clone() for each in taken.values()]
        state.measure = False
        ddp.hook(state, bucket)
        after = [each.values for each in state.residuals.statistics().values()]
        assert all(map(torch.equal, before, after))

    SimulatedGroup(2, timeout=20).run(rank_main)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, True, True, False]),
        ({"bypass_numel": 0}, [True, True, False, False]),
        ({"bypass_1d": False}, [True, False, True, False]),
        ({"bypass_1d": False, "bypass_numel": 2000}, [True, True, True, True]),
    ],
)
def test_which_parameters_are_bypassed(options: dict[str, Any], expected: list[bool]) -> None:
    state = ddp.HookState(Sign(32), **options)
    shapes = [(0,), (1025,), (32, 32), (25, 41)]
    assert [state.bypassed(torch.zeros(shape)) for shape in shapes] == expected


def test_parameters_are_bypassed_by_name() -> None:
    model = nn.Sequential(nn.Linear(50, 60), nn.Linear(60, 50))
    state = ddp.HookState(Sign(32), model=model, bypass_names=["1.weight"])
    assert [state.bypassed(each) for each in model.parameters()] == [False, True, True, True]
    with pytest.raises(ArgumentError, match=r"bind: model has no parameters of bypass_names \['2.weight'\]"):
        ddp.HookState(Sign(32), model=model, bypass_names={"0.weight", "2.weight"})
    for wrong in ("1.weight", ["1.weight", 2], 3, iter(["1.weight"])):
        with pytest.raises(DtypeError, match="HookState: bypass_names must be"):
            ddp.HookState(Sign(32), bypass_names=wrong)  # type: ignore[arg-type]
    unbound = ddp.HookState(Sign(32), group=SimulatedGroup(1).members[0], bypass_names=["1.weight"])
    with pytest.raises(ArgumentError, match="parameters have no names"):
        ddp.hook(unbound, bucket_of(0, (40, 40)))


def test_error_leaves_the_bucket_as_it_was() -> None:
    """The bypassed tensors are reduced first; the failure comes after."""

    def rank_main(member: SimulatedMember) -> None:
        state = ddp.HookState(Fragile(Sign(32), fail_at=2), group=member, algorithm="two_phase")
        bucket = bucket_of(member.rank, (5,), (40, 40))
        before = bucket.flat.clone()
        with pytest.raises(MemoryError, match="call 2"):
            ddp.hook(state, bucket)
        assert member._tickets == ["all_gather", "all_reduce", "all_gather", "all_to_all"]
        assert same_bytes(bucket.flat, before)
        assert state.step == 0
        residuals = state.feedback(bucket.held[1])
        assert residuals is not None
        assert residuals.worker is None

    SimulatedGroup(2, timeout=20).run(rank_main)


@pytest.mark.parametrize("guarded", [False, True])
def test_interrupt_at_every_write(guarded: bool) -> None:
    """Bypassed and compressed tensors of a bucket: all as before, or all done."""
    held = [nn.Parameter(torch.zeros(shape)) for shape in ((5,), (40, 40), (3, 4))]
    numel, at, finished = 5 + 1600 + 12, 0, 0
    while True:
        at += 1
        options: dict[str, Any] = {"algorithm": "two_phase", "skip_nonfinite": guarded}
        state = ddp.HookState(
            Interruptible(32), group=SimulatedGroup(1).members[0], bypass_numel=20, **options
        )
        flat = torch.randn(numel, generator=torch.Generator().manual_seed(1))
        residual = state.feedback(held[1])
        assert residual is not None
        residual.worker_for(held[1].detach()).fill_(0.5)
        # A residual of warm-up or of another option: what is bypassed sends it, too.
        small = state.feedback(held[0])
        assert small is not None
        small.worker_for(held[0].detach()).fill_(0.25)
        before = [flat.clone(), torch.full((1600,), 0.5), torch.full((5,), 0.25)]
        try:
            with Interrupted(at):
                ddp.hook(state, Bucket(held, flat))  # type: ignore[arg-type]
            break
        except KeyboardInterrupt:
            assert residual.worker is not None
            assert small.worker is not None
            after = [flat, residual.worker, small.worker]
            same = [same_bytes(a, b) for a, b in zip(after, before, strict=True)]
            done = not any(same) and bool((flat[:5] != before[0][:5]).all())
            if guarded:  # residuals are those from before the step in any case
                done = same == [False, True, True]
            assert all(same) or done, f"write {at}: {same}"
            finished += done
            assert state.step == 0
    assert at > 3
    assert finished >= 1
    assert state.step == 1


def test_interrupt_while_others_are_in_flight() -> None:
    """They have ended when the hook returns: nothing writes residuals behind the back of who saves them."""

    class Slow(Sign):
        def compress_(self, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            time.sleep(0.2)
            return super().compress_(*args, **kwargs)

    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    member = SimulatedGroup(1).members[0]
    state = ddp.HookState(Slow(32), model=model, group=member, bypass_numel=0, algorithm="two_phase")
    flats = [torch.randn(1600) for _ in range(2)]
    parameters = list(model.parameters())
    first = ddp.hook(state, Bucket(parameters[:1], flats[0], last=False))  # type: ignore[arg-type]
    before = flats[1].clone()
    with pytest.raises(KeyboardInterrupt):
        ddp.hook(state, Bucket(parameters[1:], flats[1]))  # type: ignore[arg-type]
    assert first.done()
    assert state._in_flight == []
    assert same_bytes(flats[1], before)
    assert state.step == 0
    with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
        member.barrier()


def test_interrupt_before_a_bucket_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """While residuals are copied, say: peers wait for the bucket all the same."""
    model, member = nn.Linear(40, 40, bias=False), SimulatedGroup(1).members[0]
    state = ddp.HookState(Sign(32), model=model, group=member, skip_nonfinite=True)

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state.guard, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ddp.hook(state, Bucket(list(model.parameters()), torch.randn(1600)))  # type: ignore[arg-type]
    with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
        member.barrier()


@pytest.mark.parametrize("guarded", [False, True])
def test_what_is_saved_is_not_written_meanwhile(guarded: bool, tmp_path: Path) -> None:
    """A backward pass that failed between buckets, elsewhere than in the hook: one is in flight still."""

    class Slow(Sign):
        def compress_(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.2)
            return super().compress_(*args, **kwargs)

    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    for save in (False, True):
        options: dict[str, Any] = {"algorithm": "two_phase", "skip_nonfinite": guarded}
        member = SimulatedGroup(1).members[0]
        state = ddp.HookState(Slow(32), model=model, group=member, bypass_numel=0, **options)
        bucket = Bucket(list(model.parameters())[:1], torch.randn(1600), last=False)
        reduced = ddp.hook(state, bucket)  # type: ignore[arg-type]
        if save:
            state.save(tmp_path)
        saved = copy.deepcopy(state.state_dict())
        assert reduced.done()
        worker = saved["residuals"]["tensors"].get("0.weight", {}).get("worker")
        assert (worker is None) == guarded  # else as before the step
        residual = state.residuals["0.weight"].worker
        assert worker is None or (residual is not None and same_bytes(worker, residual))


def test_sizes_are_checked() -> None:
    state = ddp.HookState(Sign(32), group=SimulatedGroup(1).members[0])
    bucket = bucket_of(0, (40, 40))
    bucket.flat = bucket.flat[:-1]
    with pytest.raises(ShapeMismatchError, match="bucket 0 has 1599 elements, its 1 parameters 1600"):
        ddp.hook(state, bucket)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ddp.HookState("sign"), DtypeError, r"compressor must be a Compressor, got 'sign' \(str\)"),
        (lambda: ddp.HookState(Sign), DtypeError, "compressor must be a Compressor, got the class Sign"),
        (
            lambda: ddp.HookState(Sign(), warmup_steps=-1),
            ArgumentError,
            "warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: ddp.HookState(Sign(), warmup_steps=1.5),
            DtypeError,
            r"warmup_steps must be an int, got 1.5 \(float\)",
        ),
        (
            lambda: ddp.HookState(Sign(), bypass_numel=True),
            DtypeError,
            r"bypass_numel must be an int, got True \(bool\)",
        ),
        (
            lambda: ddp.HookState(Sign(), bypass_1d="no"),
            DtypeError,
            r"bypass_1d must be a bool, got 'no' \(str\)",
        ),
        (
            lambda: ddp.HookState(Sign(), algorithm="ring"),
            ArgumentError,
            "HookState: algorithm must be one of",
        ),
        (
            lambda: ddp.HookState(TopK(k=3), algorithm="two_phase"),
            ArgumentError,
            'HookState: algorithm "two_phase" needs a compressor that works on chunks',
        ),
        (lambda: ddp.HookState(Sign(), validate="never"), ArgumentError, "HookState: validate must be"),
        (
            lambda: ddp.HookState(Sign(), link=1e6),
            DtypeError,
            r"HookState: link must be a Link or None, got 1000000.0 \(float\)",
        ),
        (lambda: ddp.HookState(Sign(), timeout=0), ArgumentError, "timeout must be a positive number"),
        (lambda: ddp.register(nn.Linear(2, 2), Sign()), DtypeError, "must be a DistributedDataParallel"),
    ],
)
def test_wrong_options(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_an_algorithm_is_checked_when_it_is_set() -> None:
    """And not in a backward pass, which DDP would not survive."""
    state = ddp.HookState(TopK(k=3))
    for algorithm, text in (("ring", "must be one of"), ("two_phase", "needs a compressor that works on")):
        with pytest.raises(ArgumentError, match=text):
            state.algorithm = algorithm
        assert state.algorithm == "auto"
    state.algorithm = "dense"
    assert state.algorithm == "dense"
    assert pickle.loads(pickle.dumps(state)).algorithm == "dense"
    old = ddp.HookState.__new__(ddp.HookState)
    old.__setstate__(
        {name.lstrip("_") if name == "_algorithm" else name: v for name, v in vars(state).items()}
    )
    assert old.algorithm == "dense"


def test_parameter_of_another_model() -> None:
    state = ddp.HookState(TopK(ratio=0.1), model=nn.Linear(40, 40), group=SimulatedGroup(1).members[0])
    with pytest.raises(ArgumentError, match=r"a parameter of shape \(40, 40\) is not in the bound model"):
        ddp.hook(state, bucket_of(0, (40, 40)))  # type: ignore[arg-type]
