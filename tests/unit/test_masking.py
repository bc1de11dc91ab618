"""The checks of gradient masking on planted failures, each to be named, and on healthy models, none of which may be."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clead.attacks import pgd
from clead.errors import UserError
from clead.evaluation import masking
from clead.evaluation.masking import CHECKS, Selection, efforts, few, run_checks
from clead.models.compute_cost import CostMeter
from clead.models.normalize import Normalize
from clead.models.seeding import fork_rng
from clead.models.split import adapt
from clead.results.record import Check
from clead.threats.l0 import L0
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf

LINF = Linf(eps=0.1)


def digits() -> tuple[Tensor, Tensor]:
    """8×8 digits in [0, 1] in sixteenths, shuffled: the first 1400 to train on, 128 from 1500 on to test."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images / 16).float()[order, None], torch.tensor(found.target).long()[order]


@pytest.fixture(autouse=True)
def _fewer_queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(word in request.node.name for word in ("every_check", "cost", "fewer_checks")):
        monkeypatch.setattr(masking.attacks, "QUERIES", 100)


X, Y = digits()
TEST = X[1500:1628], Y[1500:1628]


def mlp() -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(Normalize([0.3], [0.38]), *layers)


def cnn() -> nn.Sequential:
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))


def trained(make: Callable[[], nn.Sequential], *, adversarially: bool = False, epochs: int = 10) -> nn.Sequential:
    with fork_rng(0):
        net = make()
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for index in torch.randperm(1400).split(100):
                x, y = X[index], Y[index]
                if adversarially:
                    x = pgd(net, x, y, eps=0.1, steps=5, keep="last")
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimiser.step()
        optimiser.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def robust() -> nn.Sequential:
    return trained(mlp, adversarially=True)


@pytest.fixture(scope="module")
def standard() -> nn.Sequential:
    return trained(mlp)


@pytest.fixture(scope="module")
def batch_normed() -> nn.Sequential:
    return trained(cnn, epochs=4)


def failed(model: nn.Module, threat: Any = LINF, x: Tensor = TEST[0], y: Tensor = TEST[1], **kw: Any) -> set[str]:
    parts = {part.name: part for part in run_checks(model, x, y, threat, **kw)}
    return {name for name, part in parts.items() if not part.passed}


def checks(model: nn.Module, threat: Any = LINF, **kw: Any) -> dict[str, Check]:
    return {part.name: part for part in run_checks(model, *TEST, threat, **kw)}


# --------------------------------------------------------------------------------------------------------- healthy models


THREATS = [LINF, Linf(eps="1/255"), Linf(eps=0.6), L2(eps=0.5), L1(eps=2), L0(eps=2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "threat"),
    [(name, t) for name in ("robust", "standard") for t in THREATS]
    + [("batch_normed", LINF), ("batch_normed", L0(eps=5))],
)
def test_a_healthy_model_passes_every_check(name, threat, request):
    model = request.getfixturevalue(name)
    parts = run_checks(adapt(model, sample_shape=(1, 8, 8)), *TEST, threat)
    assert not [part for part in parts if not part.passed]
    assert [part.name for part in parts] == [
        name for name in CHECKS if threat.norm not in ("l0", "l1") or name != "black box"
    ]
    for part in parts:
        assert all(np.isfinite(value) for value in part.numbers.values())
        assert part.explanation.count(". ") >= 1 and part.explanation.endswith(".") and "\n" not in part.explanation


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_healthy_model_passes_on_other_seeds_and_other_images(robust, seed):
    chosen = torch.randperm(297, generator=torch.Generator().manual_seed(seed))[:64] + 1500
    assert not failed(robust, x=X[chosen], y=Y[chosen], seed=seed)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [3]])
def test_an_untrained_model_passes(make, classes):
    """Its accuracy is chance, or 0 or 1 where all the images are of one class: nothing that the checks may blame."""
    with fork_rng(1):
        model = make().eval()
    chosen = torch.isin(Y, torch.tensor(classes)).nonzero()[:100, 0]
    assert not failed(model, x=X[chosen], y=Y[chosen])


def test_one_image_and_no_right_image_and_eps_zero(robust):
    x, y = TEST
    assert not failed(robust, x=x[:1], y=y[:1])
    wrong = (robust(x).argmax(1) + 1) % 10
    assert not failed(robust, x=x, y=wrong)
    assert not failed(robust, Linf(eps=0))


def test_double_precision_and_two_classes(robust):
    two = TEST[1] < 2
    pair = nn.Sequential(copy.deepcopy(robust), Pick()).double()
    assert not failed(pair, x=TEST[0][two].double(), y=TEST[1][two])


class Pick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


# ------------------------------------------------------------------------------------------------------- planted failures


class Before(nn.Module):
    """A model with something done to its images first."""

    def __init__(self, change: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.change, self.model = change, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.change(x))


class After(nn.Module):
    """A model with something done to its logits."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a given factor of the images: it lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def thermometer(x: Tensor) -> Tensor:
    return torch.stack([(x > level).float() for level in torch.linspace(0.05, 0.95, 10)]).mean(0)


def through(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Straight through: the values of ``change``, the gradient of the identity."""
    return lambda x: x + (change(x) - x).detach()


def quantised(x: Tensor) -> Tensor:
    return (x * 7).round() / 7


def up_or_down(x: Tensor) -> Tensor:
    """The gradient's sign is drawn per image, anew wherever it is: every step goes the right way or the opposite one."""
    return Backwards.apply(x, (1e5 * x.sum((1, 2, 3), keepdim=True)).sin())


def lost_far_away(x: Tensor) -> Tensor:
    """No gradient once a pixel is more than 0.06 from the nearest quarter."""
    distance = (x - (4 * x).round() / 4).abs().amax((1, 2, 3), keepdim=True)
    return Backwards.apply(x, (distance < 0.06).float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (quantised, {"smooth", "gradients", "unbounded"}),
        (thermometer, {"smooth", "gradients", "unbounded"}),
        (through(quantised), {"smooth"}),
        (through(thermometer), {"smooth"}),
        (lambda x: (x * 255).round() / 255, {"smooth", "gradients", "unbounded", "black box"}),
        (through(lambda x: (x * 255).round() / 255), {"smooth"}),
        (lambda x: x.detach(), {"smooth", "gradients", "unbounded", "black box"}),
        (lambda x: x.sqrt().square(), {"gradients"}),
        (lambda x: Backwards.apply(x, torch.tensor(-1.0)), {"smooth", "unbounded", "black box"}),
        (up_or_down, {"smooth", "steps", "unbounded", "black box"}),
        (lambda x: x + 0.02 * (300 * x).sin(), {"unbounded", "black box"}),
        (lambda x: x + 0.1 * torch.randn_like(x), {"deterministic"}),
        (lambda x: x + 0.1 * (x - x.mean(0)), {"batch"}),
        (lambda x: x / 255, {"normalisation"}),
        (lambda x: 0.5 * x + 0.5, {"normalisation"}),
    ],
)
def test_a_wrong_input_is_named(robust, change, names):
    assert names <= failed(Before(change, robust))


def test_noise_is_not_taken_for_rounding(robust):
    found = checks(Before(lambda x: x + 0.1 * torch.randn_like(x), robust))
    assert not found["deterministic"].passed
    assert found["smooth"].passed or "see the check deterministic" in found["smooth"].explanation


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda z: z.softmax(1), {"logits"}),
        (lambda z: 1e4 * z, {"logits", "gradients", "agreement"}),
    ],
)
def test_a_wrong_output_is_named(robust, change, names):
    assert failed(After(robust, change)) == names


def test_probabilities_and_saturation_have_their_own_words(robust):
    part = checks(After(robust, lambda z: z.softmax(1)))["logits"]
    assert part.numbers["probabilities"] == 1 and "before the softmax" in part.explanation
    part = checks(After(robust, lambda z: 1e4 * z))["logits"]
    assert part.numbers["saturated"] > 0.9 and "temperature" in part.explanation


QUICK = efforts(embedding=False, source=False)[1:]  # those with the images that stand after earlier attacks


def standing(model: nn.Module, threat: Any = LINF) -> Tensor:
    x_adv = pgd(model, *TEST, eps=threat.eps, norm=threat.norm, steps=30, objective="margin")
    return (model(TEST[0]).argmax(1) == TEST[1]) & (model(x_adv).argmax(1) == TEST[1])


@pytest.mark.parametrize("effort", QUICK)
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (through(quantised), "smooth"),
        (up_or_down, "smooth"),
        (lambda x: Backwards.apply(x, torch.tensor(-1.0)), "smooth"),
        (lambda x: x + 0.1 * torch.randn_like(x), "deterministic"),
        (lambda x: x + 0.1 * (x - x.mean(0)), "batch"),
        (lambda x: x / 255, "normalisation"),
        (lambda x: x + 0 * x.detach(), None),
    ],
)
def test_fewer_checks_name_a_wrong_input_too_and_cost_what_they_say(robust, effort, change, name):
    model = Before(change, robust)
    flags = standing(model)
    with CostMeter(model) as meter:
        parts = run_checks(model, *TEST, LINF, selection=Selection(effort.names, flags))
    assert [part.name for part in parts] == [check for check in CHECKS if check in effort.names]
    assert meter.calls <= effort.calls
    assert meter.forwards + meter.backwards <= len(TEST[0]) * (effort.each + effort.right)
    bad = {part.name for part in parts if not part.passed}
    assert name in bad if name else not bad


@pytest.mark.parametrize("threat", THREATS)
def test_fewer_checks_pass_on_a_healthy_model(standard, threat):
    assert not failed(standard, threat, selection=Selection(QUICK[0].names, standing(standard, threat)))


def test_square_finds_what_earlier_attacks_missed(robust):
    model = Before(lambda x: x + 0.02 * (300 * x).sin(), robust)
    assert "black box" in failed(model, selection=Selection(QUICK[0].names, standing(model)))
    blind = Before(lambda x: x.round(), robust)
    assert {"gradients", "smooth"} <= failed(
        blind, selection=Selection(QUICK[-1].names, torch.ones(128, dtype=torch.bool))
    )


def test_checks_cost_at_most_what_is_said(robust):
    effort = efforts(embedding=False, source=False)[0]
    with CostMeter(robust) as meter:
        run_checks(robust, *TEST, LINF)
    assert effort.names == CHECKS and meter.calls <= effort.calls


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.Dropout])
def test_a_model_in_train_mode_is_named_and_attacked_in_eval_mode(batch_normed, layer):
    model = copy.deepcopy(batch_normed)
    wide = Linf(eps=0.3)
    expected = checks(model, wide)
    for part in model.modules():
        if isinstance(part, layer):
            part.train()
    found = checks(model, wide)
    assert not found["mode"].passed and layer.__name__ in found["mode"].explanation
    for name in set(CHECKS) - {"mode"}:
        assert found[name] == expected[name]


def test_train_mode_without_consequence_is_no_failure(robust):
    noisy = Before(lambda x: x + 0.01 * torch.randn_like(x), robust)
    assert "mode" not in failed(noisy.train())
    assert not failed(copy.deepcopy(robust).train())


def colours() -> tuple[Tensor, Tensor]:
    """Even patches whose class is in their level of red, green and blue, each one of two."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 8
    level = torch.stack([y % 2, y // 2 % 2, y // 4], 1)[:, :, None, None] * 0.3 + 0.35
    return (level + 0.05 * torch.randn(400, 3, 4, 4, generator=g)).clamp(0, 1), y


CIFAR = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@pytest.fixture(scope="module")
def painter() -> nn.Sequential:
    """Trained on colours normalised by the statistics of CIFAR-10, which are no layer of it."""
    x, y = colours()
    with fork_rng(0):
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(CIFAR(x)), y).backward()
            optimiser.step()
    return net


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ([CIFAR], None),
        ([], "normalised by"),
        ([CIFAR, CIFAR], "denormalised by"),
        ([Normalize([0.5], [0.5]), CIFAR], "denormalised by 0.5"),
        ([Before(lambda x: x / 255, CIFAR)], "times 255"),
        ([Before(lambda x: x.flip(1), CIFAR)], "channels are reversed"),
    ],
)
def test_a_wrong_preparation_is_named(painter, first, words):
    x, y = (part[:128] for part in colours())
    parts = run_checks(nn.Sequential(*first, painter), x, y, Linf(eps="8/255"))
    part = next(part for part in parts if part.name == "normalisation")
    assert part.passed == (words is None)
    if words:
        assert f"when {words}" in part.explanation


def test_noise_as_good_as_the_gradient_is_named(standard):
    assert "noise" in failed(Before(lambda x: x.detach(), standard), Linf(eps=0.3))


def test_accuracy_that_rises_with_the_radius_is_named(standard):
    x = (TEST[0] * 4).round() / 4
    part = {p.name: p for p in run_checks(Before(lost_far_away, standard), x, TEST[1], Linf(eps=0.05))}["monotone"]
    assert not part.passed and part.numbers["2 eps"] > part.numbers["1 eps"]


class Hides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def test_an_embedding_attack_that_finds_what_the_logits_hide_is_named(standard):
    net = copy.deepcopy(standard)
    hiding = Hides(32, 10)
    hiding.load_state_dict(net[-1].state_dict())
    net[-1] = hiding
    parts = checks(adapt(net, sample_shape=(1, 8, 8)), Linf(eps=0.2))
    assert not parts["agreement"].passed
    assert parts["agreement"].numbers["embedding"] < parts["agreement"].numbers["margin"] - 50
    assert "embedding" not in checks(net, Linf(eps=0.2))["agreement"].numbers


def test_transfer_from_a_source_breaks_what_a_masked_gradient_hides(standard, robust):
    masked = Before(lambda x: x.detach(), standard)
    part = checks(masked, L0(eps=8), source=standard)["black box"]
    assert not part.passed and part.numbers["transfer"] > 20 and "square" not in part.numbers
    assert checks(robust, source=standard)["black box"].passed


# ------------------------------------------------------------------------------------------------------ nothing disturbed


class Restless(nn.Module):
    """Changes its buffers, in place and by new ones, and draws from every global generator, also in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("wide", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.full((1,), random.random() + np.random.rand())  # noqa: NPY002
        return self.model(x + 0.01 * torch.randn_like(x))


def snapshot(model: nn.Module, *tensors: Tensor) -> list[Any]:
    state = np.random.get_state()
    return [
        [(name, id(t), t.detach().numpy().tobytes()) for name, t in model.state_dict(keep_vars=True).items()],
        [
            (p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()))
            for p in model.parameters()
        ],
        [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()],
        [(tensor.numpy().tobytes(), tensor.requires_grad, tensor.grad) for tensor in tensors],
        (torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_checks_leave_the_model_untouched(batch_normed, mode):
    model = Restless(copy.deepcopy(batch_normed)).train()
    model.model[1].eval()
    model.model[0].requires_grad_(False)
    model.model[-1].weight.grad = torch.ones_like(model.model[-1].weight)
    source = copy.deepcopy(model)
    x, y = TEST[0][:16].clone(), TEST[1][:16].clone()
    before = snapshot(model, x, y), snapshot(source)
    with mode():
        first = run_checks(model, x, y, LINF, source=source)
    assert (snapshot(model, x, y), snapshot(source)) == before
    assert [part.name for part in first] == list(CHECKS)


def test_an_exception_leaves_the_model_untouched(batch_normed):
    class Interrupted(Exception):
        pass

    calls = []

    def fails(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 60:
            raise Interrupted
        return x

    model = Before(fails, Restless(copy.deepcopy(batch_normed))).train()
    before = snapshot(model)
    with pytest.raises(UserError, match="Interrupted"):
        run_checks(model, *TEST, LINF)
    assert snapshot(model) == before


def test_the_seed_decides(standard):
    torch.rand(1)
    first, again, other = (run_checks(standard, *TEST, LINF, seed=seed) for seed in (4, 4, 5))
    assert first == again != other


def test_progress_is_told_once_per_check(robust):
    told = []
    run_checks(robust, *TEST, L0(eps=1), tick=lambda advance=1, **status: told.append((advance, status["check"])))
    assert told == [(1, name) for name in CHECKS]


def test_cost_is_bounded(robust):
    """In gradients and answers per image, as the documentation says."""
    images = {"gradients": 0, "answers": 0}

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            images["gradients" if torch.is_grad_enabled() else "answers"] += len(x)
            return robust(x)

    failed(Counted(), Linf(eps="1/255"))
    assert images["gradients"] / 128 < 550 and images["answers"] / 128 < 600


def test_wrong_images_and_logits_are_refused(robust):
    x, y = TEST
    with pytest.raises(UserError, match="pixels must be in"):
        run_checks(robust, 255 * x, y, LINF)
    with pytest.raises(UserError, match="must return logits"):
        run_checks(nn.Identity(), x, y, LINF)


def test_few_is_three_or_a_twentieth():
    assert [few(n) for n in (0, 1, 60, 100, 1000)] == [3, 3, 3, 5, 50]
