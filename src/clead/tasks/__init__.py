"""The tasks, one file each: what a model's outputs and an image's target mean, and when the two agree.

Attacks, methods and evaluation ask a task what is right; none of them compares outputs with targets itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from clead.registry import Registry


class Task(Protocol):
    """What "right" means. ``outputs`` are what the model returns for B images, ``target`` is what they should be."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each image, (B,): what training minimises and the plainest attack maximises."""
        ...

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return how far each image is on the wrong side, (B,): above 0 is wrong. Attacks maximise it."""
        ...

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which images are right, (B,) bool. NaN or infinite outputs are wrong."""
        ...

    def predict(self, outputs: Tensor) -> Tensor:
        """Return what the outputs say, in the form of ``target``."""
        ...

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the wrong answer that the outputs come nearest to, in the form of ``target``."""
        ...

    def as_target(self, value: Tensor, images: int) -> Tensor:
        """Return what a user gave as the targets of ``images`` images in this task's form; raises UserError if unclear."""
        ...

    def check_target(self, target: Tensor, images: int, num_classes: int | None = None) -> None:
        """Raise UserError unless ``target`` has this task's shape, type and range for so many images."""
        ...

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise UserError unless ``outputs``, of at least one of the images, and ``target`` belong together."""
        ...

    def metrics(self, correct: Tensor, target: Tensor, num_classes: int) -> dict[str, Any]:
        """Return what a report says of the flags ``correct``, (N,) bool."""
        ...

    def describe(self) -> str:
        """Return in one line what is right."""
        ...


TASKS: Registry[Any] = Registry("task", "clead.tasks")
