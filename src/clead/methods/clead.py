"""The joint objective of C-LEAD: adversarial, clean, consistency and contrastive terms, each with its weight.

Plain training, PGD-AT and TRADES are settings of it (``standard.py``, ``pgd_at.py``, ``trades.py``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks import OBJECTIVES
from clead.attacks.gradient import value_and_gradient
from clead.attacks.objectives import task_option
from clead.distributed import World
from clead.interfaces import Batch, Objective, StepOutput
from clead.losses.contrastive import neighbours, nt_xent, published, supcon
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views, over_whole_batch
from clead.methods.free_adversary import PersistentDelta, replayed
from clead.methods.labels import classes, distinct, known_labels, mean_of
from clead.methods.view_forward import Level, Outputs, forward, unit_vectors
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.multilabel import MultiLabel
from clead.tasks.segmentation import Segmentation

Inner = Literal["cross_entropy", "kl", "embedding", "contrastive", "supcon", "neighbours"]
INNER = (
    "J, what the inner attack maximises: cross-entropy, KL to the clean prediction, feature distance, NT-Xent or SupCon at τ, or "
    "the margin of retrieval among the clean features of the batch"
)
_OF_A_BATCH = ("contrastive", "supcon", "neighbours")  # of these J an image's value depends on the other images
_BY_LABEL = ("supcon", "neighbours")  # and of these on which images have its label
PER_PIXEL = ("cross_entropy", "kl")  # these have a value for every pixel


@METHODS.register("clead")
@settings
class CLead(Method):
    """min_θ E[α·CE(f(x_adv), y) + β·CE(f(x), y) + κ·KL(f(x) ‖ f(x_adv)) + λ·L_con(z, z_aug, z_adv)].

    x_adv maximises J inside the threat set. Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249) for L_con and for weights
    optimised alongside the perturbations; Madry et al. 2018 (arXiv:1706.06083) for α; Zhang et al. 2019 (arXiv:1901.08573) for κ.
    This departs from the paper, which makes its adversarial images once, offline: here they are made anew at every step.

    Of images without a label (``batch.labelled``) the cross-entropies take nothing and the KL all; SupCon takes each for a class
    of its own, and the inner cross-entropy leads away from the model's own prediction.
    """

    tasks: ClassVar[tuple[str, ...]] = ("multilabel", "segmentation")
    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(6.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.3, "λ: weight of the contrastive term", ge=0)
    contrastive_loss: Literal["published", "nt_xent", "supcon", "neighbours"] = setting(
        "supcon",
        "form of the contrastive term: clean anchors as published, symmetric NT-Xent, label-aware SupCon, or neighbours, in which "
        "every view asks for its class among the other clean images, and the nearest of it counts most",
    )
    temperature: float = setting(0.5, "τ of the contrastive term; 0.1 as published", gt=0)
    clean_view: bool = setting(True, "contrast the clean image too")
    augmented_view: bool = setting(
        True, "contrast a second augmentation of the image (data.view) too, not only x and x_adv"
    )
    contrastive_level: Level = setting(
        "embedding",
        "what is contrasted: the projected embedding, the encoder's features, or the logits; of unit length",
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
        if self.contrastive_weight:
            self._check_views()
        if self.replays > 1 and type(self).adversaries is not CLead.adversaries:
            raise ValueError(f"replays go with no attack of one step, got replays {self.replays}; set it to 1")
        if self.replays > 1 and not self.uses_attack:
            raise ValueError(
                f"replays move an adversarial image, and no term has one, got replays {self.replays}; set it to 1"
            )

    def _check_views(self) -> None:
        if self.contrastive_loss in ("published", "neighbours") and not self.clean_view:
            raise ValueError(
                f"contrastive_loss {self.contrastive_loss} anchors on the clean image, got clean_view false; set it true"
            )
        if self.contrastive_loss == "nt_xent" and not (self.clean_view or self.augmented_view):
            raise ValueError(
                "contrastive_loss nt_xent needs a view beside x_adv, got clean_view false and augmented_view false; "
                "set one true, or contrastive_loss supcon"
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
        contrasted = self.contrastive_weight > 0 and self.contrastive_level == "features"
        return Method.uses_features.fget(self) or contrasted or self.inner_contrastive_weight > 0

    @property
    def uses_second_view(self) -> bool:
        """Whether batches need a second augmentation of their images."""
        return self.contrastive_weight > 0 and self.augmented_view

    @property
    def uses_unlabelled(self) -> bool:
        """Whether some term has a use for images without a label."""
        return self.kl_weight > 0 or self.contrastive_weight > 0

    @property
    def uses_attack(self) -> bool:
        """Whether adversarial images are made at all."""
        return self.adversarial_weight > 0 or self.kl_weight > 0 or self.contrastive_weight > 0

    def task_problem(self, task: Task) -> str | None:
        """Return why this method cannot train for ``task``: with several labels, or a mask, there is no class to contrast by."""
        if isinstance(task, MultiLabel):
            rule = "supcon and neighbours go by one class per image, which multilabel has not"
            if self.contrastive_weight > 0 and self.contrastive_loss in _BY_LABEL:
                return f"method.contrastive_weight: {rule}"
            if self.inner in _BY_LABEL:
                return f"method.inner: {rule}"
        if isinstance(task, Segmentation) and "segmentation" in self.tasks:
            return self.pixel_problem()
        return super().task_problem(task)

    def pixel_problem(self) -> str | None:
        """Return why this method cannot train for masks: what contrasts whole images."""
        if self.contrastive_weight > 0:
            return "method.contrastive_weight: images are contrasted as wholes, and a mask has a class for each pixel"
        return self.inner_problem()

    def inner_problem(self) -> str | None:
        """Return why the inner attack does not go with masks."""
        if self.inner not in PER_PIXEL:
            return f"method.inner: must have a value for every pixel, which {' and '.join(PER_PIXEL)} have, got {self.inner}"
        if self.inner_contrastive_weight > 0:
            return "method.inner_contrastive_weight: the attack on a mask knows no contrast of whole images"
        return None

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the δ that goes on from step to step, or None."""
        return PersistentDelta(shape) if self.replays > 1 else None

    def gather_state(self, state: nn.Module, world: World) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: all of δ, of which each process has what belongs to its own images."""
        if not isinstance(state, PersistentDelta):
            return super().gather_state(state, world)
        return {name: world.all_gather(values) for name, values in state.state_dict().items()}

    def shard_state(self, saved: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """Return this process's part of δ, that of its own images."""
        if self.replays == 1:
            return super().shard_state(saved, world)
        return {name: values[world.local_slice(len(values))] for name, values in saved.items()}

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the clean, adversarial and augmented images, as far as some term needs them; labels are −1 where unknown."""
        x = batch.images
        predict = self.uses_attack and self.inner == "cross_entropy" and self.replays == 1
        batch, attacked = known_labels(model, batch, predict=predict)
        views = {}
        if self.clean_weight or self.kl_weight or (self.contrastive_weight and self.clean_view):
            views["clean"] = x
        if self.uses_attack:
            targets = attacked if batch.soft_labels is None else batch.soft_labels
            targets = classes(batch) if self.inner in _BY_LABEL else targets
            views |= (
                {"adversarial": replayed(x, step)}
                if self.replays > 1
                else self.adversaries(model, batch, targets, step)
            )
        if self.uses_second_view:
            assert batch.second_view is not None, "the loader was built without a second view"
            views["augmented"] = batch.second_view
        return Views(views, batch)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the weighted sum of the terms, and each term; accuracies are of images with a label of their own."""
        batch = views.batch
        outputs = forward(model, views.images, separate=self.separate_forwards)

        loss = torch.zeros((), device=batch.labels.device)
        metrics: dict[str, Tensor] = {}

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal loss
            # A weight of one and a first term are not multiplied and added, so that a reduced form is exact to the last bit.
            term = value if weight == 1 else weight * value
            loss = loss + term if metrics else term
            metrics[name] = value.detach()

        if self.clean_weight:
            add(
                "clean_cross_entropy", self.clean_weight, self._cross_entropy(outputs["clean"].logits, batch, step.task)
            )
        if self.adversarial_weight:
            add(
                "adversarial_cross_entropy",
                self.adversarial_weight,
                self._cross_entropy(outputs["adversarial"].logits, batch, step.task),
            )
        if self.kl_weight:
            add(
                "kl",
                self.kl_weight,
                step.task.divergence(outputs["clean"].logits, outputs["adversarial"].logits).mean(),
            )
        if self.contrastive_weight:
            wanted = [name for name in ("clean", "augmented", "adversarial") if name != "clean" or self.clean_view]
            z = [unit_vectors(model, outputs[name], self.contrastive_level) for name in wanted if name in outputs]
            add("contrastive", self.contrastive_weight, self.contrast(z, batch, step))
        for name, (weight, value) in self.more_terms(outputs, views, step).items():
            add(name, weight, value)
        for name, key in (("clean", "clean_accuracy"), ("adversarial", "robust_accuracy")):
            if name in outputs:
                metrics[key] = mean_of(step.task.score(outputs[name].logits, batch.labels), batch.labelled)
        return StepOutput(loss, metrics)

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return what a method built on this one adds to the loss: name -> weight and value."""
        return {}

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, and what else of views belongs to them; ``y`` is what the attack leads away from."""
        x = batch.images
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            objective = self.inner_objective(model, x, y, step)
            return {"adversarial": step.attack(objective, x, step.threat, generator=step.generator)}

    def inner_gradient(
        self, model: SplitModel, batch: Batch, y: Tensor, start: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Return J at ``start``, (B,), and its gradient, (B, C, H, W)."""
        x = batch.images
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            return value_and_gradient(self.inner_objective(model, x, y, step), start)

    def inner_objective(self, model: SplitModel, x: Tensor, y: Tensor, step: StepContext) -> Objective:
        """Return J, what the inner attack maximises; called under ``attack_mode``."""
        base = self._objective(self.inner, model, x, y, step)
        if not self.inner_contrastive_weight:
            return base
        contrast = self._objective("contrastive", model, x, y, step)
        # Two forwards per step: the price of keeping every objective a function of x_adv alone.
        return lambda x_adv: base(x_adv) + self.inner_contrastive_weight * contrast(x_adv)

    def _objective(self, name: str, model: SplitModel, x: Tensor, y: Tensor, step: StepContext) -> Objective:
        make = OBJECTIVES.get(name)
        if name not in _OF_A_BATCH:
            return make(model, x, y, **task_option(name, step.task))
        labels = distinct(step.world.all_gather(y)) if name in _BY_LABEL else y
        scale = {} if name == "neighbours" else {"temperature": self.temperature}
        return over_whole_batch(lambda: make(model, x, labels, **scale), model, len(x), step.world)

    def _cross_entropy(self, logits: Tensor, batch: Batch, task: Task) -> Tensor:
        targets = batch.labels if batch.soft_labels is None else batch.soft_labels
        if batch.labelled is None:
            return task.training_loss(logits, targets, self.label_smoothing)
        known = batch.labels >= 0
        targets = targets.clamp_min(0)  # what stands in for no label is not counted
        losses = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing, reduction="none")
        return mean_of(losses, known)

    def contrast(self, z: list[Tensor], batch: Batch, step: StepContext) -> Tensor:
        """Return the contrastive term, (), of views (B, d) of unit length."""
        if self.contrastive_loss == "supcon":
            labels = classes(batch)
            # Adversaries alone: an image whose class nobody shares has no positive and is not counted.
            lonely = (labels[:, None] == labels).sum(1) == 1 if len(z) == 1 else None
            return mean_of(supcon(z, labels, self.temperature), None if lonely is None else ~lonely)
        if self.contrastive_loss == "neighbours":
            return neighbours(z, classes(batch), self.temperature).mean()
        form = published if self.contrastive_loss == "published" else nt_xent
        return form(z, self.temperature).mean()
