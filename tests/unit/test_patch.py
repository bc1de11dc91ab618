"""The patch attack: geometry by loops, the optimum of linear models by brute force, its options and mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clead.attacks import patch
from clead.attacks.patch import Patch, cut, paste
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.models.seeding import fork_rng
from support import generator


def images(count: int = 6, channels: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(count, channels, height, width, generator=generator(1), dtype=torch.float64)


def linear(pixels: int, bias: float, seed: int = 0) -> nn.Module:
    """Two classes; the bias of class 0 decides how hard the images hold."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2)).double()
    with torch.no_grad():
        model[1].weight.normal_(generator=generator(seed))
        model[1].bias.copy_(torch.tensor([bias, 0.0]))
    return model


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x).argmax(1)


@settings(max_examples=30, deadline=None)
@given(side=st.integers(1, 5), seed=st.integers(0, 99))
def test_paste_and_cut_by_loops(side, seed):
    g = generator(seed)
    x, content = torch.rand(4, 3, 6, 5, generator=g), torch.rand(4, 3, side, side, generator=g)
    place = torch.stack(
        [torch.randint(0, 6 - side + 1, (4,), generator=g), torch.randint(0, 5 - side + 1, (4,), generator=g)], 1
    )
    pasted = paste(x, content, place)
    for i, (top, left) in enumerate(place.tolist()):
        expected = x[i].clone()
        expected[:, top : top + side, left : left + side] = content[i]
        assert torch.equal(pasted[i], expected)
    assert torch.equal(cut(pasted, place, side), content)


def best_gain(weight: Tensor, x: Tensor, side: int) -> float:
    """max over places of Σ over the window of w·δ, each pixel at 0 or 1; weight and x (C, H, W)."""
    gain = torch.where(weight > 0, weight * (1 - x), -weight * x).sum(0)
    tops, lefts = range(gain.shape[0] - side + 1), range(gain.shape[1] - side + 1)
    return max(gain[t : t + side, l : l + side].sum().item() for t in tops for l in lefts)  # noqa: E741


def test_it_finds_the_best_window_of_a_linear_model():
    """The bias holds every image, so the search runs to its end: the best place and content are known."""
    model, x = linear(128, bias=1000.0), images()
    y = torch.zeros(6, dtype=torch.int64)
    x_adv = patch(model, x, y, size=3, steps=30, stride=1, restarts=40, step_size=0.1)
    slope = (model[1].weight[1] - model[1].weight[0]).detach().view(2, 8, 8)
    for i in range(6):
        gain = (slope * (x_adv[i] - x[i])).sum().item()
        best = best_gain(slope, x[i], 3)
        assert best * 0.9 <= gain <= best + 1e-9


def test_one_patch_as_large_as_the_image_reaches_the_corner_of_the_box():
    model, x = linear(128, bias=1000.0), images()
    x_adv = patch(model, x, torch.zeros(6, dtype=torch.int64), size=8, steps=30, restarts=1)
    slope = (model[1].weight[1] - model[1].weight[0]).detach().view(2, 8, 8)
    assert torch.equal(x_adv, (slope > 0).double().expand_as(x))


def test_the_patch_climbs_to_the_best_place_of_a_slope():
    """Every pixel weighs its row plus its column: a moving patch ends white in the last corner, a fixed one where it began."""
    model, x = linear(128, bias=1000.0), torch.full((6, 2, 8, 8), 0.3, dtype=torch.float64)
    slope = (torch.arange(8.0)[:, None] + torch.arange(8.0)).expand(2, 8, 8)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(128), slope.flatten()]))
    y = torch.zeros(6, dtype=torch.int64)
    corner = x.clone()
    corner[:, :, 5:, 5:] = 1
    assert torch.equal(patch(model, x, y, size=3, steps=100, stride=1, restarts=1), corner)
    fixed = patch(model, x, y, size=3, steps=100, stride=0, restarts=1)
    assert ((fixed - x).abs().flatten(1).amax(1) > 0).all() and not (fixed == corner).flatten(1).all(1).any()


def test_images_that_fall_leave_and_the_rest_are_attacked_on():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear(128, bias=20.0)
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            return self.inner(x)

    model, x = Counts(), images(20)
    y = predicted(model, x)
    model.seen.clear()
    x_adv = patch(model, x, y, size=5, steps=10, restarts=3)
    fell = predicted(model, x_adv) != y
    assert 0 < fell.sum() < 20
    model.seen.pop()
    assert model.seen[:3] == [1, 20, 20] and model.seen[-1] == 20 - fell.sum()
    assert model.seen == sorted(model.seen[1:], reverse=True)[:0] + [1, *sorted(model.seen[1:], reverse=True)]


def test_a_convolutional_network_falls_to_a_larger_patch_sooner():
    with fork_rng(0):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x = torch.rand(40, 3, 8, 8, generator=generator(3))
    y = predicted(model, x)
    fallen = []
    for size in (1, 2, 5):
        attack = Patch(size=size, steps=10, restarts=2)
        x_adv = run_attack(attack, model, x, y, None)
        assert attack.allows(x_adv, x).all()
        fallen.append(int((predicted(model, x_adv) != y).sum()))
    assert fallen[0] < fallen[1] < fallen[2]


@pytest.mark.parametrize(
    ("size", "height", "width", "side"),
    [
        ("1/16", 32, 32, 8),
        (0.0625, 28, 28, 7),
        (0.5, 8, 8, 6),
        (1, 8, 8, 1),
        (5, 8, 8, 5),
        ("8", 8, 12, 8),
        (1e-4, 8, 8, 1),
    ],
)
def test_size_is_an_area_or_a_side(size, height, width, side):
    assert Patch(size=size).side(height, width) == side


def test_allows_measures_the_square():
    x = torch.zeros(6, 2, 7, 9)
    x_adv = x.clone()
    x_adv[1, 0, 2, 3] = 1
    x_adv[2, 1, 4:7, 6:9] = 1
    x_adv[3, 0, 0, 0] = x_adv[3, 1, 2, 2] = 1
    x_adv[4, 0, 0, 0] = x_adv[4, 1, 3, 0] = 1  # four rows
    x_adv[5, 0, 0, 0] = x_adv[5, 1, 0, 3] = 1  # four columns
    assert Patch(size=3).allows(x_adv, x).tolist() == [True, True, True, True, False, False]


def test_more_steps_and_restarts_are_never_worse():
    model, x = linear(128, bias=1000.0), images()
    y = torch.zeros(6, dtype=torch.int64)

    def loss(**options: Any) -> Tensor:
        with torch.no_grad():
            return model(patch(model, x, y, size=3, **options)).diff(dim=1)[:, 0]

    few, more = loss(steps=3, restarts=1), loss(steps=12, restarts=1)
    assert (more >= few).all() and (loss(steps=3, restarts=4) >= few).all()


@pytest.mark.parametrize(
    "change", [{"size": 4}, {"steps": 9}, {"step_size": "1/5"}, {"stride": 1}, {"restarts": 3}, {"seed": 1}]
)
def test_every_option_changes_the_result(change):
    model, x = linear(128, bias=1000.0), images()
    y = torch.zeros(6, dtype=torch.int64)
    base: dict[str, Any] = {"size": 3, "steps": 5, "restarts": 1}
    first = patch(model, x, y, **base)
    assert torch.equal(first, patch(model, x, y, **base))
    assert not torch.equal(first, patch(model, x, y, **{**base, **change}))


def test_a_nan_gradient_is_an_error_not_robustness():
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(1)
            return torch.stack([h.sum(1) + (h - h).sqrt().sum(1), -h.sum(1)], 1)

    with pytest.raises(UserError, match="gradient of Patch to the images is NaN"):
        patch(Root(), images(), torch.zeros(6, dtype=torch.int64), size=3, steps=2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 0}, "size: input should be greater than 0, got 0"),
        ({"size": 9}, "the patch must fit into the image of 8×8 pixels, got size 9 = a side of 9"),
        ({"size": "1/x"}, "must be a number or a fraction"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1"),
        ({"stride": -1}, "stride: input should be greater than or equal to 0"),
        ({"restarts": 0}, "restarts: input should be greater than or equal to 1"),
        ({"x": images() * 2}, "pixels must be in [0, 1]"),
    ],
)
def test_bad_input_is_one_line(changes, says):
    with pytest.raises(UserError) as caught:
        patch(linear(128, 0.0), **{"x": images(), "y": torch.zeros(6, dtype=torch.int64), **changes})
    assert says in str(caught.value) and "\n" not in str(caught.value)
