"""The projections against slow float64 oracles, and each norm's own steepest ascent; what all threats share is in contract/."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from clead.errors import UserError
from clead.settings import validated
from clead.threats import THREATS
from clead.threats.geometry import contains
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf


def by_bisection(z: np.ndarray, x: np.ndarray, eps: float, norm: str) -> np.ndarray:
    """The minimiser of the Lagrangian in closed form per pixel; the multiplier by bisection until float64 ends."""

    def point(multiplier: float) -> np.ndarray:
        d = z - x
        if norm == "l2":
            return np.clip(x + d / (1 + multiplier), 0, 1)
        return np.clip(x + np.sign(d) * np.maximum(np.abs(d) - multiplier, 0), 0, 1)

    def size(p: np.ndarray) -> float:
        return float(np.abs(p - x).sum() if norm == "l1" else np.sqrt(((p - x) ** 2).sum()))

    if size(point(0)) <= eps:
        return point(0)
    low, high = 0.0, 1.0
    while size(point(high)) > eps:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if size(point(middle)) > eps else (low, middle)
    return point(high)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("eps", [1e-3, 0.2, 1.0, 2.5])
@pytest.mark.parametrize("scale", [0.01, 0.5, 5.0])
def test_projection_equals_bisection_on_the_dual(norm, eps, scale):
    rng = np.random.default_rng(int(1000 * eps + 10 * scale))
    x = rng.random((20, 1, 4, 5))
    x[:5] = rng.integers(0, 2, x[:5].shape)  # corners of the box
    z = x + scale * rng.standard_normal(x.shape)
    z[5:8] = np.round(z[5:8], 1)  # ties
    expected = np.stack([by_bisection(a, b, eps, norm) for a, b in zip(z, x, strict=True)])
    actual = THREATS.get(norm)(eps=eps).project(torch.from_numpy(z), torch.from_numpy(x))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-9)


def test_l1_projection_has_a_linear_programming_certificate():
    """No vertex of ball ∩ box has a larger inner product with z − p than p itself."""
    rng = np.random.default_rng(0)
    for eps in (0.3, 1.2):
        x, z = rng.random(6), 3 * rng.random(6) - 1
        p = L1(eps=eps).project(torch.from_numpy(z)[None], torch.from_numpy(x)[None])[0].numpy()
        outward = z - p
        # δ = u − v, 0 ≤ u ≤ 1 − x, 0 ≤ v ≤ x, Σ(u + v) ≤ eps
        bounds = [(0, 1 - value) for value in x] + [(0, value) for value in x]
        best = linprog(np.r_[-outward, outward], A_ub=np.ones((1, 12)), b_ub=[eps], bounds=bounds)
        assert -best.fun == pytest.approx(outward @ (p - x), abs=1e-9)


def test_l2_projection_equals_a_general_solver():
    rng = np.random.default_rng(1)
    for _ in range(4):
        x, z = rng.random(4), 3 * rng.random(4) - 1
        inside = {"type": "ineq", "fun": lambda p, x=x: 0.36 - ((p - x) ** 2).sum()}
        solved = minimize(
            lambda p, z=z: ((p - z) ** 2).sum(), x, bounds=[(0, 1)] * 4, constraints=[inside], options={"ftol": 1e-14}
        )
        p = L2(eps=0.6).project(torch.from_numpy(z)[None], torch.from_numpy(x)[None])[0]
        np.testing.assert_allclose(p.numpy(), solved.x, atol=1e-5)


def test_linf_projection_is_two_clips():
    rng = np.random.default_rng(2)
    x, z = rng.random((4, 1, 3, 3)), 3 * rng.random((4, 1, 3, 3)) - 1
    expected = np.clip(z, np.maximum(x - 0.2, 0), np.minimum(x + 0.2, 1))
    actual = Linf(eps=0.2).project(torch.from_numpy(z), torch.from_numpy(x))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-15)


def test_each_image_is_projected_by_itself():
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = x + torch.linspace(0.01, 3, 5, dtype=torch.float64)[:, None, None, None] * torch.sin(100 * x)
    for name in THREATS.names():
        threat = THREATS.get(name)(eps=2 if name == "l0" else 0.4)
        together = threat.project(z, x)
        alone = torch.cat([threat.project(z[i : i + 1], x[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, atol=1e-14, rtol=0)


def test_ascent_of_a_linear_objective_is_the_dual_norm():
    """max of w·δ over a ball of radius s is s · (dual norm of w): L1 for L∞, L2 for L2, L∞ for L1 (one pixel)."""
    w = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, s = torch.full_like(w, 0.5), 0.01
    for threat, order in ((Linf(), 1), (L2(), 2), (L1(sparsity=1 / 16), torch.inf)):
        gain = ((threat.ascend(x, w, s) - x) * w).flatten(1).sum(1)
        torch.testing.assert_close(gain, s * torch.linalg.vector_norm(w.flatten(1), ord=order, dim=1))


def test_l1_ascent_spreads_over_the_steepest_fraction():
    w = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0, 0.5, 0.2, 0.1]])
    x = torch.full_like(w, 0.5)
    step = L1(sparsity=0.25).ascend(x, w, 0.2) - x
    torch.testing.assert_close(step, torch.tensor([[0.1, -0.1, 0, 0, 0, 0, 0, 0]]))


def test_l1_ascent_skips_pixels_at_the_border():
    w = torch.tensor([[5.0, -4.0, 3.0, -2.0]])
    x = torch.tensor([[1.0, 0.0, 0.5, 0.5]])
    step = L1(sparsity=0.5).ascend(x, w, 0.2) - x
    torch.testing.assert_close(step, torch.tensor([[0, 0, 0.1, -0.1]]))


@pytest.mark.parametrize(
    ("norm", "eps", "remedy"),
    [
        ("linf", 8, "linf eps must be in [0, 1] because pixels are, got 8; did you mean 8/255?"),
        ("linf", "4", "did you mean 4/255?"),
        ("l2", 128, "did you mean 128/255?"),
        ("l1", 3060, "did you mean 3060/255?"),
    ],
)
def test_eps_in_255ths_is_recognised(norm, eps, remedy):
    with pytest.raises(UserError) as caught:
        validated(THREATS.get(norm), {"eps": eps}, "threat")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "510/255"), ("linf", -1), ("linf", 256), ("l2", -1), ("l1", 1e9)])
def test_no_remedy_is_invented(norm, eps):
    with pytest.raises(UserError) as caught:
        validated(THREATS.get(norm), {"eps": eps})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["linf", "l2", "l1", "l0"])
def test_contains_is_eps_and_the_box_to_rounding(name):
    threat = THREATS.get(name)(eps=2 if name == "l0" else 0.25)
    x = torch.full((5, 1, 2, 2), 0.9)
    steps = torch.zeros_like(x)
    steps[0, 0, 0, 0] = -0.25  # on the edge
    steps[1, 0, 0, 0] = -0.2502 if name != "l0" else -0.1
    steps[1, 0, 0, 1] = steps[1, 0, 1, 0] = -0.1 if name == "l0" else 0  # outside
    steps[2, 0, 0, 0] = 0.101  # out of the box
    steps[3, 0, 0, 0] = torch.nan
    assert contains(threat, x + steps, x).tolist() == [True, False, False, False, True]
    assert contains(threat, (x + steps)[:1].half(), x[:1].half()).all()
