"""The spatial attack: rotate and shift the image, try every pair of a grid, keep the worst."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.attacks import UNRESTRICTED
from clead.interfaces import Model
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION


@UNRESTRICTED.register("spatial")
@settings
class Spatial:
    """max over a grid of (θ, δu, δv) of the margin of the image rotated by θ and shifted by (δu, δv).

    Source: Engstrom et al. 2019, arXiv:1712.02779, section 3: (u', v') = R(θ)(u, v) + (δu, δv), bilinear, black outside, and
    their grid of 31 angles in ±30° and 5 × 5 shifts in ±3 pixels (on CIFAR-10; about a tenth of the side). Exhaustive, since
    gradients are of little help here (their section 4). Departure: an image leaves the search at the first pair that it falls
    to, the largest transformations first; whether an image falls is the same.
    """

    needs_gradient: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    degrees: float = setting(30.0, "largest rotation to either side", unit="degrees", ge=0, le=180)
    pixels: float = setting(3.0, "largest shift in either direction, along each axis", unit="pixels", ge=0)
    angles: int = setting(31, "angles tried, evenly spaced; 1: no rotation", unit="angles", ge=1)
    shifts: int = setting(5, "shifts tried along each axis, evenly spaced; 1: no shift", unit="shifts", ge=1)

    def grid(self) -> Tensor:
        """Return every (θ in degrees, δu to the right, δv downwards in pixels), (angles · shifts², 3), largest first."""
        turns, moves = _spread(self.degrees, self.angles), _spread(self.pixels, self.shifts)
        grid = torch.cartesian_prod(turns, moves, moves)
        size = (grid.abs() / torch.tensor([self.degrees or 1, self.pixels or 1, self.pixels or 1])).sum(1)
        return grid[size.argsort(descending=True, stable=True)]

    def worst(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return for each image a transformation that it falls to, else that of the largest margin; nothing is drawn."""
        result, largest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        grid, rows = self.grid(), torch.arange(len(x), device=x.device)
        rows = rows[CLASSIFICATION.correct(model(x), y)]
        start = 0
        while start < len(grid) and len(rows):  # synchronises the device
            together = max(1, len(x) // len(rows))  # as images leave, more transformations share a batch
            chunk = grid[start : start + together]
            start += together
            tried = torch.cat([transform(x[rows], *pair) for pair in chunk.tolist()])
            labels = y[rows].repeat(len(chunk))
            logits = model(tried)
            value = CLASSIFICATION.margin(logits, labels).to(largest.dtype)
            value = torch.where(CLASSIFICATION.correct(logits, labels), value, torch.inf).view(len(chunk), len(rows))
            best, which = value.max(0)
            better = best > largest[rows]
            images = tried.view(len(chunk), len(rows), *x.shape[1:])[which, torch.arange(len(rows), device=x.device)]
            result[rows[better]], largest[rows[better]] = images[better], best[better]
            rows = rows[best < torch.inf]
        return result

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return which images are the image itself or one of its transformations in the grid, up to 1e-5 per pixel, (B,)."""
        allowed = (x_adv - x).abs().flatten(1).amax(1) == 0
        for pair in self.grid().tolist():
            if allowed.all():  # synchronises the device
                break
            allowed |= (x_adv - transform(x, *pair)).abs().flatten(1).amax(1) <= 1e-5
        return allowed


def _spread(largest: float, count: int) -> Tensor:
    return torch.linspace(-largest, largest, count, dtype=torch.float64) if count > 1 else torch.zeros(1).double()


def transform(x: Tensor, degrees: float, right: float, down: float) -> Tensor:
    """Rotate the images about their centre, clockwise as displayed, then shift them; bilinear, black outside.

    x: (B, C, H, W). right, down: pixels. Exact copies for shifts by whole pixels and turns by 0° (and 90° of squares).
    """
    height, width = x.shape[2:]
    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    # affine_grid asks where an output pixel comes from, in units of half the side: R(−θ) applied to (u' − δ).
    matrix = [
        [cos, sin * height / width, -(cos * right + sin * down) * 2 / width],
        [-sin * width / height, cos, (sin * right - cos * down) * 2 / height],
    ]
    theta = x.new_tensor(matrix).expand(len(x), 2, 3)
    where = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, where, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)
