"""Auto-PGD on masks: exact where the worst mask is known, never outside the ball, and no image is dropped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clead.attacks.masks import MaskAPGD
from clead.attacks.pgd import PGD
from clead.losses.pixels import PIXEL_LOSSES, VOID
from clead.results.masks import Counts, mean_iou
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS
from support import generator

LOSSES = list(PIXEL_LOSSES)
EPS = {"linf": 0.05, "l2": 0.4, "l1": 2.0}


class PerPixel(nn.Module):
    """Logits [0, w·x_p + b] of each pixel p by itself: in L∞ a pixel falls iff its margin is below eps · ‖w‖₁."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1).double()
        self.conv.weight.data = torch.tensor([1.0, -2.0, 1.5], dtype=torch.float64).reshape(1, 3, 1, 1)
        self.conv.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x - 0.5)
        return torch.cat([torch.zeros_like(z), z], 1)


def curved() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)).double()


def pictures(n: int = 3, classes: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 6, 6, generator=generator(3), dtype=torch.float64) * 0.6 + 0.2
    return x, torch.randint(classes, (n, 6, 6), generator=generator(4))


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return SEGMENTATION.accuracy(SEGMENTATION.correct(model(x), y), y)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_pixel_that_can_fall_falls_in_linf(loss):
    """Where pixels do not share inputs, the worst case is known pixel by pixel."""
    model, (x, _) = PerPixel(), pictures()
    z = model(x)[:, 1].detach()
    y = (z > 0).long()
    threat = THREATS.get("linf")(eps=EPS["linf"])
    x_adv = MaskAPGD(loss=loss, steps=30).perturb(model, x, y, threat)
    falls = z.abs() < EPS["linf"] * 4.5
    assert 0.1 < falls.double().mean() < 0.9
    assert right(model, x_adv, y).tolist() == pytest.approx((~falls).double().mean((1, 2)).tolist())


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_stays_in_the_ball_and_leaves_the_model_alone(norm, loss):
    model, (x, y) = curved(), pictures(classes=4)
    y[0, :3] = VOID
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threat = THREATS.get(norm)(eps=EPS[norm])
    x_adv = MaskAPGD(loss=loss, steps=12).perturb(model, x, y, threat)
    assert (threat.distance(x_adv - x) <= EPS[norm] * (1 + 1e-6)).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert (right(model, x_adv, y) <= right(model, x, y)).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    again = MaskAPGD(loss=loss, steps=12).perturb(model, x, y, threat, generator=generator(0))
    assert torch.equal(again, MaskAPGD(loss=loss, steps=12).perturb(model, x, y, threat, generator=generator(0)))


def test_it_is_at_least_as_strong_as_pgd_of_as_many_steps():
    model, (x, y) = curved(), pictures(8, classes=4)
    y = model(x).argmax(1)
    threat = THREATS.get("linf")(eps=0.05)
    pgd = PGD(steps=60, keep="best")(lambda images: SEGMENTATION.loss(model(images), y), x, threat)
    lowest = torch.stack(
        [right(model, MaskAPGD(loss=loss, steps=60).perturb(model, x, y, threat), y) for loss in LOSSES]
    )
    assert lowest.amin(0).mean() <= right(model, pgd, y).mean()
    assert lowest.amin(0).mean() < 0.9 * right(model, x, y).mean()


def test_what_is_kept_is_the_lowest_of_its_kind():
    model, (x, _) = curved(), pictures(8)
    y, threat = model(x).argmax(1), THREATS.get("linf")(eps=0.05)

    def scores(keep: str) -> tuple[Tensor, Tensor]:
        x_adv = MaskAPGD(steps=20, keep=keep).perturb(model, x, y, threat, generator=generator(0))
        counts = SEGMENTATION.confusion(model(x_adv), y).numpy()
        each = Counts(counts.diagonal(axis1=1, axis2=2), counts.sum(1), counts.sum(2))
        return right(model, x_adv, y), torch.from_numpy(mean_iou(each))

    by_accuracy, by_iou = scores("accuracy"), scores("mean_iou")
    assert (by_accuracy[0] <= by_iou[0]).all() and (by_iou[1] <= by_accuracy[1]).all()
    assert (by_accuracy[0] < by_iou[0]).any() or (by_iou[1] < by_accuracy[1]).any()


def test_logits_of_a_lower_resolution_are_attacked_at_the_masks():
    model, (x, y) = nn.Sequential(curved(), nn.AvgPool2d(2)), pictures(classes=4)
    x_adv = MaskAPGD(steps=8).perturb(model, x, y, THREATS.get("linf")(eps=0.1))
    assert right(model, x_adv, y).mean() < right(model, x, y).mean()


def test_an_image_whose_gradient_is_not_finite_comes_back_as_nan():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x[:, :1] + (x[:, :1] - x[:, :1].detach() + (x.amax((1, 2, 3), keepdim=True) > 2)).sqrt()
            return torch.cat([torch.zeros_like(z), z], 1)

    x, y = pictures()
    x_adv = MaskAPGD(steps=4).perturb(Broken(), x, y, THREATS.get("linf")(eps=0.1))
    assert x_adv.isnan().flatten(1).all(1).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0), ("linf", 0.9), ("l2", 20), ("l1", 255)])
def test_radii_at_the_ends(norm, eps):
    model, (x, y) = curved(), pictures(classes=4)
    x_adv = MaskAPGD(steps=6).perturb(model, x, y, THREATS.get(norm)(eps=eps))
    assert torch.equal(x_adv, x) == (eps == 0) and math.isfinite(x_adv.sum())
