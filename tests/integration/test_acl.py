"""ACL against slow forms: the loss in NumPy, streams as models of their own, costs in closed form; DynACL's weights by hand."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shlex

import numpy as np
import pytest
import torch
from torch import nn

import clead
from clead.attacks.fgsm import FGSM
from clead.attacks.pgd import PGD
from clead.config import RunConfig, load_recipe
from clead.data.loaders import Loader
from clead.errors import UserError
from clead.interfaces import Batch
from clead.losses.contrastive import nt_xent
from clead.methods.acl import ACL, CleanNorms, joint_nt_xent
from clead.methods.base import StepContext
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.small_cnn import SmallCNN
from clead.runs.resume import Checkpoints
from clead.settings import validated
from clead.threats.linf import Linf
from clead.training.step import cost_per_image
from support import Killed, generator, history, same, saved_weights

THREAT, ATTACK = Linf(eps=0.1), PGD(steps=3)
PLAIN = {"embedding_dim": 5}


def make_model():
    model = build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8))
    model.add_projection(5)
    with torch.no_grad():  # batch-norms that are not the identity, so that a wrong one shows
        for number, norm in enumerate(norms(model)):
            norm.weight.uniform_(0.5, 1.5, generator=generator(number))
            norm.bias.uniform_(-0.5, 0.5, generator=generator(number))
            norm.running_mean.normal_(0, 0.3, generator=generator(number))
    return model.train()


def norms(model):
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def make_batch(count=6, labels=None):
    x = torch.rand(count, 1, 8, 8, generator=generator(1))
    second = (0.7 * x + 0.2 * torch.rand(x.shape, generator=generator(2))).flip(3)
    return Batch(x, torch.arange(count) % 4 if labels is None else labels, second)


def memory_of(method, model):
    return method.state(model, (1, 8, 8))


def run(method, *, batch=None, progress=0.0, attack=ATTACK, seed=5):
    """One step: its output, gradients and buffers of model and memory, the views, and both modules."""
    model = make_model()
    memory = memory_of(method, model)
    if memory is not None:  # the streams have parted already
        with torch.no_grad():
            for norm in memory.norms:
                norm.weight.mul_(1.3)
                norm.running_var.mul_(1.7)
    step = StepContext(THREAT, attack, generator(seed), progress, memory)
    views = method.views(model, batch or make_batch(), step)
    output = method.loss(model, views, step)
    output.loss.backward()
    state = {}
    for part in filter(None, (model, memory)):
        kind = "memory." if part is memory else ""
        state |= {kind + name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        state |= {kind + name: buffer for name, buffer in part.named_buffers()}
    return output, state, views, model, memory


def slow_nt_xent(one, other, tau):
    """SimCLR's algorithm 1, one pair of vectors at a time, in float64."""
    z = [v for pair in zip(np.float64(one), np.float64(other), strict=True) for v in pair]
    total = 0.0
    for i, anchor in enumerate(z):
        partner = i + 1 if i % 2 == 0 else i - 1
        scores = [float(anchor @ z[k]) / tau for k in range(len(z))]
        below = sum(math.exp(score) for k, score in enumerate(scores) if k != i)
        total -= math.log(math.exp(scores[partner]) / below)
    return total / len(z)


def separate(views, memory_like):
    """The streams as two models of their own: forward of a pair, embeddings of the first and the second view."""
    found = []
    for suffix, model in (("", memory_like), ("_adversarial", make_model())):
        pair = torch.cat([views.images["first" + suffix], views.images["second" + suffix]])
        found.append((model, model.embedding(model.features(pair)).chunk(2)))
    return found


def clean_model():
    """What the model would be with the clean stream's batch-norms of ``run``."""
    model = make_model()
    with torch.no_grad():
        for norm in norms(model):
            norm.weight.mul_(1.3)
            norm.running_var.mul_(1.7)
    return model


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("nu, kappa, progress, omega", [
    (0, 0.05, 0.9, 0), (0.6, 0.25, 0.0, 0), (0.6, 0.25, 0.49, 0.15), (0.6, 0.25, 0.5, 0.3), (1, 0.1, 0.3, 0.3), (1, 0.3, 0.95, 0.9),
])  # fmt: skip
def test_the_loss_is_the_weighted_mean_of_both_terms(nu, kappa, progress, omega):
    """ω by hand: ν times the part of the training that lies behind, rounded down to whole steps of κ."""
    method = ACL(**PLAIN, temperature=0.3, reweight=nu, reweight_step=kappa)
    output, _, views, _, _ = run(method, progress=progress)
    clean, adversarial = (
        slow_nt_xent(*(part.detach().numpy() for part in z), 0.3) for _, z in separate(views, clean_model())
    )
    assert output.loss.item() == pytest.approx(0.5 * ((1 - omega) * clean + (1 + omega) * adversarial), rel=1e-5)
    assert output.metrics["clean_contrastive"].item() == pytest.approx(clean, rel=1e-5)
    assert output.metrics["adversarial_contrastive"].item() == pytest.approx(adversarial, rel=1e-5)
    assert abs(clean - adversarial) > 0.01


def test_the_weights_never_leave_their_range_and_change_only_at_whole_steps():
    """Of 1,000 steps with κ = 0.05: twenty levels, 50 steps each, up to ν·0.95; without rounding down too early."""
    method, seen = ACL(**PLAIN, reweight="2/3"), []
    model, batch = make_model(), make_batch()
    views = method.views(model, batch, StepContext(THREAT, FGSM(), generator(5)))
    losses = [(0.0, 1.0), (1.0, 0.0)]  # the loss of (clean, adversarial) terms: what is left is the weight
    for t in range(0, 1000, 25):
        weights = []
        for pair in losses:
            values = iter(pair)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("clead.methods.acl.nt_xent", lambda z, tau, values=values: torch.tensor([next(values)]))
                weights.append(
                    method.loss(model, views, StepContext(THREAT, ATTACK, generator(5), t / 1000)).loss.item()
                )
        assert sum(weights) == pytest.approx(1)
        seen.append(2 * weights[0] - 1)
    assert seen == pytest.approx([2 / 3 * (t // 50) * 0.05 for t in range(0, 1000, 25)], abs=1e-6)


def test_labels_are_not_looked_at():
    unknown = make_batch(labels=torch.full((6,), -1))._replace(labelled=torch.zeros(6, dtype=torch.bool))
    (one, a, *_), (other, b, *_) = run(ACL(**PLAIN)), run(ACL(**PLAIN), batch=unknown)
    assert torch.equal(one.loss, other.loss) and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ the attack


def test_the_adversaries_raise_nt_xent_jointly():
    _, _, views, _, _ = run(ACL(**PLAIN, temperature=0.02), attack=PGD(steps=10, step_size=0.02))
    model, images = make_model(), views.images
    with attack_mode(model), torch.no_grad():
        z = {name: model.embedding(model.features(x)).numpy() for name, x in images.items()}
    for name in ("first", "second"):
        moved = (images[name + "_adversarial"] - images[name]).abs()
        assert 0 < moved.max() <= THREAT.eps + 1e-6
    before = slow_nt_xent(z["first"], z["second"], 0.02)
    one = slow_nt_xent(z["first_adversarial"], z["second"], 0.02)
    both = slow_nt_xent(z["first_adversarial"], z["second_adversarial"], 0.02)
    assert both > one > before and both > before + 0.1


def test_one_step_of_the_attack_goes_along_the_gradient_by_both_views():
    attack, tau = FGSM(random_start=False), 0.3
    _, _, views, _, _ = run(ACL(**PLAIN, temperature=tau), attack=attack)
    model, batch = make_model().eval(), make_batch()
    pair = [part.clone().requires_grad_() for part in (batch.images, batch.second_view)]
    value = nt_xent([model.embedding(model.features(part)) for part in pair], tau).sum()
    for name, part, gradient in zip(("first", "second"), pair, torch.autograd.grad(value, pair), strict=True):
        expected = (part.detach() + THREAT.eps * gradient.sign()).clamp(0, 1)
        torch.testing.assert_close(views.images[name + "_adversarial"], expected, atol=1e-6, rtol=0)


def test_the_attack_sees_one_value_per_image_and_pairs_have_the_same():
    model, x = make_model().eval(), torch.cat([make_batch().images, make_batch().second_view])
    values = joint_nt_xent(model, 0.3)(x)
    assert values.shape == (12,) and torch.equal(values[:6], values[6:])
    z = model.embedding(model.features(x)).detach().numpy()
    assert values.mean().item() == pytest.approx(slow_nt_xent(z[:6], z[6:], 0.3), rel=1e-5)


# ------------------------------------------------------------------------------------------------ dual batch-norm


def test_each_stream_has_what_a_model_of_its_own_would_have():
    """Statistics and gradients of batch-norms apart, the gradients of everything else added up."""
    method = ACL(**PLAIN, temperature=0.3, reweight=1, reweight_step=0.25)
    _, _, views, model, memory = run(method, progress=0.25)
    (clean, z), (adversarial, z_adv) = separate(views, clean_model())
    (0.75 * nt_xent(z, 0.3).mean() / 2).backward()
    (1.25 * nt_xent(z_adv, 0.3).mean() / 2).backward()
    assert len(memory.norms) == len(norms(model)) == 4
    for number, own in enumerate(norms(model)):
        pairs = [(own, norms(adversarial)[number]), (memory.norms[number], norms(clean)[number])]
        for ours, expected in pairs:
            torch.testing.assert_close(ours.running_mean, expected.running_mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(ours.running_var, expected.running_var, rtol=1e-6, atol=1e-7)
            assert ours.num_batches_tracked == expected.num_batches_tracked == 1
            torch.testing.assert_close(ours.weight.grad, expected.weight.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours.bias.grad, expected.bias.grad, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(own.running_mean, memory.norms[number].running_mean, atol=1e-4)
    own_norms = {id(p) for norm in norms(model) for p in norm.parameters()}
    others = zip(model.named_parameters(), clean.parameters(), adversarial.parameters(), strict=True)
    for (name, p), a, b in others:
        if name.startswith("classifier."):
            assert p.grad is None
        elif id(p) not in own_norms:
            torch.testing.assert_close(p.grad, a.grad + b.grad, rtol=1e-4, atol=1e-6)
    assert set(dict(memory.named_parameters())) == {f"norms.{n}.{k}" for n in range(4) for k in ("weight", "bias")}


def test_without_it_both_streams_share_the_models():
    method = ACL(**PLAIN, temperature=0.3, dual_batch_norm=False)
    output, state, views, model, memory = run(method)
    assert memory is None and all(norm.num_batches_tracked == 2 for norm in norms(model))
    other, losses = make_model(), []
    for suffix in ("", "_adversarial"):
        pair = torch.cat([views.images["first" + suffix], views.images["second" + suffix]])
        losses.append(nt_xent(other.embedding(other.features(pair)).chunk(2), 0.3).mean())
    (sum(losses) / 2).backward()
    torch.testing.assert_close(output.loss, sum(losses).detach() / 2)
    for name, p in other.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(state[name], p.grad, rtol=1e-4, atol=1e-6)
    for ours, expected in zip(norms(model), norms(other), strict=True):
        torch.testing.assert_close(ours.running_mean, expected.running_mean)


@pytest.mark.parametrize("fails", [False, True])
def test_lent_batch_norms_are_given_back_to_the_last_bit(fails):
    model = make_model()
    memory = CleanNorms(model)
    compiled = model._compiled = lambda x: model._split(x)
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    dicts = [(norm._parameters, norm._buffers) for norm in norms(model)]
    x = make_batch().images
    try:
        with memory.lent_to(model):
            assert model._compiled is None
            assert all(a.weight is b.weight and a.running_mean is b.running_mean
                       for a, b in zip(norms(model), memory.norms, strict=True))  # fmt: skip
            model(x)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert model._compiled is compiled
    for norm, (parameters, buffers) in zip(norms(model), dicts, strict=True):
        assert norm._parameters is parameters and norm._buffers is buffers
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
    assert all(norm.num_batches_tracked == 1 for norm in memory.norms)


def test_batch_norms_of_another_model_are_refused_and_nothing_stays_lent():
    model, memory = make_model(), CleanNorms(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="shorter"), memory.lent_to(model):
        pass
    assert norms(model)[0].weight is not memory.norms[0].weight


def test_the_compiled_forward_serves_all_but_the_clean_stream():
    model, seen = make_model(), []
    memory = CleanNorms(model)

    def compiled(x):
        seen.append(model.training)
        return model._split(x)

    model._compiled = compiled
    method, step = ACL(**PLAIN), StepContext(THREAT, ATTACK, generator(5), 0.0, memory)
    method.loss(model, method.views(model, make_batch(), step), step)
    assert seen == [False] * 3 + [True] and model._compiled is compiled
    assert all(norm.num_batches_tracked == 1 for norm in (*norms(model), *memory.norms))


# ------------------------------------------------------------------------------------------------ cost, options


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
def test_cost_in_forward_equivalents(dual, steps):
    """Of a pair: k forwards and backwards to the inputs in the attack, and two streams of a forward and a full backward."""
    method, model = ACL(**PLAIN, dual_batch_norm=dual), make_model()
    batch, memory = make_batch(), memory_of(method, model)
    config = RunConfig.from_dict({
        "data": {"name": "digits"}, "train": {"epochs": 1}, "attack": {"steps": steps},
        "method": {"name": "acl", "embedding_dim": 5, "dual_batch_norm": dual},
    })  # fmt: skip
    expected = 2 * (2 * steps) + 2 * 2 * 3
    before = [tensor.clone() for part in filter(None, (model, memory)) for tensor in part.state_dict().values()]
    assert cost_per_image(config, model, batch, memory) == expected
    after = [tensor for part in filter(None, (model, memory)) for tensor in part.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with CostMeter(model) as meter:
        step = StepContext(THREAT, PGD(steps=steps), generator(5), 0.0, memory)
        method.loss(model, method.views(model, batch, step), step).loss.backward()
    assert meter.forward_equivalents == 6 * expected


OTHER = {"temperature": 0.2, "dual_batch_norm": False, "reweight": 0.5}
WITH_WEIGHTS = {"reweight": 0.5, "reweight_step": 0.25}


def test_every_option_changes_the_result_or_only_rounding():
    name = "encoder.linear.weight"
    _, reference, *_ = run(ACL(**PLAIN), progress=0.5)
    for option, value in OTHER.items():
        _, other, *_ = run(ACL(**PLAIN, **{option: value}), progress=0.5)
        assert not torch.allclose(reference[name], other[name], rtol=1e-3), option
    (_, one, *_), (_, other, *_) = (
        run(ACL(**PLAIN, **{**WITH_WEIGHTS, "reweight_step": k}), progress=0.5) for k in (0.25, 0.4)
    )
    assert not torch.allclose(one[name], other[name], rtol=1e-3)
    _, fast, *_ = run(ACL(**PLAIN, fold_batch_norm=True), progress=0.5)
    torch.testing.assert_close(fast[name], reference[name], atol=1e-3, rtol=1e-2)
    assert {*OTHER, *WITH_WEIGHTS, "embedding_dim", "fold_batch_norm"} == set(ACL.__pydantic_fields__)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reweight": 1.5}, "method.reweight: input should be less than or equal to 1, got 1.5"),
        ({"reweight": "2/x"}, "method.reweight: must be a number or a fraction such as '8/255', got '2/x'"),
        ({"reweight_step": 0}, "method.reweight_step: input should be greater than 0, got 0"),
        ({"temperature": 0}, "method.temperature: input should be greater than 0, got 0"),
        ({"temperatur": 0.5}, "method.temperatur: unknown key; did you mean 'temperature'?"),
    ],
)
def test_wrong_settings_are_one_line(values, message):
    with pytest.raises(UserError) as error:
        validated(ACL, values, "method")
    assert error.value.problems == (message,)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"batch_size": 1}}, "data.batch_size: a contrastive loss needs at least 2 images"),
        ({"train": {"trainable": "classifier"}}, "train.trainable: a contrastive loss trains encoder"),
        ({"data": {"augment": {"gaussian": 0.1}}}, "data.augment.gaussian: unclipped noise"),
    ],
)
def test_what_does_not_go_together_is_refused(tree, message):
    whole = {group: {**{"data": {"name": "digits"}, "train": {"epochs": 1}}[group], **tree.get(group, {})}
             for group in ("data", "train")}  # fmt: skip
    with pytest.raises(UserError, match=f"^{message}"):
        RunConfig.from_dict({**whole, "method": {"name": "acl"}})


def test_half_precision_losses_are_float32():
    model, method = make_model(), ACL(**PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)


# ------------------------------------------------------------------------------------------------ whole trainings


TINY = """
data:
  name: digits
  batch_size: 32
  limit_train: 120
  limit_test: 30
model: {width: 4, features: 8}
threat: {eps: 0.15}
attack: {steps: 1}
method: {name: acl, embedding_dim: 6, reweight: 2/3, reweight_step: 0.25}
optim: {name: adamw, lr: 0.01}
train: {epochs: 2, validate_steps: 1, device: cpu, checkpoint_seconds: 0}
eval: {images: 20, suite: pgd, steps: 1, curve_points: 0, check_images: 0, gallery: 2}
stages:
  - name: pretrain
    data:
      augment: {random_resized_crop: [0.3, 1.0], color_jitter: 0.5, anneal: 0.25}
      view: {random_resized_crop: [0.3, 1.0], color_jitter: 0.5, anneal: 0.25}
  - name: head
    method: {name: pgd_at}
    train: {epochs: 1, trainable: classifier}
"""


def fit(tmp_path, name, *overrides, **keys):
    path = tmp_path / "acl.yaml"
    path.write_text(TINY)
    return clead.train(load_recipe(str(path), overrides), out=tmp_path / name, show=False, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", ["", "--train.awp 0.01 --train.ema 0.5 --train.precision bfloat16"])
def test_a_killed_run_goes_on_to_the_last_bit(overrides, tmp_path, monkeypatch):
    overrides = shlex.split(overrides)
    fit(tmp_path, "whole", *overrides)
    real = Checkpoints.save
    for count in (2, 1):  # after steps 2 and 3 of 6 of the pre-training; the strength falls at 1.5, 3 and 4.5
        calls = itertools.count(1)

        def save_state(self, state, calls=calls, count=count):
            assert len(state["memory"]) == 4 * 5
            real(self, state)
            if next(calls) == count:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_state)
            with pytest.raises(Killed):
                fit(tmp_path, "killed", *overrides, resume=(tmp_path / "killed").exists())
    fit(tmp_path, "killed", *overrides, resume=True)
    for part in ("", "stages/1-pretrain", "stages/2-head"):
        for which in ("best", "last"):
            assert same(
                saved_weights(tmp_path / "whole" / part, which), saved_weights(tmp_path / "killed" / part, which)
            )
        assert history(tmp_path / "whole" / part) == history(tmp_path / "killed" / part)
    kinds = [line for line in history(tmp_path / "whole") if line["kind"] == "validation"]
    assert {"knn_accuracy"} <= set(kinds[0]) and {"robust_accuracy"} <= set(kinds[-1])


@pytest.mark.slow
def test_every_setting_of_a_training_changes_its_weights(tmp_path):
    """The keys that only a whole training knows: the size of the head, the annealing, and the shared batch-norms."""
    reference = saved_weights(fit(tmp_path, "reference").path)
    for number, (key, value) in enumerate({
        "method.embedding_dim": "7", "method.dual_batch_norm": "false", "method.reweight": "0", "method.reweight_step": "0.5",
        "data.augment.anneal": "0.5", "data.view.anneal": "null",
    }.items()):  # fmt: skip
        assert not same(saved_weights(fit(tmp_path, str(number), f"--stages.pretrain.{key}", value).path), reference), (
            key
        )


def test_the_adversarial_stream_is_what_the_next_stage_begins_with(tmp_path):
    """Its batch-norms, weights and statistics, go on with the frozen encoder; the clean stream's are nowhere in the weights."""
    fit(tmp_path, "run")
    before, after = (saved_weights(tmp_path / "run" / "stages" / name) for name in ("1-pretrain", "2-head"))
    assert before.keys() == after.keys() and not any("norms" in name for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    state, _ = Checkpoints(tmp_path / "run" / "stages" / "1-pretrain").load()
    clean, name = state["memory"], "encoder.convolutions.1.running_mean"
    assert clean["norms.0.num_batches_tracked"] == before["encoder.convolutions.1.num_batches_tracked"] == 6
    assert not torch.allclose(clean["norms.0.running_mean"], before[name], atol=1e-4)
    assert not torch.equal(clean["norms.0.weight"], before["encoder.convolutions.1.weight"])  # it was trained


def test_weight_perturbation_counts_no_batch_twice(tmp_path):
    fit(tmp_path, "run", "--train.awp", "0.01")
    state, _ = Checkpoints(tmp_path / "run" / "stages" / "1-pretrain").load()
    assert state["memory"]["norms.0.num_batches_tracked"] == 6
    assert state["model"]["encoder.convolutions.1.num_batches_tracked"] == 6


@pytest.mark.parametrize(
    ("tuning", "trained", "cost"),
    [
        ("--stages.head.method.name standard", "classifier", 1),  # SLF: the encoder's forward
        ("--stages.head.attack.steps 3", "classifier", 3 * 2 + 1),  # ALF: the attack goes through the encoder
        ("--stages.head.attack.steps 3 --stages.head.train.trainable all", "all", 3 * 2 + 3),  # AFF
    ],
)
def test_the_three_fine_tunings(tuning, trained, cost, tmp_path):
    run = fit(tmp_path, "run", *shlex.split(tuning))
    folder = run.path / "stages"
    before, after = (saved_weights(folder / name) for name in ("1-pretrain", "2-head"))
    encoder = [name for name in before if not name.startswith("classifier")]
    assert all(torch.equal(before[name], after[name]) for name in encoder) == (trained == "classifier")
    parts = [json.loads((folder / name / "outcome.json").read_text()) for name in ("1-pretrain", "2-head")]
    for part, per_image in zip(parts, (12 + 4, cost), strict=True):
        assert part["forward_equivalents"] == pytest.approx(
            part["steps"] * 32 * per_image / 108
        )  # 120 less 12 of validation


def test_the_strength_of_a_batch_is_that_of_its_first_step(tmp_path, monkeypatch):
    """Also where steps are replayed on it; 12 steps, each batch twice."""
    real, asked = Loader.batch, []

    def batch(self, epoch, index, progress=0.0):
        asked.append((epoch, index, progress))
        return real(self, epoch, index, progress)

    monkeypatch.setattr(Loader, "batch", batch)
    tiny = "--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 16 --train.device cpu --train.epochs 4"
    recipe = load_recipe("digits-free", [*tiny.split(), "--method.replays", "2"])
    assert clead.train(recipe, out=tmp_path / "run", show=False).outcome.steps == 12
    assert asked[1:] == [(turn // 3, turn % 3, pytest.approx(turn / 6)) for turn in range(6) for _ in range(2)]


def test_the_memory_of_a_copied_model_is_apart():
    """``cost_per_image`` and resume deal in copies: no tensor of the memory may be the model's."""
    model = make_model()
    memory = CleanNorms(model)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in memory.state_dict().values()}
    assert same(copy.deepcopy(memory).state_dict(), memory.state_dict())
