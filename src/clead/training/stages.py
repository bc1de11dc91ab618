"""Several trainings in one run, one after another, each from the weights that the one before it ended with."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clead.atomic_io import read_json, read_regular, remove_tree_inside, write_atomically
from clead.config import RunConfig
from clead.devices import device_of
from clead.distributed import World, init_world, local_device
from clead.interfaces import Splits
from clead.models.split import SplitModel, copied
from clead.runs.directory import RunDir
from clead.training.freezing import start_from, unfrozen_afterwards
from clead.training.pseudo_labels import PSEUDO_LABELS, pseudo_labels, with_pseudo_labels, without_pseudo_labels
from clead.training.signals import Interrupted
from clead.training.trainer import Callbacks, TrainResult, fit
from clead.weights.files import load_weights, save_weights

_ADDED_UP = ("step", "epoch", "seconds", "forward_equivalents")


def fit_stages(
    config: RunConfig,
    splits: Splits,
    model: SplitModel,
    run: RunDir,
    *,
    show: bool = True,
    callbacks: Callbacks | None = None,
) -> TrainResult:
    """Train the stages of ``config`` in ``run/stages/N-NAME``, each a complete run directory, and join them in ``run``.

    A stage begins with the last weights of the one before it (those averaged, if it averages), and with its projection head if both
    have one of the same size. What is finished is not done again and what was begun goes on, so this is also how a run is resumed.
    ``run`` gets the weights of the last stage and the metrics of all, whose steps, epochs, seconds and costs go on counting.
    ``callbacks`` are called in the last stage, as in ``fit``.

    Returns:
        What all stages cost together; best step and validation are the last one's. Raises as ``fit``.
    """
    trainings = config.trainings()
    folders = [
        RunDir(run.path / "stages" / f"{number}-{stage.name}") for number, stage in enumerate(config.stages, start=1)
    ]
    by_name = {stage.name: folder for stage, folder in zip(config.stages, folders, strict=True)}
    outcomes: list[TrainResult] = []
    processes = init_world(local_device(device_of(config.train.device)))
    for number, (stage, training, place) in enumerate(zip(config.stages, trainings, folders, strict=True)):
        outcome = processes.broadcast(_finished(place.path / "outcome.json"))
        if outcome is None:
            source = training.data.pseudo_labels_from
            if number:
                dim = training.method.embedding_dim if training.method.uses_embedding else None
                start_from(model, folders[number - 1].path, which="last", dim=dim)
            begun = processes.broadcast((place.path / "config.yaml").exists())
            if not begun and processes.is_main:
                remove_tree_inside(place.path)  # a kill while it was made
                RunDir.create(place.path, training)
            if processes.is_main:
                place.note_environment()
            seen = splits
            if source != config.data.pseudo_labels_from:
                of_stage = None if source is None else by_name[source]
                seen = _labelled_by(of_stage, splits, model, place, training, processes, show=show)
            share = training.data.labelled_share
            if share != config.data.labelled_share:
                seen = dataclasses.replace(seen, train=dataclasses.replace(seen.train, labelled_share=share))
            try:
                with unfrozen_afterwards(model):
                    outcome = fit(
                        training,
                        seen,
                        model,
                        place,
                        resume=begun,
                        show=show,
                        callbacks=callbacks if stage is config.stages[-1] else None,
                        stored=run.path / "stored",
                    )
            except Interrupted as error:
                where = f"stage {stage.name} ({number + 1} of {len(trainings)})"
                raise Interrupted(f"{where}: {str(error).replace(str(place.path), str(run.path))}") from error
            if processes.is_main:
                write_outcome(place.path, outcome)
            outcome = processes.broadcast(outcome)
        outcomes.append(outcome)
        finished = zip(config.stages, folders, outcomes, strict=False)
        if processes.is_main:
            write_metrics(run, [(each.name, folder, outcome) for each, folder, outcome in finished])
    for name in ("best", "last") if processes.is_main else ():
        write_atomically(
            run.path / f"{name}.safetensors", read_regular(folders[-1].path / f"{name}.safetensors", sys.maxsize)
        )
    return _sum(outcomes)


def _labelled_by(
    teacher: RunDir | None,
    splits: Splits,
    model: SplitModel,
    folder: RunDir,
    training: RunConfig,
    processes: World,
    *,
    show: bool,
) -> Splits:
    """Return the images with the pseudo-labels of an earlier stage's last weights, kept in ``here``; without any if None."""
    if teacher is None:
        return without_pseudo_labels(splits)
    file, source = folder.path / PSEUDO_LABELS, training.data.pseudo_labels_from
    if processes.is_main and not file.exists():
        trained = copied(model)
        start_from(trained, teacher.path, which="last")
        save_weights(file, *pseudo_labels(trained, splits, source, device_of(training.train.device)))
    processes.barrier()
    loaded = load_weights(file)
    return with_pseudo_labels(splits, *loaded, source=f"stage {source}", file=file, show=show and processes.is_main)


def _finished(file: Path) -> TrainResult | None:
    """Return what a finished stage reported; None if it has not, or cannot be read: its last checkpoint tells it again."""
    try:
        return TrainResult(**read_json(file))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(path: Path, outcome: TrainResult) -> None:
    """Write ``outcome.json``, which says that the training in ``path`` is finished."""
    write_atomically(path / "outcome.json", json.dumps(dataclasses.asdict(outcome), indent=2).encode())


def write_metrics(run: RunDir, finished: Sequence[tuple[str, RunDir, TrainResult]]) -> None:
    """Join the metrics of the finished stages in ``run``, each line with its stage's name, counts going on from stage to stage."""
    lines: list[dict[str, Any]] = []
    before = dict.fromkeys(_ADDED_UP, 0.0)
    for name, folder, outcome in finished:
        for line in folder.history():
            counts = {key: _rounded(before[key] + line[key]) for key in _ADDED_UP if key in line}
            lines.append({**line, **counts, "stage": name})
        ended = (outcome.steps, outcome.epochs, outcome.seconds, outcome.forward_equivalents)
        before = {key: before[key] + value for key, value in zip(_ADDED_UP, ended, strict=True)}
    write_atomically(run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _rounded(value: float) -> float:
    return int(value) if value == int(value) else round(value, 4)


def _sum(outcomes: Sequence[TrainResult]) -> TrainResult:
    before, last = outcomes[:-1], outcomes[-1]
    steps = sum(outcome.steps for outcome in before)
    cpu = [outcome.cpu_seconds for outcome in outcomes if outcome.cpu_seconds is not None]
    return dataclasses.replace(
        last,
        steps=steps + last.steps,
        best_step=steps + last.best_step,
        cpu_seconds=sum(cpu) if len(cpu) == len(outcomes) else None,
        collapsed_at=last.collapsed_at if last.collapsed_at < 0 else steps + last.collapsed_at,
        **{
            key: sum(getattr(outcome, key) for outcome in outcomes)
            for key in ("epochs", "seconds", "forward_equivalents")
        },
    )
