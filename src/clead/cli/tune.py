"""``clead tune``: search for a better recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from clead.cli.app import OPEN, app, echo, interruptible
from clead.cli.arguments import allowance, positional
from clead.errors import MissingExtra, UserError


def _documented(value: bool) -> None:
    if value:
        _needs_optuna()
        from clead.tuning.space import key_reference

        print("Usage: clead tune RECIPE [--tune.key VALUE ...] [--group.key VALUE ...] [options]\n")
        print("Search for better values of a recipe's keys, on validation images only: the test set is not touched.")
        print(
            "Given again with the same --out it goes on, given several times at once the processes share the trials.\n"
        )
        print("  --out DIR        the study's directory, new or a study's; runs/NAME-tune-TIME by default")
        print("  --trials N       the same as --tune.trials N")
        print("  --pareto         the same as --tune.pareto true")
        print("  --storage URL    a database instead of a journal in the directory, such as postgresql://host/base")
        print("  --study NAME     the study's name in the database; the recipe's by default")
        print("  --silence S      seconds after which a process that only the database knows counts as dead; 60\n")
        print("The tune group of a recipe; another key of clead train --help changes the recipe itself.")
        print(key_reference())
        print("  --tune.space.GROUP.KEY '{low: 0.001, high: 0.1, log: true}', '[a, b, c]', or null to leave it out")
        raise typer.Exit


def _needs_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtra("optuna", "tune", "clead tune")


@app.command(context_settings=OPEN, add_help_option=False)
def tune(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out")] = None,
    trials: Annotated[str | None, typer.Option("--trials")] = None,
    pareto: Annotated[bool, typer.Option("--pareto")] = False,
    storage: Annotated[str | None, typer.Option("--storage")] = None,
    study: Annotated[str | None, typer.Option("--study")] = None,
    silence: Annotated[float, typer.Option("--silence")] = 60.0,
    documented: Annotated[bool, typer.Option("--help", is_eager=True, callback=_documented, help="Every key.")] = False,
) -> None:
    """Search for a better recipe on validation images: clead tune RECIPE; its --help documents every key."""
    recipes, overrides = positional(context.args)
    if len(recipes) != 1:
        raise UserError(f"give one recipe, a shipped name or a YAML file, got {' '.join(recipes) or 'none'}")
    if study is not None and storage is None:
        raise UserError(
            f"--study: names a study in a database, got {study} without --storage; a directory holds one study"
        )
    if silence <= 0:
        raise UserError(f"--silence: must be above 0 seconds, got {silence:g}")
    _needs_optuna()
    if trials is not None:
        overrides = [*overrides, "--tune.trials", trials]
    if pareto:
        overrides = [*overrides, "--tune.pareto", "true"]
    from clead.tuning import tune as search

    with interruptible():
        tuned = search(recipes[0], overrides, out=out, storage=storage, study=study, silence=silence, say=echo)
    _print(tuned)


def _print(study: Any) -> None:
    states = [result.state for result in study.results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    seconds = sum(result.seconds for result in study.results)
    echo(f"{len(states)} trials: {counts}; {seconds:.0f} s of work")
    if not study.trials_here:
        echo(f"nothing was left to do; --trials {len(states) * 2} goes on")
    if study.best is None:
        raise UserError(f"no trial came to its end, so there is no best recipe; see {study.path}/trials.csv for why")
    best, first = study.best, study.results[0]
    echo(
        f"best: trial {best.number}, {best.summary()} on {best.images} validation images; the test set was not touched"
    )
    if first.score is not None and dict(first.values) == study.search.own_values():
        echo(f"the recipe's own values: trial 0, {first.summary()}")
    recipe = study.path / "best.yaml"
    own_threat = any("threat" in key.split(".") for key in study.search.distributions)
    threat = f" --threat.eps {study.search.config.threat.eps}" if own_threat else ""
    code = allowance(study.search.config)
    echo(f"recipe: {recipe}\nnext: clead train {recipe} --out {study.path}/best{code}")
    echo(f"then, once, on the test images: clead evaluate {study.path}/best{threat}{code}")
