"""Auto-PGD: projected gradient ascent that finds its own step size, the core of AutoAttack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.capabilities import SHORT, times
from clead.errors import UserError
from clead.interfaces import Model, Threat
from clead.losses import margin as margins
from clead.losses.precision import at_least_float32
from clead.models.seeding import fork_rng
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import per_image, sign
from clead.threats.l1 import L1

RHO = 0.75
"""A step size is kept if more than this part of the steps since the last checkpoint rose (arXiv:2003.01690, condition 1)."""
_MOMENTUM = 0.75
_LOSSES = {"cross_entropy": "loss", "margin": "margin"}
"""Losses that are the task's; DLR is one of logits."""
_LARGEST = 255.0  # of an L1 threat
_PIXELS = (1, 2, 3)
_CANDIDATES = 100  # for a target: the most likely classes, as in the paper
_DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def checkpoints(steps: int) -> list[int]:
    """Return the steps w_j after which step sizes are revised (Croce & Hein 2020, arXiv:2003.01690, section 3.3).

    w_j = ⌈p_j · steps⌉ with p_1 = 0.22 and p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06), in whole percent here.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    checkpoints, percent, width = [], 22, 22
    while percent < 100:
        checkpoints.append(-(-percent * steps // 100))
        width = max(width - 3, 6)
        percent += width
    return sorted({w for w in checkpoints if w < steps})  # the last step is followed by nothing that could be revised


@ATTACKS.register("apgd")
@settings
class APGD:
    """Maximise a loss of the logits by projected gradient ascent that adapts its step size (arXiv:2003.01690, algorithm 1).

    Source: Croce & Hein 2020; for L1 Croce & Hein 2021, arXiv:2103.01208, algorithm 1 with exact projections and a radius that
    shrinks from 3 eps by way of 2 eps over the steps (section 3.3 there). An image leaves with its first misclassified point
    in the ball, so there is no best point to return besides.

    Departures: with more than one draw of a randomised model, an image is broken if at most half of the draws are right, and the
    best point is that of the largest mean loss; the authors look at the last draw only, and stop at a stroke of luck.
    Condition 1 holds with equality too, as in the authors' code. L1 needs 4 steps to shrink the radius.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    targeted: ClassVar[bool] = True
    returns_clean: ClassVar[bool] = True
    steps: int = setting(100, "gradient steps of each run", ge=1, unit="steps")
    restarts: int = setting(1, "runs per target, each from another random point", ge=1, unit="runs")
    loss: Literal["cross_entropy", "margin", "dlr"] = setting(
        "cross_entropy", "what is maximised; dlr needs 3 classes, and 4 with targets"
    )
    targets: int = setting(
        0, "classes to aim at, the most likely wrong ones, at most K - 1; 0: away from the label", ge=0, unit="classes"
    )
    target_order: Literal["confidence", "malt"] = setting(
        "confidence",
        "which classes are aimed at: the most likely ones, or those that a model which were linear around the image would reach "
        "first (MALT, Melamed et al. 2024, arXiv:2407.02240), for which the gradients of up to 100 classes are taken; malt is no "
        "part of AutoAttack",
    )
    eot: int = setting(1, "draws of a randomised model per step, whose gradients are averaged", ge=1, unit="draws")

    def __post_init__(self) -> None:
        """Ask for targets where they are ordered."""
        if self.target_order == "malt" and not self.targets:
            raise ValueError("target_order malt chooses among targets, got targets 0; set targets to 9, for example")

    def label(self, objective: str) -> str:
        """Return the name that tables show."""
        loss, draws = SHORT.get(self.loss, self.loss), f" EoT-{self.eot}" if self.eot > 1 else ""
        targeted = "APGD-T" if self.loss == "dlr" else f"APGD-T {loss}"
        targeted += " MALT" * (self.target_order == "malt")
        return f"{targeted if self.targets else f'APGD-{loss}'}{times(self.restarts)}{draws}"

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
        """Return misclassified images of the threat set, (B, C, H, W), and ``x`` itself where none was found.

        A model that draws from the global generators draws the same for the same ``generator``; they are restored. Raises
        UserError where the DLR loss is not defined for so few classes.
        """
        x_adv = x.clone()
        if not threat.eps:
            return x_adv
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(0)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))  # synchronises the device
        with torch.no_grad(), fork_rng(seed):
            logits, wrong = self._answer(model, x, y, task)
            classes = logits.shape[1]
            chosen = min(self.targets, classes - 1) if task == CLASSIFICATION else 0  # a given target replaces them
            self._check(classes, bool(chosen) or task != CLASSIFICATION)
            left = (~wrong).nonzero()[:, 0]
            aims = [y]
            if chosen:
                aims = logits.scatter(1, y[:, None], -torch.inf).topk(chosen, dim=1).indices
                if self.target_order == "malt":
                    aims[left] = nearest_classes(model, x[left], y[left], chosen, threat.norm)
                aims = aims.unbind(1)
            for aim in aims:
                for _ in range(self.restarts):
                    if not len(left):
                        return x_adv
                    # Drawn for all, so that an image's luck does not depend on which others have fallen.
                    draws = torch.empty_like(x)
                    if threat.norm == "linf":
                        draws.uniform_(-1, 1, generator=generator)
                    else:
                        draws.normal_(generator=generator)
                    left = self._run(model, x, (task, y, aim), threat, draws, left, x_adv)
        return x_adv

    def _check(self, classes: int, aims: bool) -> None:
        needed, kind = (4, "targeted DLR") if aims else (3, "DLR")
        if self.loss == "dlr" and classes < needed:
            raise UserError(f"the {kind} loss needs at least {needed} classes, got {classes}; use the margin instead")

    def _run(
        self,
        model: Model,
        x: Tensor,
        goal: tuple[Task, Tensor, Tensor],
        threat: Threat,
        draws: Tensor,
        left: Tensor,
        x_adv: Tensor,
    ) -> Tensor:
        """Climb once from ``draws`` for the images ``left``, put what breaks the model into ``x_adv``; return which still stand.

        ``goal`` is the task, the labels and the classes to aim at, the labels themselves if none are, (B,) both.
        """
        task, y, aim = goal
        eps, origin, labels, aims = float(threat.eps), x[left], y[left], aim[left]
        if threat.norm != "l1":
            start = (origin + eps * unit(draws[left], threat.norm)).clamp_(0, 1)
            path: _Path = SmoothPath(left, origin, labels, aims, start, threat.norm, eps)
            path.task = task
            return self._climb(model, path, self.steps, x_adv)
        short = self.steps * 3 // 10
        phases = [(3 * eps, short), (2 * eps, short), (eps, self.steps - 2 * short)] if short else [(eps, self.steps)]
        point = origin + draws[left]
        for radius, steps in phases:
            path = SparsePath(left, origin, labels, aims, point, L1(eps=min(radius, _LARGEST)))
            path.task = task
            left = self._climb(model, path, steps, x_adv if radius == eps else None)
            point = path.best
        return left

    def _climb(self, model: Model, path: _Path, steps: int, x_adv: Tensor | None) -> Tensor:
        """Take ``steps`` steps of ``path``, whose images leave for ``x_adv`` if that is given; return the index of the rest."""
        revise = path.revisions(steps)
        for step in range(steps + 1):
            if step:
                path.move(first=step == 1)
            value, gradient, wrong = self._look(model, path, slope=step < steps)
            if x_adv is not None and self.eot == 1:
                fallen = wrong.nonzero()[:, 0]  # synchronises the device
                if len(fallen):
                    x_adv[path.left[fallen]] = path.point[fallen]
                    rest = (~wrong).nonzero()[:, 0]
                    path.keep(rest)
                    value, gradient = value[rest], gradient[rest]
                    if not len(rest):
                        break
            path.settle(value, gradient, first=not step)
            if step in revise:
                path.revise(revise[step])
        if x_adv is None or self.eot == 1:
            return path.left
        # Leaving with the first estimate that looks wrong would choose the luckiest of many: the best point is judged anew.
        _, wrong = self._answer(model, path.best, path.labels, path.task)
        x_adv[path.left[wrong]] = path.best[wrong]
        return path.left[~wrong]

    def _look(self, model: Model, path: _Path, *, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return at the path's point the loss (n,), its gradient if ``slope`` is asked for, and which images are wrong (n,).

        Of several draws loss and gradient are summed: only comparisons and directions are of account.
        """
        value, gradient, right = self._draw(model, path, slope)
        for _ in range(self.eot - 1):
            again = self._draw(model, path, slope)
            value, gradient, right = value + again[0], gradient + again[1], right + again[2]
        return value, gradient, 2 * right <= self.eot

    def _draw(self, model: Model, path: _Path, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.set_grad_enabled(slope):
            point = path.point.detach().requires_grad_(slope)
            logits = at_least_float32(model(point))
            value = self._value(logits, path)
            gradient = torch.autograd.grad(value.sum(), point)[0] if slope else path.gradient
        return value.detach(), gradient, path.task.correct(logits.detach(), path.labels).long()

    def _value(self, logits: Tensor, path: _Path) -> Tensor:
        task = path.task
        if task != CLASSIFICATION and self.loss == "dlr":
            return task.margin(logits, path.labels) / _spread(logits)
        if task != CLASSIFICATION or not self.targets:
            return (margins.dlr if self.loss == "dlr" else getattr(task, _LOSSES[self.loss]))(logits, path.labels)
        return targeted(self.loss, logits, path.labels, path.aims)

    def _answer(self, model: Model, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """Return the mean logits of the clean images, (B, K), and which are wrong, (B,)."""
        answers = [at_least_float32(model(x)) for _ in range(self.eot)]
        right = torch.stack([task.correct(logits, y) for logits in answers]).sum(0)
        return torch.stack(answers).mean(0), 2 * right <= self.eot


def targeted(loss: str, logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
    """Return the loss (n,) that rises as the class ``aim`` (n,) takes over.

    Cross-entropy log p(aim); margin z_aim − z_y; DLR that over z_π1 − (z_π3 + z_π4) / 2 (arXiv:2003.01690, eq. 7).
    """
    if loss == "cross_entropy":
        return -margins.cross_entropy(logits, aim)
    lead = (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    if loss == "margin":
        return lead
    return lead / _spread(logits)


def nearest_classes(model: Model, x: Tensor, y: Tensor, count: int, norm: str) -> Tensor:
    """Return the classes that a linear model would reach first: largest (z_k − z_y) / ‖∇(z_k − z_y)‖*, (B, ``count``).

    Source: MALT (Melamed et al. 2024, arXiv:2407.02240), among the 100 most likely classes. ‖·‖* is the dual of ``norm``: then the
    quotient is minus the distance to the boundary of class k, if the model were linear.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = at_least_float32(model(point))
        likely = logits.detach().scatter(1, y[:, None], -torch.inf)
        candidates = likely.topk(max(count, min(_CANDIDATES, logits.shape[1] - 1)), dim=1).indices
        leads = logits.gather(1, candidates) - logits.gather(1, y[:, None])
        scores = []
        for lead in leads.unbind(1):
            (gradient,) = torch.autograd.grad(lead.sum(), point, retain_graph=True)
            slope = torch.linalg.vector_norm(gradient.flatten(1), _DUAL[norm], dim=1)
            scores.append(lead.detach() / slope.clamp_min(torch.finfo(slope.dtype).tiny))
    return candidates.gather(1, torch.stack(scores, 1).topk(count, dim=1).indices)


def _spread(logits: Tensor) -> Tensor:
    """Return z_π1 − (z_π3 + z_π4) / 2, by which the targeted DLR is divided, (n,)."""
    ordered = logits.topk(4, dim=1).values
    return ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12


def unit(direction: Tensor, norm: str) -> Tensor:
    """Return ``direction``, (B, C, H, W), at length 1 in L∞ or L2, and 0 as it is."""
    # In L2 scaled twice: the squares of tiny gradients would vanish.
    scaled = direction / direction.abs().amax(_PIXELS, keepdim=True).clamp_min(torch.finfo(direction.dtype).tiny)
    if norm == "linf":
        return scaled
    return scaled / torch.linalg.vector_norm(scaled, dim=_PIXELS, keepdim=True).clamp_min(1)


class _Path(ABC):
    """Where each of n images is on its way, and the best point of its way so far. Tensors are (n, …): ``keep`` drops rows.

    Attributes:
        task: what is right; of a targeted attack ``labels`` are the classes to aim at.
        left: which images these are, (n,).
        origin: the clean images; ``labels`` and ``aims`` are (n,).
        point: where the images are, ``gradient`` the loss's there.
        best: the point of largest loss so far, with ``best_gradient`` and ``best_value``.
    """

    task: Task = CLASSIFICATION

    def __init__(self, left: Tensor, origin: Tensor, labels: Tensor, aims: Tensor, point: Tensor) -> None:
        self.left, self.origin, self.labels, self.aims = left, origin, labels, aims
        self.point = self.best = self.gradient = self.best_gradient = point
        self.best_value = torch.full((len(left),), -torch.inf, device=point.device)

    def keep(self, rest: Tensor) -> None:
        """Go on with these images only, (m,) int64."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rest])

    def settle(self, value: Tensor, gradient: Tensor, *, first: bool) -> None:
        """Take note of the loss and its gradient at the point."""
        self.gradient = gradient
        if first:
            self.best, self.best_value, self.best_gradient = self.point, value, gradient
            return
        better = value > self.best_value
        self.best_value = torch.where(better, value, self.best_value)
        better = per_image(better, gradient)
        self.best = torch.where(better, self.point, self.best)
        self.best_gradient = torch.where(better, gradient, self.best_gradient)

    def restart(self, those: Tensor) -> None:
        """Put the images ``those``, (n,) bool, back to their best points."""
        those = per_image(those, self.point)
        self.point = torch.where(those, self.best, self.point)
        self.gradient = torch.where(those, self.best_gradient, self.gradient)

    @abstractmethod
    def revisions(self, steps: int) -> dict[int, int]:
        """Return the steps after which to revise, each with the number of steps since the one before."""

    @abstractmethod
    def move(self, *, first: bool) -> None:
        """Take one step from the point."""

    @abstractmethod
    def revise(self, length: int) -> None:
        """Adapt the steps after ``length`` more of them."""


class SmoothPath(_Path):
    """In L∞ and L2: steps of 2 eps at first, with momentum, halved where they no longer gain (arXiv:2003.01690, algorithm 1).

    ``start`` is random, on the ball's border (as in the authors' code); in L2 a point is scaled into the ball and then clipped.
    """

    def __init__(
        self, left: Tensor, origin: Tensor, labels: Tensor, aims: Tensor, start: Tensor, norm: str, eps: float
    ) -> None:
        self.norm, self.eps = norm, eps
        super().__init__(left, origin, labels, aims, start)
        self.older = self.point
        self.step = torch.full_like(self.best_value, 2 * eps, dtype=origin.dtype)
        self.reduced = torch.ones_like(left, dtype=torch.bool)
        self.value = self.checked = self.best_value
        self.rises = torch.zeros_like(left)

    def _inside(self, point: Tensor) -> Tensor:
        delta = point - self.origin
        if self.norm == "linf":
            delta.clamp_(-self.eps, self.eps)
        else:
            delta.mul_((self.eps / torch.linalg.vector_norm(delta, dim=_PIXELS, keepdim=True)).clamp_(max=1))
        return delta.add_(self.origin).clamp_(0, 1)

    def move(self, *, first: bool) -> None:
        """Step along the gradient into the set, then a quarter of the way on in the direction of the step before."""
        direction = sign(self.gradient) if self.norm == "linf" else unit(self.gradient, self.norm)
        point = self._inside(direction.mul_(per_image(self.step, direction)).add_(self.point))
        if not first:
            # point + 0.75 (new − point) + 0.25 (point − older)
            point.mul_(_MOMENTUM).add_(self.point, alpha=2 * (1 - _MOMENTUM)).sub_(self.older, alpha=1 - _MOMENTUM)
            point = self._inside(point)
        self.point, self.older = point, self.point

    def settle(self, value: Tensor, gradient: Tensor, *, first: bool) -> None:
        """Take note of the loss and its gradient at the point, and of whether it rose."""
        super().settle(value, gradient, first=first)
        if first:
            self.checked = value
        else:
            self.rises = self.rises + (value > self.value)
        self.value = value

    def revisions(self, steps: int) -> dict[int, int]:
        """Return the checkpoints and the intervals before them."""
        ends = checkpoints(steps)
        return {end: end - start for start, end in zip([0, *ends], ends, strict=False)}

    def revise(self, length: int) -> None:
        """Halve the steps that seldom rise, or that were kept last time and have not gained since, and go on from the best."""
        stuck = self.rises <= RHO * length
        stuck |= ~self.reduced & (self.checked >= self.best_value)
        self.step = torch.where(stuck, self.step / 2, self.step)
        self.restart(stuck)
        self.reduced, self.checked, self.rises = stuck, self.best_value, torch.zeros_like(self.rises)


class SparsePath(_Path):
    """In L1: steps of eps at first, spread over the steepest pixels, as many as the best point suggests (arXiv:2103.01208)."""

    def __init__(self, left: Tensor, origin: Tensor, labels: Tensor, aims: Tensor, point: Tensor, threat: L1) -> None:
        super().__init__(left, origin, labels, aims, threat.project(point, origin))
        self.threat, self.eps = threat, float(threat.eps)
        self.step = torch.full_like(self.best_value, self.eps, dtype=origin.dtype)
        self.used = self._used()

    def _used(self) -> Tensor:
        return (self.best != self.origin).sum(_PIXELS)

    def move(self, *, first: bool) -> None:
        """Step evenly over the steepest pixels, two thirds as many as the best point has changed, and project."""
        count = (2 * self.used + 2) // 3
        slope = self.gradient.abs()
        rank = count.clamp_min(1)[:, None] - 1
        threshold = slope.flatten(1).sort(1, descending=True).values.gather(1, rank)
        step = torch.where(slope < per_image(threshold, slope), 0, sign(self.gradient))
        length = self.step / step.abs().sum(_PIXELS).clamp_min(1)
        self.point = self.threat.project(step.mul_(per_image(length, step)).add_(self.point), self.origin)

    def revisions(self, steps: int) -> dict[int, int]:
        """Return every 4 % of the steps."""
        every = max(steps * 4 // 100, 1)
        return dict.fromkeys(range(every, steps, every), every)

    def revise(self, length: int) -> None:
        """Where the best point has become sparser go on from it with steps of eps; shorten the others, to eps / 10 at least."""
        used = self._used()
        sparser = used / self.used < 0.95
        self.step = torch.where(sparser, self.eps, (self.step / 1.5).clamp_min(self.eps / 10))
        self.restart(sparser)
        self.used = used
