"""Measure a run: certified radii, detection, corruptions, linear probe, distances, attacks without a norm and more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from clead.config import RunConfig
from clead.errors import UserError
from clead.interfaces import Splits
from clead.measurements import MEASUREMENTS
from clead.measurements.base import Measurement, MeasurementRecord, MeasurementTarget, measure_target
from clead.models.threshold import judged
from clead.renamed import warn_renamed
from clead.runs.gallery import with_gallery
from clead.runs.loading import open_run, results_folder
from clead.settings import validated
from clead.tasks import task_name
from clead.tasks.binary import Binary
from clead.tasks.classification import CLASSIFICATION, Classification


def measure(
    path: str | Path,
    measurement: str | Measurement,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
    **settings: Any,
) -> MeasurementRecord:
    """Measure a run, and leave ``RUN/results/KIND.json``, such as ``results/certify.json``.

    A call that was stopped goes on where it was when it is called again.

    Args:
        path: a run directory.
        measurement: a name, such as ``certify``, ``corruptions``, ``detect``, ``distances``, ``probe`` or ``universal``, or its
            settings as an object.
        config: the run's configuration with changes (another eps, other data); the run's own if None.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.
        data: loaded images instead of ``config.data``.
        fresh: forget what a stopped call has left.
        trust_state: continue what another user or another machine has begun.
        out: folder of the JSON file, instead of ``RUN/results``.
        show: show progress on stderr.
        **settings: of the measurement, such as ``sigma=0.5``.

    Returns:
        The record; ``result`` is what was found. Raises UserError on unknown names or settings, or values out of range.
    """
    if isinstance(measurement, str):
        chosen: Measurement = validated(MEASUREMENTS.get(measurement), settings)
    elif settings:
        raise UserError(f"give settings or an object that has them, got both: {', '.join(settings)}; leave them out")
    else:
        chosen = measurement
    run = with_gallery(open_run(path, config, model, data, images=chosen.images, same_classes=not chosen.other_classes))
    options, task = run.config.eval, run.config.task
    if not isinstance(task, Classification) and (name := task_name(task)) not in chosen.tasks:
        raise UserError(
            f"{path} is of the task {name}, and {chosen.kind} measures one class per image; use clead evaluate"
        )
    if chosen.validation_images and options.split != "test":
        raise UserError(f"eval.split: the validation images {chosen.validation_images}, got {options.split}; use test")
    target = MeasurementTarget(
        model=judged(run.model, task),
        images=run.images,
        splits=run.splits,
        threat=run.config.threat,
        seed=options.seed,
        device=run.device,
        batch_size=options.batch_size or chosen.batch_size,
        steps=options.steps or chosen.steps,
        about=dataclasses.replace(run.target, task=CLASSIFICATION) if isinstance(task, Binary) else run.target,
        labels={"labelled": run.config.data.labelled, "label_noise": run.config.data.label_noise},
        notes=run.notes,
        show=show,
    )
    file = results_folder(run.run, out) / f"{chosen.kind}.json"
    return measure_target(chosen, target, file, fresh=fresh, trust_state=trust_state)


OLD_NAMES = {f"{name}_run": name for name in ("certify", "corruptions", "detect", "distances", "probe")}
OLD_NAMES["unrestricted_run"] = "attack"
"""Functions of version 0.1, each for one measurement; they go with version 0.3."""


def old_function(name: str) -> Callable[..., MeasurementRecord]:
    """Return what did one measurement in version 0.1; it warns."""

    def call(path: str | Path, *attack: Any, **keywords: Any) -> MeasurementRecord:
        kind = OLD_NAMES[name]
        warn_renamed(f"clead.{name}", f'clead.measure(run, "{kind}", …)')
        return measure(path, kind, **({"attack": attack[0]} if attack else {}), **keywords)

    return call
