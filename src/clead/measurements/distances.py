"""How far each image is from a wrong answer: one run of a minimum-norm attack gives robust accuracy at every radius.

Every distance is verified: the adversarial image is classified again by the plain model in float32, and measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from clead.attacks import ATTACKS
from clead.attacks.capabilities import capabilities, check_norm
from clead.attacks.runner import check_finite, check_inputs, finite_images, logits_of, run_attack
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, MinimumNorm
from clead.measurements import MEASUREMENTS
from clead.measurements.base import (
    Computation,
    Measurement,
    MeasurementRecord,
    MeasurementTarget,
    Result,
    new_table,
    plain_settings,
)
from clead.models.split import wrapped
from clead.progress import Tick, progress
from clead.results.record import CurvePoint, Estimate, RecordModel
from clead.results.section import DistanceCurves
from clead.results.statistics import estimate
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

_STRETCHES = (0.0, 1e-4, 1e-3, 1e-2)


class Distances(RecordModel):
    """One attack's verified distance of each image: 0 where it is wrong when clean, None where nothing was found.

    ``median`` is the radius at which half of the images are broken; None if fewer are.
    """

    attack: str
    settings: dict[str, Any]
    n: int = Field(ge=1)
    found: int = Field(ge=0)
    median: float | None
    distances: list[float | None]
    seconds: float


class MinimumNormResult(Result):
    """The distance of each image, the smallest over the attacks, and robust accuracy against the radius.

    ``curve`` holds at most 200 points of the exact step function, the first at radius 0 (clean accuracy), the last at the
    largest distance found.
    """

    norm: str
    seed: int
    n: int = Field(ge=1)
    clean: Estimate
    attacks: list[Distances]
    median: float | None
    distances: list[float | None]
    curve: list[CurvePoint]

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return the median distance of each attack, and accuracy at some radii."""
        radii = _radii(record)
        names = [f"right at {radius:.4g}" for radius in radii]
        table = new_table(record, f"distances in {self.norm}", "attack", "median", *names, "seconds")
        for one in self.attacks:
            shown = [_right_at(one.distances, radius) for radius in radii]
            table.add_row(one.attack, _length(one.median), *shown, f"{one.seconds:.1f}")
        shown = [_right_at(self.distances, radius) for radius in radii]
        table.add_row("nearest of all", _length(self.median), *shown, f"{record.seconds:.1f}", style="bold")
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return the median distance, and accuracy at some radii."""
        right = ", ".join(f"{_right_at(self.distances, radius)} at radius {radius:.4g}" for radius in _radii(record))
        half = "fewer than half fall at any distance" if self.median is None else f"half fall within {self.median:.4g}"
        return (
            f"{record.about}: {half} of {self.norm} (median distance) under "
            f"{' and '.join(one.attack for one in self.attacks)}; right: {right}."
        )

    def distance_curves(self) -> DistanceCurves:
        """Return the distances by attack, and the nearest of all if there are several attacks."""
        attacks = {one.attack: one.distances for one in self.attacks}
        if len(attacks) > 1:
            attacks["nearest of " + " and ".join(attacks)] = self.distances
        return DistanceCurves(self.norm, [point.eps for point in self.curve], attacks)


@MEASUREMENTS.register("distances")
@settings
class MinimumNormDistances(Measurement):
    """Find how far wrong answers are, robust accuracy at every eps: ``clead distances RUN ... [--attacks fmn,deepfool]``.

    The norm is that of the threat. ``--eval.steps`` replaces each attack's own number of steps.
    """

    result: ClassVar = MinimumNormResult
    keys: ClassVar = ("threat", "eval.steps", "eval.batch_size")

    attacks: tuple[str, ...] = setting(("fmn",), "Which, with commas: fmn, deepfool, fab, cw.")

    def run(self, target: MeasurementTarget, state: ResumableResults) -> MinimumNormResult:
        """Run each attack on each image."""
        return evaluate_minimum_norm(
            target.model,
            target.images,
            target.threat.norm,
            self.attacks,
            target.computation(state),
            steps=target.steps,
            classes=target.num_classes,
        )


def distances(
    attack: MinimumNorm,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the size of the smallest perturbation that ``attack`` finds, verified on ``model`` itself, (B,) float32.

    The attack stops just past the boundary, where rounding decides. A point that the model, asked again, gets right is moved
    on from the image by 0.01 %, 0.1 % or 1 %, and its longer distance counts.

    Args:
        attack: such as ``FMN()``.
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        images: (B, C, H, W) float in [0, 1], computed with in float32.
        labels: (B,) int64 in [0, K).
        norm: one of the attack's norms.
        generator: of the attack, on the device of ``images``; a fixed seed if None.

    Returns:
        0 for images that are misclassified when clean, infinity where no adversarial image was found. Raises UserError on
        wrong shapes, ranges or norms.
    """
    check_inputs(images, labels)
    x, measure = images.float(), THREATS.get(norm)(eps=0).distance
    logits = logits_of(model, x)
    check_inputs(x, labels, logits.shape[1])
    right = CLASSIFICATION.correct(logits, labels).nonzero()[:, 0]  # synchronises the device
    out = torch.zeros(len(x), device=x.device)
    if not len(right):
        return out
    x, y = x[right], labels[right]
    x_adv = run_attack(attack, model, x, y, norm, generator=generator, checked=True)
    size = torch.full((len(x),), torch.inf, device=x.device)
    for stretch in _STRETCHES:
        left = size.isinf()
        candidate = (x + (1 + stretch) * (x_adv - x)).clamp(0, 1) if stretch else x_adv
        moved = measure(candidate - x)
        size = torch.where(left & ~CLASSIFICATION.correct(logits_of(model, candidate), y), moved, size)
    # Where the gradient is not finite nothing is known: the image counts as broken by the smallest change there is.
    out[right] = torch.where(finite_images(x_adv), size, torch.finfo(size.dtype).tiny)
    check_finite(x_adv, type(attack).__name__)
    return out


def curve(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return radii, rising from 0, and the robust accuracy at each: the fraction of images farther away than the radius.

    Exact at every radius between two of the returned ones too: there it stays what it was at the lower. It falls by
    construction, unlike a curve of attacks that are run once per radius.

    >>> curve(torch.tensor([0.0, 0.3, 0.1, torch.inf]))
    (tensor([0.0000, 0.1000, 0.3000]), tensor([0.7500, 0.5000, 0.2500]))
    """
    if not len(distances) or distances.isnan().any() or (distances < 0).any():
        raise UserError(
            f"distances must be ≥ 0 and at least one, got {distances.tolist()[:5]}; "
            "give the norms of the perturbations, torch.inf where none was found"
        )
    ordered = distances.sort().values
    radii = torch.cat([ordered.new_zeros(1), ordered[ordered.isfinite()]]).unique()
    broken = torch.searchsorted(ordered, radii, right=True)
    return radii, 1 - broken / len(distances)


def evaluate_minimum_norm(
    model: nn.Module,
    images: ImageSet,
    norm: str,
    attacks: Sequence[str | MinimumNorm] = ("fmn",),
    how: Computation | None = None,
    *,
    steps: int | None = None,
    classes: int | None = None,
) -> MinimumNormResult:
    """Run minimum-norm attacks on ``images`` and return each image's distance, the smallest over the attacks, and the curve.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        images: uint8 images and labels; all of them.
        norm: linf, l2, l1 or l0.
        attacks: names such as ``"fmn"`` with their default settings, or objects.
        how: batch size, seed, device, saved state.
        steps: instead of each attack's own.
        classes: K, to check the labels by; the number of logits if None.

    Raises UserError for a name of no minimum-norm attack, an attack not made for this norm, or invalid images.
    """
    how = how or Computation()
    if not len(images) or not attacks:
        raise UserError(
            f"need at least one image and one attack, got {len(images)} and {len(attacks)}; give attacks=['fab']"
        )
    chosen = [_attack(attack, norm) for attack in attacks]
    if len({name for name, _ in chosen}) < len(chosen):
        raise UserError(
            f"each attack may be named once, got {', '.join(name for name, _ in chosen)}; take out the repeated"
        )
    if steps is not None:
        chosen = [(name, replace(cast(Any, attack), steps=steps)) for name, attack in chosen]
    model = wrapped(model)
    device = how.device_of(model)
    results, sizes = [], []
    title = f"minimum {norm} of {len(images)} images"
    with how.state.opened(), exact_float32(), progress(title, len(images) * len(chosen), show=how.show) as tick:
        for number, (name, attack) in enumerate(chosen):

            def search(batch: int, x: Tensor, y: Tensor, number: int = number, attack: MinimumNorm = attack) -> Tensor:
                x, y = to_float(x.to(device)), y.to(device)
                check_inputs(x, y, classes)
                generator = make_generator(device, how.seed, number, batch)
                return distances(attack, model, x, y, norm, generator=generator)

            size, seconds = _in_batches(images, search, how, f"{number:02d}", partial(tick, attack=name))
            sizes.append(size)
            results.append(
                Distances(
                    attack=name,
                    settings=plain_settings(attack),
                    n=len(images),
                    found=int(size.isfinite().sum()),
                    median=_median(size),
                    distances=_finite(size),
                    seconds=seconds,
                )
            )
    nearest = torch.stack(sizes).amin(0)
    return MinimumNormResult(
        norm=norm,
        seed=how.seed,
        n=len(images),
        clean=estimate((nearest > 0).tolist()),
        attacks=results,
        median=_median(nearest),
        distances=_finite(nearest),
        curve=_points(nearest, "+".join(name for name, _ in chosen)),
    )


def _in_batches(
    images: ImageSet, search: Callable[[int, Tensor, Tensor], Tensor], how: Computation, prefix: str, tick: Tick
) -> tuple[Tensor, float]:
    """Return the distance of each image under one attack, and the seconds that took; finished batches are in ``how.state``."""
    keys, state = [], how.state
    for batch, first in enumerate(range(0, len(images), how.batch_size)):
        some = images.subset(torch.arange(first, min(first + how.batch_size, len(images))))
        keys.append(f"{prefix}-{batch:06d}")
        if keys[-1] not in state.parts:
            start = time.monotonic()
            size = search(batch, some.images, some.labels)
            state.save(keys[-1], {"distances": size}, {"seconds": time.monotonic() - start})
        tick(len(some))
    size = torch.cat([state.parts[key][0]["distances"] for key in keys])
    return size, sum(state.parts[key][1]["seconds"] for key in keys)


def _attack(attack: str | MinimumNorm, norm: str) -> tuple[str, MinimumNorm]:
    """Return the attack under its name, checked before any work is done."""
    known = {name: kind for name, kind in ATTACKS.items() if capabilities(kind).minimum_norm}
    if isinstance(attack, str):
        if attack not in known:
            ATTACKS.get(attack)
            raise UserError(f"{attack} needs a radius; take one for the smallest perturbation: {', '.join(known)}")
        attack = known[attack]()
    check_norm(attack, norm)
    return next((name for name, kind in known.items() if kind is type(attack)), type(attack).__name__), attack


def _median(sizes: Tensor) -> float | None:
    """Return the smallest radius that breaks at least half of the images, None if none does."""
    median = sizes.median().item()  # of an even number the lower
    return median if median < torch.inf else None


def _finite(sizes: Tensor) -> list[float | None]:
    return [size if size < torch.inf else None for size in sizes.tolist()]


def _points(nearest: Tensor, attack: str, most: int = 200) -> list[CurvePoint]:
    radii, _ = curve(nearest)
    index = torch.linspace(0, len(radii) - 1, min(most, len(radii))).round().long()
    return [
        CurvePoint(eps=radius, eps_text=f"{radius:.4g}", attack=attack, robust=estimate((nearest > radius).tolist()))
        for radius in radii[index].tolist()
    ]


def _radii(record: MeasurementRecord) -> list[float]:
    """Return the radii that are printed: 0 and around the threat's eps."""
    eps = 0.0 if record.threat is None else record.threat.eps
    return sorted({0.0, *(eps * factor for factor in (0.5, 1, 2))})


def _right_at(distances: list[float | None], radius: float) -> str:
    return f"{sum(d is None or d > radius for d in distances) / len(distances):.1%}"


def _length(distance: float | None) -> str:
    return "–" if distance is None else f"{distance:.4g}"
