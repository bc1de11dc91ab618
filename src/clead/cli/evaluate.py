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
from clead.cli.arguments import changed, model_options, one_folder, only, positional, runs_and_overrides
from clead.cli.printing import print_record, verdict
from clead.errors import MissingExtra, UserError, did_you_mean


@app.command(context_settings=OPEN)
def evaluate(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Option(help="standard | plus | rand | quick | adaptive | queries | pgd.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a run: module:factory, file.py:factory or file.onnx; needs --data.path. With it: --model.output, "
            "--model.input, --model.classifier."
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
    from clead import api
    from clead.config import evaluation_config, parse_overrides
    from clead.evaluation.processes import rank
    from clead.evaluation.suites import SuiteName

    if model is None:
        runs, overrides = runs_and_overrides(context.args)
        if weights is not None:
            raise UserError(
                f"--weights goes with --model, got {weights} with runs {' '.join(runs)}; leave it out, a run has its own"
            )
        one_folder(out, runs)
    else:
        runs, overrides = positional(context.args)
        if runs:
            raise UserError(f"give runs or --model, got --model {model} and {' '.join(runs)}")
    if shard and merge:
        raise UserError(f"give --shard or --merge, got --shard {shard} and --merge")
    if save_adversarial and len(runs) > 1:
        raise UserError(
            f"--save-adversarial keeps the images of one run, got {len(runs)} runs; evaluate them one by one"
        )
    if suite is not None:
        if suite not in get_args(SuiteName):
            raise UserError(f"--suite: unknown suite {suite!r}; {did_you_mean(suite, get_args(SuiteName))}")
        if ["eval", "suite"] in [path for path, _ in parse_overrides(overrides)]:
            raise UserError(f"--eval.suite is what --suite says too, got both, --suite {suite}; give one")
        overrides = [*overrides, "--eval.suite", suite]
    call, overrides = model_options(model, overrides)
    only(overrides, ("data", "threat", "eval"), "choose a suite with --suite, or use clead attack")
    options: dict[str, Any] = {
        "transfer_from": transfer_from or (),
        "shard": shard,
        "merge": merge,
        "fresh": fresh,
        "trust_state": trust_state,
        "save_adversarial": save_adversarial,
    }
    records = []

    def done(evaluation: Any, folder: Path, source: Path) -> None:
        if rank() > 0:
            return
        record = evaluation.record
        records.append(record)
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

    @contextmanager
    def one() -> Generator[None, None, None]:
        try:
            with interruptible():
                yield
        except api.ShardDone as finished:
            echo(str(finished))

    if model is not None:
        if ["data", "path"] not in [path for path, _ in parse_overrides(overrides)]:
            raise UserError(
                f"--model {model}: which images? give --data.path (and --data.name, if they are CIFAR or MNIST)"
            )
        config = evaluation_config("evaluation", overrides)
        folder = out or Path("evaluations") / re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name)
        with one():
            done(api.evaluate_foreign(model, config, weights=weights, out=folder, **call, **options), folder, folder)
    else:
        configs = [changed(run, overrides) for run in runs]
        for run, config in zip(runs, configs, strict=True):
            with one():
                evaluation = api.evaluate_run(run, config=config, out=out, **options)
                done(evaluation, out or Path(run) / "results", out or Path(run))
    if json_file and records:
        content: Any = [json.loads(record.model_dump_json()) for record in records]
        write_json(json_file, content[0] if len(content) == 1 else content)
