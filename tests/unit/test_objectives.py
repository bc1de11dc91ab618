"""The adaptive objectives against NumPy from their formulas, and what they are blind to."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from clead.attacks import OBJECTIVES, pgd
from clead.attacks.objectives import embedding_logits, prototype
from clead.models.modes import attack_mode
from clead.models.split import AdaptedModel, Classifier, SplitModel


def split(classes: int = 4, seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
        return Classifier(nn.Identity(), encoder, nn.Linear(6, classes)).double().eval()


def images(classes: int = 4, count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, other = torch.rand(2, count, 1, 4, 4, generator=g, dtype=torch.float64)
    return x, other, torch.arange(count) % classes


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_embedding_logits_is_the_weighted_sum(weight):
    model, (x, other, y) = split(), images()
    values = embedding_logits(model, x, y, weight=weight)(other).detach()
    clean, moved, logits = (t.detach().numpy() for t in (model.features(x), model.features(other), model(other)))
    for i in range(len(x)):
        z = logits[i] - logits[i].max()
        expected = np.log(np.exp(z).sum()) - z[y[i]] + weight * (1 - cosine(moved[i], clean[i]))
        assert values[i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_prototype_is_the_difference_of_two_cosines(classes):
    model, (x, other, y) = split(classes), images(classes)
    values = prototype(model, x, y)(other).detach()
    rows = model.classifier.weight.detach().numpy()
    rows = rows - rows.mean(0)
    clean, moved = (model.features(t).detach().numpy() for t in (x, other))
    for i in range(len(x)):
        k = max((k for k in range(classes) if k != y[i]), key=lambda k: cosine(clean[i], rows[k]))
        expected = cosine(moved[i], rows[k]) - cosine(moved[i], rows[y[i]])
        assert values[i].item() == pytest.approx(expected, rel=1e-10)


def test_prototype_is_blind_to_what_no_decision_direction_depends_on():
    """A row added to all, the biases, and the lengths of rows and features; the margin sees the last three."""
    model, (x, other, y) = split(), images()
    expected = prototype(model, x, y)(other).detach()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.classifier.bias.add_(torch.arange(4.0))
        changed.classifier.weight.mul_(3).add_(torch.linspace(-5, 5, 6))
        changed.encoder.append(Scale(7.0))
    torch.testing.assert_close(prototype(changed, x, y)(other).detach(), expected)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Late(SplitModel):
    """A split model of the user's own: the classifier is no attribute of a known name, and something follows it."""

    def __init__(self, inner: Classifier) -> None:
        super().__init__(inner.num_classes, inner.feature_dim)
        self.parts = nn.ModuleList([inner.encoder, inner.classifier])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.parts[0](x)
        return features, 2 * self.parts[1](features)


def test_any_split_model_has_prototypes():
    model, (x, other, y) = split(), images()
    expected = prototype(model, x, y)(other).detach()
    plain = nn.Sequential(model.encoder, model.classifier)
    adapted = AdaptedModel(plain, sample_shape=(1, 4, 4))
    for same in (adapted, Late(model)):
        torch.testing.assert_close(prototype(same, x, y)(other).detach(), expected)


def test_a_compiled_forward_has_prototypes_too():
    """Its outputs are not connected by a gradient, as those of one autograd function."""
    model, (x, other, y) = split(), images()
    expected = prototype(model, x, y)(other).detach()
    model._compiled = lambda x: tuple(output.detach() for output in model._split(x))
    assert torch.equal(prototype(model, x, y)(other), expected)


@pytest.mark.parametrize("name", ["embedding_logits", "prototype"])
@pytest.mark.parametrize("classes", [2, 5])
def test_each_image_by_itself_and_differentiable(name, classes):
    model, (x, other, y) = split(classes), images(classes)
    make = OBJECTIVES.get(name)
    with attack_mode(model):
        together = make(model, x, y)(other)
        alone = torch.cat([make(model, x[i : i + 1], y[i : i + 1])(other[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        assert together.shape == (len(x),) and together.dtype == torch.float64
        assert gradcheck(make(model, x, y), (other.requires_grad_(),))


@pytest.mark.parametrize("name", ["embedding_logits", "prototype"])
def test_they_break_a_model_that_reads_its_features(name):
    """Labels are the model's own answers; the direction of the features decides, so both must reach the boundary."""
    model, (x, _, _) = split(3), images(count=40)
    y = model(x).argmax(1)
    x_adv = pgd(model, x, y, eps=0.5, steps=40, objective=name, random_start=False)
    assert (model(x_adv).argmax(1) != y).double().mean() > 0.9


@pytest.mark.parametrize("name", ["embedding_logits", "prototype"])
def test_a_degenerate_encoder_gives_numbers(name):
    """Features of zero: no direction, so nothing to gain, but no NaN that would end the attack."""
    model, (x, other, y) = split(), images()
    with torch.no_grad():
        model.encoder[1].weight.zero_()
        model.encoder[1].bias.zero_()
    value = OBJECTIVES.get(name)(model, x, y)(other.requires_grad_())
    (gradient,) = torch.autograd.grad(value.sum(), other)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_supcon_objective_is_the_sum_over_positives_of_khosla():
    """Khosla et al. 2020, eq. 2 (L_out), written out over the clean and the moved images."""
    model, (x, other, y) = split(), images()
    values = OBJECTIVES.get("supcon")(model, x, y, temperature=0.3)(other).detach()
    z = np.concatenate([model.features(part).detach().numpy() for part in (x, other)])
    z, labels = z / np.linalg.norm(z, axis=1, keepdims=True), np.concatenate([y, y])
    each = []
    for i in range(len(z)):
        below = sum(np.exp(z[i] @ z[a] / 0.3) for a in range(len(z)) if a != i)
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        each.append(-np.mean([np.log(np.exp(z[i] @ z[p] / 0.3) / below) for p in positives]))
    expected = np.mean(np.array(each).reshape(2, -1), axis=0)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)  # the embedding is float32


def test_the_margin_among_neighbours_is_that_of_a_loop():
    model, (x, other, _) = split(), images()
    y = torch.arange(len(x)) % (len(x) - 1)  # the first and the last share a label, the others stand alone
    values = OBJECTIVES.get("neighbours")(model, x, y)(other).detach()
    z, keys = (nn.functional.normalize(model.features(each), dim=1).detach() for each in (other, x))
    for i in range(len(x)):
        wrong = max(float(z[i] @ keys[j]) for j in range(len(x)) if y[j] != y[i])
        right = [float(z[i] @ keys[j]) for j in range(len(x)) if y[j] == y[i] and j != i] or [float(z[i] @ keys[i])]
        assert float(values[i]) == pytest.approx(wrong - max(right), abs=1e-6)
    assert torch.isfinite(OBJECTIVES.get("neighbours")(model, x, torch.zeros_like(y))(other)).all()
