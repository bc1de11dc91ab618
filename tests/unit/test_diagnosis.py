"""Why a clean accuracy is low though the model is right."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clead
from clead.evaluation.diagnosis import near_chance, order_hint, pixel_hint, pixel_ranges

LETTERS = tuple("abcdefghijkl")
NUMBERS = tuple(map(str, range(12)))


def balanced(k, each=8):
    return torch.arange(k * each) % k


@pytest.mark.parametrize(
    ("classes", "numbers", "text"),
    [
        (NUMBERS, [sorted(NUMBERS).index(name) for name in NUMBERS], "classes were in text order (0, 1, 10, 11, 2, …)"),
        (tuple(sorted(NUMBERS)), list(map(int, sorted(NUMBERS))), "classes were in numeric order (0, 1, 2, 3, 4, …)"),
        (("0", "90", "180", "270"), [0, 3, 1, 2], "classes were in text order (0, 180, 270, 90)"),
        (LETTERS, [(k + 1) % 12 for k in range(12)], "labels were shifted by one"),
        (LETTERS, [(k - 1) % 12 for k in range(12)], "labels were shifted by one"),
        (LETTERS, list(range(11, -1, -1)), "classes were reversed (l, k, j, i, h, …)"),
        (tuple("BCabde"), [1, 3, 0, 2, 4, 5], "classes were in alphabetical order (a, B, b, C, d, …)"),
        (LETTERS, [1, 0, *range(2, 12)], "output 1 meant 'a', output 0 meant 'b'"),
        (LETTERS, [2, 0, 1, *range(3, 12)], "output 2 meant 'a', output 0 meant 'b', output 1 meant 'c'"),
        (LETTERS, [5, 7, 2, 0, 9, 1, 3, 11, 4, 6, 10, 8], "and 6 more were in other places"),
        (tuple("cdb"), [2, 0, 1], "shifted by one"),
        (
            LETTERS,
            [sorted(map(str, range(12))).index(str(k)) for k in range(12)],
            "classes were numbered in text order",
        ),
    ],
)
def test_the_order_under_which_the_model_is_right_is_named(classes, numbers, text):
    labels = balanced(len(classes), 12)
    hint = order_hint(torch.tensor(numbers)[labels], labels, classes)
    assert hint is not None and text in hint and "would be 100.0 %" in hint
    order = hint.split("--data.classes ")[1].split(",")  # output numbers[k] is the class k
    assert [order.index(name) for name in classes] == numbers


def test_an_order_that_is_right_is_not_doubted():
    labels = balanced(10, 20)
    for wrong in (0, 20, 60, 120):
        predicted = labels.clone()
        predicted[:wrong] = torch.from_numpy(np.random.default_rng(0).integers(0, 10, wrong))
        assert order_hint(predicted, labels, LETTERS[:10]) is None


@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10**6))
def test_guesses_make_no_hint(k, each, seed):
    labels = balanced(k, each)
    random = np.random.default_rng(seed)
    predicted = torch.from_numpy(random.integers(0, k, len(labels)))
    assert order_hint(predicted, labels, tuple(f"c{j}" for j in range(k))) is None
    assert order_hint(torch.full_like(labels, seed % k), labels, tuple(f"c{j}" for j in range(k))) is None


def test_one_image_per_class_fits_any_permutation_and_proves_none():
    labels = torch.arange(12)
    shuffled = torch.tensor([5, 7, 2, 0, 9, 1, 3, 11, 4, 6, 10, 8])
    assert order_hint(shuffled, labels, LETTERS) is None
    assert order_hint(shuffled[balanced(12, 4)], balanced(12, 4), LETTERS) is not None


def test_a_weak_model_in_another_order_is_seen_among_many_classes():
    labels = balanced(200, 10)
    random = np.random.default_rng(0)
    predicted = torch.from_numpy(random.integers(0, 200, len(labels)))
    right = torch.from_numpy(random.random(len(labels)) < 0.3)
    predicted = torch.where(right, (labels + 1) % 200, predicted)
    assert "shifted by one" in order_hint(predicted, labels, tuple(map(str, range(200))))


@pytest.mark.parametrize(
    ("right", "n", "k", "near"), [(10, 100, 10, True), (19, 100, 10, True), (25, 100, 10, False), (60, 100, 2, True)]
)
def test_near_chance(right, n, k, near):
    assert near_chance(torch.arange(n) < right, k) == near


class Grey(nn.Module):
    """Right about images whose colour is one of eight, if pixels come as it wants them: it looks for the nearest colour."""

    def __init__(self, colours, change):
        super().__init__()
        self.register_buffer("wanted", change(colours).flatten(1))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return -self.scale * torch.cdist(x.flatten(1), self.wanted) ** 2


def coloured(c, n=64):
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(4, c, 6, 6, generator=generator) * 0.6 + torch.linspace(0.02, 0.38, 4)[:, None, None, None]
    colours = torch.cat([colours, colours.flip(1) if c == 3 else colours.flip(2)])  # red and blue tell classes apart
    labels = torch.arange(n) % 8
    noise = torch.randn(n, c, 6, 6, generator=generator) * 0.01
    return colours, (colours[labels] + noise).clamp(0, 1), labels


def caffe(x):
    return x.flip(1) * 255 - torch.tensor([103.939, 116.779, 123.68])[:, None, None]


def imagenet(x):
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.mark.parametrize(
    ("change", "option"),
    [
        (lambda x: x * 255, '"range=0..255"'),
        (caffe, '"channels=bgr mean=103.939,116.779,123.68 std=1"'),
        (lambda x: 1 - x, "1 - x"),
        (lambda x: x.flip(1), '"channels=bgr"'),
        (lambda x: x.flip(1) * 255, '"channels=bgr range=0..255"'),
    ],
)
def test_the_pixels_with_which_the_model_is_right_are_named(change, option):
    colours, x, labels = coloured(3)
    model = Grey(colours, change)
    hint = pixel_hint(lambda x: model(x).argmax(1), x, labels, 8)
    assert hint is not None and option in hint and "would be 100.0 %" in hint


@pytest.mark.parametrize(
    ("change", "option"),
    [(lambda x: 2 * x - 1, '"range=-1..1"'), (imagenet, '"mean=0.485,0.456,0.406 std=0.229,0.224,0.225"')],
)
def test_a_shift_of_the_pixels_is_named(change, option):
    """A model that reads the mean brightness: eight levels in the pixels that it wants."""
    levels = torch.linspace(0.1, 0.9, 8)[:, None, None, None].expand(8, 3, 4, 4)
    labels = torch.arange(64) % 8
    model = Grey(levels, change)
    hint = pixel_hint(lambda x: model(x).argmax(1), levels[labels], labels, 8)
    assert hint is not None and option in hint


@pytest.mark.parametrize("c", [1, 3])
def test_a_model_that_is_right_or_guesses_gets_no_hint(c):
    colours, x, labels = coloured(c)
    model = Grey(colours, lambda x: x)
    asked = []
    assert pixel_hint(lambda x: asked.append(1) or model(x).argmax(1), x, labels, 8) is None and len(asked) == 1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(c * 36, 8))
    assert pixel_hint(lambda x: net(x).argmax(1), x, labels[torch.randperm(64)], 8) is None


def test_every_range_is_what_its_option_says():
    module = pytest.importorskip("clead.models.model_input")
    x = torch.rand(4, 3, 5, 5)
    seen = 0
    for pixels in pixel_ranges(x):
        if "--model.input" in pixels.remedy:
            layer = module.InputLayer(module.ModelInput.parse(pixels.remedy.split('"')[1]))
            assert torch.allclose(layer(x), pixels.change(x), atol=1e-4), pixels.remedy
            seen += 1
    assert seen >= 7


def test_an_evaluation_says_it_and_changes_no_figure(caplog):
    colours, x, labels = coloured(3, 48)
    order = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    model = Grey(colours, lambda x: x)
    record = clead.evaluate(model, x, order[labels], suite="pgd", eps=0.001, steps=2, check_images=0, curve_points=0)
    assert record.clean_accuracy == 0
    assert any("if the labels were shifted by one" in note for note in record.notes)
    assert "shifted by one" in caplog.text
    record = clead.evaluate(model, x, labels, suite="pgd", eps=0.001, steps=2, check_images=0, curve_points=0)
    assert record.clean_accuracy == 1 and not any("would be" in note for note in record.notes)
    record = clead.evaluate(
        Grey(colours, lambda x: x * 255), x, labels, suite="pgd", eps=0.001, steps=2, check_images=0, curve_points=0
    )
    assert any('add --model.input "range=0..255"' in note for note in record.notes)
