"""Models that this program did not train: a factory with weights, an ONNX file, any module; and what they get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clead import api, cli
from clead.cli.printing import print_comparison
from clead.config import evaluation_config, load_recipe
from clead.errors import UserError
from clead.models.onnx import OnnxModel
from clead.results.record import EvaluatedData

EVAL = ("--threat.eps", "0.05", "--eval.steps", "3", "--eval.curve_points", "0", "--eval.check_images", "0")
NET = """
import torch
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3], x.flatten(1)[:, 3:6]
    return Pair()

def quiet():
    class Quiet(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :3]
    return Quiet()

def nan():
    class Nan(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * torch.nan
    return Nan()
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with images of three brightness classes, a network file and weights that solve them."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = np.clip(labels[:, None, None] * 90 + rng.integers(0, 75, (60, 8, 8)), 0, 255).astype(np.uint8)
    np.savez("data.npz", x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    # Class k is 90·k + 37 bright on average: −(m − c_k)² without its common term is linear in m.
    centres = (torch.arange(3) * 90 + 37.0) / 255
    weight = (centres[:, None] * 2 / 64).repeat(1, 64) * 50
    save_file({"1.weight": weight, "1.bias": -(centres**2) * 50}, "net.safetensors")
    return tmp_path


def onnx_file(path: str, weight: np.ndarray, bias: np.ndarray, batch: Any = "N") -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def command(*arguments: str, capsys: Any) -> tuple[int, str, str]:
    import sys

    sys.argv = ["clead", *arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def run(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["clead"])
    return lambda *arguments: command(*arguments, capsys=capsys)


@pytest.mark.slow
def test_a_factory_with_weights(place, run):
    arguments = ("--model", "nets.py:net", "--weights", "net.safetensors", "--data.path", "data.npz", *EVAL)
    code, out, err = run("evaluate", *arguments, "--json", "r.json")
    assert code == 0, err
    record = json.loads(Path("r.json").read_text())
    assert record["run"] == "net" and record["model"]["weights"] == "net.safetensors" and record["data"]["n"] == 30
    assert record["clean"]["accuracy"] == 1 and record["suite"] == "standard" and record["training"] is None
    assert "withstand linf 0.05 under suite standard with 3 steps instead of its own, not AutoAttack" in out
    assert (
        Path("evaluations/nets.py-net/evaluation.json").exists()
        and Path("evaluations/nets.py-net/report.html").exists()
    )
    without = run(
        "evaluate", "--model", "nets.py:net", "--data.path", "data.npz", *EVAL, "--out", "bare", "--json", "b.json"
    )
    assert without[0] == 0
    bare = json.loads(Path("b.json").read_text())
    assert bare["model"]["fingerprint"] != record["model"]["fingerprint"]
    assert any("no --weights given" in note for note in bare["notes"]) and "no --weights given" in without[1]
    assert not any("no --weights" in note for note in record["notes"])


@pytest.mark.slow
def test_another_evaluation_does_not_replace_a_record(place, run):
    arguments = ("--model", "nets.py:net", "--weights", "net.safetensors", "--data.path", "data.npz", *EVAL)
    folder = Path("evaluations/nets.py-net")
    assert run("evaluate", *arguments)[0] == 0
    first = (folder / "evaluation.json").read_text()
    assert run("evaluate", *arguments)[0] == 0 and not (folder / "earlier").exists(), "the same again replaces itself"
    first = (folder / "evaluation.json").read_text()
    code, _, err = run("evaluate", *arguments, "--suite", "quick")
    assert code == 0 and "is kept as evaluations/nets.py-net/earlier/standard-linf-0.05-30-" in err
    (kept,) = (folder / "earlier").glob("*.json")
    assert kept.read_text() == first and kept.with_suffix(".safetensors").exists()
    assert json.loads((folder / "evaluation.json").read_text())["suite"] == "quick"
    assert run("compare", str(kept), str(folder / "evaluation.json"))[0] == 0


def test_a_mistake_of_the_user_leaves_nothing(place, run):
    for model in ("nets.py:nan", "nets.py:pair"):
        assert run("evaluate", "--model", model, "--data.path", "data.npz", *EVAL)[0] == 2
    arguments = ("--model", "nets.py:net", "--data.path", "data.npz", *EVAL, "--save-adversarial", "x.txt")
    code, _, err = run("evaluate", *arguments)
    assert code == 2 and "got x.txt; give a name that ends in .parquet" in err
    assert not list(Path().rglob("*.state"))


def test_rand_says_what_it_leaves_out(place, run):
    arguments = ("--model", "nets.py:net", "--weights", "net.safetensors", "--data.path", "data.npz", *EVAL)
    code, out, _ = run("evaluate", *arguments, "--suite", "rand", "--eval.images", "6")
    assert code == 0 and "no checks of gradient masking" in out and "the model answers the same twice" in out


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["N", 7])
def test_an_onnx_file_by_queries(place, run, batch):
    from safetensors.numpy import load_file

    weights = load_file("net.safetensors")
    onnx_file("net.onnx", weights["1.weight"], weights["1.bias"], batch)
    x = torch.rand(10, 1, 8, 8)
    torch.testing.assert_close(
        OnnxModel("net.onnx")(x), x.flatten(1) @ torch.tensor(weights["1.weight"]).T + torch.tensor(weights["1.bias"])
    )
    arguments = ("--model", "net.onnx", "--data.path", "data.npz", *EVAL)
    code, _, err = run("evaluate", *arguments)
    assert code == 2 and "gives no gradient" in err and "--eval.suite black_box" in err and err.count("error:") == 1
    code, out, err = run("evaluate", *arguments, "--suite", "black_box", "--json", "o.json")
    assert code == 0, err
    assert "under suite black_box with 3 steps" in out
    queried = json.loads(Path("o.json").read_text())
    assert [part["name"] for part in queried["attacks"]] == ["Square", "RayS"] and queried["clean"]["accuracy"] == 1
    assert queried["notes"] and queried["checks"] == []


def test_a_module_in_python(place):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    config = evaluation_config("mine", ["--data.path", "data.npz", *EVAL])
    record = api.evaluate_external(net, config, out="mine", show=False).record
    assert record.model.name == "Sequential" and Path("mine/evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "nets.py:pair"), "returns 0 (2, 3), 1 (2, 3), and several of them can be the logits"),
        (("--model", "nets.py:quiet"), "gives no gradient"),
        (("--model", "nets.py:nan"), "logits must be finite, got NaN or infinity for images [0, "),
        (("--model", "nets.py:net", "--weights", "nets.py"), "truncated or not a safetensors file"),
        (("--model", "nets.py:net", "--weights", "none.safetensors"), "no weights at none.safetensors"),
        (("--model", "nets.py:nett"), "has no 'nett'; did you mean 'net'"),
        (("--model", "net.onnx"), "no ONNX file at net.onnx"),
        (("--model", "nets.py:net", "--threat.eps", "8"), "did you mean 8/255?"),
        (("--model", "nets.py:net", "--shard", "3/2"), "--shard must be i/n"),
        (("--model", "nets.py:net", "--suite", "standart"), "--suite: unknown suite 'standart'"),
        (("--model", "nets.py:net", "--method.name", "trades"), "changes nothing here"),
        (("--model", "nets.py:net", "--eval.stepz", "3"), "did you mean 'steps'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(place, run, arguments, says):
    code, _, err = run("evaluate", *arguments, "--data.path", "data.npz")
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not list(place.glob("evaluations/*/*.json")) and not list(place.glob("evaluations/*/*.html"))


def test_other_mistakes(place, run):
    for arguments, says in [
        (("--model", "nets.py:net"), "which images? give --data.path"),
        (("--weights", "net.safetensors", "run"), "--weights goes with --model"),
        (("--model", "nets.py:net", "run", "--data.path", "data.npz"), "give runs or --model"),
        (("run", "--shard", "1/2", "--merge"), "give --shard or --merge"),
    ]:
        code, _, err = run("evaluate", *arguments)
        assert code == 2 and says in err and err.count("\n") == 1, err
    Path("bad.onnx").write_text("no")
    with pytest.raises(UserError, match="is not an ONNX model"):
        OnnxModel("bad.onnx")


@pytest.mark.slow
def test_test_images_alone_are_enough_to_evaluate_on(place, run):
    with np.load("data.npz") as file:
        x, y = file["x_test"], file["y_test"]
    seen = y < 2  # the last class is not among them, so it is named
    np.savez("test.npz", x_test=x[seen], y_test=y[seen], classes=["0", "1", "2"])
    for label in (0, 1, 2):
        Path(f"images/test/{label}").mkdir(parents=True)
        for number, image in enumerate(x[y == label][:4]):
            pixels = image.squeeze() if image.dtype == np.uint8 else (image.squeeze() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"images/test/{label}/{number}.png")
    arguments = ("--model", "nets.py:net", "--weights", "net.safetensors", *EVAL)
    for path, n in (("test.npz", int(seen.sum())), ("images", 12)):
        code, _, err = run("evaluate", *arguments, "--data.path", path, "--json", "r.json")
        assert code == 0, err
        record = json.loads(Path("r.json").read_text())
        assert record["data"]["n"] == n and record["data"]["classes"] == ["0", "1", "2"]
        code, _, err = run("train", "digits-standard", "--data.name", "auto", "--data.path", path)
        assert code == 2 and f"got 0 and {n}; add the others at --data.path" in err
    np.savez("none.npz", x_test=x[:0], y_test=y[:0])
    code, _, err = run("evaluate", *arguments, "--data.path", "none.npz")
    assert code == 2 and err.count("\n") == 1, err


# ------------------------------------------------------------------------------------------------ what a number is about


def folders(root: Path, **counts: int) -> None:
    """Write so many pictures of each of two classes into each split."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for k, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                array = (rng.integers(0, 100, (8, 8)) + 150 * k).astype(np.uint8)
                Image.fromarray(array).save(root / split / name / f"{number}.png")


def shown(capsys, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Return what the command line says of an evaluation of nets.py, and its record."""
    command = ["clead", "evaluate", "--model", "nets.py:net", "--data.path", "pictures", "--suite", "pgd", *EVAL]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("sys.argv", [*command, *arguments])
        cli.main()
    out = capsys.readouterr()
    assert caught.value.code == 0, out.err
    return out.out, json.loads(Path("evaluations/nets.py-net/evaluation.json").read_text())


@pytest.mark.parametrize(
    ("counts", "which"),
    [
        ({"train": 10, "test": 5}, "10 test images of pictures"),
        ({"train": 10, "test": 1}, "2 test images of pictures"),
        ({"train": 10}, "4 test images of pictures (set aside from its training images)"),
    ],
)
def test_output_record_and_report_say_which_images(place, capsys, counts, which):
    folders(place / "pictures", **counts)
    out, record = shown(capsys)
    assert f"about: {which}; 2 classes: dark, light; weights given of nets.py:net" in " ".join(out.split())
    data = record["data"]
    assert data["origin"] == ("test" if "test" in counts else "train")
    assert data["n"] == data["total"] == int(which.split()[0]) and data["skipped"] == []
    trained = "net may have been trained on these images" in out
    assert trained is (set(counts) == {"train"}) and trained is any(
        "may have been trained" in n for n in record["notes"]
    )
    caveat = which.partition(" (")[2].rstrip(")")
    page = Path("evaluations/nets.py-net/report.html").read_text()
    assert (caveat in page) if caveat else ("set aside" not in page and "no test split" not in page)
    assert ("These are the " in out) is bool(caveat)


@pytest.mark.parametrize(
    ("fields", "which"),
    [
        ({}, "5 test images of birds"),
        ({"total": 5}, "5 test images of birds"),
        ({"total": 6}, "first 5 of 6 test images of birds"),
        ({"origin": "val"}, "5 test images of birds (its validation split, it has no test split)"),
        ({"origin": "train", "total": 9}, "first 5 of 9 test images of birds (set aside from its training images)"),
        ({"origin": "train", "split": "val"}, "5 validation images of birds"),
    ],
)
def test_the_words_for_images(fields, which):
    fixed: dict[str, Any] = {"name": "birds", "split": "test", "n": 5, "classes": [], "fingerprint": "", "images": ""}
    assert EvaluatedData(**{**fixed, **fields}).which == which


def test_a_part_of_the_images_is_said_as_a_part(place, capsys):
    folders(place / "pictures", train=5, test=8)
    out, record = shown(capsys, "--eval.images", "7")
    assert "about: first 7 of 16 test images of pictures" in out and record["data"]["total"] == 16
    out, record = shown(capsys, "--eval.split", "val")
    assert " validation images of pictures" in out and record["data"]["total"] == record["data"]["n"]


@pytest.mark.parametrize("count", [1, 12])
def test_files_that_were_not_read_are_counted_and_named(place, capsys, count):
    folders(place / "pictures", train=5, test=8)
    names = [f"{number:02d}.png" for number in range(count)]
    for name in names:
        (place / "pictures" / "test" / "dark" / f"broken-{name}").write_bytes(b"not a picture")
    out, record = shown(capsys, "--data.skip_unreadable", "true")
    skipped = record["data"]["skipped"]
    assert len(skipped) == count and all("broken-" in line and line.endswith(": cannot be decoded") for line in skipped)
    assert (
        f"; {count} files of the data not read" in out and f"{count} unreadable images of the data set left out" in out
    )
    assert ("… and 2 more, all in the record (data.skipped)" in out) is (count == 12)
    assert out.count("broken-") == min(count, 10)


@pytest.mark.slow
def test_comparison_and_measurements_say_which_images(tmp_path, capsys):
    folders(tmp_path / "pictures", train=12)
    small = ("--data.name", "auto", "--data.path", str(tmp_path / "pictures"), "--data.batch_size", "8")
    config = load_recipe("digits-standard", [*small, "--train.budget", "2", "--train.device", "cpu"])
    api.train(config, out=tmp_path / "run", show=False)
    changed = load_recipe(str(tmp_path / "run" / "config.yaml"), [*EVAL, "--suite", "pgd"][:-2])
    record = api.evaluate_run(tmp_path / "run", config=changed, show=False).record
    measured = api.measure(tmp_path / "run", "distances", config=changed, show=False)
    assert record.data.origin == measured.data.origin == "train" and record.data.which == measured.data.which
    assert any("fixed fifth of the training images" in note for note in measured.notes)
    assert api.compare([record])["rows"][0]["images"] == record.data.which
    print_comparison(api.compare([record]))
    assert "run: 5 test images of pictures (set aside from its training images)" in capsys.readouterr().out
