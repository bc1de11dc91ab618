"""Several labels per image: each is told by its own logit, present where that is above 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses.precision import at_least_float32
from clead.settings import settings
from clead.tasks import TASKS, fitting_tasks

UNKNOWN = -1
"""Of a label of which nobody has said whether the image has it: it counts nowhere."""


@TASKS.register("multilabel")
@settings
class MultiLabel:
    """Outputs are logits (B, L), the target is (B, L) int64 in {0, 1, −1}: absent, present, unknown.

    An image is right as a whole (exact match) if every known label is. ``score`` is the part of its known labels that are right.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def outputs(self, num_classes: int) -> int:
        """Return L: a logit per label."""
        return num_classes

    def check_data(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless ``labels`` are (N, L), of 0, 1 and −1, and every image has a known one."""
        if labels.dim() != 2:
            raise UserError(
                f"task.name: multilabel needs 0, 1 or -1 (unknown) per image and label, got labels of shape {tuple(labels.shape)}; "
                f"give --task {fitting_tasks(labels)}, or a table of several labels: --data.name multilabel --data.path FILE"
            )
        self.check_target(labels, len(labels), len(classes))

    def training_loss(self, outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean binary cross-entropy of the known labels of a batch, each moved by half of ``label_smoothing``."""
        goal = target.clamp_min(0).float() * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(outputs.float(), goal, reduction="none")
        known = target != UNKNOWN
        return losses.masked_fill(~known, 0).sum() / known.sum().clamp_min(1)

    def divergence(self, clean: Tensor, outputs: Tensor) -> Tensor:
        """Sum over all labels, known or not, of KL(Bernoulli(clean) ‖ Bernoulli(outputs)) of each image, (B,)."""
        p, z = at_least_float32(clean), at_least_float32(outputs)
        one, zero = F.logsigmoid(p), F.logsigmoid(-p)
        return (one.exp() * (one - F.logsigmoid(z)) + zero.exp() * (zero - F.logsigmoid(-z))).sum(1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Sum of the binary cross-entropies of the known labels of each image, (B,): attacks all of them at once."""
        goal = target.clamp_min(0).to(torch.float32)
        losses = F.binary_cross_entropy_with_logits(at_least_float32(outputs), goal, reduction="none")
        return losses.masked_fill(target == UNKNOWN, 0).sum(1)

    def margins(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return how far each label is on the wrong side, (B, L): above 0, or 0 and present, is wrong; −∞ if unknown."""
        return torch.where(target == 1, -outputs, outputs).masked_fill(target == UNKNOWN, -torch.inf)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the largest of ``margins`` of each image, (B,)."""
        return self.margins(outputs, target).amax(1)

    def right(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which labels are right, (B, L) bool: known, the answer is the target, all logits of the image finite."""
        return (self.predict(outputs) == target) & torch.isfinite(outputs).all(1, keepdim=True)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which images have all their known labels right, (B,) bool."""
        return (self.right(outputs, target) | (target == UNKNOWN)).all(1) & torch.isfinite(outputs).all(1)

    def score(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the part of the known labels of each image that are right, (B,) float."""
        return self.right(outputs, target).sum(1) / (target != UNKNOWN).sum(1).clamp_min(1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """sigmoid(outputs), (B, L) float32: of each label by itself."""
        return outputs.float().sigmoid()

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return 1 where the probability is above one half, (B, L) int64."""
        return (probabilities > 0.5).long()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return 1 where the logit is above 0, (B, L) int64."""
        return (outputs > 0).long()

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the target with its label of the largest margin turned round, (B, L) int64."""
        nearest = self.margins(outputs, target).argmax(1, keepdim=True)
        return target.scatter(1, nearest, 1 - target.gather(1, nearest))

    def as_target(self, value: Tensor, images: int) -> Tensor:
        """Return labels as (N, L) int64; raises UserError unless they are of that shape, and whole numbers."""
        if value.dim() == 2 and value.is_floating_point() and bool((value == value.round()).all()):
            value = value.long()
        if value.dim() != 2 or value.is_floating_point() or value.is_complex():
            raise UserError(
                f"labels must be 0, 1 or -1 of shape ({images}, L), got {value.dtype} {tuple(value.shape)}; give such as "
                "torch.nn.functional.one_hot(y, L), or --task classification for one class per image"
            )
        return value.long()

    def check_target(self, target: Tensor, images: int, num_classes: int | None = None) -> None:
        """Raise UserError unless ``target`` is (images, L) int64 of 0, 1 and −1, with a known label in every row."""
        width = "L" if num_classes is None else str(num_classes)
        if target.dim() != 2 or len(target) != images or target.dtype != torch.int64:
            raise UserError(
                f"labels must be int64 of shape ({images}, {width}), got {target.dtype} {tuple(target.shape)}; give a row per image"
            )
        if num_classes is not None and target.shape[1] != num_classes:
            raise UserError(
                f"labels must be {num_classes} per image, one for each name and logit, got {target.shape[1]}; give the same "
                "labels in the same order"
            )
        if not images:
            return
        if bool(((target < -1) | (target > 1)).any()):  # synchronises the device
            row, column = ((target < -1) | (target > 1)).nonzero()[0].tolist()
            raise UserError(
                f"labels must be 0, 1 or -1 (unknown), got {int(target[row, column])} in row {row}, label {column}; give 1 where "
                "the image has the label"
            )
        if len(unknown := (target == UNKNOWN).all(1).nonzero()[:, 0]):
            raise UserError(
                f"every image needs a known label, got {len(unknown)} without any, the first in row {int(unknown[0])}; remove them"
            )

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise UserError unless ``outputs`` are logits (B, L) and ``target`` has L labels per image."""
        if outputs.dim() != 2 or not outputs.is_floating_point():
            raise UserError(
                f"logits must be float (B, L), got {outputs.dtype} {tuple(outputs.shape)}; name the output that holds them: "
                "--model.output NAME"
            )
        self.check_target(target, len(target), outputs.shape[1])

    def metrics(self, correct: Tensor, target: Tensor, num_classes: int) -> dict[str, Any]:
        """Return ``accuracy``, that of exact matches, and per label ``class_n``, its known images."""
        return {
            "accuracy": correct.float().mean().item(),
            "class_n": (target != UNKNOWN).sum(0).tolist(),
            "class_accuracy": [correct[target[:, k] != UNKNOWN].float().mean().item() for k in range(num_classes)],
        }

    def describe(self) -> str:
        """Return in one line what is right."""
        return "a label is present if its logit is above 0; an image is right (exact match) if every known label is"
