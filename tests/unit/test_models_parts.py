"""The models: sizes against the literature's, the split, the modes, the meter, and a user's own network."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.normalize import Normalize
from clead.models.resnet import Residual
from clead.models.small_cnn import SmallCNN
from clead.models.split import AdaptedModel, SplitModel, adapt, weights
from clead.models.user_model import Custom, allow_code

SHAPE = (1, 8, 8)


def small(seed: int = 0, **changes: Any) -> SplitModel:
    return build_model(SmallCNN(width=4, **changes), 1, 3, [0.3], [0.4], seed=seed, sample_shape=SHAPE)


def user_net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(72, 7),
        nn.Dropout(),
        nn.Linear(7, classes),
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # He et al. 2016, table 6: 0.27 M; 269,722 is the exact count with zero-padded shortcuts.
        ("resnet20", 269_722),
        # The CIFAR variants of He et al. 2016, table 1, as the public CIFAR code bases print them.
        ("resnet10", 4_903_242),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        # Rice et al. 2020 and Wong et al. 2020: PreActResNet18 with a final batch-norm.
        ("preact_resnet18", 11_172_170),
        # Zagoruyko & Komodakis 2016: 36.5 M; the exact count without biases in convolutions.
        ("wrn_28_10", 36_479_194),
        # TRADES (Zhang et al. 2019): WRN-34-10, 46.16 M.
        ("wrn_34_10", 46_160_474),
    ],
)
def test_parameter_count_is_the_published_one(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS.get(name)().build(3, 10, [0.5] * 3, [0.2] * 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "wrn_28_10", "preact_resnet18"])
def test_convolutions_start_with_variance_two_over_fan_out(name: str) -> None:
    settings = MODELS.get(name)(**({"widen": 2} if name.startswith("wrn") else {"width": 32}))
    model = build_model(settings, 3, 10, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 32, 32))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5000:
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_residual_block_equals_its_formula() -> None:
    block = Residual(2, 4, 2, bottleneck=False, pad=True).eval()
    conv1, _, _, conv2, _ = block.residual
    x = torch.rand(1, 2, 4, 4)
    # Batch-norm at its start, in evaluation mode, is x / sqrt(1 + 1e-5).
    inner = torch.relu(conv1(x) / 1.00001**0.5)
    expected = conv2(inner) / 1.00001**0.5
    expected[:, :2] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), torch.relu(expected))


def test_normalize() -> None:
    x = torch.rand(2, 2, 3, 3)
    expected = (x.numpy() - np.array([0.1, 0.2]).reshape(2, 1, 1)) / np.array([0.3, 0.4]).reshape(2, 1, 1)
    np.testing.assert_allclose(
        Normalize([0.1, 0.2], [0.3, 0.4])(x).numpy(), expected, rtol=1e-5, atol=1e-6
    )  # near the mean a difference of two floats


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.0], "std must be > 0, got"),
        ([0.5], [-1.0], "std must be > 0"),
        ([0.5, 0.5], [1.0], "2 and 1 numbers"),
        ([float("nan")], [1.0], "finite"),
    ],
)
def test_normalize_refuses(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)


def test_projection_is_made_used_and_dropped() -> None:
    model = small()
    with pytest.raises(RuntimeError, match="add_projection"):
        model.embedding(torch.rand(2, 128))
    model.add_projection(dim=6, hidden=5)
    assert model.projection is not None and model.projection.hidden.out_features == 5
    features = torch.rand(2, 128)
    projected = model.projection.output(torch.relu(model.projection.hidden(features)))
    torch.testing.assert_close(model.embedding(features), projected / projected.norm(dim=1, keepdim=True))
    assert model.embedding(features.double()).dtype == torch.float32
    model.drop_projection()
    assert model.projection is None
    model.eval().add_projection()
    assert model.projection is not None and not model.projection.training
    assert model.double().embedding(features).dtype == torch.float64


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (9, 13)])
@pytest.mark.parametrize("pool", [1, 2])
def test_small_cnn_pools_as_adaptive_average(size: tuple[int, int], pool: int) -> None:
    encoder = SmallCNN(width=2, pool=pool, features=3).encoder(1)[0].eval()
    x = torch.rand(2, 1, *size)
    cells = nn.functional.adaptive_avg_pool2d(encoder.convolutions(x), pool)  # type: ignore[operator]
    torch.testing.assert_close(encoder(x), torch.relu(encoder.linear(cells.flatten(1))))  # type: ignore[operator]


def test_small_cnn_refuses_images_too_small_for_its_pool() -> None:
    with pytest.raises(UserError, match="leaves 2x2 cells of a 8x8 image, fewer than pool = 4"):
        small(pool=4)(torch.rand(1, 1, 8, 8))


def test_attack_mode_keeps_parts_that_override_train() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    net = nn.Sequential(Frozen(1), nn.Dropout()).train()
    net[0].training = True  # reached in a way that train() would not reproduce
    with attack_mode(net):
        assert not net[0].training
    assert net[0].training and net[1].training


def test_cost_of_a_plain_module_with_tuple_and_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x.sum()

    net = Two()
    with CostMeter(net) as outer, CostMeter(net) as meter:
        out, total = net(x=torch.rand(3, 2, requires_grad=True))
        (out.sum() + total).backward()
        with attack_mode(net):
            net(torch.rand(2, 2))[0].sum()  # nothing requires a gradient: no backward to count
    assert (meter.forwards, meter.backwards, meter.forward_equivalents) == (5, 3, 5 + 6)
    assert outer.forward_equivalents == meter.forward_equivalents
    assert not net._forward_hooks


def test_cost_stops_on_exception_and_copies_are_not_counted() -> None:
    model = small()
    with pytest.raises(KeyError), CostMeter(model) as meter:
        pickle.loads(pickle.dumps(model))(torch.rand(2, *SHAPE))
        raise KeyError
    model(torch.rand(2, *SHAPE))
    assert meter.forwards == 0


@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_model_gives_the_same_and_is_counted(adapted: bool) -> None:
    model = adapt(user_net(), sample_shape=SHAPE) if adapted else small()
    model.eval()
    x = torch.rand(4, *SHAPE, requires_grad=True)
    expected = model.features_and_logits(x)
    (gradient,) = torch.autograd.grad(expected[1].sum(), x)
    model.compile(backend="aot_eager", fullgraph=True)
    with CostMeter(model) as meter, attack_mode(model):
        outputs = model.features_and_logits(x)
        (compiled,) = torch.autograd.grad(outputs[1].sum(), x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(compiled, gradient)
    assert (meter.forwards, meter.input_backwards, meter.full_backwards) == (4, 4, 0)
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(x), expected[1])


@pytest.mark.parametrize("name", [None, "5"])
def test_user_module_is_split_and_kept_intact(name: str | None) -> None:
    net = user_net()
    keys = list(net.state_dict())
    adapted = adapt(net, sample_shape=SHAPE, num_classes=3, classifier=name)
    assert isinstance(adapted, AdaptedModel) and adapted.module is net and adapted.classifier_name == "5"
    assert list(adapted.module.state_dict()) == keys
    assert [key.removeprefix("module.") for key in weights(adapted)] == keys
    x = torch.rand(4, *SHAPE)
    adapted.train()
    features, logits = adapted.features_and_logits(x)  # dropout on: the features are those that gave the logits
    torch.testing.assert_close(net[5](features), logits)
    adapted.eval()
    assert torch.equal(adapted.features(x), net[:5](x)) and torch.equal(adapted(x), net(x))
    assert adapt(adapted, sample_shape=SHAPE, num_classes=3) is adapted


def test_adapted_module_inside_an_adapted_one() -> None:
    inner = adapt(user_net(), sample_shape=SHAPE).eval()
    around = adapt(nn.Sequential(nn.Identity(), inner), sample_shape=SHAPE).eval()
    after = adapt(nn.Sequential(inner, nn.ReLU(), nn.Linear(3, 2)), sample_shape=SHAPE).eval()
    x = torch.rand(4, *SHAPE)
    assert torch.equal(around.features(x), inner.features(x))
    assert torch.equal(after.features(x), inner(x).relu()) and torch.equal(inner.features(x), around.features(x))


def test_adapting_changes_neither_the_module_nor_the_global_state() -> None:
    net = user_net()
    net[1].eval()
    flags, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    generator = torch.get_rng_state()
    adapt(net, sample_shape=SHAPE)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_user_module_in_two_threads() -> None:
    barrier = threading.Barrier(2, timeout=20)

    class Meet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                barrier.wait()
            return x.flatten(1)

    adapted = adapt(nn.Sequential(Meet(), nn.Linear(64, 3)), sample_shape=SHAPE)
    found: dict[int, Tensor] = {}

    def work(value: int) -> None:
        found[value] = adapted.features(torch.full((1, *SHAPE), float(value)))

    threads = [threading.Thread(target=work, args=(value,)) for value in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[value] == value).all() for value in (0, 1))


class Returns(nn.Module):
    """A network whose output is made wrong by ``change``."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net = user_net()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("module", "classifier", "message"),
    [
        (user_net(4), None, "returns 4 logits per image but the data has 3 classes"),
        (Returns(lambda out: (out, out)), None, r"returns 0 \(2, 3\), 1 \(2, 3\), and several .* --model.output 0"),
        (Returns(lambda out: "none"), None, "must return logits, a tensor .B, K., got a str without any tensor"),
        (Returns(lambda out: out[:, :, None].expand(2, 3, 4)), None, r"got float32 \(2, 3, 4\); choose the token"),
        (
            Returns(lambda out: out.argmax(1)),
            None,
            r"floating point, got int64 \(2,\); return the values before argmax",
        ),
        (
            user_net(),
            "3",
            r"'3' .* must map features \(B, D\) to logits, \(2, 3\), .* got \(2, \d+\) -> .* one of: 5 \(D",
        ),
        (user_net(), "6", "has no layer '6'.*3, 5"),
        (user_net(), "0", r"'0' .* must map features .* got \(2, 1, 8, 8\) -> "),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(5, 3)),
            None,
            r"fails on images of shape \(1, 8, 8\): RuntimeE",
        ),
        (small(), None, None),
    ],
)
def test_adapt_says_what_is_wrong(module: nn.Module, classifier: str | None, message: str | None) -> None:
    if message is None:
        with pytest.raises(UserError, match="3 classes but the data has 4"):
            adapt(module, sample_shape=SHAPE, num_classes=4)
        return
    with pytest.raises(UserError, match=message) as raised:
        adapt(module, sample_shape=SHAPE, num_classes=3, classifier=classifier)
    assert "\n" not in str(raised.value)


SOURCE = """
from torch import nn
from sibling_of_mine import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))

def fixed():
    return Net(3)

def split(num_classes):
    from clead.models.small_cnn import SmallCNN
    return SmallCNN(width=WIDTH).build(1, 5, [0.5], [0.5])

def wrong():
    return 3

def broken():
    raise RuntimeError("no weights\\nat all")

made = Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine_of_test.py").write_text(SOURCE)
    (tmp_path / "nets" / "sibling_of_mine.py").write_text("WIDTH = 2")
    (tmp_path / "bad_of_test.py").write_text("import torch\nimport not_a_module_at_all")
    (tmp_path / "top_of_test.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(factory: str, **changes: Any) -> SplitModel:
    allow_code(factory)
    return build_model(Custom(factory=factory, **changes), 1, 3, [0.5], [0.5], seed=0, sample_shape=SHAPE)


@pytest.mark.parametrize("factory", ["nets/mine_of_test.py:Net", "nets/mine_of_test.py:fixed", "top_of_test:net"])
def test_custom_model_is_imported_and_adapted(folder: Path, factory: str) -> None:
    import sys

    path = sys.path.copy()
    model = build(factory)
    assert sys.path == path
    assert isinstance(model, AdaptedModel) and (model.num_classes, model.feature_dim) == (3, 64)
    assert isinstance(model.normalize, nn.Identity)
    assert isinstance(build(factory, normalize="data").normalize, Normalize)
    assert torch.equal(model(torch.ones(1, *SHAPE)), build(factory)(torch.ones(1, *SHAPE)))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mine.py", "must be 'module:factory' or"),
        ("nets/mine_of_tets.py:Net", "no file 'nets/mine_of_tets.py'; did you mean 'nets/mine_of_test.py'"),
        ("nets.no_such:Net", "no module 'nets.no_such'"),
        ("no_such_package_x:Net", "no module 'no_such_package_x'"),
        ("bad_of_test:Net", "importing bad_of_test raised ModuleNotFoundError.*not_a_module_at_all"),
        ("bad_of_test.py:Net", "importing bad_of_test.py raised ModuleNotFoundError"),
        ("nets/mine_of_test.py:Nat", "has no 'Nat'; did you mean 'Net'"),
        ("nets/mine_of_test.py:wrong", "must return a torch.nn.Module, got int"),
        ("nets/mine_of_test.py:made", "is a Net; give a function or class"),
        ("nets/mine_of_test.py:broken", "raised RuntimeError: no weights"),
        ("nets/mine_of_test.py:split", "has 5 classes but the data has 3"),
    ],
)
def test_custom_model_says_what_is_wrong(folder: Path, factory: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build(factory)
    assert "\n" not in str(raised.value)
