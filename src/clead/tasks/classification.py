"""Classification: one class per image, the one of the largest logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses import margin as margins
from clead.losses.divergence import kl_divergence
from clead.settings import settings
from clead.tasks import TASKS, fitting_tasks


@TASKS.register("classification")
@settings
class Classification:
    """Outputs are logits (B, K), the target is a class (B,) int64 in [0, K)."""

    reads: ClassVar[tuple[str, ...]] = ("classification", "binary", "retrieval")

    def outputs(self, num_classes: int) -> int:
        """Return K: a logit per class."""
        return num_classes

    def check_data(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless ``labels`` are one class number per image, (N,)."""
        if labels.dim() != 1:
            raise UserError(
                f"task.name: classification needs one class per image, got labels of shape {tuple(labels.shape)}; give --task "
                f"{fitting_tasks(labels)}"
            )

    def training_loss(self, outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy; ``target`` may be soft labels, (B, K) float with rows of sum 1."""
        return F.cross_entropy(outputs.float(), target, label_smoothing=label_smoothing)

    def divergence(self, clean: Tensor, outputs: Tensor) -> Tensor:
        """KL(softmax(clean) ‖ softmax(outputs)) of each image, (B,)."""
        return kl_divergence(clean, outputs)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """−log softmax(outputs)_target of each image, (B,) float32."""
        return margins.cross_entropy(outputs, target)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """max_{k≠target} z_k − z_target of each image, (B,); above 0 iff misclassified."""
        return margins.margin(outputs, target)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return where the largest logit is the target's and all are finite, (B,) bool: argmax takes NaN for the largest.

        >>> Classification().correct(torch.tensor([[1.0, 3.0], [1.0, 3.0], [torch.nan, 3.0]]), torch.tensor([1, 0, 0]))
        tensor([ True, False, False])
        """
        return (outputs.argmax(1) == target) & torch.isfinite(outputs).all(1)

    def score(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return 1 where the image is right and 0 elsewhere, (B,) float."""
        return self.correct(outputs, target).float()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """softmax(outputs), (B, K) float32."""
        return outputs.float().softmax(1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the class of the largest probability, (B,) int64; of equal ones the first."""
        return probabilities.argmax(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class of the largest logit, (B,) int64; of equal ones the first."""
        return outputs.argmax(1)

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the class of the largest logit but the target's, (B,) int64."""
        return outputs.scatter(1, target[:, None], -torch.inf).argmax(1)

    def as_target(self, value: Tensor, images: int) -> Tensor:
        """Return labels as (N,) int64; raises UserError where another shape or type leaves it open what they mean."""
        shape = tuple(value.shape)
        if value.dim() == 2 and value.shape[1] > 1:
            raise UserError(
                f"labels must be class numbers of shape ({images},), got {value.dtype} {shape}; give labels.argmax(1)"
            )
        if value.is_floating_point() or value.is_complex():
            more = ".squeeze(1)" if value.dim() == 2 else ""
            raise UserError(
                f"labels must be integers of shape ({images},), got {value.dtype} {shape}; give labels.long(){more}"
            )
        if (value.dim() == 2 and value.shape[1] == 1) or (value.dim() == 0 and images == 1):
            value = value.reshape(-1)
        if value.dim() != 1:
            remedy = 'for masks give task="segmentation"' if value.dim() > 2 else "give labels.flatten()"
            raise UserError(f"labels must be class numbers of shape ({images},), got {value.dtype} {shape}; {remedy}")
        return value.long()

    def check_target(self, target: Tensor, images: int, num_classes: int | None = None) -> None:
        """Raise UserError unless ``target`` is (images,) int64 in [0, K); without ``num_classes`` only below 0 is refused."""
        if target.shape != (images,) or target.dtype != torch.int64:
            hint = "; give one class number per image"
            if len(target.shape) == 2 and len(target) == images:
                hint = "; give y.argmax(1)" if target.shape[1] > 1 else "; give y.squeeze(1)"
            elif len(target.shape) == 3:
                hint = '; a mask per image is for clead.evaluate(model, x, masks, task="segmentation") and clead.robust_loss'
            elif target.shape == (images,):
                hint = "; give y.long()"
            raise UserError(
                f"labels must be int64 of shape ({images},), got {target.dtype} {tuple(target.shape)}{hint}"
            )
        if not images:
            return
        least, most = int(target.min()), int(target.max())  # synchronises the device
        if least < 0 or (num_classes is not None and most >= num_classes):
            bound = "K" if num_classes is None else str(num_classes)
            hint = "; give class numbers from 0 on"
            if num_classes is not None and most >= num_classes:
                hint = f"; the model has {num_classes} classes: give one of {most + 1} or more, or leave out images of others"
            hint = "; they count from 1: give labels - 1" if least == 1 and most == num_classes else hint
            hint = "; leave out images without a label" if least == -1 else hint
            raise UserError(f"labels must be in [0, {bound}), got {least if least < 0 else most}{hint}")

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise UserError unless ``outputs`` are logits (B, K) and ``target`` is a class in [0, K) per image."""
        if outputs.dim() != 2 or not outputs.is_floating_point():
            hint = "name the output that holds them: --model.output NAME"
            hint = "for a class per pixel give --task segmentation" if outputs.dim() == 4 else hint
            raise UserError(f"logits must be float (B, K), got {outputs.dtype} {tuple(outputs.shape)}; {hint}")
        self.check_target(target, len(target), outputs.shape[1])

    def metrics(self, correct: Tensor, target: Tensor, num_classes: int) -> dict[str, Any]:
        """Return ``accuracy``, and per class ``class_accuracy`` and ``class_n``: None and 0 of a class without images.

        >>> Classification().metrics(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3)["class_accuracy"]
        [0.5, None, 1.0]
        """
        members = [target == k for k in range(num_classes)]
        return {
            "accuracy": correct.float().mean().item(),
            "class_n": [int(chosen.sum()) for chosen in members],
            "class_accuracy": [correct[chosen].float().mean().item() if chosen.any() else None for chosen in members],
        }

    def describe(self) -> str:
        """Return in one line what is right."""
        return "an image is right if the largest of its K logits, all of them finite, is its label's"


class TowardsClass(Classification):
    """Classification as a targeted attack sees it: ``target`` is the class that the image is to be taken for.

    An image is "wrong", so that the attack has succeeded, if its largest logit is the target's and all are finite.
    """

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Log softmax(outputs)_target of each image, (B,): rises as the target takes over."""
        return -super().loss(outputs, target)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """z_target − max_{k≠target} z_k of each image, (B,); above 0 iff the image is taken for the target."""
        return -super().margin(outputs, target)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which images are not taken for the target, (B,) bool."""
        return ~super().correct(outputs, target)

    def describe(self) -> str:
        """Return in one line what is right."""
        return "an image is right if it is not taken for the class that the attack aims at"


CLASSIFICATION = Classification()
"""The task, which has no settings, shared."""
TOWARDS_CLASS = TowardsClass()
"""What a targeted attack is run on, with the classes to aim at as targets."""
