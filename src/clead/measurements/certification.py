"""Randomised smoothing: a classifier that votes over Gaussian noise, with an L2 radius within which its answer provably stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.measurements import MEASUREMENTS
from clead.measurements.base import (
    Computation,
    Measured,
    Measurement,
    MeasurementRecord,
    MeasurementTarget,
    Result,
    cells,
    check_classes,
    new_table,
    plain_settings,
)
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.progress import progress
from clead.results.figure import ESTIMATED, Drawing, draw, estimated, head, new_axes, percent_axis, style
from clead.results.format import percent
from clead.results.record import Estimate, Flags, RecordModel
from clead.results.section import Cell, Plot, Row, Section, Table
from clead.results.statistics import estimate
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

    from clead.config import RunConfig

ABSTAIN = -1
"""The class of an image about which the smoothed classifier does not decide."""
_BLOCK = 10  # images that are kept together in the state


class CertifiedPoint(RecordModel):
    """The fraction of images that are right and certified beyond ``radius``, an L2 length over pixels in [0, 1]."""

    radius: float = Field(ge=0)
    certified: Estimate


class Certificates(Result):
    """What ``certify`` found; lists are per image, in the order of the images.

    ``predicted`` is −1 and ``radii`` 0 where the classifier abstains; ``lower`` bounds from below the probability, over the
    noise, of the predicted class. Each image's certificate fails with probability ≤ ``alpha``. ``average_radius`` is the mean of
    the radii, those of wrong answers counted as 0 (Zhai et al. 2020, arXiv:2001.02378, eq. 8).
    """

    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    images: int
    predicted: list[int]
    right: Flags
    lower: list[float]
    radii: list[float]
    accuracy: Estimate
    abstained: Estimate
    average_radius: float
    curve: list[CertifiedPoint]
    seconds: float

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return certified accuracy at each radius."""
        columns = ("radius", "right and certified", "95 % interval")
        table = new_table(record, f"certified in L2, noise σ {self.sigma:g}", *columns)
        for point in self.curve:
            table.add_row(f"{point.radius:.4g}", *cells(point.certified))
        table.add_row("none: right", *cells(self.accuracy))
        table.add_row("none: abstains", *cells(self.abstained))
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return certified accuracy at whole multiples of σ, and the smoothed model's own accuracy at 0."""
        points = [point for step, point in enumerate(self.curve) if step % 4 == 0]
        radii = ", ".join(f"{point.certified.accuracy:.1%} at L2 radius {point.radius:g}" for point in points)
        return (
            f"{record.about}: smoothed with noise σ {self.sigma:g}, right and certified: {radii or 'none'} "
            f"(n0 {self.n0}, n {self.n}, each certificate fails with probability ≤ {self.alpha:g}); "
            f"abstains on {self.abstained.accuracy:.1%}; average certified radius {self.average_radius:.3f}."
        )

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section:
        """Return one plot and one table of all runs that were certified."""
        results = [(one, cast(Certificates, one.record.result)) for one in measured]
        captions = [
            f"{one.name}: noise σ = {result.sigma:g}, {result.images:,} {one.record.data.split} images, {result.n:,} draws each, "
            f"abstains on {percent(result.abstained.accuracy)}, average certified radius {result.average_radius:.3f}"
            for one, result in results
        ]
        rows: list[list[Cell]] = [
            [
                f"{radius:.4g}",
                *(next((p.certified for p in result.curve if p.radius == radius), None) for _, result in results),
            ]
            for radius in sorted({point.radius for _, result in results for point in result.curve})
        ]
        label = f"Certified accuracy against the L2 radius. {'; '.join(captions)}."
        plot = Plot(_draw(results, label), f"Bands are 95\N{NO-BREAK SPACE}% intervals. {'; '.join(captions)}.")
        table = Table(
            ["radius", *(one.name for one, _ in results)],
            rows,
            caption="Right and certified beyond each L2 radius",
            label="Certified accuracy, numbers",
        )
        alphas = " or ".join(str(alpha) for alpha in sorted({result.alpha for _, result in results}))
        intro = (
            "Randomised smoothing: the answer is a vote over noisy copies of the image. For the images counted at a radius it is "
            "proven, not only tested, that no L2 perturbation up to that radius changes a right answer; each proof fails with "
            f"probability at most {alphas}. This is another classifier than the one attacked above."
        )
        legend = [(one.name, one.index) for one, _ in results]
        return Section("certified", "Certified robustness", 20, intro, [Row([plot], table=table)], legend)


@MEASUREMENTS.register("certify")
@settings
class Certification(Measurement):
    """Certify runs in L2 by randomised smoothing: ``clead certify RUN ... [--sigma 0.25] [--eval.images 500]``.

    The smoothed classifier answers what the model says most often of noisy copies of the image; around each image there is a
    proven L2 radius within which its answer stays (Cohen et al. 2019, arXiv:1902.02918). Train with the same noise,
    ``--data.augment.gaussian``, or the radii are small.
    """

    result: ClassVar = Certificates
    batch_size: ClassVar[int] = 1000

    sigma: float = setting(0.25, "Standard deviation of the noise, in pixel units of [0, 1].")
    n: int = setting(10_000, "Noisy copies per image, which bound the class's probability.")
    n0: int = setting(100, "Noisy copies per image, which choose the class.")
    alpha: float = setting(0.001, "Probability, per image, that the certificate is wrong.")

    def run(self, target: MeasurementTarget, state: ResumableResults) -> Certificates:
        """Certify each image."""
        return certify(target.model, target.images, self, target.computation(state), num_classes=target.num_classes)

    def cautions(self, config: RunConfig) -> list[str]:
        """Say so if the run was trained with other noise."""
        trained = config.data.augment.gaussian
        if trained != self.sigma > 0:
            return [
                f"it was trained with noise σ {trained:g} (data.augment.gaussian), not {self.sigma:g}: expect small radii"
            ]
        return []


def lower_bound(count: int, n: int, alpha: float) -> float:
    """Return the one-sided Clopper–Pearson bound p with P(Binomial(n, p) ≥ count) = alpha (Clopper & Pearson 1934).

    The true probability is above it with probability ≥ 1 − alpha.

    >>> lower_bound(100, 100, 0.001) == 0.001 ** (1 / 100)
    True
    """
    if count == n:  # the closed form, which the root finding meets only to 1e-12
        return alpha ** (1 / n)
    return float(binomtest(count, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low)


def radius_of(p: float, sigma: float) -> float:
    """Return σ·Φ⁻¹(p), within which the class of probability ≥ p > 1/2 stays the most probable; 0 for p ≤ 1/2.

    Source: Cohen et al. 2019, arXiv:1902.02918, theorem 1 with the other classes' probability bounded by 1 − p (section 3.2.2).
    """
    return max(0.0, sigma * float(norm.ppf(p)))


def certify(
    model: nn.Module,
    images: ImageSet,
    settings: Certification,
    how: Computation | None = None,
    *,
    radii: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> Certificates:
    """Predict and certify g(x) = argmax_c P(f(x + N(0, σ²I)) = c) (Cohen et al. 2019, arXiv:1902.02918, algorithm CERTIFY).

    Of ``n0`` noisy copies the most frequent class is chosen; of ``n`` others its probability is bounded from below. If the bound
    is above 1/2, no perturbation of an L2 length below σ·Φ⁻¹(bound) changes g's answer, whatever f is; else g abstains. The noise
    is not clipped to [0, 1], as in the paper: f must have been trained with such noise (``data.augment.gaussian``) to be of use.

    Args:
        model: f; takes pixels, returns logits (B, K); left bit-identical.
        images: what to certify; all of them.
        settings: σ, n0, n and alpha; the largest radius that can be certified is σ·Φ⁻¹(alpha^(1/n)).
        how: noisy copies per forward pass, seed, device; its state has finished images. The noise of an image depends on the seed
            and its place only.
        radii: at which certified accuracy is given; None: 0, σ/4, 2σ/4 … up to the largest that can be certified.
        num_classes: K of the data, to be checked against the model's; None: as many as the model has.

    Raises UserError on values out of range, invalid images, or logits that are not finite.
    """
    how = how or Computation(batch_size=1000)
    sigma, n0, n, alpha = settings.sigma, settings.n0, settings.n, settings.alpha
    _check(sigma, alpha, n0=n0, n=n, batch_size=how.batch_size)
    largest = radius_of(lower_bound(n, n, alpha), sigma)
    grid = [step * sigma / 4 for step in range(1 + math.floor(4 * largest / sigma))] if radii is None else list(radii)
    if not all(0 <= radius < math.inf for radius in grid):
        raise UserError(f"radii must be finite and at least 0, got {grid}; give radii=[0, {sigma}]")
    model = wrapped(model)
    device = how.device_of(model)
    x, y = to_float(images.images), images.labels
    k = logits_of(model, x[:1].to(device)).shape[1] if len(x) else 1
    check_classes(num_classes, k)
    check_inputs(x, y, k)

    def vote(index: int) -> list[int]:
        # The noise is the image's own, whatever was computed before it.
        image, generator = x[index].to(device), make_generator(device, how.seed, index)
        guess = int(_counts(model, image, n0, sigma, how.batch_size, k, generator).argmax())
        return [guess, int(_counts(model, image, n, sigma, how.batch_size, k, generator)[guess])]

    with how.state.opened(), exact_float32(), attack_mode(model), torch.no_grad():
        votes = _votes(y, vote, lambda count: lower_bound(count, n, alpha) > 0.5, how)
    return _certificates(votes, y, grid, settings, seed=how.seed, seconds=how.seconds)


def _certificates(
    votes: list[list[int]],
    labels: Tensor,
    radii: Sequence[float],
    settings: Certification,
    *,
    seed: int,
    seconds: float,
) -> Certificates:
    """Return what the votes certify; ``votes``: class and number of noisy copies that are of it, of each image."""
    lower = [lower_bound(count, settings.n, settings.alpha) for _, count in votes]
    predicted = [guess if bound > 0.5 else ABSTAIN for (guess, _), bound in zip(votes, lower, strict=True)]
    radius = [radius_of(bound, settings.sigma) if bound > 0.5 else 0.0 for bound in lower]
    right = [guess == int(label) for guess, label in zip(predicted, labels, strict=True)]
    # The theorem's ball is open, ‖δ‖₂ < R: a whole closed ball of this radius is certified only below R.
    curve = [
        CertifiedPoint(radius=r, certified=estimate([ok and r < R for ok, R in zip(right, radius, strict=True)]))
        for r in radii
    ]
    return Certificates(
        **plain_settings(settings),
        seed=seed,
        seconds=seconds,
        images=len(votes),
        predicted=predicted,
        right=right,
        lower=lower,
        radii=radius,
        accuracy=estimate(right),
        abstained=estimate([p == ABSTAIN for p in predicted]),
        average_radius=sum(R for r, R in zip(right, radius, strict=True) if r) / len(votes),
        curve=curve,
    )


def _votes(
    labels: Tensor,
    vote: Callable[[int], list[int]],
    decides: Callable[[int], bool],
    how: Computation,
) -> list[list[int]]:
    """Return each image's class and how many noisy copies are of it; what ``how.state`` has already is not computed again."""
    votes: list[list[int]] = []
    right, state = 0, how.state
    with progress("certify", len(labels), show=how.show) as tick:
        for first in range(0, len(labels), _BLOCK):
            key, start = f"{first:06d}", time.monotonic()
            stored = state.parts[key][0]["votes"].tolist() if key in state.parts else None
            for index in range(first, min(first + _BLOCK, len(labels))):
                votes.append(stored[index - first] if stored else vote(index))
                right += votes[-1][0] == int(labels[index]) and decides(votes[-1][1])
                tick(certified_accuracy=right / len(votes))
            if not stored:
                state.save(key, {"votes": torch.tensor(votes[first:])}, {"seconds": time.monotonic() - start})
    return votes


def predict(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Return g(x) or −1 (abstain), (B,): wrong about g with probability ≤ alpha (Cohen et al. 2019, arXiv:1902.02918, PREDICT).

    Of ``n`` noisy copies the two most frequent classes are compared by an exact two-sided binomial test; the answer is given if
    they differ at level ``alpha``.

    Args:
        model: f; takes pixels, returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1], on the model's device.
        sigma: standard deviation of the noise in pixel units of [0, 1].
        n: noisy copies per image.
        alpha: probability that an answer is not the smoothed classifier's.
        batch_size: noisy copies per forward pass.
        seed: of the noise.
    """
    _check(sigma, alpha, n=n, batch_size=batch_size)
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64))
    model = wrapped(model)
    k = logits_of(model, x[:1]).shape[1]
    answers = []
    with exact_float32(), attack_mode(model), torch.no_grad():
        for index, image in enumerate(x):
            counts = _counts(model, image, n, sigma, batch_size, k, make_generator(x.device, seed, index))
            (first, second), classes = (column.tolist() for column in counts.topk(min(2, k)))
            answers.append(classes[0] if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN)
    return torch.tensor(answers, device=x.device)


def _counts(
    model: nn.Module, image: Tensor, n: int, sigma: float, batch_size: int, k: int, generator: torch.Generator
) -> Tensor:
    """Return how often each class is f's answer for ``n`` noisy copies of one image (C, H, W): (K,) int64."""
    counts = torch.zeros(k, dtype=torch.int64, device=image.device)
    for start in range(0, n, batch_size):
        size = (min(batch_size, n - start), *image.shape)
        noise = torch.randn(size, generator=generator, device=image.device, dtype=image.dtype)
        logits = model(image + sigma * noise)
        if not torch.isfinite(logits).all():  # synchronises the device; argmax takes NaN for the largest
            raise UserError(
                "logits must be finite, got NaN or infinity for a noisy image, whose pixels are "
                "not clipped to [0, 1]; look for sqrt, log or division at 0 in the model"
            )
        counts += torch.bincount(CLASSIFICATION.predict(logits), minlength=k)
    return counts


def _check(sigma: float, alpha: float, **counts: int) -> None:
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma must be above 0 and finite, in pixel units of [0, 1], got {sigma}; give --sigma 0.25")
    if not 0 < alpha < 0.5:
        raise UserError(
            f"alpha must be in (0, 0.5), the probability of a wrong certificate, got {alpha}; give --alpha 0.001"
        )
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; give {name}=1 or more")


def _draw(results: Sequence[tuple[Measured, Certificates]], label: str) -> Drawing:
    """Draw the fraction right and certified beyond each radius, with its interval; radii in pixels in [0, 1]."""
    figure, axes = new_axes(390, 270)
    rows = []
    for one, result in results:
        color, marker, dash = style(one.index)
        radii = [point.radius for point in result.curve]
        points = [point.certified for point in result.curve]
        low, high = [e.low for e in points], [e.high for e in points]
        axes.fill_between(radii, low, high, color=color, alpha=0.14, linewidth=0)
        middle = [e.accuracy for e in points]
        axes.plot(radii, middle, color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.8)
        rows += [(one.name, result.sigma, r, *estimated(e)) for r, e in zip(radii, points, strict=True)]
    percent_axis(axes)
    head(axes, "Certified accuracy against the radius", "L2 radius (pixels in [0, 1])")
    columns = ("run", "noise sigma (pixels in [0, 1])", "L2 radius (pixels in [0, 1])", *ESTIMATED)
    return draw(figure, "certified", label, columns, rows, [(one.name, one.index) for one, _ in results])
