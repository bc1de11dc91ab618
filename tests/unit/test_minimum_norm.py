"""CW, DeepFool and FMN against exact distances, the papers in NumPy, and peers; the verified distances and their curve."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clead.attacks import cw, deepfool, fmn, pgd
from clead.attacks.cw import CW
from clead.attacks.deepfool import DeepFool
from clead.attacks.fmn import FMN
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.interfaces import ImageSet, MinimumNorm, Search
from clead.measurements.base import Computation
from clead.measurements.distances import MinimumNormResult, curve, distances, evaluate_minimum_norm
from clead.threats import THREATS
from support import Returns, generator

ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
FUNCTIONS = {"cw": cw, "deepfool": deepfool, "fmn": fmn}
PAIRS = [
    ("cw", "l2"),
    ("deepfool", "l2"),
    ("deepfool", "linf"),
    *(("fmn", norm) for norm in ("linf", "l2", "l1", "l0")),
]
QUICK = {"cw": {"steps": 100, "search_steps": 5, "weight": 0.3, "step_size": 0.03}, "deepfool": {}, "fmn": {}}
SLOW = {"cw": {"steps": 300, "search_steps": 4, "weight": 0.3}, "deepfool": {}, "fmn": {}}


def linear(classes: int = 2, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator(seed))
    return model


def curved(classes: int = 4, channels: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, 32), nn.Tanh(), nn.Linear(32, classes)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        return model


def images(model: nn.Module, count: int = 16, low: float = 0.0, high: float = 1.0, channels: int = 3):
    """Images with the labels that the model gives them, so that all are right when clean."""
    x = low + (high - low) * torch.rand(count, channels, 4, 4, generator=generator(1), dtype=torch.float64)
    return x, model(x).argmax(1)


def size(delta: Tensor, norm: str) -> Tensor:
    return THREATS.get(norm)(eps=0).distance(delta)


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) != y


def to_the_boundaries(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(z_y − z_k) / ‖w_k − w_y‖_dual to each class k, (B, K), and whether that perturbation stays in the box: then it is exact."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    exact = torch.full_like(logits, torch.inf)
    fits = torch.ones_like(logits, dtype=torch.bool)
    for i in range(len(x)):
        for k in range(logits.shape[1]):
            if k != y[i]:
                w = weight[k] - weight[y[i]]
                exact[i, k] = (logits[i, y[i]] - logits[i, k]) / torch.linalg.vector_norm(w, ord=DUAL[norm])
                unit = {"linf": w.sign(), "l2": w / w.norm(), "l1": w.sign() * (w.abs() == w.abs().max())}[norm]
                point = x[i].flatten() + exact[i, k] * unit
                fits[i, k] = point.min() >= 0.05 and point.max() <= 0.95  # nor does the overshoot reach the box
    return exact, fits


def in_the_box(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> np.ndarray:
    """The exact distance for two linear classes with the box, without gradients: by bisection, or greedily, per image."""
    weight, logits = model[1].weight.detach().numpy(), model(x).detach().numpy()
    out = []
    for i in range(len(x)):
        w = weight[1 - y[i]] - weight[y[i]]
        need, pixel = logits[i, y[i]] - logits[i, 1 - y[i]], x[i].flatten().numpy()
        room, slope = np.where(w > 0, 1 - pixel, pixel), np.abs(w)
        assert (slope * room).sum() > need, "no image of this class is adversarial"
        if norm == "l0":
            gains = np.sort((slope * room).reshape(3, 16).sum(0))[::-1]
            out.append(1 + int(np.searchsorted(np.cumsum(gains), need)))
            continue
        if norm == "l1":
            distance, gain = 0.0, 0.0
            for k in np.argsort(-slope):
                used = min(room[k], (need - gain) / slope[k])
                distance, gain = distance + used, gain + slope[k] * used
            out.append(distance)
            continue
        low, high = 0.0, 1e4
        for _ in range(200):
            t = (low + high) / 2
            step = np.minimum(t * slope if norm == "l2" else t, room)
            low, high = (t, high) if (slope * step).sum() < need else (low, t)
        out.append(float(np.linalg.norm(step) if norm == "l2" else step.max()))
    return np.array(out)


# How much longer than the exact distance, in the median and at most: Adam's last step, the overshoot (of each of several
# steps if the nearest class changes on the way), the last shrinking of the ball.
SLACK = {"cw": (0.03, 0.12), "deepfool": (0.035, 0.12), "fmn": (1e-4, 2e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize(("name", "norm"), [pair for pair in PAIRS if pair[1] != "l0"])
def test_distance_to_the_boundary_of_a_linear_model(name, norm, classes):
    """To the nearest class, which DeepFool looks for; the others climb to the class of largest logit and may end in another."""
    model = linear(classes)
    with torch.no_grad():
        model[1].bias.copy_(0.05 * model[1].bias - 0.5 * model[1].weight.sum(1))  # grey images are near every boundary
    x, y = images(model, count=80, low=0.45, high=0.55)
    exact, fits = to_the_boundaries(model, x, y, norm)
    chosen = (exact.amin(1) * fits.all(1)).topk(16).indices  # the farthest of those where the formula holds
    assert fits[chosen].all()
    x, y, exact = x[chosen], y[chosen], exact[chosen]
    x_adv = FUNCTIONS[name](model, x, y, norm=norm, **SLOW[name])
    assert wrong(model, x_adv, y).all()
    found = size(x_adv - x, norm)
    assert (found > exact.amin(1) * (1 - 1e-9)).all()
    reached = exact.gather(1, model(x_adv).argmax(1, keepdim=True))[:, 0]
    # A step of DeepFool is 1e-4 longer, in any norm.
    ratio = (found - 1.1e-4) / exact.amin(1) if name == "deepfool" else found / reached
    assert (found / exact.amin(1)).median() < 1.1
    assert ratio.median() < 1 + SLACK[name][0] and ratio.max() < 1 + SLACK[name][1]


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_distance_in_the_box(name, norm):
    """Pixels at the border: DeepFool ignores the box in choosing its step and may fail or go farther; the others may not."""
    model = linear(seed=2)
    x, y = images(model, count=24)
    x[:12] = (x[:12] > 0.5).double()
    y = model(x).argmax(1)
    exact = torch.from_numpy(in_the_box(model, x, y, norm))
    x_adv = FUNCTIONS[name](model, x, y, norm=norm, **SLOW[name])
    found = wrong(model, x_adv, y)
    ratio = size(x_adv - x, norm)[found] / exact[found]
    assert (x_adv.min() >= 0) and (x_adv.max() <= 1) and ratio.min() > 1 - 1e-9
    assert torch.equal(x_adv[~found], x[~found])
    if name == "deepfool":
        assert found.float().mean() > 0.8
    else:
        assert found.all() and ratio.median() < {"l1": 1.1, "l0": 1.01}.get(norm, 1.02)


def slopes(model: nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (K,) and their gradients (K, C, H, W) at one image, one backward per class."""
    gradients = []
    logits = model(torch.from_numpy(x)[None])[0].detach().numpy()
    for k in range(len(logits)):
        point = torch.from_numpy(x)[None].requires_grad_()
        gradients.append(torch.autograd.grad(model(point)[0, k], point)[0][0].numpy())
    return logits, np.stack(gradients)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_is_algorithm_2_of_the_paper(norm):
    model = curved()
    x, y = images(model, count=10)
    actual = DeepFool(steps=8).minimal(model, x, y, norm=norm).numpy()
    for i in range(len(x)):
        start, true = x[i].numpy(), int(y[i])
        total, point = np.zeros_like(start), start
        for _ in range(8):
            z, g = slopes(model, point)
            if z.argmax() != true:
                break
            best = (np.inf, None)
            for k in range(len(z)):
                if k != true:
                    w, f = g[k] - g[true], z[k] - z[true]
                    length = np.abs(w).sum() if norm == "linf" else np.sqrt((w**2).sum())
                    direction = np.sign(w) if norm == "linf" else w / length
                    best = min(best, (abs(f) / length, direction), key=lambda pair: pair[0])
            total = total + (best[0] + 1e-4) * best[1]
            point = np.clip(start + 1.02 * total, 0, 1)
        np.testing.assert_allclose(actual[i], point, atol=1e-10)


def nearest(x: np.ndarray, delta: np.ndarray, radius: float, norm: str) -> np.ndarray:
    """The nearest perturbation in ball and box by the threat's own projection, tested elsewhere."""
    z, start = torch.from_numpy(x + delta)[None], torch.from_numpy(x)[None]
    return (THREATS.get(norm)(eps=radius).project(z, start) - start)[0].numpy()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_fmn_is_algorithm_1_of_the_paper(norm):
    model, steps = curved(), 12
    x, y = images(model, count=6)
    attack = FMN(steps=steps, step_size=0.8, gamma=0.1)
    actual = attack.minimal(model, x, y, norm=norm).numpy()

    def length(delta: np.ndarray) -> float:
        changed = (delta != 0).any(0).sum()
        return float(changed) if norm == "l0" else float(np.linalg.norm(delta.ravel(), ord=ORDER[norm]))

    for i in range(len(x)):
        start, true = x[i].numpy(), int(y[i])
        delta, radius, best, best_size = np.zeros_like(start), 1.0, start, np.inf
        for step in range(steps):
            cosine = (1 + np.cos(np.pi * step / steps)) / 2
            alpha, gamma = 0.8 * (0.01 + 0.99 * cosine), 0.001 + 0.099 * cosine
            z, g = slopes(model, start + delta)
            other = max((k for k in range(len(z)) if k != true), key=lambda k: z[k])
            lead, slope = z[other] - z[true], g[other] - g[true]
            if lead > 0 and length(delta) < best_size:
                best, best_size = start + delta, length(delta)
            if norm == "l0":
                down, up = (
                    min(radius - 1, np.floor(radius * (1 - gamma))),
                    max(radius + 1, np.floor(radius * (1 + gamma))),
                )
                radius = max(1, min(down, best_size) if lead > 0 else up)
            elif lead > 0:
                radius = min(radius * (1 - gamma), best_size)
            elif best_size < np.inf:
                radius = radius * (1 + gamma)
            else:
                point = start + delta
                free = np.where(slope > 0, point < 1, point > 0) * slope
                radius = (length(delta) + abs(lead) / np.linalg.norm(free.ravel(), ord=DUAL[norm])) * (1 + gamma)
            radius = min(radius, length(np.maximum(start, 1 - start)))
            delta = nearest(start, delta + alpha * slope / np.linalg.norm(slope), radius, norm)
        np.testing.assert_allclose(actual[i], best, atol=1e-9)


def test_cw_is_the_papers_objective_descended_by_adam():
    """One weight; Adam and the gradient of ‖x′ − x‖² + c·f through tanh written out."""
    model, steps, c = curved(), 25, 2.0
    x, y = images(model, count=6)
    actual = CW(steps=steps, search_steps=1, weight=c, step_size=0.05).minimal(model, x, y, norm="l2").numpy()
    for i in range(len(x)):
        start, true = x[i].numpy(), int(y[i])
        w = np.arctanh((2 * start - 1) * (1 - 1e-6))
        first, second, best, best_size, before = np.zeros_like(w), np.zeros_like(w), start, np.inf, np.inf
        for step in range(steps):
            point = (np.tanh(w) + 1) / 2
            z, g = slopes(model, point)
            other = max((k for k in range(len(z)) if k != true), key=lambda k: z[k])
            distance = np.linalg.norm(point - start)
            if z[other] > z[true] and distance < best_size:
                best, best_size = point, distance
            inner = 2 * (point - start) + (c * (g[true] - g[other]) if z[true] > z[other] else 0)
            gradient = inner * (1 - np.tanh(w) ** 2) / 2
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            hat, hat2 = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            w = w - 0.05 * hat / (np.sqrt(hat2) + 1e-8)
        assert before == np.inf
        np.testing.assert_allclose(actual[i], best, atol=1e-7)


def foolbox_distances(attack, model, x: Tensor, y: Tensor, norm: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

        peer = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
        x_adv = attack(foolbox)(peer, x, y, epsilons=None)[0]
    assert wrong(model, x_adv, y).any()
    return torch.where(wrong(model, x_adv, y), size(x_adv - x, norm), torch.inf)


PEERS = {
    ("deepfool", "l2"): lambda fb: fb.attacks.L2DeepFoolAttack(),
    ("deepfool", "linf"): lambda fb: fb.attacks.LinfDeepFoolAttack(),
    ("fmn", "linf"): lambda fb: fb.attacks.LInfFMNAttack(),
    ("fmn", "l2"): lambda fb: fb.attacks.L2FMNAttack(),
    ("fmn", "l1"): lambda fb: fb.attacks.L1FMNAttack(),
    ("fmn", "l0"): lambda fb: fb.attacks.L0FMNAttack(),
    ("cw", "l2"): lambda fb: fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=5, steps=100, initial_const=0.3, stepsize=0.03
    ),
}


@pytest.mark.parametrize(("name", "norm"), PEERS)
def test_is_as_near_as_foolbox(name, norm):
    """Grey images: its L0 counts channels. Its L2 FMN does not project (a factor norms / norms), so ours may be much nearer."""
    model = curved(5, channels=1).float()
    x, y = images(curved(5, channels=1), count=40, channels=1)
    x = x.float()
    theirs = foolbox_distances(PEERS[name, norm], model, x, y, norm)
    x_adv = FUNCTIONS[name](model, x, y, norm=norm, **QUICK[name])
    assert wrong(model, x_adv, y).float().mean() >= theirs.isfinite().float().mean()
    ours = torch.where(wrong(model, x_adv, y), size(x_adv - x, norm), torch.inf)
    both = theirs.isfinite()
    assert ours.median() <= 1.02 * theirs.median()
    if name == "deepfool":
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    else:
        assert (ours / theirs)[both].mean() <= 1.02


def test_cw_is_as_near_as_torchattacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks

        model = curved(5).float()
        x, y = images(curved(5), count=40)
        x = x.float()
        peer = torchattacks.CW(model, c=2.0, steps=100, lr=0.03)(x, y)
    both = wrong(model, peer, y)
    ours = cw(model, x, y, steps=100, search_steps=1, step_size=0.03, weight=2.0)
    assert both.float().mean() > 0.8 and wrong(model, ours, y)[both].all()
    ratio = (size(ours - x, "l2") / size(peer - x, "l2"))[both]
    assert ratio.mean() < 1.01 and ratio.max() < 1.05 and ratio.min() > 0.9
    searched = cw(model, x, y, steps=100, search_steps=4, step_size=0.03, weight=0.3)
    assert wrong(model, searched, y).all()
    assert size(searched - x, "l2")[both].mean() < size(peer - x, "l2")[both].mean()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_within_a_radius(name, norm):
    model = curved()
    x, y = images(model)
    y[0] = (y[0] + 1) % 4  # wrong already
    free = FUNCTIONS[name](model, x, y, norm=norm, **QUICK[name])
    sizes = size(free - x, norm)
    assert torch.equal(free[0], x[0]) and wrong(model, free, y).all()
    eps = sizes[1:].median().ceil().item() if norm == "l0" else sizes[1:].median().item() * 1.001
    held = FUNCTIONS[name](model, x, y, norm=norm, eps=eps, **QUICK[name])
    near = sizes <= eps
    assert wrong(model, held, y)[near].all(), "what is near enough without a radius is found with one"
    assert torch.equal(held[~near & ~wrong(model, held, y)], x[~near & ~wrong(model, held, y)])
    assert (size(held - x, norm) <= eps).all() and near[1:].any() and not near.all()
    assert torch.equal(FUNCTIONS[name](model, x, y, norm=norm, eps=0, **QUICK[name]), x)


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_two_classes_and_labels_of_both(name, norm):
    model = curved(2)
    x, y = images(model)
    assert set(y.tolist()) == {0, 1}
    assert wrong(model, FUNCTIONS[name](model, x, y, norm=norm, **QUICK[name]), y).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cw", {"steps": 5}),
        ("cw", {"search_steps": 2}),
        ("cw", {"step_size": 0.05}),
        ("cw", {"weight": 0.5}),
        ("cw", {"eps": 0.1}),
        ("deepfool", {"steps": 1}),
        ("deepfool", {"overshoot": 0.2}),
        ("deepfool", {"candidates": 1}),
        ("deepfool", {"eps": 0.1}),
        ("deepfool", {"norm": "linf"}),
        ("fmn", {"steps": 5}),
        ("fmn", {"step_size": 0.3}),
        ("fmn", {"gamma": 0.2}),
        ("fmn", {"norm": "l1"}),
        ("fmn", {"eps": 0.01}),
    ],
)
def test_every_option_changes_the_result(name, change):
    model = curved(5)
    x, y = images(model, count=40)
    base = {"cw": {"steps": 60, "search_steps": 4, "weight": 0.1}}.get(name, {})
    function = FUNCTIONS[name]
    assert not torch.equal(function(model, x, y, **base), function(model, x, y, **{**base, **change}))


@pytest.mark.parametrize(
    ("function", "change", "says"),
    [
        (cw, {"norm": "linf"}, "CW is an attack for l2, got linf"),
        (cw, {"norm": "linf", "eps": 0.1}, "CW is an attack for l2, got linf"),
        (deepfool, {"norm": "l1"}, "DeepFool is an attack for linf, l2, got l1"),
        (fmn, {"norm": "l3"}, "unknown threat 'l3'"),
        (fmn, {"eps": 8}, "linf eps must be in [0, 1] because pixels are, got 8; did you mean 8/255?"),
        (fmn, {"gamma": 1.0}, "gamma: input should be less than 1, got 1.0"),
        (fmn, {"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        (deepfool, {"overshoot": -0.1}, "overshoot: input should be greater than or equal to 0, got -0.1"),
        (deepfool, {"candidates": 0}, "candidates: input should be greater than or equal to 1, got 0"),
        (cw, {"weight": 0}, "weight: input should be greater than 0, got 0"),
        (fmn, {"x": torch.full((16, 3, 4, 4), 255.0).double()}, "pixels must be in [0, 1]"),
        (cw, {"y": torch.full((16,), 9)}, "labels must be in [0, 4), got 9"),
    ],
)
def test_bad_options_are_one_line(function, change, says):
    model = curved()
    x, y = images(model)
    with pytest.raises(UserError) as caught:
        function(model, **{"x": x, "y": y, **change})
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("eps", [None, 0.2])
@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_a_nan_gradient_is_an_error_not_robustness(name, norm, eps):
    model = Returns(lambda h: torch.stack([1 + h.sum(1), (h - h).abs().sqrt().sum(1)], 1))
    x = torch.full((2, 1, 2, 2), 0.5)
    eps = 1 if norm == "l0" and eps else eps
    with pytest.raises(UserError, match="gradient of .* to the images is NaN"):
        FUNCTIONS[name](model, x, torch.tensor([0, 0]), norm=norm, eps=eps)


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_a_flat_model_gives_the_images_back(name, norm):
    """No gradient at all: nothing is found, and nothing becomes NaN."""
    model = Returns(lambda h: torch.stack([h[:, 0] * 0 + 1, h[:, 0] * 0], 1))
    x = torch.rand(3, 1, 2, 2, generator=generator())
    assert torch.equal(FUNCTIONS[name](model, x, torch.zeros(3, dtype=torch.long), norm=norm, **QUICK[name]), x)


@pytest.mark.parametrize("kind", [CW, DeepFool, FMN])
def test_is_a_search_and_a_minimum_norm_attack(kind):
    assert isinstance(kind(), Search) and isinstance(kind(), MinimumNorm)


def test_smallest_leaves_model_and_images_as_they_are():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)
    )
    model.train()
    x, state = torch.rand(6, 3, 4, 4, generator=generator()), torch.get_rng_state()
    y = model.eval()(x).argmax(1)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        inside = x * 1
        x_adv = run_attack(FMN(steps=20), model, inside, y, "l2")
    assert torch.equal(x_adv, run_attack(FMN(steps=20), model, x.requires_grad_(), y, "l2"))
    assert not x_adv.requires_grad and x.grad is None and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_distances_are_measured_on_the_model_itself():
    model = curved().float()
    x, y = images(curved())
    x = x.float()
    y[:3] = (y[:3] + 1) % 4
    found = distances(FMN(), model, x, y, "l2")
    assert found.dtype == torch.float32 and (found[:3] == 0).all() and (found[3:] > 0).all()
    torch.testing.assert_close(found, size(fmn(model, x, y, norm="l2") - x, "l2"), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(distances(FMN(), model, x.double(), y, "l2"), found)  # float32 whatever it is given


class Wavering(nn.Module):
    """Two linear classes; asked without gradients, the lead of the first is larger by ``extra``, as rounding might make it."""

    def __init__(self, extra: float) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        lead = 1 - x.flatten(1).sum(1)
        return torch.stack([lead + (0 if torch.is_grad_enabled() else self.extra), 0 * lead], 1)


@pytest.mark.parametrize(("extra", "low", "high"), [(0.0, 1.0, 1.0001), (5e-4, 1.0005, 1.0015), (5e-3, 1.005, 1.015)])
def test_a_point_on_the_wrong_side_of_rounding_is_moved_on(extra, low, high):
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    assert low <= distances(FMN(steps=200), Wavering(extra), x, y, "l1").item() <= high


def test_a_point_that_is_not_adversarial_does_not_count():
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    assert distances(FMN(), Wavering(0.5), x, y, "l1").item() == math.inf
    flat = Returns(lambda h: torch.stack([h[:, 0] * 0 + 1, h[:, 0] * 0], 1))
    assert distances(FMN(), flat, x, y, "l2").item() == math.inf


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([0.0, 0.5, math.inf]), st.floats(0, 4, width=32)), min_size=1, max_size=30))
def test_the_curve_is_the_fraction_farther_away(values):
    sizes = torch.tensor(values)
    radii, accuracy = curve(sizes)
    assert radii[0] == 0 and (radii.diff() > 0).all() and (accuracy.diff() < 1e-6).all()
    for radius, value in zip(radii.tolist(), accuracy, strict=True):
        assert value.item() == pytest.approx(sum(d > radius for d in values) / len(values), abs=1e-6)
    finite = [d for d in values if d < math.inf]
    assert radii[-1] == max(finite, default=0)


@pytest.mark.parametrize("bad", [[], [math.nan], [-1.0]])
def test_a_curve_of_nonsense_is_refused(bad):
    with pytest.raises(UserError, match="distances must be ≥ 0"):
        curve(torch.tensor(bad))


def test_the_curve_equals_attacks_at_each_radius():
    """On a linear model both are exact, so one run must say what PGD says at every radius."""
    model = linear(seed=2).float()
    x, y = images(linear(seed=2), count=60)
    x = x.float()
    radii, accuracy = curve(distances(FMN(steps=200), model, x, y, "linf"))
    for radius in (0.02, 0.1, 0.3):
        x_adv = pgd(model, x, y, eps=radius, steps=20, objective="margin")
        at = accuracy[torch.searchsorted(radii, radius, right=True) - 1]
        assert at.item() == pytest.approx(1 - wrong(model, x_adv, y).float().mean().item(), abs=0.02)


def test_evaluation_takes_the_smallest_over_attacks_and_is_json():
    model = curved(5).float()
    pixels = torch.randint(0, 256, (50, 3, 4, 4), generator=generator(), dtype=torch.uint8)
    y = model(pixels.float() / 255).argmax(1)
    y[:5] = (y[:5] + 1) % 5
    data = ImageSet(pixels, y)
    result = evaluate_minimum_norm(
        model, data, "l2", (FMN(steps=40), DeepFool(overshoot=0.1)), Computation(batch_size=16), classes=5
    )
    assert [part.attack for part in result.attacks] == ["fmn", "deepfool"]
    assert result.attacks[1].settings == {"steps": 50, "overshoot": 0.1, "candidates": 10}
    nearest = [min(pair) for pair in zip(*(part.distances for part in result.attacks), strict=True)]
    assert result.distances == nearest and nearest[:5] == [0] * 5 and result.attacks[0].found == 50
    assert result.n == 50 and result.clean.accuracy == 0.9
    assert result.median == sorted(nearest)[24]
    assert result.curve[0].eps == 0 and result.curve[0].robust.accuracy == 0.9
    assert result.curve[-1].eps == max(nearest) and result.curve[-1].robust.accuracy == 0
    text = result.model_dump_json()
    assert MinimumNormResult.model_validate(json.loads(text)) == result
    whole = evaluate_minimum_norm(model, data, "l2", (FMN(steps=40), DeepFool(overshoot=0.1)))
    torch.testing.assert_close(torch.tensor(whole.distances), torch.tensor(nearest), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="frozen"):
        result.seed = 1


def test_evaluation_says_what_was_not_found():
    flat = Returns(lambda h: torch.stack([h[:, 0] * 0 + 1, h[:, 0] * 0], 1))
    data = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]))
    result = evaluate_minimum_norm(flat, data, "linf")
    assert result.distances == [None, None, None, 0] and result.median is None
    assert result.attacks[0].found == 1
    assert [(point.eps, point.robust.accuracy) for point in result.curve] == [(0, 0.75)]


def test_the_stored_curve_is_thinned_but_exact():
    model = linear(seed=2).float()
    data = ImageSet(
        *(
            part[:300]
            for part in (
                torch.randint(0, 256, (300, 3, 4, 4), generator=generator()).byte(),
                torch.zeros(300, dtype=torch.long),
            )
        )
    )
    result = evaluate_minimum_norm(model, data, "linf", [DeepFool()])
    assert len(result.curve) <= 200 and result.curve[0].eps == 0
    for point in result.curve[::20]:
        assert point.robust.accuracy == sum(d is None or d > point.eps for d in result.distances) / 300


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attacks": ["pgd"]}, "pgd needs a radius; take one for the smallest perturbation: cw, deepfool, f"),
        ({"attacks": ["fnm"]}, "unknown attack 'fnm'; did you mean 'fmn'"),
        ({"attacks": ["cw"]}, "CW is an attack for l2, got linf"),
        ({"attacks": []}, "need at least one image and one attack, got 4 and 0"),
        ({"norm": "l7"}, "unknown threat 'l7'"),
        ({"classes": 1}, "labels must be in [0, 1), got 1"),
    ],
)
def test_mistakes_in_an_evaluation_are_one_line(change, says):
    data = ImageSet(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]))
    with pytest.raises(UserError) as caught:
        evaluate_minimum_norm(linear().float(), **{"images": data, "norm": "linf", **change})
    assert says in str(caught.value) and "\n" not in str(caught.value)
