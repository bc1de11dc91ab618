"""Verdicts: what a model itself says in float32 of images, as many at once as fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clead.attacks.runner import finite_images, run_attack
from clead.data.loaders import make_generator, to_float
from clead.errors import out_of_memory
from clead.interfaces import Attack, ImageSet, Threat
from clead.losses.precision import exact_float32 as exact_float32
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.results.masks import Counts, lowest_mean_iou, mean_iou
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import SEGMENTATION

_CPU_PIXELS = 64 * 3 * 32 * 32  # pixels of the images that go together on a CPU


def correct_mask(model: nn.Module, x: Tensor, y: Tensor, draws: int = 1, task: Task = CLASSIFICATION) -> Tensor:
    """Return which images ``task`` says are right, (B,); not if an output is not finite, or a pixel is not.

    Of a randomised model: right in more than half of the draws.
    """
    model = wrapped(model)
    votes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with attack_mode(model), torch.no_grad():
        for _ in range(draws):
            votes += task.correct(model(x), y)
    return (2 * votes > draws) & finite_images(x)


@dataclass
class MicrobatchLimit:
    """How many images go through a model at once; lowered where the device's memory has been too small, and kept low."""

    limit: int | None = None

    def of(self, x: Tensor) -> int:
        """Return how many images of ``x`` go together."""
        size = len(x) if x.device.type != "cpu" else _CPU_PIXELS // x[0].numel()
        return max(1, size if self.limit is None else min(size, self.limit))


def run_microbatched(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, pieces: MicrobatchLimit
) -> Tensor:
    """Return ``function(x, y)``, piece by piece where all at once is too much for the device's memory.

    A CPU gets pieces whose activations stay near its caches: 1.2 times faster on a ResNet-8 than 256 images at once.
    """
    while True:
        size = pieces.of(x)
        try:
            count = max(1, -(-len(x) // size))  # of about equal size: a small last one is slow per image
            return torch.cat(
                [function(a, b) for a, b in zip(x.tensor_split(count), y.tensor_split(count), strict=True)]
            )
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            if size == 1 or not out_of_memory(error):
                raise
        pieces.limit = size = -(-size // 2)
        if x.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"the device is out of memory: attacking {size} images at a time", stacklevel=2)


def accuracy_under_attack(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    attack: Attack,
    objective: str,
    *,
    seed: int,
    device: torch.device,
    task: Task = CLASSIFICATION,
) -> dict[str, float]:
    """Return ``clean_accuracy`` and ``robust_accuracy`` under one attack; for the validation inside training.

    Where images can be right in part, both are the means of the part of each that is right, masks of void alone left out. Of masks
    there are ``clean_miou`` and ``robust_miou``, too, of all images together; the latter takes each image attacked or clean, so
    that it is low.
    """
    right = robust = 0.0
    counted: list[Tensor] = []
    for number, (x, y) in enumerate(batches(images, 256, device)):
        generator = make_generator(device, seed, number)
        scores, counts = _judged(model, x, y, task)
        attacked = counts.clone()
        right += float(scores.sum())  # synchronises the device
        if (flags := scores > 0).any():
            x, y = x[flags], y[flags]
            x_adv = run_attack(
                attack, model, x, y, threat, objective=objective, task=task, generator=generator, checked=True
            )
            after, attacked[flags] = _judged(model, x_adv, y, task)
            robust += float(torch.minimum(scores[flags], after).sum())
        counted.append(torch.stack([counts, attacked], 1).cpu())
    size, mious = len(images), {}
    if task == SEGMENTATION:
        candidates = Counts(*torch.cat(counted).movedim(2, 0).numpy())
        clean, lowest = np.zeros(len(images), np.int64), lowest_mean_iou(candidates)
        for name, choice in (("clean_miou", clean), ("robust_miou", lowest)):
            mious[name] = float(mean_iou(candidates.chosen(choice).total()))
        size = max(1, int((candidates.true[:, 0].sum(-1) > 0).sum()))
    return {"clean_accuracy": right / size, "robust_accuracy": robust / size, **mious}


def _judged(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return the part of each image that is right, (B,) in [0, 1], 0 of an image that is not finite, and the counts of masks.

    The counts are (B, 3, K), as ``Segmentation.counts`` has them; of other tasks (B, 0).
    """
    model = wrapped(model)
    with attack_mode(model), torch.no_grad():
        outputs = model(x)
        counts = SEGMENTATION.counts(outputs, y) if task == SEGMENTATION else y.new_zeros(len(y), 0)
        return task.score(outputs, y) * finite_images(x), counts


def batches(images: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float images in [0, 1] and labels on ``device``."""
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        yield to_float(images.images[rows].to(device)), images.labels[rows].to(device)
