"""Free adversarial training against its algorithm, written again, and what it keeps from step to step."""

from __future__ import annotations

import copy
import shlex

import pytest
import torch
from torch.nn import functional as F

import clead
from clead.attacks.pgd import PGD
from clead.config import load_recipe
from clead.data.loaders import Loader
from clead.interfaces import Batch
from clead.methods.base import Method, StepContext
from clead.methods.clead import CLead
from clead.methods.free import Free
from clead.methods.free_adversary import PersistentDelta
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.threats import THREATS
from clead.threats.linf import Linf
from support import Killed, generator, same, saved_weights

EPS = 0.1
THREAT = Linf(eps=EPS)
TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 16 --train.validate_every 1
--train.validate_steps 1 --train.device cpu --method.name free --method.replays 3 --optim.lr 0.002""")


def make_model():
    return build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8)).train()


def make_batch(seed=1, count=6):
    """Pixels in [0.2, 0.8]: no perturbation meets the box, so the paper's two clippings are one projection."""
    return Batch(0.2 + 0.6 * torch.rand(count, 1, 8, 8, generator=generator(seed)), torch.arange(count) % 4)


def step(method, model, batch, memory, optimizer=None, threat=THREAT):
    at = StepContext(threat, PGD(), generator(5), state=memory)
    views = method.views(model, batch, at)
    output = method.loss(model, views, at)
    model.zero_grad()
    output.loss.backward()
    if optimizer is not None:
        optimizer.step()
    return output, views


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_algorithm_1(smoothing):
    """δ = 0; for every minibatch, m times: both gradients at once, a step of θ, then δ ← clip(δ + ε·sign(g_adv), −ε, ε)."""
    method, m = Free(label_smoothing=smoothing), 3
    ours, theirs = make_model(), make_model()
    memory = method.state(ours, (1, 8, 8))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (ours, theirs)]
    delta = torch.zeros(6, 1, 8, 8)
    for batch in (make_batch(1), make_batch(2), make_batch(3)):
        for _ in range(m):
            output, views = step(method, ours, batch, memory, optimizers[0])

            delta.requires_grad_()
            loss = F.cross_entropy(theirs(batch.images + delta), batch.labels, label_smoothing=smoothing)
            theirs.zero_grad()
            loss.backward()
            torch.testing.assert_close(views.images["adversarial"].detach(), (batch.images + delta).detach())
            torch.testing.assert_close(output.loss, loss)
            optimizers[1].step()
            delta = (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)
    assert delta.abs().max() == pytest.approx(EPS)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm, eps", [("linf", 0.3), ("l2", 0.6), ("l1", 2.0), ("l0", 3)])
def test_images_stay_in_the_set_and_perturbations_grow_worse(norm, eps):
    threat, method, model = THREATS.get(norm)(eps=eps), Free(), make_model()
    memory = method.state(model, (1, 8, 8))
    losses = []
    for seed in (1, 1, 1, 2, 2):
        batch = Batch(torch.rand(6, 1, 8, 8, generator=generator(seed)), torch.arange(6) % 4)
        output, views = step(method, model, batch, memory, threat=threat)
        x_adv = views.images["adversarial"].detach()
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert (threat.distance(x_adv - batch.images) <= float(eps) * (1 + 1e-5)).all()
        losses.append(output.loss.item())
        assert torch.equal(x_adv, batch.images) == (len(losses) == 1), "the first δ is 0, no other is"
    assert losses[1] > losses[0]


def test_mixed_labels_are_learnt_and_attacked():
    batch = make_batch()
    own = F.one_hot(batch.labels, 4).float()
    soft = 0.6 * own + 0.4 * own.flip(0)
    model, other = make_model(), make_model()
    memory = PersistentDelta((1, 8, 8))
    output, _ = step(Free(), model, batch._replace(soft_labels=soft), memory)
    x = batch.images.clone().requires_grad_()
    loss = -(soft * F.log_softmax(other(x), 1)).sum(1).mean()
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(memory.gradient, x.grad)


def test_cost_is_three_per_image_and_step():
    model = make_model()
    memory = Free().state(model, (1, 8, 8))
    with CostMeter(model) as meter:
        for _ in range(2):
            step(Free(), model, make_batch(), memory)
    assert meter.forward_equivalents == 2 * 3 * 6


def test_with_perturbed_weights_the_gradient_is_taken_there_and_kept_once():
    from clead.training.awp import perturbed_weights

    method, model, batch = Free(), make_model(), make_batch()
    memory = method.state(model, (1, 8, 8))
    at = StepContext(THREAT, PGD(), generator(5), state=memory)
    views = method.views(model, batch, at)
    before = copy.deepcopy(memory.state_dict())
    with perturbed_weights(model, lambda: method.loss(model, views, at).loss, 0.05):
        assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
        x = batch.images.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x), batch.labels), x)
        method.loss(model, views, at).loss.backward()
    torch.testing.assert_close(memory.gradient, expected)


def test_gradients_that_overflowed_move_nothing():
    memory = PersistentDelta((1, 2, 2))
    memory.fit(torch.zeros(1, 1, 2, 2))
    memory.keep(torch.tensor([[[[1.0, torch.nan], [torch.inf, -torch.inf]]]]))
    assert memory.gradient.flatten().tolist() == [1, 0, 0, 0]


def test_the_whole_joint_objective_moves_the_perturbation():
    """Two steps of β·CE(x) + κ·KL + λ·SupCon, whose gradient to x_adv is that of KL and SupCon, written again."""
    method = CLead(replays=2, contrastive_weight=0.7, augmented_view=False, contrastive_level="logits", temperature=0.4)
    ours, theirs, batch = make_model(), make_model(), make_batch()
    memory = method.state(ours, (1, 8, 8))
    delta = torch.zeros(6, 1, 8, 8)
    for _ in range(2):
        output, views = step(method, ours, batch, memory)
        delta.requires_grad_()
        clean, adversarial = theirs(torch.cat([batch.images, batch.images + delta])).chunk(2)
        kl = (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum(1).mean()
        z = F.normalize(torch.cat([clean, adversarial]), dim=1)
        y, others = batch.labels.repeat(2), ~torch.eye(12, dtype=torch.bool)
        logits = z @ z.T / 0.4
        positive = (y[:, None] == y) & others
        each = logits - torch.logsumexp(logits.masked_fill(~others, -torch.inf), 1, keepdim=True)
        contrast = -((each * positive).sum(1) / positive.sum(1)).mean()
        loss = F.cross_entropy(clean, batch.labels) + 6 * kl + 0.7 * contrast
        theirs.zero_grad()
        loss.backward()
        torch.testing.assert_close(output.loss, loss)
        torch.testing.assert_close(views.images["adversarial"].detach(), (batch.images + delta).detach())
        torch.testing.assert_close(memory.gradient, delta.grad)
        delta = (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)


def test_what_replays_have_no_use_for_is_refused():
    settings = {"kl_weight": 0, "contrastive_weight": 0}
    with pytest.raises(ValueError, match="no term has one"):
        CLead(replays=2, **settings)


def test_the_memory_is_saved_whole_whatever_the_batch_size():
    memory = PersistentDelta((1, 8, 8))
    memory.fit(torch.rand(6, 1, 8, 8))
    memory.delta.uniform_(generator=generator(5))
    memory.keep(torch.rand(6, 1, 8, 8))
    fresh = PersistentDelta((1, 8, 8))
    fresh.load_state_dict(memory.state_dict())
    assert torch.equal(fresh.delta, memory.delta) and torch.equal(fresh.gradient, memory.gradient)
    assert set(memory.state_dict()) == {"delta", "gradient"}
    with pytest.raises(RuntimeError, match="gradient"):
        PersistentDelta((1, 8, 8)).load_state_dict({"delta": memory.delta})


# ------------------------------------------------------------------------------------------------ in the loop


def fit(out, *overrides, **keys):
    length = [] if "--train.budget" in overrides else ["--train.epochs", "4"]
    return clead.train(load_recipe("digits-pgd-at", [*TINY, *length, *overrides]), out=out, show=False, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", ["", "--train.precision float16", "--train.awp 0.02 --train.channels_last true"])
def test_resume_within_a_replay_is_bit_identical(overrides, tmp_path, monkeypatch):
    """12 steps of 3 replays each; killed after steps 2 and 5, both in the middle of a minibatch with a gradient pending."""
    options = [*overrides.split(), "--train.checkpoint_seconds", "0"]
    fit(tmp_path / "whole", *options)
    real = Checkpoints.save
    for count in (2, 3):
        calls = []

        def save_state(self, state, calls=calls, count=count):
            real(self, state)
            calls.append(state["memory"])
            if len(calls) == count:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_state)
            with pytest.raises(Killed):
                fit(tmp_path / "killed", *options, resume=True)
        assert calls[-1]["delta"].shape == (16, 1, 8, 8) and calls[-1]["gradient"].any()
    fit(tmp_path / "killed", *options, resume=True)
    assert same(saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "killed"))
    whole, killed = (RunDir(tmp_path / name).history() for name in ("whole", "killed"))
    assert [{**line, "seconds": 0} for line in whole] == [{**line, "seconds": 0} for line in killed]


def test_the_pending_gradient_matters_to_resume(tmp_path, monkeypatch):
    """Were it lost, the run would be another one: the test above can fail."""
    options = ["--train.checkpoint_seconds", "0"]
    fit(tmp_path / "whole", *options)
    monkeypatch.setattr(PersistentDelta, "keep", lambda self, gradient: None)
    fit(tmp_path / "lost", *options)
    assert not same(saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "lost"))


def test_each_minibatch_is_replayed_and_budgets_count_every_replay(tmp_path, monkeypatch):
    asked = []
    real = Loader.batch
    monkeypatch.setattr(
        Loader,
        "batch",
        lambda self, epoch, index, *rest: (asked.append((epoch, index)), real(self, epoch, index, *rest))[1],
    )
    run = fit(tmp_path / "run", "--train.budget", "11.52")
    # 3 forward-equivalents per image and step, 16 of 50 images a step: 0.96 a step.
    assert run.outcome.steps == 12 and run.outcome.forward_equivalents == pytest.approx(11.52)
    # The first one measures the cost.
    assert asked[1:] == [(0, 0)] * 3 + [(0, 1)] * 3 + [(0, 2)] * 3 + [(1, 0)] * 3


def test_other_methods_see_a_batch_once():
    assert Method.replays == 1 and Free().replays == 8


@pytest.mark.parametrize("change", ["--method.replays 2", "--method.label_smoothing 0.1", "--threat.eps 0.1"])
def test_every_option_changes_the_result(change, tmp_path):
    one, other = fit(tmp_path / "a"), fit(tmp_path / "b", *change.split())
    assert not same(saved_weights(one.path), saved_weights(other.path))
