"""What stands on the command line: runs, and ``--group.key VALUE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clead.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from clead.config import RunConfig


def runs_and_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part run directories, of which there must be one, from settings."""
    from clead.config import parse_overrides

    runs, overrides = positional(arguments)
    if not runs:
        parse_overrides(overrides)
        raise UserError("which run? give one or several run directories, such as runs/NAME-TIME, got none")
    return runs, overrides


def positional(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part what stands by itself from ``--key VALUE`` and ``--key=VALUE``, in whatever order they were given."""
    alone: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        waits = bool(overrides) and overrides[-1].startswith("--") and "=" not in overrides[-1]
        (overrides if argument.startswith("--") or waits else alone).append(argument)
    return alone, overrides


def allowance(config: RunConfig) -> str:
    """Return what a command on this run needs besides its name: leave to run the code that makes its model."""
    factory = getattr(config.model, "factory", None)
    return f" --allow-code {factory}" if factory else ""


def only(overrides: list[str], groups: tuple[str, ...], instead: str) -> None:
    """Refuse settings that would change nothing here, because the run is trained already."""
    from clead.config import GROUPS, parse_overrides

    suite = ("suite", "steps", "curve_points", "curve_images", "curve_steps", "check_images")
    problems = []
    for path, _ in parse_overrides(overrides):
        key = ".".join(path)
        useless = path[0] in (*GROUPS, "stages") and path[0] not in groups and key != "train.device"
        if useless or ("attack" in groups and path[0] == "eval" and path[-1] in suite):
            hint = instead if path[0] in ("attack", "eval") else f"settings of {', '.join(groups)} and train.device do"
            problems.append(f"--{key}: changes nothing here, the run is trained already; {hint}")
    if problems:
        raise UserError(*problems)


def model_options(model: str | None, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take what goes with ``--model`` out of the overrides: ``--model.output``, ``.input``, ``.classifier`` and ``.args.KEY``.

    Returns keyword arguments of ``evaluate_external``, none without ``--model``, and the other overrides.
    """
    from clead.config import parse_overrides
    from clead.models.model_input import ModelInput, pairs

    if model is None:
        return {}, overrides
    options: dict[str, Any] = {}
    for path, value in parse_overrides(overrides):
        if path[0] != "model":
            continue
        nested = path[1] in ("input", "args") and len(path) == 3
        if path[1:] not in (["output"], ["input"], ["classifier"]) and not nested:
            known = did_you_mean(path[1], ("output", "input", "classifier", "args.KEY"))
            raise UserError(f"--{'.'.join(path)}: says nothing about {model}; {known}")
        if path[1] == "args":
            options["args"] = {**options.get("args", {}), path[2]: value}
        elif path[1] == "input":
            try:
                more = pairs(value) if len(path) == 2 else {path[2]: value}
            except ValueError as error:
                raise UserError(f"--model.input: {error}") from None
            options["input"] = {**options.get("input", {}), **more} if isinstance(more, dict) else more
        else:
            options[path[1]] = value
    if "input" in options:
        options["input"] = ModelInput.parse(options["input"])
    return options, without(overrides, "--model.")


def split_commas(text: str) -> list[str]:
    """Return what stands between commas."""
    return [value.strip() for value in text.split(",") if value.strip()]


def without(overrides: list[str], start: str) -> list[str]:
    """Leave out the settings whose key begins so, with their values."""
    remaining, skip = [], False
    for argument in overrides:
        if argument.startswith("--"):
            dropped = argument.startswith(start)
            skip = dropped and "=" not in argument
            if dropped:
                continue
        elif skip:
            skip = False
            continue
        remaining.append(argument)
    return remaining


def changed(run: str, overrides: list[str]) -> RunConfig:
    """Return the configuration of a run with these settings instead."""
    from clead.config import load_recipe
    from clead.runs.directory import RunDir

    opened = RunDir.open(Path(run))
    return load_recipe(str(opened.path / "config.yaml"), overrides)


def out_of(run: str, out: Path | None) -> Path | None:
    """Return the folder of a run's results: ``--out``, or that of a model of the zoo, which is said; None: the run's own."""
    from clead.cli.app import echo
    from clead.runs.zoo import results_of_zoo

    if out is None and (out := results_of_zoo(run)) is not None:
        echo(f"note: {run} is read-only: results go to {out}; --out DIR takes them elsewhere")
    return out


def one_folder(out: Path | None, runs: list[str]) -> None:
    """Raise UserError if the results of several runs would go to one folder."""
    if out is not None and len(runs) > 1:
        raise UserError(f"--out is the folder of one run's results, got {len(runs)} runs; give them one by one")
