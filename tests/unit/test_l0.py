"""The sparse threat: projection against all subsets of pixels, PGD_0 against the greedy optimum of a linear model."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from clead.attacks import pgd
from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.settings import validated
from clead.threats.l0 import L0
from support import generator


def nearest(z: np.ndarray, x: np.ndarray, eps: int) -> float:
    """The squared distance of z to the set, by trying every choice of eps pixels, (C, H, W) each."""
    pixels = [(i, j) for i in range(z.shape[1]) for j in range(z.shape[2])]
    distances = []
    for chosen in combinations(pixels, min(eps, len(pixels))):
        point = x.copy()
        for i, j in chosen:
            point[:, i, j] = np.clip(z[:, i, j], 0, 1)
        distances.append(((point - z) ** 2).sum())
    return min(distances)


@pytest.mark.parametrize("eps", [0, 1, 2, 3, 6, 9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_projection_is_the_nearest_of_all_choices_of_pixels(eps, scale):
    rng = np.random.default_rng(int(10 * scale) + eps)
    x = rng.random((12, 3, 2, 3))
    x[:4] = rng.integers(0, 2, x[:4].shape)  # corners of the box
    z = x + scale * rng.standard_normal(x.shape)
    z[4:6] = np.round(z[4:6], 1)  # ties
    p = L0(eps=eps).project(torch.from_numpy(z), torch.from_numpy(x)).numpy()
    assert p.min() >= 0 and p.max() <= 1
    for i in range(len(x)):
        assert (p[i] != x[i]).any(0).sum() <= eps
        assert ((p[i] - z[i]) ** 2).sum() == pytest.approx(nearest(z[i], x[i], eps), abs=1e-12)


def test_the_clipped_change_alone_would_choose_the_wrong_pixel():
    """At the border the box takes the change away: a pixel far outside, whose clipped change is large, is kept before another."""
    x = torch.tensor([[[[1.0, 0.5, 0.5]]]])
    z = torch.tensor([[[[9.0, 0.9, 0.1]]]])
    assert torch.equal(L0(eps=2).project(z, x), torch.tensor([[[[1.0, 0.9, 0.1]]]]))
    z = torch.tensor([[[[1.0, 3.0, 0.0]]]])  # clipped changes are equal, but 3.0 is farther from 0.5 than its clip
    assert torch.equal(L0(eps=1).project(z, x), torch.tensor([[[[1.0, 1.0, 0.5]]]]))


def test_size_counts_a_pixel_once_whatever_its_channels():
    delta = torch.zeros(3, 3, 4, 4)
    delta[0, :, 1, 1] = 0.1
    delta[1, 0, 1, 1] = delta[1, 2, 3, 3] = -1e-6
    assert L0().distance(delta).tolist() == [1, 2, 0]
    assert L0().distance(delta).dtype == torch.float32
    assert L0().distance(torch.tensor([[0.0, 1.0, 2.0]])).tolist() == [2]  # without channels each entry is a pixel


def test_random_start_changes_eps_pixels_uniform_in_place_and_colour():
    x = torch.full((3000, 3, 2, 4), 0.5, dtype=torch.float64)
    start = L0(eps=3).random_start(x, generator=generator())
    changed = (start != x).any(1).flatten(1)
    assert (changed.sum(1) == 3).all()
    assert changed.double().mean(0).sub(3 / 8).abs().max() < 0.04
    colours = start.movedim(1, -1)[(start != x).any(1)].flatten()
    assert kstest(colours.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("eps", [1, 2, 5])
def test_ascend_gives_the_steepest_pixels_the_step_in_sum(eps):
    x = torch.full((4, 3, 3, 3), 0.5, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator(), dtype=torch.float64)
    step = L0(eps=eps).ascend(x, gradient, 0.7) - x
    assert torch.allclose(
        step / step.flatten(1).norm(dim=1)[:, None, None, None],
        torch.nn.functional.normalize(gradient.flatten(1)).view_as(x),
    )  # the direction is the gradient's
    change = step.abs().mean(1).flatten(1)
    torch.testing.assert_close(change.topk(eps).values.sum(1), torch.full((4,), 0.7, dtype=torch.float64))


def test_ascend_spends_nothing_on_pixels_at_the_border():
    x = torch.tensor([[[[1.0, 0.0, 0.5]]]])
    gradient = torch.tensor([[[[5.0, -4.0, 3.0]]]])
    torch.testing.assert_close(L0(eps=1).ascend(x, gradient, 0.2), torch.tensor([[[[1.0, 0.0, 0.7]]]]))
    stuck = L0(eps=1).ascend(x[..., :2], gradient[..., :2], 0.2)
    assert torch.equal(stuck, x[..., :2])


def linear(classes: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator(3))
    return model


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 4, 4, generator=generator(1), dtype=torch.float64)
    x[0] = 0
    return x, torch.arange(count) % 2


@pytest.mark.parametrize("eps", [1, 2, 4, 16])
def test_pgd_0_comes_near_the_best_pixels_of_a_linear_model(eps):
    """The optimum takes the eps pixels that gain most when every channel goes to its end of the box."""
    model, (x, y) = linear(), images()
    weight = model[1].weight.detach()
    w = (weight[1 - y] - weight[y]).view_as(x)
    best = (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1).flatten(1).topk(eps).values.sum(1)
    x_adv = pgd(model, x, y, eps=eps, norm="l0", steps=60, restarts=3, objective="margin", step_size=eps)
    gain = ((x_adv - x) * w).flatten(1).sum(1)
    assert ((x_adv != x).any(1).flatten(1).sum(1) <= eps).all()
    assert (gain <= best + 1e-9).all() and (gain >= 0.8 * best).all()  # the choice of pixels is a local one


def test_pgd_0_of_more_pixels_finds_more():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    x, y = images(32)
    attack = PGD(steps=20, keep="best")
    losses = []
    for eps in (0, 1, 4, 12):
        x_adv = run_attack(attack, model, x, y, L0(eps=eps), generator=generator())
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(x_adv), y).item())
    assert losses == sorted(losses) and losses[-1] > 1.4 * losses[0]


@pytest.mark.parametrize("bad", [0.5, -1, "8/255", 2.5])
def test_eps_is_a_whole_number(bad):
    with pytest.raises(UserError) as caught:
        validated(L0, {"eps": bad}, "threat")
    assert f"threat.eps: l0 eps must be a whole number ≥ 0, got {bad}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_eps_may_exceed_the_pixels():
    x, z = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(L0(eps=1000).project(z, x), z)
    assert L0(eps=1000).random_start(x, generator=generator()).shape == x.shape
    assert torch.isfinite(L0(eps=1000).ascend(x, z - x, 1.0)).all()
