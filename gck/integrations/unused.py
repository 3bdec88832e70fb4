"""Parameters that no rank has used in a step, where DDP looks for them (`find_unused_parameters`).

DDP discards what a hook makes of their gradients, which it has filled with zeros, and does not tell. A
residual that was sent for one of them would be lost. So ranks tell one another first whose gradients have
anything in them, and those that have nothing anywhere are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gck.collectives import Transport
from gck.collectives.failure import give_up
from gck.collectives.handshake import Signature, agree
from gck.collectives.transports.checked import Checked
from gck.integrations.groups import grouped, prepare_groups
from gck.integrations.hook_state import HookState

__all__ = ["reduce_used", "used_somewhere"]


def reduce_used(
    function: str,
    state: HookState,
    pairs: Sequence[tuple[Tensor, Tensor]],
    transport: Transport,
    reduce_all: Callable[[], None],
    *,
    warm_up: bool,
) -> None:
    """Reduces the gradients that have an entry on some rank that is not zero; the others become +0.

    Args:
        function: name of the public function, for texts.
        pairs: parameters and their gradients.
        transport: that the caller has the turn of.
        reduce_all: what `prepare_groups` has made of all of them.
        warm_up: as for `grouped`.

    Raises:
        Those of `gck.all_reduce_`; gradients and residuals are as they were.
    """
    try:
        names = state.names_of([parameter for parameter, _ in pairs])
        options = state.validate, state.checksum
        flags = used_somewhere(function, [grad for _, grad in pairs], names, transport, *options)
        used = [pair for pair, flag in zip(pairs, flags, strict=True) if flag]
        reduce = reduce_all
        if len(used) < len(pairs):
            groups = grouped(state, used, warm_up=warm_up)
            reduce = prepare_groups(function, state, groups, transport, state.step)
    except BaseException as error:
        give_up(transport, function, error)
        raise
    reduce()
    for (_, grad), flag in zip(pairs, flags, strict=True):
        if not flag:
            grad.zero_()  # a zero may have another sign on each rank


def used_somewhere(
    function: str,
    grads: Sequence[Tensor],
    names: Sequence[str],
    transport: Transport,
    validate: str = "first",
    checksum: bool = False,
) -> list[bool]:
    """Of each gradient, whether it has an entry on some rank that is not zero; the same on all ranks.

    Args:
        function, validate, checksum: as for `handshake.agree`: that ranks look for this is compared, too.
        grads: on one device, as many on all ranks; the host waits for it.
        names: of their parameters, where they are known.
        transport: that the caller has the turn of.

    Raises:
        Those of `handshake.agree`.
        CorruptPayloadError: the flags were damaged; with `checksum`, on all ranks.
        CollectiveError: as for any collective.
    """
    what = "looking for unused parameters" + (" with checksums" if checksum else "")
    numels, dtypes = [grad.numel() for grad in grads], [grad.dtype for grad in grads]
    signature = Signature("gather", what, tuple(dtypes), tuple(numels), "none", tuple(names))
    agree(transport, function, signature, validate, checksum)
    own = torch.stack([grad.any() for grad in grads]).to("cpu", torch.uint8)
    checked = Checked(transport, transport.calls.sequence) if checksum else transport
    flags: list[bool] = checked.all_gather_bytes(own).bool().any(0).tolist()
    return flags
