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

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gck.checkpoint import Loaded, load_state, save_state
from gck.collectives import Transport, Work, resolve
from gck.collectives.arguments import check_algorithm
from gck.collectives.handshake import check_validate, describe
from gck.collectives.reduction import Reduction, prepare
from gck.collectives.transports import check_timeout
from gck.collectives.work import perform, submit
from gck.compressor import Compressor
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, check_factor, check_version
from gck.errors import ArgumentError, DtypeError, LayoutError, ShapeMismatchError, StateMismatchError
from gck.nonfinite import StepGuard

__all__ = ["HookState", "hook", "register"]

STATE_VERSION = 1


class HookState:
    """What the hook keeps from step to step.

    Args:
        compressor: used for every parameter that is not bypassed.
        warmup_steps: steps at the start that are reduced without compression.
        bypass_numel: parameters of at most so many elements are reduced without compression, all those
            of a bucket in one message.
        bypass_1d: so are parameters of less than two dimensions (biases, norms), whatever their size.
        model: the DDP module or the module inside, to key residuals by parameter name; `state_dict` needs
            it. May be given later with `bind`.
        group: as for `gck.all_reduce_`; should be the group that DDP uses. None: that of `model` where it
            is a DDP module, else WORLD.
        algorithm, validate, timeout, checksum: as for `gck.all_reduce_`.
        overlap: reduce buckets on another thread while the backward pass goes on. Not where `model` is not
            known, and not where it has a torch.nn.SyncBatchNorm, which sends in the backward pass itself.
            False where other code does that on the same group: a thread more, and ranks might send in
            different orders. The results are the same bits.
        scaler: the torch.amp.GradScaler of the loss, or what has its `get_scale`. Before a step residuals are
            rescaled where the scale has changed; implies `skip_nonfinite`. Without it, use `set_scale`.
        skip_nonfinite: where a gradient of a step is not finite after the all-reduce, which all ranks see
            alike, put all residuals back as they were before the step, since its optimizer step will be
            skipped. Costs a copy of the residuals for the time of a step and a read of the gradients, at
            whose end the host waits for the device. An error in a step puts them back as well.

    Attributes:
        step: synchronising steps done, skipped ones included.
        skipped: steps in which something was not finite, where that is looked for.
        scale: of the loss, that the residuals are in units of.
        residuals: the `ErrorFeedbackMap`, by parameter name.

    Raises:
        DtypeError, ArgumentError: an option has a wrong type or is out of range.
    """

    def __init__(
        self,
        compressor: Compressor,
        warmup_steps: int = 0,
        bypass_numel: int = 1024,
        bypass_1d: bool = True,
        model: torch.nn.Module | None = None,
        group: Any = None,
        *,
        algorithm: str = "auto",
        validate: str = "first",
        timeout: float | None = None,
        checksum: bool = False,
        overlap: bool = True,
        scaler: Any = None,
        skip_nonfinite: bool = False,
    ) -> None:
        check_algorithm("HookState", compressor, algorithm)
        check_validate("HookState", validate)
        if timeout is not None:
            check_timeout(timeout)
        for name, value in (("bypass_1d", bypass_1d), ("overlap", overlap), ("checksum", checksum)):
            if not isinstance(value, bool):
                raise DtypeError(f"HookState: {name} must be a bool, got {type(value).__name__}")
        self.compressor = compressor
        self.warmup_steps = _count("warmup_steps", warmup_steps)
        self.bypass_numel = _count("bypass_numel", bypass_numel)
        self.bypass_1d = bypass_1d
        self.group = group
        self.algorithm = algorithm
        self.validate = validate
        self.checksum = checksum
        self.timeout = timeout
        self.overlap = overlap
        self.scaler = scaler
        self.guard = StepGuard() if skip_nonfinite or scaler is not None else None
        self.step = 0
        self.skipped = 0
        self.scale = 1.0
        self.residuals = ErrorFeedbackMap()
        self._bound = False
        self._sends_in_backward = False
        self._in_flight: list[Work[Tensor]] = []  # of this step's buckets, in their order
        self._names: dict[int, str] = {}
        # Keys are ids, which are unique only while the parameters live.
        self._parameters: list[Tensor] = []
        if model is not None:
            self.bind(model)

    def bind(self, model: torch.nn.Module) -> None:
        """Learns the parameters' names; residuals that exist already follow. Where no group was given,
        that of a DDP module is taken.

        Raises:
            ArgumentError: residuals exist for a parameter that is not in `model`.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = {id(parameter): name for name, parameter in inner.named_parameters()}
        strangers = [name for key, name in self._names.items() if key not in named and name in self.residuals]
        if strangers:
            raise ArgumentError(f"HookState.bind: model lacks {len(strangers)} parameters that were reduced")
        for key, old in self._names.items():
            if old in self.residuals and old != named[key]:
                self.residuals.rename(old, named[key])
        self._names = named
        self._parameters = list(inner.parameters())
        self._bound = True
        self._sends_in_backward = any(isinstance(part, torch.nn.SyncBatchNorm) for part in inner.modules())
        if self.group is None and isinstance(model, DistributedDataParallel):
            self.group = model.process_group

    def feedback(self, parameter: Tensor, create: bool = True) -> ErrorFeedback | None:
        """The residuals of a parameter; None where it has none and `create` is false.

        Raises:
            ArgumentError: `bind` was called with a model that lacks the parameter.
        """
        name = self._names.get(id(parameter))
        if name is None:
            if self._bound:
                raise ArgumentError(
                    f"HookState: a parameter of shape {tuple(parameter.shape)} is not in the bound model"
                )
            name = self._names[id(parameter)] = f"<unnamed parameter {len(self._names)}>"
            self._parameters.append(parameter)
        return self.residuals[name] if create or name in self.residuals else None

    def set_scale(self, scale: float) -> None:
        """Tells the scale of the loss from the next step on; residuals are rescaled where it has changed.

        Raises:
            ArgumentError: it is not positive and finite.
        """
        check_factor("HookState.set_scale", scale, "scale")
        if scale != self.scale:
            self.residuals.rescale_(scale / self.scale)
            self.scale = float(scale)

    def save(self, directory: str | os.PathLike[str], *, keep: int = 2, shared: bool = True) -> Path:
        """Writes this rank's residuals, as of `step`, to `directory`; see `gck.save_state`.

        Raises:
            ArgumentError: the parameters' names are not known.
            Those of `gck.save_state`.
        """
        self._check_bound("save")
        transport = resolve(self.group)
        return save_state(
            directory,
            self.residuals,
            rank=transport.rank,
            world_size=transport.world_size,
            step=self.step,
            compressor=self.compressor,
            scale=self.scale,
            keep=keep,
            shared=shared,
        )

    def load(
        self,
        directory: str | os.PathLike[str],
        *,
        step: int | None = None,
        reshard: bool = False,
        server: str = "keep",
        shared: bool = True,
    ) -> Loaded | None:
        """Goes on from what `save` wrote; arguments, result and errors are those of `gck.load_state`.

        Raises:
            ArgumentError: the parameters' names are not known.
            Those of `gck.load_state`; nothing was changed.
        """
        self._check_bound("load")
        transport = resolve(self.group)
        loaded = load_state(
            directory,
            self.residuals,
            rank=transport.rank,
            world_size=transport.world_size,
            compressor=self.compressor,
            step=step,
            numels=self._numels(),
            reshard=reshard,
            server=server,
            shared=shared,
        )
        if loaded is not None:
            self.step, self.scale = loaded.step, loaded.scale
        return loaded

    def label(self, parameter: Tensor) -> str:
        """How errors call a parameter: by its name, or by its shape where it has none."""
        return self._names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)}")

    def bypassed(self, parameter: Tensor) -> bool:
        """Whether a parameter's gradient is reduced without compression."""
        return parameter.numel() <= self.bypass_numel or (self.bypass_1d and parameter.dim() < 2)

    def overlaps(self) -> bool:
        """Whether buckets are reduced while the backward pass goes on."""
        return self.overlap and self._bound and not self._sends_in_backward

    def state_dict(self) -> dict[str, Any]:
        """A plain dict for this rank's checkpoint: residuals by parameter name, and the step.

        Raises:
            ArgumentError: the parameters' names are not known.
        """
        self._check_bound("state_dict")
        transport = resolve(self.group)
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "scale": self.scale,
            "rank": transport.rank,
            "world_size": transport.world_size,
            "compressor": describe(self.compressor, of_a_step=False),
            "residuals": self.residuals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, reset_server: bool = False) -> None:
        """Continues from what `state_dict` returned on the same rank.

        A worker residual is what one rank's messages left out: loaded on another rank as well, it would
        be sent twice. So the rank must be the same, always. A world that grew starts the new ranks
        without a state; in one that shrank, the residuals of the ranks that are gone are lost.

        Args:
            state: the dict of this rank.
            reset_server: continue in a world of another size, or with another compressor: worker
                residuals are gradients, which any compressor can send later, server residuals belong to
                a shard and start from zero.

        Raises:
            ArgumentError: the parameters' names are not known.
            StateMismatchError: the state is malformed or does not fit the model, the rank, or, without
                reset_server, the world size or the compressor; nothing was changed.
        """
        self._check_bound("load_state_dict")
        check_version("HookState.load_state_dict", state)
        step, scale = state.get("step"), state.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise StateMismatchError(f"HookState.load_state_dict: scale must be positive, got {scale!r}")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise StateMismatchError(f"HookState.load_state_dict: step must be an int >= 0, got {step!r}")
        transport = resolve(self.group)
        fixed: dict[str, object] = {"rank": transport.rank}
        if not reset_server:
            fixed |= {
                "world_size": transport.world_size,
                "compressor": describe(self.compressor, of_a_step=False),
            }
        for name, present in fixed.items():
            if state.get(name) != present:
                advice = (
                    "; every rank saves and loads its own"
                    if name == "rank"
                    else "; reset_server=True keeps the worker residuals and starts the server's from zero"
                )
                raise StateMismatchError(
                    f"HookState.load_state_dict: the saved state belongs to {name} {state.get(name)}, this "
                    f"is {name} {present}{advice}"
                )
        self.residuals.load_state_dict(
            state.get("residuals", {}),
            numels=self._numels(),
            rank=transport.rank,
            world_size=transport.world_size,
            reset_server=reset_server,
        )
        self.step, self.scale = step, float(scale)

    def _numels(self) -> dict[str, int]:
        return {self._names[id(parameter)]: parameter.numel() for parameter in self._parameters}

    def _check_bound(self, function: str) -> None:
        if not self._bound:
            raise ArgumentError(
                f"HookState.{function}: parameters have no names; pass model= to HookState, or call bind"
            )


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

    With `find_unused_parameters=True`, what is averaged for a parameter that no rank used in this step is
    discarded: DDP leaves its gradient alone, and does not tell the hook. The residual that was sent for
    it in that step is lost.

    Raises:
        LayoutError: the bucket holds a sparse gradient.
        ShapeMismatchError: the bucket's sizes contradict each other.
        Those of `gck.all_reduce_`.
    """
    if bucket.index() == 0:
        _land(state)  # of a step whose backward pass did not come to its end
    try:
        transport, run = _prepare(state, bucket)
    except BaseException:
        _land(state)
        _abandon(state)
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
        failed = (_land(state) if bucket.is_last() else None) or failed
    except BaseException as interrupt:
        # Ctrl-C: peers wait for what this rank will not send, and what is in flight must not write residuals
        # that somebody saves.
        transport.abort(f"{type(interrupt).__name__} in gck.ddp.hook")
        _land(state)
        _abandon(state)
        raise
    if failed is not None:
        _abandon(state)
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
    compressor: Compressor,
    warmup_steps: int = 0,
    bypass_numel: int = 1024,
    bypass_1d: bool = True,
    group: Any = None,
    *,
    algorithm: str = "auto",
    validate: str = "first",
    timeout: float | None = None,
    checksum: bool = False,
    overlap: bool = True,
    scaler: Any = None,
    skip_nonfinite: bool = False,
) -> HookState:
    """Makes a `HookState` for `model` and registers the hook.

    Args:
        model: not yet with a communication hook.
        compressor, warmup_steps, bypass_numel, bypass_1d, group, algorithm, validate, timeout, checksum,
            overlap, scaler, skip_nonfinite: as for `HookState`.

    Returns:
        The state, whose `state_dict` belongs into the checkpoint of its rank.

    Raises:
        DtypeError: model is no DistributedDataParallel, or an option has a wrong type.
        ArgumentError: an option is out of range.
        RuntimeError: by torch, where the model has a communication hook already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise DtypeError(
            f"gck.ddp.register: model must be a DistributedDataParallel, got {type(model).__name__}"
        )
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
        overlap=overlap,
        scaler=scaler,
        skip_nonfinite=skip_nonfinite,
    )
    model.register_comm_hook(state, hook)
    return state


def _prepare(
    state: HookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch re-exports it from C++
) -> tuple[Transport, Callable[[], Tensor]]:
    """Checks a bucket; returns what it goes by, and what reduces it when it has the turn."""
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
    warm_up = state.step < state.warmup_steps
    plain = [pair for pair in pairs if warm_up or state.bypassed(pair[0])]
    packed = [pair for pair in pairs if not (warm_up or state.bypassed(pair[0]))]
    _guard(state, bucket.index() == 0, buffer, plain, packed)
    transport = resolve(state.group, state.timeout)
    calls = [
        prepare(
            "gck.ddp.hook",
            [grad for _, grad in some],
            [state.feedback(parameter, create) for parameter, _ in some],
            state.compressor,
            transport,
            algorithm=algorithm,
            validate=state.validate,
            checksum=state.checksum,
        )
        for some, algorithm, create in ((plain, "dense", False), (packed, state.algorithm, True))
    ]

    def run() -> Tensor:
        with _unchanged_on_error(state, plain if packed else [], calls[-1]):
            for call in calls:
                call()
        return buffer

    return transport, run


def _land(state: HookState) -> Exception | None:
    """Waits for the buckets in flight; the error of the first that failed."""
    failed = None
    while state._in_flight:
        try:
            state._in_flight[0].wait()
        except Exception as error:
            failed = failed or error
        del state._in_flight[0]  # not where the wait was interrupted: it is in flight still
    return failed


def _abandon(state: HookState) -> None:
    """Puts residuals back where a step fails and that was asked for; nothing is in flight any more."""
    if state.guard is not None:
        state.guard.abandon()


def _guard(
    state: HookState,
    first: bool,
    buffer: Tensor,
    plain: Sequence[tuple[Tensor, Tensor]],
    packed: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Before a bucket, where asked for: follows the scaler at a step's first, keeps what will change."""
    if state.guard is None:
        return
    if first:
        state.guard.abandon()  # a step whose backward pass did not come to its end
        if state.scaler is not None:
            state.set_scale(state.scaler.get_scale())
    state.guard.keep([state.feedback(parameter, create=False) for parameter, _ in plain])
    state.guard.keep([state.feedback(parameter) for parameter, _ in packed])
    state.guard.watch(buffer)


@contextmanager
def _unchanged_on_error(
    state: HookState, pairs: Sequence[tuple[Tensor, Tensor]], last: Reduction
) -> Iterator[None]:
    """Puts small gradients back when a later message of their bucket fails: unless Ctrl-C came when even the
    last one was done, and all of the bucket is."""
    grads = [(grad, grad.clone()) for _, grad in pairs]
    feedback = [state.feedback(parameter, create=False) for parameter, _ in pairs]
    saved = [(residuals, residuals.snapshot()) for residuals in feedback if residuals is not None]
    try:
        yield
    except BaseException:
        if not last.written:
            for grad, copy in grads:
                grad.copy_(copy)
            for residuals, snapshot in saved:
                residuals.restore(snapshot)
        raise


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"HookState: {name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ArgumentError(f"HookState: {name} must be at least 0, got {value}")
    return value
