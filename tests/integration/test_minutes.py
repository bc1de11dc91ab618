"""The benchmark by the minute (benchmarks/minutes.py): peers get the minutes that they are said to get."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clead
from support import ROOT, Killed

JOB = {
    "contender": "fastat slow_start",
    "checkout": "",
    "base": "digits-pgd-at",
    "overrides": ["--model.width", "4", "--data.limit_train", "300"],
    "minutes": 2,
    "seed": 0,
    "validation": 16,
    "images": 8,
    "suite": "pgd",
    "eps": 0.1,
    "classes": 10,
}


class Peer:
    """A peer whose time is the test's: 30 s before its first step, steps of 1 s, in the second half of 3 s, validations of 9 s."""

    clock, trained, told = 0.0, 0, []

    def __init__(self, model, *, config, name, device, seed):
        self.model, self.config, self.output_dir = model, config, config["log_dir"]
        Peer.trained += 1

    def train(self, optimizer, scheduler, batches, validation):
        epochs = self.config["total_epoch"]
        Peer.told = []
        for epoch in range(epochs):
            Peer.clock += 30 * (epoch == 0)
            for images, labels in batches:
                assert images.shape == (128, 1, 8, 8) and labels.shape == (128,)
                Peer.clock += 1 if epoch < epochs // 2 else 3
            Peer.told.append(Peer.clock)
            self._validate_model(self.model, validation)
        torch.save(self.model.state_dict(), Path(self.output_dir) / "best.pth")

    def _validate_model(self, model, validation):
        Peer.clock += 9


@pytest.fixture
def minutes(monkeypatch, tmp_path):
    """Return the script, with a checkout of the peer."""
    specification = importlib.util.spec_from_file_location("minutes", ROOT / "benchmarks" / "minutes.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.setattr(script, "import_torchvision", lambda: None)
    monkeypatch.setattr(script, "time", SimpleNamespace(process_time=lambda: Peer.clock))
    settings = {"total_epoch": 100, "epochs_reset": 40, "decay_arr": [0, 100, 110], "weight_average": False}
    peer = SimpleNamespace(
        load_config=lambda common, own: dict(settings),
        get_optimizer_and_scheduler=lambda model, config, loader: (None, None),
        METHOD_MAP={"slow_start": Peer},
    )
    monkeypatch.setitem(sys.modules, "main", peer)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Peer, "clock", 0.0)
    monkeypatch.setattr(Peer, "trained", 0)
    return script


def test_a_peer_gets_its_minutes_though_its_steps_grow_dearer(minutes, tmp_path):
    config, splits, model = minutes.setting(JOB["base"], JOB["overrides"], 0)
    figures = minutes.train_peer(JOB, config, splits, model, tmp_path)
    assert figures["told_epochs"] == minutes.EPOCHS == 20
    assert 2 <= figures["cpu_minutes"] < 2 + 3 / 60  # an epoch ends with the step in which its share ends


def test_what_a_peer_does_at_an_epoch_is_scaled_with_their_number(minutes, tmp_path, monkeypatch):
    seen, begin = [], Peer.__init__
    monkeypatch.setattr(
        Peer, "__init__", lambda self, model, **keys: (seen.append(keys["config"]), begin(self, model, **keys))[1]
    )
    config, splits, model = minutes.setting(JOB["base"], JOB["overrides"], 0)
    minutes.train_peer(JOB | {"minutes": 0.5}, config, splits, model, tmp_path)
    assert [seen[-1][key] for key in ("total_epoch", "epochs_reset", "decay_arr")] == [20, 8, [0, 20, 22]]


def test_a_loader_of_so_many_batches_says_what_a_step_takes_and_leaves_the_outside_out(minutes):
    _, splits, _ = minutes.setting(JOB["base"], JOB["overrides"], 0)
    loader = minutes.Batches(splits, None, 128, 0, indexed=True)
    loader.begin(3)
    for epoch in range(2):
        Peer.clock += 50
        for count, (index, _images, labels) in enumerate(loader, start=1):
            assert torch.equal(splits.train.labels[index], labels)
            Peer.clock += 2 + epoch
            loader.outside += 0.5
            if count == len(loader):  # as MAIR does
                break
    assert (loader.taken, loader.step_seconds) == (6, 2.5) and loader.spent() == 115 - 3


def test_a_peer_that_is_trained_is_not_trained_again_when_its_attack_was_stopped(minutes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    states = []

    def evaluate(model, images, labels, *, state, **keys):
        states.append((state, Peer.trained))
        if len(states) == 1:
            raise Killed
        return SimpleNamespace(clean_accuracy=1.0, robust_accuracy=0.5, robust=[True, False])

    monkeypatch.setattr(clead, "evaluate", evaluate)
    with pytest.raises(Killed):
        minutes.carry_out(JOB, Path("work/peer"))
    monkeypatch.chdir(tmp_path)
    row = minutes.carry_out(JOB, Path("work/peer"))
    assert states == [(tmp_path / "work" / "peer" / "evaluation", 2)] * 2 and row["robust_flags"] == "10"
    assert 2 <= row["cpu_minutes"] < 2 + 3 / 60
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give the same, or another --work"):
        minutes.carry_out(JOB | {"validation": 8}, Path("work/peer"))


@pytest.mark.parametrize("given", ["", " --train.checkpoint_seconds 7"])
def test_ours_saves_seldom_and_ends_by_cpu_time(minutes, tmp_path, monkeypatch, given):
    def train(config, **keys):
        assert (config.train.minutes, config.train.clock, config.train.seed) == (2, "cpu", 3)
        assert config.train.checkpoint_seconds == (7 if given else 300)
        raise Killed

    monkeypatch.setattr(clead, "train", train)
    config, splits, model = minutes.setting(JOB["base"], JOB["overrides"], 3)
    job = JOB | {"recipe": "digits-pgd-at" + given, "seed": 3}
    with pytest.raises(Killed):
        minutes.train_ours(job, config, splits, model, tmp_path)
