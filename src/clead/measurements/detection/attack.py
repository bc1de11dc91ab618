"""The attack that knows the detector: it looks for images that the classifier gets wrong and the detector accepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clead.interfaces import Threat
from clead.losses.margin import margin
from clead.measurements.detection.detectors import Detector
from clead.models.split import SplitModel
from clead.threats.geometry import flat, per_image

STRATEGIES = ("joint", "selective", "orthogonal")
"""Directions of the attack, one after the other on the images that have not evaded; see ``Evasion.direction``."""


@dataclass(frozen=True)
class Evasion:
    """Looks for misclassified images with a score ≤ ``threshold``.

    Attributes:
        model: in attack mode.
        detector: fitted.
        threat: norm and radius.
        threshold: images with a score up to it are accepted.
        scale: the size of margins and of scores on clean images.
        steps: of each search.
    """

    model: SplitModel
    detector: Detector
    threat: Threat
    threshold: float
    scale: tuple[float, float]
    steps: int

    def search(self, x: Tensor, y: Tensor, target: Tensor | None, begin: Tensor, strategy: str) -> Tensor:
        """Return per image the misclassified image of least score that was met.

        The margin climbed is that of any wrong class, or of ``target`` (B,) if given. Projected steepest ascent from ``begin``
        with steps that shrink from eps to eps/100; images are dropped once they have evaded. Where nothing is misclassified, the
        last point is returned.
        """
        threat = self.threat
        best, last = begin.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        index, x_adv = torch.arange(len(x), device=x.device), begin
        # A hair inside both borders, so that rounding in a batch of another size does not undo it.
        inside = self.threshold - 1e-4 * self.scale[1]
        for step in range(self.steps + 1):
            gap, score, rise, suspicion = self._slopes(x_adv, y, target)
            score = score.nan_to_num(nan=-torch.inf)  # never rejected, and +inf becomes the largest number
            wrong = (gap > 1e-5 * self.scale[0]) | gap.isnan()
            better = (wrong & (score < last[index])) | last[index].isinf() & ~wrong
            best[index[better]] = x_adv[better]
            last[index[better & wrong]] = score[better & wrong]
            keep = ~evaded(last[index], inside)
            if step == self.steps or not keep.any():  # synchronises the device
                break
            direction = self.direction(strategy, wrong, score > inside, rise, suspicion)
            x_adv = threat.project(threat.ascend(x_adv, direction, threat.eps * 0.01 ** (step / self.steps)), x)
            if not keep.all():
                index, x, y, x_adv = index[keep], x[keep], y[keep], x_adv[keep]
                target = None if target is None else target[keep]
        return best

    def _slopes(self, x: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return margin and score, (B,), and the gradients of the margin (to ``target``'s logit if given) and of the score."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            outputs = self.model.features_and_logits(x)
            gap, score = margin(outputs[1], y), self.detector.score(self.model, x, outputs)
            climbed = gap if target is None else -margin(outputs[1], target)
            (rise,) = torch.autograd.grad(climbed.sum(), x, retain_graph=True)
            (suspicion,) = torch.autograd.grad(score.sum(), x)
        return gap.detach(), score.detach(), rise, suspicion

    def direction(self, strategy: str, wrong: Tensor, rejected: Tensor, rise: Tensor, suspicion: Tensor) -> Tensor:
        """Return the direction in which to move, given the gradients of the margin and of the score.

        joint: of margin/s_m − max(0, score − threshold)/s_s, s the size of each on clean images. selective: raise the margin until
        the image is misclassified, then lower the score. orthogonal: the same, each without its part along the other's gradient
        (both Bryniarski et al. 2022, arXiv:2106.15023, section 4).
        """
        fool, hide = per_image(wrong, rise), per_image(rejected, rise)
        if strategy == "joint":
            return rise / self.scale[0] - torch.where(hide, suspicion / self.scale[1], 0)
        if strategy == "orthogonal":
            # Where the image is accepted anyway, the detector puts no bound on the direction.
            rise, suspicion = torch.where(hide, _without(rise, suspicion), rise), _without(suspicion, rise)
        return torch.where(fool, -suspicion, rise)


def _without(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a`` less its part along ``b``, per image."""
    along = (flat(a) * flat(b)).sum(1) / flat(b).square().sum(1).clamp_min(1e-30)
    return a - per_image(along, a) * b


def evaded(lowest: Tensor, threshold: float) -> Tensor:
    """Return where a misclassified image with a score up to ``threshold`` is known; ``lowest`` is infinite where none is known."""
    return (lowest <= threshold) & ~lowest.isposinf()
