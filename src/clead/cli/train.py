"""``clead train``: a recipe becomes a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from clead.cli.app import OPEN, Out, app, echo, interruptible
from clead.cli.arguments import allowance, positional
from clead.errors import UserError


def _documented(value: bool) -> None:
    if value:
        from clead.config import key_reference, recipe_names

        print("Usage: clead train RECIPE [--group.key VALUE ...] [--out DIR] [--resume] [--show]\n")
        print("Train a model. RECIPE is a shipped name or a YAML file; every key below can be overridden.\n")
        print("  --out DIR   run directory, new or empty; runs/NAME-TIME by default")
        print("  --resume    continue the run in --out, or the newest run of this recipe")
        print("  --show      print the complete configuration and stop\n")
        print(f"Shipped recipes: {', '.join(recipe_names())}\n")
        print(
            "Naming another threat, attack, model or method starts from its defaults; another dataset keeps shared keys."
        )
        print(key_reference())
        raise typer.Exit


@app.command(context_settings=OPEN, add_help_option=False)
def train(
    context: typer.Context,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the complete configuration and stop.")] = False,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Make a few steps, say where their time goes, keep nothing.")
    ] = False,
    documented: Annotated[bool, typer.Option("--help", is_eager=True, callback=_documented, help="Every key.")] = False,
) -> None:
    """Train a model: clead train RECIPE [--group.key VALUE ...]; its --help documents every key."""
    from clead import api
    from clead.config import load_recipe, parse_overrides, recipe_names
    from clead.evaluation.processes import rank

    recipes, overrides = positional(context.args)
    if len(recipes) != 1:
        parse_overrides(overrides)  # raises first: an option without a value may have taken the recipe for it
        shipped = f"a shipped name (clead list has all {len(recipe_names())}) or a YAML file"
        raise UserError(f"give one recipe, {shipped}, got {' '.join(recipes) or 'none'}")
    config = load_recipe(recipes[0], overrides)
    if show:
        print(config.to_yaml(), end="")
        return
    if profiled:
        with interruptible():
            _print_profile(api.profile(config))
        return
    if resume and out is None:
        out = _newest(config.name)
    with interruptible():
        run = api.train(config, out=out, resume=resume)
    if rank() > 0:
        return
    o = run.outcome
    last = config.trainings()[-1].method
    which = "neighbours'" if not last.uses_classifier else "robust" if last.uses_attack else "clean"
    echo(
        f"{o.steps} steps, {o.epochs:.1f} epochs, {o.forward_equivalents:.0f} forward-equivalents per image, "
        f"{o.seconds:.0f} s; best validation {which} accuracy {o.best_validation:.1%} at step {o.best_step}"
    )
    echo(f"run: {run.path}\nnext: clead evaluate {run.path}{allowance(config)}")


def _newest(name: str) -> Path:
    pattern = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")
    configs = [path for path in Path("runs").glob("*/config.yaml") if pattern.fullmatch(path.parent.name)]
    configs.sort(key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"--resume: there is no run of {name} in runs/; give its directory with --out")
    return configs[-1].parent


def _print_profile(measured: dict[str, Any]) -> None:
    from rich.table import Table

    from clead.output import console

    step = measured["step_ms"]
    table = Table(title=f"A training step on {measured['device']}, {measured['threads']} threads: {step:.1f} ms")
    for name in ("part", "ms", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, spent in measured["parts"].items():
        table.add_row(name, f"{spent:.1f}", f"{spent / step:.0%}")
    table.add_section()
    for name, spent, calls in measured["operators"]:
        table.add_row(f"{name} ({calls:.0f} calls)", f"{spent:.1f}", f"{spent / step:.0%}")
    console().print(table)
    echo(
        f"{measured['images_per_second']:.0f} images/s; {measured['forward_equivalents']:.1f} forward-equivalents per image, which "
        f"take {measured['bound_ms']:.1f} ms at the speed of a plain forward: the step takes "
        f"{step / measured['bound_ms']:.2f} times that\n"
        "views: the attack and other images; rest: logging, weight perturbation; below, operators in all parts"
    )
