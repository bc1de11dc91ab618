"""What every registered measurement must do; a new file in measurements/ is picked up by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from typer import Context
from typer.main import get_command

import clead
from clead import api
from clead.cli.app import app
from clead.config import load_recipe, rows_of
from clead.errors import UserError
from clead.evaluation.correctness import to_float
from clead.evaluation.state import ResumableResults
from clead.measurements import MEASUREMENTS, catalogue
from clead.measurements.base import Measured, Measurement, MeasurementRecord, MeasurementTarget, Result, new_table
from clead.report.html import RunResult, write_report
from clead.results.section import Section, Table
from clead.settings import setting, settings
from support import ROOT

COMMANDS = [name for name in MEASUREMENTS.names() if name != "attack"]  # which belongs to clead attack
RECORDS = ROOT / "tests" / "data" / "records"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measurements") / "run"
    short = ["--train.budget", "2", "--train.validate_images", "8", "--eval.images", "12"]
    api.train(load_recipe("digits-standard", short), out=out, show=False)
    return out


def test_the_catalogue_is_the_registry_and_each_entry_a_help():
    known = catalogue()
    assert list(known) == MEASUREMENTS.names()
    for name, text in known.items():
        assert text.endswith(".") and f"clead {name} RUN" in text and "``" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_its_settings_are_the_options_of_its_command(name):
    cls = MEASUREMENTS.get(name)
    program: Any = get_command(app)
    command = program.commands[name]
    options = {option.opts[0]: option for option in command.get_params(Context(command))}
    rows = rows_of(cls)
    assert list(options) == [
        *(f"--{key.replace('_', '-')}" for key, *_ in rows),
        *("--fresh", "--trust-state", "--out", "--json", "--help"),
    ]
    for key, _, _, about in rows:
        assert about and options[f"--{key.replace('_', '-')}"].help == about
    assert command.help.startswith(catalogue()[name][:40])


@pytest.mark.parametrize("name", MEASUREMENTS.names())
def test_its_class_says_what_is_derived(name):
    cls = MEASUREMENTS.get(name)
    assert issubclass(cls, Measurement) and issubclass(cls.result, Result)
    assert "eval.batch_size" in cls.keys and (cls.steps is None or "eval.steps" in cls.keys)
    assert not hasattr(cls, "__abstractmethods__") or not cls.__abstractmethods__


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_in_python_is_a_user_error(name, trained):
    with pytest.raises(UserError, match="colour: unknown key"):
        clead.measure(trained, name, colour=3)
    with pytest.raises(UserError, match=r"got both: colour"):
        clead.measure(trained, MEASUREMENTS.get(name)(), colour=3)
    assert not (trained / "results").exists()


def test_an_unknown_name_is_told_its_neighbours(trained):
    with pytest.raises(UserError, match=r"unknown measurement 'certfy'; did you mean 'certify'\?"):
        clead.measure(trained, "certfy")


def test_a_record_of_the_first_version_is_read_and_written_alike():
    path = RECORDS / "digits-clead-detect.json"
    record = MeasurementRecord.model_validate_json(path.read_text())
    values, written = json.loads(path.read_text()), json.loads(record.model_dump_json())
    assert {key: written[key] for key in values if key != "data"} == {
        key: values[key] for key in values if key != "data"
    }
    assert type(record.result) is MEASUREMENTS.get("detect").result
    for kind in ("certify", "nothing"):
        with pytest.raises(ValidationError):
            MeasurementRecord.model_validate({**values, "kind": kind})


@pytest.mark.parametrize("name", ["certify", "corruptions", "detect", "distances", "probe", "unrestricted"])
def test_the_functions_of_the_first_version_warn_and_measure(name, monkeypatch):
    calls = []
    monkeypatch.setattr("clead.api.measurements.measure", lambda *given, **keys: calls.append((given, keys)))
    attack = ("an attack",) if name == "unrestricted" else ()
    with pytest.warns(DeprecationWarning, match=r"write clead\.measure\(run, "):
        getattr(clead, f"{name}_run")("a run", *attack, show=False)
    kind, keys = ("attack", {"attack": "an attack"}) if attack else (name, {})
    assert calls == [(("a run", kind), {**keys, "show": False})]


# ------------------------------------------------------------------------------------------------- a newcomer's measurement


class BrightnessResult(Result):
    """Mean pixel of the images, times a factor."""

    mean: float

    def table(self, record: MeasurementRecord) -> Any:
        """Return the mean."""
        table = new_table(record, "brightness", "what", "value")
        table.add_row("mean", f"{self.mean:.3f}")
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return the mean."""
        return f"{record.about}: mean pixel {self.mean:.3f}."

    @classmethod
    def section(cls, measured: Any) -> Section:
        """Return one row of each run."""
        rows = [[one.name, f"{one.record.result.mean:.3f}"] for one in measured]
        table = Table(["Run", "mean"], rows, caption="Brightness", label="Brightness, table")
        return Section("brightness", "How bright the images are", 50, "The mean of all pixels.", [table])


@pytest.fixture
def brightness():
    """A measurement as a new file would register it."""

    @MEASUREMENTS.register("brightness")
    @settings
    class Brightness(Measurement):
        """Say how bright the images are: ``clead brightness RUN``."""

        result: ClassVar = BrightnessResult
        factor: float = setting(1.0, "What the mean is multiplied by.")

        def run(self, target: MeasurementTarget, state: ResumableResults) -> BrightnessResult:
            """Return the mean; it is kept in the state."""
            with state.opened():
                if "mean" not in state.parts:
                    mean = to_float(target.images.images).mean()
                    state.save("mean", {"mean": mean}, {"seconds": 0.25})
                return BrightnessResult(mean=self.factor * state.parts["mean"][0]["mean"].item())

    yield
    del MEASUREMENTS._entries["brightness"]


@pytest.mark.slow
def test_one_class_is_a_whole_measurement(brightness, trained, tmp_path):
    config = load_recipe(str(trained / "config.yaml"), ["--eval.images", "9"])
    record = clead.measure(trained, "brightness", config=config, out=tmp_path, show=False, factor=2)
    images = config.data.load(0).test.images[:9]
    assert record.result.mean == pytest.approx(2 * (images / 255).mean().item())
    assert (record.kind, record.data.n, record.threat, record.seconds) == ("brightness", 9, None, 0.25)
    assert record.settings == {"factor": 2.0, "batch_size": 256}
    assert MeasurementRecord.model_validate_json((tmp_path / "brightness.json").read_text()) == record
    assert "mean pixel" in record.result.sentence(record) and record.result.table(record).row_count == 1

    evaluated = api.read_record(RECORDS / "cifar10-small-clead-s0-quick.json")
    record = record.model_copy(update={"model": evaluated.model})
    shown = RunResult("net", evaluated, measurements={"brightness": record})
    page = write_report([shown], tmp_path / "page.html", title="t").read_text()
    assert '<section id="brightness"' in page and '<a href="#brightness">How bright the images are</a>' in page
    assert f"<td>{record.result.mean:.3f}</td>" in page
    assert BrightnessResult.section([Measured(0, "net", record)]).blocks[0].rows == [
        ["net", f"{record.result.mean:.3f}"]
    ]


def test_a_state_of_other_settings_is_refused(brightness, trained, tmp_path, monkeypatch):
    put = ResumableResults.save

    def killed(self, *part):
        put(self, *part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableResults, "save", killed)
        clead.measure(trained, "brightness", out=tmp_path, show=False)
    with pytest.raises(UserError, match=r"factor: 1\.0 there, 3\.0 here"):
        clead.measure(trained, "brightness", out=tmp_path, show=False, factor=3)
    record = clead.measure(trained, "brightness", out=tmp_path, show=False)
    assert any("continued from a state with 1 finished parts" in note for note in record.notes)
    assert torch.tensor(record.result.mean).isfinite()
