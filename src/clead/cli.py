"""The command line: a thin layer over ``clead.api``. PyTorch is imported only by the commands that compute."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clead.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from clead.config import RunConfig

app = typer.Typer(
    name="clead",
    help="Train image classifiers that withstand adversarial attacks, measure them honestly, and see it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_STRONG_PGD = (
    *("--attack.name", "pgd", "--attack.steps", "50", "--attack.step_size", "null", "--attack.restarts", "1"),
    *("--attack.random_start", "true", "--attack.keep", "best"),
)
_OPEN: Any = {"allow_extra_args": True, "ignore_unknown_options": True}

Out = Annotated[Path | None, typer.Option("--out", help="Output directory, new or empty; runs/NAME-TIME by default.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this JSON file too.")]


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


def _version(value: bool) -> None:
    if value:
        from clead import __version__

        print(f"clead {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
) -> None:
    pass


@app.command(context_settings=_OPEN, add_help_option=False)
def train(
    context: typer.Context,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the complete configuration and stop.")] = False,
    documented: Annotated[bool, typer.Option("--help", is_eager=True, callback=_documented, help="Every key.")] = False,
) -> None:
    """Train a model: clead train RECIPE [--group.key VALUE ...]; its --help documents every key."""
    from clead import api
    from clead.config import load_recipe, parse_overrides, recipe_names

    recipes, overrides = _positional(context.args)
    if len(recipes) != 1:
        parse_overrides(overrides)  # raises first: an option without a value may have taken the recipe for it
        known = f"a shipped name ({', '.join(recipe_names())}) or a YAML file"
        raise UserError(f"give one recipe, {known}, got {' '.join(recipes) or 'none'}")
    config = load_recipe(recipes[0], overrides)
    if show:
        print(config.to_yaml(), end="")
        return
    if resume and out is None:
        out = _newest(config.name)
    with _interruptible():
        run = api.train(config, out=out, resume=resume)
    o = run.outcome
    which = "robust" if config.method.uses_attack else "clean"
    _say(
        f"{o.steps} steps, {o.epochs:.1f} epochs, {o.forward_equivalents:.0f} forward-equivalents per image, "
        f"{o.seconds:.0f} s; best validation {which} accuracy {o.best_validation:.1%} at step {o.best_step}"
    )
    _say(f"run: {run.path}\nnext: clead evaluate {run.path}")


@app.command(context_settings=_OPEN)
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Option(help="standard | plus | rand | quick | adaptive | queries | pgd.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead of a run: module:factory, file.py:factory or file.onnx; needs --data.path."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of --model, as safetensors.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the record of --model goes; evaluations/NAME by default.")
    ] = None,
    transfer_from: Annotated[
        list[str] | None, typer.Option(help="Try the adversarial images of this run too (may be repeated).")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: compute every n-th batch from the i-th, and stop.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make the record of all shards.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what a stopped evaluation has left.")] = False,
    save_adversarial: Annotated[
        Path | None, typer.Option(help="Write the adversarial images to this Parquet file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Attack runs and record clean and robust accuracy: clead evaluate RUN ... [--suite quick] [--threat.eps 8/255]."""
    from clead import api
    from clead.config import bare_config, parse_overrides
    from clead.evaluation.processes import rank

    if model is None:
        runs, overrides = _runs(context.args)
        for name, value in (("--weights", weights), ("--out", out)):
            if value is not None:
                raise UserError(f"{name} goes with --model, got {value} with runs {' '.join(runs)}")
    else:
        runs, overrides = _positional(context.args)
        if runs:
            raise UserError(f"give runs or --model, got --model {model} and {' '.join(runs)}")
    if shard and merge:
        raise UserError(f"give --shard or --merge, got --shard {shard} and --merge")
    if save_adversarial and len(runs) > 1:
        raise UserError(
            f"--save-adversarial keeps the images of one run, got {len(runs)} runs; evaluate them one by one"
        )
    if suite is not None:
        overrides = [*overrides, "--eval.suite", suite]
    _only(overrides, ("data", "threat", "eval"), "choose a suite with --suite, or use clead attack")
    options: dict[str, Any] = {
        "transfer_from": transfer_from or (),
        "shard": shard,
        "merge": merge,
        "fresh": fresh,
        "save_adversarial": save_adversarial,
    }
    records = []

    def done(evaluation: Any, folder: Path, source: Path) -> None:
        if rank() > 0:
            return
        record = evaluation.record
        records.append(record)
        _print_record(record)
        _say(f"record: {folder}/evaluation.json")
        if save_adversarial:
            _say(f"images: {save_adversarial}")
        try:
            shown = source if model is None else folder / "evaluation.json"
            page = api.write_report([shown], source / "report.html", title=f"Robustness of {record.run}")
            _say(f"report: {page}")
        except MissingExtra as error:  # the record is what was asked for
            _say(f"no report: {error}")
        _say(_verdict(record))

    try:
        if model is not None:
            if ["data", "path"] not in [path for path, _ in parse_overrides(overrides)]:
                raise UserError(
                    f"--model {model}: which images? give --data.path (and --data.name, if they are CIFAR or MNIST)"
                )
            config = bare_config("evaluation", overrides)
            folder = out or Path("evaluations") / re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name)
            with _interruptible():
                done(api.evaluate_foreign(model, config, weights=weights, out=folder, **options), folder, folder)
        else:
            configs = [_changed(run, overrides) for run in runs]
            for run, config in zip(runs, configs, strict=True):
                with _interruptible():
                    done(api.evaluate_run(run, config=config, **options), Path(run) / "results", Path(run))
    except api.ShardDone as finished:
        _say(str(finished))
        return
    if json_file and records:
        content: Any = [json.loads(record.model_dump_json()) for record in records]
        _write_json(json_file, content[0] if len(content) == 1 else content)


@app.command(context_settings=_OPEN)
def attack(
    context: typer.Context,
    objective: Annotated[str, typer.Option(help="What the attack maximises.")] = "cross_entropy",
    save: Annotated[Path | None, typer.Option(help="Write x, x_adv, labels and flags to this .npz file.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="No attack: score the images that clead evaluate --save-adversarial wrote.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Run one attack, PGD-50 if nothing else is given: clead attack RUN ... [--attack.steps 100] [--objective margin]."""
    from clead import api
    from clead.attacks import OBJECTIVES
    from clead.config import parse_overrides
    from clead.evaluation.suites import NamedAttack, attack_name

    OBJECTIVES.get(objective)
    runs, overrides = _runs(context.args)
    if verify:
        _only(overrides, ("data", "threat", "eval"), "leave it out: nothing is attacked")
        found = [api.verify(run, verify, config=_changed(run, overrides)) for run in runs]
        for result in found:
            _print_verified(result)
        if json_file:
            _write_json(json_file, found[0] if len(found) == 1 else found)
        return
    _only(overrides, ("data", "threat", "attack", "eval"), "use --attack.steps and the like, and --objective")
    if save and len(runs) > 1:
        raise UserError(f"--save keeps the images of one run, got {len(runs)} runs; attack them one by one")
    fixed = [
        "--eval.curve_points",
        "0",
        "--eval.check_images",
        "0",
        *(["--eval.gallery", "1000000000"] if save else []),
    ]
    settings = parse_overrides(overrides)
    given = {path[1]: value for path, value in settings if path[0] == "attack" and len(path) == 2}
    foreign = None
    if ":" in str(given.get("name", "")):  # torchattacks:NAME or foolbox:NAME, with the settings of that class
        from clead.attacks.external import external

        foreign = external(given.pop("name"), **given)
        overrides = _without(overrides, "--attack.")
        given = {"name": None}
    # Not the run's training attack, whose short steps and last point are weak: PGD as evaluation runs it, then what was given.
    if given.get("name", "pgd") == "pgd":
        overrides = [*_STRONG_PGD, *overrides]
    configs = [_changed(run, [*overrides, *fixed]) for run in runs]
    contents = []
    for run, config in zip(runs, configs, strict=True):
        used = foreign or config.attack
        name = attack_name(used, objective)
        result = "attack-" + re.sub(r"[^a-z0-9]+", "-", name.lower().replace("×", "x"))
        with _interruptible():
            evaluation = api.evaluate_run(
                run,
                config=config,
                attacks=[NamedAttack(name, used, objective)],
                result=result,
            )
        _print_record(evaluation.record)
        _say(f"record: {run}/results/{result}.json")
        contents.append(json.loads(evaluation.record.model_dump_json()))
        if save:
            _save_images(save, evaluation)
    if json_file:
        _write_json(json_file, contents[0] if len(contents) == 1 else contents)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run directories or record files.")],
    json_file: Json = None,
    out: Annotated[Path | None, typer.Option(help="Write a report of all runs to this HTML file too.")] = None,
) -> None:
    """Print a table of evaluated runs, with McNemar's exact test between runs on the same images."""
    from clead import api

    comparison = api.compare(runs)
    _print_comparison(comparison)
    if json_file:
        _write_json(json_file, comparison)
    if out:
        _say(f"report: {api.write_report(runs, out)}")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run directories or record files.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; RUN/report.html for one run.")] = None,
) -> None:
    """Write one self-contained HTML report of evaluated runs."""
    from clead import api

    first = Path(runs[0])
    path = out or (first / "report.html" if len(runs) == 1 and first.is_dir() else Path("report.html"))
    _say(f"report: {api.write_report(runs, path)}")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Output directory; runs/demo-TIME by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under 40 seconds: the workings, not a result.")] = False,
) -> None:
    """Train standard, PGD-AT, TRADES and C-LEAD on digits at equal compute, attack them, and draw the report."""
    from clead.demo import run_demo

    with _interruptible():
        comparison = run_demo(out, quick=quick)
    _print_comparison(comparison)
    _say(f"report: {Path(comparison['report']).resolve()}")


@app.command("list")
def list_() -> None:
    """List recipes, datasets, models, threats, attacks, objectives and methods."""
    from clead import config
    from clead.attacks import OBJECTIVES

    print(f"recipes: {', '.join(config.recipe_names())}")
    for group, (_, _, names) in config.choice_keys().items():
        print(f"{group}: {', '.join(names)}")
    print(f"objectives: {', '.join(OBJECTIVES.names())}")


def _runs(arguments: list[str]) -> tuple[list[str], list[str]]:
    from clead.config import parse_overrides

    runs, overrides = _positional(arguments)
    if not runs:
        parse_overrides(overrides)
        raise UserError("which run? give one or several run directories, such as runs/NAME-TIME, got none")
    return runs, overrides


def _positional(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part what stands by itself from ``--key VALUE`` and ``--key=VALUE``, in whatever order they were given."""
    alone: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        waits = bool(overrides) and overrides[-1].startswith("--") and "=" not in overrides[-1]
        (overrides if argument.startswith("--") or waits else alone).append(argument)
    return alone, overrides


def _only(overrides: list[str], groups: tuple[str, ...], instead: str) -> None:
    """Refuse settings that would change nothing here, because the run is trained already."""
    from clead.config import GROUPS, parse_overrides

    suite = ("suite", "steps", "curve_points", "curve_images", "curve_steps", "check_images")
    problems = []
    for path, _ in parse_overrides(overrides):
        key = ".".join(path)
        useless = path[0] in GROUPS and path[0] not in groups and key != "train.device"
        if useless or ("attack" in groups and path[0] == "eval" and path[-1] in suite):
            hint = instead if path[0] in ("attack", "eval") else f"settings of {', '.join(groups)} and train.device do"
            problems.append(f"--{key}: changes nothing here, the run is trained already; {hint}")
    if problems:
        raise UserError(*problems)


def _without(overrides: list[str], start: str) -> list[str]:
    """Leave out the settings whose key begins so, with their values."""
    kept, skip = [], False
    for argument in overrides:
        if argument.startswith("--"):
            dropped = argument.startswith(start)
            skip = dropped and "=" not in argument
            if dropped:
                continue
        elif skip:
            skip = False
            continue
        kept.append(argument)
    return kept


def _changed(run: str, overrides: list[str]) -> RunConfig:
    from clead.checkpoint import RunDir
    from clead.config import load_recipe

    opened = RunDir.open(Path(run))
    return load_recipe(str(opened.path / "config.yaml"), overrides)


def _newest(name: str) -> Path:
    made = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")
    found = [path for path in Path("runs").glob("*/config.yaml") if made.fullmatch(path.parent.name)]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: there is no run of {name} in runs/; give its directory with --out")
    return found[-1].parent


def _print_record(record: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    threat = f"{record.threat.norm} {record.threat.eps_text}"
    table = Table(title=f"{record.run}: {record.data.n} {record.data.split} images, {threat}")
    for column in ("attack", "accuracy", "95 % interval", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    table.add_row("none (clean)", *_shown(record.clean), "")
    for part in record.attacks:
        table.add_row(part.name, *_shown(part.robust), f"{part.seconds:.1f}")
    table.add_row("worst case per image", *_shown(record.worst), f"{record.seconds:.1f}", style="bold")
    Console().print(table)
    for note in record.notes:
        print(f"note: {note}")
    for check in record.checks:
        if not check.passed:
            print(f"check {check.name} failed: {check.explanation}")


def _verdict(record: Any) -> str:
    from clead.evaluation.suites import MEANING

    worst, threat = record.worst, record.threat
    failed = [check.name for check in record.checks if not check.passed]
    said = (
        f"{record.run}: {worst.accuracy:.1%} of {worst.n} {record.data.split} images (95 % interval {worst.low:.1%} – "
        f"{worst.high:.1%}) withstand {threat.norm} {threat.eps_text} under {MEANING.get(record.suite, record.suite)}; "
        f"{record.clean.accuracy:.1%} are right when clean."
    )
    if failed:
        said += f"\nDo not trust it yet: checks of gradient masking failed: {', '.join(failed)}."
    return said


def _print_verified(result: dict[str, Any]) -> None:
    _say(
        f"{result['run']}: of {result['n']} images {result['broken']} are stated as broken, {result['wrong']} of these are "
        f"classified wrong; largest perturbation {result['largest']:.6g} of eps {result['eps']:.6g}, {result['outside']} "
        f"outside; accuracy {result['accuracy']:.2%}, after rounding to 8 bits {result['accuracy_8_bits']:.2%}"
    )


def _shown(estimate: Any) -> tuple[str, str]:
    return f"{estimate.accuracy:.2%}", f"{estimate.low:.1%} – {estimate.high:.1%}"


def _print_comparison(comparison: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = comparison["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    threats = sorted({row["threat"] for row in rows})
    table = Table(
        title=f"Accuracy on {', '.join(sorted({str(row['n']) for row in rows}))} images, {', '.join(threats)}"
    )
    for column in ("run", "clean", *names, "worst case", "95 % interval", "compute"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        cells = [f"{row['attacks'][name]:.1%}" if name in row["attacks"] else "–" for name in names]
        compute = f"{row['forward_equivalents']:.0f}" if row["forward_equivalents"] else "–"
        interval = f"{row['robust_low']:.1%} – {row['robust_high']:.1%}"
        table.add_row(
            row["run"], f"{row['clean_accuracy']:.1%}", *cells, f"{row['robust_accuracy']:.1%}", interval, compute
        )
    Console(width=max(100, Console().width)).print(table)
    print(
        "compute: forward-equivalents per training image. Robust accuracy is an upper bound: a stronger attack can only lower it."
    )
    for pair in comparison["pairs"]:
        print(
            f"{pair['a']} against {pair['b']}: {pair['only_a']} images held only by the first, "
            f"{pair['only_b']} only by the second, McNemar exact p = {pair['p_value']:.2g}"
        )


def _save_images(path: Path, evaluation: Any) -> None:
    import io

    import numpy as np

    from clead.checkpoint import write_atomically

    parts = evaluation.artifacts
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        x=parts["x"].numpy(),
        x_adv=parts["x_adv"].numpy(),
        labels=parts["labels"].numpy(),
        robust=np.array(evaluation.record.robust_flags),
    )
    write_atomically(path, buffer.getvalue())
    _say(f"images: {path}")


def _write_json(path: Path, content: Any) -> None:
    from clead.checkpoint import write_atomically

    write_atomically(path, json.dumps(content, indent=1).encode())


def _say(text: str) -> None:
    print(text, flush=True)


class _Stopped(Exception):
    """Ctrl-C: the command line's library would swallow a KeyboardInterrupt's message."""


@contextmanager
def _interruptible() -> Generator[None, None, None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise _Stopped(str(error) or "interrupted") from error


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    logging.basicConfig(format="clead: %(message)s", level=logging.WARNING)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        for problem in error.problems:
            print(f"clead: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except (_Stopped, KeyboardInterrupt, typer.Abort) as error:
        print(f"clead: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"clead: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        kind, usage = type(error).__name__, getattr(error, "format_message", None)
        if usage is not None and kind == "NoArgsIsHelpError":
            print(usage(), file=sys.stderr)
            sys.exit(2)
        if usage is not None:  # a usage error of the command line
            print(f"clead: error: {' '.join(usage().split())}", file=sys.stderr)
            sys.exit(2)
        if kind == "NonFiniteLoss":
            print(f"clead: error: {error}", file=sys.stderr)
            sys.exit(1)
        if kind == "OutOfMemoryError":
            print(
                "clead: error: the device is out of memory; lower data.batch_size or eval.batch_size", file=sys.stderr
            )
            sys.exit(1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
