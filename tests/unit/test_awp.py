"""Adversarial weight perturbation against its formula, written again, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clead.training.awp import perturbed_weights


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


X, Y = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 2


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def test_weights_move_by_gamma_times_their_norm_along_the_gradient():
    model, gamma = net(), 0.05
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    loss_of(other).backward()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with perturbed_weights(model, lambda: loss_of(model), gamma):
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            if p.dim() > 1:
                step = gamma * before[name].norm() * q.grad / q.grad.norm()
                torch.testing.assert_close(p.detach(), before[name] + step)
                assert (p.detach() - before[name]).norm() == pytest.approx(float(gamma * before[name].norm()), rel=1e-4)
            else:
                assert torch.equal(p.detach(), before[name]), name
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
        inside = loss_of(model)
        inside.backward()
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())
    assert inside > loss_of(net().train()), "the perturbed weights must be worse"
    # The gradient that is left is the one at the perturbed weights.
    at_weights = {name: p.grad for name, p in other.named_parameters()}
    assert not torch.allclose(model[4].weight.grad, at_weights["4.weight"])


def test_a_gradient_that_overflows_moves_nothing():
    """As float16's with a large loss scale: inf · 0 would make the weights NaN, where the step is only to be left out."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    with perturbed_weights(model, lambda: loss_of(model) * 1e38 * 1e38, 0.05):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_gamma_nothing_is_computed():
    model = net()
    with perturbed_weights(model, lambda: pytest.fail("the loss was computed"), 0.0):
        pass


def test_weights_are_back_after_an_error():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), perturbed_weights(model, lambda: loss_of(model), 0.1):
        raise RuntimeError("stop")
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def test_a_layer_without_a_gradient_stays():
    model = nn.ModuleDict({"used": nn.Linear(16, 2), "unused": nn.Linear(2, 2)})
    before = model["unused"].weight.detach().clone()

    def loss():
        return nn.functional.cross_entropy(model["used"](X.flatten(1)), Y)

    with perturbed_weights(model, loss, 0.1):
        assert torch.equal(model["unused"].weight.detach(), before)
