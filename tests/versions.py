"""Marks of tests of what an older PyTorch, or a build of it, has not; see `make test-oldest`."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed.fsdp
from torch.nn.parallel import DistributedDataParallel

_FSDP_MODULE = getattr(torch.distributed.fsdp, "FSDPModule", None)

needs_fsdp_hook = pytest.mark.skipif(
    not hasattr(_FSDP_MODULE, "set_all_reduce_hook"), reason="FSDP of this PyTorch has no hook"
)
needs_dynamic_rows = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 compiles each number of rows anew"
)
needs_init_sync = pytest.mark.skipif(
    "init_sync" not in inspect.signature(DistributedDataParallel).parameters,
    reason="DDP of this PyTorch always sends its weights at first",
)
needs_torch_without_nccl = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this PyTorch brings an NCCL, which must be the first"
)
