"""What every registered attack must do with every objective inside every threat; new files are picked up by themselves."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clead.attacks import ATTACKS, OBJECTIVES, UNRESTRICTED
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.interfaces import Search
from clead.models.external import ModelError
from clead.models.split import SplitModel, adapt
from clead.threats import THREATS
from support import generator

RADII = {"linf": 0.1, "l2": 0.6, "l1": 2.0, "l0": 3}


class Net(nn.Module):
    """Batch-norm, dropout, a part held in evaluation mode, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 8), nn.Tanh()
        )
        self.held = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.held(self.body(x)))


class Randomised(Net):
    """A defence by noise, drawn from every global generator there is."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) + float(np.random.standard_normal()) + random.gauss(0, 1)
        return super().forward(x + 0.02 * noise)


def make_model(kind: type[Net] = Net) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind()
        model = adapt(net, sample_shape=(2, 5, 5))
    model.add_projection(dim=6, seed=1)
    model.train()
    net.held.eval()
    net.body[0].requires_grad_(False)
    for module in (net.body[1], net.held):
        module.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    return model


def images(count: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(3))
    x[0, 0] = 0
    return x, torch.arange(count) % 4


def snapshot(model: nn.Module, *tensors: Tensor) -> list[Any]:
    """Everything that an attack could disturb: of the model, of the caller's tensors, and of the process."""
    return [
        [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()],
        [id(p) for p in model.parameters()],
        [(p.requires_grad, p.is_leaf) for p in model.parameters()],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [(tensor.detach().numpy().tobytes(), tensor.requires_grad, tensor.grad) for tensor in tensors],
        torch.get_rng_state().tolist(),
        [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        random.getstate(),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    ]


SHORT = {"steps": 3, "search_steps": 3, "queries": 20, "draws": 2, "angles": 5, "shifts": 3, "restarts": 2}
"""Few steps for the contract: which settings an attack shortens by, if it has them."""


def make_attack(name: str, registry: Any = ATTACKS) -> Any:
    kind = registry.get(name)
    return kind(**{key: value for key, value in SHORT.items() if key in kind.__pydantic_fields__})


@pytest.fixture(params=ATTACKS.names())
def attack(request: pytest.FixtureRequest) -> Any:
    return make_attack(request.param)


@pytest.fixture(params=THREATS.names())
def threat(request: pytest.FixtureRequest) -> Any:
    if "attack" in request.fixturenames:
        norms = getattr(request.getfixturevalue("attack"), "norms", None)
        if norms is not None and request.param not in norms:
            pytest.skip(f"not an attack for {request.param}")  # refused with a UserError: tested below
    return THREATS.get(request.param)(eps=RADII[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_attack_leaves_model_untouched(attack, threat, objective):
    if isinstance(attack, Search) and objective != OBJECTIVES.names()[0]:
        pytest.skip("a search has no objective")
    model, (x, y) = make_model(), images()
    before = snapshot(model, x, y)
    x_adv = run_attack(attack, model, x, y, threat, objective=objective, generator=generator())
    assert snapshot(model, x, y) == before
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad and x_adv.grad_fn is None
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (threat.distance(x_adv - x) <= threat.eps * (1 + 1e-5) + 1e-6).all()
    assert x_adv.data_ptr() != x.data_ptr()
    again = run_attack(attack, model, x, y, threat, objective=objective, generator=generator())
    assert torch.equal(again, x_adv), "not deterministic in the seed"


@pytest.mark.slow
def test_a_randomised_model_draws_from_no_one_elses_stream(attack, threat):
    model, (x, y) = make_model(Randomised), images()
    before = snapshot(model, x, y)
    x_adv = run_attack(attack, model, x, y, threat, generator=generator())
    assert snapshot(model, x, y) == before
    torch.rand(3), np.random.rand(3), random.random()
    again = run_attack(attack, model, x, y, threat, generator=generator())
    assert torch.equal(again, x_adv), "not deterministic in the seed"


def test_attack_moves_and_gains(attack, threat):
    model, (x, y) = make_model().eval(), images()
    x_adv = run_attack(attack, model, x, y, threat, generator=generator())
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(x), y, reduction="none")
        after = nn.functional.cross_entropy(model(x_adv), y, reduction="none")
        right = model(x).argmax(1) == y
    if isinstance(attack, Search):  # it may leave alone what is wrong already, and give up on what holds
        assert right.any() and (after[right] >= before[right] - 1e-6).all()
    else:
        assert (after > before).all()


@pytest.mark.slow
def test_a_model_in_training_mode_is_attacked_in_evaluation_mode(attack, threat):
    model, (x, y) = make_model(), images()
    training = run_attack(attack, model, x, y, threat, generator=generator())
    assert torch.equal(training, run_attack(attack, model.eval(), x, y, threat, generator=generator()))


@pytest.mark.slow
def test_each_image_is_attacked_by_itself(attack, threat):
    """The sum over the batch has no cross terms, so an image's attack does not depend on its neighbours."""
    if isinstance(attack, Search):
        pytest.skip("searches draw for the batch")
    model, (x, y) = make_model(), images()
    attack = replace(attack, random_start=False) if "random_start" in vars(attack) else attack
    together = run_attack(attack, model, x, y, threat)
    alone = torch.cat([run_attack(attack, model, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_autograd_mode_is_of_no_account(attack, objective, mode):
    if isinstance(attack, Search) and objective != OBJECTIVES.names()[0]:
        pytest.skip("a search has no objective")
    model, (x, y) = make_model(), images()
    norm = getattr(attack, "norms", ("linf",))[0]
    threat = THREATS.get(norm)(eps=RADII[norm])
    expected = run_attack(attack, model, x, y, threat, objective=objective, generator=generator())
    with mode():
        inside_x, inside_y = x * 1, y * 1  # inference tensors in inference mode
        before = snapshot(model, inside_x)
        x_adv = run_attack(attack, model, inside_x, inside_y, threat, objective=objective, generator=generator())
        assert snapshot(model, inside_x) == before
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize("fails_at", [2, 4])
def test_an_exception_inside_leaves_model_untouched(threat, fails_at):
    """Forward 1 is the check of the logits; the ones after it are inside the attack."""

    class Interrupted(Exception):
        pass

    calls = []

    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            if len(calls) == fails_at:
                raise Interrupted
            return super().forward(x)

    for name in ATTACKS.names():
        attack = make_attack(name)
        if threat.norm not in getattr(attack, "norms", THREATS.names()):
            continue
        model, (x, y) = Fails(), images()
        model.held.eval()
        before = snapshot(model, x, y)
        calls.clear()
        if name == "fgsm" and fails_at > 2:
            continue
        with pytest.raises(ModelError, match="Interrupted"):
            run_attack(attack, model, x, y, threat, generator=generator())
        assert snapshot(model, x, y) == before


@pytest.mark.slow
def test_images_that_require_a_gradient_give_a_leaf_without_one(attack, threat):
    model, (x, y) = make_model(), images()
    expected = run_attack(attack, model, x, y, threat, generator=generator())
    x.requires_grad_()
    x_adv = run_attack(attack, model, x, y, threat, generator=generator())
    assert torch.equal(x_adv, expected) and not x_adv.requires_grad and x.grad is None


@pytest.mark.slow
def test_no_generator_means_a_fixed_seed_not_the_global_one(attack, threat):
    model, (x, y) = make_model(), images()
    state = torch.get_rng_state()
    first = run_attack(attack, model, x, y, threat)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run_attack(attack, model, x, y, threat), first)


def test_eps_zero_returns_the_images(attack):
    model, (x, y) = make_model(), images()
    for norm, kind in THREATS.items():
        if norm in getattr(attack, "norms", THREATS.names()):
            assert torch.equal(run_attack(attack, model, x, y, kind(eps=0)), x)
        else:
            with pytest.raises(UserError, match=f"is an attack for .*, got {norm}"):
                run_attack(attack, model, x, y, kind(eps=0))


def test_double_precision_stays_double(attack, threat):
    model, (x, y) = make_model().double(), images()
    assert run_attack(attack, model, x.double(), y, threat).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ in no norm ball


@pytest.fixture(params=UNRESTRICTED.names())
def unrestricted(request: pytest.FixtureRequest) -> Any:
    return make_attack(request.param, UNRESTRICTED)


@pytest.mark.parametrize("kind", [Net, Randomised])
def test_unrestricted_leaves_model_untouched(unrestricted, kind):
    model, (x, y) = make_model(kind), images()
    before = snapshot(model, x, y)
    x_adv = run_attack(unrestricted, model, x, y, None, generator=generator())
    assert snapshot(model, x, y) == before
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad and x_adv.grad_fn is None
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and unrestricted.allows(x_adv, x).all()
    assert x_adv.data_ptr() != x.data_ptr()
    torch.rand(3), np.random.rand(3), random.random()
    again = run_attack(unrestricted, model, x, y, None, generator=generator())
    assert torch.equal(again, x_adv), "not deterministic in the seed"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_unrestricted_in_any_mode_of_the_caller_and_of_the_model(unrestricted, mode):
    model, (x, y) = make_model(), images()
    expected = run_attack(unrestricted, make_model().eval(), x, y, None)  # no generator: a fixed seed
    with mode():
        inside_x, inside_y = x * 1, y * 1  # inference tensors in inference mode
        before = snapshot(model, inside_x)
        assert torch.equal(run_attack(unrestricted, model, inside_x, inside_y, None), expected)
        assert snapshot(model, inside_x) == before
    x.requires_grad_()
    x_adv = run_attack(unrestricted, model, x, y, None)
    assert torch.equal(x_adv, expected) and not x_adv.requires_grad and x.grad is None


@pytest.mark.parametrize("fails_at", [2, 4])
def test_an_exception_inside_unrestricted_leaves_model_untouched(unrestricted, fails_at):
    calls = []

    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return super().forward(x)

    model, (x, y) = make_model(Fails), images()
    before = snapshot(model, x, y)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run_attack(unrestricted, model, x, y, None, generator=generator())
    assert snapshot(model, x, y) == before


def test_unrestricted_in_double_precision(unrestricted):
    model, (x, y) = make_model().double(), images()
    assert run_attack(unrestricted, model, x.double(), y, None).dtype == torch.float64
