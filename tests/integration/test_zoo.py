"""The trained models that come with the package: what they are, and that they are taken wherever a run is read."""

from __future__ import annotations

import fnmatch
import re
import sys
from pathlib import Path

import pytest
import torch

import clead
from clead import api, cli
from clead.errors import UserError
from clead.evaluation.correctness import correct_mask, to_float
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.models.split import weights
from clead.runs.directory import RunDir
from clead.runs.zoo import located, zoo_names
from clead.training.freezing import start_from
from clead.weights.files import fingerprint
from support import ROOT, same

SHORT = ["--eval.images", "20", "--eval.steps", "2", "--eval.check_images", "0", "--eval.curve_points", "0"]
MOST = 6_000_000


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command and return what it prints; the zoo must be as it was."""

    def call(*words, code="0"):
        before = sorted((path, path.stat().st_mtime_ns) for path in located("zoo:digits").parent.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["clead", *words])
        with pytest.raises(SystemExit, match=code):
            cli.main()
        assert before == sorted((path, path.stat().st_mtime_ns) for path in located("zoo:digits").parent.rglob("*"))
        printed = capsys.readouterr()
        return printed.out + printed.err

    return call


@pytest.mark.parametrize("name", zoo_names())
def test_an_entry_is_what_its_card_and_record_say(name):
    model, record = clead.load(f"zoo:{name}"), api.read_record(f"zoo:{name}")
    path = located(f"zoo:{name}")
    card = (path / "README.md").read_text()
    print_of_weights = fingerprint(weights(model))
    assert record.model.fingerprint == print_of_weights and print_of_weights in card
    assert record.suite == "standard" and [attack.name for attack in record.attacks][-1] == "Square"
    assert record.checks and all(check.passed for check in record.checks)
    assert f"| clean | {record.clean.accuracy:.1%} (" in card and f"**{record.worst.accuracy:.1%} (" in card
    assert record.data.which in card and f"`clead evaluate zoo:{name}" in card
    images = re.search(rf"`clead evaluate zoo:{name}(?: --eval.images (\d+))?`", card)[1]
    assert images is None or int(images) == record.data.n
    config = RunDir.open(Path(f"zoo:{name}")).config()
    assert getattr(config.data, "path", None) is None
    assert record.training is not None and record.training.method == config.to_dict()["method"]["name"]
    assert not re.search(r"/tmp|/work|/home|/root", "".join(each.read_text() for each in path.rglob("*.[jym][sad]*")))


def test_the_record_of_digits_is_of_these_images():
    config, record = RunDir.open(Path("zoo:digits")).config(), api.read_record("zoo:digits")
    test = config.data.load(config.train.seed).test
    right = correct_mask(clead.load("zoo:digits"), to_float(test.images), test.labels)
    assert right.sum() == round(record.clean.accuracy * record.clean.n) and len(test) == record.clean.n
    assert not (torch.tensor(record.robust) & ~right).any()


def test_it_is_small_and_in_the_wheel():
    folder = located("zoo:digits").parent
    files = [path.relative_to(folder.parent).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sum((folder.parent / file).stat().st_size for file in files) < MOST
    patterns = re.findall(r'"(zoo/[^"]*)"', (ROOT / "pyproject.toml").read_text())
    for file in files:
        matching = [each for each in patterns if each.count("/") == file.count("/") and fnmatch.fnmatch(file, each)]
        assert matching, f"{file} is not in the wheel"


def test_the_list(run):
    printed = run("list", "zoo")
    assert [line.split(": ")[0] for line in printed.splitlines()] == [f"zoo:{name}" for name in zoo_names()]
    assert "84.4% withstand linf 0.15 under AutoAttack standard" in printed
    assert "zoo:digits" in run("list").splitlines()[-1]


def test_results_go_elsewhere(run):
    printed = run("evaluate", "zoo:digits", "--suite", "quick", *SHORT)
    assert "note: zoo:digits is read-only: results go to runs/zoo-digits; --out DIR" in printed
    assert "record: runs/zoo-digits/evaluation.json" in printed and Path("runs/zoo-digits/report.html").exists()
    assert "report: report.html" in run("report", "zoo:digits", "--no-figures")
    assert api.compare(["zoo:digits", "runs/zoo-digits"])["rows"][1]["n"] == 20
    assert "runs/zoo-digits/attack-" in run("attack", "zoo:digits", *SHORT[:2], "--attack.steps", "2")
    assert "elsewhere/distances.json" in run("distances", "zoo:digits", *SHORT[:4], "--out", "elsewhere")
    assert clead.evaluate_run("zoo:digits", config=_short(), show=False).record.data.n == 20  # in Python, too
    record = clead.evaluate_run("zoo:digits", config=_short(), transfer_from=["zoo:digits"], show=False).record
    assert record.attacks[-1].name.endswith("zoo:digits")


def _short():
    return clead.load_recipe(str(located("zoo:digits") / "config.yaml"), ["--eval.suite", "quick", *SHORT])


@pytest.mark.slow
def test_it_is_exported_served_and_trained_on(run):
    assert "card: folder/README.md" in run("export", "zoo:digits", "--out", "folder")
    assert "84.4%" in Path("folder/README.md").read_text()
    served = open_models(["zoo:digits"], ServeSettings(detector=None))
    assert list(served) == ["digits"] and served["digits"].shape == (1, 8, 8)
    short = ["--data.limit_train", "60", "--train.epochs", "0.3", "--train.validate_steps", "1", "--optim.lr", "1e-12"]
    run("train", "digits-clead", *short, "--train.start_from", "zoo:digits", "--out", "mine")
    begun, expected = clead.load("mine", weights="last"), clead.load("zoo:digits")
    for name, tensor in expected.classifier.state_dict().items():
        torch.testing.assert_close(begun.classifier.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert not same(begun.state_dict(), expected.state_dict())


def test_an_unknown_name_is_one_line(run):
    assert "no model 'digit' in the zoo; did you mean 'digits'" in run("evaluate", "zoo:digit", code="2")
    with pytest.raises(UserError, match="^train.start_from: no model 'digit' in the zoo"):
        clead.train(clead.load_recipe("digits-clead", ["--train.start_from", "zoo:digit"]), out="mine", show=False)


def test_a_start_from_the_zoo_is_told_by_its_name():
    """Where the package is installed says nothing to a reader of the run's notes."""
    net = RunDir.open(Path("zoo:digits")).config().model.build(1, 3, [0.5], [0.25])  # three classes instead of ten
    notes = start_from(net, Path("zoo:digits"))
    assert any("zoo:digits" in note for note in notes) and not any(str(located("zoo:digits")) in note for note in notes)
