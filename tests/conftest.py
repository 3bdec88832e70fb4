"""Set before anything imports Triton: without a GPU its kernels run in the interpreter."""

import importlib.util
import os
import signal
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import admit_numpy, quicken

    quicken()
    admit_numpy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """CPU builds of torch have no Triton, and gck does without; so do these tests."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            pytest.skip("Triton is not installed")
        raise


pytest.register_assert_rewrite("tests.contract", "tests.kernels.reductions")

# A shell that starts a job in the background makes it ignore SIGINT, and every process of ours would
# inherit that: the tests of Ctrl-C need it to arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poison() -> None:
    """In this mode `torch.empty` is filled with NaN (integers: the largest value), so that nothing
    passes that forgets to write an output."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def one_gpu_for_all() -> Iterator[None]:
    """What a test held of the GPU goes back: other workers need it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        from xdist import __version__

        if tuple(map(int, __version__.split(".")[:2])) <= (3, 8):
            # Tests of a group would build the package twice, and share a GPU's memory or ports.
            raise pytest.UsageError(f"pytest-xdist {__version__} sees no groups of tests; take pytest<9.2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
