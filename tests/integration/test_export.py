"""Runs as folders: the file answers as PyTorch does, the card's lines run, rounding is measured, nothing half-made is left."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import clead
from clead import api, cli
from clead.config import load_recipe
from clead.errors import UserError
from clead.export import onnx as exporter
from clead.weights.files import load_weights, save_weights

SHORT = ("--train.budget", "2", "--train.device", "cpu")
QUICK = ("--eval.images", "40", "--eval.steps", "5", "--eval.check_images", "0", "--eval.curve_points", "0")
QUICK += ("--train.device", "cpu")
AGREE = 1e-4  # issue: logits within 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A digits run, trained for two forward-equivalents, evaluated on 40 images."""
    where = tmp_path_factory.mktemp("export") / "mine"
    clead.train(load_recipe("digits-clead", list(SHORT)), out=where, show=False)
    config = load_recipe(str(where / "config.yaml"), list(QUICK))
    clead.evaluate_run(where, config=config, show=False)
    return where


@pytest.fixture
def call(monkeypatch, capsys):
    """Return exit code and output of a command line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out + found.err

    return call


def logits(file: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def code_of(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.S)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_a_digits_run_as_onnx_answers_as_pytorch_does_on_its_test_images(run, tmp_path, call):
    code, text = call("export", run, "--out", tmp_path / "given", "--format", "onnx", "--licence", "mit")
    assert code == 0, text
    images = clead.load_recipe("digits-clead").data.load(0).test.images.numpy().astype(np.float32) / 255
    with torch.inference_mode():
        expected = clead.load(run)(torch.from_numpy(images)).numpy()
    for count in (1, 2, 33, len(images)):  # dynamic batch
        found = logits(tmp_path / "given" / "model.onnx", images[:count])
        assert np.abs(found - expected[:count]).max() < AGREE
    stated = re.search(r"differ from PyTorch's by at most (\S+)", text)
    assert stated is not None and float(stated[1]) < AGREE
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == [
        *("README.md", "config.yaml", "evaluation.json", "export.json", "model.onnx")
    ]


@pytest.mark.slow
def test_the_lines_of_the_card_use_onnxruntime_and_numpy_only(run, tmp_path):
    api.export_run(run, out=tmp_path / "given", show=False)
    code = code_of(tmp_path / "given" / "README.md")
    assert len(code.splitlines()) == 5
    checked = code + "import sys\nassert not {'torch', 'clead'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", checked], cwd=tmp_path / "given", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\['\d'\]\n", done.stdout)


@pytest.mark.slow
def test_the_card_has_the_measured_numbers_and_says_what_was_not_checked(run, tmp_path):
    api.export_run(run, out=tmp_path / "given", licence="apache-2.0", show=False)
    card = (tmp_path / "given" / "README.md").read_text()
    record = json.loads((run / "results" / "evaluation.json").read_text())
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for part in ("clean", "worst"):
        assert f"{record[part]['accuracy']:.1%} ({record[part]['low']:.1%} – {record[part]['high']:.1%})" in card
    assert "The checks of gradient masking were not run." in card
    assert record["model"]["fingerprint"] in card
    assert "It was hardened against linf ≤ 0.15 only" in card


@pytest.mark.slow
def test_other_weights_than_those_evaluated_get_a_card_without_numbers(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    tensors, metadata = load_weights(other / "last.safetensors")
    kept = {key: value for key, value in metadata.items() if key != "clead"}
    save_weights(
        other / "last.safetensors", {k: v * 2 if v.is_floating_point() else v for k, v in tensors.items()}, kept
    )
    api.export_run(other, out=tmp_path / "given", show=False)
    card = (tmp_path / "given" / "README.md").read_text()
    assert "Nothing: there is no evaluation of these weights" in card
    assert "The run's evaluation is of other weights than these, and is left out." in card
    assert not (tmp_path / "given" / "evaluation.json").exists()


@pytest.mark.slow
def test_a_run_on_own_images_is_exported_without_the_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    np.savez("photos.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    words = ["--data.name", "auto", "--data.path", str(tmp_path / "photos.npz"), *SHORT]
    clead.train(load_recipe("digits-standard", words), out="run", show=False)
    api.export_run("run", out="given", show=False)
    text = Path("given/config.yaml").read_text() + Path("given/README.md").read_text()
    assert "photos.npz" in text and str(tmp_path) not in text
    assert clead.load("run").num_classes == 2
    api.export_run("run", out="weights", format="safetensors", show=False)
    assert clead.load("weights").num_classes == 2


@pytest.mark.slow
def test_the_weights_that_the_recipe_evaluates_are_exported(run, tmp_path):
    """digits-clead evaluates its last weights."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    tensors, metadata = load_weights(other / "best.safetensors")
    kept = {key: value for key, value in metadata.items() if key != "clead"}
    save_weights(
        other / "best.safetensors", {k: v * 2 if v.is_floating_point() else v for k, v in tensors.items()}, kept
    )
    api.export_run(other, out=tmp_path / "given", show=False)
    assert (tmp_path / "given" / "evaluation.json").exists()


class Mine(nn.Module):
    """A model of a user: other layer names, a pooling, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        """Return logits."""
        x = torch.relu(self.stem(x - 0.5))
        x = x + torch.nn.functional.silu(self.again(x))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.slow
def test_a_users_model_comes_out_as_onnx(tmp_path):
    torch.manual_seed(0)
    net = Mine()
    clead.train(load_recipe("digits-standard", list(SHORT)), out=tmp_path / "run", model=net, show=False)
    result = api.export_run(tmp_path / "run", out=tmp_path / "given", model=net, show=False)
    x = torch.rand(17, 1, 8, 8)
    trained = clead.load(tmp_path / "run", model=net)
    with torch.inference_mode():
        expected = trained(x).numpy()
    assert np.abs(logits(tmp_path / "given" / "model.onnx", x.numpy()) - expected).max() < AGREE
    assert result["difference"] < AGREE


@pytest.mark.slow
def test_the_network_of_the_cifar_recipes_comes_out_as_onnx(tmp_path):
    # Random weights and batch statistics that are not 0 and 1: what normalisation does must be in the file.
    torch.manual_seed(0)
    config = load_recipe("cifar10-small-clead")
    model = config.model.build(3, 10, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    content = exporter.to_onnx(model, (3, 32, 32), features=True)
    x = torch.rand(40, 3, 32, 32)
    assert exporter.difference(content, model, x) < AGREE
    features = exporter.session(content).run(["features"], {"images": x.numpy()})[0]
    with torch.inference_mode():
        assert np.abs(features - model.features_and_logits(x)[0].numpy()).max() < AGREE


@pytest.mark.slow
def test_an_operation_that_onnx_has_not_is_named_and_nothing_is_left(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.head = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        return self.head(x.flatten(1) + 0 * torch.special.bessel_j0(x).flatten(1))\n"
        "def make():\n    return Odd()\n"
    )
    code, text = call("train", "digits-standard", "--model.name", "odd.py:make", "--out", "run", *SHORT)
    assert code == 0, text
    code, text = call("export", "run", "--out", "given")
    assert code == 2
    assert "bessel_j0" in text and "--format safetensors" in text
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["odd.py", "run"]


@pytest.mark.slow
def test_int8_is_measured_again_and_stands_in_the_card(run, tmp_path, call):
    given = tmp_path / "given"
    code, text = call("export", run, "--out", given, "--precision", "int8", "--images", 30)
    assert code == 0, text
    found = json.loads((given / "export.json").read_text())["remeasured"]
    assert all(
        found[key]["n"] == 30 for key in ("clean", "clean_before", "before", "transferred", "white_box", "worst")
    )
    least = min(found[key]["accuracy"] for key in ("transferred", "white_box", "queries"))
    assert found["worst"]["accuracy"] <= least <= found["clean"]["accuracy"]
    card = (given / "README.md").read_text()
    assert f"{found['worst']['accuracy']:.1%}" in card and "before it was converted to int8" in card
    # Clean accuracy as plain onnxruntime counts it.
    test = load_recipe("digits-clead").data.load(0).test
    answers = logits(given / "model.onnx", test.images[:30].numpy().astype(np.float32) / 255).argmax(1)
    assert (answers == test.labels[:30].numpy()).mean() == pytest.approx(found["clean"]["accuracy"])
    # 8-bit weights: the file is another model.
    whole = logits(given / "model.onnx", np.zeros((1, 1, 8, 8), np.float32))
    with torch.inference_mode():
        assert np.abs(whole - clead.load(run)(torch.zeros(1, 1, 8, 8)).numpy()).max() > AGREE


def test_straight_through_answers_as_the_converted_and_differentiates_as_the_original():
    original, converted = nn.Linear(5, 3), nn.Linear(5, 3)
    both = exporter.StraightThrough(original, converted)
    x = torch.randn(4, 5, requires_grad=True)
    answers = both(x)
    assert torch.allclose(answers, converted(x), atol=1e-6)
    gradient = torch.autograd.grad(answers.square().sum(), x)[0]
    expected = 2 * converted(x).detach() @ original.weight  # chain rule, the Jacobian being the original's
    assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_safetensors_open_with_clead_load_as_the_card_says(run, tmp_path, precision):
    given = tmp_path / "given"
    result = api.export_run(run, out=given, format="safetensors", precision=precision, images=20, show=False)
    x = torch.rand(9, 1, 8, 8)
    with torch.inference_mode():
        before, after = clead.load(run)(x), clead.load(given)(x)
    if precision == "float32":
        assert torch.equal(before, after)
    else:
        assert not torch.equal(before, after)
        rounded = clead.load(run)
        rounded.load_state_dict(
            {k: v.bfloat16().to(v.dtype) if v.is_floating_point() else v for k, v in rounded.state_dict().items()}
        )
        with torch.inference_mode():
            assert torch.equal(rounded(x), after)
        assert result["remeasured"]["white_box"]["n"] == 20
    done = subprocess.run(
        [sys.executable, "-c", code_of(given / "README.md")], cwd=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\['\d'\]\n", done.stdout)


@pytest.mark.slow
def test_an_exported_file_is_evaluated_as_any_models(run, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.export_run(run, out="given", show=False)
    test = load_recipe("digits-clead").data.load(0).test.subset(torch.arange(40))
    np.savez(
        "images.npz", x_test=test.images[:, 0].numpy(), y_test=test.labels.numpy(), classes=[str(k) for k in range(10)]
    )
    eps = ("--threat.eps", "0.15", "--eval.steps", "2", "--eval.check_images", "0", "--eval.curve_points", "0")
    code, text = call(
        *(
            "evaluate",
            "--model",
            "given/model.onnx",
            "--suite",
            "queries",
            "--data.path",
            "images.npz",
            "--out",
            "here",
            *eps,
        )
    )
    assert code == 0, text
    theirs = json.loads(Path("here/evaluation.json").read_text())
    mine = json.loads((run / "results" / "evaluation.json").read_text())
    assert theirs["clean"] == mine["clean"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "tflite"), "--format must be onnx or safetensors, got 'tflite'"),
        (("--precision", "int4"), "--precision int4 is not one of --format onnx"),
        (
            ("--format", "safetensors", "--precision", "int8"),
            "give one of onnx: float32, int8; safetensors: float32, bfloat16",
        ),
        (("--images", "0"), "--images must be at least 1, got 0"),
        (("--push-to-hub", "nobody"), "--push-to-hub must be USER/NAME, got 'nobody'"),
        (("--push-to-hub", "me/net"), "needs a token of the hub"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_made(run, tmp_path, call, monkeypatch, options, says):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, text = call("export", run, "--out", tmp_path / "given", *options)
    assert code == 2
    assert says in text and len(text.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path, call):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "thesis.txt").write_text("mine")
    code, text = call("export", run, "--out", tmp_path / "given")
    assert code == 2 and "is not empty" in text
    assert [path.name for path in (tmp_path / "given").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_logits_that_differ_are_refused_and_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "difference", lambda *_: 0.5)
    with pytest.raises(UserError, match="differ from PyTorch's by 0.5, at most 0.0001 is allowed"):
        api.export_run(run, out=tmp_path / "given", show=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_card_of_own_code_says_that_it_is_not_in_the_folder(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    code, text = call(
        "train", "digits-standard", "--model.name", f"{tmp_path / 'own_net.py'}:make", "--out", "run", *SHORT
    )
    assert code == 0, text
    code, text = call("export", "run", "--out", "given", "--format", "safetensors")
    assert code == 0, text
    card = Path("given/README.md").read_text()
    assert (
        "`own_net.py:make`, which is not part of this folder" in card and 'clead.allow_code("own_net.py:make")' in card
    )
    assert str(tmp_path) not in card + Path("given/config.yaml").read_text()
    shutil.copy("own_net.py", "given")
    done = subprocess.run(
        [sys.executable, "-c", code_of(Path("given/README.md"))], cwd="given", capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr


@pytest.mark.slow
def test_a_forward_that_decides_by_values_is_said_so(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("fickle.py").write_text(
        "from torch import nn\n"
        "class Fickle(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.head = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if x.mean() > 0.5:\n            x = 1 - x\n"
        "        return self.head(x.flatten(1))\n"
        "def make():\n    return Fickle()\n"
    )
    code, text = call("train", "digits-standard", "--model.name", "fickle.py:make", "--out", "run", *SHORT)
    assert code == 0, text
    code, text = call("export", "run", "--out", "given")
    assert code == 2 and len(text.strip().splitlines()[-1]) < 250
    assert "decides by the values of an image (fickle.py line 7)" in text and "--format safetensors" in text
    assert not Path("given").exists()


@pytest.mark.slow
def test_a_full_disk_names_where_it_could_not_write(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write that fails knows no file name

    monkeypatch.setattr("clead.api.exporting._record", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'given'}: No space left on device; free some space"):
        api.export_run(run, out=tmp_path / "given", show=False)
    assert not list(tmp_path.iterdir())


class Hub:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append(("create", {"name": name, **options}))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", {**options, "files": sorted(os.listdir(options["folder_path"]))}))


@pytest.mark.slow
def test_pushing_uploads_the_whole_folder_to_a_private_repository(run, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    result = api.export_run(run, out=tmp_path / "given", push_to_hub="me/net", show=False)
    assert result["hub"] == "https://hub/me/net"
    created, uploaded = hub.calls
    assert created == ("create", {"name": "me/net", "private": True, "exist_ok": True})
    assert "README.md" in uploaded[1]["files"] and "model.onnx" in uploaded[1]["files"]


@pytest.mark.slow
def test_a_hub_that_refuses_leaves_the_folder(run, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(UserError, match=r"is written, but the hub did not take it: no route to host; try again"):
        api.export_run(run, out=tmp_path / "given", push_to_hub="me/net", show=False)
    assert (tmp_path / "given" / "model.onnx").exists()
