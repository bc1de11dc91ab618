"""Commands of measurements: certify, corruptions, detect, … Each is made from the settings of its class."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.main import get_command

from clead.cli.app import OPEN, Fresh, Json, ResultsOut, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, one_folder, runs_and_overrides, split_commas, without
from clead.cli.printing import about
from clead.errors import UserError
from clead.measurements import MEASUREMENTS, catalogue

if TYPE_CHECKING:
    from clead.measurements.base import Measurement


class _MeasurementCommand(TyperCommand):
    """The command of a measurement. Its options are read when it is called, or its help is: that imports PyTorch."""

    _complete = False

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the settings, then those that every measurement has."""
        if not self._complete:
            self.params[:0] = _options(MEASUREMENTS.get(self.name or ""))
            self._complete = True
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> None:
        """Measure the runs."""
        from clead.settings import validated

        cls = MEASUREMENTS.get(self.name or "")
        given = {key: ctx.params[key] for key in cls.__pydantic_fields__ if ctx.params[key] is not None}
        lists = {key for key, kind in get_type_hints(cls).items() if _is_list(kind)}
        settings = {key: split_commas(value) if key in lists else value for key, value in given.items()}
        runs, overrides = runs_and_overrides(ctx.args)
        common = {key: ctx.params[key] for key in ("fresh", "trust_state", "out", "json_file")}
        measure_runs(validated(cls, settings), runs, overrides, **common)


def _options(cls: Any) -> list[Any]:
    """Return one option for each setting; several values stand in one text, with commas."""
    parameters = []
    for key, setting in cls.__pydantic_fields__.items():
        default, kind = setting.default, setting.annotation
        if _is_list(kind):
            default, kind = None if default is None else ",".join(map(str, default)), str | None
        option = typer.Option(f"--{key.replace('_', '-')}", help=setting.description)
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )

    def command(**values: Any) -> None: ...

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    program = typer.Typer(add_completion=False)
    program.command()(command)
    return list(get_command(program).params)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation)))


def _common(
    fresh: Fresh = False, trust_state: TrustState = False, out: ResultsOut = None, json_file: Json = None
) -> None:
    """Hold the options that every measurement has."""


for _name, _help in catalogue().items():
    if _name != "attack":  # attacks in no norm ball belong to clead attack
        app.command(_name, cls=_MeasurementCommand, context_settings=OPEN, help=_help)(_common)


def measure_runs(
    measurement: Measurement,
    runs: list[str],
    overrides: list[str],
    *,
    fresh: bool,
    trust_state: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Measure runs, print what was found, and keep it."""
    from clead import api
    from clead.config import documented_keys, parse_overrides
    from clead.output import console

    used = ("data", "train.device", "eval.images", "eval.split", "eval.weights", "eval.seed", *measurement.keys)
    # A key that nobody knows is told so by the configuration.
    known = {f"{group}.{key}" for group, _, key, *_ in documented_keys()} | {"threat.norm", "attack.name"}
    given = [".".join(path) for path, _ in parse_overrides(overrides)]
    known |= {key for key in given if key.startswith("stages.")}
    useless = [key for key in given if key in known and key not in used and key.split(".")[0] not in used]
    if useless:
        raise UserError(*(f"--{key}: changes nothing here; settings of {', '.join(used)} do" for key in useless))
    one_folder(out, runs)
    configs = [changed(run, without(overrides, "--attack.")) for run in runs]
    contents = []
    for run, config in zip(runs, configs, strict=True):
        for caution in measurement.cautions(config):
            echo(f"note: {run}: {caution}")
        with interruptible():
            record = api.measure(run, measurement, config=config, fresh=fresh, trust_state=trust_state, out=out)
        console(width=100).print(record.result.table(record))
        echo(about(record))
        for note in record.notes:
            echo(f"note: {note}")
        echo(f"record: {out or Path(run) / 'results'}/{record.kind}.json\n{record.result.sentence(record)}")
        contents.append(json.loads(record.model_dump_json()))
    if json_file:
        write_json(json_file, contents[0] if len(contents) == 1 else contents)
