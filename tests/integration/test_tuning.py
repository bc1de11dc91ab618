"""The search: a checked space, trials that are shared, taken up and never run twice, and a recipe that training takes."""

import csv
import dataclasses
import errno
import json
import math
import os
import shlex
import signal
import sys
import time

import pytest
import sqlalchemy as sql
import yaml
from optuna.storages.journal import JournalFileBackend

import clead
from clead import cli
from clead.api import read_record
from clead.config import load_recipe
from clead.data.datasets.digits import Digits
from clead.errors import UserError
from clead.tuning import study as study_file
from clead.tuning import tune
from clead.tuning.leases import Leases, TableLeases
from clead.tuning.results import Result, best_of, front
from clead.tuning.space import open_search
from clead.tuning.storage import JOURNAL, open_storage
from clead.tuning.trial import Failed, TrialPruned
from support import Killed

SPACE = ["--tune.space", "{optim.lr: {low: 1e-3, high: 1e-2, log: true}, attack.steps: {low: 2, high: 7}}"]
TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 120 --data.batch_size 16 --attack.steps 1
--train.budget null --train.epochs 2 --train.validate_every 0.4 --train.validate_steps 1 --train.device cpu --tune.suite pgd
--tune.images 10 --tune.seeds 1 --tune.during {}""")


def quick(search, values, folder, report=None):
    """Stands for a training: the best learning rate is 10^-2.5, the fewer steps the better."""
    robust = 0.8 - 0.2 * abs(math.log10(values["optim.lr"]) + 2.5) - 0.01 * values["attack.steps"]
    return {"clean": 0.9 + 0.01 * values["attack.steps"], "robust": robust, "images": 10}


def search(out, *overrides, trials=8, run=quick, say=lambda line: None, **keys):
    given = [*SPACE, "--tune.trials", str(trials), *overrides]
    return tune("digits-clead", given, out=out, show=False, say=say, run=run, **keys)


def table(folder):
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))


def outcomes(study):
    """What a study found, without times and counts of attempts."""
    return [dataclasses.replace(result, seconds=0, attempts=0) for result in study.results]


# ------------------------------------------------------------------------------------------------ the space


@pytest.mark.parametrize(
    "space, has",
    [
        ("{optim.rl: {low: 1e-3, high: 1}}", "tune.space: optim.rl: unknown key; did you mean 'lr'?"),
        ("{optm.lr: {low: 1e-3, high: 1}}", "tune.space.optm.lr: unknown group 'optm'; did you mean 'optim'?"),
        ("{optim: [1, 2]}", "tune.space.optim: is a group"),
        ("{optim.lr: {low: -1, high: 1}}", "tune.space: optim.lr: input should be greater than 0, got -1"),
        ("{optim.warmup: {low: 0.1, high: 1}}", "optim.warmup: input should be less than 1, got 1"),
        ("{threat.eps: {low: 1/255, high: 8}}", "did you mean 8.0/255?"),
        ("{optim.lr: {low: 1e-3, high: 1, hihg: 1}}", "tune.space.optim.lr.hihg: unknown key; did you mean 'high'?"),
        ("{optim.lr: {high: 1}}", "tune.space.optim.lr.low: is required"),
        ("{optim.lr: {low: 1, high: 0.1}}", "low must be below high, got 1 and 0.1"),
        ("{optim.momentum: {low: 0, high: 0.9, log: true}}", "a logarithm needs low above 0, got 0"),
        ("{optim.lr: {low: 0.1, high: 1, log: true, step: 0.1}}", "log and step do not go together, got step 0.1"),
        ("{optim.lr: {low: 0.1, high: 1, step: 0.4}}", "steps of 0.4 do not lead from 0.1 to 1"),
        ("{attack.steps: {low: 1, high: 3, step: 0.5}}", "is a whole number, so are low, high and step"),
        ("{attack.steps: {low: 0, high: 3}}", "attack.steps: input should be greater than or equal to 1, got 0"),
        ("{optim.name: {low: 1, high: 3}}", "optim.name: input should be 'sgd' or 'adamw', got 1"),
        ("{data.augment.flip: {low: 0, high: 1}}", "is no number; give a list of choices"),
        ("{optim.name: [sgd, adam]}", "optim.name: input should be 'sgd' or 'adamw', got 'adam'"),
        ("{optim.name: [sgd, sgd]}", "choices are different numbers, words"),
        ("{optim.milestones: [[0.5], [0.6]]}", "choices are different numbers, words"),
        ("{optim.lr: 0.1}", "must be a range or a list, got 0.1; give {low: …, high: …}"),
        ("{method.name: [clead, trades]}", "another method has other keys; search each by itself, with --method.name"),
        ("{stages.first: [1]}", "a setting of a stage is stages.NAME.group.key"),
        ("{eval.steps: [1, 2]}", "every trial must be measured alike"),
        ("{train.seed: [1, 2]}", "every trial must be measured alike"),
        ("{train.validate_steps: [1, 2]}", "every trial must be measured alike"),
        ("{data.limit_train: [100, 200]}", "every trial must be measured alike"),
        ("{}", "tune.space: says what to search, digits-clead has none"),
        ("[optim.lr]", "tune.space: input should be a valid dictionary"),
        ("{optim.lr: {low: 1e-3, high: 1}}\n--tune.during {optim.lr: 1}", "tune.during.optim.lr: is in the space too"),
        ("{optim.lr: {low: 1e-3, high: 1}}\n--tune.during {optim.rl: 1}", "tune.during: optim.rl: unknown key"),
        (
            "{optim.lr: {low: 1e-3, high: 1}}\n--tune.trials 0",
            "tune.trials: input should be greater than or equal to 1",
        ),
        ("{optim.lr: {low: 1e-3, high: 1}}\n--tune.trails 3", "tune.trails: unknown key; did you mean 'trials'?"),
        ("{optim.lr: {low: 1e-3, high: 1}}\n--method.name acl", "method.name: a trial's score is its accuracy"),
    ],
)
def test_a_wrong_space_is_named(space, has):
    value, _, more = space.partition("\n")
    with pytest.raises(UserError) as caught:
        open_search("digits-clead", ["--tune.space", value, *more.split(" ", 1)] if more else ["--tune.space", value])
    assert len(caught.value.problems) == 1 and has in str(caught.value), caught.value


def test_every_problem_of_a_space_has_its_line():
    with pytest.raises(UserError) as caught:
        open_search("digits-clead", ["--tune.space", "{optim.rl: [1], optim.lr: [0], train.seed: [1]}"])
    assert len(caught.value.problems) == 3


def test_the_command_line_changes_the_space_key_by_key():
    found = open_search(
        "digits-clead",
        ["--tune.space.optim.lr", "null", "--tune.space.optim.clip_norm", "[null, 1]", "--optim.warmup=0.3"],
    )
    assert "optim.lr" not in found.distributions and found.distributions["optim.clip_norm"].choices == (None, 1)
    assert found.config.optim.warmup == 0.3
    assert found.trial_config({"optim.clip_norm": None}).optim.clip_norm is None


def test_shipped_spaces_hold_their_recipes_own_values():
    for recipe in ("digits-clead", "cifar10-small-clead"):
        found = open_search(recipe)
        own = found.own_values()
        assert own is not None and len(own) == len(found.distributions) > 2
        tree = found.found_config(own).to_dict()
        assert {**tree, "name": recipe} == load_recipe(recipe).to_dict()


def test_own_values_outside_of_the_space_are_none():
    for values in ("[1, 2]", "{low: 0.005, high: 0.1}", "{low: 0.001, high: 0.007, step: 0.002}"):
        assert open_search("digits-clead", ["--tune.space", f"{{optim.lr: {values}}}"]).own_values() is None
    inside = open_search("digits-clead", ["--tune.space", "{optim.lr: {low: 0.001, high: 0.01, step: 0.001}}"])
    assert inside.own_values() == {"optim.lr": 0.004}


def test_numbers_reach_the_configuration_to_the_last_bit():
    found = open_search("digits-clead", SPACE)
    for value in (1 / 3e2, 1e-05, 0.1 + 0.2):
        assert found.trial_config({"optim.lr": value}).optim.lr == value


def test_a_key_of_all_stages_reaches_each_and_one_of_a_stage_only_that():
    staged = open_search(
        "digits-acl",
        ["--tune.space", "{optim.lr: {low: 1e-3, high: 1}, stages.2.train.epochs: {low: 1, high: 3}}"],
    )
    config = staged.trial_config({"optim.lr": 0.005, "stages.2.train.epochs": 2.0})
    assert [stage.optim.lr for stage in config.stages] == [0.005] * len(config.stages)
    assert config.stages[1].train.epochs == 2 and config.stages[0].train.epochs != 2


def test_a_trial_is_measured_against_the_recipes_threat_on_validation_images():
    from clead.tuning.trial import _measured

    found = open_search("digits-clead", ["--tune.space", "{threat.eps: [0.1, 0.2]}"])
    measured = _measured(found, found.trial_config({"threat.eps": 0.2}))
    assert measured.threat.eps == 0.15 and measured.eval.split == "val"
    assert not found.prunes and open_search("digits-clead").prunes


def test_training_ignores_the_group_and_refuses_its_keys(tmp_path):
    config = load_recipe("digits-clead")
    assert "tune" not in config.to_dict()
    with pytest.raises(UserError, match="--tune.trials: changes nothing here; give it to clead tune"):
        load_recipe("digits-clead", ["--tune.trials", "3"])


# ------------------------------------------------------------------------------------------------ a study


@pytest.fixture(autouse=True)
def _few_plots(request, monkeypatch):
    """Draw in the tests that look at plots: they take longer than a study of stand-ins."""
    if request.function not in (test_what_a_study_writes, test_the_command_from_end_to_end):
        real = study_file.write_results
        monkeypatch.setattr(study_file, "write_results", lambda *a, **k: real(*a, **{**k, "plots": False}))


def test_a_study_begins_with_the_recipe_and_beats_it(tmp_path):
    said = []
    found = search(tmp_path / "study", trials=12, say=said.append)
    assert [result.number for result in found.results] == list(range(12)) and found.trials_here == 12
    assert found.results[0].values == {"optim.lr": 0.004, "attack.steps": 5}
    assert {len(set(result.values.items())) for result in found.results} == {2}
    assert found.best.score == max(result.score for result in found.results) > found.results[0].score
    first = found.results[0]
    assert first.score == pytest.approx(0.8 * first.robust + 0.2 * first.clean, abs=1e-12)
    lines = [line for line in said if line.startswith("trial ")]
    assert len(lines) == 12 and lines[-1].endswith(f"; best {found.best.score:.4f} by trial {found.best.number}")


def test_what_a_study_writes(tmp_path):
    found = search(tmp_path / "study", "--tune.during.data.val_fraction", "0.25")
    recipe = tmp_path / "study" / "best.yaml"
    tuned = load_recipe(str(recipe))
    assert (
        tuned.name == "digits-clead-tuned" and tuned.data.val_fraction == load_recipe("digits-clead").data.val_fraction
    )
    assert tuned.optim.lr == found.best.values["optim.lr"] and tuned.attack.steps == found.best.values["attack.steps"]
    assert open_search(str(recipe)).distributions == found.search.distributions  # and can be searched further
    assert found.search.trial_config({}).data.val_fraction == 0.25
    rows = table(tmp_path / "study")
    assert [float(row["optim.lr"]) for row in rows] == [result.values["optim.lr"] for result in found.results]
    assert [float(row["score"]) for row in rows] == [result.score for result in found.results]
    content = json.loads((tmp_path / "study" / "trials.json").read_text())
    assert content["best"] == found.best.number and [row["attempts"] for row in content["trials"]] == [1] * 8
    for name in ("history", "importance", "front"):
        assert (tmp_path / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "study" / f"{name}.svg").read_text()
    assert not list((tmp_path / "study").rglob(".*"))


def test_a_search_can_be_repeated(tmp_path):
    one, two = (search(tmp_path / name, trials=12) for name in ("one", "two"))
    assert outcomes(one) == outcomes(two)
    other = search(tmp_path / "three", "--tune.seed", "1", trials=12)
    assert other.results[0].values == one.results[0].values and other.results[1].values != one.results[1].values


@pytest.fixture
def kernel(monkeypatch):
    """Return what frees the locks of a process that died, which here lives on."""
    made, real = [], Leases.__init__
    monkeypatch.setattr(Leases, "__init__", lambda self, *given: made.append(self) or real(self, *given))
    return lambda: [leases.release(name) for leases in made for name in list(leases._files)]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["run", "ask", "enqueue", "begun", "tell", "told"])
def test_a_trial_of_a_dead_process_is_run_again_exactly_once(where, tmp_path, monkeypatch, kernel):
    """As if by a kill at every place of a trial's life; the study ends up as if there had been none."""
    whole = search(tmp_path / "whole", trials=12)
    runs = []

    def counted(search, values, folder, report):
        runs.append(folder.name)
        if where == "run" and len(runs) == 5:
            raise Killed
        return quick(search, values, folder)

    with monkeypatch.context() as patch:
        target, name = {
            "run": (None, None),
            "enqueue": (study_file.optuna.Study, "enqueue_trial"),
            "ask": (study_file.optuna.Study, "ask"),
            "begun": (study_file._Worker, "_begun"),
            "tell": (study_file._Worker, "_tell"),
            "told": (study_file, "write_results"),
        }[where]
        calls = []

        def dying(*arguments, **keys):
            after = where != "tell"
            result = real(*arguments, **keys) if after else None
            calls.append(1)
            if len(calls) == (1 if where == "enqueue" else 5):
                raise Killed
            return result if after else real(*arguments, **keys)

        if name is not None:
            real = getattr(target, name)
            patch.setattr(target, name, dying)
        with pytest.raises(Killed):
            search(tmp_path / "killed", trials=12, run=counted)
    kernel()
    again = search(tmp_path / "killed", trials=12, run=counted)
    assert outcomes(again) == outcomes(whole)
    twice = {"run", "tell"} & {where}
    assert len(runs) == 12 + len(twice) and len(set(runs)) == 12
    attempts = [result.attempts for result in again.results]
    assert attempts == [1 + (n == 4 and where in ("run", "begun", "tell")) for n in range(12)]


def test_a_trial_that_kills_its_process_each_time_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(study_file, "_MOST_ATTEMPTS", 2)

    def deadly(search, values, folder, report):
        if folder.name == "0001":
            raise Killed
        return quick(search, values, folder)

    for _ in range(2):
        with pytest.raises(Killed):
            search(tmp_path / "study", trials=3, run=deadly)
    found = search(tmp_path / "study", trials=3, run=deadly)
    assert [result.state for result in found.results] == ["complete", "failed", "complete"]
    assert found.results[1].why == "its process died 2 times"


def test_a_finished_study_does_nothing_and_more_trials_go_on(tmp_path):
    before = search(tmp_path / "study", trials=4)
    again = search(tmp_path / "study", trials=4, run=None)
    assert again.trials_here == 0 and outcomes(again) == outcomes(before)
    more = search(tmp_path / "study", trials=6)
    assert more.trials_here == 2 and outcomes(more)[:4] == outcomes(before)
    # The target is the study's: without a word on it, whatever the recipe says, there is nothing to do.
    assert tune("digits-clead", SPACE, out=tmp_path / "study", show=False, say=str, run=None).trials_here == 0


def test_a_study_of_another_search_is_refused_by_name(tmp_path):
    search(tmp_path / "study", trials=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").iterdir() if path.name != "locks"}
    for overrides, has in (
        (["--tune.space.attack.steps", "{low: 2, high: 9}"], "tune.space.attack.steps.high: the study has 7, got 9"),
        (["--tune.space.attack.steps", "null"], "tune.space.attack.steps"),
        (["--tune.space.optim.warmup", "[0.1, 0.2]"], "tune.space.optim.warmup: the study has none, got [0.1, 0.2]"),
        (["--tune.seeds", "3"], "tune.seeds: the study has 2, got 3"),
        (["--tune.pareto", "true"], "tune.pareto: the study has false, got true"),
        (["--threat.eps", "0.1"], "recipe.threat.eps: the study has 0.15, got 0.1"),
    ):
        with pytest.raises(UserError) as caught:
            search(tmp_path / "study", *overrides, trials=2, run=None)
        assert has in str(caught.value) and "give another --out" in caught.value.problems[-1]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").iterdir() if path.name != "locks"}


def test_a_study_that_another_process_is_just_making_is_joined(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.journal").touch()  # the first of the files that a study makes
    assert len(search(tmp_path / "study", trials=1).results) == 1


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is neither empty nor a study"):
        search(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_trials_that_fall_behind_are_stopped(tmp_path):
    """Eight good trials, then one that is bad from its third tenth on: it never reaches its end."""
    seen = {}

    def staged(search, values, folder, report):
        number, scores = int(folder.name), seen.setdefault(folder.name, [])
        for rung in range(1, 10):
            scores.append(rung)
            if report(rung, 0.1 if number == 8 else 0.5 + 0.01 * number):
                raise TrialPruned
        return {"clean": 0.9, "robust": 0.5 + 0.01 * number, "images": 10}

    found = search(tmp_path / "study", trials=9, run=staged)
    states = [result.state for result in found.results]
    assert states[8] == "pruned" and found.results[8].score is None and len(seen["0008"]) == 3
    assert states[:6] == ["complete"] * 6

    def deaf(search, values, folder, report):
        assert report is None
        return quick(search, values, folder)

    search(tmp_path / "all", "--tune.prune", "false", run=deaf)


@pytest.mark.parametrize("pareto", ["false", "true"])
def test_a_trial_that_fails_is_said_and_counts(pareto, tmp_path):
    def failing(search, values, folder, report):
        if int(folder.name) % 3 == 1:
            raise Failed("diverged: loss became nan")
        return quick(search, values, folder)

    found = search(tmp_path / "study", "--tune.pareto", pareto, trials=14, run=failing)
    assert [r.state for r in found.results] == [("complete", "failed", "complete")[n % 3] for n in range(14)]
    assert found.results[1].why == "diverged: loss became nan" and found.results[1].score is None


def test_values_that_do_not_go_together_fail_alone(tmp_path):
    space = ["--tune.space", "{train.ema: [0, 0.9], train.swa_start: [null, 0.5]}", "--tune.trials", "12"]

    def checked(search, values, folder, report):
        assert not values["train.ema"] or values["train.swa_start"] is None
        return {"clean": 0.9, "robust": 0.5 + values["train.ema"] / 10, "images": 10}

    found = tune("digits-clead", space, out=tmp_path / "study", show=False, say=str, run=checked)
    failed = [result for result in found.results if result.values == {"train.ema": 0.9, "train.swa_start": 0.5}]
    assert failed and all("give one of ema and swa_start" in result.why for result in failed)
    assert [r for r in found.results if r.state == "failed"] == failed and found.best.values["train.ema"] == 0.9


def test_no_complete_trial_no_recipe(tmp_path, monkeypatch, capsys):
    def failing(*arguments):
        raise Failed("the device is out of memory")

    found = search(tmp_path / "study", trials=2, run=failing)
    assert found.best is None and not (tmp_path / "study" / "best.yaml").exists()
    from clead.cli.tune import _print

    with pytest.raises(UserError, match="no trial came to its end"):
        _print(found)
    assert "2 trials: 0 complete, 0 pruned, 2 failed" in capsys.readouterr().out


def test_the_front(tmp_path):
    def result(number, robust, clean):
        score = None if robust is None else robust
        return Result(number, "complete", {}, score, robust, clean, 1, 0, 1, "")

    found = [result(0, 0.5, 0.9), result(1, 0.6, 0.8), result(2, 0.4, 0.8), result(3, 0.6, 0.8), result(4, None, None)]
    assert [r.number for r in front(found)] == [1, 0] and best_of(found).number == 1
    study = search(tmp_path / "study", "--tune.pareto", "true", trials=12)
    line = front(study.results)
    assert len(line) > 1  # more steps: cleaner, less robust
    names = {path.name for path in (tmp_path / "study" / "front").iterdir()}
    assert names >= {f"trial-{result.number:04}.yaml" for result in line}
    steps = [load_recipe(str(tmp_path / "study" / "front" / f"trial-{r.number:04}.yaml")).attack.steps for r in line]
    assert steps == [r.values["attack.steps"] for r in line]


# ------------------------------------------------------------------------------------------------ storage and leases


def test_half_a_line_in_the_journal_is_cut_off(tmp_path):
    """A full disk or a kill while a line is written must not cost the study: what follows would be glued to it."""
    before = search(tmp_path / "study", trials=3)
    journal = tmp_path / "study" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,"worker_id":"ab')
    more = search(tmp_path / "study", trials=5)
    assert outcomes(more)[:3] == outcomes(before) and len(more.results) == 5
    assert all(json.loads(line) for line in journal.read_text().splitlines())


DAMAGED_LINES = {
    "no json": b"{",
    "empty": b"",
    "list": b"[1]",
    "number": b"12",
    "null": b"null",
    "bytes": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "digits": b"9" * 10_000,
    "other key": b'{"op_co":5}',
    "no worker": b'{"op_code":5}',
    "operation": b'{"op_code":99,"worker_id":"a"}',
    "no study": b'{"op_code":4,"worker_id":"a"}',
    "no direction": b'{"op_code":0,"worker_id":"a","study_name":"b","directions":["up"]}',
    "a word for an operation": b'{"op_code":"trial","worker_id":"a"}',
}


@pytest.fixture(scope="module")
def journal_of_a_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal")
    search(folder / "study", trials=2)
    return (folder / "study" / JOURNAL).read_bytes()


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
@pytest.mark.parametrize("at", [0, 3, None], ids=["first", "fourth", "last"])
def test_a_damaged_line_of_the_journal_is_named(line, at, journal_of_a_study, tmp_path):
    lines = journal_of_a_study.splitlines()
    number = (len(lines) if at is None else at) + 1
    lines.insert(number - 1, line)
    (tmp_path / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError) as caught:
        open_storage(tmp_path, None, "study", 1)
    (message,) = caught.value.problems
    assert f"{JOURNAL} line {number} is damaged" in message and "--out" in message and "\n" not in message


def test_a_damaged_journal_is_named(tmp_path):
    search(tmp_path / "study", trials=2)
    journal = tmp_path / "study" / JOURNAL
    before = journal.read_bytes().replace(b'{"op_code"', b'{"op_co', 1)
    journal.write_bytes(before)
    with pytest.raises(UserError, match="study.journal line 1 is damaged"):
        search(tmp_path / "study", trials=2)
    assert journal.read_bytes() == before


def rows(tmp_path, silence=60.0, study="study"):
    return TableLeases(sql.create_engine(f"sqlite:///{tmp_path}/base.db"), study, silence)


@pytest.mark.parametrize("kind", ["files", "rows", "both"])
def test_a_lease_has_one_holder(kind, tmp_path):
    def leases():
        if kind == "rows":
            return rows(tmp_path)
        return Leases(tmp_path / "locks", rows(tmp_path) if kind == "both" else None)

    one, two = leases(), leases()
    assert one.acquire("a") and not two.acquire("a") and two.acquire("b")
    assert one.is_held("a") and not two.is_held("a") and not one.is_held("b")
    one.release("a")
    assert not one.is_held("a") and two.acquire("a") and not one.acquire("a")


def test_the_holder_of_a_row_that_falls_silent_loses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(TableLeases, "_beat", lambda self: None)
    one, two, three = (rows(tmp_path, silence=30.0) for _ in range(3))
    assert one.acquire("a") and not two.acquire("a")
    with one._engine.begin() as connection:  # as if half a minute had passed
        connection.execute(sql.text("update clead_leases set beat = datetime(beat, '-40 seconds')"))
    assert one.is_held("a")  # nobody took it
    assert two.acquire("a") and not one.is_held("a") and not three.acquire("a") and not one.acquire("a")
    one.release("a")  # is no longer its own
    assert two.is_held("a")
    assert rows(tmp_path, study="other").acquire("a")


def test_a_beating_heart_keeps_the_row(tmp_path):
    one, two = rows(tmp_path, silence=0.4), rows(tmp_path, silence=3.0)
    assert one.acquire("a")
    with one._engine.begin() as connection:
        connection.execute(sql.text("update clead_leases set beat = datetime(beat, '-40 seconds')"))
    deadline = time.monotonic() + 30
    while two.acquire("a"):  # until the thread has said that the first one lives
        two.release("a")
        assert time.monotonic() < deadline
        one.acquire("a")
        time.sleep(0.05)
    assert one.is_held("a")


def test_a_process_on_the_same_disk_is_not_taken_for_dead(tmp_path, monkeypatch):
    """A stopped process is silent, but its lock on the trial's file holds: it writes into that directory when it goes on."""
    monkeypatch.setattr(TableLeases, "_beat", lambda self: None)
    one, two = (Leases(tmp_path / "locks", rows(tmp_path)) for _ in range(2))
    assert one.acquire("a")
    with sql.create_engine(f"sqlite:///{tmp_path}/base.db").begin() as connection:
        connection.execute(sql.text("update clead_leases set beat = datetime(beat, '-400 seconds')"))
    assert not two.acquire("a") and one.is_held("a")


def test_a_process_that_lost_its_trial_leaves_it_to_the_other(tmp_path, monkeypatch):
    """Silent for too long on another machine: what it found then does not count, and the trial is not told twice."""
    monkeypatch.setattr(TableLeases, "_beat", lambda self: None)
    url, said = f"sqlite:///{tmp_path}/base.db", []

    def robbed(search, values, folder, report):
        if folder.name == "0001" and not (tmp_path / "robbed").exists():
            (tmp_path / "robbed").touch()
            with sql.create_engine(url).begin() as connection:
                connection.execute(sql.text("update clead_leases set holder = 'x' where name = 'trial-0001'"))
                # Dead since long ago, so that the study can go on.
                connection.execute(sql.text("update clead_leases set beat = datetime(beat, '-400 seconds')"))
            return {"clean": 1.0, "robust": 1.0, "images": 10}
        return quick(search, values, folder)

    found = search(tmp_path / "study", trials=3, run=robbed, storage=url, say=said.append)
    assert found.results[1].robust < 1 and found.results[1].attempts == 2
    assert any("another process has it; its result is the one that counts" in line for line in said)


@pytest.mark.parametrize(
    "url, has",
    [
        (
            "postgresql+psycopg2://me:hush@localhost:1/base",
            "postgresql+psycopg2://me:***@localhost:1/base refuses: connection",
        ),
        ("postgresql://me:hush@localhost:1/base", "refuses"),
        ("no url", "must be a database's URL, got 'no url'; give such as --storage postgresql:"),
        ("postgresql:/me:hush@host", "must be a database's URL"),
        ("nobase://localhost/x", "nobase://localhost/x: its driver is not installed"),
        ("mysql://me:hush@localhost/x", "its driver is not installed"),
        ("sqlite:////no/such/folder/base.db", "refuses: unable to open database file"),
    ],
)
def test_a_storage_that_refuses_is_one_line_without_its_password(url, has, tmp_path):
    with pytest.raises(UserError) as caught:
        search(tmp_path / "study", storage=url)
    said = str(caught.value)
    assert has in said and "\n" not in said and "hush" not in said and len(said) < 500
    assert not (tmp_path / "study").exists()


def test_a_password_is_written_nowhere(monkeypatch):
    from clead.results.provenance import command as shown

    monkeypatch.setattr(
        sys, "argv", ["clead", "tune", "--storage", "postgresql://me:hush:@host/base", "--data.path", "a:b@c"]
    )
    assert shown() == "clead tune --storage postgresql://me:***@host/base --data.path a:b@c"


def test_a_full_disk_stops_the_study_and_nothing_is_lost(tmp_path, monkeypatch):
    def full(self, logs):
        calls.append(1)
        if len(calls) > 30:
            with open(tmp_path / "study" / JOURNAL, "ab") as file:
                file.write(b'{"op_code":6,"work')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, logs)

    calls, real = [], JournalFileBackend.append_logs
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(UserError, match="No space left on device; free some space, then give the command again"):
            search(tmp_path / "study", trials=8)
    assert len(search(tmp_path / "study", trials=8).results) == 8
    assert outcomes(search(tmp_path / "study", trials=8)) == outcomes(search(tmp_path / "whole", trials=8))


def test_missing_data_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        tune("cifar10-small-clead", ["--data.path", "nowhere"], show=False, say=str)
    assert not list(tmp_path.iterdir())


def test_two_studies_of_a_database_do_not_mix(tmp_path):
    url = f"sqlite:///{tmp_path}/base.db"
    search(tmp_path / "one", trials=2, storage=url)
    with pytest.raises(UserError, match="tune.seeds: the study has 2, got 3"):
        search(tmp_path / "two", "--tune.seeds", "3", trials=2, storage=url)
    assert not (tmp_path / "two").exists()
    other = search(tmp_path / "two", "--tune.seeds", "3", trials=3, storage=url, study="another")
    assert len(other.results) == 3
    with pytest.raises(UserError, match="keeps a journal, got a database"):
        search(tmp_path / "three", trials=2)
        search(tmp_path / "three", trials=2, storage=url)


# ------------------------------------------------------------------------------------------------ real trainings


def real(out, *overrides, **keys):
    given = [*SPACE[:1], "{optim.lr: {low: 1e-3, high: 1e-2, log: true}}", *TINY, *overrides]
    return tune("digits-clead", given, out=out, show=False, say=lambda line: None, **keys)


@pytest.mark.slow
def test_a_study_never_touches_the_test_images(tmp_path, monkeypatch):
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, *a, **k: dataclasses.replace(load(self, *a, **k), test=None))
    found = real(tmp_path / "study", "--tune.trials", "2", "--tune.seeds", "2")
    assert [result.state for result in found.results] == ["complete"] * 2 and found.best.images == 10
    runs = sorted(path.name for path in (tmp_path / "study" / "trials").iterdir())
    assert runs == ["0000-seed-0", "0000-seed-1", "0001-seed-0", "0001-seed-1"]
    records = [read_record(tmp_path / "study" / "trials" / r / "results" / "validation.json") for r in runs]
    assert {record.data.split for record in records} == {"val"}
    means = [(records[i].robust_accuracy + records[i + 1].robust_accuracy) / 2 for i in (0, 2)]
    assert [result.robust for result in found.results] == pytest.approx(means)
    assert found.results[0].values == {"optim.lr": 0.004}
    monkeypatch.undo()
    trained = clead.train(load_recipe(str(tmp_path / "study" / "best.yaml")), out=tmp_path / "best", show=False)
    assert trained.outcome.steps > 0


def test_a_trial_that_falls_behind_stops_its_training_cleanly(tmp_path, monkeypatch):
    """Its validations are reported at tenths of the training, and none after it was told to stop."""
    from clead.tuning.trial import run_trial

    found = open_search("digits-clead", [*SPACE, *TINY])
    reports = []
    before = signal.getsignal(signal.SIGINT)

    def report(rung, score):
        reports.append((rung, score))
        return rung >= 4

    with pytest.raises(TrialPruned):
        run_trial(found, {"optim.lr": 0.004}, tmp_path / "0000", report)
    assert [rung for rung, _ in reports] == [1, 3, 5] and signal.getsignal(signal.SIGINT) == before
    run = clead.runs.directory.RunDir(tmp_path / "0000-seed-0")
    lines = [line for line in run.history() if line["kind"] == "validation"]
    assert [score for _, score in reports] == [
        found.score(line["clean_accuracy"], line["robust_accuracy"]) for line in lines
    ]
    assert not (run.path / "outcome.json").exists() and not (run.path / "last.safetensors").exists()


def test_too_little_memory_fails_one_trial_and_another_error_is_no_trial(tmp_path, monkeypatch):
    from clead.tuning import trial

    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(trial, "_run_seed", fail)
    for said, error in (("DefaultCPUAllocator: can't allocate memory", Failed), ("shapes do not match", RuntimeError)):
        with pytest.raises(error, match="the device is out of memory" if error is Failed else said):
            trial.run_trial(open_search("digits-clead"), {}, tmp_path / "0000", None)


def test_a_training_that_diverges_fails_its_trial(tmp_path):
    found = real(
        tmp_path / "study", "--tune.trials", "1", "--tune.space", "{optim.lr: [1e30]}", "--optim.clip_norm", "null"
    )
    assert found.results[0].state == "failed" and "diverged" in found.results[0].why


def test_ctrl_c_keeps_the_trial_for_the_next_call(tmp_path):
    def interrupted(search, values, folder, report):
        if folder.name == "0001":
            raise KeyboardInterrupt
        return quick(search, values, folder)

    with pytest.raises(KeyboardInterrupt, match="the same command with --out .* goes on"):
        search(tmp_path / "study", trials=3, run=interrupted)
    found = search(tmp_path / "study", trials=3)
    assert [result.attempts for result in found.results] == [1, 2, 1]


# ------------------------------------------------------------------------------------------------ the command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["clead", "tune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = ["digits-clead", *TINY, "--tune.space", "{optim.lr: [0.004, 0.002]}", "--out", tmp_path / "study"]
    code, out, _ = command(monkeypatch, capsys, *arguments, "--trials", "2")
    assert code == 0 and "2 trials: 2 complete, 0 pruned, 0 failed" in out and "the test set was not touched" in out
    assert f"next: clead train {tmp_path}/study/best.yaml --out {tmp_path}/study/best\n" in out
    assert "the recipe's own values: trial 0, robust" in out
    assert yaml.safe_load((tmp_path / "study" / "best.yaml").read_text())["tune"]["trials"] == 2
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0 and "nothing was left to do; --trials 4 goes on" in out


@pytest.mark.parametrize(
    "arguments, has",
    [
        ("", "give one recipe"),
        ("digits-claed", "did you mean 'digits-clead'"),
        ("digits-trades", "tune.space: says what to search, digits-trades has none"),
        ("digits-clead --trials 0", "tune.trials: input should be greater than or equal to 1, got 0"),
        ("digits-clead --trials many", "tune.trials: input should be a valid integer"),
        ("digits-clead --storage nowhere", "--storage: must be a database's URL"),
        ("digits-clead --study mine", "--study: names a study in a database, got mine without --storage"),
        ("digits-clead --silence 0", "--silence: must be above 0 seconds, got 0"),
        ("digits-clead --train.device tpu", "train.device: no device 'tpu' here"),
        ("digits-clead --tune.space.optim.rl [1]", "optim.rl: unknown key; did you mean 'lr'?"),
    ],
)
def test_one_line_says_it(arguments, has, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, *shlex.split(arguments), "--out", "study")
    assert code == 2 and has in err and err.count("\n") == 1 and err.startswith("clead: error: ") and out == ""
    assert not list(tmp_path.iterdir())


def test_help_says_every_key(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--help")
    assert code == 0 and "test set is not touched" in out
    for field in dataclasses.fields(open_search("digits-clead").settings):
        assert f"--tune.{field.name} " in out
