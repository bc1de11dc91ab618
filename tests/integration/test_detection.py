"""Detectors against closed forms and slow NumPy, and the attack that knows them against a linear programme."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.measurements.base import Computation
from clead.measurements.detection import (
    DETECTORS,
    Detection,
    DetectionProtocol,
    Disagreement,
    Mahalanobis,
    NearestNeighbours,
    auroc,
    evaluate_detection,
    fpr_at_tpr,
    threshold_at,
)
from clead.models.split import SplitModel, adapt
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf
from support import generator

PIXELS = 12


def curved(seed: int = 0, classes: int = 3) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, classes))
    return adapt(net, sample_shape=(1, 3, 4)).eval()


def made(count: int, model: nn.Module, seed: int = 0, wrong: int = 7) -> ImageSet:
    """Images with the model's own answers as labels, but for every ``wrong``-th."""
    x = torch.rand(count, 1, 3, 4, generator=generator(seed))
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    labels[::wrong] = logits.argsort(1)[::wrong, 0]
    return ImageSet(x, labels)


@dataclass
class Line:
    """x · v: what it costs to lower it, and whether that can be done at all, is a linear programme."""

    name: ClassVar[str] = "line"
    v: Tensor

    def fit(self, features: Tensor, labels: Tensor) -> None:
        pass

    def score(self, model: SplitModel, x: Tensor, outputs: Any = None) -> Tensor:
        return x.flatten(1) @ self.v.to(x.dtype)


def run(model: Any, reference: ImageSet, images: ImageSet, threat: Any, **values: Any) -> Detection:
    values = {"steps": 20, "restarts": 1, **values}
    keys = [field.name for field in fields(DetectionProtocol)]
    protocol = DetectionProtocol(**{key: values.pop(key) for key in keys if key in values})
    calibration = values.pop("calibration", None)
    how = Computation(**{"batch_size": 20, "show": False, **values})
    return evaluate_detection(model, reference, images, threat, protocol, how, calibration=calibration)


# ----------------------------------------------------------------------------------------------------- detectors


def features(count: int = 40, dim: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % classes
    return torch.randn(count, dim, generator=generator(1), dtype=torch.float64) + labels[:, None], labels


class Given(SplitModel):
    """The image's pixels are the features."""

    def __init__(self, dim: int) -> None:
        super().__init__(2, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.flatten(1)
        return h, torch.stack([h.sum(1), -h.sum(1)], 1)


def test_mahalanobis_agrees_with_slow_numpy():
    h, y = features()
    detector = Mahalanobis(ridge=0.02)
    detector.fit(h, y)
    x = torch.randn(6, 1, 1, 5, generator=generator(2), dtype=torch.float64)
    known, labels = h.numpy(), y.numpy()
    means = [known[labels == c].mean(0) for c in range(3)]
    covariance = sum(np.outer(a - means[c], a - means[c]) for a, c in zip(known, labels, strict=True)) / len(known)
    covariance += 0.02 * np.trace(covariance) / 5 * np.eye(5)
    for image, got in zip(x.flatten(1).numpy(), detector.score(Given(5), x).tolist(), strict=True):
        oracle = min((image - m) @ np.linalg.inv(covariance) @ (image - m) for m in means)
        assert got == pytest.approx(math.sqrt(oracle), rel=1e-9)


def test_mahalanobis_bears_features_that_are_always_zero():
    h, y = features()
    h[:, 2] = 0
    detector = Mahalanobis()
    detector.fit(h.float(), y)
    x = h[:4].float().reshape(4, 1, 1, 5)
    near, far = x.clone(), x.clone()
    far[..., 2] = 1.0  # where no clean image ever was
    model = Given(5)
    assert (detector.score(model, far) > 3 * detector.score(model, near)).all()


def test_nearest_neighbours_agree_with_slow_numpy():
    h, y = features()
    x = torch.randn(6, 1, 1, 5, generator=generator(2), dtype=torch.float64)
    for k in (1, 3, 40):
        detector = NearestNeighbours(k=k)
        detector.fit(h, y)
        units = h.numpy() / np.linalg.norm(h.numpy(), axis=1, keepdims=True)
        for image, got in zip(x.flatten(1).numpy(), detector.score(Given(5), x).tolist(), strict=True):
            z = image / np.linalg.norm(image)
            assert got == pytest.approx(sorted(((units - z) ** 2).sum(1))[k - 1], rel=1e-9)


def test_disagreement_agrees_with_slow_numpy():
    x = torch.rand(3, 2, 4, 5, generator=generator(), dtype=torch.float64)
    model = Given(40)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))

    got = Disagreement(shift=2, noise=0, flip=True).score(model, x)
    for image, value in zip(x.numpy(), got.tolist(), strict=True):
        views = [image[..., ::-1]]
        for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2)):
            rows, columns = np.clip(np.arange(4) + dy, 0, 3), np.clip(np.arange(5) + dx, 0, 4)
            views.append(image[:, rows][:, :, columns])
        assert value == pytest.approx(max(1 - cosine(image, view) for view in views), rel=1e-9)
    noisy = Disagreement(shift=0, noise=0.1, draws=3, seed=4)
    assert torch.equal(noisy.score(model, x), noisy.score(model, x))
    torch.testing.assert_close(noisy.score(model, x[1:2]), noisy.score(model, x)[1:2])  # the same noise for every image
    assert not torch.equal(noisy.score(model, x), Disagreement(shift=0, noise=0.1, draws=3, seed=5).score(model, x))
    one = Disagreement(shift=0, noise=0.1, draws=1, seed=4).score(model, x)
    assert (noisy.score(model, x) >= one).all() and (noisy.score(model, x) > one).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DETECTORS.values(), ids=list(DETECTORS))
def test_scores_have_the_gradient_that_finite_differences_have(kind):
    model = curved().double()
    x = 0.2 + 0.6 * torch.rand(2, 1, 3, 4, generator=generator(3), dtype=torch.float64)
    reference = torch.rand(30, 1, 3, 4, generator=generator(4), dtype=torch.float64)
    detector = kind()
    detector.fit(model.features(reference).detach(), model(reference).argmax(1))
    assert torch.autograd.gradcheck(lambda images: detector.score(model, images), x.requires_grad_())
    outputs = model.features_and_logits(x)
    torch.testing.assert_close(detector.score(model, x, outputs), detector.score(model, x))
    # At a clean image of the reference itself too: an attack may start there.
    start = reference[:3].clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(detector.score(model, start).sum(), start)[0]).all()


@pytest.mark.parametrize("kind", [Mahalanobis, NearestNeighbours])
def test_a_detector_must_be_fitted(kind):
    with pytest.raises(RuntimeError, match="fit the detector before"):
        kind().score(Given(4), torch.zeros(1, 1, 2, 2))


# ------------------------------------------------------------------------------------------------------- metrics

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=30)  # integers: many ties


@settings(deadline=None, max_examples=50)
@given(scores, scores)
def test_auroc_agrees_with_sklearn_and_by_counting(clean, adversarial):
    from sklearn.metrics import roc_auc_score

    a, b = np.array(clean), np.array(adversarial)
    counted = np.mean([(y > x) + (y == x) / 2 for x in a for y in b])
    got = auroc(torch.tensor(a), torch.tensor(b))
    assert got == pytest.approx(counted)
    assert got == pytest.approx(roc_auc_score([0] * len(a) + [1] * len(b), np.concatenate([a, b])))


@settings(deadline=None, max_examples=50)
@given(scores, scores)
def test_fpr_is_that_of_the_best_threshold_that_reaches_the_rate(clean, adversarial):
    """By trying every threshold."""
    a, b = np.array(clean), np.array(adversarial)
    reaching = [t for t in range(-6, 7) if np.mean(b >= t) >= 0.95 - 1e-12]
    assert fpr_at_tpr(torch.tensor(a), torch.tensor(b)) == min(np.mean(a >= t) for t in reaching)


def test_fpr_by_hand():
    clean, adversarial = torch.arange(10.0), torch.arange(20.0) / 2 + 3  # 3, 3.5, … 12.5
    # 19 of 20 score ≥ 3.5, and 6 of 10 clean images do.
    assert fpr_at_tpr(clean, adversarial) == pytest.approx(0.6)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 99))
def test_thresholds_reject_no_more_than_the_rate(n, rate, seed):
    """Of n calibration images and one fresh one, each is as likely to be the fresh one: count all n + 1 cases."""
    values = torch.rand(n + 1, generator=generator(seed), dtype=torch.float64)
    rejected = [values[i].item() > threshold_at(torch.cat([values[:i], values[i + 1 :]]), rate) for i in range(n + 1)]
    assert np.mean(rejected) <= rate + 1e-9
    assert np.mean(rejected) > rate - 1 / (n + 1) - 1e-9  # and no fewer than it must


# --------------------------------------------------------------------------------------------------- the evaluation


@pytest.mark.slow
def test_the_aware_attack_evades_wherever_a_linear_programme_can():
    """Linear model, linear detector: the least score of any misclassified image of the ball is known exactly."""
    w = torch.randn(PIXELS, generator=generator(5))
    v = torch.randn(PIXELS, generator=generator(6)) + 0.5 * w

    class Plane(Given):
        def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = (x.flatten(1) - 0.5) @ w
            return x.flatten(1), torch.stack([-z, z], 1)

    model, eps = Plane(PIXELS), 0.18
    reference, images = made(200, model, 1), made(60, model, 2)
    rates = (0.0, 0.1, 0.3, 0.5)
    found = run(model, reference, images, Linf(eps=eps), detectors=[Line(v)], rates=rates, steps=50)
    curve = found.detectors[0].curve
    x, y = images.images.flatten(1).double().numpy(), images.labels.numpy()
    least = []
    for image, label in zip(x, y, strict=True):
        sign = 1 if label == 1 else -1  # misclassified: sign · w · (x − 0.5) < 0
        bounds = list(zip(np.maximum(image - eps, 0), np.minimum(image + eps, 1), strict=True))
        side = sign * w.double().numpy()
        best = linprog(v.double().numpy(), A_ub=[side], b_ub=[side.sum() * 0.5 - 1e-4], bounds=bounds)
        least.append(best.fun if best.status == 0 else math.inf)
    gained = []
    for point in curve:
        limit = math.inf if point.threshold is None else point.threshold
        possible = np.mean([value <= limit and math.isfinite(value) for value in least])
        assert 1 - point.aware.accuracy <= possible + 1e-9
        assert 1 - point.aware.accuracy >= possible - 1.5 / 60, point  # at most one image missed
        gained.append(point.oblivious.accuracy - point.aware.accuracy)
    assert max(gained) > 0.2, "the detector should have looked good until it was attacked"
    assert curve[0].threshold is None and curve[0].aware == curve[0].oblivious
    assert 0.05 < curve[-1].aware.accuracy < 0.98


@dataclass
class Watermark:
    """The largest mark in the last pixel, 0 on every clean image: only adversarial images carry it."""

    name: ClassVar[str] = "watermark"

    def fit(self, features: Tensor, labels: Tensor) -> None:
        pass

    def score(self, model: SplitModel, x: Tensor, outputs: Any = None) -> Tensor:
        return x[:, 0, 0, 1:].abs().sum(1)


class FirstPixel(Given):
    """Bright or dark, by the first pixel less what the mark says: without the mark there is no way to err inside the ball."""

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.flatten(1)
        z = h[:, 0] - 0.5 - 4 * h[:, 1]
        return h, torch.stack([-z, z], 1)


def test_a_perfect_detector_is_found_perfect():
    """Every misclassified image of the ball carries the mark: nothing evades, with or without knowing."""
    bright = torch.linspace(0.75, 1, 40).reshape(-1, 1, 1, 1)
    x = torch.cat([bright, torch.zeros_like(bright)], 3)
    images = ImageSet(x, torch.ones(40, dtype=torch.int64))
    both = ImageSet(torch.cat([x, x * 0]), torch.cat([images.labels, torch.zeros(40, dtype=torch.int64)]))
    found = run(FirstPixel(2), both, images, Linf(eps=0.15), detectors=[Watermark()], rates=(0, 0.05, 0.2))
    part = found.detectors[0]
    assert found.clean.accuracy == 1 and found.robust.accuracy < 0.6
    for attack in part.attacks:
        assert attack.n >= 16 and attack.auroc == 1 and attack.fpr95 == 0
    nothing, *others = part.curve
    assert nothing.aware == found.robust
    for point in others:
        assert point.threshold == 0 and point.clean_rejected.accuracy == 0 and point.accepted_accuracy.accuracy == 1
        assert point.oblivious.accuracy == 1 and point.aware.accuracy == 1


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(eps=0.15), L2(eps=0.4), L1(eps=1.0)])
def test_what_must_hold_of_every_curve(threat):
    model = curved()
    reference, images = made(120, model, 1), made(30, model, 2)
    found = run(model, reference, images, threat, rates=(0, 0.1, 0.4), steps=8)
    assert [part.name for part in found.detectors] == list(DETECTORS)
    assert found.fitted + found.calibrated == 120 and found.images == 30
    gained = 0.0
    for part in found.detectors:
        assert [attack.name for attack in part.attacks] == ["PGD-8 cross_entropy", "PGD-8 margin", "aware"]
        assert part.curve[0].oblivious == found.robust and part.curve[0].clean_rejected.accuracy == 0
        assert part.curve[0].accepted_accuracy == found.clean
        for point in part.curve:
            assert point.aware.accuracy <= point.oblivious.accuracy
            gained += point.oblivious.accuracy - point.aware.accuracy
        for name in ("oblivious", "aware", "clean_rejected"):
            values = [getattr(point, name).accuracy for point in part.curve]
            assert values == sorted(values), (part.name, name)
        thresholds = [point.threshold for point in part.curve[1:]]
        assert thresholds == sorted(thresholds, reverse=True)
        aware, plain = part.attacks[-1], part.attacks[0]
        assert aware.n >= plain.n and aware.auroc <= plain.auroc
    assert gained > 0.1
    assert Detection.model_validate_json(found.model_dump_json()) == found


def test_an_image_wrong_when_clean_is_lost_where_it_is_accepted():
    model = curved()
    reference, images = made(120, model, 1), made(50, model, 2)
    found = run(model, reference, images, Linf(eps=0), rates=(0, 0.2, 0.5), detectors=[Mahalanobis()])
    wrong = model(images.images).argmax(1) != images.labels
    detector = Mahalanobis()
    from clead.data.base import stratified

    half = reference.subset(stratified(reference.labels, 60, 0)[0])
    detector.fit(model.features(half.images).detach(), half.labels)
    values = detector.score(model, images.images).detach()
    for point in found.detectors[0].curve:
        accepted = values <= (math.inf if point.threshold is None else point.threshold)
        expected = 1 - (wrong & accepted).double().mean().item()
        assert point.oblivious.accuracy == point.aware.accuracy == pytest.approx(expected)
        assert point.clean_rejected.accuracy == pytest.approx((~accepted).double().mean().item())
        assert point.accepted_accuracy.accuracy == pytest.approx((~wrong[accepted]).double().mean().item())
    assert [attack.n for attack in found.detectors[0].attacks] == [0, 0, 0]
    assert all(attack.auroc is None and attack.fpr95 is None for attack in found.detectors[0].attacks)


def test_calibration_images_set_the_thresholds():
    model = curved()
    reference, images, others = made(60, model, 1), made(10, model, 2), made(99, model, 3)
    found = run(
        model, reference, images, Linf(eps=0.1), calibration=others, detectors=[Line(torch.ones(PIXELS))], rates=[0.25]
    )
    oracle = others.images.flatten(1).sum(1).sort().values[74]
    assert found.detectors[0].curve[0].threshold == pytest.approx(oracle.item())
    assert (found.fitted, found.calibrated) == (60, 99)


def test_more_restarts_and_the_seed_matter_and_nothing_else_does():
    model = curved()
    model.train()
    reference, images = made(60, model.eval(), 1), made(8, model, 2)
    model.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attacks = [("PGD", PGD(steps=3, keep="best"), "margin")]

    def once(**values: Any) -> Any:
        parts = run(
            model, reference, images, Linf(eps=0.1), attacks=attacks, steps=3, rates=(0, 0.2), **values
        ).detectors
        return [part.model_dump() for part in parts]

    first = once()
    assert once() == first and once(seed=1) != first
    more = once(restarts=2)
    for a, b in zip(first, more, strict=True):
        assert [p["aware"]["accuracy"] for p in b["curve"]] <= [p["aware"]["accuracy"] for p in a["curve"]]
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_score_that_is_not_a_number_is_not_a_rejection():
    """A detector that breaks on adversarial images must not look as if it had caught them."""

    @dataclass
    class Breaks:
        name: ClassVar[str] = "breaks"

        def fit(self, features: Tensor, labels: Tensor) -> None:
            pass

        def score(self, model: SplitModel, x: Tensor, outputs: Any = None) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.where(model(x).argmax(1) == 2, torch.nan, mean)

    model = curved()
    x = torch.rand(400, 1, 3, 4, generator=generator(1))
    answers = model(x).argmax(1)
    x, answers = x[answers != 2], answers[answers != 2]
    images = ImageSet(x[:30], answers[:30])
    reference = ImageSet(x[:30], torch.arange(30) % 3)  # of every class, as it must be
    found = run(model, reference, images, Linf(eps=0.6), detectors=[Breaks()], rates=(0, 0.5), calibration=images)
    broken = [attack for attack in found.detectors[0].attacks if attack.n][0]
    assert broken.auroc < 0.5 and found.detectors[0].curve[-1].oblivious.accuracy < 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3))},
            r"split into features and classifier.*clead.adapt",
        ),
        ({"rates": ()}, "rates must be one or more"),
        ({"rates": (0.1, 1.0)}, r"in \[0, 1\), got \[0.1, 1.0\]"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"detectors": [NearestNeighbours(k=50)]}, "at least k = 50 reference images, got 30"),
        ({"images": ImageSet(torch.zeros(0, 1, 3, 4), torch.zeros(0, dtype=torch.int64))}, "no image"),
        ({"images": ImageSet(torch.zeros(1, 1, 3, 4), torch.tensor([3]))}, r"labels must be in \[0, 3\), got 3"),
        ({"reference": ImageSet(torch.rand(30, 1, 3, 4), torch.zeros(30, dtype=torch.int64))}, "got none of class 1"),
    ],
)
def test_mistakes_are_one_line(values, message):
    model = curved()
    given = {"model": model, "reference": made(60, model, 1), "images": made(5, model, 2), "threat": Linf(eps=0.1)}
    with pytest.raises(UserError, match=message) as error:
        run(**{**given, **values})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mahalanobis(ridge=0), "ridge must be above 0"),
        (lambda: NearestNeighbours(k=0), "k must be at least 1, got 0"),
        (lambda: Disagreement(shift=-1), "at least 0, got -1"),
        (lambda: Disagreement(shift=0, draws=0), "at least one change is needed"),
        (lambda: Mahalanobis().fit(torch.ones(4, 2), torch.zeros(4).long()), "all equal"),
    ],
)
def test_settings_of_detectors_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()
