"""MI-FGSM against the paper written out in NumPy, torchattacks, and the closed form of a linear model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clead.attacks import mi_fgsm, pgd
from clead.errors import UserError
from support import generator


def curved(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, classes)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        return model


def images(count: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 4, 4, generator=generator(1), dtype=torch.float64)
    return x, torch.arange(count) % classes


def slope(model: nn.Module, x: np.ndarray, y: int) -> np.ndarray:
    point = torch.from_numpy(x)[None].requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), torch.tensor([y])), point)
    return gradient[0].numpy()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_is_algorithm_1_of_the_paper(norm, decay):
    model, (x, y) = curved(), images()
    eps, steps = 0.3, 5
    actual = mi_fgsm(model, x, y, eps=eps, norm=norm, steps=steps, decay=decay).numpy()
    for i in range(len(x)):
        start = x[i].numpy()
        point, g = start.copy(), np.zeros_like(start)
        for _ in range(steps):
            gradient = slope(model, point, int(y[i]))
            g = decay * g + gradient / np.abs(gradient).sum()
            point = point + eps / steps * (np.sign(g) if norm == "linf" else g / np.sqrt((g**2).sum()))
            if norm == "linf":  # the ball is never left, so the box alone clips
                point = np.clip(point, 0, 1)
            else:
                point = np.clip(point, 0, 1)
                assert np.sqrt(((point - start) ** 2).sum()) <= eps + 1e-12
        np.testing.assert_allclose(actual[i], point, atol=1e-12)


def test_without_momentum_it_is_pgd():
    model, (x, y) = curved(), images()
    plain = pgd(model, x, y, eps=0.2, steps=6, step_size=0.1, random_start=False, keep="last")
    assert torch.equal(mi_fgsm(model, x, y, eps=0.2, steps=6, step_size=0.1, decay=0), plain)


def test_equals_torchattacks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks

        model, (x, y) = curved().float(), images()
        peer = torchattacks.MIFGSM(model, eps=0.1, alpha=0.02, steps=7, decay=0.9)(x.float(), y)
    ours = mi_fgsm(model, x.float(), y, eps=0.1, steps=7, step_size=0.02, decay=0.9)
    torch.testing.assert_close(ours, peer, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf), ("l0", None)])
def test_reaches_the_optimum_of_a_linear_model_of_two_classes(norm, dual):
    """Away from the box: eps · ‖w‖ in the dual norm; for l0 the two pixels that gain most move to the box's corners."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator(3))
    x = 0.45 + 0.1 * torch.rand(6, 3, 4, 4, generator=generator(2), dtype=torch.float64)
    y = torch.tensor([0, 1] * 3)
    x_adv = mi_fgsm(model, x, y, eps=2 if norm == "l0" else 0.02, norm=norm, objective="margin", steps=10)
    weight = model[1].weight.detach()
    w = (weight[1 - y] - weight[y]).view_as(x)
    gain = ((x_adv - x) * w).flatten(1).sum(1)
    if norm == "l0":
        best = (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1).flatten(1).topk(2).values.sum(1)
        assert (gain > 0.5 * best).all() and (gain <= best * (1 + 1e-9)).all()  # a local choice
        return
    best = 0.02 * torch.linalg.vector_norm(w.flatten(1), ord=dual, dim=1)
    if norm == "l1":  # a step moves a fraction of the pixels, not the steepest alone
        assert (gain > 0.7 * best).all() and (gain <= best * (1 + 1e-9)).all()
    else:
        torch.testing.assert_close(gain, best)


def test_saturated_logits_still_have_momentum():
    """Gradients of 1e-30 vanish in float32 when divided by a clamped sum of their own size."""
    model, (x, y) = curved(), images()
    tiny = nn.Sequential(model, nn.Linear(4, 4)).float()
    with torch.no_grad():
        tiny[1].weight.copy_(1e-32 * torch.eye(4))
        tiny[1].bias.zero_()
    x_adv = mi_fgsm(tiny, x.float(), y, eps=0.1, norm="l2", steps=2, objective="margin")
    assert ((x_adv - x).flatten(1).norm(dim=1) > 0.05).all()


@pytest.mark.parametrize(
    "change",
    [{"steps": 3}, {"step_size": "4/255"}, {"decay": 0.5}, {"norm": "l2"}, {"objective": "margin"}, {"eps": 0.2}],
)
def test_every_option_changes_the_result(change):
    model, (x, y) = curved(), images()
    base = {"eps": 0.6, "steps": 5}
    assert not torch.equal(mi_fgsm(model, x, y, **base), mi_fgsm(model, x, y, **{**base, **change}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"decay": -1}, "decay: input should be greater than or equal to 0, got -1"),
        ({"step_size": 0}, "step_size: input should be greater than 0, got 0"),
        ({"norm": "l3"}, "unknown threat 'l3'"),
    ],
)
def test_bad_options_are_one_line(change, says):
    model, (x, y) = curved(), images()
    with pytest.raises(UserError) as caught:
        mi_fgsm(model, x, y, **{"eps": 0.1, **change})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_nan_gradient_is_an_error_not_robustness():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(1)
            return torch.stack([h.sum(1), (h - h).abs().sqrt().sum(1)], 1)

    x = torch.full((2, 1, 2, 2), 0.5)
    with pytest.raises(UserError, match="is NaN"):
        mi_fgsm(Broken(), x, torch.tensor([0, 1]), eps=0.1)
