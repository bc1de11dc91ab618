"""Commands that measure runs otherwise: certify, detect, corruptions, probe, distances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clead.cli.app import OPEN, Fresh, Json, ResultsOut, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, one_folder, runs_and_overrides, split_commas, without
from clead.cli.printing import about
from clead.errors import UserError

if TYPE_CHECKING:
    from clead.config import RunConfig


@app.command(context_settings=OPEN)
def certify(
    context: typer.Context,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise, in pixel units of [0, 1].")] = 0.25,
    n: Annotated[
        int, typer.Option("--n", help="Noisy copies per image, which bound the class's probability.")
    ] = 10_000,
    n0: Annotated[int, typer.Option("--n0", help="Noisy copies per image, which choose the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="Probability, per image, that the certificate is wrong.")] = 0.001,
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Certify runs in L2 by randomised smoothing: clead certify RUN ... [--sigma 0.25] [--eval.images 500]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        if config.data.augment.gaussian != sigma > 0:
            trained = config.data.augment.gaussian
            echo(
                f"note: {run} was trained with noise σ {trained:g} (data.augment.gaussian), not {sigma:g}: expect small radii"
            )
        return api.certify_run(
            run, config=config, sigma=sigma, n=n, n0=n0, alpha=alpha, fresh=fresh, trust_state=trust_state, out=out
        )

    runs, overrides = runs_and_overrides(context.args)
    measure(runs, overrides, ("eval.batch_size",), work, json_file, out)


@app.command(context_settings=OPEN)
def detect(
    context: typer.Context,
    detectors: Annotated[
        str, typer.Option(help="Which, with commas: mahalanobis, nearest_neighbours, disagreement.")
    ] = "mahalanobis,nearest_neighbours,disagreement",
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Attack runs and detectors of attacks together: clead detect RUN ... [--eval.images 300, the default]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.detect_run(
            run, config=config, detectors=split_commas(detectors), fresh=fresh, trust_state=trust_state, out=out
        )

    runs, overrides = runs_and_overrides(context.args)
    measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file, out)


@app.command(context_settings=OPEN)
def corruptions(
    context: typer.Context,
    severities: Annotated[str, typer.Option(help="Which of 1 to 5, with commas.")] = "1,2,3,4,5",
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Measure runs under 15 common corruptions: clead corruptions RUN ... [--severities 1,3,5]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        levels: list[Any] = [int(part) if part.isdecimal() else part for part in split_commas(severities)]
        return api.corruptions_run(run, config=config, severities=levels, fresh=fresh, trust_state=trust_state, out=out)

    runs, overrides = runs_and_overrides(context.args)
    measure(runs, overrides, ("eval.batch_size",), work, json_file, out)


@app.command(context_settings=OPEN)
def probe(
    context: typer.Context,
    strengths: Annotated[
        str, typer.Option(help="C of the logistic regression, with commas; validation images choose.")
    ] = "0.001,0.01,0.1,1,10",
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Fit a linear classifier on runs' frozen features, and attack through both: clead probe RUN ... [--data.path OTHER]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.probe_run(
            run, config=config, strengths=_numbers(strengths), fresh=fresh, trust_state=trust_state, out=out
        )

    runs, overrides = runs_and_overrides(context.args)
    measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file, out)


@app.command(context_settings=OPEN)
def distances(
    context: typer.Context,
    attacks: Annotated[str, typer.Option(help="Which, with commas: fmn, deepfool, fab, cw.")] = "fmn",
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Find how far wrong answers are, robust accuracy at every eps: clead distances RUN ... [--attacks fmn,deepfool]."""
    from clead import api

    def work(run: str, config: RunConfig) -> Any:
        return api.distances_run(
            run, config=config, attacks=split_commas(attacks), fresh=fresh, trust_state=trust_state, out=out
        )

    runs, overrides = runs_and_overrides(context.args)
    measure(runs, overrides, ("threat", "eval.steps", "eval.batch_size"), work, json_file, out)


def measure(
    runs: list[str],
    overrides: list[str],
    keys: tuple[str, ...],
    work: Callable[[str, RunConfig], Any],
    json_file: Path | None,
    out: Path | None = None,
) -> None:
    """Measure runs, print what was found, and keep it. ``keys``: groups and keys that matter, besides data and images."""
    from clead.config import documented_keys, parse_overrides
    from clead.output import console
    from clead.report.tables import summary

    used = ("data", "train.device", "eval.images", "eval.split", "eval.weights", "eval.seed", *keys)
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
        with interruptible():
            measurement = work(run, config)
        table, sentence = summary(measurement)
        console(width=100).print(table)
        echo(about(measurement))
        for note in measurement.notes:
            echo(f"note: {note}")
        echo(f"record: {out or Path(run) / 'results'}/{measurement.kind}.json\n{sentence}")
        contents.append(json.loads(measurement.model_dump_json()))
    if json_file:
        write_json(json_file, contents[0] if len(contents) == 1 else contents)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in split_commas(text)]
    except ValueError:
        raise UserError(f"--strengths must be numbers above 0, with commas, got {text!r}") from None
