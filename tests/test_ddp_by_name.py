"""The DDP hook with a compressor by name of the parameter."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gck.collectives import HierarchicalGroup, SimulatedGroup, SimulatedMember, all_reduce_
from gck.compressor import Compressor
from gck.compressor_choice import CompressorChoice
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError, CollectiveMismatchError, DtypeError, GckError, StateMismatchError
from gck.integrations import ddp
from gck.kernels.low_rank import LowRank
from gck.kernels.quantize import Quantize
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.collectives.grid import on_grid
from tests.collectives.test_transaction import Interrupted, Interruptible

NAMES = ("embed.weight", "block.0.weight", "block.1.weight", "head.weight", "block.0.bias")
SIZES = [1600, 1600, 2000, 1200, 40]
BY_NAME = {"embed.*": TopK(ratio=0.1), "head.*": None, "*": Sign(32)}


class Model(nn.Module):
    """Parameters of 1,600, 1,600, 2,000, 1,200 and 40 elements, in the order of NAMES."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 40)
        self.block = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 50, bias=False)])
        self.head = nn.Linear(50, 24, bias=False)


@dataclass
class Bucket:
    """What the hook uses of torch's GradBucket: the model's parameters, in the order of NAMES."""

    model: nn.Module
    rank: int
    flat: Tensor = field(init=False)

    def __post_init__(self) -> None:
        numel = sum(parameter.numel() for parameter in self.parameters())
        self.flat = torch.randn(numel, generator=torch.Generator().manual_seed(self.rank))

    def index(self) -> int:
        return 0

    def buffer(self) -> Tensor:
        return self.flat

    def parameters(self) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters())
        return [named[name] for name in NAMES]

    def is_last(self) -> bool:
        return True

    def gradients(self) -> dict[str, Tensor]:
        parts = self.flat.split([parameter.numel() for parameter in self.parameters()])
        return dict(zip(NAMES, parts, strict=True))


def hook(state: ddp.HookState, bucket: Bucket) -> None:
    ddp.hook(state, bucket)  # type: ignore[arg-type]


def test_each_parameter_is_as_if_reduced_alone() -> None:
    expected: dict[str, Compressor | None] = {
        "embed.weight": BY_NAME["embed.*"],
        "block.0.weight": BY_NAME["*"],
        "block.1.weight": BY_NAME["*"],
        "head.weight": None,
        "block.0.bias": None,
    }

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        state = ddp.HookState(BY_NAME, model=model, group=member)
        bucket, states = Bucket(model, member.rank), {name: ErrorFeedback() for name in NAMES}
        for name, parameter in zip(NAMES, bucket.parameters(), strict=True):
            assert state.compressor_of(parameter) is expected[name]
            assert state.bypassed(parameter) is (expected[name] is None)
        for step in range(3):
            bucket.flat.normal_(generator=torch.Generator().manual_seed(10 * step + member.rank))
            alone = {name: grad.clone() for name, grad in bucket.gradients().items()}
            hook(state, bucket)
            for name, grad in alone.items():
                compressor = expected[name] or Sign(32)
                algorithm = "auto" if expected[name] else "dense"
                all_reduce_(grad, states[name], compressor, member, algorithm=algorithm)
                assert same_bytes(bucket.gradients()[name], grad), (step, name)
        assert sorted(state.residuals) == ["block.0.weight", "block.1.weight", "embed.weight"]
        for name, residuals in state.residuals.items():
            assert same_bytes(residuals.worker, states[name].worker)
            assert (residuals.server is None) == (states[name].server is None)

    SimulatedGroup(3, timeout=20).run(rank_main)


def test_a_compressor_that_looks_at_shapes_has_those_of_parameters() -> None:
    """Also where they lie in memory in another order, as of convolutions with channels last."""

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        model.block[0] = nn.Conv2d(8, 8, 5, bias=True).to(memory_format=torch.channels_last)
        model.block[0].bias = nn.Parameter(torch.zeros(40))
        model.block[1].weight = nn.Parameter(torch.zeros(40, 50).t())
        state = ddp.HookState({"head.*": None, "*": LowRank(rank=2)}, model=model, group=member)
        shapes = {
            "embed.weight": [40, 40],
            "block.0.weight": [8, 5, 5, 8],
            "block.1.weight": [40, 50],
        }
        states = {name: ErrorFeedback() for name in shapes}
        bucket = Bucket(model, member.rank)
        for step in range(2):
            bucket.flat.normal_(generator=torch.Generator().manual_seed(10 * step + member.rank))
            alone = {name: bucket.gradients()[name].clone() for name in shapes}
            hook(state, bucket)
            for name, grad in alone.items():
                all_reduce_(grad.view(shapes[name]), states[name], LowRank(rank=2), member)
                assert same_bytes(bucket.gradients()[name], grad), (step, name)
        for name, shape in shapes.items():
            basis = state.residuals[name].basis
            assert basis is not None
            assert tuple(basis.shape) == (2, torch.Size(shape[1:]).numel())
            assert same_bytes(basis, states[name].basis)

    SimulatedGroup(3, timeout=20).run(rank_main)


def test_parameters_of_one_compressor_share_messages() -> None:
    """In the order of the dict: first what is dense, then the gather, then two phases, for two patterns."""
    sign = Sign(32)
    given = {"embed.*": TopK(ratio=0.1), "block.0.*": sign, "head.*": None, "*": sign}

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        state = ddp.HookState(given, model=model, group=member, validate="off")
        assert state.compressors == [given["embed.*"], sign]
        hook(state, Bucket(model, member.rank))
        assert member._tickets == ["all_reduce", "all_gather", "all_to_all", "all_gather"]

    # Of so many ranks two phases of signs send less than one.
    SimulatedGroup(4, timeout=20).run(rank_main)


def test_warm_up_is_dense() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        model = Model()
        state = ddp.HookState(BY_NAME, 1, model=model, group=member)
        bucket = Bucket(model, member.rank)
        hook(state, bucket)
        assert len(state.residuals) == 0
        return bucket.flat

    exact = (Bucket(Model(), 0).flat + Bucket(Model(), 1).flat) / 2
    assert all(same_bytes(flat, exact) for flat in SimulatedGroup(2, timeout=20).run(rank_main))


def test_server_residuals_are_sent_by_whatever_comes_next() -> None:
    """By compressors of other chunks, of none, and where a parameter is bypassed."""
    name = "block.0.weight"

    def rank_main(member: SimulatedMember, other: Any) -> Tensor:
        model = Model()
        state = ddp.HookState(BY_NAME, model=model, group=member, algorithm="auto")
        bucket = Bucket(model, member.rank)
        total = bucket.flat.clone()
        hook(state, bucket)
        server = state.residuals[name].server
        assert server is not None
        assert server.any()
        state.compressor = other
        results = bucket.flat.clone()
        for _ in range(2):
            bucket.flat.zero_()
            hook(state, bucket)
            results += bucket.flat
        if isinstance(other, Sign):
            state.algorithm = "dense"
            bucket.flat.zero_()
            hook(state, bucket)
            results += bucket.flat
        assert all(each.server is None or not each.server.any() for _, each in state.residuals.items())
        assert all(each.worker is None or not each.worker.any() for _, each in state.residuals.items())
        return torch.stack([total, results])

    for other in (Sign(64), TopK(ratio=1.0), {"embed.*": TopK(ratio=1.0), "*": None}):
        found = SimulatedGroup(4, timeout=20).run(rank_main, other)
        mean = torch.stack([total for total, _ in found]).mean(0)
        for _, results in found:
            torch.testing.assert_close(results, mean, rtol=0, atol=1e-5)


def test_ranks_of_a_node_go_on_sharing_parameters_by_the_same_chunks() -> None:
    """Said when the compressor is set: DDP does not survive an error in its hook."""

    def rank_main(group: HierarchicalGroup) -> None:
        model = Model()
        state = ddp.HookState({"head.*": LowRank(rank=2), "*": Sign(32)}, model=model, group=group)
        bucket = Bucket(model, group.rank)
        hook(state, bucket)
        assert state.residuals["block.0.weight"].shard is not None
        for other in (Sign(64), TopK(ratio=0.1), {"embed.*": Sign(32), "*": None}):
            with pytest.raises(
                StateMismatchError, match=r"share \S+ by chunks of (32|50) elements, in which"
            ):
                state.compressor = other  # type: ignore[assignment]
        state.compressor = {"head.*": LowRank(rank=2), "*": Quantize(bits=8, chunk_size=32)}
        hook(state, bucket)
        assert state.step == 2

    on_grid((2, 2), rank_main)


def test_states_with_patterns_can_be_copied() -> None:
    choice = CompressorChoice("f", BY_NAME)
    for copied in (copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert copied.given == BY_NAME
        assert copied.of("f", "embed.weight") == BY_NAME["embed.*"]


def test_names_that_are_made_up_are_not_compared() -> None:
    def rank_main(member: SimulatedMember) -> None:
        state = ddp.HookState(Sign(32), group=member, algorithm="two_phase", validate="always")
        bucket = Bucket(Model(), member.rank)
        if member.rank == 0:
            state.feedback(bucket.parameters()[1], create=False)
        hook(state, bucket)
        assert state.step == 1

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_a_step_without_compression() -> None:
    """It sends what residuals hold, too, and empties them."""

    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        model = Model()
        state = ddp.HookState(BY_NAME, model=model, group=member)
        bucket = Bucket(model, member.rank)
        hook(state, bucket)
        bucket.flat.normal_(generator=torch.Generator().manual_seed(10 + member.rank))
        whole = bucket.flat.clone()
        parts = dict(zip(NAMES, whole.split(SIZES), strict=True))
        for name, residuals in state.residuals.items():
            assert residuals.worker is not None
            assert residuals.worker.any()
            parts[name] += residuals.worker
        state.algorithm = "dense"
        hook(state, bucket)
        assert not any(r.worker is not None and r.worker.any() for _, r in state.residuals.items())
        return bucket.flat, whole

    (flat, first), (other, second) = SimulatedGroup(2, timeout=20).run(rank_main)
    assert same_bytes(flat, other)
    assert same_bytes(flat, (first + second) / 2)


def test_error_of_the_last_message_leaves_the_bucket_as_it_was() -> None:
    def rank_main(member: SimulatedMember) -> None:
        model, failing = Model(), Fragile(Sign(32), fail_at=2)
        state = ddp.HookState({**BY_NAME, "*": failing}, model=model, group=member, algorithm="auto")
        bucket = Bucket(model, member.rank)
        before = bucket.flat.clone()
        residuals = state.residuals["embed.weight"]
        worker = residuals.worker_for(torch.zeros(1600)).fill_(0.5)
        with pytest.raises(MemoryError, match="call 2"):
            hook(state, bucket)
        assert same_bytes(bucket.flat, before)
        assert residuals.worker is worker
        assert bool((worker == 0.5).all())
        assert state.step == 0

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_interrupt_at_every_write() -> None:
    """All of a bucket is as before, or all done, residuals as well."""
    at, finished = 0, 0
    while True:
        at += 1
        model = Model()
        given: dict[str, Compressor | None] = {"embed.*": Interruptible(32), "*": Interruptible(64)}
        member = SimulatedGroup(1).members[0]
        state = ddp.HookState(given, model=model, group=member, algorithm="two_phase")
        bucket = Bucket(model, 1)
        flat = bucket.flat.clone()
        for name in ("embed.weight", "head.weight"):
            parameter = dict(model.named_parameters())[name]
            state.residuals[name].worker_for(parameter.detach()).fill_(0.5)
        try:
            with Interrupted(at):
                hook(state, bucket)
            break
        except KeyboardInterrupt:
            workers = [state.residuals[name].worker for name in ("embed.weight", "head.weight")]
            same = [bool((worker == 0.5).all()) for worker in workers if worker is not None]
            now, then = bucket.gradients(), dict(zip(NAMES, flat.split(SIZES), strict=True))
            same += [same_bytes(now[name], then[name]) for name in ("embed.weight", "head.weight")]
            assert len(same) == 4
            assert all(same) or not any(same), f"write {at}: {same}"
            finished += not any(same)
    assert at > 6
    assert finished >= 1
    assert state.step == 1


def test_state_belongs_to_the_compressors(tmp_path: Path) -> None:
    model, member = Model(), SimulatedGroup(1).members[0]
    state = ddp.HookState(BY_NAME, model=model, group=member)
    hook(state, Bucket(model, 0))
    state.save(tmp_path)
    saved = state.state_dict()
    assert saved["compressor"] == state._choice.describe()
    same = ddp.HookState(dict(BY_NAME), model=model, group=member)
    assert same.load(tmp_path) is not None
    same.load_state_dict(saved)
    assert same.step == 1
    for given in (
        {**BY_NAME, "*": Sign(64)},
        {"head.*": None, "embed.*": BY_NAME["embed.*"], "*": Sign(32)},
        Sign(32),
    ):
        other = ddp.HookState(given, model=model, group=member)  # type: ignore[arg-type]
        with pytest.raises(StateMismatchError, match="belongs to compressor"):
            other.load_state_dict(saved)
        with pytest.raises(StateMismatchError, match="saved by compressor"):
            other.load(tmp_path)
        other.load_state_dict(saved, reset_server=True)


def test_the_compressor_can_be_set_between_steps() -> None:
    model = Model()
    state = ddp.HookState(Sign(32), model=model, group=SimulatedGroup(1).members[0])
    embed = model.embed.weight
    assert state.compressor_of(embed) == Sign(32)
    state.compressor = BY_NAME
    assert state.compressor == BY_NAME
    assert state.compressor_of(embed) is BY_NAME["embed.*"]
    for wrong in ({"embedding.*": Sign(32), "*": Sign(32)}, {"*": "sign"}, None):
        with pytest.raises(GckError):
            state.compressor = wrong  # type: ignore[assignment]
    assert state.compressor_of(embed) is BY_NAME["embed.*"]
    assert ddp.HookState(Sign(32)).compressor == Sign(32)


@pytest.mark.parametrize(
    ("compressor", "error", "text"),
    [
        ({}, ArgumentError, "HookState: compressor must name a compressor, got {}"),
        ({"*": None}, ArgumentError, "HookState: compressor must name a compressor, got "),
        ({"*": "sign"}, DtypeError, r"HookState: compressor must be a Compressor, got 'sign' \(str\)"),
        ({"*": Sign}, DtypeError, "HookState: compressor must be a Compressor, got the class Sign"),
        ({1: Sign()}, DtypeError, r"HookState: compressor must have names for keys, got 1 \(int\)"),
        (None, DtypeError, "HookState: compressor must be a Compressor, got None"),
        (
            {"embedding.*": Sign(), "*": Sign()},
            ArgumentError,
            "HookState.bind: model has no parameter for 'embedding.*' of compressor",
        ),
    ],
)
def test_wrong_compressors(compressor: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ddp.HookState(compressor, model=Model())


def test_a_pattern_that_comes_too_late() -> None:
    with pytest.raises(ArgumentError, match=r"'head\.\*' of compressor comes too late"):
        ddp.HookState({"embed.*": Sign(), "*": TopK(ratio=0.1), "head.*": None}, model=Model())


def test_the_dict_is_copied() -> None:
    given: dict[str, Compressor | None] = {"*": Sign(32)}
    state = ddp.HookState(given, model=Model())
    given["*"] = TopK(ratio=0.1)
    assert state.compressor == {"*": Sign(32)}
    assert state.compressors == [Sign(32)]
    with pytest.raises(TypeError):
        state.compressor["*"] = TopK(ratio=0.1)  # type: ignore[index]


def test_equal_compressors_share_messages_but_not_other_seeds() -> None:
    one = CompressorChoice("f", {"a": Quantize(seed=1, rounding="stochastic"), "b": Sign(32), "*": Sign(32)})
    assert len(one.compressors) == 2
    assert one.of("f", "b") is one.of("f", "c") is one.compressors[1]
    stochastic = [Quantize(seed=seed, rounding="stochastic") for seed in (1, 2)]
    assert stochastic[0] == stochastic[1]
    other = CompressorChoice("f", {"a": stochastic[0], "*": stochastic[1]})
    assert [other.of("f", name) for name in "ab"] == other.compressors
    assert other.of("f", "a") is not other.of("f", "b")


@pytest.mark.parametrize("validate", ["first", "always"])
def test_ranks_with_crossed_names(validate: str) -> None:
    """Messages of one size and compressor, of parameters that are not the same."""

    def rank_main(member: SimulatedMember) -> None:
        first, second = ("embed.*", "block.0.weight") if member.rank else ("block.0.weight", "embed.*")
        model, compressors = Model(), (Sign(32), Sign(64))
        given = {first: compressors[0], second: compressors[1], "*": None}
        state = ddp.HookState(given, model=model, group=member, algorithm="two_phase", validate=validate)
        bucket = Bucket(model, member.rank)
        before = bucket.flat.clone()
        with pytest.raises(
            CollectiveMismatchError, match=r"in shapes or names; this rank has two_phase avg of 1"
        ):
            hook(state, bucket)
        assert same_bytes(bucket.flat, before)

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_algorithms_must_suit_all_of_them() -> None:
    with pytest.raises(ArgumentError, match='"two_phase" needs a compressor that works on chunks, got TopK'):
        ddp.HookState(BY_NAME, algorithm="two_phase")


def test_names_must_be_known() -> None:
    state = ddp.HookState(BY_NAME, group=SimulatedGroup(1).members[0])
    bucket = Bucket(Model(), 0)
    before = bucket.flat.clone()
    with pytest.raises(ArgumentError, match="parameters have no names"):
        hook(state, bucket)
    assert same_bytes(bucket.flat, before)


def test_describe_is_the_same_text_everywhere() -> None:
    choice = CompressorChoice("f", {"a*": Quantize(bits=4, seed=3), "*": None, "b": TopK(k=2)})
    assert choice.describe().startswith("{'a*': Quantize(bits=4, ")
    assert "seed" not in choice.describe()
    assert ", '*': None, 'b': TopK(ratio=None, k=2" in choice.describe()
    assert CompressorChoice("f", Sign(64)).describe() == "Sign(chunk_size=64, decay=1.0, clip=None)"
