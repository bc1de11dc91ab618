"""RayS: the points it asks about, what it spends, that it sees labels only, and its strength where the optimum is known."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import pytest
import torch
from torch import Tensor, nn

from clead.attacks import rays as rays_attack
from clead.attacks.rays import RayS, _Rays
from clead.errors import UserError
from clead.threats.linf import Linf
from support import generator


def images(count: int = 6, channels: int = 2, height: int = 3, width: int = 3) -> Tensor:
    x = torch.rand(count, channels, height, width, generator=generator(1), dtype=torch.float64)
    x[0, :, 0], x[1, :, 1] = 0, 1  # where the box leaves no room
    return x


class Curved:
    """A function that is no module: 5 logits of bent features; notes every image it is asked."""

    def __init__(self, pixels: int = 18) -> None:
        self.weight = torch.randn(pixels, 5, generator=generator(2), dtype=torch.float64)
        self.asked: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.asked.append(z.clone())
        return torch.sin(3 * z.flatten(1)) @ self.weight


def labels(x: Tensor) -> Tensor:
    return Curved()(x).argmax(1)


def starts(size: int, seed: int) -> Iterator[Tensor]:
    yield torch.ones(size).double()
    draws = generator(seed)
    while True:
        yield torch.where(torch.rand(1, size, generator=draws)[0] < 0.5, -1, 1).double()


def slow_rays(size: int, eps: float, seed: int) -> Generator[tuple[float, Tensor], bool, None]:
    """The paper's search of one image, with loops; yields radius and signs to ask about, is sent whether that is wrong."""
    lengths = [0, *(math.ceil(size / 2**level) for level in range(math.ceil(math.log2(size)) + 1))]
    assert lengths[-1] == 1 < lengths[-2]
    for signs in starts(size, seed):
        best, sweep, improved = math.inf, 0, True
        while improved or sweep < len(lengths):
            length, improved = lengths[min(sweep, len(lengths) - 1)], False
            for begin in range(0, size, length) if length else [0]:
                trial = signs.clone()
                trial[begin : begin + length] *= -1
                high = min(best, 1.0)
                if not (yield high, trial):
                    continue
                yield eps, trial  # whoever asks leaves if it is wrong
                low = eps
                while high - low > 1e-3 / math.sqrt(size):
                    middle = (low + high) / 2
                    if (yield middle, trial):
                        high = middle
                    else:
                        low = middle
                if high < best:
                    best, signs, improved = high, trial, True
            sweep += 1


def slow(x: Tensor, label: int, eps: float, queries: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Everything that is asked about one image, (C, H, W), and what is found."""
    model, asked, search, wrong = Curved(), [x], slow_rays(x.numel(), eps, seed), None
    if model(x[None]).argmax().item() != label:
        return asked, x
    while len(asked) < queries:
        radius, signs = search.send(wrong)
        point = (x + radius * signs.view_as(x)).clamp(0, 1)
        asked.append(point)
        wrong = model(point[None]).argmax().item() != label
        if wrong and radius <= eps:
            return asked, point
    return asked, x


@pytest.mark.slow
@pytest.mark.parametrize(("eps", "queries"), [(1e-4, 900), (0.04, 400), (0.1, 60), (0.5, 60), (1.0, 5)])
def test_one_image_at_a_time_it_asks_what_the_paper_asks(eps, queries):
    """In double precision, value for value: levels, fast check, binary search, start after start."""
    x = images()
    y, founds = labels(x), []
    for image, label in zip(x, y.tolist(), strict=True):
        model = Curved()
        x_adv = RayS(queries=queries).perturb(
            model, image[None], torch.tensor([label]), Linf(eps=eps), generator=generator()
        )
        expected, found = slow(image, label, eps, queries)
        assert torch.equal(torch.cat(model.asked), torch.stack(expected))
        assert torch.equal(x_adv[0], found)
        founds.append(found)
    broken = int((torch.stack(founds) != x).flatten(1).any(1).sum())
    assert (broken == 0) == (eps < 0.01)  # else the comparison says nothing
    # Together, until one of them draws, they are found as they are one by one, and at the same cost.
    if eps > 0.05:
        model = Curved()
        together = RayS(queries=queries).perturb(model, x, y, Linf(eps=eps), generator=generator())
        assert torch.equal(together, torch.stack(founds))
        spent = sum(len(slow(image, label, eps, queries)[0]) for image, label in zip(x, y.tolist(), strict=True))
        assert sum(len(z) for z in model.asked) == spent


@pytest.mark.parametrize("queries", [2, 3, 40, 300])
def test_no_image_gets_more_than_its_queries(queries):
    """A model that cannot be broken is asked exactly so often; each image that falls leaves at once."""
    x = images()
    held: list[int] = []

    def constant(z: Tensor) -> Tensor:
        held.append(len(z))
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    x_adv = RayS(queries=queries).perturb(constant, x, torch.zeros(6).long(), Linf(eps=0.1), generator=generator())
    assert torch.equal(x_adv, x) and held == [6] * queries
    falling = Curved()
    x_adv = RayS(queries=queries).perturb(falling, x, labels(x), Linf(eps=0.04), generator=generator())
    counts = [len(z) for z in falling.asked]
    stands = int((labels(x_adv) == labels(x)).sum())
    assert counts == sorted(counts, reverse=True) and len(counts) <= queries
    assert 0 < stands < 6 or queries < 40
    assert stands == 0 or len(counts) == queries
    wrong = Curved()
    x_adv = RayS(queries=queries).perturb(wrong, x, (labels(x) + 1) % 5, Linf(eps=0.06), generator=generator())
    assert torch.equal(x_adv, x) and [len(z) for z in wrong.asked] == [6]


class Sum(nn.Module):
    """Logits 0 and w·x − b."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x: Tensor) -> Tensor:
        value = x.flatten(1) @ self.w - self.b
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 5), (1, 1, 1), (2, 1, 3)])
def test_a_linear_model_is_broken_where_the_distance_is_known(shape):
    """Two classes: the distance in L∞ is |w·x − b| / Σ|w|. A hundredth above that the search finds it, just below never."""
    w = torch.randn(math.prod(shape), generator=generator(3))
    x = 0.3 + 0.4 * torch.rand(4, *shape, generator=generator(4))
    for image in x.split(1):
        distance = 0.05
        model = Sum(w, image.flatten() @ w + distance * w.abs().sum())
        for share, found in ((1.01, True), (0.999, False)):
            x_adv = rays_attack(model, image, torch.tensor([0]), eps=share * distance, queries=1000)
            assert (model(x_adv).argmax(1) == 1).all() == found
            assert torch.equal(x_adv, image) != found
            assert (x_adv - image).abs().max() <= share * distance + 1e-6


def test_many_classes_are_never_broken_below_their_distance():
    """min_k (z_y − z_k) / Σ|w_y − w_k|; what is found lies in the box and in the ball, though half the values are at its border."""
    x = torch.rand(60, 1, 4, 4, generator=generator(5)).mul(2).sub(0.5).clamp(0, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(4, 16, generator=generator(6)))
        net[1].bias.zero_()
        logits = net(x)
        y = logits.argmax(1)
        apart = (net[1].weight[y][:, None] - net[1].weight).abs().sum(2)
        distance = ((logits.gather(1, y[:, None]) - logits) / apart.clamp_min(1e-9)).scatter(1, y[:, None], torch.inf)
        distance = distance.amin(1)
        eps = float(distance.median())
        x_adv = rays_attack(net, x, y, eps=eps, queries=500)
        broken = net(x_adv).argmax(1) != y
    assert not broken[distance > eps * 1.0001].any() and 5 < int(broken.sum()) < 31
    assert torch.equal(x_adv[~broken], x[~broken])
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("change", ["steeper", "odd", "labels"])
def test_nothing_but_the_label_is_used(change):
    """Logits of another scale, bent by an increasing function, or nothing but the largest one's place: bit for bit the same."""

    def other(z: Tensor) -> Tensor:
        logits = model(z)
        if change == "steeper":
            return logits * (1 + 100 * z.flatten(1).sum(1, keepdim=True)) - 7
        if change == "odd":
            return (logits / 10).sinh() + logits**3
        return nn.functional.one_hot(logits.argmax(1), 5).to(z) * 1e-30

    x, model = images(40), Curved()
    y = labels(x)
    found = RayS(queries=300).perturb(model, x, y, Linf(eps=0.05), generator=generator())
    asked, model.asked = model.asked, []
    again = RayS(queries=300).perturb(other, x, y, Linf(eps=0.05), generator=generator())
    assert 5 < int((found != x).flatten(1).any(1).sum()) < 35
    assert torch.equal(again, found) and torch.equal(torch.cat(model.asked), torch.cat(asked))


@pytest.mark.parametrize("one", [True, False])
def test_where_the_answer_is_nan_the_search_has_found_something(one):
    """Argmax takes NaN for the largest: where all are NaN, it would pass for the right answer 0."""

    def model(z: Tensor) -> Tensor:
        logits = torch.tensor([[1.0, 0.0]]).repeat(len(z), 1)
        moved = (z != x).flatten(1).any(1)
        logits[moved, 1] = torch.nan
        return logits if one else torch.where(moved[:, None], torch.nan, logits)

    x = images(2)[:1]
    x_adv = RayS(queries=5).perturb(model, x, torch.tensor([0]), Linf(eps=0.1), generator=generator())
    assert model(x_adv).isnan().any() and (x_adv - x).abs().max() <= 0.1 + 1e-6
    nan = RayS(queries=5).perturb(lambda z: torch.full((len(z), 2), torch.nan), x, torch.tensor([0]), Linf(eps=0.1))
    assert torch.equal(nan, x)  # wrong without an attack


def test_the_seed_decides_where_a_search_that_is_stuck_begins_again():
    x = images(2)
    asked = []
    for seed in (0, 0, 1):
        model = Curved()
        RayS(queries=900).perturb(model, x, labels(x), Linf(eps=1e-4), generator=generator(seed))
        asked.append(torch.stack(model.asked))
    assert torch.equal(asked[0], asked[1])
    same = (asked[0] == asked[2]).flatten(1).all(1)
    assert same[:100].all() and not same[-100:].any()
    state = torch.get_rng_state()
    RayS(queries=900).perturb(Curved(), x, labels(x), Linf(eps=1e-4), generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_images_luck_does_not_depend_on_who_falls_before():
    """The same images, whose neighbours fall early or late; both groups begin again several times."""
    x, ends = images(8), []
    y = labels(x)
    for leaving in (3, 1700):
        state, model, here = _Rays(x, 1e-4, generator()), Curved(), torch.arange(8)
        for step in range(2000):
            wrong = model(state.points()).argmax(1) != y[here]
            if step == leaving:
                odd = here % 2 == 1
                state.keep(odd)
                here, wrong = here[odd], wrong[odd]
            state.settle(wrong)
        assert (state.starts > 1).all()
        ends.append((state.signs, state.radius))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 2, 2), (3, 1, 3), (1, 8, 8)])
def test_every_value_is_turned_in_every_level(shape):
    """Where nothing is ever wrong: the blocks of each level are disjoint and cover all, their sides as the paper halves them."""
    size = math.prod(shape)
    x, asked = torch.full((1, *shape), 0.5), []

    def constant(z: Tensor) -> Tensor:
        asked.append(z.flatten())
        return torch.tensor([[1.0, 0.0]])

    lengths = [math.ceil(size / 2**level) for level in range(math.ceil(math.log2(size)) + 1)]
    blocks = sum(math.ceil(size / length) for length in lengths)
    RayS(queries=2 + blocks).perturb(constant, x, torch.tensor([0]), Linf(eps=0.1), generator=generator())
    turned = [point != asked[1] for point in asked[2:]]  # corners of the box: the first signs are all 1
    assert torch.equal(asked[1], torch.ones(size)) and len(turned) == blocks
    for length in lengths:
        level, turned = turned[: math.ceil(size / length)], turned[math.ceil(size / length) :]
        assert torch.equal(torch.stack(level).sum(0), torch.ones(size).long())
        assert max(int(block.sum()) for block in level) == length


def test_more_queries_break_more():
    x = images(60)
    y = labels(x)
    left = [
        int((labels(RayS(queries=n).perturb(Curved(), x, y, Linf(eps=0.05), generator=generator())) == y).sum())
        for n in (20, 60, 400)
    ]
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"queries": 1}, "queries: input should be greater than or equal to 2, got 1"),
        ({"norm": "l2"}, "RayS is an attack for linf, got l2"),
        ({"eps": 8}, "did you mean 8/255?"),
    ],
)
def test_bad_options_are_one_line(change, says):
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(UserError) as caught:
        rays_attack(Sum(torch.ones(4), torch.tensor(3.0)), x, torch.tensor([0]), **{"eps": 0.1, **change})
    assert says in str(caught.value) and "\n" not in str(caught.value)
