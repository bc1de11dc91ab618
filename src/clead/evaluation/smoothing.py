"""Randomised smoothing: a classifier that votes over Gaussian noise, with an L2 radius within which its answer provably stays."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.progress import progress
from clead.results.record import Estimate
from clead.results.statistics import estimate
from clead.tasks.classification import CLASSIFICATION

ABSTAIN = -1
"""The class of an image about which the smoothed classifier does not decide."""
_BLOCK = 10  # images that are kept together in the state


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CertifiedPoint(_Part):
    """The fraction of images that are right and certified beyond ``radius``, an L2 length over pixels in [0, 1]."""

    radius: float = Field(ge=0)
    certified: Estimate


class Certificates(_Part):
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
    right: list[bool]
    lower: list[float]
    radii: list[float]
    accuracy: Estimate
    abstained: Estimate
    average_radius: float
    curve: list[CertifiedPoint]
    seconds: float


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
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    radii: Sequence[float] | None = None,
    batch_size: int = 1000,
    num_classes: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    state: ResumableResults | None = None,
    show: bool = True,
) -> Certificates:
    """Predict and certify g(x) = argmax_c P(f(x + N(0, σ²I)) = c) (Cohen et al. 2019, arXiv:1902.02918, algorithm CERTIFY).

    Of ``n0`` noisy copies the most frequent class is chosen; of ``n`` others its probability is bounded from below. If the bound
    is above 1/2, no perturbation of an L2 length below σ·Φ⁻¹(bound) changes g's answer, whatever f is; else g abstains. The noise
    is not clipped to [0, 1], as in the paper: f must have been trained with such noise (``data.augment.gaussian``) to be of use.

    Args:
        model: f; takes pixels, returns logits (B, K); left bit-identical.
        images: what to certify; all of them.
        sigma: standard deviation of the noise in pixel units of [0, 1].
        n0: noisy copies that choose the class.
        n: noisy copies that bound its probability; the largest radius that can be certified is σ·Φ⁻¹(alpha^(1/n)).
        alpha: probability, per image, that the certificate is wrong.
        radii: at which certified accuracy is given; None: 0, σ/4, 2σ/4 … up to the largest that can be certified.
        batch_size: noisy copies per forward pass.
        num_classes: K of the data, to be checked against the model's; None: as many as the model has.
        seed: of the noise, which for each image depends on its place only.
        device: where to compute; that of the model's parameters if None.
        state: keeps finished images: a call that was stopped goes on from there; None: nothing is kept.
        show: whether to show progress.

    Raises UserError on values out of range, invalid images, or logits that are not finite.
    """
    _check(sigma, alpha, n0=n0, n=n, batch_size=batch_size)
    largest = radius_of(lower_bound(n, n, alpha), sigma)
    grid = [step * sigma / 4 for step in range(1 + math.floor(4 * largest / sigma))] if radii is None else list(radii)
    if not all(0 <= radius < math.inf for radius in grid):
        raise UserError(f"radii must be finite and at least 0, got {grid}; give radii=[0, {sigma}]")
    model = wrapped(model)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    x, y = _pixels(images.images), images.labels
    k = logits_of(model, x[:1].to(device)).shape[1] if len(x) else 1
    if num_classes is not None and num_classes != k:
        raise UserError(f"the model returns {k} logits, the data has {num_classes} classes; give data of its classes")
    check_inputs(x, y, k)

    def vote(index: int) -> list[int]:
        # The noise is the image's own, whatever was computed before it.
        image, generator = x[index].to(device), make_generator(device, seed, index)
        guess = int(_counts(model, image, n0, sigma, batch_size, k, generator).argmax())
        return [guess, int(_counts(model, image, n, sigma, batch_size, k, generator)[guess])]

    state = state or ResumableResults(None, {})
    predicted, right, lower, radius = [], [], [], []
    with (
        state.opened(),
        exact_float32(),
        progress("certify", len(x), show=show) as tick,
        attack_mode(model),
        torch.no_grad(),
    ):
        for first in range(0, len(x), _BLOCK):
            key, start, votes = f"{first:06d}", time.monotonic(), []
            kept = state.parts[key][0]["votes"].tolist() if key in state.parts else None
            for index in range(first, min(first + _BLOCK, len(x))):
                guess, count = kept[index - first] if kept else vote(index)
                votes.append([guess, count])
                lower.append(lower_bound(count, n, alpha))
                decided = lower[-1] > 0.5
                predicted.append(guess if decided else ABSTAIN)
                radius.append(radius_of(lower[-1], sigma) if decided else 0.0)
                right.append(predicted[-1] == int(y[index]))
                tick(certified_accuracy=sum(right) / len(right))
            if not kept:
                state.save(key, {"votes": torch.tensor(votes)}, {"seconds": time.monotonic() - start})
    # The theorem's ball is open, ‖δ‖₂ < R: a whole closed ball of this radius is certified only below R.
    curve = [
        CertifiedPoint(radius=at, certified=estimate([r and at < R for r, R in zip(right, radius, strict=True)]))
        for at in grid
    ]
    return Certificates(
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        seed=seed,
        images=len(x),
        predicted=predicted,
        right=right,
        lower=lower,
        radii=radius,
        accuracy=estimate(right),
        abstained=estimate([p == ABSTAIN for p in predicted]),
        average_radius=sum(R for r, R in zip(right, radius, strict=True) if r) / len(x),
        curve=curve,
        seconds=sum(data["seconds"] for _, data in state.parts.values()),
    )


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
            (first, second), classes = (part.tolist() for part in counts.topk(min(2, k)))
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


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
