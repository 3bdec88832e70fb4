"""Two tiers: dense inside a node, where links are fast, and compressed across nodes, where they are slow.

Steps of an all-reduce, with N nodes of L ranks each:

    1. Reduce-scatter inside the node: every tensor is cut into L shards of whole chunks; rank l of a node has
       the sum of the node's shards l, added in rank order in fp32. Gradients travel in their own dtype.
    2. Across nodes, the N ranks that hold shard l reduce it by one of the flat algorithms, as a world of N.
       The worker residual of a rank is that of its shard of the node's sum, the server residual that of the
       part of the shard which the rank owns. The mean over all N * L ranks is taken here, once.
    3. All-gather inside the node, in the gradient's dtype: each rank of a node has the whole result.

All ranks have the same bits: those of shard l come out of one flat all-reduce. Across nodes a rank sends what
a flat all-reduce of N ranks sends for a vector of n / L elements.

Source: Jia et al., "Highly Scalable Deep Learning Training System with Mixed-Precision: Training ImageNet in
Four Minutes" (2018), section 3.3, for the dense hierarchy; a residual in each tier as in Tang et al.,
"DoubleSqueeze" (ICML 2019).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from gck.collectives.transports import CallLog, Transport, resolve
from gck.collectives.two_phase import Shards
from gck.error_feedback import ShardBinding
from gck.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveMismatchError,
    CorruptPayloadError,
    DtypeError,
    GckError,
)
from gck.values import plain_int, shown

__all__ = ["HierarchicalGroup", "all_gather", "bindings_of", "cut", "reduce_scatter"]

ALIGNMENT = 16  # bytes, of each tensor's place in a message


class HierarchicalGroup:
    """One rank's end of a group of nodes; implements `Transport`, so every collective of gck takes it.

    With it, `gck.all_reduce_` and the DDP hook reduce in two tiers, and `algorithm` says what happens across
    nodes. Residuals are those of a rank's shard: a state belongs to one topology. Compressors that count
    entries (`TopK(k=...)`, `RandomK(k=...)`) count them in a shard; a ratio means what it does elsewhere.

    All ranks make it at the same time, and compare the topology as they do. After a failure in one tier both
    are given up, so that ranks which wait in the other one learn of it.

    Args:
        local: this node's group, in any form that collectives take.
        cross: the group of the ranks that have this one's rank in their nodes, one of each node, in the same
            order of nodes everywhere.
        timeout: seconds that one wait may take. Default: the groups' own.

    Attributes:
        local, cross: the transports of the two tiers.

    Raises:
        ArgumentError: a group is none.
        CollectiveMismatchError: the groups are not rows and columns of one grid, as with nodes of unequal
            size; on all ranks, and the groups stay usable.
        PeerLostError, CollectiveTimeoutError: a peer died or did not come.
    """

    def __init__(self, local: Any, cross: Any, *, timeout: float | None = None) -> None:
        self.local: Transport = resolve(local, timeout)
        self.cross: Transport = resolve(cross, timeout)
        self._calls = CallLog()
        self._compare_topologies()

    @classmethod
    def from_group(
        cls, group: Any = None, *, local_world_size: int, timeout: float | None = None
    ) -> HierarchicalGroup:
        """Ranks [i * local_world_size, (i + 1) * local_world_size) of `group` are node i.

        Args:
            group: as all collectives take it; default: WORLD. It is split into the groups of both tiers.
            local_world_size: ranks of a node, the same on every node.

        Raises:
            DtypeError, ArgumentError: local_world_size is no positive int, or does not divide the world size.
            CollectiveMismatchError: ranks give different ones; on all ranks, and the group stays usable.
        """
        function = "HierarchicalGroup.from_group"
        local_world_size = plain_int(local_world_size)
        if isinstance(local_world_size, bool) or not isinstance(local_world_size, int):
            raise DtypeError(f"{function}: local_world_size must be an int, got {shown(local_world_size)}")
        if not 1 <= local_world_size < 2**31:
            raise ArgumentError(f"{function}: local_world_size must be at least 1, got {local_world_size}")
        transport = resolve(group, timeout)
        split = getattr(transport, "split", None)
        if split is None:
            raise ArgumentError(
                f"{function}: a {type(transport).__name__} cannot be split; make the groups of both tiers, "
                "and pass them to HierarchicalGroup"
            )
        given = [row[0] for row in _exchange(transport, [local_world_size])]
        if len(set(given)) > 1:
            raise CollectiveMismatchError(f"{function}: ranks have different local_world_size: {given}")
        if transport.world_size % local_world_size:
            raise ArgumentError(
                f"{function}: local_world_size must divide the world size, got {local_world_size} and "
                f"{transport.world_size}; nodes of unequal size are not supported"
            )
        node, local_rank = divmod(transport.rank, local_world_size)
        return cls(split(node), split(local_rank), timeout=timeout)

    @classmethod
    def from_mesh(cls, mesh: Any, *, timeout: float | None = None) -> HierarchicalGroup:
        """The rows of a torch DeviceMesh of two dimensions are nodes: (nodes, local).

        Raises:
            DtypeError: mesh is no DeviceMesh.
            ArgumentError: it has another number of dimensions, or this rank is not in it.
        """
        from torch.distributed.device_mesh import DeviceMesh

        function = "HierarchicalGroup.from_mesh"
        if not isinstance(mesh, DeviceMesh):
            raise DtypeError(f"{function}: mesh must be a DeviceMesh, got {shown(mesh)}")
        if mesh.ndim != 2:
            raise ArgumentError(
                f"{function}: mesh must have two dimensions, nodes and local, got {tuple(mesh.mesh.shape)}"
            )
        if mesh.get_coordinate() is None:
            raise ArgumentError(f"{function}: this rank is not in the mesh {mesh}")
        return cls(mesh.get_group(1), mesh.get_group(0), timeout=timeout)

    def __repr__(self) -> str:
        nodes, local = self.cross.world_size, self.local.world_size
        return f"<HierarchicalGroup rank {self.rank} of {nodes} nodes of {local}>"

    @property
    def rank(self) -> int:
        """cross.rank * local.world_size + local.rank"""
        return self.cross.rank * self.local.world_size + self.local.rank

    @property
    def world_size(self) -> int:
        return self.cross.world_size * self.local.world_size

    @property
    def timeout(self) -> float:
        return max(self.local.timeout, self.cross.timeout)

    @property
    def calls(self) -> CallLog:
        return self._calls

    def with_timeout(self, seconds: float) -> HierarchicalGroup:
        same = copy.copy(self)
        same.local, same.cross = self.local.with_timeout(seconds), self.cross.with_timeout(seconds)
        return same

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        # Across nodes first: each rank's bytes travel there once.
        with self.both_or_none():
            rows = self.local.all_gather_bytes(self.cross.all_gather_bytes(send).view(-1))
        grid = rows.view(self.local.world_size, self.cross.world_size, -1)
        return grid.transpose(0, 1).reshape(self.world_size, send.numel())

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        nodes, local = self.cross.world_size, self.local.world_size
        if send.dim() != 2 or send.shape[0] != nodes * local:
            raise ArgumentError(
                f"all_to_all_bytes: send must have {nodes * local} rows, got {tuple(send.shape)}"
            )
        with self.both_or_none():
            from_nodes = self.cross.all_to_all_bytes(send.reshape(nodes, -1)).view(nodes, local, -1)
            rows = self.local.all_to_all_bytes(from_nodes.transpose(0, 1).reshape(local, -1))
        return rows.view(local, nodes, -1).transpose(0, 1).reshape(send.shape)

    def all_reduce(self, tensor: Tensor) -> None:
        flat, cuts = tensor.view(-1), cut([tensor.numel()], None, self.local.world_size)
        with self.both_or_none():
            (part,) = reduce_scatter(self.local, [flat], cuts, dtype=tensor.dtype)
            self.cross.all_reduce(part)
            (result,) = all_gather(self.local, [part], [tensor.dtype], cuts)
        flat.copy_(result)

    def barrier(self) -> None:
        with self.both_or_none():
            self.local.barrier()
            self.cross.barrier()

    def synchronize(self) -> None:
        with self.both_or_none():
            self.local.synchronize()
            self.cross.synchronize()

    def abort(self, reason: str) -> None:
        try:
            self.local.abort(reason)
        finally:
            self.cross.abort(reason)

    @contextmanager
    def both_or_none(self) -> Iterator[None]:
        """A failure within the block is one of both tiers: who waits in either of them is released."""
        try:
            yield
        except (CollectiveError, CorruptPayloadError) as error:
            if isinstance(error, CorruptPayloadError):
                error.on_all_ranks = False  # of one tier's group alone: the others cannot follow
            with suppress(GckError):
                self.abort(f"the other tier failed: {error}")
            raise
        except BaseException as error:  # such as one for want of memory
            with suppress(GckError):
                self.abort(f"{type(error).__name__} between tiers")
            raise

    def _compare_topologies(self) -> None:
        """Raises on all ranks unless local groups are the rows of a grid, and cross groups its columns.

        What a node sees goes to the other nodes, and what they see to all ranks of the node, in messages of a
        size that no topology changes.
        """
        local, cross = self.local, self.cross
        mine = [local.rank, local.world_size, cross.rank, cross.world_size]
        with self.both_or_none():
            node = _exchange(local, mine)
            good = all(row[2:] == mine[2:] for row in node)
            nodes = _exchange(cross, [*mine, good])
            good = all(row[:2] == mine[:2] and row[4] for row in nodes)
            verdicts = _exchange(local, [good])
        if not all(good for (good,) in verdicts):
            raise CollectiveMismatchError(
                "HierarchicalGroup: local and cross groups are not the rows and columns of one grid, all "
                f"nodes of one size; this is rank {local.rank} of {local.world_size} in node {cross.rank} of "
                f"{cross.world_size}; (node, nodes) of its node's ranks: {[tuple(r[2:]) for r in node]}; "
                f"(local rank, ranks) of its peers on all nodes: {[tuple(r[:2]) for r in nodes]}"
            )


def cut(numels: Sequence[int], unit: int | None, local_world_size: int) -> list[Shards]:
    """How tensors are shared in a node: shards of whole units, of single elements where there is no unit."""
    return [Shards.of(numel, unit or 1, local_world_size) for numel in numels]


def bindings_of(group: HierarchicalGroup | None, cuts: Sequence[Shards]) -> list[ShardBinding | None]:
    """What the residuals of this rank belong to; None for the whole tensor: of a flat group, or of nodes
    of one rank, which are the same."""
    if group is None or group.local.world_size == 1:
        return [None] * len(cuts)
    local = group.local
    return [ShardBinding(shards.total, local.rank, local.world_size, shards.unit) for shards in cuts]


def reduce_scatter(
    local: Transport,
    tensors: Sequence[Tensor],
    cuts: Sequence[Shards],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The node's sum of this rank's shard of each flat tensor, in `dtype`, added in rank order.

    All tensors travel in one message, each in its own dtype. A node of one rank has the tensors themselves.
    """
    if local.world_size == 1:
        return list(tensors)
    sizes = _places(cuts, [tensor.dtype for tensor in tensors])
    send = torch.zeros(local.world_size, sum(sizes), dtype=torch.uint8, device=tensors[0].device)
    for tensor, shards, rows in zip(tensors, cuts, send.split(sizes, 1), strict=True):
        whole = shards.total // shards.numel if shards.numel else 0  # shards, and then perhaps a part of one
        full = tensor[: whole * shards.numel].view(whole, shards.numel)
        _as(rows[:whole], shards.numel, tensor.dtype).copy_(full)
        if shards.total > full.numel():
            rest = tensor[full.numel() :]
            _as(rows[whole], rest.numel(), tensor.dtype).copy_(rest)
    received = local.all_to_all_bytes(send) if sum(sizes) else send
    sums = []
    for tensor, shards, rows in zip(tensors, cuts, received.split(sizes, 1), strict=True):
        total = torch.zeros(shards.valid(local.rank), dtype=dtype, device=tensor.device)
        for row in rows:
            total += _as(row, total.numel(), tensor.dtype)
        sums.append(total)
    return sums


def all_gather(
    local: Transport, parts: Sequence[Tensor], dtypes: Sequence[torch.dtype], cuts: Sequence[Shards]
) -> list[Tensor]:
    """Flat tensors of `dtypes`, put together from the shards that the node's ranks have, in one message."""
    if local.world_size == 1:
        return list(parts)
    sizes = _places(cuts, dtypes)
    send = torch.zeros(sum(sizes), dtype=torch.uint8, device=parts[0].device)
    for part, dtype, place in zip(parts, dtypes, send.split(sizes), strict=True):
        _as(place, part.numel(), dtype).copy_(part)
    rows = local.all_gather_bytes(send) if sum(sizes) else send.expand(local.world_size, 0)
    results = []
    for shards, dtype, places in zip(cuts, dtypes, rows.split(sizes, 1), strict=True):
        # A copy in any case: what a transport returns may be shared between simulated ranks.
        received = _as(places, shards.numel, dtype)
        results.append(received.new_empty(received.shape).copy_(received).view(-1)[: shards.total])
    return results


def _places(cuts: Sequence[Shards], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes that a shard of each tensor takes in a message."""
    sizes = [shards.numel * dtype.itemsize for shards, dtype in zip(cuts, dtypes, strict=True)]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]


def _as(place: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """The first `numel` elements of bytes, or of each row of them."""
    if not numel:  # places of no bytes begin anywhere
        return place.new_empty((*place.shape[:-1], 0), dtype=dtype)
    return place[..., : numel * dtype.itemsize].view(dtype)


def _exchange(transport: Transport, numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers, in rank order."""
    send = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
    rows = transport.all_gather_bytes(send)
    transport.synchronize()
    return [row.view(torch.int64).tolist() for row in rows.cpu().contiguous()]
