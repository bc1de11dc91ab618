"""LIET: one step from the direction that stands for an image's class, which training is to learn nothing from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Batch
from clead.losses.divergence import js_divergence
from clead.methods import METHODS
from clead.methods.base import StepContext, Views
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.one_step import Turns, noise
from clead.methods.view_forward import Outputs
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings


@METHODS.register("liet")
@settings
class LIET(CLead):
    """E[CE(f(x_adv), ỹ)] + λ(t)·JS(f(x_adv), f(x + η)), x_adv one step of eps from x + η, clipped to ball and box.

    Source: Pan et al. 2025, "Mitigating Catastrophic Overfitting in Fast Adversarial Training via Label Information Elimination",
    ICCV. η = ±eps·sign ∇ CE(f(grey), y), the slope at a plain grey image (0.5); one sign per batch; a random share of its pixels,
    between both of ``noise_share``, is uniform noise instead. λ(t) = λ·t, t the part of the training that lies behind. ỹ gives
    ``random_smoothing`` of the label to the other classes, at random. ``attack`` is not used.

    Departures: the gradient is taken in evaluation mode (``train.attack_mode``) and of the plain cross-entropy, and both points go
    forward in one batch. The paper's other form for eps above 8/255, wider noise and no projection, is not there.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    divergence_weight: float = setting(100.0, "λ at the end: weight of the Jensen-Shannon divergence", ge=0)
    random_smoothing: float = setting(0.6, "share of a label that other classes get at random", ge=0, lt=1)
    noise_share: tuple[float, float] = setting(
        (0.1, 0.5), "smallest and largest share of noise in η", unit="fractions of pixels"
    )
    every: int = setting(20, "how long the directions of the classes are used", ge=1, unit="steps")

    def __post_init__(self) -> None:
        """Ask for shares in order."""
        super().__post_init__()
        if self.inner != "cross_entropy":
            raise ValueError(f"the start leads away from a class, got inner {self.inner}; set it to cross_entropy")
        low, high = self.noise_share
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"noise_share must be two shares in [0, 1], the smaller first, got {[low, high]}; give [0.1, 0.5]"
            )

    tasks = ()  # a direction belongs to a class
    changes_over_training = True
    typical_steps = (1, 2)  # the directions of the classes, every 20 steps, are a hundredth of the cost

    def problems(self, data: Any, train: Any) -> list[str]:
        """Return what of the settings of data and training does not go with this method, one line each."""
        if data.cutmix:
            return [
                f"data.cutmix: a mixed image has no class whose direction it starts in, got {data.cutmix:g}; set it to 0"
            ]
        return super().problems(data, train)

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the directions of the classes."""
        return Directions(model.num_classes, shape)

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the views, with labels that are smoothed at random."""
        views = super().views(model, batch, step)
        if not self.random_smoothing:
            return views
        labels = views.batch.labels
        drawn = step.uniform(batch.images.new_zeros(len(labels), model.num_classes))
        one_hot = F.one_hot(labels.clamp_min(0), model.num_classes).to(drawn)
        drawn = (1 - one_hot) * drawn.clamp_min(torch.finfo(drawn.dtype).tiny)
        soft = (1 - self.random_smoothing) * one_hot + self.random_smoothing * drawn / drawn.sum(1, keepdim=True)
        return views._replace(batch=views.batch._replace(soft_labels=soft))

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, in the threat set, and where they started."""
        x, threat = batch.images, step.threat
        if not threat.eps:
            return {"adversarial": x, "start": x}
        state = (
            step.state
            if isinstance(step.state, Directions)
            else Directions(model.num_classes, tuple(x.shape[1:])).to(x.device)
        )
        if state.next() % self.every == 0:
            state.directions = class_directions(model, state.directions)
        low, high = self.noise_share
        share, sign = torch.rand(2, generator=step.generator, device=x.device)
        informed = threat.ascend(x, state.directions[y], threat.eps) - x
        eta = torch.where(step.uniform(x) < low + (high - low) * share, noise(x, step), informed)
        start = (x + torch.where(sign < 0.5, -eta, eta)).clamp(0, 1)
        _, gradient = self.inner_gradient(model, batch, y, start, step)
        return {"adversarial": threat.project(threat.ascend(start, gradient, threat.eps), x), "start": start}

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the divergence of the predictions at both points."""
        divergence = js_divergence(outputs["start"].logits, outputs["adversarial"].logits).mean()
        return {"divergence": (self.divergence_weight * step.progress, divergence)}


class Directions(Turns):
    """∇ CE(f(grey), k) of every class k, (K, C, H, W), and the number of steps."""

    directions: Tensor

    def __init__(self, classes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(classes, *shape))


def class_directions(model: SplitModel, like: Tensor) -> Tensor:
    """Return ∇_x CE(f(x), k) at grey images x = 0.5, one for each class k, (K, C, H, W)."""
    with attack_mode(model):
        objective = OBJECTIVES.get("cross_entropy")(model, like, torch.arange(len(like), device=like.device))
        return value_and_gradient(objective, torch.full_like(like, 0.5))[1]
