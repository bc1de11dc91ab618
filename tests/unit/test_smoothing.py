"""Smoothing against the closed form of a linear classifier, SciPy's beta quantile and slow NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm
from torch import Tensor, nn

from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.measurements.base import Computation
from clead.measurements.certification import (
    ABSTAIN,
    Certificates,
    Certification,
    certify,
    lower_bound,
    predict,
    radius_of,
)
from clead.settings import validated

SIGMA = 0.25


class Halves(nn.Module):
    """Two classes, a plane between them: the smoothed classifier has the same boundary, and p = Φ(distance / σ)."""

    def __init__(self, pixels: int = 9) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.w = nn.Parameter(torch.randn(pixels, generator=torch.Generator().manual_seed(0)))

    def distance(self, x: Tensor) -> Tensor:
        """The signed L2 distance to the boundary, > 0 on the side of class 1."""
        return (x.flatten(1) - 0.5) @ self.w / self.w.norm()

    def forward(self, x: Tensor) -> Tensor:
        z = self.distance(self.drop(x))
        return torch.stack([-z, z], 1)


def made(count: int = 120) -> tuple[Halves, ImageSet, Tensor]:
    """Images at all distances, every sixth with a wrong label; and their distances to the boundary."""
    model = Halves()
    x = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    distance = model.distance(x).detach()
    labels = (distance > 0).long()
    labels[::6] = 1 - labels[::6]
    return model, ImageSet(x, labels), distance


def run(model: nn.Module, images: ImageSet, **values) -> Certificates:
    how = {key: values.pop(key) for key in ("batch_size", "seed") if key in values}
    radii, num_classes = values.pop("radii", None), values.pop("num_classes", None)
    settings = validated(Certification, {"sigma": SIGMA, "n0": 50, "n": 1000, **values})
    computation = Computation(**{"batch_size": 1000, "show": False, **how})
    return certify(model, images, settings, computation, radii=radii, num_classes=num_classes)


def test_radii_are_below_the_distance_and_near_it():
    """R = σ·Φ⁻¹(p) is the distance itself for a linear classifier; a certificate may exceed it with probability alpha only."""
    model, images, distance = made()
    found = run(model, images, n=4000)
    radii, sign = torch.tensor(found.radii), (distance > 0).long()
    assert (radii <= distance.abs()).all()  # 120 chances of 1 in 1000; this seed has none
    decided = torch.tensor(found.predicted) != ABSTAIN
    assert (torch.tensor(found.predicted)[decided] == sign[decided]).all()
    assert distance.abs()[~decided].max() < 0.15 * SIGMA
    inside = distance.abs() < SIGMA  # farther away, the bound is held down by n
    assert (distance.abs() - radii)[inside].max() < 0.2 * SIGMA
    largest = SIGMA * norm.ppf(0.001 ** (1 / 4000))
    assert radii.max() <= largest + 1e-9
    far = distance.abs() > 5 * SIGMA
    assert not far.any() or radii[far] == pytest.approx(largest)


def test_bounds_fail_as_often_as_alpha_says_and_no_more():
    model, images, distance = made(400)
    found = run(model, images, n=100, n0=20, alpha=0.2)
    p = norm.cdf(distance.abs().double().numpy() / SIGMA)
    right = (torch.tensor(found.predicted) == (distance > 0).long()).numpy()
    usual = right & (p < 0.98)  # beyond, a count of n is so probable that the bound cannot fail
    failed = (np.array(found.lower) > p)[usual]
    assert usual.sum() > 150 and failed.mean() < 0.2 + 4 * math.sqrt(0.16 / usual.sum())
    assert failed.mean() > 0.05  # two-sided at alpha, or at alpha / 2, would fail half as often: the bound is tight


def test_coverage_of_the_lower_bound_by_enumeration():
    for n, p in [(1, 0.5), (20, 0.7), (50, 0.95), (50, 0.999)]:
        bounds = np.array([lower_bound(k, n, 0.05) for k in range(n + 1)])
        assert binom.pmf(np.arange(n + 1), n, p)[bounds > p].sum() <= 0.05 + 1e-9
        assert (np.diff(bounds) > 0).all()


@pytest.mark.parametrize(
    ("count", "n"), [(0, 10), (1, 10), (9, 10), (10, 10), (990, 1000), (9999, 10000), (10000, 10000)]
)
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_lower_bound_is_the_one_sided_beta_quantile(count, n, alpha):
    oracle = 0.0 if count == 0 else beta.ppf(alpha, count, n - count + 1)
    assert lower_bound(count, n, alpha) == pytest.approx(oracle, rel=1e-7, abs=1e-12)


def test_figures_of_the_paper():
    """Cohen et al. 2019, section 3.2.2: n = 100,000 and alpha = 0.001 reach 3.8 σ at most."""
    assert radius_of(lower_bound(100_000, 100_000, 0.001), 1.0) == pytest.approx(3.8, abs=0.05)
    assert radius_of(0.5, 1.0) == 0 and radius_of(0.2, 1.0) == 0 and radius_of(0.0, 1.0) == 0
    assert radius_of(norm.cdf(1), 0.3) == pytest.approx(0.3)


class Recorder(nn.Module):
    """Three classes by the mean pixel; keeps every image it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        mean = x.flatten(1).mean(1, keepdim=True)
        return -(mean - torch.tensor([[0.2, 0.5, 0.8]])).abs()


def test_certify_agrees_with_slow_numpy_on_the_same_noise():
    """Algorithm CERTIFY written out, on the noisy images that the model was given; in batches that do not divide n."""
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    model, n0, n, alpha = Recorder(), 30, 70, 0.05
    found = run(model, ImageSet(x, torch.zeros(4, dtype=torch.int64)), n0=n0, n=n, alpha=alpha, batch_size=32)
    seen = torch.cat(model.seen[1:]).numpy()  # the first call asks how many classes there are
    assert len(seen) == 4 * (n0 + n) and seen.min() < 0 and seen.max() > 1
    for i in range(4):
        mine = seen[i * (n0 + n) : (i + 1) * (n0 + n)]
        answers = [int(np.argmin([abs(image.mean() - level) for level in (0.2, 0.5, 0.8)])) for image in mine]
        guess = int(np.argmax(np.bincount(answers[:n0], minlength=3)))
        count = sum(answer == guess for answer in answers[n0:])
        p = beta.ppf(alpha, count, n - count + 1) if count else 0.0
        assert found.lower[i] == pytest.approx(p, rel=1e-7)
        assert found.predicted[i] == (guess if p > 0.5 else ABSTAIN)
        assert found.radii[i] == pytest.approx(SIGMA * norm.ppf(p) if p > 0.5 else 0.0)
        noise = (mine - x[i].numpy()) / SIGMA
        assert abs(noise.mean()) < 5 / math.sqrt(noise.size) and abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.size)


def test_the_curve_counts_what_is_right_and_certified_beyond():
    model, images, _ = made(40)
    found = run(model, images, radii=[0, 0.1, 0.3, 5])
    for point in found.curve:
        flags = [r and point.radius < R for r, R in zip(found.right, found.radii, strict=True)]
        assert point.certified.accuracy == sum(flags) / 40 and point.certified.n == 40
    accuracies = [point.certified.accuracy for point in found.curve]
    assert accuracies[0] == found.accuracy.accuracy and accuracies[-1] == 0 and accuracies == sorted(accuracies)[::-1]
    assert found.average_radius == pytest.approx(np.mean(np.array(found.radii) * np.array(found.right)))
    assert found.abstained.accuracy == np.mean([p == ABSTAIN for p in found.predicted])
    default = run(model, images).curve
    assert default[1].radius == SIGMA / 4 and default[-1].radius <= SIGMA * norm.ppf(0.001 ** (1 / 1000))
    assert Certificates.model_validate_json(found.model_dump_json()) == found


def test_an_image_on_the_boundary_is_abstained_on():
    model = Halves()
    x = torch.full((3, 1, 3, 3), 0.5)
    found = run(model, ImageSet(x, torch.tensor([0, 1, 0])), alpha=1e-6)
    assert found.predicted == [ABSTAIN] * 3 and found.radii == [0.0] * 3 and found.accuracy.accuracy == 0
    assert predict(model, x, sigma=SIGMA, alpha=1e-6).tolist() == [ABSTAIN] * 3


def test_predict_gives_the_class_where_it_is_clear():
    model, images, distance = made()
    answers = predict(model, images.images, sigma=SIGMA)
    clear = distance.abs() > 0.3 * SIGMA
    assert (answers[clear] == (distance > 0).long()[clear]).all()
    assert ((answers == (distance > 0).long()) | (answers == ABSTAIN)).all()


def test_predict_tests_two_sided():
    """5 of 5: p = 2 / 2⁵ = 0.0625 two-sided, above alpha = 0.05; 6 of 6: 0.03125."""
    model = Halves()
    x = 0.5 + 0.4 * model.w.detach().sign().reshape(1, 1, 3, 3)
    assert predict(model, x, sigma=0.01, n=5, alpha=0.05).tolist() == [ABSTAIN]
    assert predict(model, x, sigma=0.01, n=6, alpha=0.05).tolist() == [1]


def test_the_seed_decides_and_the_neighbours_do_not():
    model, images, _ = made(6)
    first, again, other = run(model, images), run(model, images), run(model, images, seed=1)
    assert (first.lower, first.lower == other.lower) == (again.lower, False)
    assert run(model, images.subset(torch.arange(3))).lower == first.lower[:3]


def test_the_model_and_the_global_generator_stay_as_they_were():
    model, images, _ = made(3)
    model.train()
    state, before = torch.get_rng_state(), model.w.clone()
    run(model, images)
    assert model.training and model.drop.training and model.w.requires_grad and torch.equal(model.w, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_bytes_are_pixels():
    model, images, _ = made(5)
    raw = (images.images * 255).round().byte()
    floats = ImageSet(raw.float() / 255, images.labels)
    assert run(model, ImageSet(raw, images.labels)).lower == run(model, floats).lower


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1).amin(1).sqrt(), x.flatten(1).mean(1)], 1)  # NaN below 0: only noise goes there


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": 0}, "sigma must be above 0"),
        ({"sigma": float("nan")}, "sigma: input should be a finite number, got nan"),
        ({"alpha": 0.5}, r"alpha must be in \(0, 0.5\)"),
        ({"alpha": 0}, r"alpha must be in \(0, 0.5\)"),
        ({"n0": 0}, "n0 must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"radii": [-0.1]}, "radii must be finite and at least 0"),
        ({"num_classes": 3}, "the model returns 2 logits, the data has 3 classes"),
        ({"model": Broken()}, "logits must be finite, got NaN"),
        ({"images": ImageSet(torch.zeros(0, 1, 3, 3), torch.zeros(0, dtype=torch.int64))}, "no image"),
        ({"images": ImageSet(torch.full((1, 1, 3, 3), 7.0), torch.tensor([0]))}, r"pixels must be in \[0, 1\]"),
        ({"images": ImageSet(torch.zeros(1, 1, 3, 3), torch.tensor([2]))}, r"labels must be in \[0, 2\), got 2"),
    ],
)
def test_mistakes_are_one_line(values, message):
    model, images, _ = made(3)
    with pytest.raises(UserError, match=message) as error:
        run(**{"model": model, "images": images, **values})
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
