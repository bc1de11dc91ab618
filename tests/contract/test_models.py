"""What every registered model must do; a new file in models/ is picked up by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.models import MODELS
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.segmentation import SegmentationModel
from clead.models.split import AdaptedModel, Classifier, SplitModel, weights
from clead.models.user_model import allow_code
from libraries import need

SHAPE, CLASSES = (3, 12, 12), 5
SMALL = {"width": 4, "widen": 1, "dropout": 0.3, "backbone_args": {"width": 4}}
PER_PIXEL = [name for name, kind in MODELS.items() if kind.__name__ in ("UNet", "DeepLab")]


class UserNet(nn.Module):
    """A user's network: batch-norm, dropout, and a body whose linear layer is not the last."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(6, num_classes)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 6), nn.ReLU()
        )
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x)))


def make(name: str, seed: int = 0, **changes: object) -> SplitModel:
    """Build ``name`` as small as its settings allow."""
    kind = MODELS.get(name)
    values = {key: SMALL[key] for key in SMALL if key in {field.name for field in fields(kind)}}
    if name == "custom":
        values["factory"] = f"{__file__}:UserNet"
        allow_code(values["factory"])
    if name == "library":
        need("timm")
        values["network"] = "timm:test_resnet"
    chosen = kind(**{**values, **changes})
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return build_model(chosen, SHAPE[0], CLASSES, mean, std, seed=seed, sample_shape=SHAPE)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def final_layer(model: SplitModel) -> nn.Linear:
    layer = model.classifier if isinstance(model, Classifier) else model.get_submodule("module.fc")
    assert isinstance(layer, nn.Linear)
    return layer


def snapshot(model: nn.Module) -> list[object]:
    """Everything attack_mode could disturb."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()],
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only hinder each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_features_times_classifier_are_the_logits(name: str) -> None:
    model = make(name).eval()
    features, logits = model.features_and_logits(images())
    if name in PER_PIXEL:  # tests/unit/test_segmentation_models.py
        assert features.shape[:2] == (4, model.feature_dim) and logits.shape == (4, CLASSES, *SHAPE[1:])
    else:
        assert features.shape == (4, model.feature_dim) and logits.shape == (4, CLASSES) == (4, model.num_classes)
        last = final_layer(model)
        torch.testing.assert_close(features @ last.weight.T + last.bias, logits)
    assert torch.equal(model(images()), logits) and torch.equal(model.features(images()), features)


def test_gradient_reaches_the_input_and_every_parameter(name: str) -> None:
    model = make(name)
    x = images().requires_grad_()
    logits = model(x)
    labels = torch.tensor([0, 1, 2, 3]).reshape(4, *(1 for _ in logits.shape[2:])).expand(4, *logits.shape[2:])
    functional.cross_entropy(logits, labels).backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_build_is_a_function_of_the_seed_and_leaves_the_global_state(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = make(name), make(name), make(name, seed=1)
    for model in (first, second):
        model.add_projection(8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not all(map(torch.equal, weights(first).values(), weights(other).values()))


def test_attack_mode_leaves_model_untouched(name: str) -> None:
    model = make(name)
    model.add_projection(8)
    # A frozen parameter, a part held in evaluation mode, and gradients that are under way.
    parameters, modules = list(model.parameters()), list(model.modules())
    parameters[0].requires_grad_(False)
    modules[-1].eval()
    model(images()).sum().backward()
    before = snapshot(model)

    with attack_mode(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        x = images().requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
    assert snapshot(model) == before

    with pytest.raises(KeyError), attack_mode(model), attack_mode(model):
        raise KeyError
    assert snapshot(model) == before


def test_cost_is_counted_by_whichever_method_runs(name: str) -> None:
    model = make(name)
    model.add_projection(8)
    with CostMeter(model) as meter:
        features, logits = model.features_and_logits(images())  # 4 forward
        (logits.sum() + model.embedding(features).sum()).backward()  # 4 full
        model(images(3))  # 3 forward
        with attack_mode(model):
            x = images(2).requires_grad_()
            torch.autograd.grad(model(x).sum(), x)  # 2 forward, 2 to the input
        with torch.no_grad():
            model.features(images(5))  # 5 forward
    model(images(2)).sum().backward()
    assert (meter.forwards, meter.input_backwards, meter.full_backwards) == (14, 2, 4)
    assert (meter.backwards, meter.forward_equivalents) == (6, 14 + 2 + 8)


def test_normalisation_is_the_first_layer(name: str) -> None:
    plain, normalised = make(name, normalize="none").eval(), make(name, normalize="data").eval()
    x = images()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(normalised(x), plain((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


def test_weights_have_no_projection_and_load_back(name: str) -> None:
    model, other = make(name), make(name, seed=1)
    model.add_projection(8)
    kept = weights(model)
    assert not any(key.startswith("projection") for key in kept)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in kept.values())
    other.load_state_dict(kept)
    assert torch.equal(model.eval()(images()), other.eval()(images()))


def test_channels_last_and_autocast(name: str) -> None:
    model = make(name).eval()
    model.add_projection(8)
    expected = model(images())
    model = model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = model.features_and_logits(x)
        embedding = model.embedding(features)
    assert logits.dtype == torch.bfloat16 and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4, *features.shape[2:]))
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_copy_is_independent(name: str) -> None:
    model = make(name).eval()
    expected = model.features(images())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model.features(images()), expected)
    assert not torch.equal(other.features(images()), expected)
    assert isinstance(other, (Classifier, AdaptedModel, SegmentationModel))


def test_images_of_other_sizes_and_channels(name: str) -> None:
    if name in ("custom", "library"):
        pytest.skip("the network decides its own size")
    kind = MODELS.get(name)
    values = {key: SMALL[key] for key in SMALL if key in {field.name for field in fields(kind)}}
    model = build_model(kind(**values), 1, 10, [0.3], [0.3], seed=0, sample_shape=(1, 8, 8)).eval()
    assert model(torch.rand(2, 1, 8, 8)).shape[:2] == model(torch.rand(2, 1, 11, 9)).shape[:2] == (2, 10)
