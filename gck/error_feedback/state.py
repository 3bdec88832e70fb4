"""The residuals of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gck.error_feedback.bindings import ServerBinding, ShardBinding
from gck.error_feedback.checks import (
    STATE_VERSION,
    check_factor,
    check_place,
    check_version,
    saved_basis,
    saved_binding,
    saved_count,
    saved_residual,
)
from gck.error_feedback.scaling import check_scaled, check_writable, multiply_
from gck.errors import StateMismatchError
from gck.statistics import Statistics
from gck.values import check_flags, plain_int

__all__ = ["ErrorFeedback", "Snapshot"]


class Snapshot(NamedTuple):
    """What `ErrorFeedback.snapshot` returns: each buffer with a copy of its content."""

    binding: ServerBinding | None
    worker: tuple[Tensor, Tensor] | None
    server: tuple[Tensor, Tensor] | None
    nonfinite: tuple[Tensor, Tensor] | None
    shard: ShardBinding | None
    statistics: Statistics | None  # never changed once made
    basis: Tensor | None  # likewise
    divisor: int | None


class ErrorFeedback:
    """The residuals of one tensor on one rank; buffers are allocated as zeros on first use.

    Attributes:
        worker: (numel,) fp32, what this rank's messages left out; None before the first use. On a
            `HierarchicalGroup`, of this rank's shard alone.
        server: (shard,) fp32, what this rank, as the owner of a shard, left out of the average; None
            unless a two-phase all-reduce ran.
        binding: the rank, world size and unit that `server` belongs to; on a `HierarchicalGroup` those of
            the group across nodes, within the shard.
        shard: the part of the tensor that the residuals belong to; None: the whole.
        basis: (rank, columns) fp32, where the next "factored" all-reduce starts from; None before the first.
            The same on all ranks, but that on a `HierarchicalGroup` those of a node each have their own. One
            that does not fit is replaced.
        divisor: of the sums that `server` was left of, the number of ranks for means; None before the first
            two-phase all-reduce, and not saved: then that of the next.
        nonfinite: (1,) int64 on the residuals' device: how many residual entries, worker and server, were
            cleared because they were not finite. Reading it synchronises with the device, as `state_dict`
            does, which turns it into an int.
        measure: whether all-reduces take statistics of what they compress; looked at when a call runs, which
            is later where it is asynchronous. The bits of results and residuals are the same.
        statistics: the `gck.Statistics` of the last all-reduce that took them, on the gradient's device; the
            next one makes new ones. None before the first, and of a gradient without elements. Of what this
            rank compressed as a worker: its gradient, or its part of a node's sum, with the worker residual,
            and what was left of that. Not saved.
    """

    # Of states that were pickled before there were any.
    _measure: bool = False
    statistics: Statistics | None = None
    basis: Tensor | None = None
    divisor: int | None = None

    def __init__(self, *, measure: bool = False) -> None:
        self.measure = measure
        self.statistics = None
        self.worker: Tensor | None = None
        self.server: Tensor | None = None
        self.binding: ServerBinding | None = None
        self.shard: ShardBinding | None = None
        self.nonfinite: Tensor | None = None
        self.basis = self.divisor = None

    @property
    def measure(self) -> bool:
        return self._measure

    @measure.setter
    def measure(self, value: bool) -> None:
        check_flags("ErrorFeedback", measure=value)
        self._measure = value

    def __repr__(self) -> str:
        worker = None if self.worker is None else self.worker.numel()
        server = None if self.server is None else self.server.numel()
        return f"ErrorFeedback(worker={worker}, server={server}, binding={self.binding})"

    def reset(self) -> None:
        """Forgets both residuals, the basis, the counter and the statistics."""
        self.worker = self.server = self.binding = self.shard = self.nonfinite = self.statistics = None
        self.basis = self.divisor = None

    @property
    def numel(self) -> int | None:
        """Elements of the gradient that the worker residual belongs to; None before the first use."""
        if self.worker is None:
            return None
        return self.worker.numel() if self.shard is None else self.shard.numel

    def worker_for(self, grad: Tensor, shard: ShardBinding | None = None) -> Tensor:
        """The worker residual for `grad`: zeros at first, moved along when the gradient changes device.

        Args:
            shard: what part of the gradient `grad` is; None: the whole.

        Raises:
            StateMismatchError: it belongs to a tensor with another number of elements, or another part of it.
        """
        self.check_numel(grad.numel(), shard)
        self.shard = shard
        if self.worker is None:
            self.worker = torch.zeros(grad.numel(), dtype=torch.float32, device=grad.device)
        elif self.worker.device != grad.device:
            self.worker = self.worker.to(grad.device)
        return self.worker

    def server_for(self, numel: int, device: torch.device, binding: ServerBinding) -> Tensor:
        """The server residual of `numel` elements for this rank's shard.

        Raises:
            StateMismatchError: it belongs to another rank, world size or unit.
        """
        self.check_server(numel, binding)
        if self.server is None:
            self.server = torch.zeros(numel, dtype=torch.float32, device=device)
            self.binding = binding
        elif self.server.device != device:
            self.server = self.server.to(device)
        return self.server

    def nonfinite_for(self, device: torch.device) -> Tensor:
        """The counter, on `device`."""
        if self.nonfinite is None:
            self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        elif self.nonfinite.device != device:
            self.nonfinite = self.nonfinite.to(device)
        return self.nonfinite

    def check_numel(self, numel: int, shard: ShardBinding | None = None) -> None:
        """Raises StateMismatchError when the residuals belong to another part of a tensor, or the worker
        residual has another number of elements."""
        if (self.worker is not None or self.server is not None) and self.shard != shard:
            whole = "the whole tensor"
            raise StateMismatchError(
                f"residuals: belong to {self.shard or whole}, got {shard or whole}; a state is of one "
                "topology, call reset() to start from zero"
            )
        if self.worker is not None and self.worker.numel() != numel:
            raise StateMismatchError(
                f"worker residual: belongs to {self.worker.numel()} elements, got a gradient of {numel}"
            )

    def check_server(self, numel: int, binding: ServerBinding) -> None:
        """Raises StateMismatchError when the server residual belongs to another shard."""
        if self.server is None:
            return
        if self.binding != binding or self.server.numel() != numel:
            raise StateMismatchError(
                f"server residual: belongs to {self.binding} with {self.server.numel()} elements, got "
                f"{binding} with {numel}; call reset() to start from zero"
            )

    def snapshot(self, clone: Callable[[Tensor], Tensor] = torch.clone) -> Snapshot:
        """Copies to `restore` from, made by `clone`; the buffers themselves stay where they are."""
        buffers = (self.worker, self.server, self.nonfinite)
        worker, server, nonfinite = (None if b is None else (b, clone(b)) for b in buffers)
        return Snapshot(
            self.binding, worker, server, nonfinite, self.shard, self.statistics, self.basis, self.divisor
        )

    def restore(self, saved: Snapshot) -> None:
        """Puts everything back as it was at `snapshot`, in the same buffers."""
        self.binding, self.shard, self.statistics = saved.binding, saved.shard, saved.statistics
        self.basis, self.divisor = saved.basis, saved.divisor
        self.worker, self.server, self.nonfinite = (
            None if pair is None else pair[0].copy_(pair[1])
            for pair in (saved.worker, saved.server, saved.nonfinite)
        )

    def rescale_(self, factor: float, *, drop: bool = False) -> None:
        """Multiplies both residuals, as when the scale of the loss changes from `old` to `factor * old`.

        Products are made in fp64, which `factor` may need, and rounded to fp32: a power of two is exact but
        for entries that become denormal, and what is below the denormals becomes 0. Waits for the device
        where `factor` is above 1 and `drop` is false.

        Args:
            factor: positive and finite.
            drop: an entry that would not be finite becomes 0 and is counted, as in compressors. By default it
                is an error.

        Raises:
            ArgumentError: factor, or an entry times it, is out of range; nothing was changed.
        """
        function = "ErrorFeedback.rescale_"
        factor = check_factor(function, factor)
        check_flags(function, drop=drop)
        residuals = {"worker residual": self.worker, "server residual": self.server}
        check_writable(function, residuals)
        if not drop:
            check_scaled(function, residuals, factor)
        self.multiply_(factor, drop=drop)

    def multiply_(self, factor: float, *, drop: bool) -> None:
        """`rescale_` by what has been checked."""
        for residual in (self.worker, self.server):
            if residual is not None:
                multiply_(residual, factor)
                if drop and factor > 1:
                    lost = ~residual.isfinite()
                    residual.masked_fill_(lost, 0)
                    self.nonfinite_for(residual.device).add_(lost.sum())

    def state_dict(self) -> dict[str, Any]:
        """A plain dict of tensors (not copies, as in torch.nn.Module) and ints; waits for the device."""
        state: dict[str, Any] = {"version": STATE_VERSION}
        if self.worker is not None:
            state["worker"] = self.worker
        if self.server is not None and self.binding is not None:
            state["server"] = self.server
            state |= {key: plain_int(value) for key, value in self.binding._asdict().items()}
        if self.shard is not None:
            state["shard"] = {key: plain_int(value) for key, value in self.shard._asdict().items()}
        if self.basis is not None:
            state |= {"basis": self.basis.view(-1), "columns": self.basis.shape[1]}
        if self.nonfinite is not None:
            state["nonfinite"] = int(self.nonfinite)
        return state

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        numel: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        reset_server: bool = False,
    ) -> None:
        """Replaces the residuals, and the basis, by copies of those in `state`.

        Args:
            state: what `state_dict` returned.
            numel: elements of the gradient. Default: those of the present worker residual, if any.
            rank, world_size: of the group that will be used. Default: those that the present server
                residual is bound to, if any; else checked on first use.
            reset_server: start the server residual from zero instead of loading it, as after a change
                of the world size.

        Raises:
            DtypeError, ArgumentError: numel, rank or world_size is no int or out of range, or reset_server
                no bool.
            StateMismatchError: the state is malformed, of another version, or belongs to another
                number of elements, rank or world size; nothing was changed.
        """
        function = "ErrorFeedback.load_state_dict"
        check_flags(function, reset_server=reset_server)
        numel, rank, world_size = plain_int(numel), plain_int(rank), plain_int(world_size)
        check_place(function, rank, world_size, numel)
        loaded = self._parsed(state, numel, rank, world_size, reset_server)
        for name in ("worker", "server"):
            mine: Tensor | None = getattr(self, name)
            theirs: Tensor | None = getattr(loaded, name)
            if theirs is not None:
                theirs = theirs.detach()
                theirs = theirs.clone() if mine is None else theirs.to(mine, copy=True)
            setattr(self, name, theirs)
        self.binding, self.shard, self.nonfinite = loaded.binding, loaded.shard, loaded.nonfinite
        self.basis = None if loaded.basis is None else loaded.basis.detach().clone()
        self.statistics = self.divisor = None

    def _parsed(
        self,
        state: Mapping[str, Any],
        numel: int | None,
        rank: int | None,
        world_size: int | None,
        reset_server: bool,
    ) -> ErrorFeedback:
        """The residuals in `state`, checked; shares its tensors."""
        check_version("ErrorFeedback.load_state_dict", state)
        loaded = ErrorFeedback()
        loaded.worker = saved_residual(state, "worker")
        loaded.shard = saved_binding(ShardBinding, state["shard"], "shard") if "shard" in state else None
        numel = self.numel if numel is None else numel
        if numel is not None and loaded.numel not in (None, numel):
            raise StateMismatchError(
                f"load_state_dict: the saved worker residual has {loaded.numel} elements, "
                f"the gradient {numel}"
            )
        if "server" in state and not reset_server:
            loaded.server = saved_residual(state, "server")
            loaded.binding = saved_binding(ServerBinding, state, "server residual")
            own_rank, own_world_size = self.place()
            saved_rank, saved_world_size = loaded.place()
            for name, saved, present in (
                ("rank", saved_rank, own_rank if rank is None else rank),
                ("world size", saved_world_size, own_world_size if world_size is None else world_size),
            ):
                if present is not None and saved != present:
                    raise StateMismatchError(
                        f"load_state_dict: the saved server residual belongs to {name} {saved}, this is "
                        f"{name} {present}; pass reset_server=True to start it from zero"
                    )
        loaded.basis = saved_basis(state)
        if "nonfinite" in state:
            count = saved_count(state, "nonfinite")
            device = None if loaded.worker is None else loaded.worker.device
            loaded.nonfinite = torch.tensor([count], dtype=torch.int64, device=device)
        return loaded

    def place(self) -> tuple[int, int] | tuple[None, None]:
        """Rank and size of the world that the server residual belongs to, all tiers together."""
        if self.binding is None:
            return None, None
        if self.shard is None:
            return self.binding.rank, self.binding.world_size
        local = self.shard.world_size
        return self.binding.rank * local + self.shard.rank, self.binding.world_size * local
