"""Attacks of other libraries: the same images as the library gives, only where they are feasible, and no trace left behind."""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clead.attacks import external
from clead.attacks.external import External
from clead.attacks.runner import run_attack
from clead.errors import UserError
from clead.interfaces import Search
from clead.models.seeding import fork_rng
from clead.threats import THREATS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchattacks = pytest.importorskip("torchattacks")
    foolbox = pytest.importorskip("foolbox")

RADII = {"linf": 0.05, "l2": 1.0, "l1": 8.0}


def net() -> nn.Module:
    with fork_rng(0):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(512, 10)
        )


def images(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return x, y


def threat(norm: str) -> Any:
    return THREATS.get(norm)(eps=RADII[norm])


def broken(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model.eval()(x).argmax(1) != y).sum())


STRONG = [
    ("torchattacks:FGSM", "linf", {}),
    ("torchattacks:PGD", "linf", {"steps": 5, "alpha": 0.02}),
    ("torchattacks:MIFGSM", "linf", {"steps": 5}),
    ("torchattacks:APGD", "l2", {"steps": 5}),
    ("torchattacks:APGDT", "linf", {"steps": 5}),
    ("torchattacks:PGDL2", "l2", {"steps": 5, "alpha": 0.5}),
    ("torchattacks:DeepFool", "l2", {"steps": 10}),
    ("torchattacks:FAB", "l2", {"steps": 5}),
    ("torchattacks:Square", "linf", {"n_queries": 100}),
    ("torchattacks:AutoAttack", "linf", {}),
    ("torchattacks:EADL1", "l1", {"max_iterations": 20}),
    ("torchattacks:PIFGSM", "linf", {}),
    ("foolbox:LinfPGD", "linf", {"steps": 10}),
    ("foolbox:L2FastGradientAttack", "l2", {}),
    ("foolbox:SparseL1DescentAttack", "l1", {}),
    ("foolbox:DDNAttack", "l2", {"steps": 10}),
    ("foolbox:L2CarliniWagnerAttack", "l2", {"steps": 10, "binary_search_steps": 4}),
    ("foolbox:LinfDeepFoolAttack", "linf", {"steps": 10}),
    ("foolbox:L1FMNAttack", "l1", {"steps": 20}),
    ("foolbox:HopSkipJumpAttack", "linf", {"steps": 5, "max_gradient_eval_steps": 100}),
    ("foolbox:HopSkipJumpAttack", "l2", {"steps": 5, "max_gradient_eval_steps": 100}),
    ("foolbox:L2RepeatedAdditiveGaussianNoiseAttack", "l2", {"repeats": 20}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "options"), STRONG)
def test_feasible_reproducible_and_without_trace(name, norm, options):
    model = net()
    x, y = images(model)
    model.train()
    attack = external(name, **options)
    assert isinstance(attack, Search) and not callable(attack)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = x.clone()
    with warnings.catch_warnings(record=True) as caught:
        results = [
            run_attack(attack, model, x, y, threat(norm), generator=torch.Generator().manual_seed(7)) for _ in "12"
        ]
    assert not caught and before == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(x, pixels) and not results[0].requires_grad
    assert torch.equal(results[0], results[1])
    assert (threat(norm).distance(results[0] - x) <= RADII[norm] * (1 + 1e-5) + 1e-6).all()
    assert results[0].min() >= 0 and results[0].max() <= 1
    assert broken(model, results[0], y) >= 1


def test_nothing_is_printed(capsys):
    model = net()
    run_attack(external("torchattacks:FAB", steps=2, verbose=True), model, *images(model), threat("linf"))
    assert capsys.readouterr().out == ""


def test_the_same_images_as_torchattacks_itself():
    model = net()
    x, y = images(model)
    expected = torchattacks.PGD(model, eps=RADII["linf"], alpha=0.01, steps=4, random_start=False)(x, y)
    attack = external("torchattacks:PGD", alpha=0.01, steps=4, random_start=False)
    actual = run_attack(attack, model, x, y, threat("linf"))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_the_same_images_as_foolbox_itself():
    model = net()
    x, y = images(model)
    peer = foolbox.attacks.L2PGD(steps=4, random_start=False)
    _, expected, _ = peer(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=1.0)
    actual = run_attack(external("foolbox:L2PGD", steps=4, random_start=False), model, x, y, threat("l2"))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_seed_decides():
    model = net()
    x, y = images(model)
    attack = external("foolbox:LinfPGD", steps=1)
    one, two = (
        run_attack(attack, model, x, y, threat("linf"), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)


@pytest.mark.slow
def test_what_left_the_ball_does_not_count():
    """C&W and DeepFool minimise without a limit: at a small radius most images are too far and come back as they were."""
    model = net()
    x, y = images(model, 20)
    for name, options in (("torchattacks:DeepFool", {}), ("foolbox:L2CarliniWagnerAttack", {"steps": 20})):
        sizes = []
        for eps in (0.05, 0.2, 5.0):
            x_adv = run_attack(external(name, **options), model, x, y, THREATS.get("l2")(eps=eps))
            size = (x_adv - x).flatten(1).norm(dim=1)
            assert (size <= eps * (1 + 1e-5) + 1e-6).all()
            assert torch.equal(x_adv[size == 0], x[size == 0])
            sizes.append(int((size > 0).sum()))
        assert sizes[0] < sizes[1] < sizes[2], name


def test_images_wrong_already_are_not_handed_over():
    model = net()
    x, y = images(model)
    y[:3] = (y[:3] + 1) % 10
    x_adv = run_attack(external("torchattacks:FGSM"), model, x, y, threat("linf"))
    assert torch.equal(x_adv[:3], x[:3]) and (x_adv[3:] != x[3:]).flatten(1).any(1).all()
    y[3:] = (y[3:] + 1) % 10
    assert torch.equal(run_attack(external("torchattacks:FGSM"), model, x, y, threat("linf")), x)


def test_eps_zero_and_double_precision():
    model = net()
    x, y = images(model)
    attack = external("torchattacks:PGDL2")
    assert torch.equal(run_attack(attack, model, x, y, THREATS.get("l2")(eps=0)), x)
    double = run_attack(attack, model.double(), x.double(), y, threat("l2"))
    assert double.dtype == torch.float64 and not torch.equal(double, x.double())


class Outside(nn.Module):
    """Another framework: answers without any gradient, as an ONNX session does."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.detach().numpy()})[0])


def onnx_model(model: nn.Module, path: Any, count: int) -> Outside:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pieces = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    helper, kept = onnx.helper, [onnx.numpy_helper.from_array(value, name) for name, value in pieces.items()]
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["h"]),
            helper.make_node("Gemm", ["h", "1.weight", "1.bias"], ["z"], transB=1),
        ],
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 3])],
        kept,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Outside(onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"]))


@pytest.mark.slow
def test_decision_based_attacks_of_a_model_of_another_framework(tmp_path):
    with fork_rng(0):
        inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model = onnx_model(inner, tmp_path, 3)
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    ball = THREATS.get("l2")(eps=1.0)
    for name, options in (
        ("foolbox:HopSkipJumpAttack", {"steps": 5, "max_gradient_eval_steps": 100}),
        ("foolbox:BoundaryAttack", {"steps": 1000}),
    ):
        x_adv = run_attack(external(name, **options), model, x, y, ball)
        assert int((model(x_adv).argmax(1) != y).sum()) >= 2, name
    with pytest.raises(UserError, match="the model gives no gradient; take one that needs none"):
        run_attack(external("torchattacks:PGD"), model, x, y, threat("linf"))


def test_one_image_without_a_starting_point_does_not_spoil_the_batch():
    class Stubborn(nn.Module):
        """Its third class is any image with the mark 0.25 in the corner."""

        def forward(self, x: Tensor) -> Tensor:
            lit = x.flatten(1).mean(1) - 0.5
            held = torch.where(x[:, 0, 0, 0] == 0.25, 1e9, 0.0)
            return torch.stack([lit, -lit, held], 1)

    x = torch.full((4, 1, 8, 8), 0.55)
    x[1, 0, 0, 0] = 0.25
    model, y = Stubborn(), torch.tensor([0, 2, 0, 0])

    class Inverts(foolbox.attacks.base.MinimizationAttack):
        """1 − x, which is of class 1, but of the marked image the image itself."""

        distance = foolbox.distances.l2

        def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: Any = None, **kwargs: Any) -> Any:
            import eagerpy as ep

            z, restore = ep.astensor_(inputs)
            held = z.raw[:, :1, :1, :1] == 0.25
            return restore(ep.astensor(torch.where(held, z.raw, 1 - z.raw)))

    options = {"init_attack": Inverts(), "steps": 2, "max_gradient_eval_steps": 20, "initial_gradient_eval_steps": 20}
    x_adv = run_attack(external("foolbox:HopSkipJumpAttack", **options), model, x, y, THREATS.get("l2")(eps=4.0))
    assert torch.equal(x_adv[1], x[1])
    assert [int(k) for k in model(x_adv).argmax(1)] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("torchattacks:PGD", ("linf",)),
        ("torchattacks:CW", ("l2",)),
        ("torchattacks:OnePixel", ("l0",)),
        ("torchattacks:Square", ("linf", "l2")),
        ("torchattacks:FAB", ("linf", "l2")),
        ("torchattacks:GN", None),
        ("foolbox:L1PGD", ("l1",)),
        ("foolbox:EADAttack", ("l1",)),
        ("foolbox:LInfFMNAttack", ("linf",)),
        ("foolbox:L0FMNAttack", ("l0",)),
        ("foolbox:L2ClippingAwareAdditiveGaussianNoiseAttack", ("l2",)),
        ("foolbox:HopSkipJumpAttack", ("linf", "l2")),
        ("foolbox:InversionAttack", None),
        ("foolbox:PointwiseAttack", None),
    ],
)
def test_the_norm_that_an_attack_is_made_for(name, norms):
    assert external(name).norms == norms


@pytest.mark.parametrize(("name", "norm"), [("torchattacks:PGDL2", "linf"), ("foolbox:LinfPGD", "l2")])
def test_another_norm_is_refused(name, norm):
    model = net()
    with pytest.raises(UserError, match=f"{name} is an attack for .*, got {norm}"):
        run_attack(external(name), model, *images(model), threat(norm))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("torchattacks:PDG", {}, "unknown attack of torchattacks 'PDG'; did you mean 'PGD'"),
        ("foolbox:LinfPDG", {}, "unknown attack of foolbox 'LinfPDG'; did you mean 'LinfPGD'"),
        ("foolbox:FixedEpsilonAttack", {}, "unknown attack of foolbox 'FixedEpsilonAttack'"),
        ("PGD", {}, "an external attack is named torchattacks:NAME or foolbox:NAME, got 'PGD'"),
        ("art:PGD", {}, "an external attack is named torchattacks:NAME or foolbox:NAME, got 'art:PGD'"),
        ("torchattacks:PGD", {"step": 3}, "torchattacks:PGD: unknown setting 'step'; did you mean 'steps'?"),
        ("foolbox:LinfPGD", {"alpha": 3}, "foolbox:LinfPGD: unknown setting 'alpha'"),
        ("foolbox:L2AdditiveGaussianNoiseAttack", {"std": 3}, "unknown setting 'std'; known: none"),
        ("torchattacks:PGD", {"eps": 0.1}, "eps follows from the threat, the images and the seed; leave it out"),
        ("torchattacks:Square", {"seed": 1}, "seed follows from"),
        ("torchattacks:LGV", {}, "torchattacks:LGV cannot be run here: it trains a model of its own"),
        ("foolbox:SpatialAttack", {}, "use clead.attacks.spatial"),
        ("foolbox:VirtualAdversarialAttack", {}, "foolbox:VirtualAdversarialAttack needs a value for steps"),
    ],
)
def test_unknown_names_and_settings_are_one_line(name, options, says):
    with pytest.raises(UserError) as caught:
        External(name, options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("torchattacks:PGD", "torchattacks", "pip install --no-deps torchattacks"),
        ("foolbox:LinfPGD", "foolbox.attacks", "pip install foolbox"),
    ],
)
def test_a_missing_library_names_the_install_command(monkeypatch, name, module, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        external(name)
    assert f"which is not installed; run: {command}" in str(caught.value)


def test_a_failure_inside_the_library_is_one_line_and_leaves_no_trace():
    model = net()
    x, y = images(model)
    state = random.getstate(), torch.get_rng_state()
    with pytest.raises(UserError, match="torchattacks:PGD fails: TypeError: 'str' object") as caught:
        run_attack(external("torchattacks:PGD", steps="three"), model, x, y, threat("linf"))
    assert (
        "\n" not in str(caught.value) and random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    )


@pytest.mark.parametrize("said", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_too_little_memory_is_left_to_the_evaluation_which_halves_the_batch(said, monkeypatch):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(sys.modules["clead.attacks.external"], "_torchattacks", fail)
    model = net()
    with pytest.raises(RuntimeError, match=said):
        run_attack(external("torchattacks:PGD"), model, *images(model), threat("linf"))


def test_settings_are_those_of_the_library_and_weak_ones_are_told():
    attack = external("torchattacks:PGD", steps=5)
    assert attack.description == {"name": "torchattacks:PGD", "alpha": 2 / 255, "steps": 5, "random_start": True}
    said = attack.weakness_warning(THREATS.get("linf")(eps=0.1))
    assert (
        said is not None and "5 steps of 0.007843, which cannot cross eps 0.1" in said and "--attack.steps 32" in said
    )
    assert attack.weakness_warning(THREATS.get("linf")(eps=8 / 255)) is None  # 5 × 2/255
    assert (
        external("foolbox:LinfPGD").weakness_warning(THREATS.get("linf")(eps=0.3)) is None
    )  # 40 steps of a thirtieth of it
    said = external("foolbox:LinfPGD", steps=20).weakness_warning(THREATS.get("linf")(eps=0.3))
    assert said is not None and "20 steps of 0.01, which cannot cross eps 0.3" in said and "--attack.steps 75" in said
    assert external("foolbox:LinfPGD", abs_stepsize=0.1).weakness_warning(THREATS.get("linf")(eps=0.3)) is None
    assert (
        external("torchattacks:APGD").weakness_warning(THREATS.get("linf")(eps=0.3)) is None
    )  # it sets its steps itself
