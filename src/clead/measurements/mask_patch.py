"""Masks under a patch: of the pixels outside it, or of those of an object beside it, how many are right."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from clead.attacks.mask_patch import allowed_places, worst_patch
from clead.attacks.patch import Patch
from clead.attacks.runner import AttackError, check_finite, check_inputs, finite_images, logits_of
from clead.data.loaders import make_generator
from clead.errors import UserError, did_you_mean
from clead.evaluation.correctness import batches
from clead.evaluation.mask_record import estimate_pixels
from clead.evaluation.state import ResumableResults
from clead.losses.pixels import VOID
from clead.losses.precision import exact_float32
from clead.measurements.attack_accuracy import AttackedResult
from clead.measurements.base import MeasurementTarget, plain_settings
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.progress import progress
from clead.results.masks import Counts, lowest_accuracy, lowest_mean_iou, mean_iou
from clead.results.record import Metric
from clead.tasks.segmentation import SEGMENTATION


def evaluate_mask_patch(patch: Patch, target: MeasurementTarget, state: ResumableResults) -> AttackedResult:
    """Attack each mask with one patch, and count the same pixels clean and attacked: those outside it that are not void.

    Images without a pixel that counts, or without a place for the patch, are left out. Raises UserError if there is no other.
    """
    model, classes = target.model, target.splits.classes
    if patch.object is not None and patch.object not in classes:
        raise UserError(
            f"attack.object: the masks have no class {patch.object!r}; {did_you_mean(patch.object, classes)}"
        )
    number = None if patch.object is None else list(classes).index(patch.object)
    rows = torch.cat(
        [
            _places(patch, y.long(), number).flatten(1).any(1) & (_counted(y.long(), number) != VOID).flatten(1).any(1)
            for _, y in batches(target.images, target.batch_size, torch.device("cpu"))
        ]
    ).nonzero()[:, 0]
    if not len(rows):
        raise UserError(
            f"attack.object: none of the {len(target.images)} images has pixels of {patch.object or 'a class'} with place for the "
            f"patch beside them; give a smaller one, such as --attack.size {patch.size / 4:g}, or another class"
        )
    images, parts = target.images.subset(rows), []
    with state.opened(), exact_float32(), progress("attack patch", len(images), show=target.show) as tick:
        for batch, (x, y) in enumerate(batches(images, target.batch_size, target.device)):
            if (key := f"{batch:06d}") not in state.parts:
                began = time.monotonic()
                generator = make_generator(target.device, target.seed, batch)
                tensors = _attacked(patch, model, x, y.long(), number, generator)
                state.save(key, tensors, {"seconds": time.monotonic() - began})
            parts.append(state.parts[key][0])
            tick(len(x))
    both = torch.stack(
        [torch.cat([p[k] for p in parts]) for k in ("clean", "robust")], 1
    )  # the patch may show the image
    counts = Counts(*both.movedim(2, 0).numpy())
    clean, robust = (counts.chosen(each) for each in (np.zeros(len(images), np.int64), lowest_accuracy(counts)))
    pixels = "pixels outside it" if number is None else f"pixels of {patch.object}, in {len(images)} images, beside it"
    metric = Metric(
        name="mIoU outside the patch",
        about="mean over the classes of intersection over union, of the pixels outside the patch",
        n=len(images),
        clean=float(mean_iou(clean.total())),
        robust=float(mean_iou(counts.chosen(lowest_mean_iou(counts)).total())),
    )
    return AttackedResult(
        attack=f"patch ({pixels})",
        settings=plain_settings(patch),
        n=len(images),
        seed=target.seed,
        clean=estimate_pixels(clean, target.seed),
        clean_flags=[],
        robust=estimate_pixels(robust, target.seed),
        robust_flags=[],
        metrics=[metric] if number is None else [],
        seconds=state.seconds,
    )


def _counted(y: Tensor, number: int | None) -> Tensor:
    """Return the masks with all void that does not count."""
    return y if number is None else y.where(y == number, VOID)


def _places(patch: Patch, y: Tensor, number: int | None) -> Tensor:
    return allowed_places(patch, torch.zeros_like(y, dtype=torch.bool) if number is None else y == number)


def _attacked(
    patch: Patch, model: nn.Module, x: Tensor, y: Tensor, number: int | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return counts of right, predicted and true pixels of a batch that lie outside its patches, clean and attacked, (B, 3, K)."""
    check_inputs(x, y, task=SEGMENTATION)
    SEGMENTATION.check(logits_of(model, x[:1]), y)
    counted = _counted(y, number)
    with fork_rng(generator.initial_seed() % 2**63), attack_mode(model), torch.no_grad():
        x_adv, masks = worst_patch(patch, model, x, counted, _places(patch, y, number), generator=generator)
    check_finite(x_adv, "patch")
    inside = patch.allows(x_adv, x) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    if not (inside | ~finite_images(x_adv)).all():
        raise AttackError("patch left the images that it allows")

    def counts(images: Tensor) -> Tensor:
        confusion = SEGMENTATION.confusion(logits_of(model, images), masks)
        return torch.stack([confusion.diagonal(dim1=1, dim2=2), confusion.sum(1), confusion.sum(2)], 1)

    return {"clean": counts(x), "robust": counts(x_adv)}
