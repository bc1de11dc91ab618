"""Fast adversarial training by one step from a random start, with gradient alignment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clead.interfaces import Batch, StepOutput
from clead.losses.divergence import cosine_distance
from clead.losses.precision import at_least_float32
from clead.methods import METHODS
from clead.methods.base import StepContext, Views
from clead.methods.clead import INNER, CLead, Inner
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import flat

_IGNORED = -100  # by cross_entropy


@METHODS.register("fgsm_rs")
@settings
class FGSMRS(CLead):
    """PGD-AT for one-step attacks: E[CE(f(x_adv), y)] + λ·E[1 − cos(∇_x CE(f(x), y), ∇_x CE(f(x + η), y))], η random in the ball.

    With ``attack: {name: fgsm, random_start: true, step_size: 1.25}`` it is FGSM-RS (Wong et al. 2020, arXiv:2001.03994, algorithm
    3), but for the attack's gradient, which is taken in evaluation mode, not in train mode. The second term is GradAlign
    (Andriushchenko & Flammarion 2020, arXiv:2007.02617, eq. 4-5): it keeps the loss nearly linear in the ball, so that one step
    stays strong, and prevents catastrophic overfitting at large radii.

    λ is 0 by default, because FGSM-RS has no such term, the right λ grows with eps (its authors take 0.02·10^(eps·255/8)), and it
    makes a step more than three times as costly: 12 forward-equivalents more (``CostMeter``), for each of the two gradients 1 for
    the forward, 1 for the gradient to the image, and 4 for differentiating that by the weights.

    Both gradients are differentiated, as the equation says, and taken in train mode: in evaluation mode the weights drift away from
    the batch-norm statistics. Departures: x and x + η go forward in one batch and leave those statistics as they are; η is the
    threat's random start, which stays in [0, 1]; the attack may start at random, where the authors' own starts at x (random_start:
    false); an image whose gradient is 0 counts as aligned, as does one without a label.
    """

    tasks = ()  # classes alone

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    grad_align_weight: float = setting(
        0.0, "λ of GradAlign; 0.2 at 8/255 in the paper, ten times more at 16/255; 0: off, plain FGSM-RS", ge=0
    )

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the views of PGD-AT, and x + η if gradients are to be aligned."""
        views = super().views(model, batch, step)
        if self.grad_align_weight:
            views.images["neighbour"] = step.threat.random_start(batch.images, generator=step.generator)
        return views

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the loss of PGD-AT plus λ times the misalignment, and each term."""
        images, batch = dict(views.images), views.batch
        neighbour = images.pop("neighbour", None)
        local = batch if views.local_batch is None else views.local_batch
        output = super().loss(model, Views(images, batch), step)
        if neighbour is None:
            return output
        targets = local.labels.where(local.labels >= 0, _IGNORED) if local.soft_labels is None else local.soft_labels
        with _aside(model), model.gathering_outputs(None):
            each = misalignment(model, local.images, neighbour, targets)
        misaligned = each.mean()
        if step.world.world_size > 1:  # the value is that of all processes; their gradients will be averaged
            misaligned = misaligned + (step.world.all_gather(each).mean() - misaligned).detach()
        loss = output.loss + self.grad_align_weight * misaligned
        return StepOutput(loss, {**output.metrics, "gradient_misalignment": misaligned.detach()})


def misalignment(model: nn.Module, x: Tensor, neighbour: Tensor, y: Tensor) -> Tensor:
    """1 − cos(∇_x CE(f(x), y), ∇_x CE(f(x'), y)) per image (Andriushchenko & Flammarion 2020, arXiv:2007.02617, eq. 4).

    Args:
        model: returns logits (B, K), also of both at once, (2B, K).
        x: (B, C, H, W) float in [0, 1].
        neighbour: x', of the same shape.
        y: (B,) int64, or (B, K) float with rows of sum 1.

    Returns:
        (B,) float32 in [0, 2], differentiable by the weights (a double backward); 0 where one of the gradients is 0.
    """
    points = torch.cat([x, neighbour]).detach().requires_grad_()
    value = CLASSIFICATION.loss(model(points.clone()), torch.cat([y, y])).sum()
    (gradient,) = torch.autograd.grad(value, points, create_graph=True)
    gradient = at_least_float32(flat(gradient))
    # The cosine does not change when gradients are scaled, but those of a confident model would underflow in it.
    scale = gradient.detach().abs().amax(1, keepdim=True)
    at_x, at_neighbour = (gradient / scale.where(scale > 0, 1)).chunk(2)
    defined = (scale > 0).view(2, -1).all(0)[:, None]
    return cosine_distance(at_x.where(defined, 1), at_neighbour.where(defined, 1))


@contextmanager
def _aside(model: SplitModel) -> Generator[None, None, None]:
    """Let ``model`` compute without moving its batch-norm statistics, and not compiled, which has no double backward."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    compiled, model._compiled = model._compiled, None
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        model._compiled = compiled
