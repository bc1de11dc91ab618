"""Commands of measurements: certify, corruptions, detect, … Each is made from the settings of its class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clead.cli.app import OPEN, Fresh, Json, ResultsOut, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, one_folder, out_of, runs_and_overrides, without
from clead.cli.printing import about
from clead.cli.settings_command import SettingsCommand
from clead.errors import UserError
from clead.measurements import MEASUREMENTS, catalogue

if TYPE_CHECKING:
    from clead.measurements.base import Measurement


class _MeasurementCommand(SettingsCommand):
    """The command of a measurement; what it is takes importing PyTorch."""

    def settings_class(self) -> Any:
        """Return the measurement's class."""
        return MEASUREMENTS.get(self.name or "")


def _measure(
    context: typer.Context,
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    from clead.settings import validated

    measurement = validated(MEASUREMENTS.get(context.command.name or ""), context.meta["settings"])
    runs, overrides = runs_and_overrides(context.args)
    measure_runs(measurement, runs, overrides, fresh=fresh, trust_state=trust_state, out=out, json_file=json_file)


for _name, _help in catalogue().items():
    if _name != "attack":  # attacks in no norm ball belong to clead attack
        app.command(_name, cls=_MeasurementCommand, context_settings=OPEN, help=_help)(_measure)


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

    used = ("data", "task", "train.device", "eval.images", "eval.split", "eval.weights", "eval.seed", *measurement.keys)
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
        folder = out_of(run, out)
        with interruptible():
            record = api.measure(run, measurement, config=config, fresh=fresh, trust_state=trust_state, out=folder)
        console(width=100).print(record.result.table(record))
        echo(about(record))
        for note in record.notes:
            echo(f"note: {note}")
        echo(f"record: {folder or Path(run) / 'results'}/{record.kind}.json\n{record.result.sentence(record)}")
        contents.append(json.loads(record.model_dump_json()))
    if json_file:
        write_json(json_file, contents[0] if len(contents) == 1 else contents)
