"""CUDA tensors and what looks at their bytes from the host: checksums, files of residuals, skipped steps.

Each gives what the same calls give on CPU tensors.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import CorruptPayloadError
from tests.cases import same_bytes
from tests.collectives.scenarios import gradient

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NUMELS = {"a": 5000, "b": 64, "c": 1}
CASES = [
    (gck.TopK(ratio=0.1), "one_phase"),
    (gck.Sign(64), "two_phase"),
    (gck.Quantize(4, 64), "two_phase"),
    (gck.Sign(64), "dense"),
    (gck.LowRank(rank=2), "factored"),
]


def held(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies on the host."""
    return [None if tensor is None else tensor.cpu().clone() for tensor in tensors]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and same_bytes(x, y))
        for x, y in zip(a, b, strict=True)
    )


def content(residuals: ErrorFeedbackMap) -> list[Tensor | None]:
    return held(
        *(buffer for _, state in sorted(residuals.items()) for buffer in (state.worker, state.server))
    )


@pytest.mark.parametrize(("compressor", "algorithm"), CASES, ids=str)
def test_checksums_change_nothing(compressor: Any, algorithm: str) -> None:
    def rank_main(member: SimulatedMember, device: torch.device, checksum: bool) -> list[Tensor | None]:
        state, results = ErrorFeedback(), []
        for step in range(2):
            grad = gradient(member.rank, 5000, step=step).to(device)
            all_reduce_(grad, state, compressor, member, algorithm=algorithm, checksum=checksum)
            results += held(grad)
        assert state.worker is None or state.worker.device.type == device.type
        return results + held(state.worker, state.server)

    expected = SimulatedGroup(2, timeout=60).run(rank_main, CPU, False)
    for checksum in (False, True):
        found = SimulatedGroup(2, timeout=60).run(rank_main, CUDA, checksum)
        assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), checksum


def test_a_bit_that_flips_is_found_by_all() -> None:
    def rank_main(member: SimulatedMember) -> str:
        inner, done = member.all_to_all_bytes, []

        def damaged(send: Tensor) -> Tensor:
            rows = inner(send)
            if member.rank == 1 and not done:
                assert rows.is_cuda
                rows[0, 3] ^= 4
            done.append(rows)
            return rows

        member.all_to_all_bytes = damaged  # type: ignore[method-assign]
        grad, state = gradient(member.rank, 5000).cuda(), ErrorFeedback()
        before = held(grad)
        with pytest.raises(CorruptPayloadError, match="from rank 0 to rank 1 was damaged") as raised:
            all_reduce_(grad, state, gck.Sign(64), member, algorithm="two_phase", checksum=True)
        assert same(held(grad), before)
        assert state.worker is None or not state.worker.any()
        all_reduce_(grad, state, gck.Sign(64), member, algorithm="two_phase", checksum=True)
        return str(raised.value)

    texts = SimulatedGroup(2, timeout=60).run(rank_main)
    assert texts[0] == texts[1]


def reduced(
    member: SimulatedMember, residuals: ErrorFeedbackMap, steps: range, device: torch.device
) -> list[Tensor | None]:
    """The results of `steps`, on the host."""
    results = []
    for step in steps:
        for name, numel in NUMELS.items():
            grad = gradient(member.rank, numel, step=step).to(device)
            all_reduce_(grad, residuals[name], gck.Sign(32), member, algorithm="two_phase")
            results += held(grad)
    return results


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(CUDA, CUDA), (CUDA, CPU), (CPU, CUDA)], ids=str)
def test_residuals_go_on_from_a_file(saved_on: torch.device, loaded_on: torch.device, tmp_path: Path) -> None:
    compressor = gck.Sign(32)

    def whole(member: SimulatedMember) -> tuple[list[Tensor | None], list[Tensor | None]]:
        residuals = ErrorFeedbackMap()
        reduced(member, residuals, range(2), CPU)
        return reduced(member, residuals, range(2, 4), CPU), content(residuals)

    def first(member: SimulatedMember) -> list[Tensor | None]:
        residuals = ErrorFeedbackMap()
        reduced(member, residuals, range(2), saved_on)
        place = {"rank": member.rank, "world_size": member.world_size}
        gck.save_state(tmp_path, residuals, **place, step=2, compressor=compressor)
        return content(residuals)

    def second(member: SimulatedMember) -> tuple[Any, ...]:
        residuals = ErrorFeedbackMap()
        place = {"rank": member.rank, "world_size": member.world_size}
        loaded = gck.load_state(tmp_path, residuals, **place, compressor=compressor, numels=NUMELS)
        assert loaded is not None
        assert loaded.step == 2
        read = content(residuals)
        results = reduced(member, residuals, range(2, 4), loaded_on)
        assert all(state.worker.device.type == loaded_on.type for _, state in residuals.items())
        return read, results, content(residuals)

    expected = SimulatedGroup(2, timeout=60).run(whole)
    saved = SimulatedGroup(2, timeout=60).run(first)
    for rank, (read, *found) in enumerate(SimulatedGroup(2, timeout=60).run(second)):
        assert same(read, saved[rank])
        assert all(same(ours, theirs) for ours, theirs in zip(found, expected[rank], strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_put_back(bad: float) -> None:
    overflows = {0: (1, "a", 4999), 2: (0, "c", 0)}  # step: (rank, tensor, entry)

    def train(member: SimulatedMember, device: torch.device) -> list[Tensor | None]:
        residuals = ErrorFeedbackMap()
        for step in range(4):
            grads = {
                name: gradient(member.rank, numel, step=step).to(device) for name, numel in NUMELS.items()
            }
            rank, tensor, entry = overflows.get(step, (-1, "a", 0))
            if rank == member.rank:
                grads[tensor][entry] = bad
            before = content(residuals)
            with gck.skip_nonfinite(residuals, grads.values()) as guard:
                for name, grad in grads.items():
                    all_reduce_(grad, residuals[name], gck.Sign(32), member, algorithm="two_phase")
            assert guard.skipped == (step in overflows)
            if step == 2:
                assert same(content(residuals), before)
            elif step in (1, 3):
                assert not same(content(residuals), before)
        return content(residuals)

    expected = SimulatedGroup(2, timeout=60).run(train, CPU)
    found = SimulatedGroup(2, timeout=60).run(train, CUDA)
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
