"""Faults, injected: whatever stops a run, what continues afterwards equals what was never stopped."""

import errno
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import clead
from clead import api, atomic_io, cli
from clead.atomic_io import locked
from clead.config import load_recipe
from clead.errors import UserError
from clead.runs.directory import RunDir
from clead.training.finite import NonFiniteLoss
from support import ROOT

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.limit_test 20 --data.batch_size 16
--attack.steps 1 --train.epochs 2 --train.validate_steps 1 --train.device cpu --train.checkpoint_seconds 0 --eval.steps 1
--eval.batch_size 10 --eval.curve_points 0 --eval.check_images 0 --eval.gallery 4""")
TIMES = ("seconds", "created", "started", "command", "run", "memory")


def config(*overrides):
    return load_recipe("digits-standard", [*TINY, *overrides])


def train(out, *overrides, **keys):
    return clead.train(config(*overrides), out=out, show=False, **keys)


def lasting(value):
    if isinstance(value, dict):
        return {key: lasting(part) for key, part in value.items() if key not in TIMES}
    if isinstance(value, list):  # a record says that its evaluation was continued, and from when
        return [lasting(part) for part in value if not str(part).startswith("continued from a state with ")]
    return value


def content(folder):
    """Everything below ``folder`` but what tells the time: file -> plain data or tensors."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors":
            found[name] = {key: tensor.tolist() for key, tensor in load_file(file).items()}
        elif file.suffix == ".json":
            found[name] = lasting(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            found[name] = [lasting(json.loads(line)) for line in file.read_text().splitlines()]
        else:
            found[name] = None if file.suffix == ".state" else file.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps, trained and evaluated without a fault."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(path)
    trained = content(path)
    api.evaluate_run(path, show=False)
    return path, trained, content(path)


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.long
def test_a_kill(tmp_path):
    """The long run is ``qa/kills.json``; test_evaluation_state.py kills evaluations, test_tuning_processes.py searches."""
    script, out = ROOT / "qa" / "kills.py", tmp_path / "kills.json"
    arguments = [sys.executable, str(script), "--what", "train", "--kills", "1", "--out", str(out), "--short"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record = json.loads(out.read_text())["train"]
    assert record["kills_while_working"] == 1 and record["differences"] == [] and record["lives"] >= 1
    assert record["compared_in_each_life"] >= 60


def test_the_committed_record_shows_no_difference():
    record = json.loads((ROOT / "qa" / "kills.json").read_text())
    for kind in ("train", "evaluate", "tune"):
        assert record[kind]["kills_while_working"] >= 50 and record[kind]["differences"] == []


# ------------------------------------------------------------------------------------------------ the disk
DISKS = [pytest.param(errno.ENOSPC, id="full"), pytest.param(errno.EROFS, id="read-only", marks=pytest.mark.long)]


class Written:
    """A file with another ``write``."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class Disk:
    """Refuses the k-th thing that is done to it, and all after that: a temporary file opened, written, synchronised, renamed, and
    a line appended."""

    def __init__(self, monkeypatch, refuse_at, number):
        self.done, self.refuse_at, self.number = 0, refuse_at, number
        named, fsync, replace, opened = atomic_io._temporary, os.fsync, os.replace, os.open
        disk = self

        def temporary(*args, **keys):
            disk.asked()
            path, file = named(*args, **keys)
            write = file.write

            def written(data):
                if disk.full(count=True):
                    write(data[: len(data) // 2])  # what fits
                    disk.refuse()
                return write(data)

            return path, Written(file, written)

        def asked_first(real):
            def call(*args, **keys):
                disk.asked()
                return real(*args, **keys)

            return call

        def open_(path, flags, *args, **keys):
            if flags & os.O_APPEND and str(path).endswith(".jsonl"):
                disk.asked()
            return opened(path, flags, *args, **keys)

        monkeypatch.setattr(atomic_io, "_temporary", temporary)
        monkeypatch.setattr(os, "fsync", asked_first(fsync))
        monkeypatch.setattr(os, "replace", asked_first(replace))
        monkeypatch.setattr(os, "open", open_)

    def full(self, *, count=False):
        self.done += count
        return self.refuse_at is not None and self.done > self.refuse_at

    def refuse(self):
        raise OSError(self.number, os.strerror(self.number))

    def asked(self):
        if self.full(count=True):
            self.refuse()


def one_line(error):
    (message,) = error.problems
    assert "\n" not in message and message.startswith("cannot write"), message
    return message


@pytest.mark.parametrize("number", DISKS)
def test_a_disk_that_refuses_at_any_moment_of_a_training(number, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(patch, None, number)
        train(tmp_path / "counted")
    moments = disk.done
    assert moments > 40
    each = (
        5 if number == errno.ENOSPC else 11
    )  # of those between the first and the last checkpoint, which are all alike
    chosen = [k for k in range(moments) if k < 12 or k > moments - 16 or k % each == 0]
    for k in chosen:
        path = tmp_path / f"at-{k}"
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            Disk(patch, k, number)
            train(path)
        assert os.strerror(number) in one_line(caught.value)
        train(path, resume=True)
        assert content(path) == whole[1], f"after the {k}-th of {moments}"


@pytest.mark.parametrize("number", DISKS)
def test_a_disk_that_refuses_at_any_moment_of_an_evaluation(number, whole, tmp_path, monkeypatch):
    trained, _, evaluated = whole
    with monkeypatch.context() as patch:
        path = shutil.copytree(trained, tmp_path / "counted")
        shutil.rmtree(path / "results")
        disk = Disk(patch, None, number)
        api.evaluate_run(path, show=False)
    moments = disk.done
    assert moments > 30
    each = 5 if number == errno.ENOSPC else 11  # of those in the middle, which are all alike
    for k in (k for k in range(moments) if k < 8 or k > moments - 10 or k % each == 0):
        path = shutil.copytree(trained, tmp_path / f"at-{k}")
        shutil.rmtree(path / "results")
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            Disk(patch, k, number)
            api.evaluate_run(path, show=False)
        assert os.strerror(number) in one_line(caught.value)
        api.evaluate_run(path, show=False)
        assert content(path) == evaluated, f"after the {k}-th of {moments}"


# ------------------------------------------------------------------------------------------------ numbers and clocks


def poison(monkeypatch, at, value=torch.nan):
    """Let the ``at``-th backward of the training leave ``value`` in one gradient."""
    real, calls = torch.Tensor.backward, []

    def backward(self, *args, **keys):
        real(self, *args, **keys)
        calls.append(1)
        if len(calls) == at:
            poison.parameter.grad.view(-1)[3] = value

    monkeypatch.setattr(torch.Tensor, "backward", backward)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_gradient_that_is_not_finite_spoils_nothing(step, value, tmp_path, monkeypatch):
    """Also in the last step, whose weights nothing would look at again."""
    expected = train(tmp_path / "whole", model=Net())
    assert expected.outcome.steps == 6
    net = Net()
    poison.parameter = net.fc.weight
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLoss) as caught:
        poison(patch, step + 2, value)  # the first measures the cost, on a copy
        train(tmp_path / "run", model=net)
    message = str(caught.value)
    assert f"the gradient became NaN or infinite at step {step} (first in module.fc.weight)" in message
    assert "\n" not in message and all(torch.isfinite(p).all() for p in net.parameters())
    train(tmp_path / "run", model=Net(), resume=True)  # as if after a fault of the hardware
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_clocks_that_jump_change_nothing(whole, tmp_path, monkeypatch):
    """The wall clock goes back a day at every reading; the run is the same, and no duration is negative."""
    now = [time.time()]

    def backwards():
        now[0] -= 86_400
        return now[0]

    real = time.strftime
    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "strftime", lambda form, *moment: real(form, *(moment or (time.gmtime(backwards()),))))
    train(tmp_path / "run")
    api.evaluate_run(tmp_path / "run", show=False)
    assert content(tmp_path / "run") == whole[2]
    seconds = [line["seconds"] for line in RunDir(tmp_path / "run").history()]
    assert min(seconds) >= 0 and seconds == sorted(seconds)
    assert json.loads((tmp_path / "run" / "results" / "evaluation.json").read_text())["seconds"] >= 0


# ------------------------------------------------------------------------------------------------ two at once, and Ctrl-C


def test_two_trainings_in_one_directory(whole, tmp_path, monkeypatch):
    """The second is refused, new or resumed, and the first does not notice; a lock goes with its process."""
    path, refused = tmp_path / "run", []
    real = RunDir.log

    def meanwhile(self, line):
        real(self, line)
        for resume in (True, False):
            with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
                patch.setattr(RunDir, "log", real)
                train(path, resume=resume)
            refused.append(str(caught.value))

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", meanwhile)
        train(path)
    assert len(refused) >= 4
    assert set(refused[::2]) == {f"{path} is in use by another training; wait for it, or give another --out"}
    assert all("holds another run" in said for said in refused[1::2])
    assert content(path) == whole[1]
    train(path, resume=True)


HOLDER = """
import sys
from pathlib import Path
from clead.atomic_io import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_goes_with_the_process_that_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="^busy$"), locked(tmp_path / "run", "busy"):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path / "run", "busy"):
        assert list((tmp_path / "run").iterdir()) == []


def test_ctrl_c_twice_stops_at_once_and_resume_continues(whole, tmp_path, monkeypatch, capsys):
    """The second comes while the first is being obeyed: in the middle of writing the checkpoint."""
    arguments = ["clead", "train", "digits-standard", *TINY, "--out", str(tmp_path / "run")]
    fsync, calls = os.fsync, []

    def interrupted(descriptor):
        calls.append(1)
        if len(calls) in (4, 5):
            os.kill(os.getpid(), signal.SIGINT)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 130 and len(calls) == 5
    error = [line for line in capsys.readouterr().err.splitlines() if "clead:" in line]
    assert error == ["clead: interrupted"]
    train(tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == whole[1]


def test_a_kill_while_the_directory_is_made(whole, tmp_path):
    """Nothing but a temporary file, or a configuration without the environment beside it."""
    for number, left in enumerate([".config.yaml.ab12", ".environment.json.x"]):
        path = tmp_path / str(number)
        path.mkdir()
        (path / left).write_text("half of")
        train(path, resume=bool(number))
        assert content(path) == whole[1]
    path = tmp_path / "without"
    RunDir.create(path, config())
    (path / "environment.json").unlink()
    train(path, resume=True)
    assert content(path) == whole[1]


# ------------------------------------------------------------------------------------------------ unreadable images


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {5: b"", 11: b"not an image", 12: png(12)[:50], 33: b"\x89PNG\r\n\x1a\n" + bytes(30)}


def folder(root):
    for number in range(40):
        file = root / ("test" if number % 4 == 0 else "train") / f"class{number % 2}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(BAD.get(number, png(number)))
    return [str(root / ("test" if n % 4 == 0 else "train") / f"class{n % 2}" / f"{n:02}.png") for n in BAD]


def parquet(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    names = []
    for part, numbers in (("train", [n for n in range(40) if n % 4]), ("test", range(0, 40, 4))):
        rows = [{"image": {"bytes": BAD.get(n, png(n)), "path": "../../x"}, "label": n // 2 % 2} for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{part}-0.parquet")
        names += [f"{root}/{part}-0.parquet row {row}" for row, n in enumerate(numbers) if n in BAD]
    return names


@pytest.mark.parametrize("made", [folder, parquet])
def test_unreadable_images_stop_unless_the_user_said_so(made, tmp_path, caplog):
    if made is folder:  # even numbers alone are test images: both classes in both parts
        BAD_NAMES = made(tmp_path / "data")
        for number in range(40, 48):
            part = tmp_path / "data" / "test" / "class1" / f"{number}.png"
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(png(number))
    else:
        BAD_NAMES = made(tmp_path / "data")
    given = ("--data.name", "auto", "--data.path", str(tmp_path / "data"), "--data.limit_train", "null")
    with pytest.raises(UserError, match="not a readable image") as caught:
        train(tmp_path / "run", *given)
    assert any(name in str(caught.value) for name in BAD_NAMES) and not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING, "clead"):
        run = train(tmp_path / "run", *given, "--data.skip_unreadable", "true")
    listed = (run.path / "unreadable.txt").read_text().splitlines()
    assert sorted(listed) == sorted(BAD_NAMES)
    assert f"{len(BAD)} of {48 if made is folder else 40} images cannot be read and are left out" in caplog.text
    record = api.evaluate_run(run.path, show=False).record
    assert any(f"{len(BAD)} unreadable images of the data set left out: " in note for note in record.notes)
    # Like a data set that never had them.
    splits = config(*given, "--data.skip_unreadable", "true").data.load(0)
    assert splits.unreadable == tuple(listed) and len(record.robust_flags) == len(splits.test)


def test_what_is_left_must_still_be_a_data_set(tmp_path):
    folder(tmp_path / "data")
    for file in (tmp_path / "data" / "train" / "class1").iterdir():
        file.write_bytes(b"broken")
    given = ("--data.name", "auto", "--data.path", str(tmp_path / "data"), "--data.skip_unreadable", "true")
    with pytest.raises(UserError, match="at least 2 classes"):
        train(tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()
