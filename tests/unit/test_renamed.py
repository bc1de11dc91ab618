"""Old names: each works, says its new one once in a process, and what is stored under it is found."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import clead
from clead import renamed
from clead.config import Eval, RunConfig, load_recipe
from clead.evaluation import suites
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.state import ResumableResults, read_header
from clead.interfaces import ImageSet
from clead.registry import Registry
from clead.results.record import Record
from clead.results.target import EvaluationTarget
from clead.runs.directory import RunDir
from clead.settings import validated
from clead.threats import THREATS
from clead.threats.linf import Linf
from support import ROOT


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(renamed, "_warned", set())


def small() -> tuple[nn.Module, ImageSet]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        x = torch.rand(20, 1, 4, 4)
    return net, ImageSet(x, net(x).argmax(1))


def test_a_suite_by_its_old_name_is_taken_and_noted_once(capsys):
    note = "note: eval.suite queries is called black_box now; the old name goes with version 0.3\n"
    assert load_recipe("digits-standard", ["--eval.suite", "queries"]).eval.suite == "black_box"
    assert capsys.readouterr().err == note
    assert validated(Eval, {"suite": "queries"}).suite == "black_box"
    assert [each.name for each in suites.suite("queries", "linf", 10)[0]] == ["Square", "RayS"]
    net, images = small()
    options: dict[str, Any] = {"eps": 0.01, "steps": 1, "check_images": 0, "curve_points": 0}
    assert clead.evaluate(net, images.images, images.labels, suite="queries", **options).suite == "black_box"
    assert capsys.readouterr().err == ""


def test_the_command_line_takes_the_old_name(capsys):
    from clead.cli.evaluate import _with_suite

    assert _with_suite("queries", []) == ["--eval.suite", "black_box"]
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_and_records_of_the_old_name_are_read_in_silence(tmp_path, capsys):
    tree = load_recipe("digits-standard").to_dict()
    tree["eval"]["suite"] = "black_box"
    run = RunDir.create(tmp_path / "run", RunConfig.from_dict(tree))
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("black_box", "queries"))
    assert run.config().eval.suite == "black_box"
    net, images = small()
    options: dict[str, Any] = {"eps": 0.01, "steps": 1, "check_images": 0, "curve_points": 0}
    new = clead.evaluate(net, images.images, images.labels, suite="black_box", **options)
    old = Record.model_validate_json(new.model_dump_json().replace('"black_box"', '"queries"'))
    assert old == new and suites.in_words(old) == "suite black_box with 1 step instead of its own, not AutoAttack"
    assert capsys.readouterr().err == ""


def test_a_state_of_the_old_name_is_continued(tmp_path, monkeypatch):
    """Its parts are signed for the header they were made with, which keeps the old name."""
    net, images = small()
    settings = Eval(suite="black_box", steps=2, batch_size=8, curve_points=0, check_images=0)
    target = EvaluationTarget("small", "Linear", "given", "given", "test", "given", ("a", "b", "c"))
    header, current = ResumableResults.__init__, {"suite": "queries"}

    def evaluate() -> Any:
        options = EvaluationOptions(state=tmp_path / "state", show=False)
        return evaluate_model(net, images, Linf(eps=0.05), settings, target, options=options)

    with monkeypatch.context() as patch:
        patch.setattr(
            ResumableResults,
            "__init__",
            lambda self, path, values, **how: header(self, path, {**values, **current}, **how),
        )
        first = evaluate().record
    assert json.loads((tmp_path / "state" / "state.json").read_text())["suite"] == "queries"
    (tmp_path / "state" / "000001-02.safetensors").unlink()
    again = evaluate().record
    assert again.suite == "black_box" and again.robust_flags == first.robust_flags
    assert any(note.startswith("continued from a state with 8 finished parts") for note in again.notes)
    assert read_header(tmp_path / "state")["suite"] == "queries"
    assert evaluate().record.robust_flags == first.robust_flags, "what was added is signed as the rest"


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("clead.data.decoding", "Fit", "ResizeSpec"),
        ("clead.data.base", "Found", "RawSplits"),
        ("clead.methods.base", "Step", "StepContext"),
        ("clead.results.record", "CheckPart", "Check"),
        ("clead.threats.geometry", "room", "box_slack"),
        ("clead.api", "evaluate_foreign", "evaluate_external"),
        ("clead.config", "bare_config", "evaluation_config"),
    ],
)
def test_names_of_python_warn_once(module, old, new):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old}: write {module}\.{new}; the old name goes with"):
        assert getattr(import_module(module), old) is getattr(import_module(module), new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(import_module(module), old) is getattr(import_module(module), new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = import_module(module).nothing


def test_old_names_of_fields_warn_once():
    record = Record.model_validate_json((ROOT / "tests/data/records/cifar10-small-trades-s0-standard.json").read_text())
    attack: Any = record.attacks[0]
    with pytest.warns(DeprecationWarning, match=r"AttackResult\.broken: write num_successes; the old name goes with"):
        assert attack.broken == attack.num_successes
    assert attack.broken == attack.num_successes
    with pytest.warns(DeprecationWarning, match=r"AttackResult\.largest: write max_distance"):
        assert attack.largest == attack.max_distance
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attack.nothing
    result = renamed.RenamedFields(num_successes=3)
    with pytest.warns(DeprecationWarning, match="broken: write num_successes"):
        assert result["broken"] == 3
    with pytest.raises(KeyError, match="largest"):
        result["largest"]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("clead.report.record", "clead.results.record", "Record"),
        ("clead.evaluation.detection", "clead.measurements.detection", "Mahalanobis"),
    ],
)
def test_modules_of_the_first_documentation_lead_to_the_new_ones(old, new, name):
    with pytest.warns(DeprecationWarning, match=rf"{old}\.{name}: write {new}\.{name}; "):
        assert getattr(import_module(old), name) is getattr(import_module(new), name)


def test_a_plug_in_with_a_method_of_the_old_name_serves():
    registry: Registry[Any] = Registry("attack", "clead.attacks", {"search": "perturb"})

    class Base:
        def perturb(self) -> str:
            return "base"

    with pytest.warns(DeprecationWarning, match=r"Old\.search: write perturb"):

        @registry.register("old")
        class Old(Base):
            def search(self) -> str:
                return "searched"

    assert Old().perturb() == "searched"


def test_a_plug_in_may_call_a_built_in_by_the_old_name():
    threat: Any = THREATS.get("linf")(eps=0.1)
    delta = torch.tensor([[[[0.1, -0.3]]]])
    with pytest.warns(DeprecationWarning, match=r"Linf\.size: write distance"):
        assert threat.size(delta) == threat.distance(delta) == 0.3


def test_the_state_of_a_method_under_its_old_name():
    from clead.methods import METHODS
    from clead.methods.base import StepContext

    @dataclass
    class Plugin:
        def memory(self, model: Any, shape: Any) -> str:
            return "kept"

    with pytest.warns(DeprecationWarning, match=r"Plugin\.memory: write state"):
        renamed.keep_old_methods(Plugin, METHODS.renamed)
    assert Plugin().state(None, ()) == "kept"  # ty: ignore[unresolved-attribute]
    module = nn.Identity()
    context: Any = StepContext(Linf(eps=0.1), None, torch.Generator(), state=module)  # ty: ignore[invalid-argument-type]
    with pytest.warns(DeprecationWarning, match=r"step\.memory: write step\.state"):
        assert context.memory is module
