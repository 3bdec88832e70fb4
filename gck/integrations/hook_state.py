"""What the hook of `gck.integrations.ddp` keeps from step to step: its options, and residuals by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import Link, Work
from gck.collectives.arguments import check_algorithm
from gck.collectives.handshake import check_validate
from gck.collectives.transports import check_timeout
from gck.compressor import Compressor
from gck.compressor_choice import Choosable, CompressorChoice
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, check_factor
from gck.errors import ArgumentError, DtypeError
from gck.integrations.hook_checks import check_units, checked_count, checked_names
from gck.integrations.parameters import overview
from gck.integrations.saving import Saving
from gck.nonfinite import StepGuard
from gck.values import check_flags, shown

__all__ = ["HookState"]


class HookState(Saving):
    """What the hook keeps from step to step.

    Args:
        compressor: for every parameter that is not bypassed; or by name: a dict of patterns, as of the shell,
            to compressors, or to None, which bypasses. The first that matches counts. Names are those of
            `named_parameters` of the model inside. May be set between steps, alike on all ranks; what
            residuals hold is sent by whatever comes next, but that on nodes of several ranks its chunks must
            be as long. One that needs a seed and has none gets another one at every step.
        warmup_steps: steps at the start that are reduced without compression.
        bypass_numel: parameters of at most so many elements are reduced without compression, all those
            of a bucket in one message.
        bypass_1d: so are parameters of less than two dimensions (biases, norms), whatever their size.
        model: the DDP module or the module inside, to key residuals by parameter name; `state_dict` needs
            it. May be given later with `bind`.
        group: as for `gck.all_reduce_`; should be the group that DDP uses. None: that of `model` where it
            is a DDP module, else WORLD.
        algorithm, validate, timeout, checksum: as for `gck.all_reduce_`. `algorithm` may be set between
            steps, alike on all ranks: "dense" sends everything, what is left in residuals as well.
        link: the slow one between ranks, or between the nodes of a `HierarchicalGroup`, the same on all of
            them: buckets go in the pieces that `gck.collectives.choose_piece_numel` says, all at once on
            devices. None: at once.
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
        measure: take statistics of what is compressed of each parameter: `residuals.statistics()` has those
            of the last step that took them; nothing waits for them. On a CPU they take three times what
            `err.add_(grad)` does, so turn it on for one step in many: it is an attribute, to be changed
            between steps. A step that is skipped leaves those before it.
        bypass_names: parameters, by the names that `named_parameters` of the model inside has for them, that
            are reduced without compression; the same on all ranks.

    Attributes:
        step: synchronising steps done, skipped ones included.
        skipped: steps in which something was not finite, where that is looked for.
        scale: of the loss, that the residuals are in units of.
        residuals: the `ErrorFeedbackMap`, by parameter name.
        finds_unused: whether DDP looks for parameters that no rank uses in a step.

    Raises:
        DtypeError, ArgumentError: an option has a wrong type or is out of range.
    """

    finds_unused: bool = False  # of states that were pickled before it was there

    def __init__(
        self,
        compressor: Choosable,
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
        link: Link | None = None,
        overlap: bool = True,
        scaler: Any = None,
        skip_nonfinite: bool = False,
        measure: bool = False,
        bypass_names: Collection[str] = (),
    ) -> None:
        self._algorithm = algorithm
        self._bound = False
        self.compressor = compressor  # checks both
        check_validate("HookState", validate)
        if timeout is not None:
            check_timeout(timeout)
        flags = {"overlap": overlap, "checksum": checksum, "skip_nonfinite": skip_nonfinite}
        check_flags("HookState", bypass_1d=bypass_1d, measure=measure, **flags)
        if link is not None and not isinstance(link, Link):
            raise DtypeError(f"HookState: link must be a Link or None, got {shown(link)}")
        if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
            raise DtypeError(f"HookState: scaler must have a get_scale, got {scaler!r}")
        self.link = link
        self.warmup_steps = checked_count("warmup_steps", warmup_steps)
        self.bypass_numel = checked_count("bypass_numel", bypass_numel)
        self.bypass_1d = bypass_1d
        self.group = group
        self.validate = validate
        self.checksum = checksum
        self.timeout = timeout
        self.overlap = overlap
        self.scaler = scaler
        self.guard = StepGuard() if skip_nonfinite or scaler is not None else None
        self.bypass_names = checked_names(bypass_names)
        self.step = 0
        self.skipped = 0
        self.scale = 1.0
        self.residuals = ErrorFeedbackMap(measure=measure)
        self._sends_in_backward = False
        self._in_flight: list[Work[Tensor]] = []  # of this step's buckets, in their order
        self._names: dict[int, str] = {}
        # Keys are ids, which are unique only while the parameters live.
        self._parameters: list[Tensor] = []
        if model is not None:
            self.bind(model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of states that were pickled when `algorithm` was no property, too."""
        state = dict(state)
        self.__dict__.update({"_algorithm": state.pop("algorithm", "auto")} | state)

    def __repr__(self) -> str:
        """What is compressed by what, and into how many bits an element of this rank's payloads."""
        kind = type(self).__name__
        try:
            first = f"{kind}: step {self.step}, compresses from step {self.warmup_steps} on"
            if not self._bound:
                return f"{first}, of a model that it does not know"
            trained = [parameter for parameter in self._parameters if parameter.requires_grad]
            lines = overview((parameter, self.compressor_of(parameter)) for parameter in trained)
            return "\n  ".join([first, *lines])
        except Exception as error:  # half made, or a parameter has no shape, or no pattern
            return f"<{kind}: {error}>"

    def bind(self, model: torch.nn.Module) -> None:
        """Learns the parameters' names; residuals that exist already follow. Where no group was given,
        that of a DDP module is taken.

        Raises:
            ArgumentError: residuals exist for a parameter that is not in `model`, or it has none of a name
                that is to be bypassed, or for a pattern of `compressor`.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = {id(parameter): name for name, parameter in inner.named_parameters()}
        if unknown := self.bypass_names - set(named.values()):
            raise ArgumentError(
                f"HookState.bind: model has no parameters of bypass_names {sorted(unknown)}, which are no "
                "patterns; parameters that modules share have the name of the first"
            )
        self._choice.check_names("HookState.bind", named.values())
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
        outer = model if isinstance(model, DistributedDataParallel) else None
        self.finds_unused = outer is not None and outer.find_unused_parameters
        if self.group is None and outer is not None:
            self.group = outer.process_group

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

    @property
    def compressor(self) -> Choosable:
        """As it was given; a dict is a copy, which can't be changed: set another one."""
        return self._choice.given

    @compressor.setter
    def compressor(self, value: Choosable) -> None:
        choice = CompressorChoice("HookState", value)
        for compressor in choice.compressors:
            check_algorithm("HookState", compressor, self.algorithm)
        if self._bound:
            choice.check_names("HookState", self._names.values())
            check_units("HookState", choice, self.residuals)
        self._choice = choice

    @property
    def algorithm(self) -> str:
        return self._algorithm

    @algorithm.setter
    def algorithm(self, value: str) -> None:
        for compressor in self._choice.compressors:
            check_algorithm("HookState", compressor, value)
        self._algorithm = value

    @property
    def compressors(self) -> list[Compressor]:
        """In the order in which a bucket's messages are sent."""
        return list(self._choice.compressors)

    @property
    def measure(self) -> bool:
        return self.residuals.measure

    @measure.setter
    def measure(self, value: bool) -> None:
        check_flags("HookState", measure=value)
        self.residuals.measure = value

    def set_scale(self, scale: float) -> None:
        """Tells the scale of the loss from the next step on; residuals are rescaled where it has changed.

        An entry that would not be finite becomes 0 and is counted: an error would be of one rank alone.

        Raises:
            ArgumentError: it is not positive and finite.
        """
        scale = check_factor("HookState.set_scale", scale, "scale")
        self._settle()
        if scale != self.scale:
            self.residuals.rescale_(scale / self.scale, drop=True)
            self.scale = scale

    def names_of(self, parameters: Sequence[Tensor]) -> list[str]:
        """What ranks compare of a message's parameters: nothing where names are made up here."""
        return [self._names[id(parameter)] for parameter in parameters] if self._bound else []

    def label(self, parameter: Tensor) -> str:
        """How errors call a parameter: by its name, or by its shape where it has none."""
        return self._names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)}")

    def bypassed(self, parameter: Tensor) -> bool:
        """Whether a parameter's gradient is reduced without compression."""
        return self.compressor_of(parameter) is None

    def compressor_of(self, parameter: Tensor) -> Compressor | None:
        """What compresses a parameter's gradient; None where it is bypassed.

        Raises:
            ArgumentError: names count, and are not known; or no pattern of `compressor` matches.
        """
        name = ""
        if self.bypass_names or self._choice.by_name:
            self._check_bound("bypassed")
            name = self._names.get(id(parameter), "")
        small = parameter.numel() <= self.bypass_numel or (self.bypass_1d and parameter.dim() < 2)
        return None if small or name in self.bypass_names else self._choice.of("HookState", name)

    def overlaps(self) -> bool:
        """Whether buckets are reduced while the backward pass goes on."""
        return self.overlap and self._bound and not self._sends_in_backward

    def _land(self) -> Exception | None:
        """Waits for the buckets in flight; the error of the first that failed."""
        failed = None
        while self._in_flight:
            try:
                self._in_flight[0].wait()
            except Exception as error:
                failed = failed or error
            del self._in_flight[0]  # not where the wait was interrupted: it is in flight still
        return failed

    def _abandon(self) -> None:
        """Puts residuals back where a step fails and that was asked for; nothing is in flight any more."""
        if self.guard is not None:
            self.guard.abandon()

    def _settle(self) -> None:
        """Ends a step whose backward pass did not come to its end: its buckets may still write residuals."""
        self._land()
        self._abandon()

    def _numels(self) -> dict[str, int]:
        return {self._names[id(parameter)]: parameter.numel() for parameter in self._parameters}

    def _check_bound(self, function: str) -> None:
        if not self._bound:
            raise ArgumentError(
                f"HookState.{function}: parameters have no names; pass model= to HookState, or call bind"
            )
