"""Normalisation as the first layer, so that every threat is in pixel units of [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x − mean) / std per channel.

    Args:
        mean: C numbers, in pixel units of [0, 1].
        std: C numbers > 0.

    x: (B, C, H, W) -> the same shape. Raises ValueError if the lengths differ, a number is not finite, or a
    std is ≤ 0.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = [float(value) for value in mean], [float(value) for value in std]
        if not mean or len(mean) != len(std):
            raise ValueError(f"mean and std need one number per channel, got {len(mean)} and {len(std)} numbers")
        if not all(math.isfinite(value) for value in mean + std):
            raise ValueError(f"mean and std must be finite, got {mean} and {std}")
        if min(std) <= 0:
            raise ValueError(f"std must be > 0, got {std}; is a channel constant over the training set?")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x − mean) / std, (B, C, H, W)."""
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Show the constants when the model is printed."""
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"
