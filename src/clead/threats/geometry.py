"""Shapes shared by the norm balls: per-image flattening, and the room that the pixel box leaves a perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.interfaces import Threat
from clead.renamed import old_names


def flat(x: Tensor) -> Tensor:
    """Return (B, C·H·W) from (B, C, H, W), whatever the memory format."""
    return x.reshape(x.shape[0], -1)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return (B,) values shaped to broadcast against ``like`` (B, …)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def sign(gradient: Tensor) -> Tensor:
    """Return −1, 0 or 1 per pixel, and NaN for NaN: ``torch.sign`` makes it 0, and a broken gradient would look like robustness."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


def contains(threat: Threat, x_adv: Tensor, x: Tensor) -> Tensor:
    """Return which of ``x_adv`` lie within eps of ``x`` and in the pixel box [0, 1], (B,) bool; one with a NaN does not.

    What rounding adds is allowed: a hundred-thousandth of eps, and 1e-6, or one rounding of each pixel in half precision.
    """
    half = x.element_size() < 4
    rounding = threat.distance(torch.full_like(x[:1], torch.finfo(x.dtype).eps)).item() if half else 1e-6
    in_box = flat((x_adv >= 0) & (x_adv <= 1)).all(1)
    return in_box & (threat.distance(x_adv - x) <= threat.eps * (1 + 1e-5) + rounding)


def box_slack(x: Tensor, direction: Tensor) -> Tensor:
    """Return how far each pixel of ``x`` in [0, 1] can move towards ``direction`` before it leaves the box (≥ 0)."""
    return torch.where(direction > 0, 1 - x, x).clamp_min(0)


__getattr__ = old_names(__name__, {"room": "box_slack"})
