"""Exchanges after many local steps: by the bytes of what is said of them, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import (
    GroupUnusableError,
    PeerLostError,
    StateMismatchError,
)
from gck.integrations import diloco
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile

ROUNDS, LOCAL, WORLD = 4, 3, 3
SIGNS = gck.Sign(chunk_size=32)


class Model(nn.Module):
    """A matrix, its bias, a kernel that lies in memory with channels last, and what does not train."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Linear(40, 50)
        self.kernel = nn.Conv2d(8, 8, 5, bias=False).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.to(dtype)


def nesterov(shared: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)


def wander(model: nn.Module, rank: int, step: int) -> None:
    """A local step, another one on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def contents(outer: Any, model: nn.Module) -> list[Tensor]:
    """All that an exchange changes, copied."""
    saved = outer.state_dict()
    momenta = [entry["momentum_buffer"] for entry in saved["optimizer"]["state"].values()]
    left = [each for _, state in outer.state.residuals.items() for each in (state.worker, state.server)]
    tensors = [*model.parameters(), *saved["shared"].values(), *momenta, *left]
    return [each.detach().clone() for each in tensors if each is not None]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(same_bytes(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressor", [SIGNS, gck.TopK(ratio=0.1), gck.LowRank(rank=2)], ids=str)
def test_an_exchange_is_an_outer_step_by_the_average_change(compressor: Any, dtype: torch.dtype) -> None:
    def rank_main(member: SimulatedMember) -> list[Tensor]:
        model = Model(dtype)
        outer = gck.diloco.OuterOptimizer(model, compressor, LOCAL, optimizer=nesterov, group=member)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shared = {name: p.detach().float().clone() for name, p in trained.items()}
        momenta = {name: torch.zeros_like(each) for name, each in shared.items()}
        states = {name: gck.ErrorFeedback() for name in shared}
        frozen = [p.clone() for p in model.frozen.parameters()]
        for step in range(ROUNDS * LOCAL):
            wander(model, member.rank, step)
            done = outer.step()
            assert done == (step % LOCAL == LOCAL - 1)
            if not done:
                continue
            # The same again, by hand.
            again = Model(dtype)
            with torch.no_grad():
                for name, own in again.named_parameters():
                    if name in shared:
                        own.copy_(shared[name])
            for local in range(step - LOCAL + 1, step + 1):
                wander(again, member.rank, local)
            for name, own in again.named_parameters():
                if name not in shared:
                    continue
                now = own.detach().float()
                change = shared[name].to(dtype).float() - now
                order = (0, 2, 3, 1) if own.dim() == 4 else tuple(range(own.dim()))
                if name == "matrix.bias":
                    gck.all_reduce_(change, gck.ErrorFeedback(), SIGNS, member, algorithm="dense")
                else:
                    lying = change.permute(order).contiguous()
                    gck.all_reduce_(lying, states[name], compressor, member)
                    change = lying.permute([order.index(dim) for dim in range(own.dim())])
                momenta[name].mul_(0.9).add_(change)
                shared[name] -= 0.7 * (change + 0.9 * momenta[name])
                torch.testing.assert_close(
                    outer.state_dict()["shared"][name], shared[name], rtol=2e-6, atol=2e-6
                )
                shared[name].copy_(outer.state_dict()["shared"][name])  # rounding apart, of SGD's own order
                assert same_bytes(trained[name].detach(), shared[name].to(dtype))
                if name != "matrix.bias":
                    left = outer.state.residuals[name].worker
                    assert left is not None
                    assert states[name].worker is not None
                    assert same_bytes(left, states[name].worker)
        assert outer.state.step == ROUNDS
        assert all(same_bytes(p, old) for p, old in zip(model.frozen.parameters(), frozen, strict=True))
        return [p.detach() for p in model.parameters()]

    first, *others = SimulatedGroup(WORLD, timeout=30).run(rank_main)
    assert all(equal(first, other) for other in others)


def test_without_compression_and_momentum_it_is_the_mean_of_the_parameters() -> None:
    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=member, algorithm="dense")
        wander(model, member.rank, 0)
        before = model.matrix.weight.detach().clone()
        assert outer.step()
        return before, model.matrix.weight.detach()

    found = SimulatedGroup(WORLD, timeout=30).run(rank_main)
    mean = torch.stack([before for before, _ in found]).mean(0)
    for _, after in found:
        torch.testing.assert_close(after, mean, rtol=0, atol=1e-6)


def test_an_exchange_that_fails_changes_nothing_and_can_be_tried_again() -> None:
    def rank_main(member: SimulatedMember, others: SimulatedGroup) -> None:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, LOCAL, optimizer=nesterov, group=member)
        for step in range(LOCAL):
            wander(model, member.rank, step)
            outer.step()
        wander(model, member.rank, LOCAL)
        sound, before = outer.state.compressor, contents(outer, model)
        outer.state.compressor = Fragile(SIGNS, 2 if member.rank == 1 else 0)
        with pytest.raises((MemoryError, PeerLostError)):
            outer.synchronize()
        assert equal(contents(outer, model), before)
        with pytest.raises(GroupUnusableError):
            outer.synchronize()
        assert equal(contents(outer, model), before)
        outer.state.compressor, outer.state.group = sound, others.members[member.rank]
        outer.synchronize()
        assert outer.state.step == 2
        assert not equal(contents(outer, model), before)

    SimulatedGroup(WORLD, timeout=30).run(rank_main, SimulatedGroup(WORLD, timeout=30))


def test_those_that_are_left_go_on_without_server_residuals() -> None:
    """As docs/local_steps.md says; ranks that move up keep their worker residuals."""

    def rank_main(member: SimulatedMember, fewer: SimulatedGroup) -> None:
        model = Model()
        options: dict[str, Any] = {"algorithm": "two_phase", "group": member}
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, **options)
        wander(model, member.rank, 0)
        outer.step()
        if member.rank == 0:
            return
        outer.state.group = fewer.members[member.rank - 1]
        wander(model, member.rank, 1)
        before = contents(outer, model)
        with pytest.raises(StateMismatchError, match="server residual: belongs to"):
            outer.step()
        assert equal(contents(outer, model), before)
        for _, left in outer.state.residuals.items():
            left.server = left.binding = None
        outer.step()
        assert outer.state.step == 2

    SimulatedGroup(WORLD, timeout=30).run(rank_main, SimulatedGroup(WORLD - 1, timeout=30))


def test_it_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """The same bits as without a break, also on a rank that has what another one saved of what is shared."""

    def made(member: SimulatedMember) -> tuple[Model, Any]:
        model = Model()
        options: dict[str, Any] = {"optimizer": nesterov, "group": member}
        return model, gck.diloco.OuterOptimizer(model, gck.RandomK(ratio=0.2), LOCAL, **options)

    def train(member: SimulatedMember, model: Model, outer: Any, steps: range) -> None:
        for step in steps:
            wander(model, member.rank, step)
            outer.step()

    def rank_main(member: SimulatedMember) -> None:
        model, outer = made(member)
        train(member, model, outer, range(2 * LOCAL))
        torch.save(outer.state_dict(), tmp_path / f"{member.rank}.pt")
        outer.state.save(tmp_path)
        train(member, model, outer, range(2 * LOCAL, 4 * LOCAL))
        member.barrier()

        other, again = made(member)
        wander(other, member.rank, 0)  # lost
        again.step()
        again.load_state_dict(torch.load(tmp_path / f"{(member.rank + 1) % WORLD}.pt"))
        assert again.local_steps == 0
        loaded = again.state.load(tmp_path, step=again.state.step)
        assert loaded is not None
        train(member, other, again, range(2 * LOCAL, 4 * LOCAL))
        assert again.state.step == 4
        assert equal(contents(again, other), contents(outer, model))

    SimulatedGroup(WORLD, timeout=30).run(rank_main)


@pytest.mark.parametrize("where", ["prepare_groups", "check_same"])
def test_ctrl_c_gives_the_group_up(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, before its part of the exchange: peers wait for that."""
    plain = getattr(diloco, where)

    def interrupted(*given: Any) -> Any:
        transport = next(each for each in given if isinstance(each, SimulatedMember))
        if transport.rank == 0 and "synchronize" in given[0]:
            raise KeyboardInterrupt
        return plain(*given)

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, optimizer=nesterov, group=member)
        wander(model, member.rank, 0)
        before = contents(outer, model)
        if member.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                outer.step()
            with pytest.raises(GroupUnusableError, match=r"KeyboardInterrupt in gck\.diloco"):
                member.barrier()
        else:
            with pytest.raises(PeerLostError, match=r"KeyboardInterrupt in gck\.diloco"):
                outer.step()
        assert equal(contents(outer, model), before)

    monkeypatch.setattr(diloco, where, interrupted)
    SimulatedGroup(WORLD, timeout=30).run(rank_main)


def test_averages_are_not_kept() -> None:
    model = Model()
    outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=SimulatedGroup(1).members[0])
    wander(model, 0, 0)
    outer.step()
    assert all(shared.grad is None for shared in outer.optimizer.param_groups[0]["params"])
