"""What was evaluated: the names and fingerprints that a record carries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from clead.interfaces import ImageSet
from clead.results.record import EvaluatedData, Training
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated and where it comes from; goes into the record.

    ``model`` is the architecture's name; ``task`` says what is right.
    """

    name: str
    model: str
    weights: str
    data: str
    split: Literal["train", "val", "test"]
    data_fingerprint: str
    classes: tuple[str, ...]
    training: Training | None = None
    origin: Literal["test", "val", "train"] = "test"
    skipped: tuple[str, ...] = ()
    total: int | None = None
    task: Task = CLASSIFICATION

    def evaluated_data(self, images: ImageSet) -> EvaluatedData:
        """Return what a record says of the evaluated images."""
        return EvaluatedData(
            name=self.data,
            split=self.split,
            n=len(images),
            classes=list(self.classes),
            fingerprint=self.data_fingerprint,
            images=digest(images),
            origin=self.origin,
            skipped=list(self.skipped),
            total=self.total,
        )


def digest(images: ImageSet) -> str:
    """Return a hex digest of images and labels: records of the same digest can be paired image by image."""
    digest = hashlib.sha256(str((tuple(images.images.shape), images.images.dtype)).encode())
    digest.update(images.images.contiguous().numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:32]
