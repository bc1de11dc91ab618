"""What an evaluation is to do: model, images, threat, attacks, and how the images are divided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clead.config import Eval
from clead.evaluation.correctness import MicrobatchLimit, to_float
from clead.evaluation.suites import DRAWS, NamedAttack
from clead.interfaces import ImageSet, Threat
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that the parts of one evaluation share."""

    model: nn.Module
    images: ImageSet
    threat: Threat
    settings: Eval
    attacks: tuple[NamedAttack, ...]
    suite: str
    survivors_only: bool
    device: torch.device
    batch_size: int
    num_saved: int
    """Adversarial images are kept for the first so many."""
    task: Task = CLASSIFICATION
    microbatch: MicrobatchLimit = field(default_factory=MicrobatchLimit)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    @staticmethod
    def key(batch: int, stage: int) -> str:
        """Return the name of a finished part; ``stage`` −1 is the clean pass."""
        return f"{batch:06d}-{stage + 1:02d}"

    def keys(self) -> Iterator[str]:
        """Yield the names of all parts."""
        for batch in range(self.batches):
            yield from (self.key(batch, stage) for stage in range(-1, len(self.attacks)))

    @property
    def draws(self) -> int:
        """How often a randomised model is asked for one verdict."""
        return DRAWS if self.suite == "rand" else 1

    def where(self, batch: int) -> slice:
        """Return which images are in a batch."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.images)))

    def inputs(self, here: slice) -> tuple[Tensor, Tensor]:
        """Return float images in [0, 1] and labels, on the device."""
        return to_float(self.images.images[here].to(self.device)), self.images.labels[here].to(self.device)

    def contains(self, x_adv: Tensor, x: Tensor) -> bool:
        """Say whether all of ``x_adv`` is in the threat set around ``x`` and in the pixel box, to rounding; not if it is NaN."""
        size = self.threat.distance(x_adv - x).max().item()
        return size <= self.threat.eps * (1 + 1e-5) + 1e-6 and bool(x_adv.min() >= 0 and x_adv.max() <= 1)
