"""The public functions on CUDA tensors: what the kernels' own tests pass by."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.library import opcheck

import gck
from tests.cases import make, same_bytes
from tests.kernels.test_gpu import synchronisation_is_an_error

pytestmark = pytest.mark.gpu

N = 300_007


def on_both(case: str = "gaussian", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    grad, err = make(case, N, dtype)
    return (grad, err), (grad.cuda(), err.cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_public_functions_give_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    (grad, err), (cuda_grad, cuda_err) = on_both("few nonfinite", dtype)
    for call in (
        lambda g, e: gck.topk_ef_(g, e, 0.01, value_dtype=torch.bfloat16),
        lambda g, e: gck.sign_ef_(g, e, 128),
        lambda g, e: gck.chunk_topk_ef_(g, e, value_bits=2),
        lambda g, e: gck.quantize_ef_(g, e, 4, 256, "stochastic", 2**33),
        lambda g, e: gck.topk(g, k=100),
        lambda g, e: gck.random_k_ef_(g, e, 0.01, seed=9, value_dtype=torch.bfloat16),
        lambda g, e: gck.random_k(g, k=100, seed=9),
    ):
        wanted, got = call(grad, err), call(cuda_grad, cuda_err)
        assert all(same_bytes(a, b) for a, b in zip(got.fields, wanted.fields, strict=True))
        assert same_bytes(cuda_err, err)
        assert torch.equal(gck.decompress(got).cpu().nan_to_num(7.0), gck.decompress(wanted).nan_to_num(7.0))


def test_public_functions_do_not_synchronise() -> None:
    _, (grad, err) = on_both()
    out = torch.zeros(N, device="cuda")

    def step() -> None:
        gck.decompress(gck.topk_ef_(grad, err, 0.01), out=out)
        gck.decompress_add_(out, gck.sign_ef_(grad, err), 0.5)
        gck.decompress_add_(out, gck.chunk_topk_ef_(grad, err, value_bits=2))
        gck.decompress_add_(out, [gck.quantize_ef_(grad, err, 4)] * 2)
        gck.decompress_add_(out, [gck.random_k_ef_(grad, err, 0.1, seed=3)] * 2)

    step()  # compiles
    with synchronisation_is_an_error():
        step()


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_public_functions_in_a_graph() -> None:
    (grad, err), (cuda_grad, cuda_err) = on_both()
    out = torch.zeros(N, device="cuda")

    def step() -> None:
        gck.decompress(gck.topk_ef_(cuda_grad, cuda_err, 0.01), out=out)

    graph = captured(step)
    cuda_err.copy_(err)
    for _ in range(3):
        graph.replay()
        dense = gck.decompress(gck.topk_ef_(grad, err, 0.01))
        assert same_bytes(out, dense)
        assert same_bytes(cuda_err, err)


# With a residual that fades and is bounded; each returns a payload, or several.
WITH_OPTIONS: dict[str, Callable[..., Any]] = {
    "topk_ef_": partial(gck.topk_ef_, ratio=0.01),
    "topk_ef_ of a list": lambda grad, err, **options: gck.topk_ef_(
        list(grad.split(N // 3)), list(err.split(N // 3)), 0.01, flat=True, **options
    ),
    "topk_ef_ of each of a list": lambda grad, err, **options: gck.topk_ef_(
        list(grad.split(N // 3)), list(err.split(N // 3)), 0.01, **options
    ),
    "chunk_topk_ef_": partial(gck.chunk_topk_ef_, value_bits=2),
    "sign_ef_": gck.sign_ef_,
    "quantize_ef_": partial(gck.quantize_ef_, bits=4, rounding="stochastic", seed=5),
    "random_k_ef_": partial(gck.random_k_ef_, ratio=0.1, seed=3),
}


def fields_of(payloads: Any) -> list[torch.Tensor]:
    return [
        field
        for payload in (payloads if isinstance(payloads, list) else [payloads])
        for field in payload.fields
    ]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_options_in_a_graph(name: str) -> None:
    """Every replay looks at the clip that there is then."""
    call = WITH_OPTIONS[name]
    held: list[Any] = []
    (grad, err), (cuda_grad, cuda_err) = on_both()
    clip, cuda_clip = torch.ones(1), torch.ones(1, device="cuda")

    def step() -> None:
        held[:] = [call(cuda_grad, cuda_err, decay=0.9, clip=cuda_clip)]

    graph = captured(step)
    cuda_err.copy_(err)
    for limit in (0.5, 1e-3, 2.0):
        clip.fill_(limit)
        cuda_clip.fill_(limit)
        graph.replay()
        for ours, theirs in zip(
            fields_of(held[0]), fields_of(call(grad, err, decay=0.9, clip=clip)), strict=True
        ):
            assert same_bytes(ours, theirs)
        assert same_bytes(cuda_err, err)


@pytest.mark.parametrize("compressor", [gck.Sign(decay=0.9, clip=0.01), gck.Quantize(4, clip=0.01)], ids=str)
def test_a_reduction_in_a_graph(compressor: Any) -> None:
    (grad, err), (_, cuda_err) = on_both()
    nbytes, ranks = compressor.layout(N).nbytes, 3
    bodies, body = torch.zeros(ranks, nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    for rank in range(ranks):
        compressor.compress_(grad * (rank + 1), None, bodies[rank : rank + 1])
    cuda_bodies, cuda_body = bodies.cuda(), body.cuda()

    def step() -> None:
        cuda_body.zero_()
        compressor.reduce_(cuda_bodies, cuda_err, cuda_body, N, divisor=ranks)

    graph = captured(step)
    cuda_err.copy_(err)
    for _ in range(3):
        graph.replay()
        compressor.reduce_(bodies, err, body.zero_(), N, divisor=ranks)
        assert same_bytes(cuda_body, body)
        assert same_bytes(cuda_err, err)


def test_public_operators_pass_opcheck() -> None:
    grad, err = (x.cuda() for x in make("gaussian", 1000, torch.float32))
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")
    opcheck(torch.ops.gck.topk_ef_, (grad, err, 10, torch.float32, nonfinite))
    opcheck(torch.ops.gck.sign_ef_, (grad, err, 64, None))
    opcheck(torch.ops.gck.chunk_topk_ef_, (grad, err, 64, 5, 4, nonfinite))


def test_public_functions_compile() -> None:
    def step(grad: torch.Tensor, err: torch.Tensor) -> torch.Tensor:
        return gck.decompress(gck.topk_ef_(grad * 2, err, 0.01))

    (grad, err), (cuda_grad, cuda_err) = on_both()
    wanted = step(grad, err)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, while it imports its compiler
        compiled = torch.compile(step, fullgraph=True)
        got = compiled(cuda_grad, cuda_err)
    assert same_bytes(got, wanted)
    assert same_bytes(cuda_err, err)


@pytest.mark.parametrize("compressor", [gck.TopK(ratio=0.01), gck.Sign(), gck.ChunkTopK()], ids=str)
def test_public_all_reduce_of_simulated_ranks(compressor: Any) -> None:
    def reduce(member: Any, device: str) -> torch.Tensor:
        grad, state = make("gaussian", N + member.rank, torch.float32)[0][:N].to(device), gck.ErrorFeedback()
        for _ in range(2):
            gck.all_reduce_(grad, state, compressor, member)
        return grad.cpu()

    wanted = gck.SimulatedGroup(3).run(reduce, "cpu")
    got = gck.SimulatedGroup(3).run(reduce, "cuda")
    assert all(same_bytes(a, b) for a, b in zip(got, wanted, strict=True))


def test_public_functions_take_cupy_arrays_on_their_stream() -> None:
    cupy = pytest.importorskip("cupy")
    (grad, err), (cuda_grad, cuda_err) = on_both()
    wanted = gck.topk_ef_(grad, err, 0.01)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy_grad, cupy_err = cupy.asarray(cuda_grad), cupy.asarray(cuda_err)
        payload = gck.topk_ef_(cupy_grad, cupy_err, 0.01)
        residual = cupy_err.get()  # on this stream, so after the kernels
        stream.synchronize()
    assert all(same_bytes(a, b) for a, b in zip(payload.fields, wanted.fields, strict=True))
    assert same_bytes(torch.from_numpy(residual), err)


def test_cupys_null_stream_is_torchs_default() -> None:
    """What is written there late is waited for, and what reads the result there comes after it."""
    cupy = pytest.importorskip("cupy")
    grad = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    expected_err = torch.zeros_like(grad)
    gck.topk_ef_(grad, expected_err, 0.01)
    cuda_grad = grad.cuda()
    gck.topk_ef_(cuda_grad, torch.zeros_like(cuda_grad), 0.01)  # compiles
    source, late = cupy.asarray(cuda_grad), cupy.zeros(100_000, dtype="float32")
    err = cupy.zeros_like(late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream.null:
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(100_000_000)  # cycles
        cupy.copyto(late, source)
        gck.topk_ef_(late, err, 0.01)
        residual = err.get()
    assert same_bytes(torch.from_numpy(residual), expected_err)


def test_public_devices_must_agree() -> None:
    (grad, err), (cuda_grad, cuda_err) = on_both()
    before = err.clone()
    for g, e in ((cuda_grad, err), (grad, cuda_err)):
        with pytest.raises(
            gck.errors.DeviceMismatchError, match="topk_ef_: err must be on the device of grad"
        ):
            gck.topk_ef_(g, e, 0.01)
    assert same_bytes(err, before)
