"""Adversarial distillation: a student that answers under attack as a teacher does on the clean image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.interfaces import Batch, StepOutput
from clead.losses.divergence import kl_divergence
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


@METHODS.register("ard")
@settings
class ARD(Method):
    """α·t²·KL(T_t(x) ‖ S_t(x_adv)) + γ·CE(S(x), y), T the teacher (ARD: Goldblum et al. 2020, arXiv:1905.09747, eq. 3).

    The teacher is ``train.teacher``, in evaluation mode. The paper has γ = 1 − α and sets α to 1; x_adv maximises the
    cross-entropy. Of images without a label the last term takes nothing.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the distance between x_adv and the teacher's x", ge=0)
    clean_weight: float = setting(0.0, "weight of the distance between x and the teacher's x", ge=0)
    label_weight: float = setting(0.0, "γ: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial) of the student, as in TRADES", ge=0)
    distance: Literal["kl", "squared"] = setting(
        "kl", "between answers: KL(teacher ‖ student), or the mean squared difference of logits"
    )
    temperature: float = setting(30.0, "t: divides the logits inside the KL, which is multiplied by t²", gt=0)
    inner: Literal["cross_entropy", "kl", "teacher"] = setting(
        "cross_entropy",
        "J, what the inner attack maximises: cross-entropy, KL to the student's clean prediction or to the teacher's",
    )
    fold_batch_norm: bool = setting(
        False, "fold batch-norm into the convolutions during the inner attack: faster, same up to rounding"
    )

    needs_teacher = uses_unlabelled = True

    def __post_init__(self) -> None:
        """Ask for something to learn from the teacher."""
        if not (self.adversarial_weight or self.clean_weight):
            raise ValueError(
                "nothing is learnt from the teacher, got adversarial_weight 0 and clean_weight 0; set one above 0, or take "
                "method pgd_at"
            )

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the adversarial images, the clean ones if some term needs them, and what the teacher says of the clean ones."""
        x, taught = batch.images, step.taught(batch.images)
        batch, attacked = known_labels(model, batch, predict=self.inner == "cross_entropy")
        targets = attacked if batch.soft_labels is None else batch.soft_labels
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            if self.inner == "teacher":

                def objective(x_adv: Tensor) -> Tensor:
                    return kl_divergence(taught.logits, model(x_adv))

            else:
                objective = OBJECTIVES.get(self.inner)(model, x, targets)
            x_adv = step.attack(objective, x, step.threat, generator=step.generator)
        clean = {"clean": x} if self.clean_weight or self.label_weight or self.kl_weight else {}
        return Views({**clean, "adversarial": x_adv}, batch, taught=taught)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the weighted sum of the terms, and each term; accuracies are of images with a label of their own."""
        outputs, batch = forward(model, views.images), views.batch
        teacher = step.of_all(views.taught).logits
        adversarial = outputs["adversarial"].logits
        terms = {"adversarial_distance": (self.adversarial_weight, self._distance(teacher, adversarial))}
        if self.clean_weight:
            terms["clean_distance"] = (self.clean_weight, self._distance(teacher, outputs["clean"].logits))
        if self.kl_weight:
            terms["kl"] = (self.kl_weight, kl_divergence(outputs["clean"].logits, adversarial).mean())
        if self.label_weight:
            known = None if batch.labelled is None else batch.labels >= 0
            targets = batch.labels.clamp_min(0) if batch.soft_labels is None else batch.soft_labels
            losses = F.cross_entropy(at_least_float32(outputs["clean"].logits), targets, reduction="none")
            terms["clean_cross_entropy"] = (self.label_weight, mean_of(losses, known))
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        metrics = {name: value.detach() for name, (_, value) in terms.items()}
        for name, key in (("clean", "clean_accuracy"), ("adversarial", "robust_accuracy")):
            if name in outputs:
                right = CLASSIFICATION.correct(outputs[name].logits, batch.labels)
                metrics[key] = mean_of(right.float(), batch.labelled)
        return StepOutput(loss, metrics)

    def _distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.distance == "squared":
            return F.mse_loss(at_least_float32(student), at_least_float32(teacher))
        t = self.temperature
        return t**2 * kl_divergence(teacher / t, student / t).mean()
