"""The same in a few lines of Python."""

import copy
import json
import shlex
from dataclasses import replace

import pytest
import torch
from torch import nn

import clead
from clead.config import Train
from clead.data.datasets.digits import Digits
from clead.errors import UserError
from clead.methods.standard import Standard
from clead.models.split import SplitModel
from support import same

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.limit_test 40 --data.batch_size 16
--attack.steps 1 --train.epochs 1 --train.validate_steps 1 --eval.steps 1 --eval.curve_points 0 --eval.check_images 0
--train.device cpu""")


def config(*overrides, recipe="digits-standard"):
    return clead.load_recipe(recipe, [*TINY, *overrides])


class Net(nn.Module):
    """A user's: frozen batch-norm inside a training model, and a dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(144, 10)

    def forward(self, x):
        return self.head(self.body(x))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_five_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = clead.train(config(), show=False)
    assert run.path.parts[0] == "runs" and isinstance(run.model, SplitModel) and not run.model.training
    record = clead.evaluate_run(run.path, show=False).record
    assert 0 <= record.robust_accuracy <= record.clean_accuracy <= 1 and record.data.n == 40
    assert record.training.steps == run.outcome.steps and record.training.method == "standard"
    assert json.loads((run.path / "results" / "evaluation.json").read_text())["run"] == run.path.name
    assert same(state(clead.load(run.path)), state(run.model))
    assert clead.compare([record, run.path])["pairs"][0]["p_value"] == 1.0


def test_a_model_given_as_an_object(tmp_path):
    torch.manual_seed(3)
    net = Net()
    keys, start = list(net.state_dict()), state(net)
    run = clead.train(config("--method.name", "trades"), model=net, out=tmp_path / "run", show=False)
    assert list(net.state_dict()) == keys and not same(state(net), start)  # trained in place, with its own names
    assert same(state(run.model.module), state(net))
    loaded = clead.load(run.path, model=Net())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(x), net.eval()(x))
    with pytest.raises(UserError, match="of another architecture"):
        clead.load(run.path)
    record = clead.evaluate_run(run.path, model=Net(), show=False).record
    assert record.run == "run" and record.data.n == 40


def test_a_model_that_does_not_fit_writes_nothing(tmp_path):
    for wrong in (nn.Linear(3, 10), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.Flatten()):
        with pytest.raises(UserError):
            clead.train(config(), model=wrong, out=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


def test_data_given_as_tensors(tmp_path):
    splits = config().data.load(0)
    brighter = replace(splits, test=splits.test.subset(torch.arange(7)), fingerprint="mine")
    run = clead.train(config(), data=brighter, out=tmp_path / "run", show=False)
    record = clead.evaluate_run(run.path, data=brighter, show=False).record
    assert record.data.n == 7 and record.data.fingerprint == "mine"


def test_evaluate_any_module_and_leave_it_as_it_was():
    net = Net()
    net.train()
    net.body[1].eval()  # frozen batch-norm must stay frozen
    net.head.bias.requires_grad_(False)
    before, flags = state(net), [m.training for m in net.modules()]
    images = torch.rand(12, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rng = torch.get_rng_state()
        record = clead.evaluate(
            net, images, torch.arange(12) % 10, eps="8/255", steps=2, curve_points=2, curve_steps=1, check_images=8
        )
        assert torch.equal(torch.get_rng_state(), rng)
    assert same(state(net), before) and [m.training for m in net.modules()] == flags
    assert not net.head.bias.requires_grad and all(p.grad is None for p in net.parameters())
    assert record.threat.eps_text == "8/255" and record.data.classes == [str(k) for k in range(10)]
    as_bytes = (images * 255).round().byte()
    kept = clead.evaluate(net, as_bytes, torch.arange(12) % 10, norm="l2", eps=0.5, steps=1, curve_points=0)
    assert kept.data.n == 12 and kept.threat.norm == "l2"
    with pytest.raises(UserError, match="unknown key; did you mean 'steps'"):
        clead.evaluate(net, images, torch.arange(12) % 10, step=3)


def test_a_suite_is_chosen_by_name():
    net, images = Net(), torch.rand(8, 1, 8, 8)
    short = {"steps": 1, "curve_points": 0, "check_images": 0}
    for suite, attacks in (("quick", ["APGD-CE", "APGD-T"]), ("black_box", ["Square", "RayS"])):
        record = clead.evaluate(net, images, torch.arange(8), suite=suite, **short)
        assert record.suite == suite and [part.name for part in record.attacks] == attacks and record.checks == []
    for gone in ("fgsm", "restarts", "objectives"):
        with pytest.raises(UserError, match=f"{gone}: unknown key"):
            clead.evaluate(net, images, torch.arange(8), **{gone: 1})


def test_checks_of_masking_use_the_first_images_and_can_be_left_out():
    net, images = Net(), torch.rand(12, 1, 8, 8)
    checked = clead.evaluate(
        net, images, torch.arange(12) % 10, suite="pgd", steps=1, curve_points=0, check_images=4
    ).checks
    assert len(checked) > 5 and len({check.name for check in checked}) == len(checked)
    assert all(check.explanation and "\n" not in check.explanation for check in checked)


def test_other_settings_in_evaluation_do_not_change_what_the_run_was(tmp_path):
    run = clead.train(config(), out=tmp_path / "run", show=False)
    changed = config("--threat.eps", "0.3", "--train.seed", "9", "--method.name", "trades", "--eval.split", "val")
    record = clead.evaluate_run(run.path, config=changed, show=False).record
    assert record.threat.eps == 0.3 and record.data.split == "val"
    # The run's own method, seed and validation split: other seeds would put training images into it.
    assert (record.training.method, record.training.seed) == ("standard", 0)
    assert record.data.fingerprint == config().data.load(0).fingerprint != config().data.load(9).fingerprint


def test_last_weights_can_be_asked_for(tmp_path):
    run = clead.train(config(), out=tmp_path / "run", show=False)
    record = clead.evaluate_run(run.path, config=config("--eval.weights", "last"), show=False).record
    assert record.model.weights == "last"


def test_a_configuration_written_in_python(tmp_path):
    made = clead.RunConfig(
        data=Digits(limit_train=40, limit_test=20),
        train=Train(epochs=1, validate_steps=1),
        method=Standard(),
        name="mine",
    )
    run = clead.train(made, out=str(tmp_path / "run"), show=False)
    assert run.outcome.epochs == 1 and clead.load_recipe(str(tmp_path / "run" / "config.yaml")) == made


def test_everything_public_is_there():
    assert clead.__version__ and set(clead.__all__) <= set(dir(clead))
    for name in clead.__all__:
        assert getattr(clead, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = clead.nonsense


def test_training_twice_from_copies_is_the_same(tmp_path):
    net = Net()
    twin = copy.deepcopy(net)
    clead.train(config(), model=net, out=tmp_path / "a", show=False)
    clead.train(config(), model=twin, out=tmp_path / "b", show=False)
    assert same(state(net), state(twin))
