"""Rotations and shifts: by SciPy, exhaustively by hand, against foolbox; and the runner of unrestricted attacks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn

from clead.attacks import ATTACKS, UNRESTRICTED, spatial
from clead.attacks.runner import run_attack
from clead.attacks.spatial import Spatial, transform
from clead.errors import UserError
from clead.interfaces import Search, Unrestricted
from clead.losses.margin import margin
from clead.models.seeding import fork_rng
from clead.tasks.classification import CLASSIFICATION

GOOD_X, GOOD_Y = torch.full((3, 1, 8, 8), 0.5), torch.tensor([0, 1, 2])


def images(count: int = 6, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def net(side: int = 8, classes: int = 4, seed: int = 0) -> nn.Module:
    with fork_rng(seed):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * (side - 2) ** 2, classes)
        )


def right(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x).argmax(1)


def test_they_have_a_registry_of_their_own():
    assert UNRESTRICTED.names() == ["patch", "spatial"]
    for name, kind in UNRESTRICTED.items():
        assert name not in ATTACKS.names()
        assert isinstance(kind(), Unrestricted) and not isinstance(kind(), Search)


@pytest.mark.parametrize(("right_by", "down_by"), [(0, 0), (2, 0), (0, 3), (-1, 2), (3, -3)])
def test_whole_shifts_are_exact(right_by, down_by):
    x = images(dtype=torch.float64)
    expected = torch.zeros_like(x)
    for row in range(8):
        for column in range(8):
            if 0 <= row - down_by < 8 and 0 <= column - right_by < 8:
                expected[:, :, row, column] = x[:, :, row - down_by, column - right_by]
    torch.testing.assert_close(transform(x, 0, right_by, down_by), expected, atol=1e-12, rtol=0)


def test_quarter_turns_are_exact():
    x = images(dtype=torch.float64)
    torch.testing.assert_close(transform(x, 90, 0, 0), torch.rot90(x, -1, (2, 3)), atol=1e-12, rtol=0)
    torch.testing.assert_close(transform(x, 180, 0, 0), torch.rot90(x, 2, (2, 3)), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    shift=st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
)
def test_any_transformation_by_scipy(degrees, shift, size):
    """First turned about the centre, then shifted; bilinear with zeros outside; not square either."""
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (down, along), turn = (shift[1], shift[0]), math.radians(degrees)
    forward = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])  # of (row, column)
    centre = (np.array(size) - 1) / 2
    back = np.linalg.inv(forward)
    offset = centre - back @ (centre + [down, along])
    padded = np.pad(x[0, 0].numpy(), 30)  # SciPy's own constant border does not fade out
    expected = ndimage.affine_transform(padded, back, 30 + offset - back @ [30, 30], order=1)[30:-30, 30:-30]
    np.testing.assert_allclose(transform(x, degrees, along, down)[0, 0].numpy(), expected, atol=1e-9)


def test_the_grid_is_the_papers():
    grid = Spatial().grid()
    assert grid.shape == (775, 3) and len({tuple(row) for row in grid.tolist()}) == 775
    assert sorted(set(grid[:, 0].tolist())) == pytest.approx(list(range(-30, 31, 2)))
    assert sorted(set(grid[:, 1].tolist())) == pytest.approx([-3, -1.5, 0, 1.5, 3])
    assert grid[0].abs().tolist() == [30, 3, 3] and grid[-1].tolist() == [0, 0, 0]
    assert Spatial(angles=1, shifts=1).grid().tolist() == [[0, 0, 0]]
    assert Spatial(degrees=0, pixels=0, angles=2, shifts=1).grid().shape == (2, 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_exhaustive(seed):
    """By hand, one pair at a time: the same images fall, and one that holds gets its largest margin."""
    model, x = net(seed=seed), images(40)
    y = right(model, x)
    attack = Spatial(degrees=25, pixels=1, angles=3, shifts=3)
    worst = torch.full((40,), -torch.inf)
    with torch.no_grad():
        for pair in attack.grid().tolist():
            worst = torch.maximum(worst, margin(model(transform(x, *pair)), y))
        x_adv = run_attack(attack, model, x, y, None)
        after = margin(model(x_adv), y)
    held = worst < 0
    assert 0 < held.sum() < 40
    assert torch.equal(after > 0, ~held)
    torch.testing.assert_close(after[held], worst[held], atol=1e-5, rtol=1e-5)
    assert attack.allows(x_adv, x).all()
    assert not attack.allows((x_adv + 0.01 * torch.rand_like(x)).clamp(0, 1), x).any()


def test_images_that_fell_leave():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            lit = (x[:, 0, 0, 0] > 0.5).float()  # the corner: black as soon as the image turns or moves away from it
            lit = torch.where(x[:, 0, 4, 4] > 0.9, 1.0, lit)  # these hold whatever happens
            return torch.stack([lit, 1 - lit], 1)

    x = torch.ones(8, 1, 9, 9)
    x[2:, 0, 1:, 1:] = 0.3
    model = Counts()
    x_adv = spatial(model, x, torch.zeros(8, dtype=torch.int64), degrees=10, angles=3, shifts=3, pixels=1)
    assert (x_adv[2:, 0, 0, 0] <= 0.5).all()
    assert model.seen[:3] == [1, 8, 8], "the check, the clean images, the first pair with all of them"
    assert max(model.seen[3:]) <= 8 and sum(model.seen) <= 1 + 8 + 2 * 27 + 6 * 6


def test_it_finds_what_foolbox_finds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox")
    model, x = net(seed=4).eval(), images(30)
    y = right(model, x)
    peer = foolbox.attacks.SpatialAttack(1, 20, num_translations=3, num_rotations=5, grid_search=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, success = peer(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y)
    fell = right(model, spatial(model, x, y, degrees=20, pixels=1, angles=5, shifts=3)) != y
    # foolbox interpolates with aligned corners, so a pixel's centre is a little elsewhere: a few verdicts may differ.
    assert 3 < fell.sum() < 30 and (fell != success).sum() <= 5


def test_no_logit_that_is_not_finite_is_a_right_answer():
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [nan, 0.0], [inf, 0.0], [1.0, -inf], [1.0, nan]])
    assert CLASSIFICATION.correct(logits, torch.zeros(6, dtype=torch.int64)).tolist() == [True, *[False] * 5]


@pytest.mark.parametrize("change", [{"degrees": 60}, {"pixels": 3}, {"angles": 4}, {"shifts": 2}])
def test_every_option_changes_the_result(change):
    model, x = net(), images(12)
    base: dict[str, Any] = {"degrees": 10, "pixels": 1, "angles": 3, "shifts": 3}
    y = right(model, x)
    assert not torch.equal(spatial(model, x, y, **base), spatial(model, x, y, **{**base, **change}))


def test_nothing_to_try_returns_the_images():
    model, x = net(), images()
    x_adv = spatial(model, x, right(model, x), angles=1, shifts=1)
    torch.testing.assert_close(x_adv, x, atol=1e-6, rtol=0)
    assert x_adv.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", UNRESTRICTED.names())
def test_the_model_and_the_caller_are_left_untouched(name):
    kind = UNRESTRICTED.get(name)
    attack = kind(angles=3, shifts=2) if name == "spatial" else kind(steps=3, restarts=2)
    model, x = net(), images()
    y = right(model, x)
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels, state = x.clone(), torch.get_rng_state()
    results = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            results.append(run_attack(attack, model, x * 1, y * 1, None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), "not deterministic"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[1].training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(x, pixels) and torch.equal(torch.get_rng_state(), state)
    x_adv = results[0]
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and attack.allows(x_adv, x).all()
    double = run_attack(attack, net().double(), x.double(), y, None)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("name", UNRESTRICTED.names())
def test_images_wrong_already_are_returned_and_nan_is_no_right_answer(name):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lit = x.flatten(1).sum(1)
            return torch.stack([lit, -lit, torch.where(x[:, 0, 0, 0] > 0.5, torch.nan, 0.0)], 1)

    x = torch.full((3, 1, 8, 8), 0.4)
    x[1, 0, 0, 0] = 0.6  # the logits of the clean image are not finite
    kind = UNRESTRICTED.get(name)
    attack = kind(angles=3, shifts=3) if name == "spatial" else kind(steps=3, restarts=1)
    x_adv = run_attack(attack, Broken(), x, torch.tensor([1, 0, 0]), None)
    assert torch.equal(x_adv[:2], x[:2]) and not torch.equal(x_adv[2], x[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": GOOD_X * 255}, "pixels must be in [0, 1], got [127.5, 127.5]; divide by 255"),
        ({"x": GOOD_X[0]}, "images must be a float tensor (B, C, H, W)"),
        ({"x": GOOD_X.numpy()}, "images must be a torch.Tensor"),
        ({"y": torch.tensor([0, 4, 2])}, "labels must be in [0, 4), got 4"),
        ({"degrees": 200}, "degrees: input should be less than or equal to 180, got 200"),
        ({"angles": 0}, "angles: input should be greater than or equal to 1, got 0"),
        ({"shifts": 2.5}, "shifts: input should be a valid integer"),
        ({"pixels": -1}, "pixels: input should be greater than or equal to 0, got -1"),
    ],
)
def test_bad_input_is_one_line(changes, says):
    with pytest.raises(UserError) as caught:
        spatial(net(), **{"x": GOOD_X, "y": GOOD_Y, **changes})
    assert says in str(caught.value) and "\n" not in str(caught.value)
