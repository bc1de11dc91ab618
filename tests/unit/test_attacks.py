"""FGSM and PGD against the closed form of a linear model, their options, and the user's mistakes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES, fgsm, pgd
from clead.attacks.fgsm import FGSM
from clead.attacks.gradient import value_and_gradient
from clead.attacks.pgd import PGD
from clead.attacks.runner import check_inputs, run_attack
from clead.errors import UserError
from clead.models.modes import attack_mode
from clead.models.split import adapt
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf
from support import Returns, generator


def linear(pixels: int = 16, classes: int = 2, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator(seed))
    return model


def curved(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def images(count: int = 6, low: float = 0.0, high: float = 1.0, classes: int = 2) -> tuple[Tensor, Tensor]:
    x = low + (high - low) * torch.rand(count, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    return x, torch.arange(count) % classes


def best_gain(w: np.ndarray, x: np.ndarray, eps: float, norm: str) -> float:
    """max w·δ over ‖δ‖ ≤ eps, 0 ≤ x + δ ≤ 1, without gradients: per pixel, greedy, or by bisection on the multiplier."""
    room = np.where(w > 0, 1 - x, x)
    slope = np.abs(w)
    if norm == "linf":
        return float((slope * np.minimum(room, eps)).sum())
    if norm == "l1":
        gain, left = 0.0, eps
        for k in np.argsort(-slope):
            used = min(left, room[k])
            gain, left = gain + slope[k] * used, left - used
        return gain
    low, high = 0.0, 1e6
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.linalg.norm(np.minimum(c * slope, room)) <= eps else (low, c)
    return float((slope * np.minimum(low * slope, room)).sum())


def gains(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float, norm: str) -> list[tuple[float, float]]:
    """(gain of the attack, best possible gain) of the margin, which is linear for two classes."""
    weight = model[1].weight.detach()
    out = []
    for i in range(len(x)):
        w = (weight[1 - y[i]] - weight[y[i]]).numpy()
        gain = float(((x_adv - x)[i].flatten().numpy() * w).sum())
        out.append((gain, best_gain(w, x[i].flatten().numpy(), eps, norm)))
    return out


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("linf", 0.6), ("l2", 0.3), ("l1", 0.3)])
@pytest.mark.parametrize("objective", ["margin", "cross_entropy", "kl", "dlr"])
def test_fgsm_reaches_the_optimum_of_a_linear_model(norm, eps, objective):
    """Exactly, wherever one steepest step is the optimum: L∞ with any box, the others in the box's inside."""
    model = linear()
    x, y = images() if norm == "linf" else images(low=0.4, high=0.6)
    if objective == "dlr":  # a third class that no pixel moves and that is always last
        two, model = model, nn.Sequential(nn.Flatten(), nn.Linear(16, 3).double())
        with torch.no_grad():
            model[1].weight.zero_()[:2] = two[1].weight
            model[1].bias[:2], model[1].bias[2] = two[1].bias, -1e6
    if objective == "kl":
        # The gradient of a KL is 0 at the image itself, so a random start is needed: where it leads is not known.
        x_adv = fgsm(model, x, y, eps=eps, norm=norm, objective="kl", random_start=True)
        assert (x_adv - x).abs().max() > eps / 20
        return
    x_adv = fgsm(model, x, y, eps=eps, norm=norm, objective=objective)
    for gain, best in gains(model, x, x_adv, y, eps, norm):
        assert gain == pytest.approx(best, rel=1e-4 if objective == "dlr" else 1e-9)  # its denominator moves too


@pytest.mark.parametrize(
    ("norm", "eps", "within"),
    [
        ("linf", 0.05, 1e-9),
        ("linf", 0.6, 1e-9),
        ("l2", 0.3, 1e-6),
        ("l2", 1.5, 1e-6),
        ("l1", 0.3, 1e-6),
    ],
)
@pytest.mark.parametrize("objective", ["margin", "cross_entropy"])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm, eps, within, objective):
    model, (x, y) = linear(), images()
    x_adv = pgd(model, x, y, eps=eps, norm=norm, steps=200, step_size=eps / 10, objective=objective)
    for gain, best in gains(model, x, x_adv, y, eps, norm):
        assert best * (1 - within) - 1e-9 <= gain <= best * (1 + 1e-9) + 1e-9


def test_l1_pgd_comes_near_the_optimum_in_the_box():
    """Only near, and only with a sparsity that suits the image: a fixed fraction of the pixels is moved at every step."""
    model, (x, y) = linear(), images()
    attack = PGD(steps=100, step_size=0.25, keep="best")
    x_adv = run_attack(attack, model, x, y, L1(eps=2.5, sparsity=0.2), objective="margin")
    for gain, best in gains(model, x, x_adv, y, 2.5, "l1"):
        assert 0.98 * best <= gain <= best * (1 + 1e-9)


def value(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_more_effort_is_never_worse(norm):
    """keep=best returns the largest objective of the path, so a longer path and more starts can only gain."""
    model, (x, y) = curved(), images(classes=4)
    common = {"eps": 0.5, "norm": norm, "step_size": 0.3}
    few = pgd(model, x, y, steps=2, **common)
    more = pgd(model, x, y, steps=7, **common)
    again = pgd(model, x, y, steps=7, restarts=4, **common)
    last = pgd(model, x, y, steps=7, keep="last", **common)
    assert (value(model, more, y) >= value(model, few, y)).all()
    assert (value(model, again, y) >= value(model, more, y)).all()
    assert (value(model, more, y) >= value(model, last, y)).all()


@pytest.mark.parametrize(("given", "first"), [(None, 0.5), (0.2, 0.2)])
def test_falling_steps_are_those_of_the_formula(given, first):
    """Step t of n is step_size · (1 - t / n), by default from eps; on a slope nothing else moves the image."""
    places: list[Tensor] = []

    def slope(x_adv: Tensor) -> Tensor:
        places.append(x_adv.detach().clone())
        return x_adv.flatten(1).sum(1)

    attack = PGD(steps=4, step_size=given, step_schedule="linear", random_start=False)
    x = torch.full((1, 1, 2, 2), 0.1)
    last = attack(slope, x, Linf(eps=0.5))
    moved = [place.mean().item() - 0.1 for place in [*places, last]]
    sizes = [first * (1 - step / 4) for step in range(4)]
    assert moved == pytest.approx([min(sum(sizes[:step]), 0.5) for step in range(5)], abs=1e-6)


def test_keep_best_is_the_maximum_over_the_whole_path():
    """Start included; recorded by the objective itself."""
    model, (x, y) = curved(), images(classes=4)
    path: list[tuple[Tensor, Tensor]] = []

    def objective(x_adv: Tensor) -> Tensor:
        result = nn.functional.cross_entropy(model(x_adv), y, reduction="none")
        path.append((x_adv.detach().clone(), result.detach()))
        return result

    attack = PGD(steps=5, restarts=3, step_size=0.4, keep="best")
    x_adv = attack(objective, x, Linf(eps=0.5), generator=generator())
    points, values = torch.stack([p for p, _ in path]), torch.stack([v for _, v in path])
    assert len(path) == 3 * (5 + 1)
    best = points[values.argmax(0), torch.arange(len(x))]
    assert torch.equal(x_adv, best)


def test_restarts_with_keep_last_choose_among_last_points():
    model, (x, y) = curved(), images(classes=4)
    ends = [pgd(model, x, y, eps=0.3, steps=3, restarts=n, keep="last") for n in (1, 2, 5)]
    first, second, fifth = (value(model, end, y) for end in ends)
    assert (second >= first).all() and (fifth >= second).all()


def test_pgd_is_its_own_recurrence():
    """Written again without the package's loop: the L∞ step of Madry et al."""
    model, (x, y) = curved(), images(classes=4)
    eps, steps = 8 / 255, 4
    x_adv = pgd(model, x, y, eps="8/255", steps=steps, keep="last", random_start=False)
    point = x.clone()
    for _ in range(steps):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), y, reduction="sum"), point)
        point = point.detach() + 2.5 * eps / steps * gradient.sign()
        point = (x + (point - x).clamp(-eps, eps)).clamp(0, 1)
    torch.testing.assert_close(x_adv, point, atol=1e-15, rtol=0)


def test_random_start_of_fast_adversarial_training():
    """Wong et al. 2020, algorithm 3: uniform start, step 1.25 eps, back to the ball."""
    model, (x, y) = curved(), images(classes=4)
    start = Linf(eps=0.1).random_start(x, generator=generator(7))
    point = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), y, reduction="sum"), point)
    expected = (x + (start + 0.125 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    actual = fgsm(model, x, y, eps=0.1, random_start=True, seed=7)
    torch.testing.assert_close(actual, expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (pgd, {"steps": 3}),
        (pgd, {"step_size": "4/255"}),
        (pgd, {"restarts": 3}),
        (pgd, {"random_start": False}),
        (pgd, {"keep": "last"}),
        (pgd, {"seed": 1}),
        (pgd, {"norm": "l2"}),
        (pgd, {"objective": "margin"}),
        (pgd, {"eps": 0.2}),
        (fgsm, {"random_start": True}),
        (fgsm, {"step_size": 0.5}),
        (fgsm, {"norm": "l1"}),
        (fgsm, {"objective": "margin"}),
        (fgsm, {"eps": 0.2}),
    ],
)
def test_every_option_changes_the_result(function, change):
    model, (x, y) = curved(), images(16, classes=4)
    base = {"eps": 0.6, "steps": 5, "step_size": 0.5} if function is pgd else {"eps": 0.1}
    assert not torch.equal(function(model, x, y, **base), function(model, x, y, **{**base, **change}))


def test_value_and_gradient_of_a_quadratic():
    x = torch.rand(3, 1, 2, 2, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        at, gradient = value_and_gradient(lambda z: z.square().flatten(1).sum(1), x)
    torch.testing.assert_close(gradient, 2 * x)
    torch.testing.assert_close(at, x.square().flatten(1).sum(1))
    assert not (at.requires_grad or gradient.requires_grad or x.requires_grad)


def test_objectives_have_the_values_they_name():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model = adapt(net, sample_shape=(1, 4, 4))
    x, y = images(classes=4)
    other = (x + 0.3 * torch.sin(50 * x)).clamp(0, 1)
    with attack_mode(model):
        values = {name: make(model, x, y)(other).detach() for name, make in OBJECTIVES.items()}
        zeros = {name: OBJECTIVES.get(name)(model, x, y)(x).detach() for name in ("kl", "embedding")}
    with torch.no_grad():
        z, z0 = model(other), model(x)
        h, h0 = model.features(other), model.features(x)
    p0 = z0.softmax(1)
    torch.testing.assert_close(values["cross_entropy"], -z.log_softmax(1)[torch.arange(6), y])
    torch.testing.assert_close(values["kl"], (p0 * (p0.log() - z.log_softmax(1))).sum(1))
    torch.testing.assert_close(values["embedding"], 1 - (h * h0).sum(1) / h.norm(dim=1) / h0.norm(dim=1))
    others = z.clone()
    others[torch.arange(6), y] = -math.inf
    torch.testing.assert_close(values["margin"], others.amax(1) - z[torch.arange(6), y])
    for value in zeros.values():
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)


GOOD_X, GOOD_Y = torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 1, 2])


def spoiled(value: float) -> Tensor:
    x = GOOD_X.clone()
    x[1, 0, 2, 2] = value
    return x


BAD_INPUTS = {
    "NaN": ({"x": spoiled(math.nan)}, "images must be finite, got NaN or infinity"),
    "infinity": ({"x": spoiled(math.inf)}, "images must be finite"),
    "255": ({"x": GOOD_X * 255}, "pixels must be in [0, 1], got [127.5, 127.5]; divide by 255"),
    "normalised": ({"x": GOOD_X - 2}, "pixels must be in [0, 1], got [-1.5, -1.5]; give raw pixels and let the model"),
    "bytes": ({"x": (GOOD_X * 255).byte()}, "images must be a float tensor (B, C, H, W), got torch.uint8 (3, 1, 4, 4)"),
    "one image": ({"x": GOOD_X[0]}, "images must be a float tensor (B, C, H, W), got torch.float32 (1, 4, 4)"),
    "wrong size": ({"x": torch.full((3, 1, 5, 4), 0.5)}, "fails on images of shape (1, 5, 4)"),
    "empty": ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, "no image to attack, got a batch of 0"),
    "array": ({"x": GOOD_X.numpy()}, "images must be a torch.Tensor, got a ndarray"),
    "list of labels": ({"y": [0, 1, 2]}, "labels must be a torch.Tensor, got a list"),
    "negative label": ({"y": torch.tensor([0, -1, 2])}, "labels must be in [0, K), got -1"),
    "large label": ({"y": torch.tensor([0, 4, 2])}, "labels must be in [0, 4), got 4"),
    "int32 labels": ({"y": GOOD_Y.int()}, "labels must be int64 of shape (3,), got torch.int32 (3,)"),
    "one-hot labels": ({"y": torch.eye(4)[:3]}, "labels must be int64 of shape (3,), got torch.float32 (3, 4)"),
    "too few labels": ({"y": GOOD_Y[:2]}, "labels must be int64 of shape (3,), got torch.int64 (2,)"),
    "objective": ({"objective": "cross_entrop"}, "unknown objective 'cross_entrop'; did you mean 'cross_entropy'?"),
    "norm": ({"norm": "Linf"}, "unknown threat 'Linf'; did you mean 'linf'?"),
    "norm number": ({"norm": 2}, "unknown threat 2; did you mean 'l2'?"),
    "eps": ({"eps": 8}, "linf eps must be in [0, 1] because pixels are, got 8; did you mean 8/255?"),
    "eps text": ({"eps": "8/x"}, "must be a number or a fraction such as '8/255', got '8/x'"),
    "not split": (
        {"objective": "embedding"},
        "needs an encoder/classifier split, got a Sequential; wrap it with clead.adapt",
    ),
}


@pytest.mark.parametrize("function", [pgd, fgsm])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line(function, case):
    changes, says = BAD_INPUTS[case]
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 4))
    arguments = {"x": GOOD_X, "y": GOOD_Y, "eps": 0.1, **changes}
    with pytest.raises(UserError) as caught:
        function(model, **arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training and model[1].training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("function", "change", "says"),
    [
        (pgd, {"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        (pgd, {"restarts": 0}, "restarts: input should be greater than or equal to 1, got 0"),
        (pgd, {"keep": "first"}, "keep: input should be 'last' or 'best', got 'first'"),
        (pgd, {"step_size": -0.1}, "step_size: input should be greater than 0, got -0.1"),
        (pgd, {"step_size": "2/"}, "got '2/'"),
        (fgsm, {"step_size": 0}, "step_size: input should be greater than 0, got 0"),
    ],
)
def test_bad_options_are_one_line(function, change, says):
    model, (x, y) = linear(), images()
    with pytest.raises(UserError) as caught:
        function(model, x, y, eps=0.1, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda h: h[:, 0], "labels must be in [0, 2), got 2"),  # one logit: two classes
        (lambda h: (h, h), "Returns returns 0 (1, 16), 1 (1, 16), and several of them can be the logits"),
        (lambda h: h[:, :, None, None].expand(-1, -1, 2, 2), "must return logits (B, K) for 1 image, "),
    ],
)
def test_a_model_without_logits_is_refused(what, says):
    with pytest.raises(UserError) as caught:
        pgd(Returns(what), GOOD_X, GOOD_Y, eps=0.1)
    assert says in str(caught.value)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_nan_gradient_is_an_error_not_robustness(keep):
    """√ at 0 has gradient 0·∞ = NaN: hidden behind earlier points, or in the images, the model would look robust."""
    model = Returns(lambda h: torch.stack([h.sum(1), (h - h).abs().sqrt().sum(1), h[:, 0]], 1))
    y = torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match="gradient of 'cross_entropy' to the images is NaN"):
        pgd(model, GOOD_X, y, eps=0.1, steps=2, keep=keep)
    with pytest.raises(UserError, match="gradient of 'cross_entropy' to the images is NaN"):
        fgsm(model, GOOD_X, y, eps=0.1)


def test_an_image_that_breaks_the_model_is_kept():
    """Where a perturbation makes the logits NaN, the attack has found a failure and must return it."""
    model = Returns(lambda h: torch.stack([h.sum(1), -h.sum(1)], 1) / (h[:, :1] < 0.55))
    x_adv = pgd(
        model, GOOD_X, torch.tensor([1, 1, 1]), eps=0.1, steps=1, step_size=0.1, random_start=False, keep="best"
    )
    assert not torch.isfinite(model(x_adv)).all()


def test_check_inputs_accepts_the_borders():
    check_inputs(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.tensor([0, 9]), 10)
    check_inputs(GOOD_X.half(), GOOD_Y)


def test_attack_objects_are_called_on_any_objective():
    """An attack knows nothing of models: here it climbs a parabola whose top is known."""
    top = torch.full((2, 1, 2, 2), 0.9, dtype=torch.float64)
    x = torch.full_like(top, 0.5)

    def hill(z: Tensor) -> Tensor:
        return -(z - top).square().flatten(1).sum(1)

    for threat in (Linf(eps=0.6), L2(eps=2.0), L1(eps=4.0, sparsity=1)):
        x_adv = PGD(steps=200, step_size=0.02, keep="best")(hill, x, threat, generator=generator())
        torch.testing.assert_close(x_adv, top, atol=0.02, rtol=0)
    step = FGSM(step_size=0.5)(hill, x, Linf(eps=0.2))
    torch.testing.assert_close(step, x + 0.1)


def test_objective_receives_the_seeded_start():
    model, (x, y) = curved(), images(classes=4)
    a, b = (run_attack(PGD(steps=1), model, x, y, Linf(eps=0.3), generator=generator(s)) for s in (0, 1))
    assert not torch.equal(a, b)


def test_contrastive_objective_of_a_single_image_is_the_cosine_distance():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    model = adapt(net, sample_shape=(1, 2, 2))
    x = torch.rand(1, 1, 2, 2)
    x_adv = pgd(model, x, torch.tensor([0]), eps=0.2, steps=5, objective="contrastive")
    same = torch.nn.functional.cosine_similarity(model.features(x_adv), model.features(x))
    assert same.item() < 0.999
