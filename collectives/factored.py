"""Factored: two all-reduces of thin matrices.

What a rank decodes, left^T right, is linear in right where left is that of all ranks: so factors are added up
as they are, without decoding, and what they send does not grow with the number of ranks.

Source: Vogels, Karimireddy and Jaggi, "PowerSGD" (NeurIPS 2019), Algorithms 1 and 2; but residuals are what
a rank's own message leaves, not what the average does: those would grow without bound where data are unlike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gck.average import average_
from gck.collectives.cost import padded
from gck.collectives.hierarchical import all_gather, cut, reduce_scatter
from gck.collectives.scratch import Scratch
from gck.collectives.transports import Transport
from gck.factored import Factored, FactoredSteps

__all__ = ["Reduced", "factored"]

LINE = 16  # numbers of fp32 at whose multiples what is as large as a gradient begins


@dataclass
class Reduced:
    """What ranks have agreed on: nothing of a state or a gradient has been written so far.

    Attributes:
        bases: for the next step.
        cleared: (tensors,) int64.
    """

    steps: FactoredSteps
    accs: list[Tensor]
    lefts: list[Tensor]
    own: list[Tensor]
    rights: list[Tensor]
    bases: list[Tensor]
    cleared: Tensor

    def decode_(self, outs: Sequence[Tensor]) -> None:
        """The results, (numel,) fp32 each."""
        self.steps.product_(outs, self.lefts, self.rights)

    def settling(
        self, errs: Sequence[Tensor | None], counters: Sequence[Tensor | None]
    ) -> Callable[[], None]:
        """What makes errs the residuals, and adds to counters how many were not finite, and are zeros. It may
        be called again; of what has no residual acc is spoilt, which nobody reads."""
        places = [i for i, counter in enumerate(counters) if counter is not None]
        counts = [counter for counter in counters if counter is not None]
        outs = [acc if err is None else err for acc, err in zip(self.accs, errs, strict=True)]
        if not counts:
            return lambda: None
        before = torch.cat([count.view(1) for count in counts])

        def settle() -> None:
            self.cleared.zero_()
            self.steps.settle_(self.accs, outs, self.lefts, self.own, self.cleared)
            cleared = self.cleared.unbind()
            torch._foreach_copy_(counts, list((before + torch.stack([cleared[i] for i in places])).unbind()))

        return settle


def factored(
    transport: Transport,
    compressors: Sequence[Factored],
    grads: Sequence[Tensor],
    errs: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    divisor: int,
    memory: Scratch,
) -> Reduced:
    """Reduces `grads`, none of them empty. All share messages, and each step is one call for all of them.

    Steps:
        1. Of every gradient and its worker residual: acc, and left, what acc has of the basis.
        2. All-reduce the lefts, in rank order and in fp32; all ranks make the same orthonormal rows of them.
        3. right is what acc has of these.
        4. All-reduce the rights; divide once by `divisor`, the ranks of all tiers, for a mean.
        5. When nothing can fail any more, but for want of memory: decode once, and the residual is acc less
           left^T right, of one's own right. Until then it is as it was.

    Args:
        compressors: one, bound to the shape of each gradient.
        errs: None: no residual.
        bases: None: the first one.
    """
    numels, device = [grad.numel() for grad in grads], grads[0].device
    steps = compressors[0].together(compressors, numels)
    shapes = [shape for shape, _ in steps.factors], [shape for _, shape in steps.factors]
    rooms = [-(-numel // LINE) * LINE for numel in numels]
    accs = [
        room[:numel]
        for room, numel in zip(
            memory.empty((sum(rooms),), torch.float32, device).split(rooms), numels, strict=True
        )
    ]
    # x + (-0.0) is x for every x
    read = [acc.fill_(-0.0) if err is None else err for acc, err in zip(accs, errs, strict=True)]
    given = [
        compressor.basis(numel, device) if basis is None else basis.to(device)
        for compressor, numel, basis in zip(compressors, numels, map(_usable, bases, shapes[1]), strict=True)
    ]
    flat, lefts = _side_by_side(shapes[0], device, memory)
    steps.project_(grads, read, given, accs, lefts)
    lefts = _views(_sum(transport, flat), shapes[0])
    steps.orthonormalise_(lefts)
    flat, own = _side_by_side(shapes[1], device, memory)
    steps.back_project_(accs, lefts, own)
    flat = _sum(transport, flat)
    rights = _views(flat, shapes[1])
    following = steps.next_basis(given, rights)
    if divisor != 1:
        average_(flat, divisor)
    cleared = torch.zeros(len(grads), dtype=torch.int64, device=device)
    return Reduced(steps, accs, lefts, own, rights, following, cleared)


def _usable(basis: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A basis that a step can start from: any of fp32 and this shape, since ranks need not have the same."""
    fits = isinstance(basis, Tensor) and basis.dtype == torch.float32 and tuple(basis.shape) == shape
    if not fits or basis is None or basis.layout is not torch.strided or not basis.data_ptr():
        return None
    return basis.detach().contiguous()


def _side_by_side(
    shapes: Sequence[tuple[int, int]], device: torch.device, memory: Scratch
) -> tuple[Tensor, list[Tensor]]:
    """Room for factors of these shapes in one vector, each at a multiple of 16 bytes; zeros."""
    flat = memory.zeros((sum(padded(rank * length) for rank, length in shapes),), torch.float32, device)
    return flat, _views(flat, shapes)


def _views(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    counts = [rank * length for rank, length in shapes]
    parts = zip(flat.split(list(map(padded, counts))), counts, shapes, strict=True)
    return [(part if len(part) == count else part[:count]).view(shape) for part, count, shape in parts]


def _sum(transport: Transport, flat: Tensor) -> Tensor:
    """The sum of all ranks' vectors, in rank order; a new tensor, also where there is one rank."""
    cuts = cut([flat.numel()], None, transport.world_size)
    (part,) = reduce_scatter(transport, [flat], cuts)
    (total,) = all_gather(transport, [part.add(0.0)], [torch.float32], cuts)
    return total
