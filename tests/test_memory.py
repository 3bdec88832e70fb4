"""The memory of results on the CPU, and copies."""

from __future__ import annotations

import gc
import pickle
import threading
from pathlib import Path

import pytest
import torch

import gck
from gck import memory
from gck._native import load, sees_tensors
from gck.collectives import empty_cache

LARGE = memory.LARGE

needs_table = pytest.mark.skipif(not sees_tensors(), reason="torch has no DLPack table of functions")


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@needs_table
def test_fields_keep_the_memory_they_share() -> None:
    grad, err = inputs(3_000_000)
    payload = gck.topk_ef_(grad, err, 0.2)
    indices, expected = payload.indices, payload.indices.clone()
    del payload
    gc.collect()
    others = [gck.topk_ef_(grad, err, 0.2) for _ in range(3)]  # would take freed memory
    assert torch.equal(indices, expected)
    assert len({indices.data_ptr(), *(p.indices.data_ptr() for p in others)}) == 4


@needs_table
def test_freed_memory_is_taken_again() -> None:
    cpu, numel = torch.device("cpu"), 11 << 20  # larger than what other tests leave behind
    tensor = memory.empty(numel, torch.float32, cpu)
    address = tensor.data_ptr()
    del tensor
    small = memory.empty(numel // 2 - 4096, torch.float32, cpu)  # more than half of it would be wasted
    assert small.data_ptr() != address
    again = memory.empty(numel - 100, torch.float32, cpu)
    assert again.data_ptr() == address
    assert again.shape == (numel - 100,)
    assert again.dtype == torch.float32


@needs_table
@pytest.mark.parametrize("nbytes", [LARGE - 64, LARGE - 63, LARGE - 1, LARGE, LARGE + 1])
def test_sizes_where_small_ends(nbytes: int) -> None:
    """What the allocator gave goes back to it, and what the system gave is kept."""
    native = load()
    native.drop_results()
    for _ in range(3):
        tensors = [native.new_tensor(1, 8, nbytes).fill_(7) for _ in range(20)]
        assert all(bool((tensor == 7).all()) for tensor in tensors)
        del tensors
    before = resident()
    for _ in range(200):
        native.new_tensor(1, 8, nbytes).fill_(7)
    assert resident() - before < 8 << 20
    native.drop_results()


@needs_table
def test_kept_memory_can_be_given_back() -> None:
    tensor = memory.empty(32 << 20, torch.float32, torch.device("cpu")).fill_(1)
    del tensor
    held = resident()
    empty_cache()
    assert held - resident() > 100 << 20


@needs_table
def test_payloads_can_be_saved_and_sent_to_processes(tmp_path: Path) -> None:
    payload = gck.topk_ef_(*inputs(400_000), 0.5)
    torch.save(tuple(payload), tmp_path / "payload")
    values, indices, numel = torch.load(tmp_path / "payload")
    assert torch.equal(values, payload.values)
    assert torch.equal(indices, payload.indices)
    assert numel == payload.numel
    again = pickle.loads(pickle.dumps(payload))
    assert torch.equal(gck.decompress(again), gck.decompress(payload))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@needs_table
def test_no_more_is_kept_than_is_said() -> None:
    cpu = torch.device("cpu")
    tensors = [memory.empty(16 << 20, torch.float32, cpu).fill_(1) for _ in range(12)]  # 64 MiB each
    held = resident()
    del tensors
    gc.collect()
    assert held - resident() > 7 * (64 << 20)  # 12 less the four that are kept
    huge = memory.empty(80 << 20, torch.float32, cpu).fill_(1)
    held = resident()
    del huge
    gc.collect()
    assert held - resident() > 300 << 20


@needs_table
def test_memory_of_many_threads() -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        for i in range(60):
            numel = LARGE // 4 + (seed * 7919 + i * 104_729) % LARGE
            mine = [memory.empty(numel, torch.int32, torch.device("cpu")).fill_(seed) for _ in range(3)]
            if not all(bool((tensor == seed).all()) for tensor in mine):
                failures.append(f"{seed}: {numel}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_small_or_traced_tensors_are_of_torch() -> None:
    small = memory.empty(10, torch.float32, torch.device("cpu"))
    assert small.shape == (10,)
    with torch._subclasses.FakeTensorMode():
        assert isinstance(
            memory.empty(LARGE, torch.float32, torch.device("cpu")), torch._subclasses.FakeTensor
        )


@pytest.mark.parametrize("shift", [0, 1, 7])
@pytest.mark.parametrize("numel", [10, LARGE // 4 + 3, (3 << 20) + 5])
def test_copies(numel: int, shift: int) -> None:
    """The largest goes past the caches, from and to places that are no multiples of a line."""
    source, memory_ = torch.randn(numel + 8), torch.full((numel + 32,), 7.0)
    to, version = memory_[16 - shift :][:numel], memory_._version
    memory.copy_(to, source[shift : shift + numel])
    assert torch.equal(to, source[shift : shift + numel])
    assert bool((memory_[: 16 - shift] == 7).all())
    assert bool((memory_[16 - shift + numel :] == 7).all())
    assert memory_._version > version


def test_copies_that_torch_makes() -> None:
    source = torch.randn(LARGE)
    rounded = torch.zeros(LARGE, dtype=torch.bfloat16)
    memory.copy_(rounded, source)
    assert torch.equal(rounded, source.bfloat16())
    strided = torch.zeros(2 * LARGE)[::2]
    memory.copy_(strided, source)
    assert torch.equal(strided, source)
    turned = torch.zeros(LARGE)
    memory.copy_(turned, torch._neg_view(source))
    assert torch.equal(turned, -source)
