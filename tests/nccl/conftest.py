from __future__ import annotations

import pytest

from tests.nccl.library import fake_library


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process NCCL is the fake library, which is opened once and stays."""
    monkeypatch.setenv("GCK_NCCL_LIBRARY", str(fake_library()))
    from gck.collectives.transports.nccl_rendezvous import nccl_library

    if nccl_library().origin != "GCK_NCCL_LIBRARY":
        pytest.skip("this process has opened a real NCCL already")
