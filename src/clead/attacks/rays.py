"""The RayS attack: the nearest decision boundary along rays of signs, from nothing but the labels that the model gives."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.interfaces import Model, Threat
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION

_TOLERANCE = 1e-3  # of a radius, as a length in L2: the authors'


@ATTACKS.register("rays")
@settings
class RayS:
    """Look for signs s ∈ {−1, 1}^D whose radius r(s) = inf {r : clip(x + r·s) is misclassified} is at most eps.

    Source: Chen & Gu 2020, arXiv:2006.12792, section 3. From s = (1, …, 1), one block of signs is turned at a time: all of them,
    then each half, each quarter, down to each value. One answer at the best radius so far says whether the turned ray is worth a
    binary search. Of an answer only the label is used, so that neither logits nor their scale can mislead the search.

    Departures: an image leaves at its first mistake inside eps; a ray worth searching is asked at eps next, and the binary search
    stays above it; the first signs are tried themselves; where turning any single value no longer helps, the search begins again
    at random signs, the only use of ``generator``.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    needs_gradient: ClassVar[bool] = False
    returns_clean: ClassVar[bool] = True
    queries: int = setting(
        10_000, "answers of the model per image, that to the clean image included", ge=2, unit="queries"
    )

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return misclassified images of the threat set, (B, C, H, W), and ``x`` itself where none was found."""
        x_adv = x.clone()
        if threat.eps == 0:
            return x_adv
        left = CLASSIFICATION.correct(model(x), y).nonzero()[:, 0]
        probes, y = _Rays(x[left], float(threat.eps), generator), y[left]
        for _ in range(self.queries - 1):
            if not len(left):
                break
            points = probes.points()
            wrong = ~CLASSIFICATION.correct(model(points), y)
            broken = wrong & probes.inside()
            if broken.any():  # synchronises the device
                x_adv[left[broken]] = points[broken]
                left, y, wrong = left[~broken], y[~broken], wrong[~broken]
                probes.keep(~broken)
            probes.settle(wrong)
        return x_adv


class _Rays:
    """One search per image, each at its own stage: every answer moves every image on by one step.

    A ray is first checked at the best radius so far, then asked at eps, then searched between the largest radius that is right,
    ``low``, and the smallest that is wrong, ``high``.
    """

    def __init__(self, x: Tensor, eps: float, generator: torch.Generator | None) -> None:
        n, self.shape, self.generator = len(x), x.shape[1:], generator
        self.x = x.flatten(1)
        self.size = self.x.shape[1]
        self.eps, self.tolerance = x.new_tensor(eps), _TOLERANCE / math.sqrt(self.size)
        self.finest = math.ceil(math.log2(self.size))  # the level whose blocks are single values
        self.count, self.left = n, torch.arange(n, device=x.device)
        self.drawn: list[Tensor] = []
        self.starts = torch.zeros_like(self.left)  # how often the image has begun anew
        self.signs = torch.ones_like(self.x)
        self.radius = x.new_full((n,), torch.inf)
        # Blocks of level l are ⌈D / 2^l⌉ values long; at level −1 the signs are taken as they are.
        self.level, self.begin = torch.full_like(self.left, -1), torch.zeros_like(self.left)
        self.checking, self.improved = (torch.full((n,), flag, device=x.device) for flag in (True, False))
        self.low, self.high = x.new_zeros(n), x.new_zeros(n)

    def points(self) -> Tensor:
        """Return the point that each image's search asks about, (n, C, H, W) in [0, 1]."""
        signs = torch.where(self._block(), -self.signs, self.signs)
        return (self.x + self._asked()[:, None] * signs).clamp_(0, 1).view(-1, *self.shape)

    def inside(self) -> Tensor:
        """Return which of the points are inside the threat set, (n,) bool."""
        return self._asked() <= self.eps

    def settle(self, wrong: Tensor) -> None:
        """Take in which of the points are ``wrong``, (n,) bool, none of them inside the threat set."""
        asked, checking = self._asked(), self.checking
        self.high = torch.where(wrong, asked, self.high)
        self.low = torch.where(checking, 0, torch.where(wrong, self.low, asked))
        ended = torch.where(checking, ~wrong, self.high - self.low <= self.tolerance)
        self.checking = ended
        better = ended & ~checking & (self.high < self.radius)
        turned = better.nonzero()[:, 0]  # synchronises the device
        self.signs[turned] = torch.where(self._block(), -self.signs, self.signs)[turned]
        self.radius = torch.where(better, self.high, self.radius)
        self.improved |= better
        self._advance(ended)

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        for name in ("x", "left", "starts", "signs", "radius", "level", "begin", "checking", "improved", "low", "high"):
            setattr(self, name, getattr(self, name)[stands])

    def _asked(self) -> Tensor:
        """Return the radius of each image's point, (n,); 1 reaches the corner of the pixel box, and nothing is beyond."""
        between = torch.where(self.low < self.eps, self.eps, (self.low + self.high) / 2)
        return torch.where(self.checking, self.radius.clamp(max=1), between)

    def _length(self) -> Tensor:
        return torch.where(self.level < 0, 0, -(-self.size // 2 ** self.level.clamp_min(0)))

    def _block(self) -> Tensor:
        """Return which signs are turned, (n, D) bool."""
        place = torch.arange(self.size, device=self.x.device)
        return (place >= self.begin[:, None]) & (place < (self.begin + self._length())[:, None])

    def _advance(self, ended: Tensor) -> None:
        """Go to the next block where the ray ``ended``, (n,) bool; after the last one, to the next level."""
        self.begin = self.begin + ended * self._length()
        over = ended & ((self.begin >= self.size) | (self.level < 0))
        stuck = over & (self.level == self.finest) & ~self.improved
        self.level = torch.where(over, (self.level + 1).clamp(max=self.finest), self.level)
        self.begin = torch.where(over, 0, self.begin)
        self.improved &= ~over
        if stuck.any():  # synchronises the device
            self._restart(stuck)

    def _restart(self, stuck: Tensor) -> None:
        """Begin again at random signs; an image's do not depend on when other images are stuck."""
        self.starts = self.starts + stuck.long()
        while len(self.drawn) < int(self.starts.max()):
            draws = torch.rand(self.count, self.size, device=self.x.device, generator=self.generator)
            self.drawn.append(draws < 0.5)
        for image in stuck.nonzero()[:, 0].tolist():
            minus = self.drawn[int(self.starts[image]) - 1][self.left[image]]
            self.signs[image] = torch.where(minus, -1, 1).to(self.signs)
        self.radius = self.radius.masked_fill(stuck, torch.inf)
        self.level = self.level.masked_fill(stuck, -1)
