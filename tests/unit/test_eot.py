"""Expectation over transformation: means by closed form, reproducible draws, and attacks on models that draw."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clead.attacks import eot_pgd, pgd
from clead.attacks.eot import EOTPGD, expectation
from clead.attacks.gradient import value_and_gradient
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.models.seeding import fork_rng
from clead.threats.linf import Linf
from support import generator


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 4, 4, generator=generator(1)), torch.arange(count) % 3


class Noisy(nn.Module):
    """A smooth classifier of the image plus noise drawn anew, in evaluation mode too: a randomised defence."""

    def __init__(self, scale: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        with fork_rng(seed):
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.scale * torch.randn_like(x))


class Coin(nn.Module):
    """Answers w·x or −w·x at even odds, plus a weak v·x: one draw points anywhere, the mean along v."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, generator=generator(5)) * 20)
        self.v = nn.Parameter(torch.randn(16, generator=generator(6)))

    def forward(self, x: Tensor) -> Tensor:
        flip = torch.randint(2, (len(x),)) * 2 - 1
        score = (x.flatten(1) - 0.5) @ self.v + flip * ((x.flatten(1) - 0.5) @ self.w)
        return torch.stack([-score, score], 1)


def test_value_and_gradient_are_means_over_the_draws():
    """J(x) = s·Σx², s one of the numbers that the same stream gives by hand."""
    scales: list[float] = []

    def objective(x: Tensor) -> Tensor:
        scale = torch.rand(())
        scales.append(scale.item())
        return scale * x.square().flatten(1).sum(1)

    x = torch.rand(3, 1, 2, 2, generator=generator(), dtype=torch.float64)
    value, gradient = value_and_gradient(expectation(objective, 7, generator=generator(3)), x)
    assert len(set(scales)) == 7
    mean = sum(scales) / 7
    torch.testing.assert_close(value, mean * x.square().flatten(1).sum(1))
    torch.testing.assert_close(gradient, 2 * mean * x)


def test_the_mean_converges_to_the_expectation():
    """E‖x + σn‖² = ‖x‖² + dσ²."""
    x = torch.full((1, 1, 2, 2), 0.5)
    noisy = expectation(lambda z: (z + 0.1 * torch.randn_like(z)).square().flatten(1).sum(1), 4000)
    assert noisy(x).item() == pytest.approx(1 + 4 * 0.01, abs=0.01)


def test_draws_are_a_function_of_the_generator_and_leave_the_callers_stream_alone():
    def objective(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) + torch.randn(len(x))

    x, _ = images()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        mean = expectation(objective, 2, generator=generator(seed))
        runs.append((mean(x), mean(x)))
        torch.rand(1)  # whatever else the caller draws
    torch.set_rng_state(state)
    expectation(objective, 2, generator=generator())(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[0][0], runs[0][1]), "every call must draw anew"
    same = expectation(objective, 2)
    assert torch.equal(same(x), same(x))


def test_the_stream_is_restored_after_an_error():
    def fails(x: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("no")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        expectation(fails, 3, generator=generator())(images()[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_at_least_one_draw():
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        expectation(lambda x: x.flatten(1).sum(1), 0)


def test_without_randomness_it_is_pgd():
    model, (x, y) = Noisy(scale=0.0), images()
    common: dict[str, Any] = {"eps": 0.2, "steps": 5, "random_start": False}
    torch.testing.assert_close(eot_pgd(model, x, y, draws=4, **common), pgd(model, x, y, **common), atol=1e-6, rtol=0)


def mean_margin(model: Coin, x: Tensor, y: Tensor) -> Tensor:
    """The expected margin of ``Coin``, in closed form."""
    with torch.no_grad():
        return 2 * ((x.flatten(1) - 0.5) @ model.v) * (1 - 2 * y)


def test_more_draws_find_the_direction_that_one_draw_hides():
    model, x = Coin(), torch.full((16, 1, 4, 4), 0.5)
    y = torch.arange(16) % 2
    common: dict[str, Any] = {"eps": 0.1, "steps": 1, "step_size": 0.1, "random_start": False, "objective": "margin"}
    best = 2 * 0.1 * model.v.abs().sum().item()
    gains = {
        draws: mean_margin(model, eot_pgd(model, x, y, draws=draws, keep="last", **common), y).mean().item()
        for draws in (1, 2000)
    }
    assert gains[1] < 0.5 * best and gains[2000] > 0.9 * best


def test_reproducible_and_the_caller_left_alone():
    model, (x, y) = Noisy(), images()
    model.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = eot_pgd(model, x, y, eps=0.2, draws=3, steps=4)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(5)
    assert torch.equal(first, eot_pgd(model, x, y, eps=0.2, draws=3, steps=4))
    assert (first - x).abs().max() <= 0.2 + 1e-6 and first.min() >= 0 and first.max() <= 1


@pytest.mark.parametrize("change", [{"draws": 2}, {"steps": 3}, {"seed": 1}, {"keep": "last"}, {"restarts": 2}])
def test_every_option_changes_the_result(change):
    model, (x, y) = Noisy(), images()
    base: dict[str, Any] = {"eps": 0.3, "draws": 3, "steps": 5, "step_size": 0.2}
    assert not torch.equal(eot_pgd(model, x, y, **base), eot_pgd(model, x, y, **{**base, **change}))


def test_it_is_as_strong_as_torchattacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = Noisy(scale=0.2, seed=3).eval(), images(30)
    with fork_rng(0):
        theirs = torchattacks.EOTPGD(model, eps=0.1, alpha=0.03, steps=10, eot_iter=10)(x, y)
    ours = eot_pgd(model, x, y, eps=0.1, step_size=0.03, steps=10, draws=10, keep="last")

    def loss(z: Tensor) -> float:
        with fork_rng(9), torch.no_grad():
            logits = model(z.repeat(200, 1, 1, 1))
        return nn.functional.cross_entropy(logits, y.repeat(200)).item()

    assert loss(ours) >= 0.98 * loss(theirs) > loss(x)


def test_the_settings_object_attacks_too():
    model, (x, y) = Noisy(), images()
    x_adv = run_attack(EOTPGD(steps=2, draws=2), model, x, y, Linf(eps=0.1), generator=generator())
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and not torch.equal(x_adv, x)


def test_bad_draws_are_one_line():
    with pytest.raises(UserError, match="draws: input should be greater than or equal to 1, got 0"):
        eot_pgd(Noisy(), *images(), eps=0.1, draws=0)
