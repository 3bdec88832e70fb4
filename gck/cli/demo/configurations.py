"""The configurations that the demo compares: what each of them registers on the DDP model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn.parallel import DistributedDataParallel

import gck
from gck.cli.demo.settings import Settings

__all__ = ["BASELINE", "CONFIGURATIONS", "Configuration"]

BASELINE = "dense"


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    name: str
    title: str
    attach: Callable[[DistributedDataParallel, Settings], None]


def _dense(model: DistributedDataParallel, settings: Settings) -> None:
    pass


def _fp16(model: DistributedDataParallel, settings: Settings) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model.register_comm_hook(None, fp16_compress_hook)


def _powersgd(model: DistributedDataParallel, settings: Settings) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(  # with error feedback and warm start, its defaults
        process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=settings.powersgd_start
    )
    model.register_comm_hook(state, powerSGD_hook)


def _topk(model: DistributedDataParallel, settings: Settings) -> None:
    gck.ddp.register(model, gck.TopK(ratio=0.01))


def _sign(model: DistributedDataParallel, settings: Settings) -> None:
    gck.ddp.register(model, gck.Sign())


def _low_rank(model: DistributedDataParallel, settings: Settings) -> None:
    gck.ddp.register(model, gck.LowRank(rank=4))


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration(BASELINE, "PyTorch, dense", _dense),
        Configuration("fp16", "PyTorch fp16 hook", _fp16),
        Configuration("powersgd", "PyTorch PowerSGD, r = 4", _powersgd),
        Configuration("gck-low-rank", "gck low rank, r = 4", _low_rank),
        Configuration("gck-topk", "gck top-k 1 %", _topk),
        Configuration("gck-sign", "gck sign", _sign),
    )
}
