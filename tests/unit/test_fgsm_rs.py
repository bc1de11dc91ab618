"""FGSM-RS and gradient alignment against slow forms: the textbook step, cosines image by image, differences, products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import clead
from clead.attacks.fgsm import FGSM
from clead.config import load_recipe
from clead.interfaces import Batch
from clead.methods.fgsm_rs import FGSMRS, misalignment
from clead.methods.pgd_at import PGDAT
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.threats.l2 import L2
from clead.threats.linf import Linf
from clead.training import trainer
from clead.weights.files import load_weights
from support import generator

EPS = 0.1
THREAT, ATTACK = Linf(eps=EPS), FGSM(random_start=True, step_size="1.25")


def make_model(width=4):
    return build_model(SmallCNN(width=width, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8)).train()


def make_batch(count=6):
    return Batch(torch.rand(count, 1, 8, 8, generator=generator(1)), torch.arange(count) % 4)


def run(method, batch=None, seed=5, threat=THREAT):
    model = make_model()
    output = method(model, batch or make_batch(), threat=threat, attack=ATTACK, generator=generator(seed))
    output.loss.backward()
    return output, {**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def test_it_is_algorithm_3_of_fast_adversarial_training():
    """δ ~ U(−ε, ε); δ ← clip(δ + 1.25 ε sign ∇ℓ(x + δ)); descend on ℓ(x + δ). The start is clipped to [0, 1], as in Wong's code."""
    output, state = run(FGSMRS())
    model, (x, y, *_) = make_model(), make_batch()
    delta = torch.empty_like(x).uniform_(-EPS, EPS, generator=generator(5))
    delta = ((x + delta).clamp(0, 1) - x).requires_grad_()
    model.eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
    model.train()
    delta = (delta.detach() + 1.25 * EPS * gradient.sign()).clamp(-EPS, EPS)
    loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
    loss.backward()
    torch.testing.assert_close(output.loss, loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(state[name], p.grad, atol=1e-6, rtol=1e-4)


def test_without_alignment_it_is_pgd_at_to_the_last_bit():
    (one, a), (other, b) = run(FGSMRS()), run(PGDAT())
    assert torch.equal(one.loss, other.loss) and one.metrics.keys() == other.metrics.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def slow_cosines(a, b):
    """One image at a time, by hand."""
    pairs = [(u.flatten(), v.flatten()) for u, v in zip(a, b, strict=True)]
    return torch.stack([(u * v).sum() / (u.square().sum().sqrt() * v.square().sum().sqrt()) for u, v in pairs])


def test_the_misalignment_of_an_image_is_its_own():
    """Where no batch-norm mixes them: each gradient by a backward of its own."""
    model, (x, y, *_) = make_model().eval(), make_batch()
    neighbour = x.flip(0)
    gradients = []
    for points in (x, neighbour):
        found = []
        for i in range(len(x)):
            image = points[i : i + 1].clone().requires_grad_()
            found.append(torch.autograd.grad(F.cross_entropy(model(image), y[i : i + 1]), image)[0])
        gradients.append(torch.cat(found))
    torch.testing.assert_close(misalignment(model, x, neighbour, y), 1 - slow_cosines(*gradients), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_the_term_and_its_double_backward_equal_the_slow_form(soft):
    weight, batch = 0.7, make_batch()
    if soft:
        own = F.one_hot(batch.labels, 4).float()
        batch = batch._replace(soft_labels=0.6 * own + 0.4 * own.flip(0))
    (output, state), (plain, plain_state) = run(FGSMRS(grad_align_weight=weight), batch), run(FGSMRS(), batch)
    model, draws, x = make_model(), generator(5), batch.images
    for _ in range(2):  # the attack's start is drawn before η
        neighbour = torch.empty_like(x).uniform_(-EPS, EPS, generator=draws).add_(x).clamp_(0, 1)
    hard = F.one_hot(batch.labels, 4).float()
    targets = (batch.soft_labels if soft else hard).repeat(2, 1)
    points = torch.cat([x, neighbour]).requires_grad_()
    loss = -(targets * F.log_softmax(model(points), 1)).sum()
    (gradient,) = torch.autograd.grad(loss, points, create_graph=True)
    expected = (1 - slow_cosines(gradient[:6], gradient[6:])).mean()
    expected.backward()
    assert expected > 0.01
    torch.testing.assert_close(output.metrics["gradient_misalignment"], expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, plain.loss + weight * expected.detach(), rtol=1e-5, atol=1e-6)
    moved = 0.0
    for name, p in model.named_parameters():
        extra = torch.zeros_like(p) if p.grad is None else weight * p.grad
        moved += extra.abs().max().item()
        torch.testing.assert_close(state[name] - plain_state[name], extra, atol=2e-5, rtol=1e-3)
    assert moved > 1e-3
    for name, _ in model.named_buffers():
        assert torch.equal(state[name], plain_state[name]), "the term leaves batch-norm statistics alone"


def test_the_gradient_by_the_weights_equals_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, neighbour, y = torch.rand(4, 5).double(), torch.rand(4, 5).double(), torch.arange(4) % 3

    def value():
        return misalignment(model, x, neighbour, y).sum()

    value().backward()
    weight, h = model[1].weight, 1e-5
    for index in ((0, 0), (3, 2), (6, 4)):
        with torch.no_grad():
            weight[index] += h
        above = value().item()
        with torch.no_grad():
            weight[index] -= 2 * h
        below = value().item()
        with torch.no_grad():
            weight[index] += h
        assert weight.grad[index].item() == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-9)


def test_a_linear_model_of_two_classes_is_aligned_and_a_flat_one_counts_so():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, neighbour, y = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1])
    torch.testing.assert_close(misalignment(linear, x, neighbour, y), torch.zeros(3), atol=1e-6, rtol=0)
    # A confident model, whose gradients would underflow in the cosine, is no less aligned.
    with torch.no_grad():
        linear[1].bias.copy_(torch.tensor([60.0, -25.0]))
    found = misalignment(linear, x, neighbour, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-5, rtol=0)
    nn.init.zeros_(linear[1].weight)
    found = misalignment(linear, x, neighbour, y)
    assert torch.equal(found, torch.zeros(3))
    found.sum().backward()
    assert torch.isfinite(linear[1].weight.grad).all()


def test_opposite_gradients_are_misaligned_by_two():
    class Ridge(nn.Module):
        def forward(self, x):
            value = x.flatten(1).sum(1, keepdim=True).abs()
            return torch.cat([value, torch.zeros_like(value)], 1)

    x = torch.full((2, 1, 2, 2), 0.3)
    torch.testing.assert_close(misalignment(Ridge(), x, -x, torch.tensor([0, 1])), torch.full((2,), 2.0))


def test_images_without_a_label_count_as_aligned():
    batch = make_batch()
    some = batch._replace(labelled=torch.tensor([True, True, False, True, False, True]))
    output, _ = run(FGSMRS(grad_align_weight=1.0), some)
    assert torch.isfinite(output.loss)
    blind, _ = run(FGSMRS(grad_align_weight=1.0), batch._replace(labelled=torch.zeros(6, dtype=torch.bool)))
    assert blind.metrics["gradient_misalignment"] == 0 < output.metrics["gradient_misalignment"]


def test_the_option_changes_the_result_in_every_norm():
    for threat in (THREAT, L2(eps=1.0)):
        (one, a), (other, b) = run(FGSMRS(grad_align_weight=0.2), threat=threat), run(FGSMRS(), threat=threat)
        assert one.loss > other.loss
        assert not torch.equal(a["encoder.linear.weight"], b["encoder.linear.weight"])
    assert set(FGSMRS.__pydantic_fields__) - set(PGDAT.__pydantic_fields__) == {"grad_align_weight"}


def test_the_loss_is_float32_in_half_precision():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        method = FGSMRS(grad_align_weight=0.2)
        output = method(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_double_backward_goes_around_a_compiled_forward():
    """torch.compile has no double backward; the attack and the step's own forward stay compiled."""
    model, seen = make_model(), []

    def compiled(x):
        seen.append(len(x))
        return model._split(x)

    model._compiled = compiled
    FGSMRS(grad_align_weight=0.2)(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    assert seen == [6, 6] and model._compiled is compiled
    assert all(part.track_running_stats for part in model.modules() if isinstance(part, nn.BatchNorm2d))


# ------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("weight, cost", [(0, 2 + 3), (0.2, 2 + 3 + 12)])
def test_cost_in_forward_equivalents(weight, cost):
    model = make_model()
    with CostMeter(model) as meter:
        method = FGSMRS(grad_align_weight=weight)
        method(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5)).loss.backward()
    assert meter.forward_equivalents == 6 * cost


def test_the_count_of_the_double_backward_agrees_with_multiplications():
    """PyTorch's own counter of multiplications, as a multiple of a forward's, against the count: within a tenth."""
    model, (x, y, *_) = make_model(width=16), make_batch()
    model.eval()

    def multiplications(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def step():
        misalignment(model, x, x.flip(0), y).mean().backward()

    forward = multiplications(lambda: model(x))
    with CostMeter(model) as meter:
        step()
    assert multiplications(step) / forward == pytest.approx(meter.forward_equivalents / len(x), rel=0.1)


# ------------------------------------------------------------------------------------------------ catastrophic overfitting


def test_catastrophic_overfitting_is_detected_and_the_weights_before_are_kept(tmp_path, monkeypatch):
    """Robust accuracy soars on training batches, as it does when the one step has become too weak, while validation's falls."""
    plan = ({"clean_accuracy": 0.9, "robust_accuracy": robust} for robust in (0.5, 0.6, 0.02, 0.0))
    monkeypatch.setattr(trainer, "accuracy_under_attack", lambda *args, **keys: next(plan))
    monkeypatch.setattr(trainer, "LOG_STEPS", 1)
    real = FGSMRS.loss

    def soaring(self, *args, **keys):
        output = real(self, *args, **keys)
        output.metrics["robust_accuracy"] = torch.tensor(0.99)
        return output

    monkeypatch.setattr(FGSMRS, "loss", soaring)
    tiny = "--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 16 --train.device cpu --train.epochs 4"
    more = "--train.validate_every 1 --method.grad_align_weight 0.1"
    run = clead.train(load_recipe("digits-fgsm-rs", [*tiny.split(), *more.split()]), out=tmp_path / "run", show=False)
    assert run.outcome.collapsed_at == 9 and run.outcome.best_step == 6
    assert load_weights(run.path / "best.safetensors")[1]["step"] == 6
    kept, last = (load_weights(run.path / f"{name}.safetensors")[0] for name in ("best", "last"))
    assert not torch.equal(kept["classifier.weight"], last["classifier.weight"])
