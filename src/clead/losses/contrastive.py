"""Contrastive losses over any number of views of one batch; negatives are the other images of the batch, and of a queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses.precision import at_least_float32

Negatives = Literal["all", "other_classes", "hard"]
"""What a denominator holds beside its positive: all other images, those of other classes, or negatives weighted by hardness."""


class Keys(NamedTuple):
    """Embeddings that anchors are contrasted with and that are no anchors themselves (He et al. 2020, arXiv:1911.05722).

    Attributes:
        batch: (B, d) of unit length, a further view of the images at hand, so positives of them.
        queue: (Q, d) of unit length, of images seen before.
        labels: (Q,) int64, of the queue.
    """

    batch: Tensor
    queue: Tensor
    labels: Tensor


def directed_nt_xent(
    anchor: Tensor,
    positive: Tensor,
    temperature: float,
    *,
    negatives: Negatives = "all",
    hardness: float = 1.0,
    labels: Tensor | None = None,
    keys: Keys | None = None,
    share: float | None = None,
) -> Tensor:
    """l_i(a → b) = −log exp(a_i·b_i/τ) / (Σ_{j≠i} exp(a_i·a_j/τ) + Σ_j exp(a_i·b_j/τ)), one direction of NT-Xent.

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1, for anchors of one view only.

    Args:
        anchor: (B, d) of unit length.
        positive: (B, d) of unit length; row i is the positive of anchor i.
        temperature: τ > 0.
        negatives: all: as above; other_classes: of the sums only b_i and the images of other labels are left; hard: all but
            b_i are weighted by w_n, the mean of which is 1, w_n ∝ exp(β·a_i·n/τ) (Robinson et al. 2021, arXiv:2010.04592,
            without its debiasing term; β applies to a_i·n/τ).
        hardness: β ≥ 0 of negatives hard.
        labels: (B,) int64, needed for other_classes.
        keys: further negatives in every sum, ``keys.queue``.
        share: σ, the share of the gradient of a_i·b_j that goes to b_j, 1 − σ going to a_i; None: each its whole.

    Returns:
        (B,) float32, one loss per anchor. Raises UserError if B < 2, τ ≤ 0 or labels lack.

    >>> z = torch.eye(2)
    >>> directed_nt_xent(z, z, 1.0)  # −log e / (e + 2)
    tensor([0.5514, 0.5514])
    """
    _check([anchor, positive], temperature)
    with torch.autocast(anchor.device.type, enabled=False):
        anchor, positive = at_least_float32(anchor), at_least_float32(positive)
        itself = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
        own = (anchor @ anchor.T / temperature).masked_fill(itself, -torch.inf)
        if share is None:
            other = anchor @ positive.T / temperature
        else:
            other = share * (anchor.detach() @ positive.T) + (1 - share) * (anchor @ positive.detach().T)
            other = other / temperature
        similarity = [own, other]
        if keys is not None:
            similarity.append(anchor @ at_least_float32(keys.queue).T / temperature)
        if negatives == "all":
            return torch.logsumexp(torch.cat(similarity, dim=1), dim=1) - other.diagonal()
        if negatives == "hard":
            different = [~itself, ~itself]
            if keys is not None:
                different.append(torch.ones_like(similarity[2], dtype=torch.bool))
            below = _log_negatives(torch.cat(similarity, dim=1), torch.cat(different, dim=1), hardness)
        else:
            if labels is None:
                raise UserError("negatives 'other_classes' needs labels, got None; give them, or use 'all' or 'hard'")
            different = [labels[:, None] != labels] * 2
            if keys is not None:
                different.append(labels[:, None] != keys.labels)
            below = _log_negatives(torch.cat(similarity, dim=1), torch.cat(different, dim=1))
        return torch.logaddexp(other.diagonal(), below) - other.diagonal()


def published(
    views: Sequence[Tensor],
    temperature: float,
    *,
    negatives: Negatives = "all",
    hardness: float = 1.0,
    labels: Tensor | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """Mean over the views v ≥ 1 of l(z_0 → z_v): the first (clean) view is the only anchor.

    Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249): ½ [l(z → z_aug) + l(z → z_adv)], τ = 0.1.

    Args:
        views: V ≥ 2 tensors (B, d) of unit length; the first is the clean one.
        temperature: τ > 0.
        negatives: see ``directed_nt_xent``.
        hardness: see there.
        labels: see there.
        keys: ``keys.batch`` is one more view v, and makes V ≥ 1 enough; the queue is more negatives.

    Returns:
        (B,) float32.
    """
    anchor, *others = _with_keys(views, keys)
    _check([anchor, *others], temperature)
    options: dict[str, Any] = {"negatives": negatives, "hardness": hardness, "labels": labels, "keys": keys}
    return torch.stack([directed_nt_xent(anchor, other, temperature, **options) for other in others]).mean(0)


def nt_xent(
    views: Sequence[Tensor],
    temperature: float,
    *,
    negatives: Negatives = "all",
    hardness: float = 1.0,
    labels: Tensor | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """Mean of l(a → b) over all ordered pairs of different views: the symmetric NT-Xent (exactly SimCLR's for two views).

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1 and algorithm 1.

    Args:
        views: V ≥ 2 tensors (B, d) of unit length.
        temperature: τ > 0.
        negatives: see ``directed_nt_xent``.
        hardness: see there.
        labels: see there.
        keys: ``keys.batch`` is one more view b, never a, and makes V ≥ 1 enough; the queue is more negatives.

    Returns:
        (B,) float32.
    """
    targets = _with_keys(views, keys)
    _check(targets, temperature)
    options: dict[str, Any] = {"negatives": negatives, "hardness": hardness, "labels": labels, "keys": keys}
    pairs = [(a, b) for i, a in enumerate(views) for j, b in enumerate(targets) if i != j]
    return torch.stack([directed_nt_xent(a, b, temperature, **options) for a, b in pairs]).mean(0)


def asymmetric(
    views: Sequence[Tensor],
    temperature: float,
    share: float,
    *,
    negatives: Negatives = "all",
    hardness: float = 1.0,
    labels: Tensor | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """NT-Xent, in which the similarity of a view z and the adversarial z_adv is σ·sg(z)·z_adv + (1 − σ)·z·sg(z_adv).

    sg stops the gradient: the value is NT-Xent's, and adversaries, as inferior positives, are drawn to the other views by the
    share σ of the gradient, and the others to them by 1 − σ only. Source: A-InfoNCE with inferior positives (Yu et al. 2022,
    arXiv:2207.08374). It departs in that all ordered pairs of views have the same weight (there a weight of its own for pairs
    with the adversary), in any number of views, and in that the negatives of such a pair are split as its positive is; the
    authors' code splits the loss of a pair instead, each half with one side held constant.

    Args:
        views: V ≥ 2 tensors (B, d) of unit length; the last is the adversarial one.
        temperature: τ > 0.
        share: σ in [0, 1].
        negatives: see ``directed_nt_xent``.
        hardness: see there.
        labels: see there.
        keys: see ``nt_xent``; constants, of which nothing has to be split.

    Returns:
        (B,) float32.
    """
    _check(views, temperature)
    last = len(views) - 1
    options: dict[str, Any] = {"negatives": negatives, "hardness": hardness, "labels": labels, "keys": keys}
    losses = []
    for i, a in enumerate(views):
        for j, b in enumerate(_with_keys(views, keys)):
            if i != j:
                of_b = share if j == last else 1 - share if i == last and j < last else None
                losses.append(directed_nt_xent(a, b, temperature, share=of_b, **options))
    return torch.stack(losses).mean(0)


def supcon(
    views: Sequence[Tensor],
    labels: Tensor,
    temperature: float,
    *,
    negatives: Negatives = "all",
    hardness: float = 1.0,
    keys: Keys | None = None,
) -> Tensor:
    """L_out = −1/|P(i)| Σ_{p∈P(i)} log exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ); positives share the label.

    Source: Khosla et al. 2020, arXiv:2004.11362, eq. 2.

    Args:
        views: V ≥ 1 tensors (B, d) of unit length.
        labels: (B,) int64.
        temperature: τ > 0.
        negatives: all: as above; other_classes: the sum for p is over p and the images of other labels; hard: so too, but these
            are weighted as in ``directed_nt_xent``.
        hardness: β ≥ 0 of negatives hard.
        keys: contrasted with like more views and images, but no anchors i.

    Returns:
        (B,) float32: the mean over an image's views; 0 if P(i) is empty, which it can be with one view and no keys.
    """
    _check(views, temperature, at_least=1)
    with torch.autocast(views[0].device.type, enabled=False):
        z = torch.cat([at_least_float32(view) for view in views])
        labels = labels.repeat(len(views))
        others, other_labels = z, labels
        if keys is not None:
            others = torch.cat([z, *(at_least_float32(key) for key in (keys.batch, keys.queue))])
            other_labels = torch.cat([labels, labels[: len(keys.batch)], keys.labels])
        itself = torch.eye(len(z), len(others), dtype=torch.bool, device=z.device)
        similarity = z @ others.T / temperature
        same = labels[:, None] == other_labels[None, :]
        if negatives == "all":
            similarity = similarity.masked_fill(itself, -torch.inf)
            below = torch.logsumexp(similarity, dim=1, keepdim=True)
        else:
            found = _log_negatives(similarity, ~same, hardness if negatives == "hard" else None)
            below = torch.logaddexp(similarity, found[:, None])
        log_probability = similarity - below
        positive = same & ~itself
        # masked_fill before the sum: 0 · −inf on the diagonal would be NaN.
        loss = -log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)
        return loss.view(len(views), -1).mean(0)


def prototype(views: Sequence[Tensor], labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """−log exp(z_i·c_y/τ) / Σ_k exp(z_i·c_k/τ), c_k of unit length: cross-entropy of the cosines to one prototype per class.

    Source: the normalised softmax of Wang et al. 2017, arXiv:1704.06369, its scale being 1/τ.

    Args:
        views: V ≥ 1 tensors (B, d) of unit length.
        labels: (B,) int64 in [0, K), or −1 for none.
        prototypes: (K, d), of any length.
        temperature: τ > 0.

    Returns:
        (B,) float32: the mean over an image's views; 0 without a label.
    """
    _check(views, temperature, at_least=1, images=1)
    with torch.autocast(views[0].device.type, enabled=False):
        directions = F.normalize(at_least_float32(prototypes), dim=1)
        losses = [
            F.cross_entropy(
                at_least_float32(view) @ directions.T / temperature, labels, ignore_index=-1, reduction="none"
            )
            for view in views
        ]
        return torch.stack(losses).mean(0)


def _log_negatives(similarity: Tensor, negative: Tensor, hardness: float | None = None) -> Tensor:
    """Return log Σ_n w_n·exp(s_n) of each row, (N,), −inf where it has no negative; w_n = exp(β·s_n) / mean_m exp(β·s_m), or 1."""
    # Not −inf: an empty row would rely on how PyTorch differentiates −inf − (−inf).
    nothing = torch.finfo(similarity.dtype).min / 4

    def log_sum(scale: float) -> Tensor:
        return torch.logsumexp((scale * similarity).masked_fill(~negative, nothing), dim=1)

    count = negative.sum(1)
    found = log_sum(1.0)
    if hardness is not None:
        found = count.clamp_min(1).to(found.dtype).log() + log_sum(1 + hardness) - log_sum(hardness)
    return found.masked_fill(count == 0, -torch.inf)


def _with_keys(views: Sequence[Tensor], keys: Keys | None) -> list[Tensor]:
    return [*views, *([keys.batch] if keys is not None else [])]


def _check(views: Sequence[Tensor], temperature: float, *, at_least: int = 2, images: int = 2) -> None:
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}; the paper uses 0.1")
    if len(views) < at_least:
        raise UserError(f"a contrastive loss compares at least {at_least} views, got {len(views)}")
    if len(views[0]) < images:
        raise UserError(
            "a contrastive loss needs a batch of at least 2 images, because the others are the negatives, "
            f"got {len(views[0])}; raise data.batch_size"
        )
