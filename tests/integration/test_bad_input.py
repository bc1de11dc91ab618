"""A user's mistake: one line on stderr per problem (given, rule, remedy), exit code 2, nothing written."""

import errno
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clead
from clead import cli
from clead.api.training import _differences
from clead.errors import UserError
from support import noise_png

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.limit_test 40 --data.batch_size 16
--attack.steps 1 --train.epochs 1 --train.validate_steps 1 --eval.steps 1 --eval.curve_points 0 --eval.check_images 0
--train.device cpu""")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    clead.train(clead.load_recipe("digits-standard", TINY), out=folder, show=False)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fails(here, monkeypatch, capsys):
    """Run ``clead …``; check code, form and that no file appeared or changed; return the lines."""

    def run(*arguments, lines=1, has=()):
        before = snapshot(here)
        monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, (out, err)
        found = err.splitlines()
        assert len(found) == lines and out == "", err
        assert all(line.startswith("clead: error: ") and len(line) < 500 for line in found), err
        for fragment in [has] if isinstance(has, str) else has:
            assert fragment in err, err
        assert snapshot(here) == before
        return found

    return run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "__pycache__"}


# ------------------------------------------------------------------------------------------------ names and values


@pytest.mark.parametrize(
    "arguments, has",
    [
        ("train digits-claed", "did you mean 'digits-clead'"),
        ("train", "give one recipe"),
        ("train digits-clead digits-trades", "got digits-clead digits-trades"),
        ("train digits-clead --optm.lr 1", "optm: unknown group; did you mean 'optim'"),
        ("train digits-clead --optim.rl 1", "optim.rl: unknown key; did you mean 'lr'"),
        ("train digits-clead --lr 1", "did you mean --optim.lr?"),
        ("train digits-clead --optim.lr", "--optim.lr: a value is missing"),
        ("train digits-clead --optim.lr fast", "optim.lr: input should be a valid number"),
        ("train digits-clead --train.seed 1.5", "train.seed"),
        ("train digits-clead --threat.eps 8", "got 8; did you mean 8/255?"),
        ("train digits-clead --threat.eps 8/0", "8/0"),
        ("train digits-clead --threat.norm linff", "did you mean 'linf'"),
        ("train digits-clead --method.name trade", "did you mean 'trades'"),
        ("train digits-clead --model.name resnet19", "resnet18"),
        ("train digits-clead --data.name digit", "did you mean 'digits'"),
        ("train digits-clead --data.batch_size 1", "at least 2 images"),
        ("train digits-clead --train.epochs 1 --train.budget 1", "exactly one of epochs, budget, minutes"),
        ("train digits-clead --train.device tpu", "train.device: no device 'tpu' here"),
        ("train digits-clead --model.pool 7", "small_cnn leaves 2x2 cells of a 8x8 image"),
        ("train digits-clead --model.name nothing.py:f", "no file 'nothing.py'"),
        ("train digits-clead --data.limit_train 3", "limit_train must keep at least 2 images of each class"),
        ("train digits-clead --data.name auto --data.path nowhere", "data.path must exist, got 'nowhere'"),
        ("train digits-clead --resume", "there is no run of digits-clead in runs/"),
        ("evaluate", "which run?"),
        ("evaluate nowhere", "nowhere is not a run directory"),
        ("evaluate nowhere --shard 1/2 --merge", "give --shard or --merge, got --shard 1/2 and --merge"),
        ("evaluate nowhere --frehs", "--frehs: "),
        ("evaluate nowhere --suite", "Option '--suite' requires an argument"),
        ("evaluate nowhere --out here", "nowhere is not a run directory"),
        ("evaluate a b --save-adversarial x.parquet", "--save-adversarial keeps the images of one run, got 2 runs"),
        ("attack nowhere --objective dlrr", "did you mean 'dlr'"),
        ("compare nowhere", "no run directory or record at nowhere"),
        ("compare", "Missing argument"),
        ("report .", "not a run directory"),
        ("demo --fast", "No such option: --fast"),
        (
            "train digits-clead --method.queue 8",
            "--method.queue: left with version 0.2.0, because it gained nothing, got 8",
        ),
        ("trian digits-clead", "No such command 'trian'"),
    ],
)
def test_one_line_says_it(arguments, has, fails):
    fails(*shlex.split(arguments), has=has)


def test_every_problem_has_its_line(fails):
    fails("train", "digits-clead", "--optim.lr", "-1", "--data.batch_sise=3", "--threat.eps", "8", lines=3)
    fails("train", "digits-clead", "--lr", "1", "stray", "--optim.lr", lines=2)  # the options first


def test_recipe_files(fails, here):
    (here / "bad.yaml").write_text("data: {name: digits\ntrain: 1")
    fails("train", "bad.yaml", has="bad.yaml is not valid YAML at line 2")
    (here / "list.yaml").write_text("- a")
    fails("train", "list.yaml", has="must be a mapping")
    (here / "binary.yaml").write_bytes(b"\xff\x00\x93")
    fails("train", "binary.yaml", has="binary file")
    fails("train", ".", has="neither shipped nor a file")


# ------------------------------------------------------------------------------------------------ data


def pets(root, classes=("cat", "dog"), parts=("train", "test")):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for n in range(4):
                (root / part / name / f"{n}.png").write_bytes(noise_png(8, 8, seed=n))
    return root


def folder_arguments(path, *more):
    return ("train", "digits-clead", *TINY[:4], "--data.name", "auto", "--data.path", path, *TINY[6 + 2 :], *more)


@pytest.mark.parametrize("content", [b"", b"not an image", noise_png(8, 8)[:60]])
def test_a_broken_image_is_named(content, fails, here):
    (pets(here / "pets") / "train" / "dog" / "2.png").write_bytes(content)
    fails(*folder_arguments("pets"), has="pets/train/dog/2.png")


def test_folders_that_cannot_be_trained_on(fails, here):
    pets(here / "one", classes=("cat",))
    fails(*folder_arguments("one"), has="at least 2 classes")
    pets(here / "lacking")
    shutil.rmtree(here / "lacking" / "train" / "cat")
    fails(*folder_arguments("lacking"))
    pets(here / "extra")
    shutil.copytree(here / "extra" / "test" / "cat", here / "extra" / "test" / "owl")
    fails(*folder_arguments("extra"), has="'owl' without any training image")
    for file in (pets(here / "empty") / "train" / "cat").iterdir():
        file.unlink()
    fails(*folder_arguments("empty"), has="empty/train/cat holds no image")
    (here / "nothing").mkdir()
    fails(*folder_arguments("nothing"), has="an empty folder")
    (here / "cats" / "tom").mkdir(parents=True)
    fails(*folder_arguments("cats"), has=f"put a folder of images for each class into {Path('cats/train')}")
    (here / "runs" / "first").mkdir(parents=True)
    (here / "runs" / "first" / "config.yaml").touch()
    fails("report", "runs", has=f"give one of the runs in it, such as {Path('runs/first')}")
    shutil.rmtree(here / "runs")


def test_arrays_that_cannot_be_trained_on(fails, here):
    x, y = np.zeros((8, 6, 6), dtype=np.uint8), np.arange(8) % 2
    whole = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    for name, change, has in (
        ("labels", {"y_train": y - 1}, "labels must be in [0, 2)"),
        ("range", {"x_train": x + 2.0}, "[0, 1]"),
        ("nan", {"x_test": x * np.nan}, ""),
        ("length", {"y_train": y[:-1]}, "y_train"),
        ("pickled", {"y_train": np.array([{}] * 8)}, "pickle"),
    ):
        np.savez(here / f"{name}.npz", **{**whole, **change})
        fails(*folder_arguments(f"{name}.npz"), has=has)
    np.savez(here / "keys.npz", x_train=x)
    fails(*folder_arguments("keys.npz"), has="lacks y_train")
    (here / "cut.npz").write_bytes((here / "length.npz").read_bytes()[:100])
    fails(*folder_arguments("cut.npz"), has="not a readable .npz file")


def test_parquet_without_its_columns(fails, here):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (here / "flags").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table({"flag": [b"1"], "label": [0]}), here / "flags" / f"{part}-0.parquet")
    fails(*folder_arguments("flags"), has="got flag, label")


def test_a_missing_extra_names_its_install_command(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    fails("train", "digits-clead", has="pip install 'clead[data]'")


def test_a_users_model_that_does_not_work(fails, here):
    (here / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(5, 10)\n    def forward(self, x):\n        return self.fc(x)\n"
        "def ten():\n    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(7))\n"
        "def broken():\n    raise RuntimeError('no\\nway')\ndef none(): pass\n"
    )
    for name, has in (
        ("Net", "fails on images of shape (1, 8, 8)"),
        ("ten", "7 logits per image but the data has 10 classes"),
        ("broken", "raised RuntimeError: no"),
        ("none", "must return a torch.nn.Module"),
        ("Nett", "did you mean 'Net'"),
    ):
        fails("train", "digits-clead", *TINY[4:], "--model.name", f"net.py:{name}", has=has)


# ------------------------------------------------------------------------------------------------ runs


def test_a_directory_that_holds_another_run(fails, here, trained):
    shutil.copytree(trained, here / "run")
    fails("train", "digits-standard", *TINY, "--out", "run", has="--out run holds another run")
    stored, other = clead.load_recipe("digits-standard", TINY), clead.load_recipe("digits-clead", TINY)
    differences = len(_differences(stored.to_dict(), other.to_dict(), ""))
    lines = fails("train", "digits-clead", *TINY, "--out", "run", "--resume", lines=differences)
    assert any("method.name: the run has 'standard', got 'clead'" in line for line in lines)
    (here / "notes").mkdir()
    (here / "notes" / "mine.txt").write_text("")
    fails("train", "digits-standard", *TINY, "--out", "notes", has="is not empty")
    fails("train", "digits-standard", *TINY, "--out", "notes", "--resume", has="is not empty")
    fails("train", "digits-standard", *TINY, "--out", "notes/mine.txt", has="is not empty")
    fails("demo", "--out", "notes", has="--out notes is not empty")


def test_damaged_runs(fails, here, trained):
    run = shutil.copytree(trained, here / "run")
    weights = run / "last.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    fails("evaluate", "run", has="last.safetensors is truncated")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    fails("evaluate", "run", has="last.safetensors is damaged")
    torch.save({"a": torch.zeros(2)}, weights)
    fails("evaluate", "run", has="is a pickle")
    weights.unlink()
    fails("attack", "run", has="no weights at run/last.safetensors")
    weights.write_bytes(whole)
    (run / "outcome.json").write_text("{")
    fails("evaluate", "run", has="outcome.json is damaged")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("width: 4", "width: 6"))
    fails("evaluate", "run", has="should be (6, 1, 3, 3), found (4, 1, 3, 3)")
    (run / "config.yaml").write_text(config.replace("digits\n", "digitz\n"))
    fails("evaluate", "run", has="did you mean 'digits'")
    (run / "config.yaml").write_text(config)
    fails("compare", "run", has="has not been evaluated; run: clead evaluate run")
    (here / "record.json").write_text(json.dumps({"run": 3}))
    fails("compare", "record.json", has="record.json is not a record of clead evaluate")
    for name in ("resume.state", "resume.previous.state"):
        (run / name).write_bytes(b"garbage")
    fails("train", "digits-standard", *TINY, "--out", "run", "--resume", has="no checkpoint of run is whole")


def test_settings_that_would_change_nothing_are_refused(fails, here, trained):
    shutil.copytree(trained, here / "run")
    fails("evaluate", "run", "--method.name", "trades", has="changes nothing here")
    fails("evaluate", "run", "--train.seed", "3", "--optim.lr", "1", lines=2)
    fails("evaluate", "run", "--attack.steps", "100", has="choose a suite with --suite, or use clead attack")
    fails("attack", "run", "--eval.steps", "100", has="use --attack.steps")
    fails("attack", "run", "run", "--save", "x.npz", has="one by one")
    fails("evaluate", "run", "--threat.eps", "16", has="did you mean 16/255?")


def test_suites_and_their_settings(fails, here, trained):
    shutil.copytree(trained, here / "run")
    for arguments, has in (
        ("--suite standart", "--suite: unknown suite 'standart'; did you mean 'standard'"),
        ("--suite quick --threat.norm l0 --threat.eps 3", "suite quick is defined for linf, l2 and l1, got l0"),
        ("--eval.steps 0", "eval.steps: input should be greater than or equal to 1, got 0"),
        ("--eval.steps 1.5", "eval.steps"),
        ("--eval.batch_size 0", "eval.batch_size"),
        ("--eval.check_images -1", "eval.check_images"),
        ("--eval.precision half", "eval.precision"),
        ("--eval.images 0", "eval.images"),
        ("--eval.restarts 3", "eval.restarts: unknown key"),
        ("--eval.objectives [dlr]", "eval.objectives: unknown key"),
        ("--shard 3/2", "--shard must be i/n with 1 ≤ i ≤ n, got '3/2'; give such as --shard 2/4"),
        ("--shard 0/2", "--shard must be i/n"),
        ("--transfer-from nowhere", "nowhere is not a run directory"),
    ):
        fails("evaluate", "run", *shlex.split(arguments), has=has)


def test_images_of_a_model_with_other_classes_are_not_tried(fails, here, trained):
    shutil.copytree(trained, here / "run")
    pets(here / "pets")
    other = ["--data.name", "auto", "--data.path", str(here / "pets"), "--data.limit_train", "null"]
    clead.train(clead.load_recipe("digits-standard", [*TINY, *other]), out=here / "two", show=False)
    fails("evaluate", "run", "--transfer-from", "two", has="--transfer-from two has 2 classes, the data has 10")


def test_attacks_of_other_libraries(fails, here, trained):
    pytest.importorskip("foolbox")
    shutil.copytree(trained, here / "run")
    for arguments, has in (
        ("torchatacks:PGD", "is named torchattacks:NAME or foolbox:NAME, got 'torchatacks:PGD'"),
        ("foolbox:LinfPDG", "unknown attack of foolbox 'LinfPDG'; did you mean "),
        ("foolbox:LinfPGD --attack.stepz 3", "foolbox:LinfPGD: unknown setting 'stepz'; did you mean 'steps'"),
        ("torchattacks:PGD --attack.eps 0.1", "eps follows from the threat, the images and the seed; leave it out"),
        ("fgsn", "did you mean 'fgsm'"),
    ):
        fails("attack", "run", "--attack.name", *shlex.split(arguments), has=has)


def test_files_of_adversarial_images(fails, here, trained):
    shutil.copytree(trained, here / "run")
    fails(
        "attack",
        "run",
        "--verify",
        "x.parquet",
        has="no file of adversarial images at x.parquet; run: clead evaluate RUN",
    )
    (here / "x.parquet").write_bytes(b"PAR1 but no more")
    fails("attack", "run", "--verify", "x.parquet", has="x.parquet is not a file of clead evaluate --save-adversarial")
    fails("attack", "run", "--verify", "x.parquet", "--attack.steps", "3", has="nothing is attacked; leave it out")
    fails("attack", "--verify", "x.parquet", has="which run?")


@pytest.mark.parametrize("option", ["--save x.npz", "--objective margin", "--threat.eps 0.3", "--eval.suite quick"])
def test_what_means_nothing_to_a_score_is_refused(option, fails, here, trained):
    """The images are made already, and the file says for which threat."""
    shutil.copytree(trained, here / "run")
    (here / "x.parquet").write_bytes(b"PAR1 but no more")
    fails("attack", "run", "--verify", "x.parquet", *shlex.split(option), has=f"{option.split()[0]}: ")


@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        ("evaluate run --merge", "--merge: there is no shard at run/results"),
        ("attack run --attack.name foolbox:L2PGD", "foolbox:L2PGD is an attack for l2, got linf"),
        ("attack run --attack.name deepfool --threat.norm l1 --threat.eps 2", "DeepFool is an attack for "),
    ],
)
def test_no_state_is_left_of_what_could_not_begin(arguments, has, fails, here, trained):
    """The state of a mistake would stand in the way of the evaluation put right."""
    if "foolbox" in arguments:
        pytest.importorskip("foolbox")
    shutil.copytree(trained, here / "run")
    fails(*shlex.split(arguments), has=has)


def test_a_suite_given_twice(fails, here, trained):
    shutil.copytree(trained, here / "run")
    fails("evaluate", "run", "--suite", "quick", "--eval.suite", "pgd", has="--eval.suite")


@pytest.mark.parametrize("name", ["apgd", "fmn", "foolbox:LinfPGD"])
def test_an_objective_means_nothing_to_a_search(name, fails, here, trained):
    if ":" in name:
        pytest.importorskip("foolbox")
    shutil.copytree(trained, here / "run")
    fails("attack", "run", "--attack.name", name, "--attack.steps", 1, "--objective", "margin", has="--objective: ")


def test_records_of_another_version(fails, here, trained):
    run = shutil.copytree(trained, here / "run")
    clead.evaluate_run(run, show=False)
    record = json.loads((run / "results" / "evaluation.json").read_text())
    for change, key in (
        ({"schema_version": 1}, "schema_version"),
        ({"robust_flags": None}, "robust_flags"),
        ({"worst": {**record["worst"], "accuracy": "most"}}, "worst.accuracy"),
    ):
        (here / "old.json").write_text(json.dumps({**record, **change}))
        fails("compare", "old.json", has=f"old.json is not a record of clead evaluate: {key}: ")
        fails("report", "old.json", has=key)


def test_other_data_than_the_run_was_trained_on(fails, here, trained):
    shutil.copytree(trained, here / "run")
    pets(here / "pets")
    other = ("--data.name", "auto", "--data.path", "pets")
    fails("evaluate", "run", *other, "--data.limit_train", "null", has="was trained on classes 0, 1")
    pets(here / "ten", classes=tuple("0123456789"))
    wrong_size = ("--data.name", "auto", "--data.path", "ten", "--data.image_size", "9")
    fails("evaluate", "run", *wrong_size, "--data.limit_train", "null", has="was trained on images of shape (1, 8, 8)")


def test_a_full_disk(here, trained, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = shutil.copytree(trained, here / "run")
    before = snapshot(run)
    for arguments in (["train", "digits-standard", *TINY, "--out", "new"], ["evaluate", "run"], ["attack", "run"]):
        monkeypatch.setattr(sys, "argv", ["clead", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert stopped.value.code == 2 and len(lines) == 1
        assert lines[0].startswith("clead: error: cannot write ") and "No space left on device" in lines[0]
    assert [path for path in here.rglob("*") if path.is_file()] == [path for path in run.rglob("*") if path.is_file()]
    assert {p: t for p, t in snapshot(run).items() if p in before} == before


# ------------------------------------------------------------------------------------------------ Python


NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: clead.attacks.pgd(NET, x, y, eps=0.1, steps=1),
        lambda x, y: clead.attacks.fgsm(NET, x, y, eps=0.1),
        lambda x, y: clead.evaluate(NET, x, y, eps=0.1, steps=1, curve_points=0),
    ],
)
def test_images_and_labels_given_in_python(call):
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    call(x, y)
    nan = x.clone()
    nan[1, 0, 2, 2] = torch.nan
    for bad, labels, said in (
        (x * 255, y, "divide by 255"),
        (x - 0.5, y, "pixels must be in"),
        (nan, y, "NaN"),
        (x, y + 1, r"labels must be in \[0, 3\), got 3"),
        (x, y - 1, r"labels must be in \[0, [3K]\), got -1"),
        (x, y[:3], "label"),
        (x[:0], y[:0], "batch of 0"),
        (x[0], y, "B, C, H, W"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            call(bad, labels)
        assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="did you mean 8/255"):
        clead.attacks.pgd(NET, x, y, eps=8)


def test_errors_are_value_errors_with_their_problems():
    with pytest.raises(ValueError) as caught:
        clead.load_recipe("digits-clead", ["--optim.lr", "-1", "--train.ema", "2"])
    assert len(caught.value.problems) == 2 and isinstance(caught.value, clead.UserError)
    assert Path(clead.__file__).name == "__init__.py"
