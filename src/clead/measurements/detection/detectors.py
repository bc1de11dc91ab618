"""Detectors: they score images by how suspicious a model's features of them are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.models.split import SplitModel

Outputs = tuple[Tensor, Tensor]


class Detector(Protocol):
    """Scores images by how suspicious they are; larger is more suspicious. ``fit`` sees clean images only."""

    name: ClassVar[str]

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Learn what clean images look like: ``features`` (N, D) of the encoder, ``labels`` (N,)."""
        ...

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return (B,), differentiable in ``x``, each image by itself; ``outputs`` are the model's at ``x`` if known."""
        ...


@dataclass
class Mahalanobis:
    """min_c √((h − μ_c)ᵀ Σ⁻¹ (h − μ_c)), Σ shared by the classes (Lee et al. 2018, arXiv:1807.03888, eqs. 1 and 2).

    Departures: only the features that the classifier reads, without the paper's input preprocessing and its weighting of layers,
    which is fitted on adversarial images; and Σ + ridge · tr(Σ)/D · I, since features that are always 0 would make Σ singular.
    """

    name: ClassVar[str] = "mahalanobis"
    ridge: float = 0.01
    _means: Tensor | None = field(default=None, init=False, repr=False)
    _whiten: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise UserError(f"ridge must be above 0 and finite, got {self.ridge}; give Mahalanobis(ridge=0.01)")

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Keep the mean of each class that occurs, and a W with W Wᵀ = Σ⁻¹, in the precision of ``features``."""
        h = features.double()
        classes, place = labels.unique(return_inverse=True)
        means = torch.stack([h[place == c].mean(0) for c in range(len(classes))])
        centred = h - means[place]
        covariance = centred.T @ centred / len(h)
        level = covariance.trace() / len(covariance)
        if not level > 0:  # synchronises the device
            raise UserError(
                "the features of each class are all equal, so there is no covariance; give more reference images"
            )
        covariance.diagonal().add_(self.ridge * level)
        root = torch.linalg.cholesky(covariance)
        self._whiten = torch.linalg.inv(root).T.to(features.dtype)
        self._means = means.to(features.dtype) @ self._whiten

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the distance to the nearest class, (B,)."""
        if self._means is None or self._whiten is None:
            raise RuntimeError("fit the detector before it scores")
        h = (outputs or model.features_and_logits(x))[0] @ self._whiten
        # Not by the matrix product, which cancels in float32.
        return torch.cdist(h, self._means, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


@dataclass
class NearestNeighbours:
    """‖z − z_(k)‖², z = h/‖h‖ and z_(k) its k-th nearest among clean images (Sun et al. 2022, arXiv:2204.06507, section 3).

    Departures: the square orders images alike and has a gradient at 0; k is 10 instead of 50 (CIFAR-10), for small references.
    """

    name: ClassVar[str] = "nearest_neighbours"
    k: int = 10
    _known: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k must be at least 1, got {self.k}; give NearestNeighbours(k=10)")

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Keep the directions of all features; raises UserError if there are fewer than k."""
        if len(features) < self.k:
            raise UserError(
                f"the k-th neighbour needs at least k = {self.k} reference images, got {len(features)}; "
                f"give more images, or NearestNeighbours(k={len(features)})"
            )
        self._known = F.normalize(features, dim=1)

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the squared distance to the k-th nearest direction, (B,) in [0, 4]."""
        if self._known is None:
            raise RuntimeError("fit the detector before it scores")
        z = F.normalize((outputs or model.features_and_logits(x))[0], dim=1)
        return 2 - 2 * (z @ self._known.T).topk(self.k, dim=1).values[:, -1]


@dataclass
class Disagreement:
    """max_t 1 − cos(h(x), h(t(x))) over small changes t: shifts, noise, a mirror image.

    Source: feature squeezing (Xu et al. 2018, arXiv:1704.01155, section 5) compares a prediction with that on a simplified image;
    Roth et al. 2019 (arXiv:1902.04818) look at how logits move under noise. Departure: features are compared, not softmax vectors,
    which saturate: their vanishing gradient would hide the detector's weakness from an attack that knows it.

    The noise is drawn once from ``seed``, the same for every image, so that the score is a function of x, which an attack knows.
    """

    name: ClassVar[str] = "disagreement"
    shift: int = 1
    noise: float = 0.05
    draws: int = 2
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0 or self.draws < 0 or not 0 <= self.noise < math.inf:
            raise UserError(
                f"shift, draws and noise must be at least 0, got {self.shift}, {self.draws} and {self.noise}; "
                "give Disagreement(shift=1, draws=2, noise=0.05)"
            )
        if not (self.shift or (self.draws and self.noise) or self.flip):
            raise UserError(
                "at least one change is needed, got shift, noise or draws 0 and no flip; give Disagreement(shift=1)"
            )

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Do nothing: the image is compared with itself only."""

    def score(self, model: SplitModel, x: Tensor, outputs: Outputs | None = None) -> Tensor:
        """Return the largest disagreement, (B,) in [0, 2]; one forward pass for each change."""
        h = (outputs or model.features_and_logits(x))[0]
        return torch.stack([1 - F.cosine_similarity(h, model.features(view), dim=1) for view in self._views(x)]).amax(0)

    def _views(self, x: Tensor) -> Iterator[Tensor]:
        if self.shift:
            s, (height, width) = self.shift, x.shape[-2:]
            padded = F.pad(x, (s, s, s, s), mode="replicate")
            for top, left in ((0, s), (2 * s, s), (s, 0), (s, 2 * s)):
                yield padded[..., top : top + height, left : left + width]
        if self.noise and self.draws:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            for _ in range(self.draws):
                noise = torch.randn(x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
                yield (x + self.noise * noise).clamp(0, 1)
        if self.flip:
            yield x.flip(-1)


DETECTORS: dict[str, type[Any]] = {kind.name: kind for kind in (Mahalanobis, NearestNeighbours, Disagreement)}
