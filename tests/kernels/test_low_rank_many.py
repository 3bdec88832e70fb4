"""Many matrices together: what each would be alone, with few launches, on every backend."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.kernels.low_rank import LowRank, cpu, reference
from gck.kernels.reference import read_residual
from tests.cases import Guarded, make, one_nan, same_bytes
from tests.kernels.launches import recorded

# (rows, columns, elements that the last row lacks)
SHAPES = [(30, 20, 0), (9, 64, 0), (30, 20, 0), (1, 7, 0), (30, 20, 3), (30, 20, 0), (40, 3, 2), (9, 64, 0)]


# Elements before a tensor among guards, which then begins at a multiple of 4 bytes, or of 64.
ANYWHERE, ALIGNED = 0, 64 // 4 * 3 - Guarded.PAD

needs_a_gpu = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]
on_a_gpu = pytest.param("cuda", marks=needs_a_gpu)


@pytest.fixture(params=["cpu", "interpreter", on_a_gpu])
def backend(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """Kernels, and the device of their tensors."""
    if request.param == "cpu":
        return cpu, "cpu"
    if request.param == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    from gck.kernels.low_rank import gpu

    return gpu, "cuda" if request.param == "cuda" else "cpu"


def numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class Many:
    """Matrices of all SHAPES; what is written lies among guards, `aside` elements further on."""

    def __init__(self, rank: int, aside: int = ANYWHERE, device: str = "cpu", **options: Any) -> None:
        self.numels = [rows * columns - lacking for rows, columns, lacking in SHAPES]
        columns = [columns for _, columns, _ in SHAPES]
        self.compressors = [LowRank(rank, length, **options) for length in columns]
        self.matrices = LowRank.together(self.compressors, self.numels)
        self.lefts = [shape for shape, _ in self.matrices.factors]
        self.rights = [shape for _, shape in self.matrices.factors]
        self.aside, self.device, self.guards = aside, device, list[Guarded]()

    def room(self, shapes: list[Any], like: list[Tensor] | None = None) -> list[Tensor]:
        rooms = []
        for i, shape in enumerate(shapes):
            count = torch.Size(shape).numel()
            filling = torch.full((count,), math.nan) if like is None else like[i].reshape(-1)
            guard = Guarded.of(torch.cat([torch.zeros(self.aside), filling]).to(self.device))
            self.guards.append(guard)
            rooms.append(guard.inner[self.aside :].view(shape))
        return rooms

    def vectors(self, like: list[Tensor] | None = None) -> list[Tensor]:
        return self.room([(n,) for n in self.numels], like)

    def given(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    def intact(self) -> bool:
        return all(guard.intact() for guard in self.guards)


@pytest.mark.parametrize("aside", [ANYWHERE, ALIGNED])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_each_is_what_it_is_alone(backend: tuple[Any, str], rank: int, aside: int) -> None:
    kernels, device = backend
    many = Many(rank, aside, device, decay=0.9, clip=0.4)
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    grads = [
        make("few nonfinite" if i == 3 else "gaussian", n, dtypes[i % 4])[0]
        for i, n in enumerate(many.numels)
    ]
    errs = [numbers(n, i) for i, n in enumerate(many.numels)]
    bases = [numbers(math.prod(shape), 7).view(shape) for shape in many.rights]
    accs, lefts = many.vectors(), many.room(many.lefts)
    given = [many.given(each) for each in (grads, errs, bases)]
    kernels.project_(many.matrices, *given, accs, lefts, torch.tensor([0.4]).to(device))
    projected = [left.cpu().clone() for left in lefts]
    for i, compressor in enumerate(many.compressors):
        acc = one_nan(grads[i].float() + read_residual(compressor, errs[i]))
        assert same_bytes(accs[i], acc)
        assert same_bytes(projected[i], reference.project(compressor, acc, bases[i]))
    kernels.orthonormalise_(many.matrices, lefts)
    assert all(map(same_bytes, lefts, map(reference.orthonormal, projected)))
    rights = many.room(many.rights)
    kernels.back_project_(many.matrices, accs, lefts, rights)
    cleared, rest = torch.full((len(SHAPES),), 5).to(device), many.vectors()
    kernels.settle_(many.matrices, accs, rest, lefts, rights, cleared)
    outs, sums = many.vectors(), many.vectors([torch.ones(n) for n in many.numels])
    kernels.product_(many.matrices, outs, lefts, rights, 1.0, False)
    kernels.product_(many.matrices, sums, lefts, rights, -0.5, True)
    followings = many.room(many.rights)
    kernels.next_basis(many.matrices, given[2], rights, followings)
    for i, compressor in enumerate(many.compressors):
        acc, left, right = accs[i].cpu(), lefts[i].cpu(), rights[i].cpu()
        assert same_bytes(right, reference.back_project(compressor, acc, left))
        dense = reference.decompress(compressor, (left, right), many.numels[i])
        assert same_bytes(one_nan(outs[i].cpu()), one_nan(dense))
        assert same_bytes(one_nan(sums[i].cpu()), one_nan(1 + -0.5 * dense))
        left_over = acc - dense
        assert same_bytes(rest[i], torch.where(left_over.isfinite(), left_over, 0.0))
        assert int(cleared[i]) == 5 + int((~left_over.isfinite()).sum())
        assert same_bytes(followings[i], reference.next_basis(bases[i], right))
    assert int(cleared[3]) > 5
    assert many.intact()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_of_many_replays_on_new_data(warm: bool) -> None:
    """With tables that are there before, and with tables that each replay copies; and nobody waits."""
    from gck.kernels.low_rank import gpu, gpu_many
    from tests.kernels.test_gpu import synchronisation_is_an_error

    many = Many(4, device="cuda")
    grads, errs = many.vectors(), many.vectors([torch.zeros(n) for n in many.numels])
    accs, outs = many.vectors(), many.vectors()
    bases = [numbers(math.prod(shape), 7).view(shape) for shape in many.rights]
    on_device, followings = many.given(bases), many.room(many.rights)
    lefts, rights = many.room(many.lefts), many.room(many.rights)
    cleared = torch.zeros(len(SHAPES), dtype=torch.int64, device="cuda")

    def step() -> None:
        gpu.project_(many.matrices, grads, errs, on_device, accs, lefts, None)
        gpu.orthonormalise_(many.matrices, lefts)
        gpu.back_project_(many.matrices, accs, lefts, rights)
        gpu.settle_(many.matrices, accs, errs, lefts, rights, cleared)
        gpu.product_(many.matrices, outs, lefts, rights, 1.0, False)
        gpu.next_basis(many.matrices, on_device, rights, followings)

    step()  # compiles
    with synchronisation_is_an_error():
        step()
    if not warm:
        gpu_many._tables.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gpu_many._tables.clear()
    kept = [torch.zeros(n) for n in many.numels]
    for err in errs:
        err.zero_()
    for round_ in range(3):
        fresh = [numbers(n, 10 * round_ + i) for i, n in enumerate(many.numels)]
        for grad, new in zip(grads, fresh, strict=True):
            grad.copy_(new)
        graph.replay()
        for i, compressor in enumerate(many.compressors):
            acc = fresh[i] + kept[i]
            left = reference.orthonormal(reference.project(compressor, acc, bases[i]))
            right = reference.back_project(compressor, acc, left)
            dense = reference.decompress(compressor, (left, right), many.numels[i])
            kept[i] = acc - dense
            assert same_bytes(outs[i], dense)
            assert same_bytes(errs[i], kept[i])
            assert same_bytes(followings[i], reference.next_basis(bases[i], right))


def test_a_launch_is_of_all_that_have_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    from gck.kernels.low_rank import gpu

    many = Many(9)
    grads = [numbers(n, i) for i, n in enumerate(many.numels)]
    bases = [numbers(math.prod(shape), 7).view(shape) for shape in many.rights]

    def step() -> None:
        errs, accs = [torch.zeros(n) for n in many.numels], many.vectors()
        lefts, rights = many.room(many.lefts), many.room(many.rights)
        gpu.project_(many.matrices, grads, errs, bases, accs, lefts, None)
        gpu.orthonormalise_(many.matrices, lefts)
        gpu.back_project_(many.matrices, accs, lefts, rights)
        gpu.settle_(many.matrices, accs, errs, lefts, rights, torch.zeros(len(SHAPES), dtype=torch.int64))
        gpu.product_(many.matrices, grads, lefts, rights, 1.0, False)
        gpu.next_basis(many.matrices, bases, rights, [torch.empty_like(right) for right in rights])

    runs = recorded(monkeypatch, step)
    names = [fn.__name__ for fn, _, _ in runs]
    shapes = len(set(SHAPES))
    assert {name: names.count(name) for name in names} == {
        "project_kernel": shapes + 3,  # those of rank 9: the last row goes by itself
        "gram_kernel": 2 * shapes,
        "orthonormal_kernel": 2 * shapes,
        "back_project_kernel": shapes,
        "add_parts_kernel": shapes,
        "settle_kernel": shapes,
        "decompress_kernel": shapes,
        "next_basis_kernel": shapes,
    }
    assert all(options["enable_fp_fusion"] is False for _, _, options in runs)
    assert {grid[2] for fn, grid, _ in runs} == {1, 2, 3}


def test_tables_of_tensors_that_stay_in_place_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    from gck.kernels.common.tables import KeptTables
    from gck.kernels.low_rank import gpu, gpu_many

    kept: KeptTables[Any] = KeptTables()
    monkeypatch.setattr(gpu_many, "_tables", kept)
    many = Many(2)
    lefts = [numbers(math.prod(shape), i).view(shape) for i, shape in enumerate(many.lefts)]
    for _ in range(3):
        gpu.orthonormalise_(many.matrices, lefts)
    assert len(kept) == 1
    moved = [left.clone() for left in lefts]
    wanted = [reference.orthonormal(left) for left in moved]
    gpu.orthonormalise_(many.matrices, moved)
    assert all(map(same_bytes, moved, wanted))
    assert len(kept) == 2


def test_a_table_says_where_all_is_aligned() -> None:
    from gck.kernels.low_rank import gpu_many

    numels = [64, 64, 60]
    matrices = LowRank.together([LowRank(1, 4)] * 3, numels)
    rooms = [Guarded.of(torch.zeros(ALIGNED + n)).inner for n in numels]
    aligned, anywhere = [room[ALIGNED:] for room in rooms], [room[ALIGNED - 1 : -1] for room in rooms]
    for tensors, kind in (
        ([aligned, aligned], gpu_many.ALIGNED),
        ([anywhere, anywhere], gpu_many.MANY),
        ([aligned, anywhere], gpu_many.MANY),
        ([aligned, [aligned[0], anywhere[1], aligned[2]]], gpu_many.MANY),
    ):
        many, one = gpu_many.launches(matrices, *tensors)
        assert (many.many, many.kind, one.many, one.kind) == (2, kind.value, 1, gpu_many.ONE.value)
        assert many.table.tolist() == [[*[each[i].data_ptr() for each in tensors], i] for i in range(2)]
        assert one.first == 2
        assert [tensor.data_ptr() for tensor in one.tensors] == [each[2].data_ptr() for each in tensors]


def test_tables_are_made_on_the_host_whatever_the_default_device_is() -> None:
    from gck.kernels.low_rank import gpu_many

    matrices = LowRank.together([LowRank(1, 4)] * 2, [64, 64])
    tensors = [torch.zeros(64), torch.zeros(64)]
    torch.set_default_device("meta")
    try:
        (launch,) = gpu_many.launches(matrices, tensors)
    finally:
        torch.set_default_device(None)
    assert launch.table.device.type == "cpu"


def test_threads_share_tables() -> None:
    from gck.kernels.common.tables import KeptTables

    kept: KeptTables[int] = KeptTables(3)
    before, failures = sys.getswitchinterval(), list[BaseException]()

    def ask() -> None:
        try:
            for i in range(3000):
                assert kept.get(i % 7, torch.device("cpu"), lambda i=i: i % 7) == i % 7  # type: ignore[misc]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert len(kept) == 3


def test_more_than_a_grid_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    from gck.kernels.low_rank import gpu, gpu_many

    monkeypatch.setattr(gpu_many, "MOST", 3)
    matrices = LowRank.together([LowRank(2, 4)] * 8, [20] * 8)
    lefts = [numbers(10, i).view(2, 5) for i in range(8)]
    wanted = [reference.orthonormal(left) for left in lefts]
    runs = recorded(monkeypatch, lambda: gpu.orthonormalise_(matrices, lefts))
    assert all(map(same_bytes, lefts, wanted))
    assert [grid[2] for _, grid, _ in runs] == [3] * 4 + [3] * 4 + [2] * 4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("aside", [ANYWHERE, ALIGNED])
def test_results_past_the_caches(aside: int, threads: int) -> None:
    """Together they are too large for them; alone, what is written where it was read never goes past them."""
    columns, numels = [1024, 999, 512], [1500 * 1024 - 7, 300 * 999, 900 * 512]
    together = LowRank.together([LowRank(3, length) for length in columns], numels)
    grads, errs = [numbers(n, 1) for n in numels], [numbers(n, 2) for n in numels]
    bases = [numbers(math.prod(shape), 7).view(shape) for _, shape in together.factors]
    lefts, rights = ([torch.full(pair[i], math.nan) for pair in together.factors] for i in (0, 1))
    guards = [[Guarded.of(torch.full((n + aside,), math.nan)) for n in numels] for _ in range(3)]
    accs, rests, outs = ([guard.inner[aside:] for guard in some] for some in guards)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu.project_(together, grads, errs, bases, accs, lefts, None)
        cpu.back_project_(together, accs, lefts, rights)
        cpu.settle_(together, accs, rests, lefts, rights, None)
        cpu.product_(together, outs, lefts, rights, 1.0, False)
        for i, n in enumerate(numels):
            alone, left = LowRank(3, columns[i]).alone(n), torch.empty_like(lefts[i])
            right, sums = torch.empty_like(rights[i]), torch.full((n,), -0.0)
            err = errs[i].clone()
            cpu.project_(alone, [grads[i]], [err], [bases[i]], [err], [left], None)
            assert same_bytes(err, accs[i])
            assert same_bytes(left, lefts[i])
            cpu.back_project_(alone, [err], [left], [right])
            assert same_bytes(right, rights[i])
            cpu.settle_(alone, [err], [err], [left], [right], None)
            assert same_bytes(err, rests[i])
            cpu.product_(alone, [sums], [left], [right], 1.0, True)
            assert same_bytes(sums, outs[i])
    finally:
        torch.set_num_threads(before)
    assert all(guard.intact() for some in guards for guard in some)
