"""The training loop: exact resume, honest stops, and every option doing what it says."""

import copy
import errno
import json
import logging
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import clead
from clead.cli import main
from clead.config import Optim, RunConfig, Train, load_recipe, parse_yaml
from clead.config.yaml_io import dump_yaml
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.methods.clead import CLead
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.training import overfitting, trainer
from clead.training.finite import NonFiniteLoss
from clead.training.optim import make_optimizer, make_schedule
from clead.training.signals import Interrupted
from clead.weights.files import load_weights
from support import Killed, same, saved_weights

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 16 --attack.steps 1
--train.validate_every 1 --train.validate_steps 1 --train.device cpu --optim.name adamw --optim.lr 0.002
--optim.clip_norm null""")

NET = """
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
                         nn.Flatten(), nn.Linear(216, num_classes))
"""
FULL = shlex.split("""--method.name clead --data.augment.crop 1 --data.view.crop 2 --train.ema 0.9 --train.validate_every 2
--train.checkpoint_seconds 0""")


def tiny(*overrides, recipe="digits-standard"):
    length = [] if "--train.budget" in overrides else ["--train.epochs", "2"]
    return load_recipe(recipe, [*TINY, *length, *overrides])


def fit(out, *overrides, recipe="digits-standard", **keys):
    return clead.train(tiny(*overrides, recipe=recipe), out=out, show=False, **keys)


def log(path, *, seconds=False):
    return [{k: v for k, v in line.items() if seconds or k != "seconds"} for line in RunDir(path).history()]


def assert_same_run(a, b):
    assert same(saved_weights(a), saved_weights(b)) and same(saved_weights(a, "best"), saved_weights(b, "best"))
    assert log(a) == log(b)
    outcomes = [json.loads((path / "outcome.json").read_text()) for path in (a, b)]
    for outcome in outcomes:
        del outcome["seconds"]
    assert outcomes[0] == outcomes[1]


def kill_after_saves(monkeypatch, count):
    real, calls = Checkpoints.save, []

    def save_state(self, state):
        real(self, state)
        calls.append(1)
        if len(calls) == count:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_state)


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.slow
def test_resume_equals_uninterrupted_run(tmp_path):
    """A real process, killed by SIGKILL while it trains a user's model with dropout, EMA, both views and AdamW."""
    (tmp_path / "net.py").write_text(NET)
    small = [
        part for part in TINY if part not in ("--model.width", "4", "--model.features", "8")
    ]  # the user's has no such keys
    overrides = [*small, *FULL, "--train.epochs", "20", "--model.name", f"{tmp_path}/net.py:make"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "clead", "train", "digits-standard", *overrides, "--out", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and '"step": 20' not in _text(killed / "metrics.jsonl"):
        time.sleep(0.002)
    time.sleep(random.random() * 0.1)
    process.kill()
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGKILL
    assert Checkpoints(killed).exist() and not (killed / "outcome.json").exists()

    config = load_recipe("digits-standard", overrides)
    clead.allow_code(f"{tmp_path}/net.py:make")
    clead.train(config, out=whole, show=False)
    resumed = clead.train(config, out=killed, resume=True, show=False)
    assert_same_run(killed, whole)
    steps = [line["step"] for line in log(killed) if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == resumed.outcome.steps == 60
    seconds = [line["seconds"] for line in log(killed, seconds=True)]
    assert seconds == sorted(seconds)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


def _text(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "--optim.name sgd --optim.schedule cosine --optim.lr 0.05 --train.ema 0.5",
        "--train.swa_start 0.3 --train.awp 0.02",
        "--optim.name sgd --optim.schedule step --optim.momentum 0 --optim.clip_norm 0.5 --method.name trades",
        "--optim.name adamw --optim.schedule constant --train.precision bfloat16 --train.patience 2",
        "--optim.name adamw --optim.schedule one_cycle --train.precision float16 --method.name pgd_at",
        "--method.name clead --method.contrastive_level features --train.awp 0.01 --train.precision bfloat16",
        "--method.name clead --method.contrastive_loss published --method.inner supcon",
        "--method.name pgd_at --train.unfreeze 0.6 --train.eps_ramp [0,0.7] --train.batch_norm_images 32 --train.ema 0.5 "
        "--optim.encoder_lr 0.5 --optim.first_layer_lr 0.5",
    ],
)
def test_resume_in_the_middle_of_a_schedule(overrides, tmp_path, monkeypatch):
    overrides = [
        *shlex.split(overrides),
        "--train.checkpoint_seconds",
        "0",
        "--train.validate_every",
        "1",
        "--train.epochs",
        "4",
    ]
    fit(tmp_path / "whole", *overrides)
    for count in (2, 3):  # twice: after steps 2 and 5 of 12, with warm-up until 2
        with monkeypatch.context() as patch:
            kill_after_saves(patch, count)
            with pytest.raises(Killed):
                fit(tmp_path / "killed", *overrides, resume=True)
    fit(tmp_path / "killed", *overrides, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_kill_before_the_first_checkpoint_starts_again(tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after_saves(patch, 1)
        patch.setattr(Checkpoints, "save", lambda self, state: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(tmp_path / "killed")
    assert log(tmp_path / "killed")  # lines of steps that no checkpoint holds
    fit(tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_damaged_checkpoint_is_said_and_the_older_one_used(tmp_path, monkeypatch, caplog):
    overrides = ("--train.checkpoint_seconds", "0", "--train.epochs", "4")
    fit(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        kill_after_saves(patch, 6)  # the validation after step 6 is logged; the older checkpoint is of step 5
        with pytest.raises(Killed):
            fit(tmp_path / "killed", *overrides)
    state = tmp_path / "killed" / "resume.state"
    state.write_bytes(state.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "clead"):
        fit(tmp_path / "killed", *overrides, resume=True)
    assert "resume.state damaged, continuing from resume.previous.state" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("whose", ["another key", "an earlier version", "forged", "own"])
def test_a_checkpoint_of_somebody_else_is_continued_but_not_in_silence(tmp_path, monkeypatch, caplog, whose):
    overrides = ("--train.checkpoint_seconds", "0")
    with monkeypatch.context() as patch:
        kill_after_saves(patch, 4)
        with pytest.raises(Killed):
            fit(tmp_path / "run", *overrides)
    state = tmp_path / "run" / "resume.state"
    if whose == "another key":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    elif whose == "an earlier version":
        state.write_bytes(state.read_bytes().partition(b"\nclead-signature-1 ")[0])
    elif whose == "forged":
        state.write_bytes(state.read_bytes()[:-64] + b"0" * 64)
    with caplog.at_level(logging.WARNING, "clead"):
        fit(tmp_path / "run", *overrides, resume=True)
    assert ("was not written by you on this machine" in caplog.text) is (whose != "own")


def test_ctrl_c_saves_and_resume_continues(tmp_path, monkeypatch, capsys):
    arguments = [
        "clead",
        "train",
        "digits-standard",
        *TINY,
        *FULL,
        "--train.epochs",
        "5",
        "--out",
        str(tmp_path / "run"),
    ]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    real = CLead.loss

    def interrupted(self, model, views, step):
        interrupted.calls += 1
        if interrupted.calls == 5:  # the first counts the cost of a step
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, model, views, step)

    interrupted.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(CLead, "loss", interrupted)
        patch.setattr(trainer, "LOG_STEPS", 1)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 130
        assert (
            capsys.readouterr().err == f"clead: stopped at step 4 of 15; continue with --resume --out {tmp_path}/run\n"
        )
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        patch.setattr(sys, "argv", [*arguments, "--resume"])
        with pytest.raises(SystemExit) as finished:
            main()
        assert finished.value.code == 0
        fit(tmp_path / "whole", *FULL, "--train.epochs", "5")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_interrupted_is_a_keyboard_interrupt_in_python(tmp_path, monkeypatch):
    monkeypatch.setattr(RunDir, "log", lambda self, line: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="continue with --resume") as caught:
        fit(tmp_path / "run")
    assert isinstance(caught.value, Interrupted) and (tmp_path / "run" / "resume.state").exists()


def test_resume_of_a_finished_run_trains_nothing(tmp_path, monkeypatch):
    run = fit(tmp_path / "run", "--train.ema", "0.5")
    before = saved_weights(run.path), saved_weights(run.path, "best"), (run.path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # would raise
    again = fit(tmp_path / "run", "--train.ema", "0.5", resume=True)
    assert same(saved_weights(run.path), before[0]) and same(saved_weights(run.path, "best"), before[1])
    assert (run.path / "metrics.jsonl").read_bytes() == before[2] and again.outcome == run.outcome
    assert same(dict(again.model.state_dict()), dict(run.model.state_dict()))


def test_resume_with_another_configuration_lists_the_differences(tmp_path):
    fit(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        fit(tmp_path / "run", "--optim.lr", "1", "--data.augment.crop", "1", "--threat.norm", "l2", resume=True)
    said = "\n".join(caught.value.problems)
    assert all(
        key in said
        for key in ("optim.lr: the run has 0.002, got 1.0", "data.augment.crop", "threat.norm", "threat.eps")
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_resume_on_other_images_is_refused(tmp_path):
    splits = tiny().data.load(0)
    fit(tmp_path / "run", data=splits)
    from dataclasses import replace

    with pytest.raises(UserError, match="the data of .* has changed"):
        fit(tmp_path / "run", data=replace(splits, fingerprint="other"), resume=True)


def test_resume_without_a_run_starts_one(tmp_path):
    assert fit(tmp_path / "run", resume=True).outcome.steps == 6


def test_a_directory_in_use_is_refused_untouched(tmp_path):
    fit(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="holds another run"):
        fit(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


# ------------------------------------------------------------------------------------------------ what goes wrong


class Diverging(nn.Module):
    """Returns NaN from its ``limit``-th training forward on."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.count = limit, 0
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        self.count += self.training
        return self.fc(x.flatten(1) * (math.nan if self.count > self.limit else 1.0))


def test_a_non_finite_loss_names_step_term_and_checkpoint(tmp_path):
    # The first training forward measures the cost, on a copy.
    with pytest.raises(NonFiniteLoss) as caught:
        fit(tmp_path / "run", "--train.checkpoint_seconds", "0", model=Diverging(4))
    message = str(caught.value)
    assert "\n" not in message
    assert "loss became nan at step 4 (in clean_cross_entropy)" in message
    assert f"the last good checkpoint is {tmp_path}/run/resume.state" in message
    assert Checkpoints(tmp_path / "run").load()[0]["position"]["step"] == 4
    with pytest.raises(NonFiniteLoss, match="no checkpoint had been written yet"):
        fit(tmp_path / "second", model=Diverging(0))


def test_a_diverging_run_never_keeps_broken_weights(tmp_path, monkeypatch, capsys):
    arguments = [
        "clead",
        "train",
        "digits-standard",
        *TINY,
        "--optim.name",
        "sgd",
        "--optim.lr",
        "1e30",
        "--train.epochs",
        "9",
    ]
    arguments += ["--train.checkpoint_seconds", "0", "--out", str(tmp_path / "run"), "--model.normalize", "none"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("clead: error: ") and error.count("\n") == 1
    assert "NaN" in error or "nan" in error or "inf" in error
    assert "lower optim.lr" in error
    if (tmp_path / "run" / "resume.state").exists():
        state, _ = Checkpoints(tmp_path / "run").load()
        assert all(torch.isfinite(value).all() for name, value in state["model"].items() if "running" not in name)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    overrides = ("--train.checkpoint_seconds", "0", "--train.epochs", "4")
    fit(tmp_path / "whole", *overrides)
    from clead.runs import resume as checkpoint

    real = checkpoint.write_atomically

    def full(path, content):
        if path.name == "resume.next.state":
            full.calls += 1
            if full.calls == 5:
                monkeypatch.setattr(os, "fsync", no_space)
        real(path, content)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    full.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        with pytest.raises(UserError) as caught:
            fit(tmp_path / "run", *overrides)
        (message,) = caught.value.problems
        assert "No space left on device" in message and "stopped at step 5" in message
        assert "the checkpoint before is kept, --resume continues from it" in message
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run").load()[0]["position"]["step"] == 4
    assert not list((tmp_path / "run").glob(".*"))
    fit(tmp_path / "run", *overrides, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def planned(monkeypatch, values):
    """Let the validations of a run say what is planned, (clean, robust) each."""
    left = iter(values)
    names = ("clean_accuracy", "robust_accuracy")
    monkeypatch.setattr(
        trainer, "accuracy_under_attack", lambda *args, **keys: dict(zip(names, next(left), strict=True))
    )


def test_catastrophic_overfitting_is_detected_and_said(tmp_path, monkeypatch, caplog):
    real = CLead.loss

    def soaring(self, *args, **keys):
        output = real(self, *args, **keys)
        output.metrics["robust_accuracy"] = torch.tensor(0.99)
        return output

    monkeypatch.setattr(CLead, "loss", soaring)
    monkeypatch.setattr(trainer, "LOG_STEPS", 1)
    planned(monkeypatch, [(0.9, 0.5), (0.9, 0.55), (0.9, 0.02), (0.9, 0.0)])
    with caplog.at_level(logging.WARNING, "clead"):
        run = fit(tmp_path / "run", "--method.name", "pgd_at", "--train.epochs", "4")
    assert run.outcome.collapsed_at == 9 and run.outcome.best_step == 6
    (line,) = [line for line in log(run.path) if line["kind"] == "warning"]
    assert "the training is unstable" in line["message"]  # the figure on training batches is made up
    assert (
        line["step"] == 9
        and "robust accuracy has collapsed at step 9" in line["message"]
        and "99.0%" in line["message"]
    )
    assert "best 55.0% at step 6" in line["message"] and caplog.text.count("has collapsed") == 1
    assert load_weights(run.path / "best.safetensors")[1]["step"] == 6


@pytest.mark.parametrize(
    "training, validation, best, said",
    [
        (0.9, 0.0, 0.5, True),
        (0.9, 0.45, 0.5, False),  # the usual gap of overfitting
        (0.3, 0.0, 0.5, False),  # everything is bad: no overfitting
        (0.9, 0.0, 0.05, True),  # never was robust under validation
        (0.45, 0.01, 0.01, True),
        (0.9, 0.4, 0.05, False),
        (math.nan, 0.0, 0.5, False),  # a method without attack
    ],
)
def test_what_counts_as_collapse(training, validation, best, said):
    assert overfitting.collapsed(training, validation, best) is said


@pytest.mark.parametrize(
    ("training", "n", "validation", "m", "apart"),
    [
        (0.45, 1280, 0.01, 512, True),
        (0.55, 1280, 0.35, 512, True),
        (0.55, 1280, 0.45, 512, False),  # by less than 15 points
        (0.80, 16, 0.50, 16, False),  # by chance
        (1.00, 4, 0.00, 4, False),
        (1.00, 64, 0.00, 64, True),
        (0.10, 1280, 0.60, 512, False),  # validation is better
        (math.nan, 0, 0.0, 512, False),
        (0.9, 0, 0.0, 512, False),
    ],
)
def test_when_training_and_validation_part(training, n, validation, m, apart):
    assert overfitting.parted(training, n, validation, m) is apart


class Lagging(nn.Module):
    """Right in train mode, where the batch is centred; its running mean is far off in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2)
        self.norm.running_mean.fill_(5.0)
        self.fc.weight.data, self.fc.bias.data = torch.tensor([[-9.0], [9.0]]), torch.zeros(2)

    def forward(self, x):
        return self.fc(self.norm(x.flatten(1).mean(1, keepdim=True)))


class Bright(nn.Module):
    """Right by the mean brightness: an image is robust up to its distance of 0.3 from the boundary."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x):
        m = self.sign * 20 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-m, m], 1)


CAUSES = {
    "modes": (Lagging, None, "--threat.eps 0.05"),
    "average": (Bright, lambda: Bright(-1.0), "--threat.eps 0.05"),
    "weak attack": (Bright, None, "--threat.eps 0.4 --attack.name fgsm --attack.step_size 0.01"),
    "overfitting": (Bright, None, "--threat.eps 0.05"),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_the_cause_is_measured_and_all_is_left_as_it_was(kind):
    make, other, overrides = CAUSES[kind]
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.arange(100) % 2
    images = (255 * (0.2 + 0.6 * labels)).to(torch.uint8)[:, None, None, None].expand(100, 1, 4, 4).contiguous()
    config = load_recipe("digits-pgd-at", [*overrides.split(), "--data.batch_size", "20"])
    state, validation = torch.get_rng_state(), 0.3 if kind == "overfitting" else 0.0
    found = overfitting.cause_of(
        model,
        model if other is None else other(),
        ImageSet(images, labels),
        config,
        torch.device("cpu"),
        1.0,
        validation,
    )
    assert found.kind == kind and (("--" in found.text) or kind == "modes"), found
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.requires_grad for p in model.parameters())
    one_step = "one-step overfitting" in found.text
    assert one_step is (kind == "weak attack")


STALE = """
from torch import nn

def make(num_classes):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=1e-6), nn.ReLU(), nn.Flatten(),
                        nn.Linear(288, num_classes))
    net[1].running_mean.fill_(-20.0)  # of the images that it was trained on before
    return net
"""


def test_a_model_whose_statistics_lag_is_told_so_from_the_first_validation_on_and_once(tmp_path, caplog):
    (tmp_path / "net.py").write_text(STALE)
    clead.allow_code(f"{tmp_path}/net.py:make")
    given = f"""--model.name {tmp_path}/net.py:make --threat.eps 0.02 --data.batch_size 128 --train.epochs 4 --train.device cpu
    --train.validate_every 1 --train.validate_images 200 --attack.steps 2 --optim.lr 0.05"""
    config = load_recipe("digits-pgd-at", given.split())
    with caplog.at_level(logging.WARNING, "clead"):
        run = clead.train(config, out=tmp_path / "run", show=False)
    lines = [line for line in log(run.path) if line["kind"] == "warning"]
    assert lines and "attack and forward are in different modes" in lines[0]["message"]
    assert lines[0]["step"] <= 20 and len(lines) <= 2  # at once, and when it counts as collapsed
    assert caplog.text.count("different modes") == len(lines)


@pytest.mark.slow
def test_a_healthy_training_gives_no_warning(tmp_path, caplog):
    given = "--train.epochs 3 --train.validate_every 1 --attack.steps 3 --train.device cpu --train.validate_images 200"
    run = clead.train(load_recipe("digits-pgd-at", given.split()), out=tmp_path / "run", show=False)
    assert not [line for line in log(run.path) if line["kind"] == "warning"] and "parts at step" not in caplog.text


def test_patience_stops_and_stays_stopped(tmp_path, monkeypatch):
    overrides = ("--method.name", "pgd_at", "--train.epochs", "9", "--train.patience", "2")
    planned(monkeypatch, [(0.9, 0.1), (0.9, 0.3), (0.9, 0.2), (0.9, 0.29)])
    run = fit(tmp_path / "run", *overrides)
    assert run.outcome.stopped_early and run.outcome.steps == 12 and run.outcome.best_step == 6
    assert run.outcome.best_validation == 0.3
    again = fit(tmp_path / "run", *overrides, resume=True)  # no validation is planned: none may happen
    assert again.outcome == run.outcome


def test_patience_counts_equal_validations_as_no_better(tmp_path, monkeypatch):
    planned(monkeypatch, [(0.9, 0.0)] * 3)
    run = fit(tmp_path / "run", "--method.name", "pgd_at", "--train.epochs", "9", "--train.patience", "2")
    assert run.outcome.stopped_early and run.outcome.steps == 9


def test_best_and_last_are_kept_apart(tmp_path, monkeypatch):
    planned(monkeypatch, [(0.1, 0.2), (0.2, 0.4), (0.9, 0.3)])
    run = fit(tmp_path / "robust", "--method.name", "trades", "--train.epochs", "3")
    assert load_weights(run.path / "best.safetensors")[1]["step"] == 6
    assert load_weights(run.path / "last.safetensors")[1]["step"] == 9
    assert not same(saved_weights(run.path), saved_weights(run.path, "best"))
    assert same(dict(run.model.state_dict()), saved_weights(run.path, "best"))
    # Standard training makes no attack and is selected by clean accuracy.
    planned(monkeypatch, [(0.1, 0.2), (0.2, 0.4), (0.9, 0.3)])
    run = fit(tmp_path / "standard", "--train.epochs", "3")
    assert run.outcome.best_step == 9 and run.outcome.best_validation == 0.9


# ------------------------------------------------------------------------------------------------ what options do


@pytest.mark.parametrize("steps, warmup", [(1, 0.2), (4, 0.2), (20, 0.0), (20, 0.2), (37, 0.5)])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "step", "constant"])
def test_schedules_follow_their_closed_form(schedule, steps, warmup):
    settings = Optim(lr=0.4, schedule=schedule, warmup=warmup, milestones=(0.6, 0.8), decay=0.1)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([parameter], settings)
    scheduler = make_schedule(optimizer, settings, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    rising = round(warmup * steps)

    def expected(t):
        if schedule == "one_cycle":
            peak, first, final = warmup * (steps + 1) - 1, 0.4 / 25, 0.4 / 25e4
            if t <= peak and peak > 0:
                return first + (0.4 - first) * (1 - math.cos(math.pi * t / peak)) / 2
            peak = max(peak, -1)
            return final + (0.4 - final) * (1 + math.cos(math.pi * (t - peak) / (steps - peak))) / 2
        if t < rising:
            return 0.4 * (1 + t) / (rising + 1)
        if schedule == "cosine":
            return 0.4 * (1 + math.cos(math.pi * (t - rising) / (steps - rising))) / 2
        return 0.4 * 0.1 ** sum(t >= max(round(m * steps), rising + 1) for m in (0.6, 0.8) if schedule == "step")

    assert rates == pytest.approx([expected(t) for t in range(steps)], rel=1e-3)
    assert max(rates) <= 0.4 * (1 + 1e-9)


def test_optimisers_take_their_settings():
    parameter = nn.Parameter(torch.zeros(2))
    sgd = make_optimizer([parameter], Optim(name="sgd", lr=0.3, momentum=0.8, weight_decay=0.01))
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0.01)
    assert make_optimizer([parameter], Optim(momentum=0)).param_groups[0]["nesterov"] is False
    adamw = make_optimizer([parameter], Optim(name="adamw", lr=0.3, momentum=0.8, weight_decay=0.01))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["betas"] == (0.8, 0.999)


class Plain(nn.Module):
    """A linear model, whose first step can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))


ONE_STEP = shlex.split("""--train.epochs 1 --data.batch_size 128 --optim.name sgd --optim.momentum 0 --optim.weight_decay 0
--optim.schedule constant --optim.warmup 0 --optim.lr 0.5""")


def test_one_step_is_one_gradient_step(tmp_path):
    model = Plain()
    start = copy.deepcopy(model)
    fit(tmp_path / "run", *ONE_STEP, model=model)
    train = tiny().data.load(0).train
    nn.functional.cross_entropy(start(train.images / 255), train.labels).backward()
    assert torch.allclose(model.fc.weight, start.fc.weight - 0.5 * start.fc.weight.grad, atol=1e-6)
    assert torch.allclose(model.fc.bias, start.fc.bias - 0.5 * start.fc.bias.grad, atol=1e-6)


def test_gradient_clipping_bounds_the_step(tmp_path):
    def step_length(name, *overrides):
        model = Plain()
        start = [p.detach().clone() for p in model.parameters()]
        fit(tmp_path / name, *ONE_STEP, *overrides, model=model)
        return torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]).norm().item()

    free = step_length("free")
    assert step_length("clipped", "--optim.clip_norm", "0.1") == pytest.approx(0.05, rel=1e-3) and free > 0.05
    assert step_length("loose", "--optim.clip_norm", "1000") == pytest.approx(free)
    assert step_length("half", "--optim.clip_norm", "0.1", "--train.precision", "float16") == pytest.approx(
        0.05, rel=1e-2
    )


@pytest.mark.parametrize("decay", [0.2, 0.9995])
def test_ema_is_the_average_of_the_weights_and_forgets_the_first_of_them_in_a_short_training(
    tmp_path, monkeypatch, decay
):
    seen = []
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, s: (seen.append(copy.deepcopy(s["model"])), real(self, s)))
    fit(tmp_path / "run", "--train.ema", str(decay), "--train.checkpoint_seconds", "0")
    assert len(seen) == 6
    last = saved_weights(tmp_path / "run")
    for name, value in last.items():
        average = seen[0][name].double()
        for n, state in enumerate(seen[1:], start=1):
            share = min(decay, (1 + n) / (10 + n))
            average = share * average + (1 - share) * state[name].double()
        if value.is_floating_point():
            assert torch.allclose(value.double(), average, atol=1e-6), name
    assert not torch.equal(last["classifier.weight"], seen[-1]["classifier.weight"])


def test_swa_is_the_mean_of_the_weights_after_each_epoch_from_its_start(tmp_path, monkeypatch):
    seen = []
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, s: (seen.append(copy.deepcopy(s["model"])), real(self, s)))
    fit(tmp_path / "run", "--train.swa_start", "0.5", "--train.epochs", "4", "--train.checkpoint_seconds", "0")
    per_epoch = len(seen) // 4
    last = saved_weights(tmp_path / "run")
    for name, value in last.items():
        epochs = torch.stack([state[name].double() for state in seen[per_epoch - 1 :: per_epoch]])
        assert len(epochs) == 4
        if value.is_floating_point():
            assert torch.allclose(value.double(), epochs[1:].mean(0), atol=1e-6), name
    assert not torch.equal(last["classifier.weight"], seen[-1]["classifier.weight"])


def test_the_profile_says_where_the_time_goes_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = clead.profile(tiny("--method.name", "pgd_at"))
    assert not list(tmp_path.iterdir())
    assert set(found["parts"]) == {*trainer.PARTS, "rest"} and all(spent >= 0 for spent in found["parts"].values())
    assert all(found["parts"][name] > 0 for name in trainer.PARTS)
    assert sum(found["parts"].values()) >= 0.99 * found["step_ms"] > 0
    assert found["forward_equivalents"] == pytest.approx(5)  # a step of PGD: 2, then forward and full backward: 3
    names = [name for name, _, _ in found["operators"]]
    assert any("conv" in name for name in names) and len(set(names)) == len(names)
    assert found["images_per_second"] == pytest.approx(16000 / found["step_ms"])


@pytest.mark.slow
def test_profile_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clead", "train", "digits-trades", *TINY, "--train.epochs", "1", "--profile"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in trainer.PARTS) and "images/s" in printed
    assert not list(tmp_path.iterdir())


def test_two_kinds_of_average_are_refused():
    with pytest.raises(UserError, match="one of ema and swa_start, got ema=0.9, swa_start=0.5"):
        tiny("--train.ema", "0.9", "--train.swa_start", "0.5")


@pytest.mark.parametrize("awp", ["0", "0.01"])
def test_the_cost_counts_the_perturbation_of_the_weights(tmp_path, awp):
    run = fit(tmp_path / "run", "--train.awp", awp, "--train.epochs", "1")
    assert run.outcome.forward_equivalents / run.outcome.steps == pytest.approx((3 if awp == "0" else 6) * 16 / 50)


@pytest.mark.parametrize(
    "overrides",
    [
        "--train.precision bfloat16 --train.channels_last true",
        "--train.precision float16 --optim.clip_norm 1",
        "--train.precision float16 --optim.name sgd --optim.lr 0.01",
        "--train.channels_last true --train.ema 0.5",
    ],
)
def test_precisions_and_layouts_train_and_save_float32(overrides, tmp_path):
    run = fit(tmp_path / "run", *FULL, *shlex.split(overrides))
    losses = [line["loss"] for line in log(run.path) if line["kind"] == "train"]
    assert losses and all(map(math.isfinite, losses))
    for which in ("best", "last"):
        content = saved_weights(run.path, which)
        assert {v.dtype for v in content.values() if v.is_floating_point()} == {torch.float32}
        assert all(torch.isfinite(v).all() for v in content.values())
        assert not any(name.startswith("projection") for name in content)
    assert run.model(torch.rand(2, 1, 8, 8)).dtype == torch.float32


def test_the_callers_random_state_is_untouched(tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    fit(tmp_path / "run", *FULL)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert not torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()


def test_equal_seeds_give_equal_runs(tmp_path):
    torch.manual_seed(1)
    fit(tmp_path / "a", *FULL)
    torch.manual_seed(2)
    fit(tmp_path / "b", *FULL)
    assert_same_run(tmp_path / "a", tmp_path / "b")


CHANGES = {
    "train.seed": "1",
    "train.epochs": "1",
    "train.budget": "11",
    "train.precision": "bfloat16",
    "train.ema": "0.5",
    "train.swa_start": "0",
    "train.accumulate": "2",
    "train.awp": "0.1",
    "train.trainable": "classifier",
    "optim.name": "sgd",
    "optim.lr": "0.003",
    "optim.momentum": "0.5",
    "optim.weight_decay": "0.3",
    "optim.schedule": "cosine",
    "optim.warmup": "0.6",
    "optim.clip_norm": "0.01",
    "data.batch_size": "20",
    "data.val_fraction": "0.3",
    "data.limit_train": "70",
    "data.channels": "3",
    "data.image_size": "9",
    "data.augment.crop": "1",
    "data.augment.flip": "true",
    "data.augment.random_resized_crop": "[0.5, 1]",
    "data.augment.color_jitter": "1",
    "data.augment.cutout": "3",
    "model.width": "5",
    "model.pool": "1",
    "model.features": "9",
    "model.normalize": "none",
}
NO_CHANGE = {
    "train.checkpoint_seconds": "0",
    "train.device": "auto",
    "train.validate_every": "2",
    "train.validate_images": "3",
    "train.validate_steps": "2",
    "train.patience": "50",
    "train.shard": "true",  # of several processes: tests/process/test_distributed.py
    "train.sync_batch_norm": "false",  # of several processes: tests/process/test_distributed.py
    "train.channels_last": "true",
    "eval.steps": "3",
    "data.limit_test": "40",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return saved_weights(fit(tmp_path_factory.mktemp("reference") / "run").path)


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_every_option_changes_the_result(key, reference, tmp_path):
    assert not same(saved_weights(fit(tmp_path / "run", f"--{key}", CHANGES[key]).path), reference)


@pytest.mark.parametrize("key", [key for key in NO_CHANGE if key != "train.channels_last"])
def test_what_only_watches_changes_nothing(key, reference, tmp_path):
    assert same(saved_weights(fit(tmp_path / "run", f"--{key}", NO_CHANGE[key]).path), reference)


def test_options_of_the_step_schedule_change_the_result(tmp_path):
    step = ("--optim.schedule", "step", "--optim.warmup", "0")
    first = saved_weights(fit(tmp_path / "step", *step).path)
    assert not same(first, saved_weights(fit(tmp_path / "a", *step, "--optim.milestones", "[0.2]").path))
    assert not same(first, saved_weights(fit(tmp_path / "b", *step, "--optim.decay", "0.5").path))


def test_no_option_of_training_is_forgotten_here():
    tested = {key.split(".")[1] for key in (*CHANGES, *NO_CHANGE) if key.startswith("train.")}
    elsewhere = {"compile", "start_from", "teacher"}  # minutes on a CPU; tested with the stages; in test_teacher.py
    elsewhere |= {
        "attack_mode",
        "batch_norm_images",
        "clock",
        "eps_ramp",
        "forward_mode",
        "minutes",
        "unfreeze",
    }  # test_finetuning.py
    assert set(Train.__pydantic_fields__) - tested == elsewhere
    tested = {key.split(".")[1] for key in CHANGES if key.startswith("optim.")}
    elsewhere = {"milestones", "decay", "encoder_lr", "first_layer_lr"}  # with the step schedule; test_finetuning.py
    assert set(Optim.__pydantic_fields__) - tested == elsewhere


METHOD_CHANGES = {
    "adversarial_weight": "0.5",
    "clean_weight": "0.5",
    "kl_weight": "1",
    "contrastive_weight": "0",
    "contrastive_loss": "nt_xent",
    "temperature": "0.5",
    "augmented_view": "false",
    "embedding_dim": "16",
    "inner": "cross_entropy",
    "inner_contrastive_weight": "1",
    "separate_forwards": "true",
    "label_smoothing": "0.1",
    "clean_view": "false",
    "contrastive_level": "features",
    "replays": "2",
}


@pytest.fixture(scope="module")
def clead_reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    return saved_weights(fit(folder, *METHOD, recipe="digits-clead").path)


METHOD = shlex.split("""--data.view.crop 1 --attack.steps 2 --method.contrastive_weight 0.5 --method.temperature 0.1
--method.contrastive_loss supcon --method.augmented_view true --threat.eps 0.15""")


@pytest.mark.slow
@pytest.mark.parametrize("key, value", [("method." + k, v) for k, v in METHOD_CHANGES.items()] + [
    ("threat.eps", "0.1"), ("threat.norm", "l2"), ("threat.norm", "l1"), ("attack.steps", "1"), ("attack.step_size", "0.01"),
    ("attack.restarts", "2"), ("attack.keep", "best"),
    ("data.view.crop", "2"), ("data.view.cutout", "3"),
])  # fmt: skip
def test_every_option_of_the_method_changes_the_result(key, value, clead_reference, tmp_path):
    run = fit(tmp_path / "run", *METHOD, f"--{key}", value, recipe="digits-clead")
    assert not same(saved_weights(run.path), clead_reference)


def test_the_random_start_changes_the_result_and_a_flat_start_is_refused(tmp_path):
    off = ("--attack.random_start", "false")
    for inner in ("kl", "embedding"):
        with pytest.raises(UserError, match=f"method.inner {inner} .*random_start true"):
            fit(tmp_path / "none", *METHOD, *off, "--method.inner", inner, recipe="digits-clead")
    assert not (tmp_path / "none").exists()
    inner = ("--method.inner", "cross_entropy")
    runs = [
        fit(tmp_path / name, *METHOD, *inner, *more, recipe="digits-clead") for name, more in (("on", ()), ("off", off))
    ]
    assert not same(*(saved_weights(run.path) for run in runs))


def test_no_option_of_the_method_is_forgotten_here():
    assert set(METHOD_CHANGES) | {"fold_batch_norm"} == set(CLead.__pydantic_fields__)


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.slow
def test_length_in_epochs_and_in_compute(tmp_path):
    run = fit(tmp_path / "epochs", "--train.epochs", "2.5", "--data.batch_size", "10")  # 50 images after validation
    assert run.outcome.steps in (12, 13) and run.outcome.epochs == run.outcome.steps / 5
    for method, per_image in (("standard", 3), ("pgd_at", 2 * 2 + 3)):
        run = fit(
            tmp_path / method,
            "--train.budget",
            "40",
            "--method.name",
            method,
            "--attack.steps",
            "2",
            "--data.batch_size",
            "10",
        )
        assert run.outcome.forward_equivalents == pytest.approx(40, abs=per_image * 10 / 50)
        assert run.outcome.steps == round(40 / per_image * 50 / 10)


def test_a_batch_larger_than_the_training_set(tmp_path):
    run = fit(tmp_path / "run", "--data.batch_size", "1000", "--train.epochs", "3")
    assert run.outcome.steps == 3 and run.outcome.epochs == 3
    assert run.outcome.forward_equivalents == pytest.approx(9)


def test_log_and_outcome_say_what_was_done(tmp_path):
    run = fit(tmp_path / "run", "--method.name", "clead", "--train.epochs", "4")
    lines = log(run.path, seconds=True)
    trained = [line for line in lines if line["kind"] == "train"]
    checked = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in trained] == [10, 12] and [line["step"] for line in checked] == [3, 6, 9, 12]
    assert {
        "loss",
        "clean_cross_entropy",
        "kl",
        "contrastive",
        "clean_accuracy",
        "robust_accuracy",
        "learning_rate",
    } <= set(trained[0])
    assert all(0 <= line[key] <= 1 for line in checked for key in ("clean_accuracy", "robust_accuracy"))
    assert checked[0]["images"] == len(tiny().data.load(0).val)
    terms = {"clean_cross_entropy": 1, "kl": 6, "contrastive": run_weight(run)}
    assert trained[0]["loss"] == pytest.approx(sum(w * trained[0][name] for name, w in terms.items()), rel=1e-4)
    outcome = json.loads((run.path / "outcome.json").read_text())
    assert outcome["steps"] == 12 and outcome["epochs"] == 4 and outcome["seconds"] > 0
    assert outcome["forward_equivalents"] == pytest.approx(lines[-1]["forward_equivalents"], abs=0.01)
    assert outcome["best_validation"] == max(line["robust_accuracy"] for line in checked)


def run_weight(run):
    return RunDir(run.path).config().method.contrastive_weight


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", "", "cpu:x"])
def test_unknown_devices_are_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(UserError, match="train.device"):
        fit(tmp_path / "run", "--train.device", repr(name))
    assert not (tmp_path / "run").exists()


def test_tensorboard_draws_what_the_log_says(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clead.train(load_recipe("digits-trades", [*TINY, "--train.epochs", "4"]), out=tmp_path / "run", show=False)
    drawn = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = [line for line in log(tmp_path / "run") if line["kind"] == "train"]
    assert [(e.step, pytest.approx(e.value)) for e in drawn.Scalars("train/kl")] == [
        (x["step"], x["kl"]) for x in lines
    ]
    assert {"validation/robust_accuracy", "train/learning_rate"} <= set(drawn.Tags()["scalars"])


@pytest.mark.parametrize("where", ["__init__", "add_scalar", "close"])
def test_curves_that_cannot_be_written_cost_no_training(where, tmp_path, monkeypatch, caplog, capfd):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, where, full)
    clead.train(load_recipe("digits-standard", [*TINY, "--train.epochs", "2"]), out=tmp_path / "run", show=False)
    assert caplog.text.count("TensorBoard's curves end here") == 1 and "No space left on device" in caplog.text
    assert (tmp_path / "run" / "outcome.json").exists() and "Traceback" not in capfd.readouterr().err


def test_training_does_not_need_tensorboard(tmp_path, monkeypatch):
    import clead.training.tensorboard as tracking

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    clead.train(load_recipe("digits-standard", [*TINY, "--train.epochs", "1"]), out=tmp_path / "run", show=False)
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("method", ["pgd_at", "trades"])
def test_microbatches_train_as_the_whole_batch_does(method, tmp_path):
    """Without batch-norm and contrast the gradient of the mean is the mean of the gradients; random numbers are the batch's."""
    options = [
        "--method.name",
        method,
        "--data.augment.crop",
        "1",
        "--data.augment.flip",
        "true",
        "--threat.norm",
        "l2",
    ]
    options += ["--threat.eps", "0.02", "--optim.name", "sgd", "--optim.lr", "0.01", "--train.epochs", "1"]
    runs = []
    for accumulate in ("1", "2"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        out = tmp_path / accumulate
        fit(out, *options, "--train.accumulate", accumulate, model=model)
        runs.append(saved_weights(out))
    assert all(torch.allclose(runs[0][name], runs[1][name], rtol=1e-5, atol=1e-6) for name in runs[0])


def test_a_retired_setting_is_refused_as_an_option_and_ignored_in_the_configuration_of_an_old_run():
    with pytest.raises(UserError, match=r"--train.parts: is no setting any more; leave it out"):
        tiny("--train.parts", "2")
    tree = tiny().to_dict()
    tree["train"]["parts"] = 2
    assert RunConfig.from_dict(tree) == tiny()


OLD = {  # keys of version 0.1 with their defaults, and another value
    "contrastive_ramp": ("constant", "up"),
    "temperature_end": (None, 0.1),
    "stop_gradient": (False, True),
    "negatives": ("all", "hard"),
    "hardness": (1.0, 2.0),
    "asymmetry": (0.8, 0.3),
    "contrastive_layer": (None, "encoder.convolutions.5"),
    "queue": (0, 512),
    "momentum": (0.99, 0.9),
    "pseudo_label_confidence": (None, 0.95),
}


def test_old_runs_whose_retired_settings_changed_nothing_load():
    config = tiny("--method.name", "clead")
    tree = config.to_dict()
    tree["method"] |= {key: default for key, (default, _) in OLD.items()}
    assert RunConfig.from_dict(parse_yaml(dump_yaml(tree), "config.yaml")) == config
    assert RunConfig.from_dict(tree) == config


@pytest.mark.parametrize(("key", "value"), [*((k, other) for k, (_, other) in OLD.items()),
                                            ("contrastive_loss", "prototype"), ("contrastive_loss", "asymmetric")])  # fmt: skip
def test_old_runs_with_a_retired_setting_are_refused_in_one_line_that_names_the_tag(key, value):
    tree = tiny("--method.name", "clead").to_dict()
    tree["method"][key] = value
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(parse_yaml(dump_yaml(tree), "config.yaml"))
    (line,) = caught.value.problems
    assert line == (
        f"method.{key}: left with version 0.2.0, because it gained nothing, got {value!r}; leave it out, or run it at the git "
        "tag studies-1: git checkout studies-1"
    )
    tree["method"]["kl_weight"] = -1
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(tree)
    assert len(caught.value.problems) == 2 and "kl_weight" in caught.value.problems[1]


def test_a_retired_setting_of_a_stage_is_refused():
    with pytest.raises(
        UserError, match=r"^--stages.slf.method.queue: left with version 0.2.0, .*, got 3; leave it out"
    ):
        load_recipe("digits-acl", ["--stages.slf.method.queue", "3"])
