"""MART against a slow form of its paper's equations, one image and one class at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clead.attacks.pgd import PGD
from clead.interfaces import Batch
from clead.methods.mart import MART, boosted_cross_entropy, wrong_probability
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.threats.linf import Linf
from support import generator

EPS, STEPS, STEP = 0.1, 2, 0.05
THREAT, ATTACK = Linf(eps=EPS), PGD(steps=STEPS, step_size=STEP)


def make_model():
    return build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8)).train()


def make_batch(count=6, soft=False):
    labels = torch.arange(count) % 4
    own = F.one_hot(labels, 4)
    mixed = 0.7 * own + 0.3 * own.flip(0).float() if soft else None
    return Batch(torch.rand(count, 1, 8, 8, generator=generator(1)), labels, soft_labels=mixed)


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def slow_terms(clean, adversarial, labels):
    """The mean of BCE (eq. 8) and of KL·(1 − p_y) (eq. 9), as written."""
    boosted, weighted = [], []
    for z, z_adv, y in zip(clean.tolist(), adversarial.tolist(), labels.tolist(), strict=True):
        p, q = softmax(z), softmax(z_adv)
        boosted.append(-math.log(q[y]) - math.log(1 - max(q[k] for k in range(len(q)) if k != y)))
        weighted.append(sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p))) * (1 - p[y]))
    return np.mean(boosted), np.mean(weighted)


def textbook_x_adv(model, x, targets):
    model.eval()
    x_adv = torch.empty_like(x).uniform_(-EPS, EPS, generator=generator(5)).add_(x).clamp_(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), targets, reduction="sum"), x_adv)
        x_adv = torch.minimum(torch.maximum(x_adv.detach() + STEP * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return x_adv


def run(method, batch=None, model=None):
    model = make_model() if model is None else copy.deepcopy(model)
    output = method(model, batch or make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def test_the_loss_equals_the_paper_image_by_image():
    output, _ = run(MART())
    model, batch = make_model(), make_batch()
    x_adv = textbook_x_adv(model, batch.images, batch.labels)
    clean, adversarial = model(torch.cat([batch.images, x_adv])).detach().double().chunk(2)
    boosted, weighted = slow_terms(clean, adversarial, batch.labels)
    assert output.metrics["boosted_cross_entropy"].item() == pytest.approx(boosted, rel=1e-5)
    assert output.metrics["weighted_kl"].item() == pytest.approx(weighted, rel=1e-4)
    assert output.loss.item() == pytest.approx(boosted + 5 * weighted, rel=1e-5)
    assert output.metrics["clean_accuracy"] == (clean.argmax(1) == batch.labels).float().mean()
    assert output.metrics["robust_accuracy"] == (adversarial.argmax(1) == batch.labels).float().mean()


def test_the_gradient_goes_through_every_factor():
    """Against autograd of the plain formula in float64, at logits where nothing under- or overflows."""
    logits = 2 * torch.randn(2, 7, 5, dtype=torch.float64, generator=generator(5))
    labels = torch.arange(7) % 5
    gradients = []
    for ours in (True, False):
        clean, adversarial = (part.clone().requires_grad_() for part in logits)
        if ours:
            targets = F.one_hot(labels, 5)
            kl = F.kl_div(F.log_softmax(adversarial, 1), clean.softmax(1), reduction="none").sum(1)
            value = boosted_cross_entropy(adversarial, targets) + kl * wrong_probability(clean, targets)
        else:
            p, q = clean.softmax(1), adversarial.softmax(1)
            p_y, q_y = p[torch.arange(7), labels], q[torch.arange(7), labels]
            others = torch.stack([q[i, torch.arange(5) != y].max() for i, y in enumerate(labels)])
            value = -q_y.log() - (1 - others).log() + (p * (p / q).log()).sum(1) * (1 - p_y)
        gradients.append(torch.autograd.grad(value.sum(), (clean, adversarial)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_parameter_gradients_equal_autograd_of_the_formula():
    _, gradients = run(MART(kl_weight=2.5))
    model, batch = make_model(), make_batch()
    x_adv = textbook_x_adv(model, batch.images, batch.labels)
    p, q = model(torch.cat([batch.images, x_adv])).softmax(1).chunk(2)
    one = F.one_hot(batch.labels, 4)
    others = (q - 2 * one).amax(1)
    loss = -(q * one).sum(1).log() - (1 - others).log() + 2.5 * (p * (p / q).log()).sum(1) * (1 - (p * one).sum(1))
    loss.mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-3)


def test_the_strongest_wrong_class_where_the_first_is_right_or_wrong():
    """K = 2: the margin term is the cross-entropy again. K = 3: by hand."""
    z = torch.randn(9, 2, generator=generator(5))
    y = torch.arange(9) % 2
    torch.testing.assert_close(boosted_cross_entropy(z, F.one_hot(y, 2)), 2 * F.cross_entropy(z, y, reduction="none"))
    z = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for k, expected in enumerate((0.5 * 0.7, 0.3 * 0.5, 0.2 * 0.5)):
        found = boosted_cross_entropy(z, F.one_hot(torch.tensor([k]), 3))
        assert found.item() == pytest.approx(-math.log(expected), rel=1e-5)


@pytest.mark.parametrize("scale", [30.0, 300.0, 3e4])
def test_confident_models_give_finite_losses_and_gradients(scale):
    """Where p rounds to 1, log(1 − p) of the formula is −∞."""
    z = (scale * torch.eye(4)).requires_grad_()
    for y in range(4):
        targets = F.one_hot(torch.full((4,), y), 4)
        value = boosted_cross_entropy(z, targets)
        (gradient,) = torch.autograd.grad(value.sum() + wrong_probability(z, targets).sum(), z)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        wrong = torch.arange(4) != y
        torch.testing.assert_close(value[wrong], (2 * scale - z.new_tensor(3).log()).expand(3), rtol=1e-3, atol=0.5)
    assert (wrong_probability(z, torch.eye(4)) >= 0).all()
    assert wrong_probability(torch.tensor([[20.0, 0.0]]), torch.tensor([[1, 0]])).item() == pytest.approx(
        math.exp(-20), rel=1e-4
    )


def test_mixed_labels_mix_the_losses():
    batch = make_batch(soft=True)
    output, _ = run(MART(), batch)
    model = make_model()
    x_adv = textbook_x_adv(model, batch.images, batch.soft_labels)  # the attack climbs the mixed cross-entropy too
    clean, adversarial = model(torch.cat([batch.images, x_adv])).detach().double().chunk(2)
    parts = [slow_terms(clean, adversarial, labels) for labels in (batch.labels, batch.labels.flip(0))]
    expected = sum(share * (b + 5 * w) for share, (b, w) in zip((0.7, 0.3), parts, strict=True))
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_one_hot_soft_labels_change_nothing():
    batch = make_batch()
    hot = batch._replace(soft_labels=F.one_hot(batch.labels, 4).float())
    torch.testing.assert_close(run(MART(), batch)[0].loss, run(MART(), hot)[0].loss)


def test_without_kl_only_adversarial_images_go_forward():
    output, _ = run(MART(kl_weight=0))
    model, batch = make_model(), make_batch()
    adversarial = model(textbook_x_adv(model, batch.images, batch.labels)).detach()
    assert output.loss.item() == pytest.approx(slow_terms(adversarial, adversarial, batch.labels)[0], rel=1e-5)
    assert "weighted_kl" not in output.metrics


@pytest.mark.parametrize("kl_weight, cost", [(5, 2 * STEPS + 6), (0, 2 * STEPS + 3)])
def test_cost(kl_weight, cost):
    model = make_model()
    with CostMeter(model) as meter:
        method = MART(kl_weight=kl_weight)
        method(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5)).loss.backward()
    assert meter.forward_equivalents == 6 * cost


def test_every_option_changes_the_result_or_only_rounding():
    _, reference = run(MART())
    _, other = run(MART(kl_weight=6))
    _, fast = run(MART(fold_batch_norm=True))
    name = "encoder.linear.weight"
    assert not torch.allclose(reference[name], other[name], rtol=1e-3)
    torch.testing.assert_close(fast[name], reference[name], atol=1e-3, rtol=1e-2)
    assert set(MART.__pydantic_fields__) == {"kl_weight", "fold_batch_norm"}


def test_half_precision_losses_are_float32():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        output = MART()(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    z = torch.randn(3, 4).bfloat16()
    assert (
        boosted_cross_entropy(z, torch.eye(4)[:3]).dtype
        == wrong_probability(z, torch.eye(4)[:3]).dtype
        == torch.float32
    )
