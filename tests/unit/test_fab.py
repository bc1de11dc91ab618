"""FAB: its projections against closed forms, SciPy and the authors' sorting ones; the attack against theirs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from clead.attacks import fab
from clead.attacks.fab import FAB, to_hyperplane
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.threats import THREATS
from support import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pyautoattack.fab_projections import projection_l1, projection_l2, projection_linf
    from pyautoattack.fab_pt import FABAttack_PT

PEERS = {"linf": projection_linf, "l2": projection_l2, "l1": projection_l1}
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
NORMS = list(ORDERS)


def length(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ORDERS[norm], dim=1)


def problem(seed: int, pixels: int, reach: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the box, some in its faces; normals, some of them 0; what is needed, ``reach`` of what there is."""
    draw = generator(seed)
    x = (torch.rand(6, pixels, generator=draw, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    w = torch.randn(6, pixels, generator=draw, dtype=torch.float64)
    w *= torch.rand(6, pixels, generator=draw, dtype=torch.float64) > 0.2
    w[:, 0] += 3
    sign = torch.randint(0, 2, (6,), generator=draw) * 2 - 1
    room = torch.where(w * sign[:, None] > 0, 1 - x, x)
    needed = sign * reach * (w.abs() * room).sum(1)
    return x.to(dtype), w.to(dtype), needed.to(dtype)


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), pixels=st.integers(1, 40), reach=st.floats(0.001, 0.99), norm=st.sampled_from(NORMS))
def test_the_projection_is_feasible_and_no_feasible_point_is_nearer(seed, pixels, reach, norm):
    x, w, needed = problem(seed, pixels, reach)
    delta = to_hyperplane(x, w, needed, norm)
    torch.testing.assert_close((w * delta).sum(1), needed, rtol=1e-9, atol=1e-12)
    assert ((x + delta) >= -1e-12).all() and ((x + delta) <= 1 + 1e-12).all()
    # Optimal by weak duality: for every λ, min ‖δ‖ - λ(w·δ - needed) over the box is below every feasible length.
    size = length(delta, norm)
    least = torch.tensor([lower_bound(*row, norm) for row in zip(x, w, needed, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(size, least, rtol=1e-6, atol=1e-9)


def lower_bound(x: Tensor, w: Tensor, needed: Tensor, norm: str) -> float:
    """The least length, by bisection on what a length can gain: no sorting, no Newton."""
    room = torch.where(w * needed > 0, 1 - x, x).numpy()
    slope, need = w.abs().numpy(), float(needed.abs())
    if norm == "l1":
        gain, cost = 0.0, 0.0
        for k in np.argsort(-slope):
            used = min(room[k], (need - gain) / slope[k]) if slope[k] else 0.0
            gain, cost = gain + slope[k] * used, cost + used
        return cost
    move = (lambda c: np.minimum(c, room)) if norm == "linf" else (lambda c: np.minimum(c * slope, room))
    low, high = 0.0, 1e7
    for _ in range(100):
        c = (low + high) / 2
        low, high = (low, c) if (slope * move(c)).sum() >= need else (c, high)
    return float(np.linalg.norm(move(high) * (slope > 0), ORDERS[norm]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.05, 0.5, 0.9])
def test_the_projection_is_that_of_scipy(norm, reach):
    x, w, needed = problem(3, 8, reach)
    delta = to_hyperplane(x, w, needed, norm)
    for i in range(len(x)):
        p, v, c = x[i].numpy(), w[i].numpy(), float(needed[i])
        box = list(zip(-p, 1 - p, strict=True))
        if norm == "l2":
            best = minimize(
                lambda d: (d @ d) / 2,
                np.zeros(8),
                jac=lambda d: d,
                bounds=box,
                constraints={"type": "eq", "fun": lambda d, v=v, c=c: v @ d - c, "jac": lambda d, v=v: v},
                options={"ftol": 1e-14, "maxiter": 500},
            )
            assert best.success
            np.testing.assert_allclose(delta[i].numpy(), best.x, atol=1e-5)
            continue
        # |δ_k| ≤ s_k, and the objective is Σ s (L1) or one s for all (L∞).
        count = 8 if norm == "l1" else 1
        bound = np.eye(8) if norm == "l1" else np.ones((8, 1))
        best = linprog(
            np.r_[np.zeros(8), np.ones(count)],
            A_ub=np.block([[np.eye(8), -bound], [-np.eye(8), -bound]]),
            b_ub=np.zeros(16),
            A_eq=np.r_[v, np.zeros(count)][None],
            b_eq=[c],
            bounds=box + [(0, None)] * count,
        )
        assert best.success
        assert float(length(delta[i : i + 1], norm)) == pytest.approx(best.fun, rel=1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.01, 0.3, 0.95])
def test_the_projection_is_that_of_the_authors(norm, reach):
    """In float32, on as many pixels as an image has: as short, and nearer to the hyperplane than theirs or as near."""
    x, w, needed = problem(1, 3072, reach, torch.float32)
    delta = to_hyperplane(torch.stack([x, x]), w, torch.stack([needed, needed]), norm)
    assert torch.equal(delta[0], delta[1])
    peer = PEERS[norm](x.double(), w.double(), (w.double() * x.double()).sum(1) + needed.double())
    torch.testing.assert_close(length(delta[0], norm), length(peer, norm), rtol=1e-5, atol=0)
    torch.testing.assert_close((w.double() * delta[0].double()).sum(1), needed.double(), rtol=2e-5, atol=0)
    if norm != "l1":
        torch.testing.assert_close(delta[0].double(), peer.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_reach_every_pixel_with_a_slope_goes_to_its_end(norm):
    x, w, needed = problem(2, 30, 1.5)
    delta = to_hyperplane(x, w, needed, norm)
    end = torch.where(w * needed[:, None] > 0, 1 - x, -x) * (w != 0)
    torch.testing.assert_close(delta, end, atol=1e-15, rtol=0)
    assert not to_hyperplane(x, w, torch.zeros_like(needed), norm).any()
    assert not to_hyperplane(x, torch.zeros_like(w), needed, norm).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e20])
def test_the_projection_does_not_depend_on_the_scale_of_the_gradient(norm, scale):
    x, w, needed = problem(4, 50, 0.4, torch.float32)
    torch.testing.assert_close(
        to_hyperplane(x, w * scale, needed * scale, norm), to_hyperplane(x, w, needed, norm), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("norm", NORMS)
def test_equal_slopes_are_shared(norm):
    x, w = torch.full((1, 4), 0.5), torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    delta = to_hyperplane(x, w, torch.tensor([1.0]), norm)
    assert float((w * delta).sum()) == pytest.approx(1) and float(length(delta, norm)) == pytest.approx(
        {"linf": 0.25, "l2": 0.5, "l1": 1}[norm]
    )


def linear(classes: int, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator(seed))
    return model.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("classes", "targets"), [(2, 9), (2, 0), (3, 9), (5, 9), (5, 0)])
def test_minimal_attains_the_distance_to_a_linear_models_boundary(norm, classes, targets):
    model = linear(classes)
    x = torch.rand(8, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % classes  # wrong already
    x_adv = FAB(steps=100, targets=targets).minimal(model, x, y, norm=norm)
    assert torch.equal(x_adv[0], x[0])
    assert (model(x_adv).argmax(1) != y).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    logits, weight = model(x), model[1].weight
    for i in range(1, len(x)):
        least = min(
            lower_bound(x[i].flatten(), weight[k] - weight[y[i]], logits[i, y[i]] - logits[i, k], norm)
            for k in range(classes)
            if k != y[i] and reachable(x[i].flatten(), weight[k] - weight[y[i]], logits[i, y[i]] - logits[i, k])
        )
        # In L∞ a pixel that the box holds back lags behind by 1 - beta, and the others make up for it.
        within = 2e-3 if norm == "linf" else 1e-3
        assert least * (1 - 1e-9) <= float(length((x_adv - x)[i : i + 1], norm)) <= least * (1 + within)


def reachable(x: Tensor, w: Tensor, needed: Tensor) -> bool:
    return bool((w.abs() * torch.where(w > 0, 1 - x, x)).sum() > needed)


DIGITS: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on scikit-learn's digits, and 50 images that it was not trained on."""
    if not DIGITS:
        from sklearn.datasets import load_digits

        data = load_digits()
        x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
        y = torch.tensor(data.target, dtype=torch.int64)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10)),
            )
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(300):
            rows = torch.randint(0, 1500, (64,), generator=generator(step))
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        DIGITS["all"] = (model.eval().requires_grad_(False), x[1500:1550], y[1500:1550])
    return DIGITS["all"]


def broken(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float, norm: str) -> Tensor:
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    return (model(x_adv).argmax(1) != y) & (length(x_adv - x, norm) <= eps * (1 + 1e-5) + 1e-6)


def authors(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, targets: int, steps: int) -> Tensor:
    state = torch.get_rng_state()
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    attack = FABAttack_PT(
        model, norm=name, eps=eps, n_iter=steps, targeted=targets > 0, n_target_classes=targets, device=x.device
    )
    x_adv = attack.perturb(x, y)
    torch.set_rng_state(state)
    return x_adv


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.39), ("l1", 0.95)])
@pytest.mark.parametrize("targets", [9, 0])
def test_the_same_images_are_broken_as_by_the_authors(norm, eps, targets):
    model, x, y = digits()
    steps = 15
    ours = broken(model, x, fab(model, x, y, eps=eps, norm=norm, steps=steps, targets=targets), y, eps, norm)
    theirs = broken(model, x, authors(model, x, y, eps, norm, targets, steps), y, eps, norm)
    assert 0.2 < theirs.float().mean() < 0.8, "says little"
    assert (ours != theirs).sum() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_minimal_distances_agree_with_search_and_are_no_longer_than_the_authors(norm):
    model, x, y = digits()
    x, y = x[:30], y[:30]
    attack = FAB(steps=30, targets=2)
    right = model(x).argmax(1) == y
    nearest = attack.minimal(model, x, y, norm=norm)
    assert (model(nearest).argmax(1) != y).all()
    size = length(nearest - x, norm)
    peer = length(
        authors(model, x, y, 1e3, norm, 2, 30) - x, norm
    )  # it stops at its first target inside so large a ball
    assert (size[right] <= peer[right] * 1.001).float().mean() > 0.95 and (size[right] > 0).all()
    eps = float(size[right].median())
    inside = broken(model, x, run_attack(attack, model, x, y, THREATS.get(norm)(eps=eps)), y, eps, norm)
    assert (inside != (size <= eps)).sum() <= 1  # the search has no bisection


def test_restarts_and_steps_only_gain_and_targets_shrink_to_the_classes():
    model, x, y = digits()
    eps = 0.08

    def count(**values: int) -> int:
        return int(broken(model, x, fab(model, x, y, eps=eps, **values), y, eps, "linf").sum())

    one = count(steps=3, targets=1)
    assert count(steps=3, targets=1, restarts=3) >= one and count(steps=10, targets=1) >= one
    assert count(steps=3, targets=3) > one
    assert torch.equal(fab(model, x, y, eps=eps, steps=2, targets=40), fab(model, x, y, eps=eps, steps=2, targets=9))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_use_the_generator_and_stay_near(norm):
    model, x, y = digits()
    attack = FAB(steps=3, targets=1, restarts=3)
    one, two, again = (attack.minimal(model, x, y, norm=norm, generator=generator(seed)) for seed in (0, 1, 0))
    assert torch.equal(one, again)
    assert norm == "l1" or not torch.equal(one, two)  # dense noise is long in L1: the run from the image wins
    alone = FAB(steps=3, targets=1).minimal(model, x, y, norm=norm)
    found = model(alone).argmax(1) != y
    assert (length(one - x, norm)[found] <= length(alone - x, norm)[found] * 1.001).float().mean() > 0.9


@pytest.mark.parametrize("targets", [9, 0])
@pytest.mark.parametrize("norm", NORMS)
def test_images_wrong_already_come_back_as_they_are(norm, targets):
    model, x, y = digits()
    wrong = (model(x).argmax(1) + 1) % 10
    assert torch.equal(fab(model, x, wrong, eps=0.1, norm=norm, targets=targets), x)
    assert torch.equal(FAB(targets=targets).minimal(model, x, wrong, norm=norm), x)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [9, 0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [0.0, 1e-25, 1e12])
def test_saturated_and_flat_models_give_no_nan(norm, targets, factor):
    """Constant logits have no gradient; 10⁻²⁵ has one whose square underflows, and the boundary is found all the same."""
    net, x, y = digits()
    x, y = x[:10], y[:10]

    def model(z: Tensor) -> Tensor:
        return net(z) * factor + (0 if factor else nn.functional.one_hot(y, 10)[: len(z)])

    x_adv = FAB(steps=10, targets=targets).minimal(model, x, net(x).argmax(1) if factor else y, norm=norm)
    assert torch.isfinite(x_adv).all()
    if factor:
        assert (net(x_adv).argmax(1) != net(x).argmax(1)).float().mean() >= 0.9
    else:
        assert torch.equal(x_adv, x)


class Root(nn.Module):
    """√0 has the gradient ∞ · 0 = NaN."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        return torch.stack([h.sum(1), (h - h).abs().sqrt().sum(1) - 1, h[:, 0]], 1)


@pytest.mark.parametrize("targets", [9, 0])
def test_a_nan_gradient_is_an_error_not_robustness(targets):
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 0, 0])
    with pytest.raises(UserError, match="gradient of FAB to the images is NaN"):
        run_attack(FAB(steps=2, targets=targets), Root(), x, y, THREATS.get("linf")(eps=0.1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"restarts": 0}, "restarts: input should be greater than or equal to 1, got 0"),
        ({"targets": -1}, "targets: input should be greater than or equal to 0, got -1"),
    ],
)
def test_bad_options_are_one_line(change, says):
    model, x, y = digits()
    with pytest.raises(UserError) as caught:
        fab(model, x, y, eps=0.1, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)
