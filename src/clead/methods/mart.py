"""MART: adversarial training that looks harder at images which the model misclassifies."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.interfaces import Batch, StepOutput
from clead.losses.divergence import kl_divergence
from clead.losses.precision import at_least_float32
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION


@METHODS.register("mart")
@settings
class MART(Method):
    """BCE(p(x_adv), y) + λ·KL(p(x) ‖ p(x_adv))·(1 − p_y(x)), x_adv maximising the cross-entropy.

    Source: Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR, eq. 11; BCE is
    ``boosted_cross_entropy``. Its gradient goes through all three factors of the second term, as in the authors' code. Departures:
    logarithms are exact (the authors add small constants inside them); one batch of clean and adversarial images goes forward, not
    two; the attack starts as ``attack`` says, not from Gaussian noise of 0.001. With mixed labels t (``data.cutmix``), which the
    paper does not know, the loss is Σ_k t_k · (the loss with y = k).
    """

    kl_weight: float = setting(
        5.0,
        "λ: weight of KL(clean ‖ adversarial)·(1 − p_y(clean)); the authors' code has 5 for ResNet, 6 for WideResNet",
        ge=0,
    )
    fold_batch_norm: bool = setting(
        False, "fold batch-norm into the convolutions during the inner attack: faster, same up to rounding"
    )

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the adversarial images, and the clean ones if λ > 0."""
        x = batch.images
        targets = batch.labels if batch.soft_labels is None else batch.soft_labels
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            objective = OBJECTIVES.get("cross_entropy")(model, x, targets)
            x_adv = step.attack(objective, x, step.threat, generator=step.generator)
        return Views({"clean": x, "adversarial": x_adv} if self.kl_weight else {"adversarial": x_adv}, batch)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the mean over the batch, and both terms before their weight."""
        joined = model(torch.cat(list(views.images.values())))
        logits = dict(zip(views.images, joined.chunk(len(views.images)), strict=True))
        adversarial, y, soft = logits["adversarial"], views.batch.labels, views.batch.soft_labels
        targets = F.one_hot(y, adversarial.shape[1]) if soft is None else soft
        loss = boosted_cross_entropy(adversarial, targets).mean()
        metrics = {"boosted_cross_entropy": loss.detach()}
        if self.kl_weight:
            clean = logits["clean"]
            weighted = (kl_divergence(clean, adversarial) * wrong_probability(clean, targets)).mean()
            loss = loss + self.kl_weight * weighted
            metrics["weighted_kl"] = weighted.detach()
            metrics["clean_accuracy"] = CLASSIFICATION.correct(clean, y).float().mean()
        metrics["robust_accuracy"] = CLASSIFICATION.correct(adversarial, y).float().mean()
        return StepOutput(loss, metrics)


def boosted_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE = Σ_y t_y · (−log p_y − log(1 − max_{k≠y} p_k)), the cross-entropy plus a margin (Wang et al. 2020, ICLR, eq. 8).

    Args:
        logits: (B, K), K ≥ 2.
        targets: (B, K), t: one-hot, or rows of sum 1.

    Returns:
        (B,) float32, ≥ 0, finite for finite logits.

    >>> boosted_cross_entropy(torch.zeros(1, 2), torch.tensor([[0, 1]]))
    tensor([1.3863])
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(at_least_float32(logits), dim=1)
        first, second = log_p.topk(2, dim=1).indices.T[..., None]
        # The strongest wrong class is the first one, or, where the first is right, the second. log(1 − p_k) is the log of what
        # the other classes have, which loses nothing when p_k rounds to 1.
        rest = [log_p.scatter(1, strongest, -torch.inf).logsumexp(1, keepdim=True) for strongest in (first, second)]
        is_first = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, first, True)
        return -(targets * (log_p + torch.where(is_first, rest[1], rest[0]))).sum(1)


def wrong_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """1 − Σ_y t_y·p_y, how far the model is from ``targets`` (B, K), rows of sum 1; logits (B, K) give (B,) float32 in [0, 1]."""
    with torch.autocast(logits.device.type, enabled=False):
        # The sum of what the other classes have: 1 − p_y of a confident model would be rounding.
        return ((1 - targets) * at_least_float32(logits).softmax(1)).sum(1)
