"""What an all-reduce costs: the bytes and messages of a rank, and the time that a link takes for them.

Functions of the configuration alone, so that ranks agree without asking one another. The predicted time has
three terms, of which a caller knows what its links and processors are:

    rounds * latency        messages that wait for one another; see `Cost.rounds` and `Link.latency`
    nbytes / bandwidth      payloads, at what a link has left when headers are paid: see `Link.ethernet`
    compute                 compressing, reducing and decoding: `gck.collectives.measure_compute`

A link that has rested may let some bytes pass at once: `Link.burst`. The terms add up, because the steps of
an all-reduce in one piece wait for one another: a rank can't send what it has not compressed. In pieces,
compute and bytes overlap. Left out: what a group agrees on once (the handshake of a new configuration,
connections), what TCP does until it knows the link, packets that are lost, and ranks that start late.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH"
(2005), section 3, for the model of latency and bandwidth; Chan, Heimlich, Purkayastha and van de Geijn,
"Collective Communication: Theory, Practice, and Experience" (2007), section 4, for the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gck.collectives.transports.rotation import ROTATE_FROM
from gck.compressor import Compressor, check_compressor, is_seeded, server_of, shard_numel
from gck.errors import ArgumentError
from gck.factored import is_factored
from gck.values import make_plain, plain_int, plain_real
from gck.wire import Layout

__all__ = [
    "Cost",
    "HierarchicalCost",
    "Link",
    "all_reduce_cost",
    "break_even_density",
    "cheapest_algorithm",
    "choose_algorithm",
    "hierarchical_cost",
    "node_unit",
    "padded",
]

TCP_HEADERS = 20 + 20 + 12  # of IPv4, of TCP, and its timestamps
FRAME_HEADER = 14


@dataclass(frozen=True)
class Link:
    """What every rank is connected by.

    Attributes:
        latency: seconds from the start of a message to its arrival, beside its bytes: as good as always that
            of the software, which wakes threads on either side. Measure it: a round of small messages.
        bandwidth: bytes a second, in each direction, of what is sent; not of packets with their headers.
        burst: bytes that pass at once after a rest, as a token bucket (tc's tbf, a cloud's limit) lets them.

    Raises:
        ArgumentError: latency or burst below 0, or bandwidth not above 0.
    """

    latency: float
    bandwidth: float
    burst: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self, (), ("latency", "bandwidth", "burst"))
        if not self.burst >= 0:
            raise ArgumentError(f"Link: burst must be at least 0 bytes, got {self.burst}")
        if not self.latency >= 0:
            raise ArgumentError(f"Link: latency must be at least 0 seconds, got {self.latency}")
        if not self.bandwidth > 0:
            raise ArgumentError(f"Link: bandwidth must be above 0 bytes a second, got {self.bandwidth}")

    @classmethod
    def ethernet(
        cls, bits_per_second: float, latency: float = 0.0, mtu: int = 1500, burst: float = 0.0
    ) -> Link:
        """A link of Ethernet, over which TCP sends as much as it receives: 1448 of 1547 bytes are payload.

        That is where mtu is 1500: a frame has 14 bytes besides its packet, a packet 20 of IPv4 and 32 of TCP
        with timestamps; and for every other packet that comes in, an acknowledgement of 66 goes out. These
        are what Linux counts and shapes (`tc`); on a wire, preamble, checksum and gap take 24 more a frame.

        Raises:
            ArgumentError: bits_per_second is no number; mtu of 52 bytes or less; those of `Link`.
        """
        bits_per_second, mtu = plain_real(bits_per_second), plain_int(mtu)
        if not isinstance(bits_per_second, int | float):
            raise ArgumentError(f"Link.ethernet: bits_per_second must be a number, got {bits_per_second!r}")
        if mtu <= TCP_HEADERS:
            raise ArgumentError(f"Link.ethernet: mtu must be above {TCP_HEADERS} bytes, got {mtu}")
        acknowledgement = (FRAME_HEADER + TCP_HEADERS) / 2  # for each packet its half
        share = (mtu - TCP_HEADERS) / (mtu + FRAME_HEADER + acknowledgement)
        return cls(latency, bits_per_second / 8 * share, burst)


@dataclass(frozen=True)
class Cost:
    """What one rank sends in an all-reduce; it receives as much.

    Attributes:
        algorithm: "dense", "one_phase", "two_phase", "seeded" or "factored".
        nbytes: bytes sent, with the padding of payloads; headers of messages are left out.
        messages: how many messages these are.
        rounds: how many of them wait for one another: a ring passes on what it has received; an all-to-all
            sends one message a round, or all at once where they are shorter than `ROTATE_FROM`, 16 KiB.
    """

    algorithm: str
    nbytes: int
    messages: int
    rounds: int

    def seconds(self, link: Link, compute: float = 0.0, pieces: int = 1) -> float:
        """rounds * latency + (nbytes - burst) / bandwidth + compute, of which pieces overlap.

        Args:
            compute: seconds that a rank takes to compress, reduce and decode; 0: nothing but the link is in
                the way.
            pieces: that the vector goes in; of the shorter of bytes and compute one in so many is seen.

        Raises:
            ArgumentError: pieces below 1.
        """
        if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1:
            raise ArgumentError(f"Cost.seconds: pieces must be a positive int, got {pieces!r}")
        sent = max(0.0, self.nbytes - link.burst) / link.bandwidth
        return self.rounds * link.latency + max(sent, compute) + min(sent, compute) / pieces


@dataclass(frozen=True)
class HierarchicalCost:
    """What one rank sends in either tier of a `HierarchicalGroup`.

    Attributes:
        local: inside its node.
        cross: to other nodes.
    """

    local: Cost
    cross: Cost

    def seconds(self, fast: Link, slow: Link) -> float:
        """The time of both tiers, one after the other; every rank of a node has a `slow` link of its own."""
        return self.local.seconds(fast) + self.cross.seconds(slow)


def all_reduce_cost(
    compressor: Compressor, numels: Sequence[int], world_size: int, algorithm: str = "auto"
) -> Cost:
    """What each rank sends to reduce tensors of `numels` elements, sharing messages, over `world_size` ranks.

    One phase gathers payloads around a ring; two phases send a shard to every rank, and gather, as seeded
    does with values, and factored with either factor in turn; dense is a ring of fp32.

    Raises:
        DtypeError: compressor is none.
        ArgumentError: world_size below 1; algorithm unknown, or "two_phase" of a compressor without chunks;
            numels is a number.
    """
    check_compressor("all_reduce_cost", compressor)
    _check_numels("all_reduce_cost", numels)
    world_size = plain_int(world_size)
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ArgumentError(f"all_reduce_cost: world_size must be a positive int, got {world_size!r}")
    if algorithm == "auto":
        algorithm = cheapest_algorithm(compressor, numels, world_size)
    others, unit = world_size - 1, compressor.shard_unit
    if algorithm == "dense":
        # Two passes around the ring, each with all but one of W pieces.
        return Cost(algorithm, 2 * 4 * sum(numels) * others // world_size, 2 * others, 2 * others)
    if algorithm == "one_phase" and not is_factored(compressor):
        return Cost(algorithm, others * _nbytes(compressor, numels, 1), others, others)
    if algorithm == "two_phase" and unit is not None:
        shards = _both_phases(compressor, numels, world_size)
        swaps = _swaps(_nbytes(compressor, numels, world_size), others)
        return Cost(algorithm, others * shards, 2 * others, swaps + others)
    if algorithm == "seeded" and is_seeded(compressor):
        first, second = _values_and_sums(compressor, numels, world_size)
        return Cost(algorithm, others * (first + second), 2 * others, _swaps(first, others) + others)
    if algorithm == "factored" and is_factored(compressor):
        left, right = _factors(compressor, numels, world_size)
        # A sum of either, in turn: a part from every rank, and its sum to every rank.
        rounds = _swaps(left, others) + _swaps(right, others) + 2 * others
        return Cost(algorithm, others * 2 * (left + right), 4 * others, rounds)
    raise ArgumentError(f'all_reduce_cost: algorithm "{algorithm}" is unknown, or not for {compressor}')


def _swaps(nbytes: int, others: int) -> int:
    """Rounds of an all-to-all with messages of so many bytes."""
    return others if nbytes >= ROTATE_FROM else min(1, others)


def hierarchical_cost(
    compressor: Compressor,
    numels: Sequence[int],
    nodes: int,
    local_world_size: int,
    algorithm: str = "auto",
    element_nbytes: int = 4,
) -> HierarchicalCost:
    """What a rank sends to reduce tensors of `numels` elements over nodes of `local_world_size` ranks each.

    Inside a node, an all-to-all of shards and a gather; across nodes, what a flat all-reduce of `nodes` ranks
    sends for a shard. Where a tensor is not whole shards long, ranks with a shorter one send less.

    Args:
        algorithm: across nodes; "auto" chooses by the bytes that travel there.
        element_nbytes: of the gradient's dtype, in which it travels inside a node.

    Raises:
        ArgumentError: as for `all_reduce_cost`.
    """
    _check_numels("hierarchical_cost", numels)
    for value in (nodes, local_world_size):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(
                f"hierarchical_cost: nodes and local_world_size must be positive ints, got {nodes} "
                f"and {local_world_size}"
            )
    ways = local_world_size, nodes, algorithm
    units = [node_unit(compressor, numel, *ways) or 1 for numel in numels]
    shards = [shard_numel(numel, unit, local_world_size) for numel, unit in zip(numels, units, strict=True)]
    others, nbytes = local_world_size - 1, sum(-(-numel * element_nbytes // 16) * 16 for numel in shards)
    local = Cost("dense", 2 * others * nbytes, 2 * others, _swaps(nbytes, others) + others)
    return HierarchicalCost(local, all_reduce_cost(compressor, shards, nodes, algorithm))


def node_unit(
    compressor: Compressor, numel: int, local_world_size: int, nodes: int, algorithm: str
) -> int | None:
    """Elements that the ranks of a node must not cut: a chunk, or a row of a matrix that goes by its factors.
    Others may have few and long rows, and shards of whole ones would be far from equal. None: single ones.

    What "auto" does counts where all is sent dense, too: so that residuals which there are fit.
    """
    if not is_factored(compressor):
        return compressor.shard_unit
    columns = compressor.columns
    if local_world_size == 1 or algorithm == "factored":
        return columns
    shard = shard_numel(numel, columns, local_world_size)
    return columns if cheapest_algorithm(compressor, [shard], nodes) == "factored" else None


def choose_algorithm(compressor: Compressor, numels: Sequence[int], world_size: int) -> str:
    """The algorithm that sends the fewest bytes a rank; a function of the arguments alone.

    One phase sends (W - 1) payloads, two phases (W - 1) / W of a worker's and an owner's, seeded and factored
    as much of the values and of their sums in fp32, a dense ring 8 (W - 1) / W bytes an element. On a tie the
    simpler one wins; in a world of one nothing is sent, so nothing is compressed. A compressor that looks at
    shapes has each tensor's from `gck.factored.shaped`, or `LowRank.for_shape`.

    Raises:
        DtypeError: compressor is none.
        ArgumentError: numels is a number.
    """
    check_compressor("choose_algorithm", compressor)
    _check_numels("choose_algorithm", numels)
    return cheapest_algorithm(compressor, numels, world_size)


def cheapest_algorithm(compressor: Compressor, numels: Sequence[int], world_size: int) -> str:
    """`choose_algorithm` of what was checked: a reduction asks for each of its tensors at every step."""
    if world_size == 1:
        return "dense"
    # All in units of (W - 1) / W bytes, so that they stay integers.
    volumes = {"dense": 8 * sum(numels)}
    if is_factored(compressor):
        volumes["factored"] = world_size * 2 * sum(_factors(compressor, numels, world_size))
    else:
        volumes["one_phase"] = world_size * _nbytes(compressor, numels, 1)
    if compressor.shard_unit is not None:
        volumes["two_phase"] = world_size * _both_phases(compressor, numels, world_size)
    if is_seeded(compressor):
        volumes["seeded"] = world_size * sum(_values_and_sums(compressor, numels, world_size))
    return min(volumes, key=volumes.__getitem__)


def break_even_density(world_size: int, entry_nbytes: float = 8) -> float:
    """The density k / numel from which a gather of sparse payloads sends as much as a dense fp32 ring.

    (W - 1) entry_nbytes k against 8 (W - 1) / W numel bytes: 8 / (W entry_nbytes), at most 1.

    Args:
        entry_nbytes: bytes of a value and its index; 8 with fp32 and int32, 6 with bf16 and int32.

    Raises:
        ArgumentError: world_size or entry_nbytes out of range.
    """
    if not (world_size >= 1 and entry_nbytes > 0):
        raise ArgumentError(
            f"break_even_density: world_size must be at least 1 and entry_nbytes above 0, got {world_size} "
            f"and {entry_nbytes}"
        )
    return min(1.0, 8 / (world_size * entry_nbytes))


def _check_numels(function: str, numels: object) -> None:
    if isinstance(numels, int):
        raise ArgumentError(f"{function}: numels must be a sequence, an int for each tensor, got {numels}")


def _both_phases(compressor: Compressor, numels: Sequence[int], world_size: int) -> int:
    """Bytes of one shard's bodies of all tensors, the workers' and the owner's."""
    server = server_of(compressor, world_size)
    return _nbytes(compressor, numels, world_size) + _nbytes(server, numels, world_size)


def _values_and_sums(compressor: Compressor, numels: Sequence[int], world_size: int) -> tuple[int, int]:
    """Bytes of a part of all tensors' values, and of their sums."""
    fields = [field for numel in numels for field in compressor.layout(numel).fields]
    first = sum(_part(field.count, field.dtype, world_size) for field in fields)
    return first, sum(_part(field.count, torch.float32, world_size) for field in fields)


def padded(count: int) -> int:
    """Numbers of fp32 that so many take up among others: up to a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _factors(compressor: Compressor, numels: Sequence[int], world_size: int) -> list[int]:
    """Bytes of a rank's part of all tensors' left, and of their right."""
    layouts = [compressor.layout(numel).fields for numel in numels]
    totals = (sum(padded(fields[i].count) for fields in layouts) for i in (0, 1))
    return [_part(total, torch.float32, world_size) for total in totals]


def _part(count: int, dtype: torch.dtype, world_size: int) -> int:
    """Bytes of a rank's part of so many values, a multiple of 16."""
    return Layout.of((dtype, shard_numel(count, 1, world_size))).nbytes


def _nbytes(compressor: Compressor, numels: Sequence[int], shards: int) -> int:
    """Bytes of one shard's bodies of all tensors."""
    unit = compressor.shard_unit
    return sum(compressor.layout(shard_numel(numel, unit, shards)).nbytes for numel in numels)
