"""A communication hook for torch.nn.parallel.DistributedDataParallel.

    state = gck.ddp.register(model, gck.TopK(ratio=0.01), warmup_steps=500)

or, in DDP's own words,

    state = gck.ddp.HookState(gck.TopK(ratio=0.01), warmup_steps=500, model=model)
    model.register_comm_hook(state, gck.ddp.hook)

Residuals are kept per parameter name: DDP rebuilds its buckets after the first step, and a checkpoint
must find them again. Under `no_sync` DDP does not call the hook, so that error feedback runs once, on
the step that synchronises, over the accumulated gradient. With a gradient scaler, residuals are in
units of the scaled gradient: give it to the state, which then follows its scale, and its skipped steps.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the types themselves.

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import Link, Transport, resolve
from gck.collectives.work import perform, submit
from gck.compressor_choice import Choosable
from gck.errors import ArgumentError, DtypeError, LayoutError, ShapeMismatchError
from gck.integrations.groups import Group, grouped, prepare_groups
from gck.integrations.hook_checks import check_dtypes, check_layout, trained
from gck.integrations.hook_state import HookState
from gck.integrations.unused import reduce_used
from gck.values import shown

__all__ = ["HookState", "hook", "register"]


def hook(
    state: HookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch re-exports it from C++
) -> torch.futures.Future[Tensor]:
    """Averages a bucket of gradients; pass it to `DistributedDataParallel.register_comm_hook`.

    The mean is taken here, once. Buckets but the last of a step are compressed and sent on a worker thread
    while the backward pass goes on (see `overlap` of `HookState`), one after the other in the order of the
    buckets, which is the same on all ranks: chained from futures they would run in another order on each.
    The last one is reduced in its turn and waits for all, so that nothing is in flight when the hook returns
    for it: DDP may send on the same group from there on.

    Errors reach the training loop from `loss.backward()` with their type: those of arguments from the
    bucket's own hook, those of collectives once all buckets have been through, the first of them. The bucket
    that failed and its residuals are as they were, other buckets of the same step may have been reduced; the
    step does not count. DDP itself does not survive an error raised in a hook: its next backward stops at an
    internal assert of torch. Delete it, for its hooks stay on the parameters as long as it lives. Make a new
    DDP module of the model inside, on a group that is usable, and register the hook on it with a new state
    that loads `state_dict()` of this one, or with this one after `bind`: the residuals are intact.

    With `find_unused_parameters=True` DDP discards what is averaged for a parameter that no rank used in this
    step. Where the state knows of it (its `model` is the DDP module), ranks tell one another which gradients
    have anything in them, a byte for each parameter and a wait for the device at every bucket: the others are
    not sent, and their residuals stay for a step that uses them. A gradient that was left from an earlier
    step counts, for DDP gives it to the hook: set all of them to None or zero before each step.

    Raises:
        LayoutError: the bucket holds a sparse gradient.
        ShapeMismatchError: the bucket's sizes contradict each other.
        Those of `gck.all_reduce_`.
    """
    if bucket.index() == 0:
        state._land()  # of a step whose backward pass did not come to its end
    transport = None
    try:
        transport = resolve(state.group, state.timeout)
        run = _prepare(state, bucket, transport)
    except BaseException as error:
        if transport is not None and not isinstance(error, Exception):
            transport.abort(f"{type(error).__name__} in gck.ddp.hook")  # peers wait for the bucket
        state._land()
        state._abandon()
        raise
    device = bucket.buffer().device
    if not bucket.is_last() and state.overlaps():
        work = submit(transport, "gck.ddp.hook", run, device)
        state._in_flight.append(work)
        return work.get_future()
    # A single bucket needs no other thread, and the last one would have nothing to overlap with.
    failed = None
    try:
        try:
            perform(transport, "gck.ddp.hook", run, device, False)
        except Exception as error:
            failed = error
        # Also where this one failed: no rank stops at an error before it has called what its peers call.
        failed = (state._land() if bucket.is_last() else None) or failed
    except BaseException as interrupt:
        # Ctrl-C: peers wait for what this rank will not send, and what is in flight must not write residuals
        # that somebody saves.
        transport.abort(f"{type(interrupt).__name__} in gck.ddp.hook")
        state._land()
        state._abandon()
        raise
    if failed is not None:
        state._abandon()
        raise failed
    if bucket.is_last():
        state.step += 1
        if state.guard is not None:
            state.skipped += state.guard.finish()
    # A future of device tensors must know the devices, to order streams.
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[device] if device.type == "cuda" else None
    )
    future.set_result(bucket.buffer())
    return future


def register(
    model: DistributedDataParallel,
    compressor: Choosable,
    warmup_steps: int = 0,
    bypass_numel: int = 1024,
    bypass_1d: bool = True,
    group: Any = None,
    *,
    algorithm: str = "auto",
    validate: str = "first",
    timeout: float | None = None,
    checksum: bool = False,
    link: Link | None = None,
    overlap: bool = True,
    scaler: Any = None,
    skip_nonfinite: bool = False,
    measure: bool = False,
    bypass_names: Collection[str] = (),
) -> HookState:
    """Makes a `HookState` for `model` and registers the hook.

    Args:
        model: not yet with a communication hook.
        compressor, warmup_steps, bypass_numel, bypass_1d, group, algorithm, validate, timeout, checksum,
            link, overlap, scaler, skip_nonfinite, measure, bypass_names: as for `HookState`.

    Returns:
        The state, whose `state_dict` belongs into the checkpoint of its rank.

    Raises:
        DtypeError: model is no DistributedDataParallel, or has gradients of a dtype that gck does not take;
            or an option has a wrong type.
        ArgumentError: an option is out of range, or the model has a communication hook already.
        GroupUnusableError: the group was destroyed, or an earlier failure spoilt it.
    """
    if not isinstance(model, DistributedDataParallel):
        raise DtypeError(f"gck.ddp.register: model must be a DistributedDataParallel, got {shown(model)}")
    state = HookState(
        compressor,
        warmup_steps,
        bypass_numel,
        bypass_1d,
        model,
        group,
        algorithm=algorithm,
        validate=validate,
        timeout=timeout,
        checksum=checksum,
        link=link,
        overlap=overlap,
        scaler=scaler,
        skip_nonfinite=skip_nonfinite,
        measure=measure,
        bypass_names=bypass_names,
    )
    # What is wrong is found here, and not in a backward pass.
    resolve(state.group, state.timeout)
    check_dtypes("gck.ddp.register", model)
    for name, parameter in trained(model):
        chosen = state.compressor_of(parameter)
        if chosen is not None:
            check_layout("gck.ddp.register", name, parameter.numel(), chosen)
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        if "can only be called once" not in str(error):
            raise
        raise ArgumentError("gck.ddp.register: model has a communication hook already") from error
    return state


def _prepare(
    state: HookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch re-exports it from C++
    transport: Transport,
) -> Callable[[], Tensor]:
    """Checks a bucket; returns what reduces it when it has the turn."""
    buffer: Tensor = bucket.buffer()
    parameters: list[Tensor] = bucket.parameters()
    if buffer.layout != torch.strided:
        raise LayoutError(
            f"gck.ddp.hook: bucket {bucket.index()} holds the sparse gradient ({buffer.layout}) of "
            f"{', '.join(map(state.label, parameters))}, which DDP gives to hooks as it is; make it dense, "
            "as with nn.Embedding(sparse=False)"
        )
    numels = [parameter.numel() for parameter in parameters]
    if buffer.numel() != sum(numels):
        raise ShapeMismatchError(
            f"gck.ddp.hook: bucket {bucket.index()} has {buffer.numel()} elements, its "
            f"{len(numels)} parameters {sum(numels)}"
        )
    # Not bucket.gradients(): those have the parameters' strides, which need not be contiguous.
    pairs = list(zip(parameters, buffer.split(numels), strict=True))
    function, warm_up = "gck.ddp.hook", state.step < state.warmup_steps
    groups = grouped(state, pairs, warm_up=warm_up)
    _guard(state, bucket.index() == 0, buffer, groups)
    reduce = prepare_groups(function, state, groups, transport, state.step)

    def run() -> Tensor:
        if state.finds_unused:
            reduce_used(function, state, pairs, transport, reduce, warm_up=warm_up)
        else:
            reduce()
        return buffer

    return run


def _guard(
    state: HookState,
    first: bool,
    buffer: Tensor,
    groups: Sequence[Group],
) -> None:
    """Before a bucket, where asked for: follows the scaler at a step's first, keeps what will change."""
    if state.guard is None:
        return
    if first:
        state.guard.abandon()  # a step whose backward pass did not come to its end
        if state.scaler is not None:
            state.set_scale(state.scaler.get_scale())
    for group in groups:
        state.guard.keep(group.feedback(state))
    state.guard.watch(buffer)
