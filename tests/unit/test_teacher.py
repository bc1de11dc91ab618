"""Methods that learn from a teacher, against slow forms of their papers' equations; and how a training gets its teacher."""

from __future__ import annotations

import copy
import math
import shlex

import numpy as np
import pytest
import torch

import clead
from clead.attacks.pgd import PGD
from clead.config import load_recipe
from clead.errors import UserError
from clead.interfaces import Batch
from clead.losses.anchor import prototype_cross_entropy, relative_distance
from clead.losses.contrastive import nt_xent
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.clead_finetune import Prototypes
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.threats.linf import Linf
from support import generator, same, saved_weights

THREAT, ATTACK = Linf(eps=0.1), PGD(steps=2, step_size=0.05)


def model_of(seed):
    return build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=seed, sample_shape=(1, 8, 8))


def batch_of(count=6):
    return Batch(torch.rand(count, 1, 8, 8, generator=generator(1)), torch.arange(count) % 4)


def softmax(z, t=1.0):
    e = [math.exp((v - max(z)) / t) for v in z]
    return [v / sum(e) for v in e]


def slow_kl(target, logits, t=1.0):
    """t²·KL(softmax(target/t) ‖ softmax(logits/t)), the mean over images."""
    total = 0.0
    for a, b in zip(target.tolist(), logits.tolist(), strict=True):
        p, q = softmax(a, t), softmax(b, t)
        total += t**2 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(target)


def made(name, state=None, **settings):
    """Return a method's views of a batch, its loss, and model and teacher; batch-norm learns in evaluation mode."""
    model, teacher = model_of(0).eval(), model_of(1).eval().requires_grad_(False)
    method = METHODS.get(name)(**settings)
    step = StepContext(THREAT, ATTACK, generator(5), state=state, teacher=teacher)
    views = method.views(model, batch_of(), step)
    return views, method.loss(model, views, step), model, teacher


def test_ard_is_its_equation():
    views, output, model, teacher = made("ard", adversarial_weight=0.7, label_weight=0.3, temperature=3.0)
    x_adv = views.images["adversarial"]
    with torch.no_grad():
        clean, adversarial, target = model(batch_of().images), model(x_adv), teacher(batch_of().images)
    labels = batch_of().labels.tolist()
    cross_entropy = -np.mean([math.log(softmax(z)[y]) for z, y in zip(clean.tolist(), labels, strict=True)])
    expected = 0.7 * slow_kl(target, adversarial, 3.0) + 0.3 * cross_entropy
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.metrics["adversarial_distance"].item() == pytest.approx(slow_kl(target, adversarial, 3.0), rel=1e-4)


def test_rslad_is_its_equation_and_attacks_the_distance_to_the_teacher():
    views, output, model, teacher = made("rslad")
    x, x_adv = batch_of().images, views.images["adversarial"]
    with torch.no_grad():
        target = teacher(x)
        expected = 5 / 6 * slow_kl(target, model(x_adv)) + 1 / 6 * slow_kl(target, model(x))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    start = torch.empty_like(x).uniform_(-0.1, 0.1, generator=generator(5)).add_(x).clamp_(0, 1)
    other, copied = start, copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        other = other.detach().requires_grad_()
        p = target.softmax(1)
        value = (p * (p.log() - copied(other).log_softmax(1))).sum()
        (gradient,) = torch.autograd.grad(value, other)
        other = torch.minimum(torch.maximum(other.detach() + 0.05 * gradient.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.allclose(x_adv, other, atol=1e-6)


def test_lbgat_is_its_equation():
    views, output, model, teacher = made("lbgat")
    with torch.no_grad():
        clean, adversarial = model(batch_of().images), model(views.images["adversarial"])
        target = teacher(batch_of().images)
    squared = np.mean((np.array(adversarial.tolist()) - np.array(target.tolist())) ** 2)
    assert output.loss.item() == pytest.approx(squared + 6 * slow_kl(clean, adversarial), rel=1e-4)


def test_clead_embed_is_its_equation_and_leaves_the_classifier():
    views, output, model, teacher = made("clead_embed", contrastive_weight=0.5, clean_weight=0.25, temperature=0.2)
    x, x_adv = batch_of().images, views.images["adversarial"]
    with torch.no_grad():
        h0, h, h_adv = (np.array(m.features(v).tolist()) for m, v in ((teacher, x), (model, x), (model, x_adv)))
    scale = (h0**2).sum(1).mean()
    unit = [torch.tensor(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in (h_adv, h0)]
    contrast = nt_xent(unit, 0.2).mean().item()  # itself tested against slow forms in test_losses.py
    expected = ((h_adv - h0) ** 2).sum(1).mean() / scale + 0.25 * ((h - h0) ** 2).sum(1).mean() / scale + 0.5 * contrast
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    output.loss.backward()
    assert all(p.grad is None for p in model.classifier.parameters())
    assert model.encoder.linear.weight.grad is not None and all(p.grad is None for p in teacher.parameters())


def test_clead_finetune_adds_both_terms_to_pgd_at():
    prototypes = Prototypes(4, 8)
    views, output, model, teacher = made(
        "clead_finetune", prototypes, anchor_weight=0.5, prototype_weight=2.0, prototype_temperature=0.3
    )
    x, y = batch_of().images, batch_of().labels
    with torch.no_grad():
        h0, h_adv = (np.array(v.tolist()) for v in (teacher.features(x), model.features(views.images["adversarial"])))
        adversarial = model(views.images["adversarial"])
    cross_entropy = -np.mean([math.log(softmax(z)[k]) for z, k in zip(adversarial.tolist(), y.tolist(), strict=True)])
    anchor = ((h_adv - h0) ** 2).sum(1).mean() / (h0**2).sum(1).mean()
    unit = h0 / np.linalg.norm(h0, axis=1, keepdims=True)
    means = np.stack([unit[y.numpy() == k].mean(0) for k in range(4)])
    assert np.allclose(prototypes.sums.numpy(), np.stack([unit[y.numpy() == k].sum(0) for k in range(4)]), atol=1e-5)
    tecoa = 0.0
    for h, k in zip(h_adv, y.tolist(), strict=True):
        cosines = [float(h @ m / np.linalg.norm(h) / np.linalg.norm(m)) for m in means]
        tecoa -= math.log(softmax(cosines, 0.3)[k]) / len(y)
    assert output.loss.item() == pytest.approx(cross_entropy + 0.5 * anchor + 2 * tecoa, rel=1e-4)
    assert torch.allclose(output.metrics["prototypes"], torch.tensor(tecoa).float(), rtol=1e-4)


def test_both_anchors_have_exact_gradients():
    h = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    anchors, prototypes = torch.randn(3, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda h: relative_distance(h, anchors), h)
    labels = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda h: prototype_cross_entropy(h, prototypes, labels, 0.2), h)


# ------------------------------------------------------------------------------------------- whole trainings


TINY = shlex.split("""--data.limit_train 80 --data.batch_size 20 --attack.steps 1 --train.validate_steps 1 --train.epochs 1
--model.width 4 --model.features 8 --train.device cpu""")


def fit(out, *overrides, resume=False):
    return clead.train(load_recipe("digits-pgd-at", [*TINY, *overrides]), out=out, show=False, resume=resume)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("teacher") / "run", "--method.name", "standard", "--train.epochs", "3").path


@pytest.mark.parametrize("method", ["ard", "rslad", "lbgat", "clead_embed", "clead_finetune"])
def test_a_training_learns_from_a_run_and_counts_its_forwards(method, teacher, tmp_path):
    run = fit(tmp_path / "run", "--method.name", method, "--train.teacher", str(teacher))
    assert all(np.isfinite(line["loss"]) for line in clead.runs.directory.RunDir(run.path).history() if "loss" in line)
    lines = clead.runs.directory.RunDir(run.path).history()
    assert any("robust_accuracy" in line for line in lines)
    # 70 training images. One step of PGD 2, forward and backward of each view 3, and one forward of a teacher of the same size.
    views = {"ard": 1, "rslad": 2, "lbgat": 2, "clead_embed": 1, "clead_finetune": 1}[method]
    clean_prediction = 1 if method == "lbgat" else 0
    per_image = run.outcome.forward_equivalents * 70 / (run.outcome.steps * 20)
    assert per_image == pytest.approx(2 + 3 * views + 1 + clean_prediction, rel=0.01)


def test_start_is_the_model_as_it_begins_also_after_a_resume(teacher, tmp_path, monkeypatch):
    overrides = ["--method.name", "clead_embed", "--train.teacher", "start", "--train.start_from", str(teacher)]
    whole = fit(tmp_path / "whole", *overrides, "--train.epochs", "2")
    assert torch.equal(
        saved_weights(whole.path)["classifier.weight"], saved_weights(teacher, "best")["classifier.weight"]
    )
    from clead.runs.resume import Checkpoints
    from support import Killed

    save = Checkpoints.save

    def killed(self, state):
        save(self, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            fit(tmp_path / "killed", *overrides, "--train.epochs", "2", "--train.checkpoint_seconds", "0")
    fit(tmp_path / "killed", *overrides, "--train.epochs", "2", "--train.checkpoint_seconds", "0", resume=True)
    assert same(saved_weights(whole.path), saved_weights(tmp_path / "killed"))


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    cases = [
        (
            ["--method.name", "rslad"],
            "train.teacher: this method learns from a teacher, got none; name a run, or start",
        ),
        (["--train.teacher", "start"], "train.teacher: this method has no use for a teacher, got start; leave it out"),
        (["--method.name", "rslad", "--train.teacher", "nowhere"], "train.teacher: nowhere is not a run directory"),
        (
            ["--method.name", "clead_embed", "--train.teacher", str(teacher), "--model.features", "9"],
            "has features of size 8, this model 9",
        ),
        (["--method.name", "ard", "--method.adversarial_weight", "0"], "nothing is learnt from the teacher"),
    ]
    for overrides, rule in cases:
        with pytest.raises(UserError) as refused:
            fit(tmp_path / "run", *overrides)
        assert rule in str(refused.value), rule
        assert not (tmp_path / "run").exists()


def test_a_loop_of_ones_own_has_a_teacher_too():
    net, other = model_of(0), model_of(1)
    step = clead.RobustLoss(net, (1, 8, 8), "rslad", eps=0.1, teacher=other)
    loss, metrics = step(*batch_of()[:2])
    loss.backward()
    assert set(metrics) >= {"adversarial_distance", "robust_accuracy"}
    assert all(p.grad is None for p in other.parameters()) and any(p.grad is not None for p in net.parameters())
    with pytest.raises(UserError, match="learns from a teacher"):
        clead.robust_loss(net, *batch_of()[:2], "rslad", eps=0.1)
    with pytest.raises(UserError, match="has no use for one"):
        clead.RobustLoss(net, (1, 8, 8), "trades", eps=0.1, teacher=other)
    with CostMeter(other) as meter:
        clead.RobustLoss(net, (1, 8, 8), "rslad", eps=0.1)(*batch_of()[:2])
    assert meter.forwards == 0  # its teacher is a copy of the model
