"""The command line: a thin layer over ``clead.api``. PyTorch is imported only by the commands that compute."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clead.errors import MissingExtra, UserError, did_you_mean

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
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what a stopped call has left.")]


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
    profiled: Annotated[
        bool, typer.Option("--profile", help="Make a few steps, say where their time goes, keep nothing.")
    ] = False,
    documented: Annotated[bool, typer.Option("--help", is_eager=True, callback=_documented, help="Every key.")] = False,
) -> None:
    """Train a model: clead train RECIPE [--group.key VALUE ...]; its --help documents every key."""
    from clead import api
    from clead.config import load_recipe, parse_overrides, recipe_names

    recipes, overrides = _positional(context.args)
    if len(recipes) != 1:
        parse_overrides(overrides)  # raises first: an option without a value may have taken the recipe for it
        shipped = f"a shipped name (clead list has all {len(recipe_names())}) or a YAML file"
        raise UserError(f"give one recipe, {shipped}, got {' '.join(recipes) or 'none'}")
    config = load_recipe(recipes[0], overrides)
    if show:
        print(config.to_yaml(), end="")
        return
    if profiled:
        with _interruptible():
            _print_profile(api.profile(config))
        return
    if resume and out is None:
        out = _newest(config.name)
    with _interruptible():
        run = api.train(config, out=out, resume=resume)
    o = run.outcome
    last = config.trainings()[-1].method
    which = "neighbours'" if not last.uses_classifier else "robust" if last.uses_attack else "clean"
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
    """Attack runs and record clean and robust accuracy: clead evaluate RUN ... [--suite quick] [--threat.eps 8/255].

    Keys of clead train --help can be given too, such as --eval.images, --eval.batch_size, --threat.norm and --data.path.
    """
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
        if ["eval", "suite"] in [path for path, _ in parse_overrides(overrides)]:
            raise UserError(f"--eval.suite is what --suite says too, got both, --suite {suite}; give one")
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

    @contextmanager
    def one() -> Generator[None, None, None]:
        try:
            with _interruptible():
                yield
        except api.ShardDone as finished:
            _say(str(finished))

    if model is not None:
        if ["data", "path"] not in [path for path, _ in parse_overrides(overrides)]:
            raise UserError(
                f"--model {model}: which images? give --data.path (and --data.name, if they are CIFAR or MNIST)"
            )
        config = bare_config("evaluation", overrides)
        folder = out or Path("evaluations") / re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name)
        with one():
            done(api.evaluate_foreign(model, config, weights=weights, out=folder, **options), folder, folder)
    else:
        configs = [_changed(run, overrides) for run in runs]
        for run, config in zip(runs, configs, strict=True):
            with one():
                done(api.evaluate_run(run, config=config, **options), Path(run) / "results", Path(run))
    if json_file and records:
        content: Any = [json.loads(record.model_dump_json()) for record in records]
        _write_json(json_file, content[0] if len(content) == 1 else content)


@app.command(context_settings=_OPEN)
def attack(
    context: typer.Context,
    objective: Annotated[str | None, typer.Option(help="What the attack maximises; cross_entropy by default.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write x, x_adv, labels and flags to this .npz file.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="No attack: score the images that clead evaluate --save-adversarial wrote.")
    ] = None,
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Run one attack, PGD-50 if nothing else is given: clead attack RUN ... [--attack.steps 100] [--objective margin]."""
    from clead import api
    from clead.attacks import ATTACKS, OBJECTIVES, UNRESTRICTED
    from clead.config import parse_overrides
    from clead.evaluation.suites import NamedAttack, attack_name
    from clead.interfaces import Search
    from clead.settings import validated

    if objective is not None:
        OBJECTIVES.get(objective)
    runs, overrides = _runs(context.args)
    if verify:
        if fresh:
            raise UserError("--fresh: with --verify nothing is attacked, so nothing is left of it; leave it out")
        useless = [f"--{key}" for key, given in (("save", save), ("objective", objective)) if given is not None]
        keys = ("eval.split", "eval.weights", "train.device")
        paths = [".".join(path) for path, _ in parse_overrides(overrides)]
        useless += [f"--{path}" for path in paths if not path.startswith("data.") and path not in keys]
        if useless:
            raise UserError(
                *(f"{name}: changes nothing with --verify, nothing is attacked; leave it out" for name in useless)
            )
        found = [api.verify(run, verify, config=_changed(run, overrides)) for run in runs]
        for result in found:
            _print_verified(result)
        if json_file:
            _write_json(json_file, found[0] if len(found) == 1 else found)
        return
    settings = parse_overrides(overrides)
    given = {path[1]: value for path, value in settings if path[0] == "attack" and len(path) == 2}
    name = str(given.get("name", "pgd"))
    if name in UNRESTRICTED.names():
        for option, useless in (("--objective", objective is not None), ("--save", save is not None)):
            if useless:
                raise UserError(
                    f"{option}: changes nothing for the {name} attack, which is in no norm ball; leave it out"
                )
        del given["name"]
        unrestricted = validated(UNRESTRICTED.get(name), given, "attack")
        keys = ("attack", "eval.batch_size")

        def work(run: str, config: RunConfig) -> Any:
            return api.unrestricted_run(run, unrestricted, config=config, fresh=fresh)

        _measure(runs, overrides, keys, work, json_file)
        return
    if ":" not in name and name not in (known := [*ATTACKS.names(), *UNRESTRICTED.names()]):
        raise UserError(f"attack.name: unknown attack {name!r}; {did_you_mean(name, known)}")
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
    foreign = None
    if ":" in name:  # torchattacks:NAME or foolbox:NAME, with the settings of that class
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
        if objective is not None and isinstance(used, Search):
            raise UserError(
                f"--objective: {attack_name(used)} searches by itself and maximises none, got {objective}; leave it out"
            )
        name = attack_name(used, objective or "cross_entropy")
        result = "attack-" + re.sub(r"[^a-z0-9]+", "-", name.lower().replace("×", "x"))
        with _interruptible():
            evaluation = api.evaluate_run(
                run,
                config=config,
                attacks=[NamedAttack(name, used, objective or "cross_entropy")],
                result=result,
                fresh=fresh,
            )
        _print_record(evaluation.record)
        _say(f"record: {run}/results/{result}.json")
        contents.append(json.loads(evaluation.record.model_dump_json()))
        if save:
            _save_images(save, evaluation)
    if json_file:
        _write_json(json_file, contents[0] if len(contents) == 1 else contents)


@app.command(context_settings=_OPEN)
def certify(
    context: typer.Context,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise, in pixel units of [0, 1].")] = 0.25,
    n: Annotated[
        int, typer.Option("--n", help="Noisy copies per image, which bound the class's probability.")
    ] = 10_000,
    n0: Annotated[int, typer.Option("--n0", help="Noisy copies per image, which choose the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="Probability, per image, that the certificate is wrong.")] = 0.001,
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Certify runs in L2 by randomised smoothing: clead certify RUN ... [--sigma 0.25] [--eval.images 500]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        if config.data.augment.gaussian != sigma > 0:
            trained = config.data.augment.gaussian
            _say(
                f"note: {run} was trained with noise σ {trained:g} (data.augment.gaussian), not {sigma:g}: expect small radii"
            )
        return api.certify_run(run, config=config, sigma=sigma, n=n, n0=n0, alpha=alpha, fresh=fresh)

    runs, overrides = _runs(context.args)
    _measure(runs, overrides, ("eval.batch_size",), work, json_file)


@app.command(context_settings=_OPEN)
def detect(
    context: typer.Context,
    detectors: Annotated[
        str, typer.Option(help="Which, with commas: mahalanobis, nearest_neighbours, disagreement.")
    ] = "mahalanobis,nearest_neighbours,disagreement",
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Attack runs and detectors of attacks together: clead detect RUN ... [--eval.images 300, the default]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.detect_run(run, config=config, detectors=_parts(detectors), fresh=fresh)

    runs, overrides = _runs(context.args)
    _measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file)


@app.command(context_settings=_OPEN)
def corruptions(
    context: typer.Context,
    severities: Annotated[str, typer.Option(help="Which of 1 to 5, with commas.")] = "1,2,3,4,5",
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Measure runs under 15 common corruptions: clead corruptions RUN ... [--severities 1,3,5]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        levels: list[Any] = [int(part) if part.isdecimal() else part for part in _parts(severities)]
        return api.corruptions_run(run, config=config, severities=levels, fresh=fresh)

    runs, overrides = _runs(context.args)
    _measure(runs, overrides, ("eval.batch_size",), work, json_file)


@app.command(context_settings=_OPEN)
def probe(
    context: typer.Context,
    strengths: Annotated[
        str, typer.Option(help="C of the logistic regression, with commas; validation images choose.")
    ] = "0.001,0.01,0.1,1,10",
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Fit a linear classifier on runs' frozen features, and attack through both: clead probe RUN ... [--data.path OTHER]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.probe_run(run, config=config, strengths=_numbers(strengths), fresh=fresh)

    runs, overrides = _runs(context.args)
    _measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file)


@app.command(context_settings=_OPEN)
def distances(
    context: typer.Context,
    attacks: Annotated[str, typer.Option(help="Which, with commas: fmn, deepfool, fab, cw.")] = "fmn",
    fresh: Fresh = False,
    json_file: Json = None,
) -> None:
    """Find how far wrong answers are, robust accuracy at every eps: clead distances RUN ... [--attacks fmn,deepfool]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.distances_run(run, config=config, attacks=_parts(attacks), fresh=fresh)

    runs, overrides = _runs(context.args)
    _measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file)


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
    from clead.attacks import OBJECTIVES, UNRESTRICTED

    print(f"recipes: {', '.join(config.recipe_names())}")
    for group, (_, _, names) in config.choice_keys().items():
        print(f"{group}: {', '.join(names)}")
    print(f"unrestricted attacks: {', '.join(UNRESTRICTED.names())}")
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
        useless = path[0] in (*GROUPS, "stages") and path[0] not in groups and key != "train.device"
        if useless or ("attack" in groups and path[0] == "eval" and path[-1] in suite):
            hint = instead if path[0] in ("attack", "eval") else f"settings of {', '.join(groups)} and train.device do"
            problems.append(f"--{key}: changes nothing here, the run is trained already; {hint}")
    if problems:
        raise UserError(*problems)


def _measure(
    runs: list[str],
    overrides: list[str],
    keys: tuple[str, ...],
    work: Callable[[str, RunConfig], Any],
    json_file: Path | None,
) -> None:
    """Measure runs, print what was found, and keep it. ``keys``: groups and keys that matter, besides data and images."""
    from rich.console import Console

    from clead.config import documented_keys, parse_overrides
    from clead.report.tables import summary

    used = ("data", "train.device", "eval.images", "eval.split", "eval.weights", "eval.seed", *keys)
    # A key that nobody knows is told so by the configuration.
    known = {f"{group}.{key}" for group, _, key, *_ in documented_keys()} | {"threat.norm", "attack.name"}
    given = [".".join(path) for path, _ in parse_overrides(overrides)]
    known |= {key for key in given if key.startswith("stages.")}
    useless = [key for key in given if key in known and key not in used and key.split(".")[0] not in used]
    if useless:
        raise UserError(*(f"--{key}: changes nothing here; settings of {', '.join(used)} do" for key in useless))
    configs = [_changed(run, _without(overrides, "--attack.")) for run in runs]
    contents = []
    for run, config in zip(runs, configs, strict=True):
        with _interruptible():
            measurement = work(run, config)
        table, sentence = summary(measurement)
        Console(width=max(100, Console().width)).print(table)
        _say(f"record: {run}/results/{measurement.kind}.json\n{sentence}")
        contents.append(json.loads(measurement.model_dump_json()))
    if json_file:
        _write_json(json_file, contents[0] if len(contents) == 1 else contents)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise UserError(f"--strengths must be numbers above 0, with commas, got {text!r}") from None


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
    if record.transferred is not None:
        table.add_row(record.transferred.name, *_shown(record.transferred.robust), "")
    table.add_row("worst case per image", *_shown(record.worst), f"{record.seconds:.1f}", style="bold")
    Console().print(table)
    for note in record.notes:
        print(f"note: {note}")
    for check in record.checks:
        if not check.passed:
            print(f"check {check.name} failed: {check.explanation}")


def _verdict(record: Any) -> str:
    from clead.evaluation.suites import in_words

    worst, threat = record.worst, record.threat
    failed = [check.name for check in record.checks if not check.passed]
    said = (
        f"{record.run}: {worst.accuracy:.1%} of {worst.n} {record.data.split} images (95 % interval {worst.low:.1%} – "
        f"{worst.high:.1%}) withstand {threat.norm} {threat.eps_text} under {in_words(record)}; "
        f"{record.clean.accuracy:.1%} are right when clean."
    )
    if (stored := record.transferred) is not None:
        said += (
            f"\nThe {stored.robust.accuracy:.1%} on stored images is not robustness: those were made for another model, which "
            f"{stored.fooled:.1%} of them fool, before this one was trained; an attacker makes them for this one."
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
    stored = ["stored (transferred)"] if any(row["transferred"] is not None for row in rows) else []
    for column in ("run", "clean", *names, *stored, "worst case", "95 % interval", "compute"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        cells = [f"{row['attacks'][name]:.1%}" if name in row["attacks"] else "–" for name in names]
        cells += [f"{row['transferred']:.1%}" if row["transferred"] is not None else "–" for _ in stored]
        compute = f"{row['forward_equivalents']:.0f}" if row["forward_equivalents"] else "–"
        interval = f"{row['robust_low']:.1%} – {row['robust_high']:.1%}"
        table.add_row(
            row["run"], f"{row['clean_accuracy']:.1%}", *cells, f"{row['robust_accuracy']:.1%}", interval, compute
        )
    Console(width=max(100, Console().width)).print(table)
    print(
        "compute: forward-equivalents per training image. Robust accuracy is an upper bound: a stronger attack can only lower it."
    )
    if len(rows) > 1 and not comparison["pairs"]:
        print("not tested against each other: these are not records of the same images, threat and attacks")
    for pair in comparison["pairs"]:
        print(
            f"{pair['a']} against {pair['b']}: {pair['only_a']} images held only by the first, "
            f"{pair['only_b']} only by the second, McNemar exact p = {pair['p_value']:.2g}"
        )


def _print_profile(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    step = found["step_ms"]
    table = Table(title=f"A training step on {found['device']}, {found['threads']} threads: {step:.1f} ms")
    for name in ("part", "ms", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, spent in found["parts"].items():
        table.add_row(name, f"{spent:.1f}", f"{spent / step:.0%}")
    table.add_section()
    for name, spent, calls in found["operators"]:
        table.add_row(f"{name} ({calls:.0f} calls)", f"{spent:.1f}", f"{spent / step:.0%}")
    Console().print(table)
    _say(
        f"{found['images_per_second']:.0f} images/s; {found['forward_equivalents']:.1f} forward-equivalents per image, which take "
        f"{found['bound_ms']:.1f} ms at the speed of a plain forward: the step takes {step / found['bound_ms']:.2f} times that\n"
        "views: the attack and other images; rest: logging, weight perturbation; below, operators in all parts"
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
