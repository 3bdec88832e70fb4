"""Asynchronous collectives of CUDA tensors: streams, and memory that several of them use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_, sparse_all_gather
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives.scenarios import gradient

pytestmark = pytest.mark.gpu
STEPS, NUMEL = 6, 300_000


def test_the_bits_of_synchronous_calls_from_any_stream() -> None:
    """Gradients that are still being made when the call is; results that are used at once after `wait`."""

    def rank_main(member: SimulatedMember, asynchronous: bool) -> list[Tensor]:
        state, results, works, grads = ErrorFeedback(), [], [], []
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(STEPS):
                source = gradient(member.rank, NUMEL, step=step).cuda()
                torch.cuda._sleep(20_000_000)
                grads.append(source * 2)
                called = all_reduce_(
                    grads[-1], state, Sign(64), member, algorithm="two_phase", async_op=asynchronous
                )
                works.append(called)
                del source
                torch.randn(NUMEL, device="cuda").mul_(3)  # takes memory that was just freed
            for work, grad in zip(works, grads, strict=True):
                results.append((work.wait() if asynchronous else grad) + 1)
            assert state.worker is not None
            results += [state.worker.clone(), state.server.clone()]
            torch.cuda.current_stream().synchronize()
        return [result.cpu() for result in results]

    expected = SimulatedGroup(2, timeout=120).run(rank_main, False)
    found = SimulatedGroup(2, timeout=120).run(rank_main, True)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(same_bytes(a, b) for a, b in zip(ours, theirs, strict=True))


def test_results_of_futures() -> None:
    def rank_main(member: SimulatedMember) -> None:
        payload = gck.topk(gradient(member.rank, NUMEL).cuda(), 0.01)
        work = sparse_all_gather(payload, member, async_op=True)
        summed = work.get_future().then(lambda future: sum(p.values.sum() for p in future.value()))
        expected = sum(p.values.sum() for p in sparse_all_gather(payload, member))
        assert torch.equal(summed.wait(), expected)

    SimulatedGroup(2, timeout=120).run(rank_main)


def test_a_capture_is_refused() -> None:
    member, grad = SimulatedGroup(1).members[0], torch.ones(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad.mul_(1)  # torch warns of an empty graph
        with pytest.raises(ArgumentError, match="cannot be captured in a CUDA graph"):
            all_reduce_(grad, None, Sign(32), member, async_op=True)
    all_reduce_(grad, None, Sign(32), member, async_op=True).wait()
