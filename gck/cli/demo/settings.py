"""What is the same for every configuration of a demo, and what a worker needs to know besides."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

__all__ = ["Assignment", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, shared by all configurations: none of them is tuned on its own."""

    workers: int = 4
    steps: int = 120
    batch: int = 32  # images a worker and step
    learning_rate: float = 0.1  # at its peak, see `learning_rate_at`
    # Delayed gradients and momentum add up: with 0.9, top-k and above all sign would need a lower rate
    # or more steps than a demo has time for.
    momentum: float = 0.5
    seed: int = 1
    evaluations: int = 12  # looks at the test images, the last one after the last step

    @property
    def powersgd_start(self) -> int:
        """Dense steps before PyTorch's PowerSGD hook compresses.

        Its documentation asks for at least two, and for 1,000 of a long training: a tenth of this one.
        """
        return max(2, self.steps // 10)

    def learning_rate_at(self, step: int) -> float:
        """Rate of step 1, 2, ...: rises over the first tenth of the steps, then falls evenly to zero."""
        rising = max(1, self.steps // 10)
        return self.learning_rate * min(step / rising, (self.steps - step + 1) / (self.steps - rising + 1))

    def evaluate_after(self, step: int) -> bool:
        """Whether the test images are looked at after this many steps."""
        every = max(1, self.steps // self.evaluations)
        return step == self.steps or step % every == 0


@dataclass(frozen=True)
class Assignment:
    """What one worker process is told on its command line."""

    settings: Settings
    configurations: list[str]  # trained one after another
    rank: int
    parent: int  # process that must be alive
    data: str  # file with the images
    rendezvous: str  # folder through which the workers find each other
    interface: str
    timeout: float  # seconds that a collective may take

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        fields = json.loads(text)
        return cls(settings=Settings(**fields.pop("settings")), **fields)
