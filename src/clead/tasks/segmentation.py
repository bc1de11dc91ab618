"""Segmentation: one class per pixel, the one of the pixel's largest logit; pixels of value 255 are void and never count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses.divergence import kl_divergence
from clead.losses.pixels import VOID, pixel_cross_entropy
from clead.losses.precision import at_least_float32
from clead.settings import settings
from clead.tasks import TASKS, fitting_tasks


def upsampled(outputs: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits (B, K, h, w) at the size (H, W), bilinearly (the corners' centres not aligned); as they are if equal."""
    if outputs.shape[2:] == tuple(size):
        return outputs
    return F.interpolate(outputs, size=list(size), mode="bilinear", align_corners=False)


def confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by class and answer, (B, K, K) int64: row k has those of class k, void left out.

    Args:
        predicted: (B, H, W) of any integer type, in [0, K).
        target: (B, H, W) of any integer type, in [0, K) or ``VOID``.
        num_classes: K.

    >>> confusion(torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 0], [1, VOID]]]), 2).tolist()
    [[[1, 1], [0, 1]]]
    """
    target, predicted = target.long(), predicted.long()
    cells = torch.where(target == VOID, num_classes**2, target * num_classes + predicted)
    cells = cells + (num_classes**2 + 1) * torch.arange(len(cells), device=cells.device)[:, None, None]
    counts = torch.bincount(cells.flatten(), minlength=len(cells) * (num_classes**2 + 1))
    return counts.view(len(cells), -1)[:, :-1].view(-1, num_classes, num_classes)


@TASKS.register("segmentation")
@settings
class Segmentation:
    """Outputs are logits (B, K, h, w), the target is a mask (B, H, W) of classes in [0, K) or 255, void.

    Logits of a lower resolution are upsampled to the mask. An image is never right or wrong as a whole: ``correct`` speaks of
    pixels, and ``accuracy`` is an image's part of right ones.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def outputs(self, num_classes: int) -> int:
        """Return K: a logit per class."""
        return num_classes

    def check_data(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless ``labels`` are a mask per image, (N, H, W)."""
        if labels.dim() != 3:
            raise UserError(
                f"task.name: segmentation needs a mask per image, got labels of shape {tuple(labels.shape)}; give --task "
                f"{fitting_tasks(labels)}, or data with masks: --data.name masks --data.path FOLDER"
            )
        self.check_target(labels, len(labels), len(classes))
        if len(labels) and bool((labels == VOID).all()):
            raise UserError(
                f"masks must have a pixel with a class, got {len(labels)} of void ({VOID}) alone; give masks with classes from 0 on"
            )

    def training_loss(self, outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of the pixels of a batch that are not void."""
        logits = upsampled(outputs.float(), target.shape[1:])
        total = F.cross_entropy(logits, target, ignore_index=VOID, reduction="sum", label_smoothing=label_smoothing)
        return total / (target != VOID).sum().clamp_min(1)

    def divergence(self, clean: Tensor, outputs: Tensor) -> Tensor:
        """Mean over all pixels of KL(softmax(clean) ‖ softmax(outputs)) of each image, (B,): void is held, too."""
        return kl_divergence(clean, outputs).mean((1, 2))

    def score(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the part of each image's pixels that are right, (B,) float; 0 of an image that is all void."""
        return self.accuracy(self.correct(outputs, target), target).nan_to_num(0).float()

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean of −log softmax(outputs)_target over the pixels of each image that are not void, (B,); 0 without any."""
        return pixel_cross_entropy(upsampled(outputs, target.shape[1:]), target.long())

    def pixel_margins(self, outputs: Tensor, target: Tensor) -> Tensor:
        """max_{k≠target} z_k − z_target of each pixel, (B, H, W): above 0 iff wrong; 0 where void."""
        logits, labels = self._at_mask(outputs, target)
        true = logits.gather(1, labels)[:, 0]
        wrong = logits.scatter(1, labels, -torch.inf).amax(1)
        return (wrong - true).masked_fill(target == VOID, 0)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean of ``pixel_margins`` over the pixels of each image that are not void, (B,).

        It is no verdict: an image with a mean above 0 may have right pixels, and the reverse.
        """
        return self.pixel_margins(outputs, target).sum((1, 2)) / (target != VOID).sum((1, 2)).clamp_min(1)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return which pixels are right, (B, H, W) bool: the first largest logit is the target's, and all are finite.

        A void pixel is False; count with ``accuracy``, which leaves void out.
        """
        return self.answers(outputs, target) == target

    def answers(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return each pixel's answer, (B, H, W) int64: ``predict``, or ``rival`` where logits are not finite."""
        logits = upsampled(at_least_float32(outputs), target.shape[1:])
        finite = torch.isfinite(logits).all(1)
        return torch.where(finite, logits.argmax(1), self.rival(logits, target))

    def accuracy(self, correct: Tensor, target: Tensor) -> Tensor:
        """Return each image's part of right pixels, void left out, (B,) float64; NaN of an image that is all void."""
        return (correct & (target != VOID)).sum((1, 2)).double() / (target != VOID).sum((1, 2))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return softmax(outputs) of each pixel, (B, K, h, w)."""
        return outputs.softmax(1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the most probable class of each pixel, (B, h, w) int64."""
        return probabilities.argmax(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class of the largest logit of each pixel, (B, h, w) int64; of equal ones the first."""
        return outputs.argmax(1)

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the class of the largest logit but the target's of each pixel, (B, H, W) int64; NaN counts as the least."""
        logits, labels = self._at_mask(outputs, target)
        lowest = torch.finfo(logits.dtype).min
        return logits.nan_to_num(nan=lowest, neginf=lowest).scatter(1, labels, -torch.inf).argmax(1)

    def confusion(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Count each image's pixels by class and ``answers``, (B, K, K) int64; see ``confusion`` of this module."""
        return confusion(self.answers(outputs, target), target, outputs.shape[1])

    def counts(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Count each image's pixels by class, (B, 3, K) int64: those taken for it and of it, taken for it, of it."""
        cells = self.confusion(outputs, target)
        return torch.stack([cells.diagonal(dim1=1, dim2=2), cells.sum(1), cells.sum(2)], 1)

    def as_target(self, value: Tensor, images: int) -> Tensor:
        """Return masks as (N, H, W) int64; raises UserError where another shape or type leaves it open what they mean."""
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise UserError(
                f"masks must be class numbers of shape ({images}, H, W), got {value.dtype} {tuple(value.shape)}; give masks.long()"
            )
        if value.dim() == 4 and value.shape[1] == 1:
            value = value[:, 0]
        if value.dim() == 2 and images == 1:
            value = value[None]
        if value.dim() != 3:
            hint = "masks.argmax(1)" if value.dim() == 4 else "one mask per image"
            raise UserError(
                f"masks must be class numbers of shape ({images}, H, W), got {value.dtype} {tuple(value.shape)}; give {hint}"
            )
        return value.long()

    def check_target(self, target: Tensor, images: int, num_classes: int | None = None) -> None:
        """Raise UserError unless ``target`` is (images, H, W) int64 or uint8, in [0, K) or 255; without K, below 255."""
        if target.dim() != 3 or len(target) != images or target.dtype not in (torch.int64, torch.uint8):
            hint = "give one mask per image"
            if target.shape == (images,):
                hint = "one class number per image is a classifier's target; give masks, or --task classification"
            elif target.dim() == 4 and len(target) == images:
                hint = "give masks.squeeze(1)" if target.shape[1] == 1 else "give masks.argmax(1)"
            elif target.dim() == 3 and len(target) == images:
                hint = "give masks.long()"
            raise UserError(
                f"masks must be int64 of shape ({images}, H, W), got {target.dtype} {tuple(target.shape)}; {hint}"
            )
        labelled = target[target != VOID]
        if not len(
            labelled
        ):  # synchronises the device; some images of a data set may be all void, which check_data looks at
            return
        least, most = int(labelled.min()), int(labelled.max())
        if least < 0 or most >= (num_classes or VOID):
            bound = num_classes or VOID
            hint = f"give {VOID} where a pixel has no class"
            if least == 1 and most == num_classes:
                hint = "classes count from 1: give masks - 1, and 255 where they were 0"
            raise UserError(
                f"masks must be in [0, {bound}), or {VOID} for void, got {least if least < 0 else most}; {hint}"
            )

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise UserError unless ``outputs`` are logits (B, K, h, w), not larger than the masks, and ``target`` masks in [0, K)."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 4 or not outputs.is_floating_point():
            got = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            hint = "return the logits of each pixel"
            if isinstance(outputs, Tensor) and outputs.dim() == 2:
                hint = "these are a classifier's, one answer per image: give --task classification"
            raise UserError(f"a segmentation model must return float logits (B, K, H, W), got {got}; {hint}")
        if not 2 <= outputs.shape[1] <= VOID:
            raise UserError(
                f"a segmentation model must have 2 to {VOID} classes, got logits {tuple(outputs.shape)}; "
                "give the final layer one output per class"
            )
        self.check_target(target, len(target), outputs.shape[1])
        height, width = target.shape[1:]
        if outputs.shape[2] > height or outputs.shape[3] > width:
            raise UserError(
                f"logits must be no larger than the mask, got {tuple(outputs.shape[2:])} for masks of {(height, width)}; give "
                "masks of the images' size"
            )

    def metrics(self, correct: Tensor, target: Tensor, num_classes: int) -> dict[str, Any]:
        """Return what pixels' flags (N, H, W) say: ``accuracy`` (aAcc), and per class ``class_accuracy`` and ``class_n`` (pixels).

        IoU is not in the flags: it is a matter of ``confusion``.
        """
        members = [target == k for k in range(num_classes)]
        right, counts = ([int(chosen.sum()) for chosen in each] for each in ([m & correct for m in members], members))
        return {
            "accuracy": sum(right) / max(1, sum(counts)),
            "class_n": counts,
            "class_accuracy": [hits / n if n else None for hits, n in zip(right, counts, strict=True)],
        }

    def describe(self) -> str:
        """Return in one line what is right."""
        return "a pixel is right if the largest of its K logits, all of them finite, is its mask's; void (255) does not count"

    def _at_mask(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits at the size of the mask, and the classes as an index into them, (B, 1, H, W); void is class 0."""
        labels = target.long().masked_fill(target == VOID, 0)[:, None]
        return upsampled(at_least_float32(outputs), target.shape[1:]), labels


SEGMENTATION = Segmentation()
"""The task, which has no settings, shared."""
