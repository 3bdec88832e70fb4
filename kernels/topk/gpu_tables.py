"""Which program works on what, where one call compresses many tensors.

A selection picks k entries from one or more tensors, its members, which follow each other in the call. Every
program finds its tensor or its selection in a map, and the rest in a table with a row a tensor and one with
a row a selection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gck.kernels.common.native import DTYPE_CODE
from gck.kernels.common.tables import KeptTables, to_device
from gck.kernels.topk import gpu_guess
from gck.kernels.topk.gpu_guess import LINE
from gck.kernels.topk.gpu_select import GROUP, ROWS
from gck.kernels.topk.gpu_stream import TILE

LONG_RUNS_FROM = 64  # tiles of a tensor from which a run is ROWS of them
PART_TILES = 16  # tiles of a tensor for each program of `refine`

# Words of a tensor's row. Tiles, runs and parts are numbered over all tensors.
GRAD = tl.constexpr(0)  # addresses
ERR = tl.constexpr(1)
NUMEL = tl.constexpr(2)
DTYPE = tl.constexpr(3)
ORIGIN = tl.constexpr(4)  # index of its first element
SELECTION = tl.constexpr(5)
FIRST_TILE = tl.constexpr(6)
FIRST_RUN = tl.constexpr(7)
RUN_TILES = tl.constexpr(8)
FIRST_PART = tl.constexpr(9)
PARTS = tl.constexpr(10)
TENSOR = tl.constexpr(11)

# Words of a selection's row.
K = tl.constexpr(0)
TOTAL = tl.constexpr(1)  # elements
CAPACITY = tl.constexpr(2)
LIST_AT = tl.constexpr(3)
VALUES = tl.constexpr(4)  # in bytes after those of the first selection
INDICES = tl.constexpr(5)
S_FIRST_TILE = tl.constexpr(6)
S_FIRST_RUN = tl.constexpr(7)
S_FIRST_GROUP = tl.constexpr(8)
S_FIRST_PART = tl.constexpr(9)
S_PARTS = tl.constexpr(10)
FIRST_BLOCK = tl.constexpr(11)  # of its sample's lines
BLOCKS = tl.constexpr(12)  # 0: nothing is sampled, and nothing listed
LINES = tl.constexpr(13)
STRIDE = tl.constexpr(14)  # of the lines, in lines
DENSITY = tl.constexpr(15)  # k / total, the bits of an fp32
CHOICE = tl.constexpr(16)


class Choice(NamedTuple):
    """A selection: how many of its members' elements it keeps, and where they go, in bytes after the first
    selection's."""

    k: int
    members: int
    values: int
    indices: int


@dataclass(frozen=True)
class Plan:
    """The tables and maps of one call, and the sizes of its grids."""

    groups: int
    listed: int  # the capacity of all lists together
    aligned: bool
    host: Tensor  # what a captured copy reads at each replay
    tensors: Tensor
    choices: Tensor
    tensor_of_tile: Tensor
    tensor_of_run: Tensor
    tensor_of_part: Tensor
    choice_of_block: Tensor


_plans: KeptTables[Plan] = KeptTables()


def plan_for(grads: Sequence[Tensor], errs: Sequence[Tensor], choices: Sequence[Choice]) -> Plan:
    """The plan of a call with these tensors, none of them empty."""
    device = grads[0].device
    # A tuple of each, because one for each tensor takes several times as long to make and to hash.
    addresses = tuple([x.data_ptr() for x in grads]), tuple([x.data_ptr() for x in errs])
    shapes = tuple([x.numel() for x in grads]), tuple([x.dtype for x in grads])
    key = (device, *addresses, *shapes, tuple(choices), TILE)
    places = zip(*addresses, *shapes, strict=True)
    return _plans.get(key, device, lambda: _make(list(places), choices, device))


Place = tuple[int, int, int, torch.dtype]  # addresses of a gradient and its residual, elements, dtype


def _make(places: Sequence[Place], choices: Sequence[Choice], device: torch.device) -> Plan:
    tensors: list[list[int]] = []
    rows: list[list[int]] = []
    tiles: list[int] = []
    runs: list[int] = []
    parts: list[int] = []
    blocks: list[int] = []
    groups = listed = 0
    for row, choice in enumerate(choices):
        first_tile, first_run, first_part = sum(tiles), sum(runs), sum(parts)
        total = 0
        for grad, err, numel, dtype in places[len(tensors) : len(tensors) + choice.members]:
            count = -(-numel // TILE)
            run_tiles = ROWS if count >= LONG_RUNS_FROM else 1
            part_count = -(-count // PART_TILES)
            position = [sum(tiles), sum(runs), run_tiles, sum(parts), part_count]
            tensors.append([grad, err, numel, DTYPE_CODE[dtype], total, row, *position])
            tiles.append(count)
            runs.append(-(-count // run_tiles))
            parts.append(part_count)
            total += numel
        listing = gpu_guess.listing(total, choice.k)
        lines = gpu_guess.sample_lines(total) if listing else 0
        capacity = gpu_guess.list_capacity(total, choice.k, lines) if listing else 0
        stride = (sum(tiles) - first_tile) * TILE // LINE // max(lines, 1)
        line_blocks = gpu_guess.sample_blocks(lines)
        density = struct.unpack("i", struct.pack("f", choice.k / total))[0]
        place = [choice.k, total, capacity, listed, choice.values, choice.indices]
        first = [first_tile, first_run, groups, first_part, sum(parts) - first_part]
        rows.append([*place, *first, sum(blocks), line_blocks, lines, stride, density])
        blocks.append(line_blocks)
        groups += -(-(sum(runs) - first_run) * ROWS // GROUP)
        listed += -(-capacity // LINE) * LINE
    maps = [_owners(counts) for counts in (tiles, runs, parts, blocks)]
    flat = [torch.tensor(table, dtype=torch.int64, device="cpu").view(-1) for table in (tensors, rows)] + maps
    host, copy = to_device(torch.cat(flat), device)
    split = copy.split([len(part) for part in flat])
    aligned = all(grad % 16 == 0 and err % 16 == 0 for grad, err, _, _ in places)
    return Plan(groups, listed, aligned, host, *split)


def _owners(counts: Sequence[int]) -> Tensor:
    """The number of the owner of each of the programs that are counted."""
    owners = torch.arange(len(counts), device="cpu")
    return torch.repeat_interleave(owners, torch.tensor(counts, dtype=torch.int64, device="cpu"))
