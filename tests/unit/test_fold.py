"""Folding batch-norm: same outputs and input gradients, nothing left behind."""

import pytest
import torch
from torch import nn

from clead.models import MODELS
from clead.models.compute_cost import CostMeter
from clead.models.fold_batch_norm import _PAIRS, folded
from clead.models.modes import attack_mode
from clead.models.split import adapt


def _trained_a_little(name, **settings):
    torch.manual_seed(0)
    model = MODELS.get(name)(**settings).build(3, 5, [0.5] * 3, [0.25] * 3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    model.train()
    for _ in range(3):
        model(torch.rand(8, 3, 16, 16))
    return model


@pytest.mark.parametrize(
    ("name", "settings", "pairs"),
    [
        ("resnet8", {"width": 4}, 7),  # stem and two convolutions in each of three blocks
        ("small_cnn", {"width": 4}, 4),
        ("preact_resnet18", {"width": 4}, 8),  # only the first convolution of each block feeds a batch-norm
    ],
)
def test_folded_model_has_the_same_outputs_and_input_gradients(name, settings, pairs):
    model = _trained_a_little(name, **settings)
    x = torch.rand(4, 3, 16, 16)
    with attack_mode(model):
        plain = x.clone().requires_grad_()
        logits = model(plain)
        (gradient,) = torch.autograd.grad(logits.square().sum(), plain)
        with folded(model, x):
            again = x.clone().requires_grad_()
            fast = model(again)
            (fast_gradient,) = torch.autograd.grad(fast.square().sum(), again)
    assert len(_PAIRS[model]) == pairs
    torch.testing.assert_close(fast, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_folding_leaves_the_model_bit_identical_also_on_an_exception():
    model = _trained_a_little("resnet8", width=4)
    x = torch.rand(2, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    expected = model.eval()(x)
    model.train()
    with pytest.raises(RuntimeError, match="planted"), attack_mode(model), folded(model, x):
        raise RuntimeError("planted")
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in layer.__dict__ for layer in model.modules())
    assert torch.equal(model.eval()(x), expected)


class _UsedTwice(nn.Module):
    """The first convolution's output also goes past its batch-norm; the second pair is ordinary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x)
        x = self.norm2(self.second(self.norm(x) + x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])  # fresh, where batch-norm is the identity
def test_a_convolution_that_is_used_twice_is_not_folded(fresh):
    torch.manual_seed(0)
    net = _UsedTwice()
    if not fresh:
        nn.init.uniform_(net.norm.weight, 0.2, 3)
        nn.init.uniform_(net.norm.bias, -1, 1)
    model = adapt(net, sample_shape=(3, 8, 8))
    x = torch.rand(4, 3, 8, 8)
    with attack_mode(model):
        expected = model(x)
        with folded(model, x):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert _PAIRS[model] == [(net.second, net.norm2)]


def test_looking_for_pairs_is_not_counted_as_work():
    model = _trained_a_little("resnet8", width=4)
    x = torch.rand(4, 3, 16, 16)
    with CostMeter(model) as meter, attack_mode(model), folded(model, x):
        model(x)
    assert meter.forward_equivalents == 4
