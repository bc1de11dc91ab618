"""N-FGSM, NuAT, FGSM-PGI, FGSM-RS-CS and LIET against slow forms of their papers, and what they remember from step to step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import clead
from clead.config import load_recipe
from clead.errors import UserError
from clead.interfaces import Batch
from clead.losses.divergence import js_divergence
from clead.methods.base import StepContext
from clead.methods.fgsm_pgi import FGSMPGI, Perturbations
from clead.methods.fgsm_rs_cs import FGSMRSCS
from clead.methods.liet import LIET
from clead.methods.n_fgsm import NFGSM
from clead.methods.nuat import NuAT, nuclear_norm
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.runs.resume import Checkpoints
from clead.threats.linf import Linf
from clead.training.step import cost_per_image
from support import Killed, generator, same, saved_weights

EPS = 0.1
THREAT = Linf(eps=EPS)


def make_model():
    return build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8)).train()


def make_batch(count=6, start=0):
    index = torch.arange(start, start + count)
    return Batch(torch.rand(count, 1, 8, 8, generator=generator(1 + start)), index % 4, index=index)


def run(method, model=None, batch=None, seed=5, **keys):
    model = make_model() if model is None else model
    output = method(model, batch or make_batch(), threat=THREAT, attack=None, generator=generator(seed), **keys)
    model.zero_grad()
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def slope(model, x, loss):
    """The gradient of a loss of f(x) to x, in evaluation mode."""
    model.eval()
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x)), x)
    model.train()
    return gradient


def entropy(y):
    return lambda logits: F.cross_entropy(logits, y)


def uniform(like, draws):
    return torch.empty_like(like).uniform_(-EPS, EPS, generator=draws)


def agrees(found, model, loss):
    """The loss and the gradient of every weight."""
    output, gradients = found
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


# -------------------------------------------------------------------------------------------------- N-FGSM


@pytest.mark.parametrize(("k", "alpha"), [(2.0, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_n_fgsm_is_equation_4(k, alpha):
    found, model, (x, y, *_) = run(NFGSM(noise_radius=k, step_size=alpha)), make_model(), make_batch()
    start = (x + k * uniform(x, generator(5))).clamp(0, 1)
    x_adv = (start + alpha * EPS * slope(model, start, entropy(y)).sign()).clamp(0, 1)
    agrees(found, model, F.cross_entropy(model(x_adv), y))
    assert ((x_adv - x).abs().amax() > EPS + 1e-6) == (k > 0)


def test_a_contrast_and_smoothed_labels_go_with_it():
    found, model, (x, y, *_) = run(NFGSM(label_smoothing=0.4)), make_model(), make_batch()
    start = (x + 2 * uniform(x, generator(5))).clamp(0, 1)
    x_adv = (start + EPS * slope(model, start, entropy(y)).sign()).clamp(0, 1)
    agrees(found, model, F.cross_entropy(model(x_adv), y, label_smoothing=0.4))


# ---------------------------------------------------------------------------------------------------- NuAT


@pytest.mark.parametrize("turn", [0, 1])
def test_nuat_is_algorithm_1(turn):
    method, model, (x, y, *_) = NuAT(nuclear_weight=3), make_model(), make_batch()
    state = method.state(model, (1, 8, 8))
    state.count, weight = turn, 3 * 0.5
    found = run(method, state=state, progress=0.5)
    assert state.count == turn + 1

    def norm(matrix):  # the square roots of the eigenvalues of AᵀA
        return torch.linalg.eigvalsh((matrix.T @ matrix).double()).clamp_min(0).sqrt().sum()

    start = (x + EPS / 2 * (torch.empty_like(x).uniform_(generator=generator(5)) - 0.5).sign()).clamp(0, 1)
    with torch.no_grad():
        clean = copy.deepcopy(model).eval()(x)
    gradient = slope(model, start, lambda z: F.cross_entropy(z, y) + turn * weight * norm(z - clean) / len(y))
    x_adv = torch.minimum(torch.maximum(start + EPS * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
    clean, adversarial = model(torch.cat([x, x_adv])).chunk(2)
    change = (adversarial - clean).double()
    values, vectors = torch.linalg.eigh(change.T @ change)
    loss = F.cross_entropy(clean, y) + weight * torch.linalg.svd(change)[1].sum().float() / len(y)
    agrees(found, model, loss)
    assert nuclear_norm(change).item() == pytest.approx(values.clamp_min(0).sqrt().sum().item(), rel=1e-5)


def test_a_matrix_of_zeros_has_a_gradient():
    change = torch.zeros(5, 3, requires_grad=True)
    nuclear_norm(change).backward()
    assert torch.isfinite(change.grad).all()


# ------------------------------------------------------------------------------------------------ FGSM-PGI


def slow_pgi(model, x, y, eta, momentum, mu=0.3, weight=10.0):
    """One step of FGSM-MEP of one batch: the loss, the next η and the next m."""

    def into(values):
        return torch.minimum(torch.maximum(x + values.clamp(-EPS, EPS), x * 0), x * 0 + 1) - x

    start = x + into(eta)
    g = slope(model, start, lambda z: F.cross_entropy(z, y, reduction="sum"))
    momentum = mu * momentum + g / g.abs().sum((1, 2, 3), keepdim=True)
    x_adv = x + into(start - x + EPS * g.sign())
    after, before = model(torch.cat([x_adv, start])).chunk(2)
    loss = F.cross_entropy(after, y) + weight * ((after - before) ** 2).mean()
    return loss, into(start - x + EPS * momentum.sign()), momentum


def test_fgsm_pgi_remembers_every_image_over_epochs_and_begins_anew():
    method, model, reference = FGSMPGI(reset=0.5), make_model(), make_model()
    state = method.state(model, (1, 8, 8))
    state.for_images(12)
    known = {}
    for step in range(8):  # two batches an epoch; anew at half of the training
        batch, progress = make_batch(start=6 * (step % 2)), step / 8
        x, y, index = batch.images, batch.labels, batch.index.tolist()
        if progress == 0.5:
            known.clear()
        first = EPS * uniform(x, generator(step)).sign()
        eta = torch.stack([known[i][0] if i in known else first[j] for j, i in enumerate(index)])
        momentum = torch.stack([known[i][1] if i in known else first[j] * 0 for j, i in enumerate(index)])
        found = run(method, model, batch, seed=step, state=state, progress=progress)
        loss, eta, momentum = slow_pgi(reference, x, y, eta, momentum)
        agrees(found, reference, loss)
        for j, i in enumerate(index):
            known[i] = (eta[j].bfloat16().float(), momentum[j].bfloat16().float())
    assert state.seen.all() and state.count == 1
    torch.testing.assert_close(
        state.momentum.float(), torch.stack([known[i][1] for i in range(12)]), rtol=0.02, atol=1e-6
    )


def test_of_an_image_that_comes_twice_the_last_is_kept():
    state = Perturbations((1, 2, 2))
    state.for_images(4)
    values = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2)
    state.keep(torch.tensor([2, 0, 2, 3, 0]), values, -values, StepContext(THREAT, None, generator(0)))
    assert state.delta[:, 0, 0, 0].tolist() == [4, 0, 2, 3] and state.momentum[2].min() == -2
    assert state.seen.tolist() == [True, False, True, True]


def test_without_a_memory_it_starts_at_random_signs():
    found, model, (x, y, *_) = run(FGSMPGI()), make_model(), make_batch()
    agrees(found, model, slow_pgi(model, x, y, EPS * uniform(x, generator(5)).sign(), torch.zeros_like(x))[0])


# ---------------------------------------------------------------------------------------------- FGSM-RS-CS


def test_fgsm_rs_cs_holds_the_loss_where_it_was():
    method, model, reference = FGSMRSCS(stride=0.01, smoothness_weight=0.7), make_model(), make_model()
    state = method.state(model, (1, 8, 8))
    state.for_images(12)
    epochs, signs = [[]], []
    for step in range(10):  # two batches an epoch
        if step == 7:  # a checkpoint in the middle of an epoch
            saved, state = state.state_dict(), method.state(model, (1, 8, 8))
            state.for_images(12)
            state.load_state_dict(saved)
        batch = make_batch(start=6 * (step % 2))
        x, y = batch.images, batch.labels
        found = run(method, model, batch, seed=step, state=state)
        start = (x + uniform(x, generator(step))).clamp(0, 1)
        with torch.no_grad():
            now = F.cross_entropy(copy.deepcopy(reference).eval()(start), y).item()
        x_adv = (start + EPS * slope(reference, start, entropy(y)).sign()).clamp(0, 1)
        before = sum(epochs[-2]) / 2 if len(epochs) > 2 else now
        signs.append((now > before + 0.01) - (now < before - 0.01))
        after, held = reference(torch.cat([x_adv, start])).chunk(2)
        agrees(found, reference, F.cross_entropy(after, y) + 0.7 * signs[-1] * F.cross_entropy(held, y))
        epochs[-1].append(now)
        if len(epochs[-1]) == 2:
            epochs.append([])
        with torch.no_grad():  # learn something
            for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                theirs.sub_(0.1 * theirs.grad)
                ours.copy_(theirs)
    assert signs[:4] == [0] * 4 and {-1, 1} <= set(signs[4:])


# ---------------------------------------------------------------------------------------------------- LIET


@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_liet_starts_in_the_direction_of_the_class(smoothing):
    method, model, (x, y, *_) = LIET(random_smoothing=smoothing), make_model(), make_batch()
    state = method.state(model, (1, 8, 8))
    found = run(method, state=state, progress=0.25)
    draws = generator(5)
    classes = torch.arange(4)
    grey = torch.full((4, 1, 8, 8), 0.5)
    information = EPS * slope(model, grey, lambda z: F.cross_entropy(z, classes, reduction="sum")).sign()
    share, sign = torch.rand(2, generator=draws)
    noisy = torch.rand(x.shape, generator=draws) < 0.1 + 0.4 * share
    eta = torch.where(noisy, uniform(x, draws), information[y])
    start = (x + (-eta if sign < 0.5 else eta)).clamp(0, 1)
    x_adv = start + EPS * slope(model, start, entropy(y)).sign()
    x_adv = torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS).clamp(0, 1)
    after, before = model(torch.cat([x_adv, start])).chunk(2)
    targets = (1 - smoothing) * F.one_hot(y, 4)
    if smoothing:
        for i, of_image in enumerate(torch.rand(6, 4, generator=draws)):
            of_image[y[i]] = 0
            targets[i] += smoothing * of_image / of_image.sum()
    p, q = after.softmax(1), before.softmax(1)
    m = (p + q) / 2
    divergence = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    agrees(found, model, -(targets * after.log_softmax(1)).sum(1).mean() + 100 * 0.25 * divergence)


def test_the_directions_are_made_anew_every_so_many_steps():
    method, model = LIET(every=2), make_model()
    state, seen = method.state(model, (1, 8, 8)), []
    for _ in range(4):
        run(method, model, state=state)
        seen.append(state.directions.clone())
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])


def test_the_divergence_is_symmetric_and_bounded():
    a, b = 30 * torch.randn(2, 9, 5, generator=generator(3))
    torch.testing.assert_close(js_divergence(a, b), js_divergence(b, a))
    assert (js_divergence(a, b) <= 0.6932).all() and (js_divergence(a, a).abs() < 1e-6).all()


# ---------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    ("method", "cost"), [(NFGSM(), 2 + 3), (NuAT(), 2 + 6), (FGSMPGI(), 2 + 6), (LIET(every=10**6), 2 + 6 + 2 * 4 / 6)]
)
def test_what_a_step_costs(method, cost):
    with CostMeter(model := make_model()) as meter:
        run(method, model, state=method.state(model, (1, 8, 8)))
    assert meter.forward_equivalents == pytest.approx(6 * cost)


@pytest.mark.parametrize(
    ("name", "cost"), [("fgsm_rs", 5), ("n_fgsm", 5), ("nuat", 8.5), ("fgsm_pgi", 8), ("liet", 8), ("fgsm_rs_cs", 8)]
)
def test_what_a_training_counts(name, cost):
    config = load_recipe("digits-fgsm-rs", ["--method.name", name])
    model = make_model()
    assert cost_per_image(config, model, make_batch(2), config.method.state(model, (1, 8, 8))) == cost


@pytest.mark.parametrize("name", ["fgsm_pgi", "liet"])
def test_a_run_that_is_killed_goes_on_with_what_it_remembered(name, tmp_path, monkeypatch):
    def fit(out, **keys):
        tiny = "--data.limit_train 60 --data.batch_size 20 --train.device cpu --train.validate_steps 1 --train.epochs 4"
        tiny += " --train.validate_every 9"
        more = f"--method.name {name} --model.width 8 --train.checkpoint_seconds 0 --train.validate_images 8"
        return clead.train(load_recipe("digits-pgd-at", [*tiny.split(), *more.split()]), out=out, show=False, **keys)

    whole, save = fit(tmp_path / "whole"), Checkpoints.save

    def killed(self, state):
        save(self, state)
        if state["position"]["step"] == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", killed)
        fit(tmp_path / "run")
    assert same(saved_weights(fit(tmp_path / "run", resume=True).path), saved_weights(whole.path))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("--method.name fgsm_pgi --data.cutmix 1", "a mixed image is none whose perturbation is remembered"),
        ("--method.name fgsm_pgi --train.awp 0.005", "would copy the perturbations of all images at every step"),
        ("--method.name liet --data.cutmix 1", "a mixed image has no class whose direction it starts in"),
        ("--method.name liet --method.noise_share [0.5,0.1]", "must be two shares in"),
        ("--method.name n_fgsm --method.replays 2", "replays go with no attack of one step"),
    ],
)
def test_what_does_not_go_together_is_refused(given, rule):
    with pytest.raises(UserError, match=rule):
        load_recipe("digits-pgd-at", given.split())


def test_a_loop_of_ones_own_has_no_memory_of_images():
    with pytest.raises(UserError, match="method fgsm_pgi has to know the training images"):
        clead.RobustLoss(make_model(), (1, 8, 8), "fgsm_pgi", eps=0.1)
    with pytest.raises(UserError, match="total_steps: is required"):
        clead.RobustLoss(make_model(), (1, 8, 8), "nuat", eps=0.1)
