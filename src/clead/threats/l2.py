"""The L2 ball: the Euclidean length of the perturbation is at most eps."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from clead.settings import Ratio, setting, settings
from clead.threats import THREATS
from clead.threats.geometry import box_slack, flat, per_image


@THREATS.register("l2")
@settings
class L2:
    """{x + δ : ‖δ‖₂ ≤ eps} ∩ [0, 1].

    >>> threat = L2(eps=0.5)
    >>> threat.project(torch.tensor([[0.5, 1.5]]), torch.tensor([[0.5, 0.4]]))
    tensor([[0.5000, 0.9000]])
    """

    norm: ClassVar[str] = "l2"
    largest: ClassVar[float] = 32.0
    eps: Ratio = setting(Ratio("0.5"), "radius of the ball", unit="Euclidean length over pixels in [0, 1]")

    @field_validator("eps")
    @classmethod
    def _in_pixel_units(cls, eps: Ratio) -> Ratio:
        if not 0 <= eps <= cls.largest:
            hint = f"; did you mean {eps.text}/255?" if 0 < eps <= 255 * cls.largest and "/" not in eps.text else ""
            raise ValueError(
                f"l2 eps must be in [0, {cls.largest:g}] because pixels are in [0, 1], got {eps.text}{hint}"
            )
        return eps

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a point uniform in the ball around ``x`` (Gaussian direction, radius ~ u^(1/d)), projected into the box."""
        direction = torch.empty_like(x).normal_(generator=generator)
        radius = torch.empty(len(x), device=x.device, dtype=x.dtype).uniform_(generator=generator)
        radius = float(self.eps) * radius ** (1 / x[0].numel()) / self.distance(direction).clamp_min(1e-12)
        return (x + direction * per_image(radius, x)).clamp_(0, 1)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return ``x_adv + step_size · gradient / ‖gradient‖₂``."""
        # Scaling by the largest entry first keeps tiny float32 gradients (saturated logits) from underflowing when squared.
        scaled = gradient / per_image(flat(gradient).abs().amax(1).clamp_min(1e-38), gradient)
        return x_adv + scaled * per_image(step_size / self.distance(scaled).clamp_min(1e-12), x_adv)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the Euclidean-nearest point of ball ∩ box.

        By the optimality conditions the point is x + clip(t·d, box) with d = x_adv − x and the largest t ≤ 1 that keeps the
        length ≤ eps. Fixing the set of clipped pixels gives t in closed form; t grows until the set no longer changes.
        """
        eps = float(self.eps)
        delta = flat(x_adv - x)
        cap = flat(box_slack(x, x_adv - x))
        magnitude = delta.abs()
        t = torch.zeros_like(magnitude[:, :1])
        while True:
            clipped = t * magnitude >= cap
            used = torch.where(clipped, cap, 0).square().sum(1, keepdim=True)
            free = torch.where(clipped, 0, magnitude).square().sum(1, keepdim=True)
            t_next = ((eps**2 - used).clamp_min(0) / free.clamp_min(1e-30)).sqrt().clamp(max=1)
            t_next = torch.maximum(t, t_next)
            if torch.equal(t * magnitude >= cap, t_next * magnitude >= cap):  # synchronises the device
                break
            t = t_next
        moved = torch.minimum(t_next * magnitude, cap) * delta.sign()
        return (x + moved.view_as(x)).clamp(0, 1)

    def distance(self, delta: Tensor) -> Tensor:
        """Return ‖δ‖₂ per image, (B,)."""
        return torch.linalg.vector_norm(flat(delta), dim=1)
