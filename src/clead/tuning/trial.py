"""One trial: train its seeds, measure them on validation images, and stop early if it falls behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from clead.api import evaluate_run, read_record, train
from clead.atomic_io import remove_tree_inside
from clead.config import RunConfig
from clead.errors import NotEnoughMemory, out_of_memory
from clead.evaluation.state import UntrustedState
from clead.results.record import Record
from clead.training.finite import NonFiniteLoss
from clead.tuning.space import SearchSpec

RUNGS = 10
"""Trials are compared with each other at every tenth of their training: their steps and epochs differ."""
RECORD = "validation"
Report = Callable[[int, float], bool]
"""Is told a score at a rung, 1 to RUNGS − 1, and says whether the trial should stop."""


class TrialPruned(Exception):
    """The trial's validations are worse than the median of the others'."""


class Failed(Exception):
    """The trial cannot be trained with these values; the message says why."""


def run_trial(search: SearchSpec, values: Mapping[str, Any], folder: Path, report: Report | None) -> dict[str, float]:
    """Return ``clean`` and ``robust`` accuracy on validation images, means over the seeds; the test images stay untouched.

    Whatever an earlier attempt left is taken up: finished seeds are not trained again, a stopped one goes on from its checkpoint.

    Args:
        search: the recipe and how trials are measured.
        values: of the keys in the space.
        folder: run directories are ``FOLDER-seed-N``.
        report: is told of the first seed's validations; None: never stop.

    Raises TrialPruned, Failed, or what stops a training.
    """
    scores = []
    try:
        for seed in range(search.settings.seeds):
            path = folder.with_name(f"{folder.name}-seed-{seed}")
            scores.append(_run_seed(search, values, seed, path, report if seed == 0 else None))
    except NonFiniteLoss as error:
        raise Failed(f"diverged: {error}") from None
    except (RuntimeError, MemoryError, NotEnoughMemory) as error:
        if not out_of_memory(error):
            raise
        raise Failed("the device is out of memory") from None
    return {
        "clean": fmean(record.clean_accuracy for record in scores),
        "robust": fmean(record.robust_accuracy for record in scores),
        "images": scores[0].data.n,
    }


def _run_seed(search: SearchSpec, values: Mapping[str, Any], seed: int, path: Path, report: Report | None) -> Record:
    config = search.trial_config(values)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=config.train.seed + seed))
    record = path / "results" / f"{RECORD}.json"
    if record.exists():
        return read_record(record)
    if not (path / "config.yaml").exists():
        remove_tree_inside(path)  # of a kill while it was made
    rung = 0

    def after_validation(fraction: float, clean: float, robust: float) -> None:
        nonlocal rung
        reached = min(int(fraction * RUNGS + 1e-9), RUNGS - 1)
        if report is None or fraction >= 1 or reached <= rung:
            return
        rung = reached
        if report(rung, search.score(clean, robust)):
            raise TrialPruned

    train(config, out=path, resume=True, show=False, after_validation=after_validation)
    measured = _measured(search, config)
    try:
        return evaluate_run(path, config=measured, result=RECORD, show=False).record
    except UntrustedState:  # begun by another machine of the study: short enough to be repeated
        return evaluate_run(path, config=measured, result=RECORD, fresh=True, show=False).record


def _measured(search: SearchSpec, config: RunConfig) -> RunConfig:
    """Return how the trial is measured: on validation images, against the recipe's own threat, whatever it trains with."""
    evaluation = dataclasses.replace(
        config.eval,
        split="val",
        suite=search.settings.suite,
        images=search.settings.images,
        steps=None,
        curve_points=0,
        check_images=0,
        gallery=0,
    )
    return dataclasses.replace(config, threat=search.config.threat, eval=evaluation)
