"""Hardening an encoder by itself: its features under attack are to be those of the model that it was."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.interfaces import Batch, StepOutput
from clead.losses.anchor import relative_distance
from clead.losses.contrastive import nt_xent
from clead.losses.precision import at_least_float32
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views
from clead.methods.labels import known_labels, mean_of
from clead.methods.view_forward import forward
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION


@METHODS.register("clead_embed")
@settings
class CLeadEmbed(Method):
    """‖h(x_adv) − h₀(x)‖² / E‖h₀‖² + λ·NT-Xent(h(x_adv), h₀(x)), x_adv maximising the first; h₀ is the teacher's encoder.

    With λ = 0 it is FARE (Schlarmann et al. 2024, arXiv:2402.12336) up to that scale. No label is looked at: what uses the
    features, a frozen classifier or a search for neighbours, works as before, and under attack. The teacher is ``train.teacher``,
    mostly ``start``.
    """

    contrastive_weight: float = setting(
        0.0,
        "λ: weight of NT-Xent, which asks that the features of an image be nearer to its own than to another image's",
        ge=0,
    )
    temperature: float = setting(0.1, "τ of the contrastive term", gt=0)
    clean_weight: float = setting(0.0, "weight of the same distance of clean images", ge=0)
    frozen_classifier: bool = setting(
        True,
        "the classifier that the training starts with stays as it is, and its robust accuracy chooses the best weights; false: the "
        "model has none that is worth it, and the features' nearest neighbours choose",
    )
    fold_batch_norm: bool = setting(
        False, "fold batch-norm into the convolutions during the inner attack: faster, same up to rounding"
    )

    needs_teacher = uses_unlabelled = uses_features = contrast_trains_encoder = True

    @property
    def uses_classifier(self) -> bool:
        """Whether validation looks at the classifier."""
        return self.frozen_classifier

    @property
    def contrasts(self) -> bool:
        """Whether images are contrasted with one another."""
        return self.contrastive_weight > 0

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the adversarial images, the clean ones if their distance counts, and the teacher's features of the clean ones."""
        x, taught = batch.images, step.taught(batch.images)
        batch, _ = known_labels(model, batch, predict=False)

        def objective(x_adv: Tensor) -> Tensor:
            return relative_distance(model.features(x_adv), taught.features)

        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            x_adv = step.attack(objective, x, step.threat, generator=step.generator)
        clean = {"clean": x} if self.clean_weight else {}
        return Views({**clean, "adversarial": x_adv}, batch, taught=taught)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the weighted sum of the terms, and each term; the accuracy is the frozen classifier's."""
        outputs, anchors = forward(model, views.images), step.of_all(views.taught).features
        adversarial = outputs["adversarial"]
        loss = relative_distance(adversarial.features, anchors).mean()
        metrics = {"adversarial_distance": loss.detach()}
        if self.clean_weight:
            clean = relative_distance(outputs["clean"].features, anchors).mean()
            loss, metrics["clean_distance"] = loss + self.clean_weight * clean, clean.detach()
        if self.contrastive_weight:
            with torch.autocast(anchors.device.type, enabled=False):
                z = [F.normalize(at_least_float32(each), dim=1) for each in (adversarial.features, anchors)]
                contrast = nt_xent(z, self.temperature).mean()
            loss, metrics["contrastive"] = loss + self.contrastive_weight * contrast, contrast.detach()
        if self.frozen_classifier:
            right = CLASSIFICATION.correct(adversarial.logits, views.batch.labels)
            metrics["robust_accuracy"] = mean_of(right.float(), views.batch.labelled)
        return StepOutput(loss, metrics)
