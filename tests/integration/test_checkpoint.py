"""The run directory: whole or not at all, checked when read, and never something that runs code."""

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import random
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save as to_safetensors

import clead
from clead import atomic_io
from clead.atomic_io import write_atomically
from clead.config import RunConfig, Train, load_recipe
from clead.data.datasets.digits import Digits
from clead.errors import UserError
from clead.runs.directory import RunDir
from clead.runs.resume import _MAGIC, Checkpoints
from clead.weights.files import check_weights, fingerprint, load_weights, save_weights
from support import refused, same

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 27 --method.name trades
--attack.steps 1 --train.epochs 1 --train.validate_steps 1 --train.device cpu""")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    clead.train(load_recipe("digits-clead", TINY), out=folder, show=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ atomic writes


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class _FullFile:
    """A temporary file on a full disk: some bytes fit, the rest does not."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, content):
        self.file.write(content[:3])
        no_space()


_real_temporary = atomic_io._temporary


def _full_file(path):
    temporary, file = _real_temporary(path)
    return temporary, _FullFile(file)


@pytest.mark.parametrize("where", ["fsync", "replace", "write", "mkdir"])
def test_a_full_disk_leaves_the_old_file(where, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    if where == "write":
        monkeypatch.setattr(atomic_io, "_temporary", _full_file)
    else:
        monkeypatch.setattr(os, where, no_space)
    target = tmp_path / "new" / "file" if where == "mkdir" else path
    refused(lambda: write_atomically(target, b"new"), target, "No space left on device", "free some space")
    assert path.read_bytes() == b"old" and names(path.parent) == ["file"]
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_file_in_the_way_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: write_atomically(tmp_path / "file" / "inside", b""), "cannot write")


def test_written_files_are_readable_by_others(tmp_path):
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------------------ weights


def example():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "b.steps": torch.tensor(7),
        "c.half": torch.randn(2, generator=generator).bfloat16(),
    }


METADATA = {"classes": ["a", "ü"], "step": 3, "nothing": None}


def test_weights_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, example(), METADATA)
    content, metadata = load_weights(path)
    assert same(content, example()) and metadata == METADATA
    assert fingerprint(content) == fingerprint(example())


def test_non_contiguous_weights_round_trip(tmp_path):
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    save_weights(tmp_path / "w", {"w": weight, "t": weight[0, :, 0].T}, {})
    content, _ = load_weights(tmp_path / "w")
    assert torch.equal(content["w"], weight) and torch.equal(content["t"], weight[0, :, 0].T)


def test_truncated_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, example(), METADATA)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 17), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(lambda: load_weights(path), path, "train it again")
    path.write_bytes(whole + b"x")
    refused(lambda: load_weights(path), path)


def test_a_flipped_bit_never_passes_unseen(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, example(), METADATA)
    whole = path.read_bytes()
    seen = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        try:
            content, metadata = load_weights(path)
        except UserError as caught:
            assert len(caught.problems) == 1
            seen += 1
        else:  # such as the name of the checksum's own key
            assert same(content, example()) and {k: metadata[k] for k in METADATA} == METADATA
    assert seen > 0.97 * len(whole)


def test_weights_without_checksum_are_read(tmp_path):
    """Files of other programs have none."""
    path = tmp_path / "w"
    path.write_bytes(to_safetensors({"a": torch.ones(2)}, {"format": "pt"}))
    assert torch.equal(load_weights(path)[0]["a"], torch.ones(2))


@pytest.mark.parametrize("kind", ["zip", "legacy", 2, 3, 4, 5])
def test_pickles_are_refused_unread(kind, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "weights.pt"
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(Bomb(), protocol=kind))
    else:
        torch.save(Bomb(), path, _use_new_zipfile_serialization=kind == "zip")
    refused(lambda: load_weights(path), path, "is a pickle, which can run code", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_missing_and_empty_weights(tmp_path):
    refused(lambda: load_weights(tmp_path / "none"), "no weights at")
    refused(lambda: load_weights(tmp_path), "must be a file, it is a folder")
    (tmp_path / "empty").write_bytes(b"")
    refused(lambda: load_weights(tmp_path / "empty"), "truncated")


def test_another_architecture_names_the_first_leaf():
    expected = {"conv.weight": torch.zeros(4, 3), "fc.weight": torch.zeros(2, 4), "fc.bias": torch.zeros(2)}
    check_weights(expected, {k: v.clone() for k, v in expected.items()}, "w")
    wider = {**expected, "conv.weight": torch.zeros(8, 3), "fc.weight": torch.zeros(2, 8)}
    refused(
        lambda: check_weights(expected, wider, "w"),
        "w is of another architecture: conv.weight should be (4, 3), found (8, 3)",
    )
    lacking = {k: v for k, v in expected.items() if k != "fc.weight"}
    refused(lambda: check_weights(expected, lacking, "w"), "fc.weight (2, 4) is missing")
    refused(lambda: check_weights(lacking, expected, "w"), "fc.weight is not in this model")


# ------------------------------------------------------------------------------------------------ a run's weights


def test_load_gives_the_trained_model(trained):
    model = clead.load(trained)
    assert not model.training and model.projection is None
    stored, metadata = load_weights(trained / "best.safetensors")
    assert same(dict(model.state_dict()), stored)
    assert metadata["classes"] == [str(k) for k in range(10)] and metadata["shape"] == [1, 8, 8]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_load_refuses_damage_with_one_line(run):
    refused(lambda: clead.load(run / "results"), "is not a run directory")
    refused(lambda: clead.load(run, weights="middle"), "no weights at")
    whole = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(lambda: clead.load(run), "best.safetensors is truncated")
    (run / "best.safetensors").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    refused(lambda: clead.load(run), "best.safetensors is damaged")
    torch.save({"a": torch.zeros(1)}, run / "best.safetensors")
    refused(lambda: clead.load(run), "is a pickle")
    (run / "best.safetensors").write_bytes(to_safetensors({"a": torch.zeros(1)}))
    refused(lambda: clead.load(run), "lacks shape, classes, mean_std")
    assert clead.load(run, weights="last")


def test_load_refuses_another_architecture(run):
    config = load_recipe("digits-clead", [*TINY, "--model.width", "5"])
    (run / "config.yaml").write_text(config.to_yaml())
    refused(
        lambda: clead.load(run),
        "another architecture: encoder.convolutions.0.weight should be (5, 1, 3, 3), found (4, 1, 3, 3)",
    )
    (run / "config.yaml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: clead.load(run), "config.yaml")
    (run / "config.yaml").write_text("")
    refused(lambda: clead.load(run), "must be a mapping")


# ------------------------------------------------------------------------------------------------ the run directory


def config():
    return RunConfig(data=Digits(), train=Train(epochs=1))


def test_create_refuses_what_is_there(tmp_path):
    run = RunDir.create(tmp_path / "run", config())
    assert run.config() == config() and RunDir.open(run.path).name == "run"
    assert json.loads((run.path / "environment.json").read_text())["torch"] == torch.__version__
    refused(lambda: RunDir.create(run.path, config()), "holds another run", "--resume")
    (tmp_path / "other").mkdir()
    RunDir.create(tmp_path / "other", config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("")
    refused(lambda: RunDir.create(tmp_path / "full", config()), "is not empty")
    assert names(tmp_path / "full") == [".hidden"]
    (tmp_path / "file").write_text("")
    refused(lambda: RunDir.create(tmp_path / "file", config()), "is not empty")
    refused(lambda: RunDir.open(tmp_path), "is not a run directory")


def test_default_paths_are_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [RunDir.create(RunDir.default_path("x"), config()).path for _ in range(3)]
    assert len(set(made)) == 3 and all(path.parts[0] == "runs" for path in made)


def test_log_survives_kill_and_full_disk(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    assert run.history() == [] and run.log_size() == 0
    run.log({"step": 1})
    size = run.log_size()
    run.log({"step": 2})
    assert run.history() == [{"step": 1}, {"step": 2}]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed in the middle of a line
    assert run.history() == [{"step": 1}, {"step": 2}]
    run.truncate_log(size)
    assert run.history() == [{"step": 1}]
    run.truncate_log(size + 100)  # never filled up with zeros
    assert run.log_size() == size
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\ngarbage\n{"a": 2}\n')
    refused(run.history, "line 2 is damaged")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # stands for a disk that refuses
    refused(lambda: run.log({"step": 1}), "cannot write", "it is a folder")


def states(run, count):
    for number in range(count):
        Checkpoints(run.path).save({"number": number, "tensor": torch.full((50,), float(number))})


def test_the_newest_state_is_loaded_and_one_older_kept(tmp_path):
    run = RunDir(tmp_path)
    assert Checkpoints(run.path).load() == (None, "") and not Checkpoints(run.path).exist()
    states(run, 3)
    state, note = Checkpoints(run.path).load()
    assert state["number"] == 2 and torch.equal(state["tensor"], torch.full((50,), 2.0)) and note == ""
    assert names(tmp_path) == ["resume.previous.state", "resume.state"]


def test_a_damaged_state_falls_back_to_the_older(tmp_path):
    run = RunDir(tmp_path)
    states(run, 2)
    path = tmp_path / "resume.state"
    whole = path.read_bytes()
    for position in [0, 5, len(_MAGIC) + 3, *random.Random(0).sample(range(len(whole) - 100), 40)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        state, note = Checkpoints(run.path).load()
        assert state["number"] == 0 and note == "resume.state damaged, continuing from resume.previous.state"
    for length in (0, 10, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert Checkpoints(run.path).load()[0]["number"] == 0
    (tmp_path / "resume.previous.state").write_bytes(b"")
    refused(Checkpoints(run.path).load, "no checkpoint of", "resume.state, resume.previous.state damaged")


def test_a_forged_state_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    run = RunDir(tmp_path)
    states(run, 2)
    buffer = io.BytesIO()
    torch.save({"number": Bomb()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(Bomb()), b"nothing"):
        content = _MAGIC + hashlib.sha256(payload).digest() + payload
        (tmp_path / "resume.state").write_bytes(content)
        assert Checkpoints(run.path).load()[0]["number"] == 0
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("how", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_between_the_renames_loses_nothing(stop, how, tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    states(run, 2)
    calls, real = [], os.replace

    def replace(source, target):
        if len(calls) == stop:
            raise how
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((UserError, KeyboardInterrupt)):
        Checkpoints(run.path).save({"number": 2})
    monkeypatch.undo()
    state, note = Checkpoints(run.path).load()
    # The new state counts once its file was complete, under whatever name.
    assert state["number"] == (1 if stop == 0 else 2) and note == ""
    Checkpoints(run.path).save({"number": 3})
    assert Checkpoints(run.path).load() == ({"number": 3}, "")
    Checkpoints(run.path).save({"number": 4})
    assert Checkpoints(run.path).load() == ({"number": 4}, "")
    assert names(tmp_path) == ["resume.previous.state", "resume.state"]


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    states(run, 2)
    monkeypatch.setattr(atomic_io, "_temporary", _full_file)
    refused(lambda: Checkpoints(run.path).save({"number": 2}), "No space left on device")
    assert Checkpoints(run.path).load()[0]["number"] == 1
    assert names(tmp_path) == ["resume.previous.state", "resume.state"]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    run = RunDir(tmp_path)
    states(run, 1)
    (tmp_path / ".resume.next.state.abc123").write_bytes(b"half a checkpoint")
    Checkpoints(run.path).load()
    assert names(tmp_path) == ["resume.state"]


# ------------------------------------------------------------------------------------------------ other types


QUICK = shlex.split(
    "--eval.suite pgd --eval.weights best --eval.images 20 --eval.steps 1 --eval.curve_points 0 --eval.check_images 0 "
    "--eval.gallery 0"
)


def stored_as(path, dtype, only=None):
    """Write the weights of a file again in another type, with a right checksum."""
    content, metadata = load_weights(path)
    chosen = [name for name, tensor in content.items() if tensor.is_floating_point() and only in (None, name)]
    save_weights(path, {k: v.to(dtype) if k in chosen else v for k, v in content.items()}, metadata)
    return chosen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_weights_of_another_type_are_said(dtype, all_of_them, run, caplog):
    path = run / "best.safetensors"
    before, name = clead.load(run).state_dict(), str(dtype).removeprefix("torch.")
    changed = stored_as(path, dtype, None if all_of_them else next(iter(before)))
    sentence = f"{path}: {len(changed)} tensors are {name}, the model computes with them as float32"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "clead"):
        after = clead.load(run).state_dict()
        record = clead.evaluate_run(run, config=load_recipe(str(run / "config.yaml"), QUICK), show=False).record
    assert caplog.text.count(sentence) == 2 and sentence in record.notes
    for key, tensor in before.items():
        wanted = tensor.to(dtype).to(tensor.dtype) if key in changed else tensor
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_whole_or_complex_numbers_for_real_ones_are_refused(dtype, run):
    stored_as(run / "best.safetensors", dtype)
    with pytest.raises(UserError, match=f"best.safetensors: .* holds {str(dtype)[6:]}, the model's is float32"):
        clead.load(run)


def test_weights_of_the_model_s_own_type_say_nothing(run, caplog):
    with caplog.at_level(logging.WARNING, "clead"):
        clead.load(run)
    assert caplog.text == ""


def test_weights_of_another_type_that_training_starts_from_are_said(run, tmp_path, capsys):
    for which in ("best", "last"):
        stored_as(run / f"{which}.safetensors", torch.float16)
    given = [*QUICK, "--train.start_from", str(run), "--train.budget", "1"]
    config = load_recipe(str(run / "config.yaml"), given)
    clead.train(config, out=tmp_path / "more", show=False)
    assert "train.start_from: " in (error := capsys.readouterr().err) and "tensors are float16" in error
