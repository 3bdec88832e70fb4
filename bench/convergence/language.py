"""A small language model of bytes, and what it reads: the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["CONTEXT", "LanguageModel", "Text", "load_text"]

CONTEXT = 64  # bytes
BYTES = 256
HELD_OUT = 10  # one file in so many is for validation, whichever others there are


@dataclass(frozen=True)
class Text:
    """Bytes, uint8: of the files to train on, and of those to validate with."""

    train: Tensor
    validation: Tensor

    def batches(self, steps: int, workers: int, batch: int, seed: int) -> Tensor:
        """(steps, workers, batch) places in `train`, the same for all that train with this seed."""
        generator = torch.Generator().manual_seed(seed)
        last = self.train.numel() - CONTEXT - 1
        return torch.randint(last, (steps, workers, batch), generator=generator)

    def windows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, CONTEXT) bytes from each place of `train`, and those that follow each."""
        return _split(self.train[places[:, None] + torch.arange(CONTEXT + 1)])

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """As `windows`, `count` of them, evenly from all of `validation`."""
        starts = torch.linspace(0, self.validation.numel() - CONTEXT - 1, count).long()
        return _split(self.validation[starts[:, None] + torch.arange(CONTEXT + 1)])

    def describe(self) -> dict[str, Any]:
        """How long both parts are, and what tells them from others."""
        parts = {"train": self.train, "validation": self.validation}
        return {
            name: {"bytes": part.numel(), "sha256": hashlib.sha256(part.numpy()).hexdigest()}
            for name, part in parts.items()
        }


def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]


def load_text() -> Text:
    """The modules of the standard library that are not in packages, in the order of their names.

    Raises:
        FileNotFoundError: Python is installed without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    # Those of a build tell its paths.
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        parts[is_held_out(path.name)].append(path.read_bytes())
    if not all(parts):
        raise FileNotFoundError(f"there is no source of Python's standard library in {folder}")
    train, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Text(train, validation)


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


class LanguageModel(nn.Module):
    """A transformer with causal attention, normalised before each part; torch's own layers."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def loss(self, read: Tensor, following: Tensor) -> Tensor:
        """Nats a byte, of (batch, CONTEXT) bytes and those that follow each."""
        hidden = self.bytes(read) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), following.flatten())
