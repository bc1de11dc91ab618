"""The joint objective of C-LEAD: adversarial, clean, consistency and contrastive terms, each with its weight.

Plain training, PGD-AT and TRADES are settings of it (``standard.py``, ``pgd_at.py``, ``trades.py``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.interfaces import Attack, Batch, Objective, StepOutput, Threat
from clead.losses.contrastive import nt_xent, published, supcon
from clead.losses.divergence import kl_divergence
from clead.methods import METHODS
from clead.methods.base import Method, Views
from clead.models.fold import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings


@METHODS.register("clead")
@settings
class CLead(Method):
    """min_θ E[α·CE(f(x_adv), y) + β·CE(f(x), y) + κ·KL(f(x) ‖ f(x_adv)) + λ·L_con(z, z_aug, z_adv)].

    x_adv maximises J inside the threat set. Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249) for L_con and for weights
    optimised alongside the perturbations; Madry et al. 2018 (arXiv:1706.06083) for α; Zhang et al. 2019 (arXiv:1901.08573) for κ.
    This departs from the paper, which makes its adversarial images once, offline: here they are made anew at every step.
    """

    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(6.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.3, "λ: weight of the contrastive term", ge=0)
    contrastive_loss: Literal["published", "nt_xent", "supcon"] = setting(
        "supcon",
        "form of the contrastive term: clean anchors as published, symmetric NT-Xent, or label-aware SupCon",
    )
    temperature: float = setting(0.5, "τ of the contrastive term; 0.1 as published", gt=0)
    augmented_view: bool = setting(
        True, "contrast a second augmentation of the image (data.view) too, not only x and x_adv"
    )
    embedding_dim: int = setting(128, "size of the projected embedding", ge=2)
    inner: Literal["cross_entropy", "kl", "embedding", "contrastive"] = setting(
        "kl",
        "J, what the inner attack maximises: cross-entropy, KL to the clean prediction, feature distance, NT-Xent at τ",
    )
    inner_contrastive_weight: float = setting(0.0, "μ: weight of NT-Xent(x, x_adv) added to J", ge=0)
    label_smoothing: float = setting(0.0, "of every cross-entropy that is minimised; the attack's has none", ge=0, lt=1)
    separate_forwards: bool = setting(
        False,
        "forward each view by itself, so that batch-norm statistics are per view, instead of all views in one batch",
    )
    fold_batch_norm: bool = setting(
        False, "fold batch-norm into the convolutions during the inner attack: faster, same up to rounding"
    )

    def __post_init__(self) -> None:
        """Ask for something to learn from."""
        if not (self.adversarial_weight or self.clean_weight or self.kl_weight or self.contrastive_weight):
            raise ValueError("at least one weight must be above 0, got all four 0; clean_weight = 1 is plain training")

    @property
    def uses_embedding(self) -> bool:
        """Whether a projection head has to be trained."""
        return self.contrastive_weight > 0

    @property
    def uses_second_view(self) -> bool:
        """Whether batches need a second augmentation of their images."""
        return self.contrastive_weight > 0 and self.augmented_view

    @property
    def uses_attack(self) -> bool:
        """Whether adversarial images are made at all."""
        return self.adversarial_weight > 0 or self.kl_weight > 0 or self.contrastive_weight > 0

    def views(
        self,
        model: SplitModel,
        batch: Batch,
        *,
        threat: Threat,
        attack: Attack,
        generator: torch.Generator,
        progress: float = 0.0,
        memory: nn.Module | None = None,
    ) -> Views:
        """Return the clean, adversarial and augmented images, as far as some term needs them."""
        x = batch.images
        views = {}
        if self.clean_weight or self.kl_weight or self.contrastive_weight:
            views["clean"] = x
        if self.uses_attack:
            targets = batch.labels if batch.soft_labels is None else batch.soft_labels
            views["adversarial"] = self._attack(model, x, targets, threat, attack, generator)
        if self.uses_second_view:
            assert batch.second_view is not None, "the loader was built without a second view"
            views["augmented"] = batch.second_view
        return Views(views, batch)

    def loss(
        self, model: SplitModel, views: Views, *, progress: float = 0.0, memory: nn.Module | None = None
    ) -> StepOutput:
        """Return the weighted sum of the terms, and each term."""
        y = views.batch.labels
        targets = y if views.batch.soft_labels is None else views.batch.soft_labels
        features, logits = self._forward(model, views.images)

        loss = torch.zeros((), device=y.device)
        metrics: dict[str, Tensor] = {}

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal loss
            # A weight of one and a first term are not multiplied and added, so that a reduced form is exact to the last bit.
            term = value if weight == 1 else weight * value
            loss = loss + term if metrics else term
            metrics[name] = value.detach()

        if self.clean_weight:
            add(
                "clean_cross_entropy",
                self.clean_weight,
                F.cross_entropy(logits["clean"].float(), targets, label_smoothing=self.label_smoothing),
            )
        if self.adversarial_weight:
            add(
                "adversarial_cross_entropy",
                self.adversarial_weight,
                F.cross_entropy(logits["adversarial"].float(), targets, label_smoothing=self.label_smoothing),
            )
        if self.kl_weight:
            add("kl", self.kl_weight, kl_divergence(logits["clean"], logits["adversarial"]).mean())
        if self.contrastive_weight:
            z = [model.embedding(features[name]) for name in ("clean", "augmented", "adversarial") if name in features]
            add("contrastive", self.contrastive_weight, self._contrast(z, y).mean())
        for name, key in (("clean", "clean_accuracy"), ("adversarial", "robust_accuracy")):
            if name in logits:
                metrics[key] = (logits[name].argmax(1) == y).float().mean()
        return StepOutput(loss, metrics)

    def _attack(
        self,
        model: SplitModel,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        attack: Attack,
        generator: torch.Generator,
    ) -> Tensor:
        with attack_mode(model), folded(model, x) if self.fold_batch_norm else nullcontext():
            objective: Objective = self._objective(self.inner, model, x, y)
            if self.inner_contrastive_weight:
                base, contrast = objective, self._objective("contrastive", model, x, y)
                # Two forwards per step: the price of keeping every objective a function of x_adv alone.
                return attack(
                    lambda x_adv: base(x_adv) + self.inner_contrastive_weight * contrast(x_adv),
                    x,
                    threat,
                    generator=generator,
                )
            return attack(objective, x, threat, generator=generator)

    def _objective(self, name: str, model: SplitModel, x: Tensor, y: Tensor) -> Objective:
        options = {"temperature": self.temperature} if name == "contrastive" else {}
        return OBJECTIVES.get(name)(model, x, y, **options)

    def _forward(self, model: SplitModel, views: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.separate_forwards or len(views) == 1:
            outputs = [model.features_and_logits(view) for view in views.values()]
            features, logits = zip(*outputs, strict=True)
        else:
            joined = model.features_and_logits(torch.cat(list(views.values())))
            features, logits = (part.chunk(len(views)) for part in joined)
        return dict(zip(views, features, strict=True)), dict(zip(views, logits, strict=True))

    def _contrast(self, z: list[Tensor], y: Tensor) -> Tensor:
        if self.contrastive_loss == "supcon":
            return supcon(z, y, self.temperature)
        return (published if self.contrastive_loss == "published" else nt_xent)(z, self.temperature)
