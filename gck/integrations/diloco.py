"""Many local steps between two exchanges, as over the internet: DiLoCo's, of compressed messages.

    outer = gck.diloco.OuterOptimizer(
        model, gck.ChunkTopK(k=64, chunk_size=4096, value_bits=2, decay=0.95), sync_every=15
    )
    for inputs in data:  # of this rank
        loss(model(inputs)).backward()
        inner.step()  # an optimizer of this rank, such as AdamW
        inner.zero_grad()
        outer.step()  # every 15th exchanges

Every rank trains a copy of the model. An exchange averages how far they have come, compressed, with what each
rank's messages leave out in its residuals, and an outer optimizer takes that for a gradient.

Sources: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023),
Algorithm 1; Wang et al., "Communication Efficient LLM Pre-training with SparseLoCo" (2025), Algorithm 1, for
error feedback there; Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), for other outer optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import Link, Transport, resolve
from gck.collectives.work import perform
from gck.compressor_choice import Choosable
from gck.error_feedback import check_version
from gck.errors import ArgumentError, DtypeError, LayoutError, StateMismatchError
from gck.integrations.groups import grouped, prepare_groups
from gck.integrations.hook_checks import check_layout, checked_count
from gck.integrations.hook_state import HookState
from gck.integrations.replicas import check_replicas, check_same
from gck.kernels.common.checks import GRAD_DTYPES
from gck.values import shown

__all__ = ["OuterOptimizer"]

STATE_VERSION = 1


class OuterOptimizer:
    """Averages the parameters' changes of many local steps; collective over the group, as its `step` is.

    Args:
        model: with the same parameters on all ranks, which is compared; those that train are exchanged, in
            fp32, bf16 or fp16. Buffers, such as running means, stay each rank's own. No
            DistributedDataParallel, which averages at every step.
        compressor: for every parameter that is not bypassed, or by name; as for `gck.ddp.HookState`.
        sync_every: local steps between two exchanges, the same on all ranks.
        optimizer: makes the outer optimizer of a list of parameters: the fp32 copies of those of the model
            that all ranks have in common. Its `step` takes no closure, and must be a function of their
            gradients alone, as those of torch.optim are. None: SGD with a rate of 1, which takes the average
            as it is, as SparseLoCo does.
            DiLoCo's: `lambda shared: torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)`.
        group: as for `gck.all_reduce_`; default: WORLD.
        warmup_steps: exchanges at the start that are not compressed.
        bypass_numel, bypass_1d, bypass_names, algorithm, validate, timeout, checksum, link, measure: as for
            `gck.ddp.HookState`. `algorithm="one_phase"` compresses once; "auto" may take two phases, which
            compress the average again, where that sends less.

    Attributes:
        state: the `HookState`, with this rank's residuals by parameter name; its `step` counts exchanges.
            `state.save` and `state.load` keep them, also for another number of ranks.
        optimizer: the outer one.
        local_steps: since the last exchange.

    Raises:
        DtypeError: model is no module, or a parameter of a dtype that gck does not take; or an option has a
            wrong type.
        ArgumentError: an option is out of range, or nothing of the model trains.
        LayoutError: a parameter does not fill its memory.
        CollectiveMismatchError: ranks have different parameters, or sync_every; on all ranks.
        Those of `gck.all_reduce_`.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: Choosable,
        sync_every: int,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        group: Any = None,
        warmup_steps: int = 0,
        bypass_numel: int = 1024,
        bypass_1d: bool = True,
        bypass_names: Collection[str] = (),
        algorithm: str = "auto",
        validate: str = "first",
        timeout: float | None = None,
        checksum: bool = False,
        link: Link | None = None,
        measure: bool = False,
    ) -> None:
        function = "gck.diloco.OuterOptimizer"
        if not isinstance(model, nn.Module):
            raise DtypeError(f"{function}: model must be a torch.nn.Module, got {shown(model)}")
        if isinstance(model, DistributedDataParallel):
            raise ArgumentError(
                f"{function}: model must not be a DistributedDataParallel, which averages at every step; "
                "pass the module inside"
            )
        self.sync_every = checked_count("sync_every", sync_every, function, least=1)
        if self.sync_every >= 2**63:
            raise ArgumentError(f"{function}: sync_every must be below 2**63, got {self.sync_every}")
        if optimizer is not None and not callable(optimizer):
            raise DtypeError(
                f"{function}: optimizer must make one of a list of parameters, got {shown(optimizer)}"
            )
        self.state = HookState(
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
            overlap=False,
            measure=measure,
            bypass_names=bypass_names,
        )
        self._model = model
        self._parameters = self._trained()
        if not self._parameters:
            raise ArgumentError(f"{function}: model has no parameters that train")
        for name, parameter in self._parameters.items():
            self._check(function, name, parameter)
        transport = resolve(group, timeout)
        everything = dict(model.named_parameters())
        about = [(tuple(parameter.shape), parameter.requires_grad) for parameter in everything.values()]
        check_same(function, transport, {"sync_every": self.sync_every})
        check_replicas(function, transport, everything, about)
        self._shared = {
            name: nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            for name, parameter in self._parameters.items()
        }
        make = optimizer if optimizer is not None else _as_it_is
        self.optimizer = make(list(self._shared.values()))
        groups = getattr(self.optimizer, "param_groups", ())
        if {id(p) for each in groups for p in each["params"]} != set(map(id, self._shared.values())):
            raise ArgumentError(
                f"{function}: optimizer must make one of all the parameters that it is given, and no others, "
                f"got {type(self.optimizer).__name__}"
            )
        self.local_steps = 0

    def step(self) -> bool:
        """Call after each local step: every `sync_every`-th exchanges.

        Returns:
            whether it did.

        Raises:
            Those of `synchronize`.
        """
        self.local_steps += 1
        if self.local_steps < self.sync_every:
            return False
        self.synchronize()
        return True

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchanges now: the model's parameters become what the outer optimizer makes of the average change,
        the same bits on all ranks.

        Raises:
            ArgumentError: the model has other parameters that train than when this was made.
            CollectiveMismatchError: ranks differ in the number of exchanges, or in what they had in common
                after the last one, as where it has ended on some ranks and failed on others, where they have
                loaded different ones, or their outer optimizers differ; on all ranks, unless validate is
                "off".
            Those of `gck.all_reduce_`. The model, the residuals and the outer optimizer are as they were, and
            the exchange may be tried again, on another group as `state.group`, too. What the outer
            optimizer's own `step` raises comes later.
        """
        function = "gck.diloco.OuterOptimizer.synchronize"
        self._check_model(function)
        transport = resolve(self.state.group, self.state.timeout)
        changes = {name: self._change(name) for name in self._parameters}
        flat = [_flat(change) for change in changes.values()]
        self._average(function, list(zip(self._parameters.values(), flat, strict=True)), transport)
        for name, shared in self._shared.items():
            shared.grad = changes[name]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._write()
        self.state.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common: the parameters after the last exchange, by name, the outer
        optimizer, and the number of exchanges. Tensors are no copies. Residuals, of which each rank has its
        own, are in `state`.
        """
        return {
            "version": STATE_VERSION,
            "step": self.state.step,
            "shared": {name: shared.detach() for name, shared in self._shared.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned on any rank, with the model's parameters as they were after
        that exchange. Residuals are loaded by `state`, those of the same step.

        Raises:
            StateMismatchError: it is malformed, or of another model; nothing was changed.
        """
        function = "gck.diloco.OuterOptimizer.load_state_dict"
        check_version(function, saved)
        step, shared = saved.get("step"), saved.get("shared")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise StateMismatchError(f"{function}: step must be an int >= 0, got {shown(step)}")
        if not isinstance(shared, Mapping):
            raise StateMismatchError(f"{function}: shared must be a dict of tensors, got {shown(shared)}")
        if shared.keys() != self._shared.keys():
            names = sorted(map(str, shared.keys() ^ self._shared.keys()))[:3]
            raise StateMismatchError(
                f"{function}: shared must have the parameters of the model, and has not, or too many, of "
                f"{', '.join(names)}"
            )
        for name, own in self._shared.items():
            given = shared[name]
            if not isinstance(given, Tensor) or given.dtype != own.dtype or given.shape != own.shape:
                raise StateMismatchError(
                    f"{function}: {name} must be float32 of shape {tuple(own.shape)}, got {shown(given)}"
                )
        before = self.optimizer.state_dict()
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:
            self.optimizer.load_state_dict(before)
            raise StateMismatchError(f"{function}: not of this outer optimizer: {error}") from error
        with torch.no_grad():
            for name, own in self._shared.items():
                own.copy_(shared[name])
            self._write()
        self.state.step = step

    def __reduce__(self) -> Any:
        raise ArgumentError(
            "gck.diloco.OuterOptimizer: it belongs to a model and a process group, and cannot be copied or "
            "pickled; save state_dict(), and residuals by state.save"
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _check_model(self, function: str) -> None:
        now = self._trained()
        names = now.keys() | self._parameters.keys()
        others = sorted(name for name in names if now.get(name) is not self._parameters.get(name))
        if others:
            raise ArgumentError(
                f"{function}: {', '.join(others[:3])} of the model came, went, froze or was replaced after "
                "the outer optimizer was made, and would not be exchanged; make a new one"
            )

    def _checksum(self) -> int:
        """Of the bits of what all ranks have in common."""
        total = 0
        for place, shared in enumerate(self._shared.values(), 1):
            total += place * int(shared.detach().view(torch.int32).sum(dtype=torch.int64))
        return (total + 2**63) % 2**64 - 2**63

    def _check(self, function: str, name: str, parameter: Tensor) -> None:
        if parameter.dtype not in GRAD_DTYPES:
            raise DtypeError(
                f"{function}: parameters must be of fp32, bf16 or fp16, got {name} of {parameter.dtype}"
            )
        if type(parameter.data) is not Tensor:
            raise DtypeError(f"{function}: parameters must be plain tensors, got {name}: {shown(parameter)}")
        if torch.empty_like(parameter).stride() != parameter.stride():  # which copies will have
            raise LayoutError(f"{function}: {name} of strides {parameter.stride()} does not fill its memory")
        chosen = self.state.compressor_of(parameter)
        if chosen is not None:
            check_layout(function, name, parameter.numel(), chosen)

    def _change(self, name: str) -> Tensor:
        """Where the last exchange left the parameter, as far as its dtype can say, less where it is now."""
        parameter, shared = self._parameters[name].detach(), self._shared[name].detach()
        return shared.to(parameter.dtype).to(torch.float32, copy=True).sub_(parameter)

    def _average(self, function: str, pairs: list[tuple[Tensor, Tensor]], transport: Transport) -> None:
        """The changes become those of all ranks; or nothing has changed, where it raises."""
        common = {"numbers of exchanges": self.state.step, "parameters in common": self._checksum()}
        try:
            if self.state.validate != "off":
                check_same(function, transport, common, "; load the same state_dict() on all of them")
            groups = grouped(self.state, pairs, warm_up=self.state.step < self.state.warmup_steps)
            reduce = prepare_groups(function, self.state, groups, transport, self.state.step)
            perform(transport, function, reduce, pairs[0][1].device, False)
        except BaseException as error:
            if not isinstance(error, Exception):
                transport.abort(f"{type(error).__name__} in {function}")  # peers wait for the exchange
            raise

    def _write(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.detach().copy_(self._shared[name])
        self.local_steps = 0


def _as_it_is(shared: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(shared, lr=1.0)


def _flat(tensor: Tensor) -> Tensor:
    """A view of its elements in their order in memory, as `stored_shape` has the dimensions."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return tensor.permute(order).view(-1)
