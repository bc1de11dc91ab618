"""A vote of the nearest neighbours: how well features part the classes, without a classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.interfaces import ImageSet
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.tasks.classification import CLASSIFICATION

_CHUNK = 512  # images or queries at once


def knn_accuracy(features: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20) -> float:
    """Return the accuracy of ŷ(q) = argmax_c |{i ∈ N_k(q): y_i = c}|, N_k(q) the k features of largest cosine with q.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4, whose votes are weighted; here each counts one, as in C-LEAD (Ghosh,
    Kumar, Sur 2025, arXiv:2510.27249). Of classes with as many votes the one with the larger sum of cosines wins.

    Args:
        features: (N, D) float, the neighbours.
        labels: (N,) int64 in [0, K).
        queries: (Q, D) float.
        query_labels: (Q,) int64.
        k: neighbours that vote, ≥ 1; all N if there are fewer.

    Returns:
        The fraction of the queries that are voted right, in [0, 1]. Raises UserError if shapes do not fit, k < 1, or a feature
        is not finite.

    >>> corners = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> knn_accuracy(corners, torch.tensor([0, 0, 1]), torch.tensor([[2.0, 0.1], [0.1, 2.0]]), torch.tensor([0, 1]), k=1)
    1.0
    """
    if k < 1:
        raise UserError(f"k must be at least 1 neighbour, got {k}; give k=20")
    if features.dim() != 2 or queries.dim() != 2 or features.shape[1] != queries.shape[1]:
        raise UserError(
            f"features and queries must be (N, D), got {tuple(features.shape)} and {tuple(queries.shape)}; "
            "give features.flatten(1), of one model for both"
        )
    for name, vectors, classes in (("features", features, labels), ("queries", queries, query_labels)):
        if not len(vectors) or classes.shape != (len(vectors),):
            raise UserError(
                f"{name} must have one label each, got {len(vectors)} and labels {tuple(classes.shape)}; "
                "give labels of shape (N,)"
            )
        if not torch.isfinite(vectors).all():  # synchronises the device
            raise UserError(
                f"{name} must be finite, got NaN or infinity; look for sqrt, log or division at 0 in the model"
            )
    near, k = F.normalize(features, dim=1), min(k, len(features))
    num_classes = int(labels.max()) + 1
    right = 0
    for asked, truth in zip(queries.split(_CHUNK), query_labels.split(_CHUNK), strict=True):
        cosine, index = (F.normalize(asked, dim=1) @ near.T).topk(k, dim=1)
        # The sum of at most k cosines, over 4·k, is in ±1/4: it parts equal counts and outvotes none.
        votes = torch.zeros(len(asked), num_classes, dtype=torch.float64, device=asked.device)
        votes.scatter_add_(1, labels[index], 1 + cosine.double() / (4 * k))
        right += int(CLASSIFICATION.correct(votes, truth).sum())
    return right / len(queries)


def neighbours_accuracy(
    model: SplitModel, train: ImageSet, images: ImageSet, *, device: torch.device, k: int = 20
) -> float:
    """Return ``knn_accuracy`` of the features of ``images`` among those of ``train`` whose labels training may see.

    The model is left bit-identical.
    """
    labels = train.visible_labels
    voting = labels >= 0
    with attack_mode(model), torch.no_grad(), exact_float32():
        train_features, features = (
            torch.cat([model.features(to_float(chunk.to(device))).float() for chunk in chosen.images.split(_CHUNK)])
            for chosen in (train.subset(voting), images)
        )
    return knn_accuracy(train_features, labels[voting].to(device), features, images.labels.to(device), k)
