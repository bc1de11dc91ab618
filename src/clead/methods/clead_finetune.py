"""The joint objective with terms that keep the geometry of a pre-trained encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clead.interfaces import Batch
from clead.losses.anchor import prototype_cross_entropy, relative_distance
from clead.methods import METHODS
from clead.methods.base import StepContext, Views
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.labels import mean_of
from clead.methods.view_forward import Outputs
from clead.models.split import SplitModel
from clead.settings import setting, settings


class Prototypes(nn.Module):
    """The mean of the teacher's unit features of each class, over all images seen so far: (K, D)."""

    sums: Tensor

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(classes, dim))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count in features (B, D) of labels (B,); those below 0 are left out."""
        known = labels >= 0
        unit = nn.functional.normalize(features[known].to(self.sums), dim=1)
        self.sums.index_add_(0, labels[known], unit)


@METHODS.register("clead_finetune")
@settings
class CLeadFinetune(CLead):
    """``clead`` + ν·‖h(x_adv) − h₀(x)‖² / E‖h₀‖² + ρ·TeCoA(h(x_adv), P): h₀ is the teacher's encoder, P_k its mean of class k.

    The first is FARE's (arXiv:2402.12336), the second TeCoA's (arXiv:2212.07016) with prototypes instead of texts; both hold the
    features under attack where those of the pre-trained model are. The teacher is ``train.teacher``, mostly ``start``. By default
    the rest is PGD-AT.
    """

    tasks = ()  # classes alone

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    anchor_weight: float = setting(1.0, "ν: weight of the distance to the teacher's features", ge=0)
    prototype_weight: float = setting(0.0, "ρ: weight of the cross-entropy of cosines to the class prototypes", ge=0)
    prototype_temperature: float = setting(0.1, "τ of the cosines to the prototypes", gt=0)

    needs_teacher = True

    def __post_init__(self) -> None:
        """Ask for something to hold on to."""
        super().__post_init__()
        if not (self.anchor_weight or self.prototype_weight):
            raise ValueError(
                "nothing is held on to, got anchor_weight 0 and prototype_weight 0; set one above 0, or take method clead"
            )
        if not self.uses_attack or self.replays > 1:
            raise ValueError(
                "the features of adversarial images are held; set adversarial_weight above 0 and replays to 1"
            )

    @property
    def uses_features(self) -> bool:
        """True: features are what is held."""
        return True

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the prototypes, if they are used."""
        return Prototypes(model.num_classes, model.feature_dim) if self.prototype_weight else None

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the views of ``clead``, and what the teacher says of the clean images."""
        taught = step.taught(batch.images)
        views = super().views(model, batch, step)._replace(taught=taught)
        if isinstance(step.state, Prototypes):
            everywhere = step.of_all(taught).features
            labels = views.batch.labels if step.world.world_size == 1 else step.world.all_gather(views.batch.labels)
            step.state.add(everywhere, labels)
        return views

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the distance to the teacher's features, and to the prototypes."""
        features, labels = outputs["adversarial"].features, views.batch.labels
        terms = {}
        if self.anchor_weight:
            anchors = step.of_all(views.taught).features
            terms["anchor"] = (self.anchor_weight, relative_distance(features, anchors).mean())
        if isinstance(step.state, Prototypes):
            known = None if views.batch.labelled is None else labels >= 0
            losses = prototype_cross_entropy(features, step.state.sums, labels.clamp_min(0), self.prototype_temperature)
            terms["prototypes"] = (self.prototype_weight, mean_of(losses, known))
        return terms
