"""The tasks, one file each: what a model's outputs and an image's target mean, and when the two agree.

Attacks, methods and evaluation ask a task what is right; none of them compares outputs with targets itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from clead.registry import Registry


class Task(Protocol):
    """What "right" means. ``outputs`` are what the model returns for B images, ``target`` is what they should be.

    Attributes:
        reads: the tasks whose runs can be evaluated in this one, by name; a run of the task itself always can.
    """

    reads: ClassVar[tuple[str, ...]]

    def outputs(self, num_classes: int) -> int:
        """Return how many numbers the last layer gives for an image (or a pixel) where the data names so many classes."""
        ...

    def check_data(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless the ``labels`` of a data set, (N, …), are this task's; the error names the task that fits."""
        ...

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each image, (B,): what training minimises and the plainest attack maximises."""
        ...

    def training_loss(self, outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        ...

    def divergence(self, clean: Tensor, outputs: Tensor) -> Tensor:
        """Return how far the ``outputs`` of each image are from its ``clean`` ones, (B,): what TRADES holds small."""
        ...

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return how far each image is on the wrong side, (B,): above 0 is wrong. Attacks maximise it."""
        ...

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which images are right, (B,) bool. NaN or infinite outputs are wrong."""
        ...

    def score(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the part of each image that is right, (B,) float in [0, 1]: what training watches and validation chooses by."""
        ...

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return what a served answer states of each class, in [0, 1], of the shape of ``outputs``."""
        ...

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the answer that ``probabilities`` mean, in the form of ``target``; of a model's own, that of ``predict``."""
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


def task_name(task: Task) -> str:
    """Return the name under which a task is registered; of a task that is not, such as a targeted attack's, its class's."""
    return next((name for name, kind in TASKS.items() if type(task) is kind), type(task).__name__)


def fitting_tasks(labels: Tensor) -> str:
    """Return which tasks labels of this shape, (N, …), are for, as a remedy names them."""
    return {1: "classification", 2: "multilabel", 3: "segmentation"}.get(labels.dim(), "none")
