"""Memory of collectives: reused after a success, never after a failure, and never by two at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gck.collectives.scratch import SMALL, empty_cache, scratch

CPU = torch.device("cpu")
N = SMALL // 4 + 5


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    empty_cache()
    yield
    empty_cache()


def test_a_later_collective_gets_the_same_memory() -> None:
    with scratch() as first:
        a, b = first.empty((N,), torch.float32, CPU), first.zeros((2, N), torch.float32, CPU)
        assert torch.equal(b, torch.zeros(2, N))
        addresses = {a.data_ptr(), b.data_ptr()}
        assert len(addresses) == 2
    with scratch() as second:
        again = second.empty((N - 3,), torch.float32, CPU), second.empty((N, 2), torch.float32, CPU)
        assert {t.data_ptr() for t in again} == addresses
        assert [tuple(t.shape) for t in again] == [(N - 3,), (N, 2)]


def test_two_at_once_have_memory_of_their_own() -> None:
    with scratch() as outer:
        a = outer.clone(torch.ones(N))
        with scratch() as inner:
            b = inner.clone(torch.zeros(N))
            assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, torch.ones(N))


def test_nothing_is_kept_after_a_failure() -> None:
    held = []

    def fail() -> None:
        with scratch() as first:
            held.append(first.clone(torch.ones(N)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    lost = held[0]
    with scratch() as second:
        assert second.zeros((N,), torch.float32, CPU).data_ptr() != lost.data_ptr()
    assert torch.equal(lost, torch.ones(N))


def test_no_more_is_kept_than_the_largest_used() -> None:
    with scratch() as a, scratch() as b, scratch() as c:
        addresses = [s.empty((N,), torch.float32, CPU).data_ptr() for s in (a, b, c)]
    with scratch() as later:
        found = [later.empty((N,), torch.float32, CPU) for _ in range(3)]
        assert len({t.data_ptr() for t in found}) == 3
        assert found[0].data_ptr() == addresses[0]  # the last that was given back


def test_small_and_other_dtypes() -> None:
    with scratch() as s:
        assert s.zeros((3,), torch.float64, CPU).tolist() == [0, 0, 0]
        assert s.clone(torch.tensor([1.5, -2], dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert s.empty((0,), torch.uint8, CPU).numel() == 0
        assert s.empty((3,), torch.uint8, torch.device("meta")).device.type == "meta"
