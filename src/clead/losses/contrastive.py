"""Contrastive losses over any number of views of one batch; negatives are the other images of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clead.errors import UserError
from clead.losses.precision import at_least_float32


def directed_nt_xent(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """l_i(a → b) = −log exp(a_i·b_i/τ) / (Σ_{j≠i} exp(a_i·a_j/τ) + Σ_j exp(a_i·b_j/τ)), one direction of NT-Xent.

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1, for anchors of one view only.

    Args:
        anchor: (B, d) of unit length.
        positive: (B, d) of unit length; row i is the positive of anchor i.
        temperature: τ > 0.

    Returns:
        (B,) float32, one loss per anchor. Raises UserError if B < 2 or τ ≤ 0.

    >>> z = torch.eye(2)
    >>> directed_nt_xent(z, z, 1.0)  # −log e / (e + 2)
    tensor([0.5514, 0.5514])
    """
    _check([anchor, positive], temperature)
    with torch.autocast(anchor.device.type, enabled=False):
        anchor, positive = at_least_float32(anchor), at_least_float32(positive)
        itself = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
        among_anchors = (anchor @ anchor.T / temperature).masked_fill(itself, -torch.inf)
        other = anchor @ positive.T / temperature
        return torch.logsumexp(torch.cat([among_anchors, other], dim=1), dim=1) - other.diagonal()


def published(views: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over the views v ≥ 1 of l(z_0 → z_v): the first (clean) view is the only anchor.

    Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249): ½ [l(z → z_aug) + l(z → z_adv)], τ = 0.1.

    Args:
        views: V ≥ 2 tensors (B, d) of unit length; the first is the clean one.
        temperature: τ > 0.

    Returns:
        (B,) float32.
    """
    _check(views, temperature)
    anchor, *positives = views
    return torch.stack([directed_nt_xent(anchor, other, temperature) for other in positives]).mean(0)


def nt_xent(views: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean of l(a → b) over all ordered pairs of different views: the symmetric NT-Xent (exactly SimCLR's for two views).

    Source: Chen et al. 2020, arXiv:2002.05709, eq. 1 and algorithm 1.

    Args:
        views: V ≥ 2 tensors (B, d) of unit length.
        temperature: τ > 0.

    Returns:
        (B,) float32.
    """
    _check(views, temperature)
    pairs = [(a, b) for i, a in enumerate(views) for j, b in enumerate(views) if i != j]
    return torch.stack([directed_nt_xent(a, b, temperature) for a, b in pairs]).mean(0)


def supcon(views: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """L_out = −1/|P(i)| Σ_{p∈P(i)} log exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ); positives share the label.

    Source: Khosla et al. 2020, arXiv:2004.11362, eq. 2.

    Args:
        views: V ≥ 1 tensors (B, d) of unit length.
        labels: (B,) int64.
        temperature: τ > 0.

    Returns:
        (B,) float32: the mean over an image's views; 0 if P(i) is empty, which it can be with one view.
    """
    _check(views, temperature, at_least=1)
    with torch.autocast(views[0].device.type, enabled=False):
        z = torch.cat([at_least_float32(view) for view in views])
        labels = labels.repeat(len(views))
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
        log_probability = similarity - torch.logsumexp(similarity, dim=1, keepdim=True)
        positive = (labels[:, None] == labels) & ~itself
        # masked_fill before the sum: 0 · −inf on the diagonal would be NaN.
        loss = -log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)
        return loss.view(len(views), -1).mean(0)


def neighbours(views: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """−log Σ_{j: y_j=y_i} exp(z_i·k_j/τ) / Σ_j exp(z_i·k_j/τ): each view asks, the other clean images k answer.

    Source: neighbourhood components (Goldberger et al. 2004), with the cosine; Movshovitz-Attias et al. 2017, arXiv:1703.07464,
    eq. 2 is alike. It departs in who asks: adversarial and augmented images too, of clean images only, as in a retrieval whose
    query is attacked. Unlike in SupCon one near image of the class is enough.

    Args:
        views: V ≥ 1 tensors (B, d) of unit length; the first is the clean one. An image answers itself only where no other of the
            batch has its label.
        labels: (B,) int64.
        temperature: τ > 0.

    Returns:
        (B,) float32: the mean over an image's views.
    """
    _check(views, temperature, at_least=1)
    with torch.autocast(views[0].device.type, enabled=False):
        keys = at_least_float32(views[0])
        right, answers = answering(labels)
        each = []
        for view in views:
            similarity = (at_least_float32(view) @ keys.T / temperature).masked_fill(~answers, -torch.inf)
            among_right = torch.logsumexp(similarity.masked_fill(~right, -torch.inf), 1)
            each.append(torch.logsumexp(similarity, 1) - among_right)
        return torch.stack(each).mean(0)


def answering(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which images of a batch are right answers to each, and which are asked, (B, B) bool.

    An image is no answer to itself, unless no other has its label.
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    lonely = itself & (same.sum(1) == 1)
    return (same & ~itself) | lonely, ~itself | lonely


def _check(views: Sequence[Tensor], temperature: float, *, at_least: int = 2) -> None:
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}; the paper uses 0.1")
    if len(views) < at_least:
        raise UserError(f"a contrastive loss compares at least {at_least} views, got {len(views)}")
    if len(views[0]) < 2:
        raise UserError(
            "a contrastive loss needs a batch of at least 2 images, because the others are the negatives, "
            f"got {len(views[0])}; raise data.batch_size"
        )
