"""One all-reduce: checked when it is called, run when it has the group's turn, and all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from gck.collectives.all_gather import one_phase
from gck.collectives.arguments import check_call, check_states, plan_of
from gck.collectives.cost import Link, node_unit
from gck.collectives.dense import dense
from gck.collectives.factored import factored
from gck.collectives.failure import give_up
from gck.collectives.folding import fold_server
from gck.collectives.handshake import Signature, agree, check_validate, describe
from gck.collectives.hierarchical import HierarchicalGroup, all_gather, bindings_of, cut, reduce_scatter
from gck.collectives.measured import Measured
from gck.collectives.pieces import check_piece_numel, choose_piece_numel, piece_numel_of
from gck.collectives.scratch import Scratch, scratch
from gck.collectives.seeded import seeded
from gck.collectives.transports import Transport
from gck.collectives.transports.checked import Checked
from gck.collectives.two_phase import Residuals, Shards, two_phase
from gck.collectives.undo import Undo
from gck.compressor import Compressor, decodes_anything, server_of, sums_or_raises
from gck.error_feedback import ErrorFeedback, ServerBinding, ShardBinding
from gck.factored import Factored, is_factored, shaped
from gck.memory import copy_
from gck.values import check_flags, plain_int

__all__ = ["Reduction", "prepare"]

# Of a tensor: its part of a node's sum, and the size and binding of its server residual.
Place = tuple[ShardBinding | None, tuple[int, ServerBinding] | None]
Member = tuple[Tensor, ErrorFeedback | None, Place, Undo, Compressor]


def prepare(
    function: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    compressor: Compressor,
    transport: Transport,
    op: str = "avg",
    algorithm: str = "auto",
    validate: str = "first",
    async_op: bool = False,
    piece_numel: int | None = None,
    checksum: bool = False,
    link: Link | None = None,
    names: Sequence[str] = (),
    shapes: Sequence[Sequence[int]] | None = None,
) -> Reduction:
    """Checks a call and returns the rest of it, to be called when the call has the group's turn.

    Args:
        function: the public function, for texts; the others are those of `gck.all_reduce_`.
        link: between ranks, or between nodes: what chooses piece_numel where that is None.
        names: of the gradients, which ranks compare where there are some.
        shapes: of the gradients, where they are flat and a compressor may look at that. None: their own.
    """
    check_flags(function, async_op=async_op, checksum=checksum)
    check_validate(function, validate)
    check_call(function, grads, states, compressor, op, algorithm)
    piece_numel = plain_int(piece_numel)
    check_piece_numel(function, piece_numel)
    if checksum:
        Checked(transport)  # for what it raises: here, and not once peers wait for messages
    tiers = transport if isinstance(transport, HierarchicalGroup) else None
    tier, local_world_size = (transport, 1) if tiers is None else (tiers.cross, tiers.local.world_size)
    numels = tuple(grad.numel() for grad in grads)
    bound = [shaped(compressor, shape) for shape in shapes or [grad.shape for grad in grads]]
    ways = local_world_size, tier.world_size, algorithm
    cuts = [
        cut([n], node_unit(one, n, *ways), local_world_size)[0] for n, one in zip(numels, bound, strict=True)
    ]
    plan = plan_of(bound, cuts, local_world_size, tier.world_size, algorithm)
    shards = bindings_of(tiers, cuts)
    check_states(states, cuts, shards, compressor, tier)
    together = [cuts[i].numel for chosen in ("one_phase", "two_phase") for i in plan.get(chosen, ())]
    if piece_numel is None and link is not None and grads:
        size, device_type = (sum(together), tier.world_size), grads[0].device.type
        piece_numel = choose_piece_numel(compressor, *size, device_type, link=link, algorithm=algorithm)
    pieces = piece_numel_of(compressor, together, piece_numel)
    name = next(iter(plan)) if len(plan) == 1 else "mixed"
    # Messages of pieces and with checksums are others: what ranks compare of the compressor says so.
    text = describe(compressor) + (f" in pieces of {pieces} elements" if pieces else "")
    text += " with checksums" if checksum else ""
    columns = tuple(one.columns or 0 for one in bound if is_factored(one))
    signature = Signature(name, text, tuple(grad.dtype for grad in grads), numels, op, tuple(names), columns)
    checked = (validate, checksum)
    return Reduction(
        function, grads, states, compressor, bound, transport, plan, cuts, shards, pieces, signature, *checked
    )


@dataclass
class Reduction:
    """A call that was checked.

    Attributes:
        begun: other ranks may know of it.
        spoilt: gradients may be half written, for want of memory.
        written: gradients and states are those of afterwards, even where Ctrl-C came in that moment.
        bound: the compressor of each tensor: one that knows its shape, where it looks at that.
        plan: which tensors go by which algorithm.
        cuts: how the ranks of a node share each tensor.
        shards: this rank's part of each, on a hierarchy.
        late: what writes residuals when nothing can fail any more, each of which may be called again.
        measured: statistics that are taken.
    """

    function: str
    grads: Sequence[Tensor]
    states: Sequence[ErrorFeedback | None]
    compressor: Compressor
    bound: Sequence[Compressor]
    transport: Transport
    plan: dict[str, list[int]]
    cuts: Sequence[Shards]
    shards: Sequence[ShardBinding | None]
    piece_numel: int
    signature: Signature
    validate: str
    checksum: bool
    begun: bool = False
    spoilt: bool = False
    written: bool = False
    late: list[Callable[[], None]] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)

    def __call__(self) -> None:
        """Agrees with the other ranks, reduces, and writes only when everything succeeded."""
        if not self.grads:
            return
        try:
            self._run()
        except BaseException as error:
            if not self.written and (self.begun or not isinstance(error, Exception)):
                give_up(self.transport, self.function, error, even_alone=self.spoilt)
            raise

    def _run(self) -> None:
        tiers = self.transport if isinstance(self.transport, HierarchicalGroup) else None
        # Payloads travel across `tier`.
        tier, local = (self.transport, None) if tiers is None else (tiers.cross, tiers.local)
        # The states once more: what was in flight may have used them since `prepare`.
        bindings = check_states(self.states, self.cuts, self.shards, self.compressor, tier)
        places = list(zip(self.shards, bindings, strict=True))
        self.begun = True
        agree(self.transport, self.function, self.signature, self.validate, self.checksum)
        if self.checksum:
            sequence = self.transport.calls.sequence
            tier, local = Checked(tier, sequence), None if local is None else Checked(local, sequence)
        flat = [grad.detach().view(-1) for grad in self.grads]
        with scratch() as memory:
            undo = [Undo(grad, state, memory) for grad, state in zip(flat, self.states, strict=True)]
            finish = None
            try:
                finish = partial(self._finish, self._reduce(tier, local, flat, places, undo, memory))
                self.transport.synchronize()
                self.written = True  # from here on Ctrl-C finds everything there
                finish()
            except BaseException as error:
                failed: BaseException | None = error
                if self.written and finish is not None and not isinstance(error, Exception):
                    failed = _to_the_end(finish)  # what may be half written is written once more
                    if failed is None:
                        raise
                self.spoilt, self.written = self.written, False
                for each in undo:
                    each.restore()
                raise

    def _finish(self, write: Callable[[], None]) -> None:
        write()
        for settle in self.late:
            settle()
        for each in self.measured:
            each.publish()

    def _reduce(
        self,
        tier: Transport,
        local: Transport | None,
        grads: list[Tensor],
        places: list[Place],
        undo: list[Undo],
        memory: Scratch,
    ) -> Callable[[], None]:
        """Everything up to the results; the rest, which writes to the gradients, may be called again."""
        tiers = self.transport if isinstance(self.transport, HierarchicalGroup) else None
        if tiers is not None and local is not None:
            with tiers.both_or_none():
                results = self._in_tiers(tier, local, grads, places, undo, memory)
            return partial(_write, grads, results)
        algorithm = self._straight()
        if algorithm is not None:
            some = list(zip(grads, self.states, places, undo, self.bound, strict=True))
            return self._begin(algorithm, tier, some, grads, memory, straight=True)
        return partial(_write, grads, self._reduced(tier, self.plan, grads, places, undo, memory))

    def _straight(self) -> str | None:
        """The algorithm, where what was gathered is decoded to the gradients themselves: in the end, when
        nothing can fail any more, or only as a whole. On the host that spares a dense result and its copy."""
        if len(self.plan) != 1 or not all(grad.dtype is torch.float32 for grad in self.grads):
            return None
        (algorithm,) = self.plan
        on_host = all(grad.device.type == "cpu" for grad in self.grads)
        server = server_of(self.compressor, self.transport.world_size)
        whole = {
            "factored": True,
            "two_phase": on_host and decodes_anything(server),
            "one_phase": on_host and len(self.grads) == 1 and sums_or_raises(self.compressor),
        }
        return algorithm if whole.get(algorithm) else None

    def _in_tiers(
        self,
        tier: Transport,
        local: Transport,
        flat: list[Tensor],
        places: list[Place],
        undo: list[Undo],
        memory: Scratch,
    ) -> list[Tensor]:
        parts = reduce_scatter(local, flat, self.cuts)
        # The ranks across nodes hold parts of one size: those of none have nothing to send.
        held = {chosen: [i for i in those if parts[i].numel()] for chosen, those in self.plan.items()}
        parts = self._reduced(tier, held, parts, places, undo, memory)
        return all_gather(local, parts, [grad.dtype for grad in self.grads], self.cuts)

    def _reduced(
        self,
        transport: Transport,
        plan: dict[str, list[int]],
        grads: list[Tensor],
        places: list[Place],
        undo: list[Undo],
        memory: Scratch,
    ) -> list[Tensor]:
        """The reduced `grads`, flat, in their order; those that are in no plan as they are."""
        results = list(grads)
        for chosen, members in plan.items():
            if members:
                some = [(grads[i], self.states[i], places[i], undo[i], self.bound[i]) for i in members]
                for i, result in zip(members, self._by(chosen, transport, some, memory), strict=True):
                    results[i] = result
        return results

    def _by(self, algorithm: str, transport: Transport, some: list[Member], memory: Scratch) -> list[Tensor]:
        """Tensors that share messages."""
        grads = [grad for grad, *_ in some]
        if algorithm in ("one_phase", "two_phase", "factored"):
            results = [memory.empty((grad.numel(),), torch.float32, grad.device) for grad in grads]
            self._begin(algorithm, transport, some, results, memory)()
            return results
        for *_, undo, _ in some:
            undo.worker.keep()
            undo.server.keep()
        if algorithm == "dense":
            states = [state for _, state, *_ in some]
            errs = _worker_residuals(some)
            measured = self._measure(some, errs, lossy=False)
            results = dense(transport, self.compressor, grads, states, self._divisor, memory)
        else:
            self._fold(transport, some)
            errs, counters = _residuals(some)
            measured = self._measure(some, errs)
            given = transport, self.compressor, grads, errs, counters
            results = seeded(*given, self._divisor, memory)
        measured.end()
        return results

    def _factored(
        self, transport: Transport, some: list[Member], results: list[Tensor], memory: Scratch
    ) -> Callable[[], None]:
        """As `_begin`; states are written to `late`."""
        errs, counters = _residuals(some)
        filled = [i for i, (grad, *_) in enumerate(some) if grad.numel()]
        if not filled:
            return partial(_write, [], [])
        if len(filled) < len(some):
            some, results = [some[i] for i in filled], [results[i] for i in filled]
            errs, counters = [errs[i] for i in filled], [counters[i] for i in filled]
        grads, states = [grad for grad, *_ in some], [state for _, state, *_ in some]
        measured = self._measure(some, errs)
        bound = [cast("Factored", compressor) for *_, compressor in some]
        bases = [None if state is None else state.basis for state in states]
        reduced = factored(transport, bound, grads, errs, bases, self._divisor, memory)
        write_residuals = reduced.settling(errs, counters)

        def settle() -> None:
            write_residuals()
            for state, basis in zip(states, reduced.bases, strict=True):
                if state is not None:
                    state.basis = basis
            measured.end()

        self.late.append(settle)
        return partial(reduced.decode_, results)

    def _measure(self, some: list[Member], errs: list[Tensor | None], *, lossy: bool = True) -> Measured:
        """Begins statistics, which are published when all is done."""
        grads, states = [grad for grad, *_ in some], [state for _, state, *_ in some]
        self.measured.append(Measured(self.compressor, grads, errs, states, lossy=lossy))
        return self.measured[-1]

    def _begin(
        self,
        algorithm: str,
        transport: Transport,
        some: list[Member],
        results: list[Tensor],
        memory: Scratch,
        straight: bool = False,
    ) -> Callable[[], None]:
        """One or two phases, or factors; what this returns decodes what is left to `results`, which may be
        the gradients themselves: `straight`."""
        self._fold(transport, some, two_phase=algorithm == "two_phase")
        if algorithm == "factored":
            return self._factored(transport, some, results, memory)
        grads, (errs, counters) = [grad for grad, *_ in some], _residuals(some)
        measured = self._measure(some, errs)
        given, undo = (transport, self.compressor, grads), [undo for *_, undo, _ in some]
        ends = results, self._divisor, self.piece_numel
        keep = [each.grad.keep for each in undo] if straight else None
        if algorithm == "one_phase":
            finish = one_phase(*given, errs, counters, undo, *ends, memory=memory, keep=keep)
            measured.end()
            return finish
        for _, state, (_, bound), *_ in some:
            if state is not None and bound is not None:
                state.divisor = self._divisor
        servers = [
            None if state is None or bound is None else state.server_for(bound[0], grad.device, bound[1])
            for grad, state, (_, bound), *_ in some
        ]
        finish = two_phase(*given, Residuals(errs, servers, counters, undo), *ends, memory=memory, keep=keep)
        measured.end()
        return finish

    def _fold(self, transport: Transport, some: list[Member], two_phase: bool = False) -> None:
        """Server residuals of calls before this one, which this one does not go on with."""
        for grad, state, (shard, bound), *_ in some:
            if state is not None and state.server is not None:
                kept = bound[1] if two_phase and bound is not None else None
                fold_server(state, grad, shard, kept, transport, self._divisor)

    @property
    def _divisor(self) -> int:
        """The mean is taken once, over the ranks of all tiers."""
        return self.transport.world_size if self.signature.reduction == "avg" else 1


def _residuals(some: list[Member]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of each tensor the worker residual and the counter."""
    errs = [None if state is None else state.worker_for(grad, shard) for grad, state, (shard, _), *_ in some]
    counters = [None if state is None else state.nonfinite_for(grad.device) for grad, state, *_ in some]
    return errs, counters


def _worker_residuals(some: list[Member]) -> list[Tensor | None]:
    """Those that there are, of what is sent dense: none are made."""
    return [
        None if state is None or state.worker is None else state.worker_for(grad, state.shard)
        for grad, state, *_ in some
    ]


def _to_the_end(finish: Callable[[], None]) -> Exception | None:
    """Calls it until nobody has interrupted it; returns what it failed by."""
    while True:
        try:
            finish()
            return None
        except BaseException as error:
            if isinstance(error, Exception):
                return error


def _write(grads: list[Tensor], results: list[Tensor]) -> None:
    for grad, result in zip(grads, results, strict=True):
        copy_(grad, result)
