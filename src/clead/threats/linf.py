"""The L∞ ball: every pixel may move by at most eps."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from clead.settings import Ratio, setting, settings
from clead.threats import THREATS
from clead.threats.geometry import flat, sign


@THREATS.register("linf")
@settings
class Linf:
    """{x + δ : ‖δ‖∞ ≤ eps} ∩ [0, 1] (Madry et al. 2018, arXiv:1706.06083).

    >>> threat = Linf(eps="8/255")
    >>> threat.project(torch.tensor([[0.9]]), torch.tensor([[0.5]]))
    tensor([[0.5314]])
    """

    norm: ClassVar[str] = "linf"
    largest: ClassVar[float] = 1.0
    eps: Ratio = setting(Ratio("8/255"), "radius of the ball", unit="pixels in [0, 1]; 8/255 is understood")

    @field_validator("eps")
    @classmethod
    def _in_pixel_units(cls, eps: Ratio) -> Ratio:
        if not 0 <= eps <= cls.largest:
            hint = f"; did you mean {eps.text}/255?" if 1 < eps <= 255 and "/" not in eps.text else ""
            raise ValueError(f"linf eps must be in [0, 1] because pixels are, got {eps.text}{hint}")
        return eps

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a point uniform in the ball around ``x``, clipped to the box."""
        noise = torch.empty_like(x).uniform_(-float(self.eps), float(self.eps), generator=generator)
        return noise.add_(x).clamp_(0, 1)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return ``x_adv + step_size · sign(gradient)``."""
        return x_adv + step_size * sign(gradient)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest point of the set: ball and box are both boxes, so clipping twice is exact."""
        eps = float(self.eps)
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)

    def distance(self, delta: Tensor) -> Tensor:
        """Return max |δ| per image, (B,)."""
        return flat(delta).abs().amax(1)
