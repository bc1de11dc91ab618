"""Square: its schedule, its proposals, what it spends, and its strength beside AutoAttack's."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from clead.attacks import square as square_attack
from clead.attacks.square import Square, _Bumps, _bumps, _Signs, window_fraction
from clead.errors import UserError
from clead.losses.margin import margin
from clead.threats import THREATS
from support import generator

RADII = {"linf": 0.1, "l2": 0.9, "l1": 3.0}


def images(count: int = 6, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    x = torch.rand(count, channels, height, width, generator=generator(1))
    x[0, :, : height // 2], x[1, :, height // 2 :] = 0, 1  # where the box leaves no room
    return x


def slow_fraction(p_init: float, proposal: int, queries: int) -> float:
    """The table of the paper's experiments, for 10,000 queries, with the number of the proposal stretched to it."""
    place = math.floor(proposal * 10_000 / queries)
    table = [(10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256)]
    return next((p_init / divisor for last, divisor in table if place <= last), p_init / 512)


@pytest.mark.parametrize("queries", [20, 500, 5000, 10_000, 20_000])
def test_windows_shrink_as_in_the_paper(queries):
    given = [window_fraction(0.8, n, queries) for n in range(queries)]
    assert given == [slow_fraction(0.8, n, queries) for n in range(queries)]
    assert given == sorted(given, reverse=True) and given[0] == 0.8


@pytest.mark.parametrize(("power", "order"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 11])
def test_bumps_are_the_papers_sum(side, power, order):
    """Equation 2 pixel by pixel, counted from 1 as there: η_{r,s} = Σ_{k=0}^{M} 1/(n+1−k)², M = n − max-distance to the centre."""

    def bump(height: int) -> Tensor:
        n, value = max(height // 2, side // 2), torch.zeros(height, side, dtype=torch.float64)
        for r in range(1, height + 1):
            for s in range(1, side + 1):
                most = n - max(abs(r - height // 2 - 1), abs(s - side // 2 - 1))
                value[r - 1, s - 1] = sum(1 / (n + 1 - k) ** power for k in range(most + 1))
        return value / max(float((value**order).sum() ** (1 / order)), 1e-30)

    pair = torch.cat([bump(side // 2), -bump(side - side // 2)])
    pair /= (pair.abs() ** order).sum() ** (1 / order)
    torch.testing.assert_close(_bumps(side, power, order), torch.stack([pair, pair.T]))


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (3, 1, 5, 9), (2, 2, 1, 1), (2, 1, 2, 3)])
def test_every_proposal_lies_in_the_set_and_changes_windows_only(norm, shape):
    x, threat = images(*shape), THREATS.get(norm)(eps=RADII[norm])
    moves = (_Signs if norm == "linf" else _Bumps)(torch.nn.Flatten(), x, threat, generator())
    luck = generator(5)
    for proposal in range(60):
        fraction = window_fraction(0.8, proposal, 60)
        before = moves.best.clone()
        moves.propose(fraction)
        change = moves.best - before
        assert moves.best.min() >= 0 and moves.best.max() <= 1
        assert (threat.distance(moves.best - x) <= threat.eps * (1 + 1e-5) + 1e-6).all()
        touched = (change != 0).any(1).flatten(1).sum(1)
        side = max(round(math.sqrt(fraction * shape[2] * shape[3])), 1)
        if norm == "linf":
            assert (touched > 0).all(), "a query that asks what is known already"
            rows, columns = ((change != 0).any(1).any(axis) for axis in (2, 1))
            assert (touched <= min(side, *shape[2:]) ** 2).all()
            for line in (*rows, *columns):
                places = line.nonzero()[:, 0]
                assert places[-1] - places[0] < side
        elif norm == "l2":
            side = min(max(side, 3) // 2 * 2 + 1, *shape[2:])
            assert (touched <= 2 * side**2).all()
        better = torch.rand(len(x), generator=luck) < 0.3
        proposed = moves.best.clone()
        moves.settle(better)
        assert torch.equal(moves.best[better], proposed[better]) and torch.equal(moves.best[~better], before[~better])


def test_windows_reach_every_pixel():
    moves = _Signs(torch.nn.Flatten(), images(2, 1, 4, 4), THREATS.get("linf")(eps=0.05), generator())
    before, share = moves.best.clone(), torch.zeros(4, 4)
    for _ in range(500):
        moves.propose(1 / 16)
        share += (moves.best != before).float().mean((0, 1)) / 500
        moves.settle(torch.tensor([False, False]))
    torch.testing.assert_close(share, torch.full((4, 4), 1 / 16), atol=0.04, rtol=0)


class Toy:
    """A function that is no module: K logits of fixed random features; notes every image it is asked."""

    def __init__(self, classes: int = 4, pixels: int = 192, bias: float = 0.0) -> None:
        self.weight = torch.randn(pixels, classes, generator=generator(2))
        self.bias = torch.zeros(classes)
        self.bias[0] = bias
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return torch.tanh(x.flatten(1) - 0.5) @ self.weight + self.bias


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("restarts", [1, 2])
def test_no_image_gets_more_than_its_queries(norm, restarts):
    """A model that cannot be broken is asked exactly so often; each image that falls leaves at once."""
    x, y, threat = images(), torch.zeros(6, dtype=torch.int64), THREATS.get(norm)(eps=RADII[norm])
    held = Toy(bias=1e4)
    x_adv = Square(queries=30, restarts=restarts).perturb(held, x, y, threat, generator=generator())
    assert torch.equal(x_adv, x)
    assert [len(z) for z in held.asked] == [6] * (1 + 29 * restarts)
    falling = Toy(bias=12.0)
    x_adv = Square(queries=30, restarts=restarts).perturb(falling, x, y, threat, generator=generator())
    counts = [len(z) for z in falling.asked]
    stands = margin(falling(x_adv), y) <= 0
    assert counts == sorted(counts, reverse=True) and counts[-1] >= int(stands.sum())
    assert torch.equal(x_adv[stands], x[stands])


@pytest.mark.parametrize("norm", RADII)
def test_the_margin_never_falls(norm):
    """Recorded after each decision: what is kept is at least as near to a mistake as what was kept before."""
    x, y, threat = images(), torch.zeros(6, dtype=torch.int64), THREATS.get(norm)(eps=RADII[norm])
    model = Toy(bias=1e4)
    moves = (_Signs if norm == "linf" else _Bumps)(torch.nn.Flatten(), x, threat, generator())
    value = start = margin(model(moves.best), y)
    for proposal in range(80):
        moves.propose(window_fraction(0.8, proposal, 80))
        new = margin(model(moves.best), y)
        better = new > value
        value = torch.where(better, new, value)
        moves.settle(better)
        torch.testing.assert_close(margin(model(moves.best), y), value, atol=2e-3, rtol=0)
    assert (value > start).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_linear_black_box_is_broken_where_the_optimum_is_known(channels):
    """Two classes, z₁ − z₀ = w·x − b: L∞ moves it by at most eps·Σ|w|. Just inside that the search finds it, just outside never."""
    eps, pixels = 0.1, channels * 36
    w = torch.randn(pixels, generator=generator(3))
    x = 0.3 + 0.4 * torch.rand(8, channels, 6, 6, generator=generator(4))
    most = x.flatten(1) @ w + eps * w.abs().sum()
    y = torch.zeros(8, dtype=torch.int64)
    for share, found in ((0.15, True), (-0.001, False)):
        border = most - share * eps * w.abs().sum()

        def model(z: Tensor) -> Tensor:
            places = (z[:, None] - x[None]).flatten(2).abs().amax(2).argmin(1)  # which image it is a copy of
            return torch.stack([border[places], z.flatten(1) @ w], 1)  # noqa: B023  (called in this iteration only)

        x_adv = Square(queries=1500).perturb(model, x, y, THREATS.get("linf")(eps=eps), generator=generator())
        assert (model(x_adv).argmax(1) == 1).all() == found
        assert torch.equal(x_adv, x) != found
        assert (x_adv - x).abs().max() <= eps + 1e-6


@pytest.mark.parametrize("norm", RADII)
def test_where_the_answer_is_nan_the_search_has_found_something(norm):
    def model(z: Tensor) -> Tensor:
        logits = torch.stack([z.flatten(1).sum(1) * 0 + 1, z.flatten(1).sum(1) * 0], 1)
        return torch.where((z == z0).flatten(1).all(1)[:, None], logits, torch.nan)

    z0 = images(2)[:1]
    x_adv = Square(queries=5).perturb(
        model, z0, torch.tensor([0]), THREATS.get(norm)(eps=RADII[norm]), generator=generator()
    )
    assert model(x_adv).isnan().all()


@pytest.mark.parametrize("norm", RADII)
def test_an_images_luck_does_not_depend_on_who_falls_before(norm):
    """The same images, once with neighbours that fall on the way and once with neighbours that are wrong from the beginning on."""
    x, y, threat = images(8), torch.zeros(8, dtype=torch.int64), THREATS.get(norm)(eps=RADII[norm])
    bias = torch.tensor([12.0, 1e4] * 4)

    def held(z: Tensor) -> Tensor:
        place = (z[:, None] - x[None]).flatten(2).square().sum(2).argmin(1)
        return toy(z) + torch.nn.functional.one_hot(torch.zeros_like(place), 4) * bias[place][:, None]

    toy = Toy()
    kind = _Signs if norm == "linf" else _Bumps
    ends = []
    for leaving in (3, 9):
        moves, value = kind(held, x, threat, generator()), None
        for proposal in range(20):
            if proposal == leaving:
                moves.keep(torch.arange(len(moves.x)) % 2 == 1)
                value = value[1::2]
            value = margin(held(moves.best), y[: len(moves.x)]) if value is None else value
            moves.propose(window_fraction(0.8, proposal, 20))
            new = margin(held(moves.best), y[: len(moves.x)])
            moves.settle(new > value)
            value = torch.maximum(new, value)
        ends.append(moves.best)
    assert torch.equal(*ends)


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(6):
            for batch in torch.randperm(1500).split(64):
                z = x[batch].requires_grad_()
                (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y[batch]), z)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model((z + 0.1 * slope.sign()).detach().clamp(0, 1)), y[batch]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False), x[1500:1650], y[1500:1650]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    return digits()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.9), ("l1", 2.0)])
def test_as_strong_as_autoattacks_square(trained, norm, eps):
    """At most a few images more are left than by pyautoattack's; here far fewer, as its queries on grey images are often idle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyautoattack.square import SquareAttack
    model, x, y = trained
    peer = SquareAttack(model, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], n_queries=400, eps=eps, seed=0)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model(peer.perturb(x, y)).argmax(1) == y
    ours = model(square_attack(model, x, y, eps=eps, norm=norm, queries=400)).argmax(1) == y
    assert 30 < theirs.sum() < 110, "not in the middle: says nothing"
    assert ours.sum() <= theirs.sum() + 3
    assert (ours & ~theirs).sum() <= 6


def test_more_queries_and_restarts_break_more(trained):
    model, x, y = trained
    left = [
        int((model(square_attack(model, x, y, eps=0.12, **effort)).argmax(1) == y).sum())
        for effort in ({"queries": 20}, {"queries": 100}, {"queries": 100, "restarts": 3})
    ]
    assert left[0] > left[1] > left[2]


def test_two_classes_and_a_seed(trained):
    model, x, y = trained

    class Even(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            logits = model(z)
            return torch.stack([logits[:, ::2].logsumexp(1), logits[:, 1::2].logsumexp(1)], 1)

    first, again, other = (square_attack(Even(), x, y % 2, eps=0.15, queries=100, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    before, after = ((Even()(z).argmax(1) == y % 2).float().mean() for z in (x, first))
    assert after < before - 0.1


@pytest.mark.parametrize("change", [{"queries": 40}, {"p_init": 0.3}, {"restarts": 2}, {"seed": 1}, {"eps": 0.2}])
def test_every_option_changes_the_result(trained, change):
    model, x, y = trained
    base = {"eps": 0.12, "queries": 60}
    assert not torch.equal(square_attack(model, x, y, **base), square_attack(model, x, y, **{**base, **change}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"queries": 1}, "queries: input should be greater than or equal to 2, got 1"),
        ({"p_init": 0}, "p_init: input should be greater than 0, got 0"),
        ({"p_init": 1.5}, "p_init: input should be less than or equal to 1, got 1.5"),
        ({"restarts": 0}, "restarts: input should be greater than or equal to 1, got 0"),
    ],
)
def test_bad_options_are_one_line(trained, change, says):
    model, x, y = trained
    with pytest.raises(UserError) as caught:
        square_attack(model, x, y, eps=0.1, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)
