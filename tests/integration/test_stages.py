"""Several trainings in one run: what each begins with, what is frozen, what is resumed, added up and said."""

import copy
import json
import os
import shlex
import signal
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import clead
import clead.api
from clead.cli import main
from clead.config import RunConfig, Stage, load_recipe
from clead.errors import UserError
from clead.evaluation.transfer import StoredTest, transferred
from clead.interfaces import ImageSet
from clead.models.compute_cost import CostMeter
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.threats.linf import Linf
from clead.training import stages, trainer
from clead.training.freezing import start_from
from clead.training.signals import Interrupted
from clead.weights.files import load_weights, save_weights
from support import Killed, history, same, saved_weights

RECIPE = """
data: {name: digits, batch_size: 32, limit_train: 120, limit_test: 30}
model: {width: 4, features: 8}
threat: {eps: 0.15}
attack: {steps: 1}
method: {name: clead_published, embedding_dim: 6, stored_attack: {name: fgsm}}
optim: {name: adamw, lr: 0.01}
train: {epochs: 2, validate_steps: 1, device: cpu, checkpoint_seconds: 0}
eval: {images: 20, suite: pgd, steps: 1, curve_points: 0, check_images: 0, gallery: 2}
stages:
  - name: classifier
    method: {name: standard}
    train: {ema: 0.5}
  - name: contrast
    data: {view: {crop: 2}}
  - name: head
    method: {name: standard}
    train: {epochs: 1, trainable: classifier}
"""
NAMES = ("1-classifier", "2-contrast", "3-head")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "three.yaml"
    path.write_text(RECIPE)
    return str(path)


def fit(recipe, out, *overrides, **keys):
    return clead.train(load_recipe(recipe, overrides), out=out, show=False, **keys)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, evaluated; not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "three.yaml").write_text(RECIPE)
    run = fit(str(folder / "three.yaml"), folder / "run")
    clead.evaluate_run(run.path, show=False)
    return run


def assert_same_run(a, b):
    for part in ("", *(f"stages/{name}" for name in NAMES)):
        for which in ("best", "last"):
            assert same(saved_weights(a / part, which), saved_weights(b / part, which)), (part, which)
        assert history(a / part) == history(b / part), part
        outcomes = [json.loads((path / part / "outcome.json").read_text()) for path in (a, b)]
        assert {**outcomes[0], "seconds": 0} == {**outcomes[1], "seconds": 0}
    head = "stages/2-contrast/projection.safetensors"
    assert same(load_weights(a / head)[0], load_weights(b / head)[0])


# ------------------------------------------------------------------------------------------------ what a stage begins with


def test_each_stage_begins_where_the_one_before_ended(recipe, tmp_path, monkeypatch):
    """Also with its projection head, if both have one of the same size."""
    begins, real = {}, stages.fit

    def fit_(config, splits, model, run, **keys):
        begins[run.path.name] = copy.deepcopy(model.state_dict())
        outcome = real(config, splits, model, run, **keys)
        save_weights(
            run.path / "best.safetensors", {n: t + 1 for n, t in saved_weights(run.path).items()}, {}
        )  # not these
        return outcome

    monkeypatch.setattr(stages, "fit", fit_)
    text = RECIPE + "  - {name: again}\n  - {name: small, method: {embedding_dim: 4}}\n"
    text = text.replace(
        "  - name: head\n    method: {name: standard}\n    train: {epochs: 1, trainable: classifier}\n", ""
    )
    (tmp_path / "three.yaml").write_text(
        text.replace("{name: clead_published,", "{name: clead, contrastive_weight: 1,").replace(
            ", stored_attack: {name: fgsm}", ""
        )
    )
    run = fit(recipe, tmp_path / "run")
    assert list(begins) == ["1-classifier", "2-contrast", "3-again", "4-small"]
    folder = run.path / "stages"
    ended = [saved_weights(folder / name) for name in begins]
    assert same(begins["2-contrast"], ended[0]) and not same(begins["1-classifier"], ended[0])
    head, _ = load_weights(folder / "2-contrast" / "projection.safetensors")
    assert same(begins["3-again"], {**ended[1], **{f"projection.{name}": tensor for name, tensor in head.items()}})
    assert same(begins["4-small"], ended[2])
    # EMA weights are what the first stage keeps.
    state, _ = Checkpoints(folder / "1-classifier").load()
    assert all(torch.equal(state["average"][f"module.{name}"], tensor) for name, tensor in ended[0].items())
    assert not same(state["model"], ended[0])


def test_the_frozen_encoder_stays_bit_for_bit(done):
    before, after = (saved_weights(done.path / "stages" / name) for name in NAMES[1:])
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("classifier.")), name
    assert any("running_mean" in name for name in after)


@pytest.mark.parametrize("average", ["--train.ema 0.5", "--train.swa_start 0", "--train.awp 0.01", ""])
def test_frozen_also_in_a_users_model_with_every_average(average, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))

        def forward(self, x):
            return self.head(self.body(x))

    net = Net()
    net.body[1].bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    overrides = "--train.trainable classifier --data.limit_train 120 --train.epochs 2 --train.device cpu " + average
    config = load_recipe("digits-pgd-at", shlex.split(overrides))
    run = clead.train(config, model=net, out=tmp_path / "run", show=False)
    for name, tensor in saved_weights(run.path).items():
        name = name.removeprefix("module.")
        assert torch.equal(tensor, before[name]) == (not name.startswith("head.")), name
    # The caller's flags are as they were.
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["body.1.bias"]


def test_a_step_of_the_classifier_alone_costs_a_forward(done, tmp_path):
    records = {name: load_weights(done.path / "stages" / name / "last.safetensors")[1] for name in NAMES}
    cost = {name: record["forward_equivalents_per_step_image"] for name, record in records.items()}
    assert cost == {"1-classifier": 3, "2-contrast": 9, "3-head": 1}
    # Attacked, it is still run back to its inputs: 1 and 1 per step of the attack, then a forward without a way back.
    overrides = (
        "--train.trainable classifier --data.limit_train 60 --train.epochs 1 --attack.steps 3 --train.device cpu"
    )
    run = clead.train(load_recipe("digits-pgd-at", shlex.split(overrides)), out=tmp_path / "run", show=False)
    assert load_weights(run.path / "last.safetensors")[1]["forward_equivalents_per_step_image"] == 2 * 3 + 1
    model = clead.load(run.path).requires_grad_(False)
    model.classifier.requires_grad_(True)
    with CostMeter(model) as meter:
        model(torch.rand(2, 1, 8, 8, requires_grad=True)).sum().backward()
    assert meter.forward_equivalents == 2 * 3  # to the inputs: the encoder is in the way


# ------------------------------------------------------------------------------------------------ the whole run


def test_the_run_holds_what_a_run_directory_holds(done):
    path, last = done.path, done.path / "stages" / NAMES[-1]
    for which in ("best", "last"):
        assert same(saved_weights(path, which), saved_weights(last, which))
    assert same(dict(done.model.state_dict()), saved_weights(path, "best"))
    assert RunDir(path).config() == load_recipe(str(path / "config.yaml"))
    assert [stage.name for stage in RunDir(path).config().stages] == ["classifier", "contrast", "head"]
    for number, name in enumerate(NAMES):
        assert RunDir(path / "stages" / name).config() == RunDir(path).config().trainings()[number]
        assert not RunDir(path / "stages" / name).config().stages


def test_costs_and_metrics_are_those_of_all_stages(done):
    parts = [json.loads((done.path / "stages" / name / "outcome.json").read_text()) for name in NAMES]
    for key in ("steps", "epochs", "seconds", "forward_equivalents"):
        assert getattr(done.outcome, key) == pytest.approx(sum(part[key] for part in parts))
    n, steps = (
        108,
        (6, 6, 3),
    )  # of 120 images a tenth validates; FGSM takes a forward, a backward, and 4 to fold batch-norm
    stored = sum(load_weights(file)[1]["forward_equivalents"] for file in (done.path / "stored").glob("train-*"))
    assert 2 * n <= stored < 2.2 * n
    by_hand = (3 * steps[0] + 9 * steps[1] + 1 * steps[2]) * 32 / n + stored / n
    assert done.outcome.forward_equivalents == pytest.approx(by_hand)
    assert (
        json.loads((done.path / "outcome.json").read_text())["forward_equivalents"] == done.outcome.forward_equivalents
    )
    joined, own = history(done.path), [history(done.path / "stages" / name) for name in NAMES]
    assert [line["stage"] for line in joined] == [
        n for n, o in zip(("classifier", "contrast", "head"), own, strict=True) for _ in o
    ]
    for key in ("step", "epoch", "forward_equivalents"):
        values = [line[key] for line in joined]
        assert values == sorted(values)
    assert joined[-1]["step"] == done.outcome.steps == sum(steps)
    assert joined[-1]["forward_equivalents"] == pytest.approx(done.outcome.forward_equivalents, abs=0.02)
    assert [line["knn_accuracy"] for line in joined if "knn_accuracy" in line]


@pytest.mark.slow
def test_it_evaluates_loads_compares_and_reports_as_any_run(done, recipe, tmp_path, capsys, monkeypatch):
    record = clead.api.read_record(done.path)
    assert record.training.method == "clead_published"
    assert record.training.forward_equivalents == done.outcome.forward_equivalents
    assert same(dict(clead.load(done.path).state_dict()), saved_weights(done.path, "best"))
    comparison = clead.compare([done.path])
    assert comparison["rows"][0]["transferred"] == record.transferred.robust.accuracy
    page = clead.write_report([done.path], tmp_path / "report.html")
    assert "images right that its training had stored. That is not robustness" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["clead", "evaluate", str(done.path), "--threat.eps", "0.1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "stored images (transferred)" in said and "is not robustness: those were made for another model" in said
    assert clead.api.read_record(done.path).threat.eps == 0.1


def test_transferred_accuracy_is_that_of_the_stored_test_images(done):
    record = clead.api.read_record(done.path)
    config = RunDir(done.path).config()
    test = config.data.load(0).test
    from clead.data.base import shuffle_if_sorted

    chosen = shuffle_if_sorted(test).subset(torch.arange(20))
    x, y = chosen.images.float() / 255, chosen.labels
    stored = load_weights(done.path / "stored" / "test-000000.safetensors")[0]["x_adv"].float()
    model = clead.load(done.path)
    source = clead.load(done.path / "stages" / NAMES[0], weights="last")
    with torch.no_grad():
        right = (model(x).argmax(1) == y) & (model(stored).argmax(1) == y)
        assert record.transferred.fooled == pytest.approx((source(stored).argmax(1) != y).float().mean().item())
    assert record.transferred.flags == right.tolist() and len(right) == 20
    assert (
        record.transferred.max_distance == pytest.approx((stored - x).abs().max().item())
        and record.transferred.max_distance > 0.1
    )
    # It has no part in the worst case.
    assert all(attack.name != record.transferred.name for attack in record.attacks)


def test_transferred_images_count_if_right_when_clean_and_as_stored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(1))
    images = torch.randint(256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x_adv = images[:500].roll(1, 0).float() / 255
    with torch.no_grad():
        clean, adversarial = model(images.float() / 255).argmax(1), model(x_adv).argmax(1)
    labels = torch.cat([clean[:100], adversarial[100:500], clean[500:]])
    expected = (clean[:500] == labels[:500]) & (adversarial == labels[:500])
    assert 0 < expected.sum() < (adversarial == labels[:500]).sum()
    stored = StoredTest(x_adv, torch.arange(500) % 2 == 0, {"name": "fgsm"})
    part = transferred(model, ImageSet(images, labels), stored, Linf(eps=0.1), torch.device("cpu"))
    assert part.flags == expected.tolist() and part.robust.accuracy == expected.double().mean()
    assert part.fooled == 0.5 and part.max_distance == pytest.approx(
        (x_adv - images[:500].float() / 255).abs().max().item()
    )
    fewer = transferred(model, ImageSet(images[:7], labels[:7]), stored, Linf(eps=0.1), torch.device("cpu"))
    assert fewer.flags == part.flags[:7]


def test_other_images_have_no_transferred_line(done):
    config = load_recipe(str(done.path / "config.yaml"), ["--eval.split", "val"])
    assert clead.evaluate_run(done.path, config=config, result="val", show=False).record.transferred is None


# ------------------------------------------------------------------------------------------------ resume


def kill(monkeypatch, owner, name, count, *, before=False):
    real, calls = getattr(owner, name), []

    def call(*args, **keys):
        calls.append(1)
        if before and len(calls) == count:
            raise Killed
        result = real(*args, **keys)
        if len(calls) == count:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "count", "before"),
    [
        (Checkpoints, "save", 3, False),  # stage 1, after step 3
        (Checkpoints, "save", 9, False),  # stage 2, in its middle
        (Checkpoints, "save", 9, True),
        (Checkpoints, "save", 15, False),  # the last of stage 3, before its weights are written
        (stages, "write_outcome", 2, True),  # stage 2 trained, but not said to be finished
        (stages, "write_outcome", 1, False),  # between stages
        (stages, "write_metrics", 2, True),
        (stages, "_sum", 1, True),
        (trainer, "store_images", 1, False),
    ],
)
def test_a_kill_anywhere_and_resume_give_the_same_run(owner, name, count, before, done, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill(patch, owner, name, count, before=before)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "outcome.json").exists()
    fit(recipe, tmp_path / "run", resume=True)
    assert_same_run(done.path, tmp_path / "run")


def test_a_kill_while_a_stage_is_made(done, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill(patch, stages, "write_outcome", 1)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "run")
    half = tmp_path / "run" / "stages" / NAMES[1]
    half.mkdir()
    (half / ".config.yaml.x1").write_text("half-writ")
    fit(recipe, tmp_path / "run", resume=True)
    assert_same_run(done.path, tmp_path / "run")
    assert not (half / ".config.yaml.x1").exists()


def test_resume_of_a_finished_run_trains_nothing(recipe, tmp_path, monkeypatch):
    run = fit(recipe, tmp_path / "run")
    monkeypatch.setattr(stages, "fit", None)
    again = fit(recipe, tmp_path / "run", resume=True)
    assert again.outcome == run.outcome and same(dict(again.model.state_dict()), dict(run.model.state_dict()))


def test_ctrl_c_names_the_stage_and_the_run(done, recipe, tmp_path, monkeypatch):
    real, calls = Checkpoints.save, []

    def save_state(self, state):
        real(self, state)
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_state)
        with pytest.raises(Interrupted) as caught:
            fit(recipe, tmp_path / "run")
    assert str(caught.value) == (
        f"stage contrast (2 of 3): stopped at step 3 of 6; continue with --resume --out {tmp_path}/run"
    )
    fit(recipe, tmp_path / "run", resume=True)
    assert_same_run(done.path, tmp_path / "run")


def test_resume_with_another_configuration_names_the_stages_key(recipe, tmp_path, done):
    with pytest.raises(UserError, match="stages.head.train.epochs: the run has 1.0, got 3.0") as caught:
        clead.train(load_recipe(recipe, ["--stages.head.train.epochs", "3"]), out=done.path, resume=True, show=False)
    assert len(caught.value.problems) == 1


# ------------------------------------------------------------------------------------------------ configuration


def test_a_stage_inherits_and_overrides(recipe):
    config = load_recipe(recipe, [])
    first, second, third = config.trainings()
    assert first.to_dict()["method"]["name"] == third.to_dict()["method"]["name"] == "standard"
    assert second.method == config.method and second.method.embedding_dim == 6
    assert (first.train.ema, second.train.ema) == (0.5, 0) and (first.train.epochs, third.train.epochs) == (2, 1)
    assert second.data.view.crop == 2 and first.data.view.crop == 0
    assert {training.data.limit_train for training in config.trainings()} == {120}
    assert third.train.trainable == "classifier" and third.threat == config.threat and third.eval == config.eval
    assert [training.name for training in config.trainings()] == ["three-classifier", "three-contrast", "three-head"]
    plain = load_recipe("digits-standard")
    assert plain.trainings() == (plain,)


def test_overrides_on_the_command_line(recipe):
    def epochs(*overrides):
        return [training.train.epochs for training in load_recipe(recipe, overrides).trainings()]

    assert epochs() == [2, 2, 1]
    assert epochs("--stages.contrast.train.epochs", "7") == [2, 7, 1] == epochs("--stages.2.train.epochs=7")
    assert epochs("--train.epochs", "5") == [5, 5, 5]  # what is given by hand counts for all
    assert epochs("--stages.head.train.epochs", "3", "--train.epochs", "5") == [5, 5, 3]
    budget = load_recipe(recipe, ["--stages.head.train.budget", "9"]).trainings()[2].train
    assert (budget.epochs, budget.budget) == (None, 9)
    assert [t.train.seed for t in load_recipe(recipe, ["--train.seed", "4"]).trainings()] == [4, 4, 4]
    assert [t.train.start_from for t in load_recipe(recipe, ["--train.start_from", "x"]).trainings()] == [None] * 3
    named = load_recipe(recipe, ["--stages.head.method.name", "trades", "--stages.head.method.kl_weight", "2"])
    assert named.trainings()[2].method == type(named.trainings()[2].method)(kl_weight=2)
    tuned = load_recipe(recipe, ["--method.temperature", "0.3", "--stages.contrast.method.embedding_dim", "5"])
    assert [getattr(t.method, "temperature", None) for t in tuned.trainings()] == [0.5, 0.3, 0.5]
    assert tuned.trainings()[1].method.embedding_dim == 5


def test_what_is_printed_is_complete_and_comes_back(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clead", "train", recipe, "--show", "--stages.head.train.epochs", "4"])
    with pytest.raises(SystemExit):
        main()
    shown = yaml.safe_load(capsys.readouterr().out)
    config = load_recipe(recipe, ["--stages.head.train.epochs", "4"])
    assert RunConfig.from_dict(shown) == config and shown["stages"][2]["train"]["epochs"] == 4
    assert "stages" not in load_recipe("digits-standard").to_dict()
    assert {"seed", "device", "start_from"}.isdisjoint(shown["stages"][0]["train"])


def test_all_problems_of_all_stages_are_listed_at_once_with_their_keys(tmp_path):
    tree = yaml.safe_load(RECIPE)
    tree["optim"]["lr"] = -1
    tree["stages"][0]["train"]["ema"] = 2
    tree["stages"][0]["eval"] = {"images": 3}
    tree["stages"][0]["speed"] = {}
    tree["stages"][1]["data"] = {"val_fraction": 0.5, "name": "mnist", "crop": 3}
    tree["stages"][1]["train"] = {"seed": 3, "device": "cpu", "start_from": "x"}
    tree["stages"][2]["method"] = {"name": "clead"}
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(tree)
    problems = caught.value.problems
    assert not any("\n" in problem for problem in problems)
    expected = {
        "optim.lr: ": 1,  # once, not once per stage
        "stages.classifier.train.ema: ": 1,
        "stages.classifier.eval: belongs to the whole run": 1,
        "stages.classifier.speed: unknown group": 1,
        "stages.contrast.data.val_fraction: belongs to the whole run": 1,
        "stages.contrast.data.name: belongs to the whole run": 1,
        "stages.contrast.data.crop: unknown key": 1,
        "stages.contrast.train.seed: belongs to the whole run": 1,
        "stages.contrast.train.device: belongs to the whole run": 1,
        "stages.contrast.train.start_from: belongs to the whole run": 1,
        "stages.head.train.trainable: a contrastive loss": 1,
    }
    for start, count in expected.items():
        assert sum(problem.startswith(start) for problem in problems) == count, start
    assert len(problems) == len(expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": 3}, "stages: must be a list of mappings"),
        (
            {"stages": [{"name": "a"}, {"name": "a", "method": {"name": "standard"}}]},
            "stages: two stages are called 'a'",
        ),
        ({"stages": [{"name": "2"}]}, "stages.1.name: must be letters"),
        ({"stages": [{"method": {"name": "standard"}}]}, "stages.1.name: must be letters"),
        ({"stages": [{"name": "a", "optim": 3}]}, "stages.a.optim: must be a mapping of keys, got 3"),
        (
            {"stages": [{"name": "a"}, {"name": "b"}]},
            "stages: only one stage of a run can store adversarial images, got a, b",
        ),
    ],
)
def test_wrong_stages_are_one_line(change, said):
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict({**yaml.safe_load(RECIPE), **change})
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            "--stages.heat.train.epochs 2",
            "--stages.heat.train.epochs: no stage 'heat'; did you mean 'head'? (or 1 to 3)",
        ),
        ("--stages.4.train.epochs 2", "--stages.4.train.epochs: no stage '4'"),
        ("--stages.0.train.epochs 2", "--stages.0.train.epochs: no stage '0'"),
        (
            "--stages.head.epochs 2",
            "--stages.head.epochs: a setting of a stage has four parts; give --stages.NAME.group.key VALUE",
        ),
        ("--stages.head.train.epoch 2", "stages.head.train.epoch: unknown key; did you mean 'epochs'"),
        ("--stages.head.eval.images 2", "stages.head.eval: belongs to the whole run"),
    ],
)
def test_wrong_overrides_are_one_line(overrides, said, recipe):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides.split())
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(said)
    if overrides.startswith("--stages.head.train.epoch "):
        with pytest.raises(UserError, match="the recipe has no stages; leave out stages.head"):
            load_recipe("digits-standard", overrides.split())


def test_stages_in_python_are_checked_too(recipe):
    import dataclasses

    config = load_recipe(recipe)
    first = config.stages[0]
    assert isinstance(first, Stage)
    wrong = dataclasses.replace(first, method="trades")
    with pytest.raises(UserError, match="stages.classifier.method: must be the settings of a registered method"):
        dataclasses.replace(config, stages=(wrong,))
    with pytest.raises(UserError, match="two stages are called 'classifier'"):
        dataclasses.replace(config, stages=(first, first))


def test_settings_of_stages_change_nothing_after_training(done, capsys, monkeypatch):
    for command in ("evaluate", "certify"):
        monkeypatch.setattr(sys, "argv", ["clead", command, str(done.path), "--stages.head.train.epochs", "2"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert "--stages.head.train.epochs: changes nothing here" in capsys.readouterr().err


def test_a_stage_whose_attack_cannot_train_is_said_before_anything_is_written(recipe, tmp_path):
    overrides = ["--stages.head.method.name", "pgd_at", "--stages.head.attack.name", "square"]
    with pytest.raises(UserError, match="stages.head.attack.name: training needs an attack that maximises"):
        fit(recipe, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="looks at one training, got the stages classifier, contrast, head"):
        clead.api.profile(load_recipe(recipe))


# ------------------------------------------------------------------------------------------------ start_from


SMALL = shlex.split("""--data.limit_train 60 --data.batch_size 16 --model.width 4 --model.features 8 --attack.steps 1
--train.epochs 1 --train.validate_steps 1 --train.device cpu""")


def test_weights_of_another_run_are_the_start(done, tmp_path, monkeypatch):
    config = load_recipe("digits-standard", [*SMALL, "--optim.lr", "1e-30", "--optim.weight_decay", "0"])

    def learnt(name, start):
        import dataclasses

        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, start_from=str(start)))
        found = saved_weights(clead.train(changed, out=tmp_path / name, show=False).path)
        return {key: tensor for key, tensor in found.items() if "running" not in key and "num_batches" not in key}

    def expected(which):
        found = saved_weights(done.path / "stages" / NAMES[0], which)
        return {key: tensor for key, tensor in found.items() if "running" not in key and "num_batches" not in key}

    first = done.path / "stages" / NAMES[0]
    assert same(learnt("file", first / "last.safetensors"), expected("last"))
    assert same(learnt("run", first), expected("best"))  # what its eval.weights names
    assert not same(learnt("other", done.path), expected("last"))


def test_a_run_of_other_classes_and_sizes_is_a_start(done, tmp_path, capsys):
    pixels = torch.randint(0, 256, (24, 12, 12), dtype=torch.uint8).numpy()
    labels = torch.arange(24).numpy() % 3
    np.savez(tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    data = ["--data.name", "npz", "--data.path", str(tmp_path / "d.npz"), "--optim.lr", "1e-30"]
    config = load_recipe("digits-standard", [*SMALL, *data, "--train.start_from", str(done.path)])
    run = clead.train(config, out=tmp_path / "run", show=False)
    start, learnt = saved_weights(done.path, "best"), saved_weights(run.path)
    assert learnt["classifier.weight"].shape == (3, 8)
    learned = {name for name, _ in run.model.named_parameters()} - {"classifier.weight", "classifier.bias"}
    assert len(learned) > 6 and all(torch.equal(learnt[name], start[name]) for name in learned)
    noted = capsys.readouterr().err
    assert "the head classifier is new, drawn from the seed: 10 → 3 classes" in noted and "100% of the weights" in noted
    again = clead.train(config, out=tmp_path / "again", show=False)
    assert same(saved_weights(again.path), learnt)


def test_a_head_whose_outputs_stood_for_other_classes_is_said_so(done, tmp_path, capsys):
    x = torch.randint(0, 256, (60, 8, 8), dtype=torch.uint8).numpy()
    y = torch.arange(60).numpy() % 10
    names = ["1", "0", *map(str, range(2, 10))]
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=names)
    data = ["--data.name", "npz", "--data.path", str(tmp_path / "d.npz"), "--train.start_from", str(done.path)]
    clead.train(load_recipe("digits-standard", [*SMALL, *data]), out=tmp_path / "run", show=False)
    said = "is taken, although its outputs stood for other classes, or in another order: output 0 for '0', here for '1'"
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "run" / "notes.txt").read_text()
    start_from(clead.load(done.path), done.path, classes=list(map(str, range(10))))
    assert said not in capsys.readouterr().err


def test_mistakes_of_start_from_are_one_line(done, tmp_path):
    def said(path, *overrides):
        config = load_recipe("digits-standard", [*SMALL, "--train.start_from", str(path), *overrides])
        with pytest.raises(UserError) as caught:
            clead.train(config, out=tmp_path / "run", show=False)
        (problem,) = caught.value.problems
        assert "\n" not in problem and not (tmp_path / "run").exists()
        return problem

    start = done.path / "last.safetensors"
    assert "train.start_from" in said(start, "--model.width", "5") and "another architecture" in said(
        start, "--model.width", "5"
    )
    assert said(tmp_path / "nothing").startswith(f"train.start_from: no weights at {tmp_path}/nothing")
    assert "holds no file of weights; give one file" in said(tmp_path)
    save_weights(tmp_path / "little.safetensors", {"classifier.weight": torch.zeros(10, 8)}, {})
    assert "1 of the 30 tensors of Classifier fit, " in said(tmp_path / "little.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04")
    assert "bad.safetensors" in said(tmp_path / "bad.safetensors")


def test_the_recipes_finetune_on_request():
    for name in ("digits-clead-published", "cifar10-small-clead-published"):
        overrides = ["--data.path", "/nowhere"] if name.startswith("cifar") else []
        config = load_recipe(name, overrides)
        assert [s.name for s in config.stages] == ["classifier", "contrast", "head"]
        assert [t.train.trainable for t in config.trainings()] == ["all", "all", "classifier"]
        tuned = load_recipe(name, [*overrides, "--stages.head.train.trainable", "all"])
        assert tuned.trainings()[2].train.trainable == "all"
        contrast = config.trainings()[1]
        assert contrast.method.uses_stored and contrast.data.augment == type(contrast.data.augment)()
