"""What all methods have in common: a step is to make the views, then to compute a loss of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from clead.attacks.objectives import NEED_FEATURES
from clead.distributed import SINGLE_PROCESS, SlicedThreat, World
from clead.interfaces import Attack, Batch, Objective, StepOutput, Threat
from clead.models.modes import AttackMode
from clead.models.split import SplitModel
from clead.renamed import old_names, warn_renamed
from clead.settings import settings
from clead.tasks import Task, task_name
from clead.tasks.classification import CLASSIFICATION, Classification


class Taught(NamedTuple):
    """What a teacher says of images: features (B, D) and logits (B, K), without gradient."""

    features: Tensor
    logits: Tensor


class Views(NamedTuple):
    """What a loss is computed from: the batch, and images by the name of their view (clean, adversarial, augmented …).

    Where several processes train, images are those of this process, and what the model makes of them in ``loss`` is joined with
    what the others have; ``batch`` then has the labels of all, and ``local_batch`` is the batch of this process. ``taught`` is what
    the teacher says of the clean images of this process.
    """

    images: dict[str, Tensor]
    batch: Batch
    local_batch: Batch | None = None
    taught: Taught | None = None


class StepContext(NamedTuple):
    """What a training step goes by, besides the model and the images.

    Attributes:
        threat: the set of allowed perturbations.
        attack: the inner maximisation; gradients to inputs only.
        generator: source of the random starts, on the device of the images.
        progress: part of the training that lies behind, in [0, 1).
        state: what ``Method.state`` returned.
        world: the processes that train together, each with its part of the batch.
        attack_mode: the mode of the model while it is attacked: evaluation, or that of the forward.
        teacher: a model in evaluation mode that methods with ``needs_teacher`` learn from, or None.
        task: what is right, and what is lost where it is not.
    """

    threat: Threat
    attack: Attack
    generator: torch.Generator
    progress: float = 0.0
    state: nn.Module | None = None
    world: World = SINGLE_PROCESS
    attack_mode: AttackMode = "eval"
    teacher: SplitModel | None = None
    task: Task = CLASSIFICATION

    def taught(self, x: Tensor) -> Taught:
        """Return what the teacher says of images (b, C, H, W) of this process."""
        assert self.teacher is not None, "a method with needs_teacher was given none"
        with torch.no_grad():
            return Taught(*self.teacher.features_and_logits(x))

    def of_all(self, taught: Taught | None) -> Taught:
        """Return what the teacher said of the images of all processes, in the order of the batch's labels."""
        assert taught is not None
        return Taught(*map(self.world.all_gather, taught))

    def uniform(self, like: Tensor) -> Tensor:
        """Return numbers uniform in [0, 1), of the shape of ``like``, (b, …), drawn for the images of all processes."""

        def draw(whole: Tensor) -> Tensor:
            return torch.empty_like(whole).uniform_(generator=self.generator)

        return self.threat.of_whole_batch(like, draw) if isinstance(self.threat, SlicedThreat) else draw(like)

    @property
    def memory(self) -> nn.Module | None:
        """The name of ``state`` in version 0.1."""
        warn_renamed("step.memory", "step.state")
        return self.state


def over_whole_batch(
    make: Callable[[], Objective], model: SplitModel, images: int, world: World, views: int = 1
) -> Objective:
    """Return what ``make`` returns, an objective in which images contrast with one another, over the images of all processes.

    Each process moves its own images; the gradient is that of the sum over the whole batch.

    Args:
        make: called under the same conditions as what it returns; labels that it knows are those of all processes.
        model: whose outputs are gathered.
        images: of this process.
        world: the processes.
        views: x is a stack of so many views of the images, (V·b, C, H, W).
    """
    if world.world_size == 1:
        return make()

    def gather(outputs: Tensor) -> Tensor:
        return world.gather_with_grad(outputs, images)

    with model.gathering_outputs(gather):
        objective = make()

    def value(x: Tensor) -> Tensor:
        with model.gathering_outputs(gather):
            values = objective(x)  # (V·B,)
        local = values.detach().unflatten(0, (views, -1))[:, world.local_slice(len(values) // views)].flatten()
        total = values.sum() / world.world_size  # the backward of the gather multiplies by it
        return local + (total - total.detach()) / len(local)

    return value


@settings
class Method(ABC):
    """A training objective. The loop calls ``views`` once per step and ``loss`` once, or twice with weight perturbation.

    What a method remembers from step to step is in ``state``, which the loop keeps: its parameters are trained, its buffers
    are saved with every checkpoint.
    """

    # What a method is; a subclass states it, or computes it from its settings.
    tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks that it trains for beside classification and its kinds (binary, whose one logit is [0, z] to it), by name."""
    uses_embedding = False
    """Whether a projection head has to be trained; then there is a setting ``embedding_dim``."""
    uses_second_view = False
    """Whether batches need a second augmentation of their images."""
    uses_attack = True
    """Whether adversarial images are made at all."""
    uses_unlabelled = False
    """Whether the loss has a term for images without a label; if not, batches hold labelled images only."""
    uses_classifier = True
    """Whether the loss trains the classifier; if not, the features' nearest neighbours are what validation looks at."""
    uses_stored = False
    """Whether adversarial images of the whole training set are made once, of the model as it is at the start.

    Then there are settings ``stored_attack`` (the attack, by ``attack_of``) and ``stored_clip``.
    """
    needs_teacher = False
    """Whether it learns from another model, ``train.teacher``."""
    changes_over_training = False
    """Whether the loss depends on the part of the training that lies behind."""
    typical_steps: ClassVar[tuple[int, int]] = (0, 1)
    """The first step, from 0, that is typical of what steps cost, and the one after the last: their mean cost is that of all."""
    remembers_images = False
    """Whether ``state`` has to know the number of training images; then it has ``for_images(count)``, which is called once."""
    replays = 1
    """How many steps in a row are taken on the same batch, ≥ 1."""

    @property
    def uses_features(self) -> bool:
        """Whether the features are looked at, in the loss or by the inner attack; if not, the model needs none."""
        return self.uses_embedding or not self.uses_classifier or getattr(self, "inner", "") in NEED_FEATURES

    @property
    def contrasts(self) -> bool:
        """Whether images are contrasted with one another, in the loss or by the inner attack, so that a batch needs two."""
        return self.uses_embedding

    @property
    def contrast_trains_encoder(self) -> bool:
        """Whether a contrastive loss has its gradient through the encoder."""
        return self.uses_embedding

    def problems(self, data: Any, train: Any) -> list[str]:
        """Return what of the settings of data and training does not go with this method, one line each.

        Args:
            data: settings of the data set.
            train: those of the training; None if they are not valid themselves.
        """
        teacher = getattr(train, "teacher", None)
        if train is not None and self.needs_teacher != (teacher is not None):
            rule = "this method learns from a teacher" if self.needs_teacher else "this method has no use for a teacher"
            remedy = "name a run, or start, the model as it begins" if self.needs_teacher else "leave it out"
            return [f"train.teacher: {rule}, got {teacher or 'none'}; {remedy}"]
        if self.contrasts and data.batch_size < 2:
            return [
                "data.batch_size: a contrastive loss needs at least 2 images, because the others are the negatives, "
                f"got {data.batch_size}; raise it, or set the contrastive weights to 0"
            ]
        if data.labelled < 1 and data.cutmix and self.uses_unlabelled and data.pseudo_labels_from is None:
            return [
                f"data.cutmix: mixes labels, which images without one have not, got {data.cutmix:g}; set it to 0, or "
                "data.labelled 1"
            ]
        if self.contrast_trains_encoder and getattr(train, "trainable", "all") == "classifier":
            return [
                "train.trainable: a contrastive loss trains encoder and projection head, which are frozen then, got classifier; "
                "set it to all, or take a method without that term (method.name standard)"
            ]
        if self.uses_stored and data.extra is not None:
            return [
                f"data.extra: auxiliary images have no stored adversarial images, got {data.extra}; leave it out, or take another "
                "method (method.name clead)"
            ]
        if self.uses_stored and data.cutmix:
            return [
                f"data.cutmix: a mixed image is not the one whose adversarial image is stored, got {data.cutmix:g}; set it to 0"
            ]
        trains_norms = getattr(train, "forward_mode", "train") == "train"
        if getattr(self, "fold_batch_norm", False) and trains_norms and getattr(train, "attack_mode", "") == "forward":
            return [
                "method.fold_batch_norm: statistics of the batch cannot be folded, got true with train.attack_mode forward; "
                "set it to false"
            ]
        if self.uses_attack and data.augment.gaussian:
            return [
                "data.augment.gaussian: unclipped noise leaves [0, 1], in which an attack's images must lie, got "
                f"{data.augment.gaussian:g}; set it to 0, or take a method without an attack (method.name standard)"
            ]
        return []

    def task_problem(self, task: Task) -> str | None:
        """Return why this method cannot train for ``task``, if it cannot."""
        name = task_name(task)
        return (
            None
            if isinstance(task, Classification) or name in self.tasks
            else f"method.name: this method knows no {name}"
        )

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return what is kept from step to step, or None.

        Args:
            model: as it is at the start, projection head included.
            shape: (C, H, W).
        """
        return None

    def gather_state(self, state: nn.Module, world: World) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of ``state``; all processes call it. By default they have the same."""
        return state.state_dict()

    def shard_state(self, saved: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """Return this process's part of what ``gather_state`` returned, whatever the number of processes was."""
        return saved

    @abstractmethod
    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the views of one batch, adversarial images among them.

        Args:
            model: in train mode; what is differentiated here reaches inputs only.
            batch: images (B, C, H, W) in [0, 1], labels (B,), and the second view if ``uses_second_view``.
            step: threat, attack, randomness, and what is kept from step to step, which may change here.
        """

    @abstractmethod
    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the loss of the views and its metrics; leaves ``step.state`` as it is."""

    def __call__(
        self,
        model: SplitModel,
        batch: Batch,
        *,
        threat: Threat,
        attack: Attack,
        generator: torch.Generator,
        progress: float = 0.0,
        state: nn.Module | None = None,
        teacher: SplitModel | None = None,
    ) -> StepOutput:
        """Return the loss of one batch and its metrics; arguments as those of ``views`` and ``StepContext``.

        The model is in train mode; its parameters receive gradients when the loss is differentiated.
        """
        step = StepContext(threat, attack, generator, progress, state, teacher=teacher)
        return self.loss(model, self.views(model, batch, step), step)


__getattr__ = old_names(__name__, {"Step": "StepContext"})
