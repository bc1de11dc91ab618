"""The joint objective of C-LEAD: adversarial, clean, consistency and contrastive terms, each with its weight.

Plain training, PGD-AT and TRADES are settings of it (``standard.py``, ``pgd_at.py``, ``trades.py``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.distributed import World
from clead.interfaces import Batch, Objective, StepOutput
from clead.losses.contrastive import asymmetric, nt_xent, prototype, published, supcon
from clead.losses.divergence import kl_divergence
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views, over_whole_batch
from clead.methods.free_adversary import PersistentDelta, replayed
from clead.methods.labels import classes, distinct, known_labels, mean_of
from clead.methods.moco import MomentumQueue, Prototypes
from clead.methods.view_forward import dimension, find_layer, forward, unit_vectors
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION

Inner = Literal["cross_entropy", "kl", "embedding", "contrastive", "supcon"]
INNER = "J, what the inner attack maximises: cross-entropy, KL to the clean prediction, feature distance, NT-Xent or SupCon at τ"
_OF_A_BATCH = ("contrastive", "supcon")  # of these J an image's value depends on the other images


@METHODS.register("clead")
@settings
class CLead(Method):
    """min_θ E[α·CE(f(x_adv), y) + β·CE(f(x), y) + κ·KL(f(x) ‖ f(x_adv)) + λ·L_con(z, z_aug, z_adv)].

    x_adv maximises J inside the threat set. Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249) for L_con and for weights
    optimised alongside the perturbations; Madry et al. 2018 (arXiv:1706.06083) for α; Zhang et al. 2019 (arXiv:1901.08573) for κ.
    This departs from the paper, which makes its adversarial images once, offline: here they are made anew at every step.

    Of images without a label (``batch.labelled``) the cross-entropies take nothing and the KL all; SupCon takes each for a class
    of its own, prototypes skip them, and the inner cross-entropy leads away from the model's own prediction.
    """

    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(6.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.3, "λ: weight of the contrastive term", ge=0)
    contrastive_ramp: Literal["constant", "up", "down"] = setting(
        "constant", "λ over training: constant, times the part that lies behind, or times the part that is left"
    )
    contrastive_loss: Literal["published", "nt_xent", "supcon", "prototype", "asymmetric"] = setting(
        "supcon",
        "form of the contrastive term: clean anchors as published, symmetric NT-Xent, label-aware SupCon, cosines to learnt "
        "class prototypes, or NT-Xent with adversaries as inferior positives (A-InfoNCE)",
    )
    temperature: float = setting(0.5, "τ of the contrastive term; 0.1 as published", gt=0)
    temperature_end: float | None = setting(
        None, "τ at the end of training, to which it moves linearly; none: constant", gt=0
    )
    clean_view: bool = setting(True, "contrast the clean image too")
    augmented_view: bool = setting(
        True, "contrast a second augmentation of the image (data.view) too, not only x and x_adv"
    )
    stop_gradient: bool = setting(
        False, "hold clean and augmented vectors constant in the contrast: only the adversarial ones are moved"
    )
    negatives: Literal["all", "other_classes", "hard"] = setting(
        "all",
        "in the denominators beside the positive: all other images; those of other classes; or negatives (supcon: of other "
        "classes, else all others) weighted by exp(hardness · similarity/τ)",
    )
    hardness: float = setting(1.0, "β of negatives hard; 0 weights all alike", ge=0)
    asymmetry: float = setting(
        0.8, "of contrastive_loss asymmetric: share of a pair's gradient that goes to the adversary", ge=0, le=1
    )
    contrastive_level: Literal["embedding", "features", "logits"] = setting(
        "embedding",
        "what is contrasted: the projected embedding, the encoder's features, or the logits; of unit length",
    )
    contrastive_layer: str | None = setting(
        None,
        "contrast this inner layer's output instead, such as encoder.convolutions.5, averaged over space; needs "
        "contrastive_level features; none: the last",
    )
    queue: int = setting(
        0, "keys of earlier batches to contrast with, by a momentum encoder that sees the clean image; 0: none", ge=0
    )
    momentum: float = setting(0.99, "of the momentum encoder's weights, if there is a queue", ge=0, lt=1)
    pseudo_label_confidence: float | None = setting(
        None,
        "images without a label take the model's prediction for one where its probability is above this; none: never",
        ge=0,
        lt=1,
    )
    embedding_dim: int = setting(128, "size of the projected embedding", ge=2)
    inner: Inner = setting("kl", INNER)
    inner_contrastive_weight: float = setting(0.0, "μ: weight of NT-Xent(x, x_adv) added to J", ge=0)
    label_smoothing: float = setting(0.0, "of every cross-entropy that is minimised; the attack's has none", ge=0, lt=1)
    replays: int = setting(
        1,
        "m: steps in a row on each minibatch; above 1 no inner attack is made, and attack and inner are not used: x_adv is moved "
        "by the gradient of the whole loss that the backward gives anyway, and goes on from step to step",
        ge=1,
    )
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
        if self.contrastive_layer is not None and self.contrastive_level != "features":
            raise ValueError(
                f"contrastive_layer takes the place of the features, got contrastive_level {self.contrastive_level}; "
                "set contrastive_level features"
            )
        if self.contrastive_weight:
            self._check_views()
        if self.replays > 1 and not self.uses_attack:
            raise ValueError(
                f"replays move an adversarial image, and no term has one, got replays {self.replays}; set it to 1"
            )
        if self.replays > 1 and self.contrastive_weight and (self.queue or self.contrastive_loss == "prototype"):
            raise ValueError(
                f"replays above 1 keep the perturbation where a queue or prototypes would be, got replays {self.replays}; "
                "set queue 0 and another contrastive_loss, or replays 1"
            )

    def _check_views(self) -> None:
        form, others = self.contrastive_loss, self.clean_view + self.augmented_view
        if form == "published" and not self.clean_view:
            raise ValueError("contrastive_loss published anchors on the clean image, got clean_view false; set it true")
        pairs = form == "asymmetric" or (
            form == "nt_xent" and not self.queue
        )  # a queue's keys are views of the clean image
        if pairs and not others:
            raise ValueError(
                f"contrastive_loss {form} needs a view beside x_adv, got clean_view false and augmented_view false; "
                "set one true, or contrastive_loss supcon"
            )
        if form == "prototype" and (self.queue or self.negatives != "all"):
            raise ValueError(
                "contrastive_loss prototype contrasts with prototypes, not with images, got "
                f"queue {self.queue}, negatives {self.negatives}; set queue 0 and negatives all"
            )

    @property
    def uses_embedding(self) -> bool:
        """Whether a projection head has to be trained."""
        return self.contrastive_weight > 0 and self.contrastive_level == "embedding"

    @property
    def contrasts(self) -> bool:
        """Whether images are contrasted with one another, in the loss or by the inner attack."""
        inner = self.inner in _OF_A_BATCH or self.inner_contrastive_weight > 0
        return self.contrastive_weight > 0 or (inner and self.uses_attack)

    @property
    def contrast_trains_encoder(self) -> bool:
        """Whether features or embeddings are contrasted."""
        return self.contrastive_weight > 0 and self.contrastive_level != "logits"

    @property
    def uses_features(self) -> bool:
        """Whether the features are contrasted, or the inner attack leads away from them."""
        contrasted = (
            self.contrastive_weight > 0 and self.contrastive_level == "features" and self.contrastive_layer is None
        )
        return Method.uses_features.fget(self) or contrasted or self.inner_contrastive_weight > 0

    @property
    def uses_second_view(self) -> bool:
        """Whether batches need a second augmentation of their images."""
        return self.contrastive_weight > 0 and self.augmented_view

    @property
    def uses_unlabelled(self) -> bool:
        """Whether some term has a use for images without a label."""
        return self.kl_weight > 0 or self.contrastive_weight > 0 or self.pseudo_label_confidence is not None

    @property
    def uses_attack(self) -> bool:
        """Whether adversarial images are made at all."""
        return self.adversarial_weight > 0 or self.kl_weight > 0 or self.contrastive_weight > 0

    def state(self, model: SplitModel, *, images: int, num_classes: int, shape: tuple[int, ...]) -> nn.Module | None:
        """Return δ, the class prototypes, the momentum encoder with its queue, or None; raises UserError for an unknown layer."""
        if self.contrastive_weight and self.contrastive_layer is not None:
            find_layer(model, self.contrastive_layer)
        if self.replays > 1:
            return PersistentDelta(shape)
        if not self.contrastive_weight:
            return None
        if self.contrastive_loss != "prototype" and not self.queue:
            return None
        dim = dimension(model, shape, self.contrastive_level, self.contrastive_layer)
        if self.queue:
            return MomentumQueue(model, self.queue, dim, self.momentum)
        return Prototypes(num_classes, dim)

    def gather_state(self, state: nn.Module, world: World) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: of δ, which each process has for its own images, all of it."""
        saved = state.state_dict()
        if not isinstance(state, PersistentDelta):
            return saved
        return {name: world.all_gather(values) for name, values in saved.items()}

    def shard_state(self, saved: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """Return this process's part: of δ, that of its own images."""
        if self.replays == 1:
            return saved
        return {name: values[world.local_slice(len(values))] for name, values in saved.items()}

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the clean, adversarial and augmented images, as far as some term needs them; labels are −1 where unknown."""
        x = batch.images
        predict = self.uses_attack and self.inner == "cross_entropy" and self.replays == 1
        batch, attacked = known_labels(model, batch, predict=predict, confidence=self.pseudo_label_confidence)
        if isinstance(step.state, MomentumQueue):
            step.state.update(model, x, batch.labels, self._embed, step.world)
        views = {}
        if self.clean_weight or self.kl_weight or (self.contrastive_weight and self.clean_view):
            views["clean"] = x
        if self.uses_attack:
            targets = attacked if batch.soft_labels is None else batch.soft_labels
            targets = classes(batch) if self.inner == "supcon" else targets
            views["adversarial"] = replayed(x, step) if self.replays > 1 else self._attack(model, x, targets, step)
        if self.uses_second_view:
            assert batch.second_view is not None, "the loader was built without a second view"
            views["augmented"] = batch.second_view
        return Views(views, batch)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the weighted sum of the terms, and each term; accuracies are of images with a label of their own."""
        batch = views.batch
        layer = self.contrastive_layer if self.contrastive_weight else None
        outputs = forward(model, views.images, separate=self.separate_forwards, layer=layer)

        loss = torch.zeros((), device=batch.labels.device)
        metrics: dict[str, Tensor] = {}

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal loss
            # A weight of one and a first term are not multiplied and added, so that a reduced form is exact to the last bit.
            term = value if weight == 1 else weight * value
            loss = loss + term if metrics else term
            metrics[name] = value.detach()

        if self.clean_weight:
            add("clean_cross_entropy", self.clean_weight, self._cross_entropy(outputs["clean"].logits, batch))
        if self.adversarial_weight:
            add(
                "adversarial_cross_entropy",
                self.adversarial_weight,
                self._cross_entropy(outputs["adversarial"].logits, batch),
            )
        if self.kl_weight:
            add("kl", self.kl_weight, kl_divergence(outputs["clean"].logits, outputs["adversarial"].logits).mean())
        if self.contrastive_weight:
            z = []
            for name, wanted in (("clean", self.clean_view), ("augmented", True), ("adversarial", True)):
                if name in outputs and wanted:
                    vector = unit_vectors(model, outputs[name], self.contrastive_level)
                    z.append(vector.detach() if self.stop_gradient and name != "adversarial" else vector)
            ramp = {"constant": 1.0, "up": step.progress, "down": 1 - step.progress}[self.contrastive_ramp]
            contrast = self._contrast(z, batch, step)
            add("contrastive", self.contrastive_weight * ramp, contrast)
        for name, key in (("clean", "clean_accuracy"), ("adversarial", "robust_accuracy")):
            if name in outputs:
                right = CLASSIFICATION.correct(outputs[name].logits, batch.labels)
                metrics[key] = mean_of(right.float(), batch.labelled)
        if self.pseudo_label_confidence is not None and batch.labelled is not None:
            metrics["pseudo_labelled"] = ((batch.labels >= 0) & ~batch.labelled).float().mean()
        return StepOutput(loss, metrics)

    def _attack(self, model: SplitModel, x: Tensor, y: Tensor, step: StepContext) -> Tensor:
        with attack_mode(model), folded(model, x) if self.fold_batch_norm else nullcontext():
            objective: Objective = self._objective(self.inner, model, x, y, step)
            if self.inner_contrastive_weight:
                base, contrast = objective, self._objective("contrastive", model, x, y, step)
                # Two forwards per step: the price of keeping every objective a function of x_adv alone.
                return step.attack(
                    lambda x_adv: base(x_adv) + self.inner_contrastive_weight * contrast(x_adv),
                    x,
                    step.threat,
                    generator=step.generator,
                )
            return step.attack(objective, x, step.threat, generator=step.generator)

    def _objective(self, name: str, model: SplitModel, x: Tensor, y: Tensor, step: StepContext) -> Objective:
        make = OBJECTIVES.get(name)
        if name not in _OF_A_BATCH:
            return make(model, x, y)
        labels = distinct(step.world.all_gather(y)) if name == "supcon" else y
        temperature = self._temperature(step)
        return over_whole_batch(lambda: make(model, x, labels, temperature=temperature), model, len(x), step.world)

    def _temperature(self, step: StepContext) -> float:
        if self.temperature_end is None:
            return self.temperature
        return self.temperature + step.progress * (self.temperature_end - self.temperature)

    def _embed(self, model: SplitModel, images: Tensor) -> Tensor:
        outputs = forward(model, {"images": images}, layer=self.contrastive_layer)["images"]
        return unit_vectors(model, outputs, self.contrastive_level)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.labels if batch.soft_labels is None else batch.soft_labels
        if batch.labelled is None:
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        known = batch.labels >= 0
        targets = targets.clamp_min(0)  # what stands in for no label is not counted
        losses = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing, reduction="none")
        return mean_of(losses, known)

    def _contrast(self, z: list[Tensor], batch: Batch, step: StepContext) -> Tensor:
        temperature, memory = self._temperature(step), step.state
        if self.contrastive_loss == "prototype":
            assert isinstance(memory, Prototypes), "contrastive_loss prototype needs what memory() returned"
            losses = prototype(z, batch.labels, memory.weight, temperature)
            return mean_of(losses, None if batch.labelled is None else batch.labels >= 0)
        keys = None
        if self.queue:
            assert isinstance(memory, MomentumQueue), "a queue needs what memory() returned"
            keys = memory.fresh
        labels = classes(batch)
        options: dict[str, Any] = {"negatives": self.negatives, "hardness": self.hardness, "keys": keys}
        if self.contrastive_loss == "supcon":
            # Adversaries alone, without keys: an image whose class nobody shares has no positive and is not counted.
            lonely = (labels[:, None] == labels).sum(1) == 1 if len(z) == 1 and keys is None else None
            return mean_of(supcon(z, labels, temperature, **options), None if lonely is None else ~lonely)
        if self.contrastive_loss == "asymmetric":
            return asymmetric(z, temperature, self.asymmetry, labels=labels, **options).mean()
        form = published if self.contrastive_loss == "published" else nt_xent
        return form(z, temperature, labels=labels, **options).mean()
