"""Answers to images with one changed window are those of the model itself, whatever the model is made of."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from clead.attacks import square as square_attack
from clead.attacks.runner import optimized
from clead.attacks.square_cache import Prepared, WindowedModel
from clead.models import MODELS as REGISTRY
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode


class InPlace(nn.Module):
    """In the manner of torchvision: sums and ReLUs in place, maximum pooling, a bottleneck of 1×1 convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.down = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1, stride=2)
        self.c, self.relu = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(12 * 4, 4)

    def forward(self, x):
        x = self.relu(self.a((x - 0.5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]))
        out = self.norm(self.b(x))
        out += x
        x = self.drop(self.relu(out))
        y = self.c(x)
        y += self.down(x)
        y = functional.max_pool2d(functional.gelu(y), 2)
        assert y.shape[1:] == (12, 6, 6)
        return self.fc(functional.adaptive_avg_pool2d(y, 2).flatten(1))


def registered(name, **values):
    return REGISTRY.get(name)(**values).build(3, 4, [0.5] * 3, [0.25, 0.5, 1.0])


def dilated():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


class Attention(nn.Module):
    """Every pixel sees every other after one layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.fc(mixed.mean(1))


class Residual(nn.Module):
    """What a convolution has read is changed in place after it."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        for layer in (self.first, self.second):
            x += functional.relu(layer(x))
        return self.fc(functional.relu(x).mean((2, 3)))


MODELS = {
    "in place": InPlace,
    "residual": Residual,
    "resnet8": lambda: registered("resnet8"),
    "small_cnn": lambda: registered("small_cnn", width=8),
    "preact": lambda: registered("preact_resnet18", width=4),
    "dilated": dilated,
    "attention": Attention,
}
FOLLOWED = {"in place", "residual", "resnet8", "small_cnn"}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        model(torch.rand(2, 3, 24, 24))  # a lazy layer learns its shape
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def ask(windowed, images, side, generator):
    """Change a window in each image, ask, settle for some; returns the largest difference to the model's own answers."""
    n, channels, height, width = images.shape
    row = int(torch.randint(height - side + 1, (), generator=generator))
    column = int(torch.randint(width - side + 1, (), generator=generator))
    proposal = images.clone()
    proposal[:, :, row : row + side, column : column + side] = torch.rand(n, channels, side, side, generator=generator)
    answer, expected = windowed(proposal, row, column), windowed.model(proposal)
    better = torch.rand(n, generator=generator) < 0.4
    windowed.settle(better)
    images[better] = proposal[better]
    return (answer - expected).abs().max().item(), expected.abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_model_over_many_questions(name, fold):
    model, generator = made(name), torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 24, 24, generator=generator)
    with attack_mode(model), torch.no_grad(), optimized(model, images) if fold else nullcontext(model) as answer:
        windowed = WindowedModel(answer)
        for side in (1, 3, 2, 24):
            windowed.remember(images, side)
            for _ in range(8):  # the first three are compared with the model
                error, scale = ask(windowed, images, side, generator)
                assert error <= 2e-5 * scale
            if side < 5 and name in FOLLOWED:
                assert windowed._memory is not None
            stands = torch.rand(len(images), generator=generator) < 0.9
            images = images[stands]
            windowed.keep(stands)


@given(
    kernel=st.integers(1, 5), stride=st.integers(1, 3), padding=st.integers(0, 2), second=st.integers(1, 3),
    height=st.integers(20, 30), width=st.integers(20, 30), side=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_geometry_of_convolutions(kernel, stride, padding, second, height, width, side, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, kernel, stride, min(padding, kernel - 1)), nn.ReLU(), nn.Conv2d(6, 6, 3, second, 1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 2, height, width, generator=generator)
    with torch.no_grad():
        model(images)
        windowed = WindowedModel(model.eval())
        windowed.remember(images, side)
        for _ in range(4):
            error, scale = ask(windowed, images, side, generator)
            assert error <= 2e-5 * scale


def test_work_is_spared_where_it_says_so():
    """A ResNet-8 on 32 × 32: by hand, 3.1 times fewer multiplications for windows of 4 pixels, the last convolution whole."""
    model = registered("resnet8").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        windowed = WindowedModel(model)
        windowed.remember(images, 4)
        for _ in range(3):  # which are checked against the model
            windowed(images, 9, 14)
            windowed.settle(torch.zeros(2, dtype=torch.bool))
        with FlopCounterMode(display=False) as whole:
            model(images)
        with FlopCounterMode(display=False) as spared:
            windowed(images, 9, 14)
    assert whole.get_total_flops() / spared.get_total_flops() > 3


@pytest.mark.parametrize("kind", ["noise", "moody", "mixing", "inference"])
def test_a_model_that_cannot_be_followed_is_asked_itself(kind):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.calls = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 24 * 24, 3), 0

        @torch.inference_mode(kind == "inference")
        def forward(self, x):
            self.calls += 1
            if kind == "noise":
                x = x + 0.3 * torch.randn(x.shape)
            if kind == "moody" and self.calls % 2:
                x = self.conv(x).mean(1, keepdim=True).expand(-1, 3, -1, -1)
            x = functional.relu(self.conv(x))
            if kind == "mixing":
                x = x - x.mean((1, 2, 3), keepdim=True)
            return self.fc(x.flatten(1))

    torch.manual_seed(0)
    model, images = Strange().eval(), torch.rand(3, 3, 24, 24)
    with torch.no_grad():
        windowed = WindowedModel(model)
        windowed.remember(images, 2)
        changed = images.clone()
        changed[:, :, 3:5, 4:6] = 0
        answer = windowed(changed, 3, 4)
        windowed.settle(torch.tensor([True, False, True]))
        if kind == "mixing":
            assert torch.allclose(answer, model(changed), atol=1e-5)
        else:
            assert windowed._memory is None


class Excited(nn.Module):
    """Channels are weighed by their means over the image: for one image alone, such a weight looks like a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.weigh, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8 * 24 * 24, 4)

    def forward(self, x):
        x = functional.relu(self.a(x))
        x = x * torch.sigmoid(self.weigh(functional.adaptive_avg_pool2d(x, 1)))
        return self.fc(functional.relu(self.b(x)).view(len(x), -1))  # a view: not of any layout


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_made_of_the_images_is_no_constant(count):
    torch.manual_seed(0)
    model, generator = Excited().eval(), torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 24, 24, generator=generator)
    with torch.no_grad():
        windowed = WindowedModel(model)
        for side in (2, 3):
            windowed.remember(images, side)
            for _ in range(20):
                error, scale = ask(windowed, images, side, generator)
                assert error <= 2e-5 * scale


def test_square_finds_the_same_with_and_without(monkeypatch):
    model = made("resnet8")
    x = torch.rand(12, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.classifier.bias -= model(x).mean(0)  # so that images are near to other classes
    y = model(x).argmax(1).detach()
    parameters = [p.clone() for p in model.parameters()]
    with CostMeter(model) as meter:
        found = square_attack(model, x, y, eps=0.03, queries=120)
    monkeypatch.setattr(sys.modules["clead.attacks.square"], "Prepared", type(None))
    with CostMeter(model) as plain:
        expected = square_attack(model, x, y, eps=0.03, queries=120)
    wrong = model(found).argmax(1) != y
    assert 0 < wrong.sum() < len(x)
    assert torch.equal(wrong, model(expected).argmax(1) != y)
    assert torch.allclose(found, expected)
    assert all(torch.equal(p, q) for p, q in zip(parameters, model.parameters(), strict=True))
    # What is asked besides the queries: twice at each size of the windows, and for the count of multiplications.
    assert plain.forwards < meter.forwards <= plain.forwards + 2 * 10 * len(x) + 1


def test_what_would_not_fit_into_memory_is_computed_as_usual(monkeypatch):
    monkeypatch.setattr("clead.attacks.square_cache._LIMIT", 1000)
    model, images = made("resnet8"), torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        windowed = WindowedModel(Prepared(model))
        windowed.remember(images, 2)
        assert windowed._memory is None
        assert torch.equal(windowed(images, 9, 14), model(images))
