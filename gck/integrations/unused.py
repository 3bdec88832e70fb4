"""Parameters that no rank has used in a step, where DDP looks for them (`find_unused_parameters`).

DDP discards what a hook makes of their gradients, which it has filled with zeros, and does not tell. A
residual that was sent for one of them would be lost. So ranks tell one another first whose gradients have
anything in them, and those that have nothing anywhere are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.collectives import Transport
from gck.collectives.failure import give_up
from gck.collectives.transports.checked import Checked

__all__ = ["used_somewhere"]


def used_somewhere(
    function: str, grads: Sequence[Tensor], transport: Transport, *, checksum: bool = False
) -> list[bool]:
    """Of each gradient, whether it has an entry on some rank that is not zero; the same on all ranks.

    Args:
        function: name of the public function, for texts.
        grads: on one device, as many on all ranks; the host waits for it.
        transport: that the caller has the turn of.
        checksum: as for `gck.all_reduce_`.

    Raises:
        Those of collectives; the group is given up unless all ranks have it.
    """
    try:
        own = torch.stack([grad.any() for grad in grads]).to("cpu", torch.uint8)
        if transport.world_size == 1:
            return own.bool().tolist()
        transport.calls.sequence += 1
        checked = Checked(transport, transport.calls.sequence) if checksum else transport
        return checked.all_gather_bytes(own).bool().any(0).tolist()
    except BaseException as error:
        give_up(transport, function, error)
        raise
