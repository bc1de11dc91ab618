"""Auto-PGD on masks: an image is a sum of pixels that are right or wrong, so it is never finished (SEA, arXiv:2306.12941)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clead.attacks.apgd import SmoothPath, SparsePath, unit
from clead.errors import UserError
from clead.interfaces import Model, Threat
from clead.losses.pixels import PIXEL_LOSSES
from clead.losses.precision import at_least_float32
from clead.models.seeding import fork_rng
from clead.settings import setting, settings
from clead.tasks import Task, task_name
from clead.tasks.segmentation import SEGMENTATION, upsampled
from clead.threats import THREATS
from clead.threats.geometry import per_image

PHASES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))
"""Radius in eps, and part of the steps: the radius falls, and the best point of a phase is where the next begins."""
_SHORT = {
    "cross_entropy": "CE",
    "masked_cross_entropy": "masked CE",
    "balanced_masked_cross_entropy": "balanced masked CE",
    "js_divergence": "JS",
}


@settings
class MaskAPGD:
    """Maximise a loss of masks by Auto-PGD in a ball of falling radius: 2 eps, 1.5 eps, eps over 30, 30 and 40 % of the steps.

    Source: Croce, Singh & Hein 2023, arXiv:2306.12941, section 3. No image is dropped and none ends early: returned is the point of
    the last phase with the fewest right pixels, or the lowest mIoU of the image. A masked loss falls as pixels become wrong, so
    step sizes and restarts then follow the plain cross-entropy, as in the authors' code.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    targeted: ClassVar[bool] = True
    per_pixel: ClassVar[bool] = True
    loss: Literal["cross_entropy", "masked_cross_entropy", "balanced_masked_cross_entropy", "js_divergence"] = setting(
        "masked_cross_entropy", "what is maximised"
    )
    steps: int = setting(300, "gradient steps of the three radii together", ge=1, unit="steps")
    keep: Literal["accuracy", "mean_iou"] = setting(
        "accuracy", "which point counts: the one with the fewest right pixels, or of the lowest mIoU of the image"
    )

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        return f"APGD {_SHORT[self.loss]}"

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        task: Task = SEGMENTATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return images of the threat set, (B, C, H, W); NaN where the gradient is not finite.

        ``model`` returns logits (B, K, h, w), ``y`` are masks (B, H, W) int64, 255 where void; ``task`` is segmentation.
        """
        if task != SEGMENTATION:
            raise UserError(
                f"MaskAPGD attacks the masks of the task segmentation, got {task_name(task)}; use pgd or apgd"
            )
        best = _Lowest(x.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=torch.float64))
        if not threat.eps:
            return best.images
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(0)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))  # synchronises the device
        point = self._start(x, threat, generator)
        lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        done = 0
        with torch.no_grad(), fork_rng(seed):
            for number, (times, share) in enumerate(PHASES):
                last = number == len(PHASES) - 1
                steps = self.steps - done if last else int(share * self.steps)
                done += steps
                if steps:
                    path = _path(x, y, point, threat.norm, times * float(threat.eps))
                    lost |= self._climb(model, path, steps, best if last else None)
                    point = path.best
        return torch.where(per_image(lost, x), torch.nan, best.images)

    def _start(self, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        """Return a random point on the border of the first ball, as ``APGD`` does; the box is for ``_path`` to keep to."""
        draws = torch.empty_like(x)
        if threat.norm == "linf":
            draws.uniform_(-1, 1, generator=generator)
        else:
            draws.normal_(generator=generator)
        return x + (draws if threat.norm == "l1" else PHASES[0][0] * float(threat.eps) * unit(draws, threat.norm))

    def _climb(self, model: Model, path: SmoothPath | SparsePath, steps: int, best: _Lowest | None) -> Tensor:
        """Take ``steps`` steps, noting in ``best`` the points that count; return where a gradient was not finite, (B,)."""
        revise = path.revisions(steps)
        lost = torch.zeros(len(path.point), dtype=torch.bool, device=path.point.device)
        for step in range(steps + 1):
            if step:
                path.move(first=step == 1)
            slope = step < steps
            with torch.set_grad_enabled(slope):
                point = path.point.detach().requires_grad_(slope)
                logits = upsampled(at_least_float32(model(point)), path.labels.shape[1:])
                value = PIXEL_LOSSES[self.loss](logits, path.labels)
                gradient = torch.autograd.grad(value.sum(), point)[0] if slope else path.gradient
            lost |= ~gradient.isfinite().flatten(1).all(1)
            if self.loss.endswith("masked_cross_entropy"):
                value = PIXEL_LOSSES["cross_entropy"](logits.detach(), path.labels)
            if best is not None:
                best.see(path.point, self._score(logits.detach(), path.labels))
            path.settle(value.detach(), gradient, first=not step)
            if step in revise:
                path.revise(revise[step])
        return lost

    def _score(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return what is to be low, (B,) float64."""
        if self.keep == "accuracy":
            return SEGMENTATION.accuracy(SEGMENTATION.correct(logits, y), y)
        counts = SEGMENTATION.confusion(logits, y).double()
        right = counts.diagonal(dim1=1, dim2=2)
        return (right / (counts.sum(1) + counts.sum(2) - right)).nanmean(1)


def _path(x: Tensor, y: Tensor, point: Tensor, norm: str, radius: float) -> SmoothPath | SparsePath:
    """Return the way of all images from the nearest points to ``point`` in a ball of this radius."""
    rows = torch.arange(len(x), device=x.device)
    radius = min(radius, THREATS.get(norm).largest)
    ball = THREATS.get(norm)(eps=radius)
    if norm == "l1":
        return SparsePath(rows, x, y, y, point, ball)
    return SmoothPath(rows, x, y, y, ball.project(point, x), norm, radius)


@dataclass
class _Lowest:
    """The image of the lowest score of each, (B, C, H, W), and that score, (B,)."""

    images: Tensor
    scores: Tensor

    def see(self, images: Tensor, scores: Tensor) -> None:
        """Take note of ``images`` and their ``scores``."""
        lower = scores < self.scores
        self.images = torch.where(per_image(lower, images), images, self.images)
        self.scores = torch.where(lower, scores, self.scores)
