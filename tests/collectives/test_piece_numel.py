"""How many elements a piece has: what is given, and what is chosen for a link."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gck.collectives import Link, SimulatedGroup, all_reduce_, choose_piece_numel
from gck.errors import ArgumentError, DtypeError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.quantize import Quantize
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK


@pytest.mark.parametrize(
    ("piece_numel", "error", "text"),
    [
        (-1, ArgumentError, "all_reduce_: piece_numel must be at least 0, got -1"),
        (1.5, DtypeError, r"all_reduce_: piece_numel must be an int or None, got 1.5 \(float\)"),
        (True, DtypeError, r"all_reduce_: piece_numel must be an int or None, got True \(bool\)"),
    ],
)
def test_bad_piece_numel(piece_numel: Any, error: type[Exception], text: str) -> None:
    grad = torch.ones(64)
    with pytest.raises(error, match=text):
        all_reduce_(grad, None, Sign(32), SimulatedGroup(1).members[0], piece_numel=piece_numel)


@pytest.mark.parametrize(
    ("compressor", "numel", "world_size", "rate", "pieces"),
    [
        (Sign(256), 4 << 20, 4, 1e8, 4),  # messages of 148 KB
        (Sign(256), 25_000_000, 4, 1e8, 8),
        (Sign(256), 25_000_000, 2, 1e8, 8),  # one phase
        (Sign(256), 25_000_000, 4, 1e9, 1),  # the link is as fast as the processors
        (Sign(256), 100_000, 4, 1e6, 1),  # messages are small
        (Quantize(8), 1 << 20, 4, 1e9, 1),  # they take 2.2 ms
        (Quantize(8), 4 << 20, 4, 1e9, 3),
        (Quantize(8), 25_000_000, 4, 1e9, 8),
        (ChunkTopK(k=64, chunk_size=4096, value_bits=2), 4 << 20, 4, 1e8, 4),
        (TopK(ratio=0.01, decay=0.9), 25_000_000, 4, 1e8, 1),
        (Sign(256), 25_000_000, 1, 1e8, 1),
        (Sign(256), 0, 4, 1e8, 1),
    ],
)
def test_pieces_for_a_link(compressor: Any, numel: int, world_size: int, rate: float, pieces: int) -> None:
    assert choose_piece_numel(compressor, numel, world_size) == 0  # nobody knows the link
    link = Link.ethernet(rate)
    assert choose_piece_numel(compressor, numel, world_size, "cuda", link=link) == 0
    chosen = choose_piece_numel(compressor, numel, world_size, link=link)
    assert (-(-numel // chosen) if chosen else 1) == pieces


def test_a_compressor_without_chunks_that_previews_has_one_piece() -> None:
    """Which says that links are slow: the residual is updated while the message is on the wire."""
    compressor, numel = TopK(ratio=0.01), 25_000_000
    assert choose_piece_numel(compressor, numel, 4, link=Link.ethernet(1e8)) == numel
    assert choose_piece_numel(compressor, numel, 4, link=Link.ethernet(1e9)) == 0
    assert choose_piece_numel(compressor, numel, 4, link=Link.ethernet(1e8), algorithm="dense") == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"link": 1e8}, DtypeError, r"link must be a Link or None, got 100000000.0 \(float\)"),
        ({"compressor": Sign}, DtypeError, "compressor must be a Compressor, got the class Sign"),
        ({"numel": [1 << 20]}, DtypeError, r"numel must be an int, got \[1048576\] \(list\)"),
        ({"numel": -1}, ArgumentError, "numel must be at least 0, got -1"),
        ({"world_size": 0}, ArgumentError, "world_size must be at least 1, got 0"),
    ],
)
def test_bad_choice(options: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"compressor": Sign(), "numel": 1 << 20, "world_size": 4} | options
    with pytest.raises(error, match=f"choose_piece_numel: {text}"):
        choose_piece_numel(**given)
    with pytest.raises(ArgumentError, match='algorithm "ring" is unknown'):
        choose_piece_numel(Sign(), 1 << 20, 4, link=Link.ethernet(1e8), algorithm="ring")
