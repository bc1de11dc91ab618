"""The fast adaptive boundary attack: the nearest adversarial image, by projections onto linearised decision boundaries."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.capabilities import check_norm, times
from clead.interfaces import Model, Threat
from clead.losses.precision import at_least_float32
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS
from clead.threats.geometry import flat, per_image, sign

ALPHA_MAX = 0.1
"""Largest weight of the projection of the clean image in a step."""
ETA = 1.05
"""How far a step goes towards the boundary: a little beyond, so that it is crossed."""
BETA = 0.9
"""What is left of the perturbation when an adversarial image is moved back towards the clean one."""

_PASSES = 100
_BISECTIONS = 14


@ATTACKS.register("fab")
@settings
class FAB:
    """Step to the nearest point of the linearised boundary, held near x (Croce & Hein 2020, arXiv:1907.02044, algorithm 1).

    With targets it is FAB-T (Croce & Hein 2020, arXiv:2003.01690, section 4): one run per target class, one gradient per step.

    Departures: a search ends for an image with its first adversarial point inside the ball, which leaves the set of broken images
    as it is. In a search every point beyond the ball is drawn back towards the image, as the paper draws back adversarial points,
    without asking which it is: one forward then both judges a point and gives its gradient, a third of the passes less, and the
    same images broke (or more, in L1) in every comparison (``benchmarks/autoattack.py``). The final search between the best image
    and x is a bisection, and only for ``minimal`` (the authors' AutoAttack has none).
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    targeted: ClassVar[bool] = True
    returns_clean: ClassVar[bool] = True
    passes_per_step: ClassVar[int] = 3
    steps: int = setting(100, "steps of each run", ge=1, unit="steps")
    restarts: int = setting(1, "runs per target, all but the first from a random point", ge=1, unit="runs")
    targets: int = setting(
        9, "classes to aim at, the most likely wrong ones, at most K - 1; 0: the nearest boundary at each step", ge=0
    )

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        return f"{'FAB-T' if self.targets else 'FAB'}{times(self.restarts)}"

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
        """Return x_adv, (B, C, H, W) in the threat set around ``x``: misclassified where one was found, else ``x``."""
        if not threat.eps:
            return x.clone()
        return self._nearest(_Problem(model, x, y, threat, task), float(threat.eps), generator)

    def minimal(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        norm: str = "linf",
        task: Task = CLASSIFICATION,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the nearest misclassified images found, however far they are; ``x`` where there is none or it is one itself.

        Args:
            model: frozen, in evaluation mode, gives logits (B, K).
            x: (B, C, H, W) float in [0, 1].
            y: (B,) int64 in [0, K).
            norm: linf, l2 or l1: what near means.
            task: what is right; of a targeted attack ``y`` is the class to aim at.
            generator: of the random starts, on the device of ``x``; a fixed seed if None.
        """
        check_norm(self, norm)
        threat: Any = THREATS.get(norm)
        problem = _Problem(model, x, y, threat(eps=0), task)
        return _shortened(problem, self._nearest(problem, None, generator))

    def _nearest(self, problem: _Problem, eps: float | None, generator: torch.Generator | None) -> Tensor:
        """Run every target and restart; an image leaves with its first adversarial point within ``eps``, if not None."""
        model, x, y, threat, task = problem
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(0)
        with torch.no_grad():
            nearest = x.clone()
            logits = at_least_float32(model(x))
            rows = task.correct(logits, y).nonzero()[:, 0]
            reach = torch.full((len(x),), torch.inf if eps is None else eps, device=x.device, dtype=x.dtype)
            wrong_classes = logits.scatter(1, y[:, None], -torch.inf).topk(logits.shape[1] - 1, dim=1).indices
            if task != CLASSIFICATION:
                aims: list[Tensor] = [wrong_classes[:, :0]]  # a given target replaces the most likely wrong classes
            else:
                aims = list(wrong_classes[:, : self.targets, None].unbind(1)) if self.targets else [wrong_classes]
            for aim in aims:
                for restart in range(self.restarts):
                    if not len(rows):
                        return nearest
                    start = x[rows]
                    if restart:
                        start = _random_start(start, threat.norm, reach[rows], generator)
                    if eps is None:
                        self._run(problem, aim, start, rows, nearest, reach)
                    else:
                        rows = self._run_within(problem, aim, start, rows, nearest, eps)
        return nearest

    def _run_within(
        self, problem: _Problem, target: Tensor, point: Tensor, rows: Tensor, nearest: Tensor, eps: float
    ) -> Tensor:
        """Walk the images ``rows`` from ``point`` towards ``target``, (B, T) classes; return the rows that nothing broke."""
        model, x, y, threat, task = problem
        x, y, target = x[rows], y[rows], target[rows]
        for step in range(self.steps + 1):
            size = threat.distance(point - x)
            if step < self.steps:
                gap, normal, logits = _boundary(model, point, (task, y, target), threat.norm)
            else:
                gap, normal, logits = size, size, at_least_float32(model(point))
            # Not `size <= eps`: a point of NaN, from a broken gradient, must come out, or the model would look robust.
            hit = (~task.correct(logits, y) & ~(size > eps)).nonzero()[:, 0]  # synchronises the device
            if len(hit):
                nearest[rows[hit]] = point[hit]
                active = torch.ones_like(y, dtype=torch.bool).index_fill_(0, hit, False)
                x, y, target, point, rows, gap, normal = (
                    values[active] for values in (x, y, target, point, rows, gap, normal)
                )
            if step == self.steps or not len(rows):
                return rows
            point = _step(x, point, gap, normal, threat.norm)
            beyond = threat.distance(point - x) > eps
            point = torch.lerp(point, x, per_image((1 - BETA) * beyond.to(x.dtype), x))
        return rows

    def _run(
        self, problem: _Problem, target: Tensor, point: Tensor, rows: Tensor, nearest: Tensor, reach: Tensor
    ) -> None:
        """Walk the images ``rows`` from ``point`` towards ``target``; write what is found nearer than ``reach``."""
        model, x, y, threat, task = problem
        x, y, target = x[rows], y[rows], target[rows]
        for _ in range(self.steps):
            gap, normal, _logits = _boundary(model, point, (task, y, target), threat.norm)
            point = _step(x, point, gap, normal, threat.norm)
            wrong = ~task.correct(at_least_float32(model(point)), y)
            size = threat.distance(point - x)
            hit = (wrong & ~(size > reach[rows])).nonzero()[:, 0]  # synchronises the device
            if len(hit):
                nearest[rows[hit]] = point[hit]
                reach[rows[hit]] = size[hit]
            point = torch.lerp(point, x, per_image((1 - BETA) * wrong.to(x.dtype), x))


class _Problem(NamedTuple):
    """What is attacked: of a targeted attack (``task``) ``y`` is the class to aim at, and the classes ``target`` are none."""

    model: Model
    x: Tensor
    y: Tensor
    threat: Threat
    task: Task


def _shortened(problem: _Problem, nearest: Tensor) -> Tensor:
    """Return ``found`` with its perturbation scaled down to where it starts to be wrong, by bisection."""
    model, x, y, _, task = problem
    with torch.no_grad():
        low, high = torch.zeros_like(x[:, 0, 0, 0]), torch.ones_like(x[:, 0, 0, 0])
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            wrong = ~task.correct(model(torch.lerp(x, nearest, per_image(middle, x))), y)
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        return torch.lerp(x, nearest, per_image(high, x))


def _random_start(x: Tensor, norm: str, reach: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random point of the ball of half the size of ``reach``, at most half the box, around each image."""
    threat: Any = THREATS.get(norm)(eps=0.5)
    grey = torch.full_like(x, 0.5)
    unit = (
        threat.random_start(grey, generator=generator) - grey
    ) * 2  # the ball of radius 1/2 touches no side of the box
    radius = torch.minimum(reach, threat.distance(grey)) / 2
    return (x + per_image(radius, x) * unit).clamp_(0, 1)


def _boundary(
    model: Model, point: Tensor, goal: tuple[Task, Tensor, Tensor], norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Linearise z_t − z_y at ``point``: value (B,), gradient (B, d) of the nearest of the classes ``target`` (B, T); and logits.

    goal: the task, y and ``target``. Of a targeted attack, T = 0, it is z_y − max_{k≠y} z_k: the other class may change.

    Nearest by |value| / dual norm of the gradient (arXiv:1907.02044, eq. 7), which is the distance to the boundary without a box.
    """
    task, y, target = goal
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = at_least_float32(model(point))
        towards = logits.gather(1, target) - logits.gather(1, y[:, None])
        values = towards if target.shape[1] else task.margin(logits, y)[:, None]
        count = values.shape[1]
        (slope,) = torch.autograd.grad(values[:, 0].sum(), point, retain_graph=count > 1)
        values = values.to(point.dtype)
        best, normal = values[:, 0].detach(), flat(slope)
        if count == 1:
            return best, normal, logits.detach()
        shortest = _distance(best, normal, norm)
        for k in range(1, count):
            (slope,) = torch.autograd.grad(values[:, k].sum(), point, retain_graph=k + 1 < count)
            value, slope = values[:, k].detach(), flat(slope)
            distance = _distance(value, slope, norm)
            nearer = ~(distance >= shortest)  # NaN is nearest, so that it comes out
            best, shortest = torch.where(nearer, value, best), torch.where(nearer, distance, shortest)
            normal = torch.where(nearer[:, None], slope, normal)
    return best, normal, logits.detach()


def _distance(value: Tensor, normal: Tensor, norm: str) -> Tensor:
    order = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]  # the dual norm
    return value.abs() / torch.linalg.vector_norm(normal, order, dim=1).clamp_min(torch.finfo(normal.dtype).tiny)


def _step(x: Tensor, point: Tensor, gap: Tensor, normal: Tensor, norm: str) -> Tensor:
    """Return (1 − α)(point + η δ₁) + α(x + η δ₂), δ the ways of both to the boundary (arXiv:1907.02044, eqs. 9 and 10)."""
    both = torch.stack([flat(point), flat(x)])
    needed = -torch.stack([gap, gap + torch.linalg.vecdot(normal, both[1] - both[0])])
    delta = to_hyperplane(both, normal, needed, norm)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    near, far = torch.linalg.vector_norm(delta, order, dim=2).clamp_min(1e-8)[:, :, None]
    alpha = (near / (near + far)).clamp_max(ALPHA_MAX)
    both = both.add_(delta, alpha=ETA)
    return torch.lerp(both[0], both[1], alpha).clamp_(0, 1).view_as(x)


def to_hyperplane(x: Tensor, normal: Tensor, needed: Tensor, norm: str) -> Tensor:
    """Return the δ of least norm with normal · δ = needed and 0 ≤ x + δ ≤ 1 (arXiv:1907.02044, eq. 4 and section 2).

    Where no δ in the box reaches so far, that which comes nearest, with pixels moved that have a slope only. The authors sort
    the pixels; here the one dual variable is found by steps that each read all pixels once, in a few of them.

    Args:
        x: (2, B, d) or (B, d) float in [0, 1].
        normal: (B, d).
        needed: (2, B) or (B,).
        norm: linf, l2 or l1.
    """
    # A largest slope of 1: saturated logits have gradients whose squares underflow.
    largest = normal.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    normal = normal / largest
    needed = (needed / largest[:, 0])[..., None]
    slope, direction = normal.abs(), sign(normal) * sign(needed)
    room = torch.addcmul(torch.full_like(x[..., :1], 0.5), direction, 0.5 - x)  # 1 − x upwards, x downwards
    needed = needed.abs()
    reachable = needed < torch.linalg.vecdot(slope, room)[..., None]
    moved = _PROJECTIONS[norm](slope, room, needed * reachable, 16 * torch.finfo(x.dtype).eps)
    return torch.where(reachable, moved, room) * direction


def _linf(slope: Tensor, room: Tensor, needed: Tensor, tolerance: float) -> Tensor:
    """Return min(λ, room), with slope · that = needed. It is concave in λ, so Newton's steps from 0 never go too far."""
    level, work = torch.zeros_like(needed), torch.empty_like(room)
    for count in range(_PASSES):
        free = torch.linalg.vecdot(slope, torch.gt(room, level, out=work))[..., None]
        left = needed - torch.linalg.vecdot(slope, torch.minimum(room, level, out=work))[..., None]
        if _settled(left <= tolerance * needed, count):
            break
        level = level + left.clamp_min(0) / free.clamp_min(1e-30)

    return torch.minimum(room, level, out=work)


def _l2(slope: Tensor, room: Tensor, needed: Tensor, tolerance: float) -> Tensor:
    """Return min(λ · slope, room), with slope · that = needed, as for L∞."""
    level, squared = torch.zeros_like(needed), slope.square()
    free, work = torch.empty_like(room), torch.empty_like(room)
    for count in range(_PASSES):
        torch.mul(slope, level, out=work)
        gain = torch.linalg.vecdot(squared, torch.gt(room, work, out=free))[..., None]
        left = needed - torch.linalg.vecdot(slope, torch.minimum(room, work, out=work))[..., None]
        if _settled(left <= tolerance * needed, count):
            break
        level = level + left.clamp_min(0) / gain.clamp_min(1e-30)

    return torch.minimum(room, torch.mul(slope, level, out=work), out=work)


def _l1(slope: Tensor, room: Tensor, needed: Tensor, tolerance: float) -> Tensor:
    """Fill the rooms of the steepest pixels, down to a slope τ that is bracketed until sharing what is between costs nothing.

    Filling all slopes above τ gains φ(τ) = Σ slope · room at the cost S(τ) = Σ room, a convex curve with the tangent 1 / τ: the
    chord between the ends of the bracket is above the least cost, the tangents at the ends are below it.
    """
    gains, work = slope * room, torch.empty_like(room)
    low, high = torch.zeros_like(needed), torch.ones_like(needed)  # φ(low) > needed ≥ φ(high)
    gain_low, cost_low = (
        gains.sum(-1, keepdim=True),
        torch.linalg.vecdot(room, torch.gt(slope, low, out=work))[..., None],
    )
    gain_high, cost_high = torch.zeros_like(needed), torch.zeros_like(needed)
    for count in range(_PASSES):
        share = (needed - gain_high) / (gain_low - gain_high).clamp_min(1e-30)
        cost = torch.lerp(cost_high, cost_low, share)
        least = torch.maximum(cost_high + (needed - gain_high) / high, cost_low - (gain_low - needed) / low)
        if _settled(cost - least <= tolerance * cost, count):
            break
        # The mean slope between the ends separates them, however they are spread; interpolation is quicker where they are even.
        middle = (gain_low - gain_high) / (cost_low - cost_high).clamp_min(1e-30)
        if count % 2:
            middle = torch.lerp(high, low, share)
        above = torch.gt(slope, middle, out=work)
        gain, cost = torch.linalg.vecdot(gains, above)[..., None], torch.linalg.vecdot(room, above)[..., None]
        more = gain > needed
        low, gain_low, cost_low = (
            torch.where(more, a, b) for a, b in ((middle, low), (gain, gain_low), (cost, cost_low))
        )
        high, gain_high, cost_high = (
            torch.where(more, b, a) for a, b in ((middle, high), (gain, gain_high), (cost, cost_high))
        )

    full = torch.gt(slope, high, out=work)
    return torch.lerp(full, torch.gt(slope, low).to(room.dtype), share).mul_(room)


_PROJECTIONS = {"linf": _linf, "l2": _l2, "l1": _l1}


def _settled(done: Tensor, count: int) -> bool:
    """Ask whether all is done: at every pass on a CPU, at every fourth elsewhere, because it synchronises the device."""
    return (done.device.type == "cpu" or count % 4 == 3) and bool(done.all())
