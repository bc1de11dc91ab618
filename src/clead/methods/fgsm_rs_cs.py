"""FGSM-RS with smooth convergence: one step from noise, and a loss that may not jump from epoch to epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clead.interfaces import Batch
from clead.methods import METHODS
from clead.methods.base import StepContext, Views
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.one_step import Turns, noise
from clead.methods.view_forward import Outputs
from clead.models.split import SplitModel
from clead.settings import setting, settings


@METHODS.register("fgsm_rs_cs")
@settings
class FGSMRSCS(CLead):
    """E[CE(f(x_adv), y)] ± w·E[CE(f(x + η), y)], + where a batch's second loss is more than γ above the epoch before, − below.

    Source: ConvergeSmooth (Zhao et al. 2023, arXiv:2308.12857), in the form for FGSM-RS that the FastAT benchmark has: η is uniform
    in the ball, x_adv = x + η + eps·sign ∇_x CE(f(x + η), y), clipped to [0, 1] and not to the ball. Within γ of the mean of the
    epoch before, and in the first two epochs, there is no second term. ``attack`` is not used.

    Departures: compared with the epoch before is the loss whose gradient makes the step, in evaluation mode (``train.attack_mode``)
    and without label smoothing, not that of the second forward. The benchmark smooths labels twice (a share of 2/3 in all): its
    loss moves less, and the same γ holds it more seldom. γ is constant, the last epoch is as those before, and both points go
    forward in one batch.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    smoothness_weight: float = setting(1.0, "w: weight of the loss that is held where it was", ge=0)
    stride: float = setting(0.03, "γ: how far the loss may move from one epoch's mean without being held", ge=0)

    remembers_images = True

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the mean losses of this epoch and of the one before."""
        return EpochLoss()

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, up to 2·eps away, and where they started; note the loss there."""
        x = batch.images
        start = (x + noise(x, step)).clamp(0, 1)
        losses, gradient = self.inner_gradient(model, batch, y, start, step)
        if isinstance(step.state, EpochLoss):
            step.state.add(step.world.all_gather(losses), self.stride)
        return {"adversarial": step.threat.ascend(start, gradient, step.threat.eps).clamp(0, 1), "start": start}

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the loss where the images started, with its sign."""
        direction = step.state.direction if isinstance(step.state, EpochLoss) else 0.0
        loss = self._cross_entropy(outputs["start"].logits, views.batch, step.task)
        return {"smoothness": (self.smoothness_weight, direction * loss)}


class EpochLoss(Turns):
    """Sum and number of this epoch's losses, ``so_far`` (2,), the mean of the epoch before, and where the last batch's mean is.

    ``direction`` is 1 above the epoch before, −1 below, and 0 near it. ``count`` is the number of images so far; an epoch ends with
    the batch that completes ``images`` of them.
    """

    so_far: Tensor
    before: Tensor
    direction: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        for name, shape in (("so_far", (2,)), ("before", ()), ("direction", ())):
            self.register_buffer(name, torch.zeros(shape))

    def for_images(self, count: int) -> None:
        """Say how many images an epoch has."""
        self.images = count

    def add(self, losses: Tensor, stride: float) -> None:
        """Compare the mean of a batch's losses, (B,), with the epoch before, from the third epoch on; add them to this epoch's."""
        apart = losses.mean() - self.before
        epoch, self.count = self.count // self.images if self.images else 0, self.count + len(losses)
        self.direction = apart.sign() * (apart.abs() > stride) * (epoch >= 2)
        self.so_far = self.so_far + torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        if self.images and self.count // self.images > epoch:
            self.before, self.so_far = self.so_far[0] / self.so_far[1], torch.zeros_like(self.so_far)
