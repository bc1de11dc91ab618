"""What flows between the rooms of this package: batches, step outputs, and the protocols of threats and attacks.

Shapes and ranges used everywhere: ``x`` and ``x_adv`` are (B, C, H, W) float in [0, 1]; ``labels`` is (B,) int64 in [0, K), or
what the task has in its place: (B, L) of several labels, (B, H, W) of a mask; ``logits`` (B, K); ``features`` (B, D);
``embedding`` (B, d) of unit length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Maps perturbed images (B, C, H, W) to the value to be maximised, one per image, (B,)."""


class Batch(NamedTuple):
    """What a step is made of.

    Attributes:
        images: (B, C, H, W) float in [0, 1].
        labels: (B,) int64, −1 where ``labelled`` is False.
        second_view: a second random augmentation of the same images, or None.
        index: which images of the training set these are, (B,) int64, or None.
        soft_labels: (B, K) float, rows of sum 1, of images that were mixed, or None.
        labelled: (B,) bool, where a method may look at ``labels``; None: everywhere.
        stored: (B, C, H, W) float in [0, 1], adversarial images of the same images that were made before the training, or None.
    """

    images: Tensor
    labels: Tensor
    second_view: Tensor | None = None
    index: Tensor | None = None
    soft_labels: Tensor | None = None
    labelled: Tensor | None = None
    stored: Tensor | None = None


class StepOutput(NamedTuple):
    """The scalar loss to be minimised, and detached scalar metrics to be logged (no device synchronisation)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Args:
        images: (N, C, H, W) uint8; or what is indexed like that and decodes images when they are asked for (``data/streaming.py``).
        labels: (N,) int64 in [0, K); hidden ones too, for measuring: training looks at ``visible_labels`` only.
        labelled: (N,) bool, where training may look at ``labels``; None: everywhere.
        pseudo_labels: (N,) int64 in [0, K), what counts as label where there is none, or None.
        labelled_share: part of every training batch that is drawn from labelled images, in (0, 1]; None: as they come.
        extra: auxiliary images of the same shape for training alone; they are not counted.
        extra_share: part of every training batch that is drawn from ``extra``, in (0, 1).
        balanced: whether every class of visible labels comes equally often in training batches.
    """

    images: Any
    labels: Tensor
    labelled: Tensor | None = None
    pseudo_labels: Tensor | None = None
    labelled_share: float | None = None
    extra: ImageSet | None = None
    extra_share: float = 0.5
    balanced: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def visible_labels(self) -> Tensor:
        """The labels that training may look at, (N,) int64: where there is none the pseudo-label, or −1."""
        if self.labelled is None:
            return self.labels
        pseudo = torch.full_like(self.labels, -1) if self.pseudo_labels is None else self.pseudo_labels
        return torch.where(self.labelled, self.labels, pseudo)

    def labelled_subset(self) -> ImageSet:
        """Return the images that have a visible label, with that label."""
        if self.labelled is None:
            return self
        labels = self.visible_labels
        index = (labels >= 0).nonzero()[:, 0]
        return ImageSet(self._at(index), labels[index])

    def subset(self, index: Tensor) -> ImageSet:
        """Return the images at ``index``, (n,) int64."""
        flags, pseudo = (None if values is None else values[index] for values in (self.labelled, self.pseudo_labels))
        return ImageSet(self._at(index), self.labels[index], flags, pseudo, self.labelled_share)

    def _at(self, index: Tensor) -> Any:
        return self.images[index] if isinstance(self.images, Tensor) else self.images.at(index)


@dataclass(frozen=True)
class Splits:
    """Training, validation (cut from training, never from test) and test images, and the K class names.

    ``fingerprint`` is a hex digest of the content of all three sets (images, labels, class names); records carry it.
    ``unreadable`` names the image files that were left out because ``data.skip_unreadable`` said so; ``skipped`` has one line for
    each file that is there and was not read, ``"PATH: reason"``. ``notes`` say what a user must know to understand a figure on
    these images. ``origin`` says what the test images are: ``test``, the data's own test split; ``val``, its validation split,
    because it has no test split; ``train``, a fixed part of its training images, because it has neither; or ``all``, every image of
    data without splits, which a model that was not trained here is evaluated on. ``extra_fingerprint`` digests auxiliary images
    and their labels.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    fingerprint: str
    unreadable: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Literal["test", "val", "train", "all"] = "test"
    extra_fingerprint: str = ""

    @property
    def trained_on(self) -> str:
        """A digest of all that a training sees: ``fingerprint``, and that of auxiliary images if there are any."""
        return "+".join(filter(None, (self.fingerprint, self.extra_fingerprint)))


@runtime_checkable
class Threat(Protocol):
    """A norm ball around x, intersected with the pixel box [0, 1]."""

    @property
    def norm(self) -> str:
        """The norm's registered name: linf, l2 or l1."""
        ...

    @property
    def eps(self) -> float:
        """The radius in pixel units of [0, 1]."""
        ...

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point of the set around ``x``."""
        ...

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return ``x_adv`` moved by ``step_size`` (in this norm) along the steepest ascent direction; not projected."""
        ...

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the Euclidean-nearest point of the set around ``x``, exactly."""
        ...

    def distance(self, delta: Tensor) -> Tensor:
        """Return this norm of each image's perturbation, (B,)."""
        ...


class Attack(Protocol):
    """Maximises an objective inside a threat set; gradients go to inputs only."""

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], inside the threat set around ``x``."""
        ...


Model = Callable[[Tensor], Tensor]
"""Maps images (B, C, H, W) in [0, 1] to logits (B, K). Any ``nn.Module`` classifier is one."""


@runtime_checkable
class Search(Protocol):
    """An attack that looks at more than one objective: logits, other classes, or answers to queries only.

    An attack class has either this method or ``__call__`` of ``Attack``; only the latter can serve inside training.
    """

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in the threat set around ``x``: misclassified where the search succeeded.

        ``model`` is in evaluation mode with frozen parameters and may be compiled, folded or in lower precision; the caller
        verifies every result on the model itself. Images misclassified already may be returned as they are.
        """
        ...


@runtime_checkable
class MinimumNorm(Protocol):
    """An attack that looks for the nearest adversarial image, whatever its distance."""

    def minimal(
        self, model: Model, x: Tensor, y: Tensor, *, norm: str, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the nearest misclassified image found in [0, 1], (B, C, H, W), and x itself where none was found."""
        ...


@runtime_checkable
class Unrestricted(Protocol):
    """An attack whose images lie in no norm ball: a transformation of the whole image, a patch that may change pixels at will.

    It has no threat. Its settings describe the images that it may return; it can find its worst image among them, and can tell
    whether an image belongs to them, so that a caller can verify results. ``clead.attacks.UNRESTRICTED`` finds them by name.
    """

    def worst(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1]: misclassified where the search succeeded, else the worst image that it saw.

        ``model`` is in evaluation mode with frozen parameters, under no_grad. Images misclassified already may be returned.
        """
        ...

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return which images of ``x_adv`` are in the set around ``x``, up to rounding, (B,) bool."""
        ...
