"""NuAT: clean cross-entropy plus the nuclear norm of how far one step moves the logits of a batch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from clead.attacks.gradient import value_and_gradient
from clead.interfaces import Batch, Objective
from clead.losses.precision import at_least_float32
from clead.methods import METHODS
from clead.methods.base import StepContext, Views, over_whole_batch
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.one_step import Turns
from clead.methods.view_forward import Outputs
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks import Task


@METHODS.register("nuat")
@settings
class NuAT(CLead):
    """E[CE(f(x), y)] + λ(t)·‖f(X_adv) − f(X)‖_* / B, ‖·‖_* the nuclear norm of the B × K matrix of a batch's differences.

    Source: Sriramanan et al. 2021, "Towards Efficient and Effective Adversarial Training", NeurIPS, algorithm 1. X_adv is a step
    of eps from x ± eps/2, signs at random, clipped to ball and box; the step climbs the cross-entropy, at every other step plus
    λ(t)·‖f(X_adv) − f(X)‖_*. λ(t) = λ·t, t the part of the training that lies behind. ``attack`` is not used.

    Departures: the gradient is taken in evaluation mode (``train.attack_mode``), ``train.ema`` averages weights where the paper's
    code does, clean and adversarial images go forward in one batch, and λ rises evenly.
    """

    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    nuclear_weight: float = setting(4.0, "λ at the end: weight of the nuclear norm, per image; 4 for ResNet-18", gt=0)

    tasks = ()  # the nuclear norm is that of a matrix
    changes_over_training = True
    typical_steps = (0, 2)

    @property
    def uses_attack(self) -> bool:
        """True: the nuclear norm needs adversarial images."""
        return True

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return what counts the steps."""
        return Turns()

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, in the threat set."""
        x, threat = batch.images, step.threat
        if not threat.eps:
            return {"adversarial": x}
        start = threat.ascend(x, step.uniform(x) - 0.5, threat.eps / 2).clamp(0, 1)
        every_other = isinstance(step.state, Turns) and step.state.next() % 2 == 1
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            if every_other:
                labels, weight = step.world.all_gather(y), self.nuclear_weight * step.progress
                objective = over_whole_batch(
                    lambda: loss_and_nuclear_norm(model, x, labels, weight, step.task), model, len(x), step.world
                )
            else:
                objective = self.inner_objective(model, x, y, step)
            _, gradient = value_and_gradient(objective, start)
        return {"adversarial": threat.project(threat.ascend(start, gradient, threat.eps), x)}

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the nuclear norm per image."""
        change = outputs["adversarial"].logits - outputs["clean"].logits
        return {"nuclear_norm": (self.nuclear_weight * step.progress, nuclear_norm(change) / len(change))}


def loss_and_nuclear_norm(model: SplitModel, x: Tensor, y: Tensor, weight: float, task: Task) -> Objective:
    """Return x_adv ↦ CE(f(x_adv), y) + weight·‖f(X_adv) − f(X)‖_* / B, one per image; called under ``attack_mode``."""
    with torch.no_grad():
        clean = model(x)

    def value(x_adv: Tensor) -> Tensor:
        logits = model(x_adv)
        return task.loss(logits, y) + weight * nuclear_norm(logits - clean) / len(logits)

    return value


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the singular values of (B, K), in float32."""
    with torch.autocast(matrix.device.type, enabled=False):
        return torch.linalg.matrix_norm(at_least_float32(matrix), ord="nuc")
