"""``clead evaluate``: a suite of attacks on runs, or on a model from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from clead.cli.app import OPEN, Json, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, model_options, one_folder, only, out_of, positional, runs_and_overrides
from clead.cli.printing import print_record, verdict
from clead.errors import MissingExtra, UserError, did_you_mean


@app.command(context_settings=OPEN)
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(help="standard | plus | rand | quick | adaptive | black_box | pgd; of masks sea | sea-quick."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a run: module:factory, file.py:factory, timm:NAME, torchvision:NAME, hf:NAME or file.onnx; needs "
            "--data.path. With it: --model.output, --model.input, --model.classifier, --model.args.KEY."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of --model: .safetensors, .pth, .pt, a folder; FILE:KEY takes one of several."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; RUN/results, or evaluations/NAME of --model, by default."),
    ] = None,
    transfer_from: Annotated[
        list[str] | None, typer.Option(help="Try the adversarial images of this run too (may be repeated).")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: compute every n-th batch from the i-th, and stop.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make the record of all shards.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what a stopped evaluation has left.")] = False,
    trust_state: TrustState = False,
    save_adversarial: Annotated[
        Path | None, typer.Option(help="Write the adversarial images to this Parquet file.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Attack runs and record clean and robust accuracy: clead evaluate RUN ... [--suite quick] [--threat.eps 8/255].

    Keys of clead train --help can be given too, such as --eval.images, --eval.batch_size, --threat.norm and --data.path.
    """
    if shard and merge:
        raise UserError(f"give --shard or --merge, got --shard {shard} and --merge")
    runs, overrides = positional(context.args) if model else runs_and_overrides(context.args)
    _check_models(runs, model, weights, save_adversarial)
    if model is None:
        one_folder(out, runs)
    overrides = _with_suite(suite, overrides)
    call, overrides = model_options(model, overrides)
    only(overrides, ("data", "task", "threat", "eval"), "choose a suite with --suite, or use clead attack")
    options: dict[str, Any] = {
        "transfer_from": transfer_from or (),
        "shard": shard,
        "merge": merge,
        "fresh": fresh,
        "trust_state": trust_state,
        "save_adversarial": save_adversarial,
    }
    if model is not None:
        records = _evaluate_external(model, overrides, out, {"weights": weights, **call, **options})
    else:
        records = _evaluate_runs(runs, overrides, out, options)
    if json_file and records:
        content: Any = [json.loads(record.model_dump_json()) for record in records]
        write_json(json_file, content[0] if len(content) == 1 else content)


def _check_models(runs: list[str], model: str | None, weights: str | None, save_adversarial: Path | None) -> None:
    """Raise UserError unless runs or a model from elsewhere are given, and what goes with each."""
    if model is not None and runs:
        raise UserError(f"give runs or --model, got --model {model} and {' '.join(runs)}")
    if model is None and weights is not None:
        raise UserError(
            f"--weights goes with --model, got {weights} with runs {' '.join(runs)}; leave it out, a run has its own"
        )
    if save_adversarial and len(runs) > 1:
        raise UserError(
            f"--save-adversarial keeps the images of one run, got {len(runs)} runs; evaluate them one by one"
        )


def _with_suite(suite: str | None, overrides: list[str]) -> list[str]:
    """Return the overrides with ``--suite`` as one of them."""
    from clead.config import parse_overrides
    from clead.config.schema import SuiteName
    from clead.renamed import current_value

    if suite is None:
        return overrides
    suite = current_value("eval.suite", suite)
    if suite not in get_args(SuiteName):
        raise UserError(f"--suite: unknown suite {suite!r}; {did_you_mean(suite, get_args(SuiteName))}")
    if ["eval", "suite"] in [path for path, _ in parse_overrides(overrides)]:
        raise UserError(f"--eval.suite is what --suite says too, got both, --suite {suite}; give one")
    return [*overrides, "--eval.suite", suite]


def _evaluate_runs(runs: list[str], overrides: list[str], out: Path | None, options: dict[str, Any]) -> list[Any]:
    """Evaluate runs one after the other and return their records."""
    from clead import api

    configs = [changed(run, overrides) for run in runs]
    records: list[Any] = []
    for run, config in zip(runs, configs, strict=True):
        folder = out_of(run, out)
        with _shards_said():
            evaluation = api.evaluate_run(run, config=config, out=folder, **options)
            results, source = folder or Path(run) / "results", folder or Path(run)
            records += _show(evaluation, results, source, options["save_adversarial"])
    return records


def _evaluate_external(model: str, overrides: list[str], out: Path | None, options: dict[str, Any]) -> list[Any]:
    """Evaluate a model that this program did not train and return its record."""
    from clead import api
    from clead.config import evaluation_config, parse_overrides

    if ["data", "path"] not in [path for path, _ in parse_overrides(overrides)]:
        raise UserError(
            f"--model {model}: which images? give --data.path (and --data.name, if they are CIFAR or MNIST)"
        )
    config = evaluation_config("evaluation", overrides)
    folder = out or Path("evaluations") / re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name)
    records: list[Any] = []
    with _shards_said():
        evaluation = api.evaluate_external(model, config, out=folder, **options)
        records += _show(evaluation, folder, folder, options["save_adversarial"])
    return records


@contextmanager
def _shards_said() -> Generator[None, None, None]:
    """Say where a shard is when it is done, instead of a record."""
    from clead import api

    try:
        with interruptible():
            yield
    except api.ShardDone as finished:
        echo(str(finished))


def _show(evaluation: Any, folder: Path, source: Path, save_adversarial: Path | None) -> list[Any]:
    """Print a record and write its report; return it in a list, which is empty on all processes but the first."""
    from clead import api
    from clead.evaluation.processes import rank

    if rank() > 0:
        return []
    record = evaluation.record
    print_record(record)
    echo(f"record: {folder}/evaluation.json")
    if save_adversarial:
        echo(f"images: {save_adversarial}")
    try:
        page = api.write_report([source], source / "report.html", title=f"Robustness of {record.run}")
        echo(f"report: {page}")
    except MissingExtra as error:  # the record is what was asked for
        echo(f"no report: {error}")
    echo(verdict(record))
    return [record]
