"""The L1 ball: the sum of the absolute pixel changes is at most eps, so sparse and large changes are allowed."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from clead.settings import Ratio, setting, settings
from clead.threats import THREATS
from clead.threats.geometry import box_slack, flat, sign


@THREATS.register("l1")
@settings
class L1:
    """{x + δ : ‖δ‖₁ ≤ eps} ∩ [0, 1].

    >>> threat = L1(eps=1.0)
    >>> threat.project(torch.tensor([[0.9, 0.2]]), torch.tensor([[0.0, 0.0]]))
    tensor([[0.8500, 0.1500]])
    """

    norm: ClassVar[str] = "l1"
    largest: ClassVar[float] = 255.0
    eps: Ratio = setting(Ratio("12"), "radius of the ball", unit="sum of absolute changes of pixels in [0, 1]")
    sparsity: float = setting(0.05, "fraction of the pixels that one ascent step moves", gt=0, le=1)

    @field_validator("eps")
    @classmethod
    def _in_pixel_units(cls, eps: Ratio) -> Ratio:
        if not 0 <= eps <= cls.largest:
            hint = f"; did you mean {eps.text}/255?" if 0 < eps <= 255 * cls.largest and "/" not in eps.text else ""
            raise ValueError(
                f"l1 eps must be in [0, {cls.largest:g}] because pixels are in [0, 1], got {eps.text}{hint}"
            )
        return eps

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a point uniform in the ball around ``x`` (normalised exponentials with random signs), clipped to the box."""
        size = (len(x), x[0].numel() + 1)
        parts = torch.empty(size, device=x.device, dtype=x.dtype).exponential_(generator=generator)
        signs = torch.empty_like(parts[:, 1:]).uniform_(-1, 1, generator=generator).sign()
        delta = float(self.eps) * signs * parts[:, 1:] / parts.sum(1, keepdim=True)
        return (x + delta.view_as(x)).clamp_(0, 1)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return ``x_adv`` with the step spread evenly over the steepest pixels that still have room (SLIDE).

        Tramèr & Boneh 2019, arXiv:1904.13000, section 4: the single steepest pixel of the exact L1 step is a poor step in
        practice; a fraction ``sparsity`` of the pixels is moved instead.
        """
        slope = flat(gradient)
        useful = torch.where((flat(box_slack(x_adv, gradient)) > 0) | slope.isnan(), slope.abs(), 0)
        count = max(1, math.ceil(self.sparsity * slope.shape[1]))
        steepest = useful.topk(count, dim=1).indices
        step = torch.zeros_like(slope).scatter_(1, steepest, sign(slope.gather(1, steepest)) * (step_size / count))
        return x_adv + step.view_as(x_adv)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the Euclidean-nearest point of ball ∩ box.

        The point is x + sign(d)·clip(|d| − μ, 0, room) for the smallest μ ≥ 0 that keeps the sum ≤ eps. The sum is
        piecewise linear and falling in μ with breaks at |d| and |d| − room; μ is found among the sorted breaks
        (compare Croce & Hein 2021, arXiv:2103.01208, proposition 3.1).
        """
        eps = float(self.eps)
        delta = flat(x_adv - x)
        cap = flat(box_slack(x, x_adv - x))
        magnitude = delta.abs()
        breaks = torch.cat([magnitude, magnitude - cap], dim=1).clamp_min(0).sort(1).values
        low = torch.zeros(len(breaks), dtype=torch.long, device=breaks.device)
        high = torch.full_like(low, breaks.shape[1] - 1)
        for _ in range(math.ceil(math.log2(breaks.shape[1])) + 1):  # binary search: the largest break with sum ≥ eps
            middle = (low + high + 1) // 2
            over = self._sum(magnitude, cap, breaks.gather(1, middle[:, None])) >= eps
            low, high = torch.where(over, middle, low), torch.where(over, high, (middle - 1).clamp_min(0))
            high = torch.maximum(low, high)
        mu = breaks.gather(1, low[:, None])
        # Between two breaks the sum falls with the number of pixels that are neither clipped to 0 nor to their room.
        sum_at = self._sum(magnitude, cap, mu)[:, None]
        falling = ((magnitude > mu) & (magnitude - cap <= mu)).sum(1, keepdim=True)
        mu = mu + (sum_at - eps).clamp_min(0) / falling.clamp_min(1)
        inside = self._sum(magnitude, cap, torch.zeros_like(mu))[:, None] <= eps
        mu = torch.where(inside, 0, mu)
        moved = torch.minimum((magnitude - mu).clamp_min(0), cap) * delta.sign()
        return (x + moved.view_as(x)).clamp(0, 1)

    @staticmethod
    def _sum(magnitude: Tensor, cap: Tensor, mu: Tensor) -> Tensor:
        return torch.minimum((magnitude - mu).clamp_min(0), cap).sum(1)

    def distance(self, delta: Tensor) -> Tensor:
        """Return Σ|δ| per image, (B,)."""
        return flat(delta).abs().sum(1)
