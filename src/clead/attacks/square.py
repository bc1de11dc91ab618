"""The Square attack: random search by square windows, with nothing but the model's answers."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.square_cache import Prepared, WindowedModel
from clead.interfaces import Model, Threat
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import per_image

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_OVERSHOOT = 12
_NEWTON_STEPS = 4
_TINY = 1e-12

Index = tuple[Tensor, Tensor, Tensor, Tensor]
Slices = tuple[slice, slice, slice, slice]


def window_fraction(p_init: float, proposal: int, queries: int) -> float:
    """Return p, the part of the image that a window covers: p_init, halved again and again, for any length of the search.

    Source: Andriushchenko et al. 2020, arXiv:1912.00049, section 3: halvings for 10,000 queries, stretched to ``queries``; those of
    the authors' code and of AutoAttack.
    """
    return p_init / 2 ** sum(int(proposal / queries * 10_000) > limit for limit in _HALVINGS)


@ATTACKS.register("square")
@settings
class Square:
    """Maximise max_{k≠y} z_k − z_y by random search over windows (Andriushchenko et al. 2020, arXiv:1912.00049, algorithm 1).

    The version of AutoAttack (Croce & Hein 2020, arXiv:2003.01690; L1: Croce & Hein 2021, arXiv:2103.01208): margin loss, schedule
    of the windows stretched to the queries. Departures: each image has signs, and in L2 and L1 windows, of its own, as in the paper
    (in L∞ all images of a batch have the same window at a query, as in the authors' code, so that convolutions need computing there
    only); a window may touch the last row and column; an L∞ proposal always changes something. The answers may come from any
    function of the images.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    needs_gradient: ClassVar[bool] = False
    targeted: ClassVar[bool] = True
    returns_clean: ClassVar[bool] = True
    queries: int = setting(
        5000, "answers of the model per image and restart, clean image and start included", ge=2, unit="queries"
    )
    p_init: float = setting(0.8, "fraction of the image that the first windows cover", gt=0, le=1)
    restarts: int = setting(1, "independent searches; only images still robust go into the next", ge=1, unit="searches")

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        task: Task = CLASSIFICATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return misclassified images of the threat set, (B, C, H, W), and ``x`` itself where none was found."""
        x_adv = x.clone()
        if threat.eps == 0:
            return x_adv
        left = _stands(task.margin(model(x), y)).nonzero()[:, 0]
        for _ in range(self.restarts):
            if len(left):
                left = self._once(model, x, y, threat, left, x_adv, generator, task)
        return x_adv

    def _once(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        left: Tensor,
        x_adv: Tensor,
        generator: torch.Generator | None,
        task: Task,
    ) -> Tensor:
        """Search once for the images at ``left``, write those found into ``x_adv``, return the index of the others."""
        moves = (_Signs if threat.norm == "linf" else _Bumps)(model, x[left], threat, generator)
        y = y[left]
        value = task.margin(model(moves.best), y)
        for proposal in range(self.queries - 1):
            stands = _stands(value)
            if not stands.all():  # synchronises the device
                x_adv[left[~stands]] = moves.best[~stands]
                left, y, value = left[stands], y[stands], value[stands]
                moves.keep(stands)
            if not len(left) or proposal == self.queries - 2:
                break
            moves.propose(window_fraction(self.p_init, proposal, self.queries))
            new = task.margin(moves.answer(), y)
            better = ~(new <= value)  # NaN is better: the search has found where the model fails
            value = torch.where(better, new, value)
            moves.settle(better)
        return left


def _stands(value: Tensor) -> Tensor:
    return value <= 0  # not NaN: no answer is no sign of robustness


class _Moves(ABC):
    """The best images so far, ``best``; a proposal is written into windows of them, and taken back where it is no better.

    Around the model's forward there is no work on whole images, except in L1.
    """

    def __init__(self, model: Model, x: Tensor, threat: Threat, generator: torch.Generator | None) -> None:
        self.model = model
        self.x, self.threat, self.eps, self.generator = x, threat, float(threat.eps), generator
        # Numbers are drawn for all images at every query, so that an image's luck does not depend on when others fall.
        self.count, self.left = len(x), torch.arange(len(x), device=x.device)
        self.written: list[tuple[Index | Slices, Tensor, Tensor]] = []
        self.best = self._start()

    @abstractmethod
    def _start(self) -> Tensor: ...

    @abstractmethod
    def propose(self, fraction: float) -> None:
        """Change ``best`` in windows that cover ``fraction`` of the image."""

    def answer(self) -> Tensor:
        """Return the model's logits for the proposal, (n, K)."""
        return self.model(self.best)

    def settle(self, better: Tensor) -> None:
        """Take the proposal back except where it was ``better``, (n,) bool."""
        for window, new, old in self.written:
            self.best[window] = torch.where(per_image(better, new), new, old)
        self.written.clear()

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        self.x, self.best, self.left = self.x[stands], self.best[stands], self.left[stands]

    def _write(self, window: Index | Slices, new: Tensor, old: Tensor) -> None:
        self.written.append((window, new, old))
        self.best[window] = new

    def _uniform(self, *shape: int) -> Tensor:
        """Return draws from [0, 1), (n, *shape)."""
        return torch.rand(self.count, *shape, device=self.x.device, generator=self.generator)[self.left]

    def _coins(self, *shape: int) -> Tensor:
        """Return −1 or 1, (n, *shape)."""
        return torch.where(self._uniform(*shape) < 0.5, -1, 1).to(self.x.dtype)

    def _window(self, side: int) -> Index:
        """Return the index of one square per image, anywhere in it: ``best[index]`` is (n, C, side, side)."""
        n, c, h, w = self.x.shape
        steps, corner = torch.arange(max(n, c, side), device=self.x.device), self._uniform(2)
        rows = (corner[:, 0] * (h - side + 1)).long()[:, None] + steps[:side]
        columns = (corner[:, 1] * (w - side + 1)).long()[:, None] + steps[:side]
        return steps[:n, None, None, None], steps[:c, None, None], rows[:, None, :, None], columns[:, None, None, :]

    def _side(self, fraction: float) -> int:
        return round(math.sqrt(fraction * self.x.shape[2] * self.x.shape[3]))


class _Signs(_Moves):
    """L∞: every pixel at x ± eps, a window all + or all − in a channel (Andriushchenko et al. 2020, algorithm 2)."""

    windowed: WindowedModel | None = None
    corner: tuple[int, int]  # of the last window

    def _start(self) -> Tensor:
        if isinstance(self.model, Prepared) and self.x.device.type == "cpu":
            self.windowed = WindowedModel(self.model)
        stripes = self._coins(self.x.shape[1], 1, self.x.shape[3])
        return (self.x + self.eps * stripes).clamp_(0, 1)

    def propose(self, fraction: float) -> None:
        """Write x ± eps into a window."""
        channels, h, w = self.x.shape[1:]
        side = min(max(self._side(fraction), 1), h, w)
        if self.windowed is not None:
            self.windowed.remember(self.best, side)
        corner = torch.rand(2, device=self.x.device, generator=self.generator)
        self.corner = row, column = int(corner[0] * (h - side + 1)), int(corner[1] * (w - side + 1))
        window = (slice(None), slice(None), slice(row, row + side), slice(column, column + side))
        x, old = self.x[window], self.best[window].clone()
        signs, turns = self._coins(channels, 1, 1), self._coins(channels, 1, 1)
        new = (x + self.eps * signs).clamp_(0, 1)
        # A query that changes nothing is lost, half of the last ones on grey images: there some channels' signs are turned, or all.
        idle = (new == old).flatten(1).all(1)
        turns = torch.where((turns > 0).all(1, keepdim=True), -1, turns)
        other = (x + self.eps * signs * turns).clamp_(0, 1)
        self._write(window, torch.where(per_image(idle, new), other, new), old)

    def answer(self) -> Tensor:
        """Return the model's logits for the proposal, (n, K)."""
        return super().answer() if self.windowed is None else self.windowed(self.best, *self.corner)

    def settle(self, better: Tensor) -> None:
        """Take the proposal back except where it was ``better``, (n,) bool."""
        super().settle(better)
        if self.windowed is not None:
            self.windowed.settle(better)

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        super().keep(stands)
        if self.windowed is not None:
            self.windowed.keep(stands)


class _Bumps(_Moves):
    """L2 and L1: the size of two windows, and what is left of eps, go into a pair of bumps in the first of them.

    Source: Andriushchenko et al. 2020, algorithm 3 and equation 2. For L1, Croce & Hein 2021, arXiv:2103.01208: narrower bumps
    (power 4) are made too large, and the whole perturbation is then shrunk to the ball, which keeps it sparse. AutoAttack makes
    them C times too large; here it is 12 times for any C: more colour images broken than with 3, as many grey ones, and more than
    with 1.
    """

    before: Tensor
    used: Tensor  # per image, the sum of the squares (L2) or absolute values (L1) of the perturbation

    def _start(self) -> Tensor:
        n, c, h, w = self.x.shape
        side = max(min(h, w) // 5, 1)
        down, right = h // side, w // side
        tiles = self._bumps(side)[(self._uniform(down, right) < 0.5).long()][:, None] * self._coins(
            c, down, right, 1, 1
        )
        delta = torch.zeros_like(self.x)
        top, left = (h - down * side) // 2, (w - right * side) // 2
        delta[:, :, top : top + down * side, left : left + right * side] = tiles.transpose(3, 4).reshape(
            n, c, down * side, right * side
        )
        if self.threat.norm == "l1":
            best = self.x + self._shrunk(delta.clamp_(-self.x, 1 - self.x))
        else:
            best = (self.x + delta * per_image(self.eps / self.threat.distance(delta), delta)).clamp_(0, 1)
        self.used = self._mass((best - self.x).flatten(1), 1)
        return best

    def propose(self, fraction: float) -> None:
        """Write x into a second window, then the bumps and what was in the first window, made larger, into the first."""
        c, h, w = self.x.shape[1:]
        side = min(max(self._side(fraction), 3) // 2 * 2 + 1, h, w)
        first, second = self._window(side), self._window(side)
        x, x2 = self.x[first], self.x[second]
        old, old2 = self.best[first], self.best[second]  # both before either is written: they may overlap
        delta, delta2 = old - x, old2 - x2
        down, right = second[2] - first[2][:, :, :1], second[3] - first[3][..., :1]
        shared = (down >= 0) & (down < side) & (right >= 0) & (right < side)
        mass = self._mass(delta, (2, 3))
        room = (self._budget() - self.used).clamp_min(0)[:, None] / c
        room = room + mass + self._mass(torch.where(shared, 0, delta2), (2, 3))
        bumps = self._bumps(side)[(self._uniform() < 0.5).long()][:, None] * self._coins(c, 1, 1)
        bumps = bumps + delta / (self._length(mass) + _TINY)[..., None, None]
        bumps *= (self._length(room) / (self._length(self._mass(bumps, (2, 3))) + _TINY))[..., None, None]
        if self.threat.norm == "l2":
            self._write(second, x2, old2)
            self._write(first, (x + bumps).clamp_(0, 1), old)
            return
        self.before, self.best = self.best, self.best.clone()
        self.best[second] = x2
        self.best[first] = (x + _OVERSHOOT * bumps).clamp_(0, 1)
        self.best = self.x + self._shrunk(self.best - self.x)

    def settle(self, better: Tensor) -> None:
        """Take the proposal back except where it was ``better``, (n,) bool."""
        super().settle(better)
        if self.threat.norm == "l1":
            self.best = torch.where(per_image(better, self.best), self.best, self.before)
        gained = better.nonzero()[:, 0]  # synchronises the device
        self.used[gained] = self._mass((self.best[gained] - self.x[gained]).flatten(1), 1)

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        super().keep(stands)
        self.used = self.used[stands]

    def _mass(self, delta: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        return delta.abs().sum(dims) if self.threat.norm == "l1" else delta.square().sum(dims)

    def _length(self, mass: Tensor) -> Tensor:
        return mass if self.threat.norm == "l1" else mass.sqrt()

    def _budget(self) -> float:
        return self.eps if self.threat.norm == "l1" else self.eps**2

    def _bumps(self, side: int) -> Tensor:
        return (_bumps(side, 4, 1) if self.threat.norm == "l1" else _bumps(side, 2, 2)).to(self.x)

    def _shrunk(self, delta: Tensor) -> Tensor:
        """Return sign(δ)·(|δ| − μ)⁺ of an L1 length ≤ eps, μ ≥ 0, for a perturbation that lies in the box already.

        Newton's steps to the least such μ, from below as the length is convex in μ; then a scaling, as they end before it.
        """
        size = delta.flatten(1).abs()
        for _ in range(_NEWTON_STEPS):
            over = (size.sum(1) - self.eps).clamp_min(0)
            size = (size - (over / (size > 0).sum(1).clamp_min(1))[:, None]).clamp_min_(0)
        size *= (self.eps / size.sum(1).clamp_min(_TINY)).clamp(max=1)[:, None]
        return delta.sign() * size.view_as(delta)


@functools.cache
def _bumps(side: int, power: int, order: int) -> Tensor:
    """Return a bump above its negative, and the same transposed, (2, side, side), each of length 1 in the norm ``order``.

    A bump falls from its centre by rings of equal max-distance d: Σ_{j=d+1}^{n+1} j^(−power), n half the longer side.
    """

    def bump(height: int) -> Tensor:
        down, right = (torch.arange(size) - size // 2 for size in (height, side))
        rings = torch.arange(1, max(height, side) // 2 + 2, dtype=torch.float64) ** -power
        value = rings.flip(0).cumsum(0).flip(0)[torch.maximum(down.abs()[:, None], right.abs())]
        return value / torch.linalg.vector_norm(value, order)

    upper = [bump(side // 2)] if side > 1 else []
    pair = torch.cat([*upper, -bump(side - side // 2)])
    pair /= torch.linalg.vector_norm(pair, order)
    return torch.stack([pair, pair.T])
