"""Retrieval: an image is answered by the gallery item that is most similar to it.

A gallery is G items with labels. ``class_similarity`` turns an embedding into one number per class, the similarity to the nearest
item of that class. The largest of them is the nearest item's, so that "the nearest item has the label" is a classification, and
every attack and suite for classifiers attacks it: the margin is the similarity to the nearest wrong minus the nearest right item.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from clead.errors import UserError
from clead.settings import setting, settings
from clead.tasks import TASKS
from clead.tasks.classification import Classification


@TASKS.register("retrieval")
@settings
class Retrieval(Classification):
    """Outputs are similarities to the nearest item of each class, (B, K), at any positive scale; the target is a class (B,).

    What is trained is a classifier of the training's classes, as in classification; its features are what a gallery is made of.
    """

    items: int = setting(
        5,
        "Images of each class, drawn from the evaluated ones, that are the gallery; the others are the queries.",
        unit="images",
        ge=1,
    )
    gallery: Path | None = setting(
        None,
        "A folder or file of images that are the gallery instead; those of a class bear its name, as --data.path has them.",
    )
    features: Literal["classifier", "output"] | None = setting(
        None,
        "What is compared of a model from elsewhere: what its classifier gets, or its output, if that is the embedding. none: the "
        "former where a final linear layer makes the output, else the latter.",
    )

    reads: ClassVar[tuple[str, ...]] = ("classification", "retrieval")

    def describe(self) -> str:
        """Return in one line what is right."""
        return "an image is right if the gallery item whose embedding is the most similar to its own has its label"


def check_gallery(embeddings: Tensor, labels: Tensor, size: int | None = None, classes: Sequence[str] = ()) -> None:
    """Raise UserError unless this is a gallery that a query can be right and wrong in.

    Args:
        embeddings: (G, d) float.
        labels: (G,) int64, at least two different ones.
        size: d of the model's embeddings; None: any.
        classes: names for the error.
    """
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise UserError(
            f"a gallery is embeddings (G, d) with labels (G,), got {tuple(embeddings.shape)} and {tuple(labels.shape)}; "
            "give one label per embedding"
        )
    if not len(labels):
        raise UserError("the gallery has no item, got 0; give images of two classes or more: --gallery FOLDER")
    if size is not None and embeddings.shape[1] != size:
        raise UserError(
            f"the gallery's embeddings have {embeddings.shape[1]} numbers each, the model's {size}; "
            "make the gallery with this model: --gallery FOLDER takes its images"
        )
    if not torch.isfinite(embeddings).all():  # synchronises the device
        raise UserError(
            "the gallery's embeddings must be finite, got NaN or infinity; look for sqrt, log or division at 0 in the model"
        )
    if len(present := labels.unique().tolist()) < 2:
        name = classes[present[0]] if classes else present[0]
        raise UserError(
            f"the gallery must have items of two classes or more, got only {name!r}, which would answer every query; "
            "add items of another: --gallery FOLDER"
        )


def class_similarity(embeddings: Tensor, gallery: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return s_c = max over items g of class c of ⟨z, g⟩, (B, K); a class without an item has −2, below every cosine.

    Args:
        embeddings: z, (B, d) of unit length.
        gallery: g, (G, d) of unit length.
        labels: (G,) int64 in [0, K).
        num_classes: K.

    >>> corners = torch.eye(2)
    >>> class_similarity(corners, torch.cat([corners, -corners]), torch.tensor([0, 1, 1, 0]), 3)
    tensor([[ 1.,  0., -2.],
            [ 0.,  1., -2.]])
    """
    similarity = embeddings @ gallery.T
    lowest = similarity.new_full((len(similarity), num_classes), -2.0)
    return lowest.scatter_reduce(1, labels.expand(len(similarity), -1), similarity, "amax")


def average_precision(similarity: Tensor, right: Tensor) -> Tensor:
    """Return the mean over the right items of the precision at their rank, (B,); of equal similarities wrong items come first.

    Args:
        similarity: (B, G) float.
        right: which items have the query's label, (B, G) bool; NaN for a query without any.

    >>> average_precision(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, True]]))  # (1 + 2/3) / 2
    tensor([0.8333], dtype=torch.float64)
    """
    wrong_first = right.byte().argsort(dim=1, stable=True)
    order = wrong_first.gather(1, similarity.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True))
    ranked = right.gather(1, order).double()
    precision = ranked.cumsum(1) / torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    return (precision * ranked).sum(1) / ranked.sum(1)


class Roc(NamedTuple):
    """How well a threshold on the similarity parts pairs of one class from pairs of two.

    Attributes:
        area: under the curve, the chance that a pair of one class is the more similar one; ties count half.
        equal_error: where as large a part of either kind is on the wrong side, the mean of both parts there.
        accepted: part of the pairs of one class that are accepted where at most 1 % of the others are.
        points: (false, true) accepted parts at thresholds that fall, from (0, 0) to (1, 1).
    """

    area: float
    equal_error: float
    accepted: float
    points: list[tuple[float, float]]


def verification_roc(same: Tensor, different: Tensor) -> Roc:
    """Return the ROC of accepting a pair as one class where its similarity is at least a threshold.

    Args:
        same: similarities of pairs of one class, (P,).
        different: of pairs of two classes, (N,).

    >>> verification_roc(torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.1]))[:3]
    (0.75, 0.5, 0.5)
    """
    if not len(same) or not len(different):
        raise UserError(
            f"verification needs pairs of one class and of two, got {len(same)} and {len(different)}; "
            "give items of the queries' classes and of others"
        )
    same, different = same.double(), different.double()
    thresholds = torch.cat([same, different]).unique().flip(0)
    start = thresholds.new_zeros(1)

    def accepted_parts(scores: Tensor) -> Tensor:
        below = torch.searchsorted(scores.sort().values, thresholds)
        return torch.cat([start, 1 - below / len(scores)])

    true, false = accepted_parts(same), accepted_parts(different)
    area = torch.trapezoid(true, false).item()
    nearest = (false - (1 - true)).abs().argmin()
    equal_error = ((false + 1 - true)[nearest] / 2).item()
    accepted = true[false <= 0.01].max().item()
    return Roc(area, equal_error, accepted, list(zip(false.tolist(), true.tolist(), strict=True)))
