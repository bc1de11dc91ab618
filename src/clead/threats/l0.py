"""The L0 ball: at most eps pixels may change, each to any colour."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from clead.settings import Ratio, setting, settings
from clead.threats import THREATS
from clead.threats.geometry import box_slack, flat, per_image


@THREATS.register("l0")
@settings
class L0:
    """{x + δ : at most eps pixels of δ are not 0} ∩ [0, 1]; all channels of one position are one pixel.

    The set is not convex. Projected gradient ascent in it is PGD_0 (Croce & Hein 2019, arXiv:1909.05040, section 3.1).

    >>> threat = L0(eps=1)
    >>> threat.project(torch.tensor([[[[0.9, 0.6]]]]), torch.tensor([[[[0.5, 0.5]]]]))
    tensor([[[[0.9000, 0.5000]]]])
    """

    norm: ClassVar[str] = "l0"
    eps: Ratio = setting(Ratio("10"), "radius of the ball", unit="pixels that may change, a whole number")

    @field_validator("eps")
    @classmethod
    def _whole(cls, eps: Ratio) -> Ratio:
        if eps < 0 or eps != int(eps):
            raise ValueError(f"l0 eps must be a whole number ≥ 0, got {eps.text}; it counts the pixels that may change")
        return eps

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x`` with eps pixels at random places given random colours, both uniform."""
        lottery = torch.empty_like(_pixels(x)[:, 0]).uniform_(generator=generator)
        colours = torch.empty_like(x).uniform_(generator=generator)
        return _only(self._largest(lottery), colours, x)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Return ``x_adv`` moved along the gradient, its length such that the eps steepest pixels change by ``step_size`` in sum.

        A pixel's change is the mean over its channels. Croce & Hein give the whole gradient a fixed L1 length; that of the
        pixels that can survive the projection is fixed here, so that one step size serves images of any size and any eps:
        with ``step_size`` = eps a pixel moves by 1 on average, the width of the box.
        """
        useful = torch.where((box_slack(x_adv, gradient) > 0) | gradient.isnan(), gradient, 0)
        slope = _pixels(useful).abs().mean(1)
        total = slope.topk(max(1, self._count(slope)), dim=1).values.sum(1)
        return x_adv + useful / per_image(total.clamp_min(1e-38), x_adv) * step_size

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return a Euclidean-nearest point of ball ∩ box: the pixels whose change, clipped to the box, saves most distance.

        Croce & Hein 2019, arXiv:1909.05040, section 3.1: keeping pixel i costs ‖a − z‖² and not keeping it ‖a − x‖², with
        a = x_adv and z = a clipped; the eps pixels of largest difference are kept.
        """
        clipped = x_adv.clamp(0, 1)
        saved = (clipped - x) * (2 * x_adv - x - clipped)  # (a − x)² − (a − z)² without its cancellation
        return _only(self._largest(_pixels(saved).sum(1)), clipped, x)

    def distance(self, delta: Tensor) -> Tensor:
        """Return the number of pixels that are not 0 in every channel, (B,); NaN if one is NaN, as a norm is."""
        count = (_pixels(delta) != 0).any(1).sum(1).to(delta.dtype)
        return torch.where(flat(delta).isnan().any(1), torch.nan, count)

    def _count(self, pixels: Tensor) -> int:
        return min(int(self.eps), pixels.shape[1])

    def _largest(self, values: Tensor) -> Tensor:
        """Return a mask (B, pixels) of the eps largest values per image; NaN is the largest of all, so it is never hidden."""
        chosen = values.topk(self._count(values), dim=1).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _pixels(x: Tensor) -> Tensor:
    """Return (B, channels, pixels) from (B, C, H, W); a plain (B, D) has one channel."""
    return x.reshape(len(x), x.shape[1] if x.dim() > 2 else 1, -1)


def _only(mask: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask[:, None], _pixels(changed), _pixels(x)).view_as(x)
