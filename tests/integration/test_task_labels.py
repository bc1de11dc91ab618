"""Binary and multi-label models from a file to a served prediction."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import clead
from clead.api.results import read_record
from clead.cli.app import app
from clead.errors import UserError
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.playground.choices import AttackSettings
from clead.playground.comparison import attack_image, open_comparison
from clead.serving import create_app
from clead.settings import Ratio

pytestmark = pytest.mark.slow

SHORT = [
    *("--train.epochs", "6", "--train.validate_every", "3", "--train.validate_images", "40", "--model.width", "8"),
    *("--attack.steps", "2", "--data.batch_size", "64", "--threat.eps", "0.1", "--train.device", "cpu"),
]
QUICK = ["--suite", "quick", "--eval.images", "40", "--eval.check_images", "0", "--eval.curve_points", "0"]


def command(arguments: list[str]) -> None:
    app(arguments, standalone_mode=False)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return digits 0 and 1, (360, 8, 8) uint8, and which are ones."""
    splits = clead.load_recipe("digits-standard").data.load(0)
    images, labels = splits.train.images[:, 0].numpy(), splits.train.labels.numpy()
    chosen = labels < 2
    return images[chosen], labels[chosen]


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """A run of one logit, trained from folders of PNG files, with its evaluation at another threshold than one half."""
    folder = tmp_path_factory.mktemp("binary")
    for k, (image, label) in enumerate(zip(*digits(), strict=True)):
        path = folder / "data" / ("train" if k % 4 else "test") / ("no", "one")[label] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    run, data = str(folder / "run"), str(folder / "data")
    command(["train", "digits-pgd-at", "--task", "binary", "--data.path", data, "--out", run, *SHORT])
    command(["evaluate", run, "--task.threshold", "0.4", *QUICK])
    return folder / "run"


def test_a_binary_run_has_one_logit_and_its_record_speaks_of_both_sides(binary, capsys):
    model, record = clead.load(binary), read_record(binary)
    assert model.classifier.out_features == 1 and model(torch.zeros(1, 1, 8, 8))[0, 0] == 0
    assert record.task == "binary" and [m.name for m in record.metrics] == ["sensitivity", "specificity", "ROC area"]
    assert record.clean_accuracy > 0.9 and record.robust_accuracy < record.clean_accuracy
    assert all(metric.robust <= metric.clean for metric in record.metrics)
    assert any("above 0.4" in note for note in record.notes)
    command(["compare", str(binary), str(binary)])
    assert "binary: sensitivity" in capsys.readouterr().out
    page = (binary / "report.html").read_text()
    assert "Figures of the task" in page and "ROC curves of run" in page
    command(["attack", str(binary), "--attack.name", "fgsm", "--eval.images", "20"])
    command(["corruptions", str(binary), "--eval.images", "10", "--severities", "3", "--names", "brightness"])
    assert "10" in capsys.readouterr().out


def test_a_binary_model_is_exported_and_served_with_its_threshold(binary, tmp_path):
    command(["export", str(binary), "--out", str(tmp_path / "onnx")])
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["task"]) == {"name": "binary", "threshold": 0.5}
    assert "task binary" in (tmp_path / "onnx" / "README.md").read_text()
    x, model = (digits()[0][:4][:, None] / 255).astype(np.float32), clead.load(binary)
    logits = session.run(["logits"], {"images": x})[0]
    torch.testing.assert_close(torch.from_numpy(logits), model(torch.from_numpy(x)).detach())
    buffer = io.BytesIO()
    np.save(buffer, digits()[0][:40][:, None])
    with TestClient(create_app([binary], ServeSettings(threads=1, detector=None))) as client:
        answer = client.post(
            "/v1/predict", content=buffer.getvalue(), headers={"content-type": "application/octet-stream"}
        ).json()
    z = model(torch.from_numpy(digits()[0][:40][:, None]).float() / 255)[:, 1].detach()
    for prediction, p in zip(answer["predictions"], z.sigmoid().tolist(), strict=True):
        assert prediction["probabilities"] == pytest.approx([1 - p, p], abs=2e-6)
        assert prediction["label"] == ("one" if p > 0.5 else "no")


def test_the_playground_attacks_a_binary_model(binary):
    comparison = open_comparison(open_models([binary], ServeSettings(threads=1, detector=None)))
    settings = AttackSettings(norm="linf", eps=Ratio("0.3"), steps=5)
    outcome = attack_image(comparison.pair, comparison.images.images[0], None, settings)[0]
    assert sum(outcome.clean.probabilities) == pytest.approx(1) and outcome.size <= 0.3001


def test_what_a_binary_run_is_not_is_said_with_the_task_that_fits(binary):
    with pytest.raises(
        UserError, match="was trained for the task binary, got --task segmentation; leave it out, or give --task binary"
    ):
        clead.evaluate_run(binary, config=clead.load_recipe(str(binary / "config.yaml"), ["--task", "segmentation"]))
    recipe = ["--task", "binary", "--data.limit_train", "100", "--train.epochs", "1"]
    with pytest.raises(UserError, match="binary needs two classes.*got 10"):
        clead.train(clead.load_recipe("digits-pgd-at", recipe), show=False)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A run on two digits beside each other, composed here, labelled by which of 0, 1 and 2 are there, some unknown."""
    folder = tmp_path_factory.mktemp("labelled")
    splits = clead.load_recipe("digits-standard").data.load(0)
    images, labels = splits.train.images[:, 0].numpy(), splits.train.labels.numpy()
    images, labels = images[labels < 3], labels[labels < 3]
    random = np.random.RandomState(0)
    rows = ["path,split,zero,one,two"]
    for k in range(240):
        pair = random.randint(0, len(images), 2)
        Image.fromarray(np.concatenate(images[pair], axis=1)).save(folder / f"{k}.png")
        cells = ["" if k % 7 == digit else str(int(digit in labels[pair])) for digit in range(3)]
        rows.append(f"{k}.png,{'train' if k % 4 else 'test'},{','.join(cells)}")
    (folder / "table.csv").write_text("\n".join(rows))
    data = ["--data.name", "multilabel", "--data.path", str(folder / "table.csv")]
    run = str(folder / "run")
    command(["train", "digits-trades", "--task", "multilabel", *data, "--out", run, *SHORT, "--train.epochs", "20"])
    command(["evaluate", run, *QUICK, "--eval.steps", "10"])
    return folder / "run"


def test_a_multi_label_run_is_trained_evaluated_and_reported_label_by_label(labelled, capsys):
    model, record = clead.load(labelled), read_record(labelled)
    assert model.classifier.out_features == 3 and record.data.classes == ["zero", "one", "two"]
    assert record.task == "multilabel" and [each.name for each in record.per_class] == ["zero", "one", "two"]
    alone, one, precision = record.metrics
    assert alone.n == sum(each.n for each in record.per_class) < 3 * 40
    assert alone.clean > 0.75 and 0.2 < alone.robust <= one.robust <= one.clean and precision.robust <= precision.clean
    assert record.worst.accuracy <= min(each.robust.accuracy for each in record.attacks)
    assert "mean average precision" in (labelled / "report.html").read_text()
    command(["compare", str(labelled), str(labelled)])
    command(
        [
            "attack",
            str(labelled),
            "--attack.name",
            "fgsm",
            "--target",
            "one",
            "--threat.eps",
            "0.5",
            "--eval.images",
            "30",
        ]
    )
    assert "multilabel: mean average precision" in capsys.readouterr().out
    hidden = read_record(labelled / "results" / "attack-fgsm-towards-one.json")
    assert hidden.attacks[0].name.endswith("hides one") and hidden.data.classes == ["no one", "one"]
    assert hidden.data.n < 30 and hidden.worst.accuracy < hidden.clean.accuracy
    for option in (
        ["--shard", "1/2"],
        ["--merge"],
        ["--save-adversarial", "x.parquet"],
        ["--transfer-from", str(labelled)],
    ):
        with pytest.raises(UserError, match="multilabel is evaluated in one piece.*leave out --shard"):
            command(["evaluate", str(labelled), *QUICK, *option])
    with pytest.raises(UserError, match="name one with --target LABEL"):
        command(["attack", str(labelled), "--save", "x.npz"])
    assert read_record(labelled) == record and any(note.startswith("no pictures") for note in record.notes)
    command(["corruptions", str(labelled), "--eval.images", "6", "--severities", "3", "--names", "brightness"])
    with pytest.raises(UserError, match="multilabel, and distances measures one class per image; use clead evaluate"):
        clead.measure(labelled, "distances", show=False)


def test_a_multi_label_model_is_exported_and_served(labelled, tmp_path):
    command(["export", str(labelled), "--out", str(tmp_path / "onnx")])
    x = np.zeros((3, 1, 8, 16), dtype=np.uint8)
    x[1:, :, :, :8] = digits()[0][:2][:, None]
    buffer = io.BytesIO()
    np.save(buffer, x)
    with TestClient(create_app([labelled], ServeSettings(threads=1))) as client:
        answer = client.post(
            "/v1/predict", content=buffer.getvalue(), headers={"content-type": "application/octet-stream"}
        ).json()
    z = clead.load(labelled)(torch.from_numpy(x).float() / 255).detach()
    for prediction, row in zip(answer["predictions"], z, strict=True):
        assert prediction["probabilities"] == pytest.approx(row.sigmoid().tolist(), abs=2e-6)
        assert prediction["label"] is None
        assert prediction["labels"] == [
            name for name, value in zip(("zero", "one", "two"), row, strict=True) if value > 0
        ]
    with pytest.raises(
        UserError, match="multilabel, and the playground shows one class per image, or masks; attack it with"
    ):
        open_comparison(open_models([labelled], ServeSettings(threads=1, detector=None)))
    with pytest.raises(UserError, match="of the task multilabel; give --precision float32"):
        clead.export_run(labelled, out=tmp_path / "int8", precision="int8")
