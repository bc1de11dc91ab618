"""Runs that are opened: their model, configuration and images."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clead.atomic_io import read_json
from clead.config import Eval, RunConfig
from clead.data.base import shuffle_if_sorted
from clead.data.channels import mean_std
from clead.data.classes import align_classes
from clead.devices import device_of
from clead.errors import UserError
from clead.interfaces import ImageSet, Splits
from clead.models.build import build_model
from clead.models.split import SplitModel, adapt, weights
from clead.results.record import Training
from clead.results.target import EvaluationTarget
from clead.runs.directory import RunDir
from clead.runs.zoo import results_of_zoo
from clead.tasks import Task, task_name
from clead.tasks.retrieval import Retrieval
from clead.weights.files import check_weights, load_weights

_log = logging.getLogger("clead")

_NAMED = 10  # of the files left out


def load(path: str | Path, *, weights: str = "best", model: nn.Module | None = None) -> SplitModel:
    """Return the trained model of a run directory, in eval mode, without the projection head.

    Args:
        path: a run directory, or a model of the zoo, such as ``zoo:digits``.
        weights: ``best`` or ``last``.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.

    Raises UserError if the weights are missing, truncated, a pickle, or of another architecture.

    >>> load("runs/nothing")
    Traceback (most recent call last):
        ...
    clead.errors.UserError: runs/nothing is not a run directory (no config.yaml in it); give a directory that clead train made
    """
    run = RunDir.open(Path(path))
    return load_model(run, run.config(), weights, model)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model on its device, and the images that it is evaluated on.

    ``notes`` are what a reader of a figure must know of the images and the weights.
    """

    config: RunConfig
    model: nn.Module
    images: ImageSet
    splits: Splits
    target: EvaluationTarget
    device: torch.device
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.splits.classes)


@dataclasses.dataclass(frozen=True)
class OpenedRun(OpenedModel):
    """A run with its model and images."""

    model: SplitModel
    run: RunDir


def open_run(
    path: str | Path,
    config: RunConfig | None,
    model: nn.Module | None,
    data: Splits | None,
    *,
    images: int | None = None,
    same_classes: bool = True,
) -> OpenedRun:
    """Load a run, its model and its images; ``images`` counts where ``config.eval`` names no number."""
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    if images is not None and config.eval.images is None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=images))
    check_task(config.task, trained.task, str(run.path))
    loaded, weight_notes = _loaded(run, config, config.eval.weights, model)
    chosen, splits = evaluated_images(run, config, trained, data, same_classes=same_classes)
    tree = config.to_dict()
    target = EvaluationTarget(
        name=run.name,
        model=tree["model"].get("factory") or tree["model"].get("network") or tree["model"]["name"],
        weights=config.eval.weights,
        data=data_name(config),
        split=config.eval.split,
        data_fingerprint=splits.fingerprint,
        classes=splits.classes,
        training=training_of(run, trained),
        task=config.task,
        **split_facts(splits, config.eval.split),
    )
    device = device_of(config.train.device)
    notes = (*data_notes(splits), *run.notes(), *weight_notes)
    return OpenedRun(config, loaded.to(device), chosen, splits, target, device, notes, run)


def evaluated_images(
    run: RunDir, config: RunConfig, trained: RunConfig, data: Splits | None, *, same_classes: bool = True
) -> tuple[ImageSet, Splits]:
    """Return the images that ``config.eval`` chooses; raises UserError unless they suit the trained model."""
    # The run's own seed: another one would move training images into the validation split.
    needs_training = not isinstance(config.task, Retrieval)
    splits = data if data is not None else config.data.load(trained.train.seed, training=needs_training)
    _, metadata = load_weights(run.weights(config.eval.weights))
    if same_classes and not isinstance(config.task, Retrieval):
        splits, notes = align_classes(splits, metadata["classes"], source=str(run.path), names_must_agree=True)
        splits = dataclasses.replace(splits, notes=(*splits.notes, *notes))
    if tuple(metadata["shape"]) != image_shape(splits):
        raise UserError(
            f"{run.path} was trained on images of shape {tuple(metadata['shape'])}, the data has {image_shape(splits)}; "
            "set data.image_size and data.channels"
        )
    return chosen_images(config.eval, splits), splits


def check_task(task: Task, trained: Task, source: str) -> None:
    """Raise UserError unless a model that was trained for the task ``trained`` can be evaluated in ``task``."""
    name, able = task_name(trained), task_name(task)
    if name != able and name not in task.reads:
        raise UserError(
            f"{source} was trained for the task {name}, got --task {able}; leave it out, or give --task {name}"
        )


def chosen_images(options: Eval, splits: Splits) -> ImageSet:
    """Return the images of ``splits`` that an evaluation with these options is of."""
    images = shuffle_if_sorted(splits.test if options.split == "test" else splits.val)
    return images if options.images is None else images.subset(torch.arange(min(options.images, len(images))))


def results_folder(run: RunDir, out: str | Path | None) -> Path:
    """Return where results go: ``out``, ``RUN/results``, or ``runs/zoo-NAME``.

    Raises UserError if the run is read-only and there is no ``out``.
    """
    if (out := out or results_of_zoo(run.path)) is not None:
        return Path(out)
    folder = run.path / "results"
    if not os.access(folder if folder.exists() else run.path, os.W_OK):
        raise UserError(f"{run.path} is read-only; add --out DIR for the results, such as --out evaluations/{run.name}")
    return folder


def split_facts(splits: Splits, split: str) -> dict[str, Any]:
    """Return what a ``EvaluationTarget`` says of where its images come from, as keywords."""
    unreadable = (f"{name}: cannot be decoded" for name in splits.unreadable)
    total = len(splits.test if split == "test" else splits.val)
    return {"origin": splits.origin, "skipped": (*splits.skipped, *unreadable), "total": total}


def data_notes(splits: Splits) -> list[str]:
    """Return what a reader of a figure on these images must know of them: what they are, and what was left out."""
    left_out = (
        (splits.unreadable, "unreadable images of the data set left out"),
        (splits.skipped, "files of the data set not read"),
    )
    counts = [f"{len(names)} {what}: {shortened(names)}" for names, what in left_out if names]
    return [*splits.notes, *counts]


def shortened(names: Sequence[str]) -> str:
    """Return the first ten names, and how many more there are."""
    more = f", … and {len(names) - _NAMED} more, all in the record (data.skipped)" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def load_model(run: RunDir, config: RunConfig, which: str, model: nn.Module | None) -> SplitModel:
    """Return the model of ``run`` with its ``which`` weights, best or last; ``model`` is what was trained, if that was given."""
    return _loaded(run, config, which, model)[0]


def _loaded(run: RunDir, config: RunConfig, which: str, model: nn.Module | None) -> tuple[SplitModel, list[str]]:
    """Return the model and what must be said of its weights, which is also logged."""
    path = run.weights(which)
    content, metadata = load_weights(path)
    if lacking := [key for key in ("shape", "classes", "mean_std") if key not in metadata]:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}, which clead train writes into it; give a run's own weights"
        )
    shape, k = tuple(metadata["shape"]), len(metadata["classes"])
    if model is not None:
        built = adapt(model, sample_shape=shape, num_classes=k)
    else:
        mean, std = metadata["mean_std"]
        built = build_model(
            config.model, shape[0], config.task.outputs(k), mean, std, seed=0, sample_shape=shape, pretrained=False
        )
    notes = check_weights(weights(built), content, str(path))
    for note in notes:
        _log.warning("note: %s", note)
    built.load_state_dict(content)
    return built.eval(), notes


def build(config: RunConfig, splits: Splits, *, pretrained: bool = True) -> SplitModel:
    """Return the model of ``config`` for these images, its weights drawn from ``train.seed``; ``pretrained`` as ``build_model``."""
    mean, std = mean_std(splits)
    shape = image_shape(splits)
    seed, k = config.train.seed, config.task.outputs(len(splits.classes))
    return build_model(config.model, shape[0], k, mean, std, seed=seed, sample_shape=shape, pretrained=pretrained)


def image_shape(splits: Splits) -> tuple[int, int, int]:
    """Return (C, H, W)."""
    c, h, w = splits.train.images.shape[1:]
    return c, h, w


def data_name(config: RunConfig) -> str:
    """Return what to call the images: the data set's name, or that of the user's folder or file."""
    path = getattr(config.data, "path", None)
    fields: Any = type(config.data).__pydantic_fields__
    is_of_the_user = path is not None and fields["path"].is_required()
    return Path(path).resolve().name if is_of_the_user and path is not None else config.to_dict()["data"]["name"]


def training_of(run: RunDir, config: RunConfig) -> Training | None:
    """Return what a record says of the training, or None if it did not end."""
    path = run.path / "outcome.json"
    if not path.exists():
        return None
    try:
        outcome = read_json(path)
        keys = ("epochs", "steps", "seconds", "forward_equivalents")
        costs = {key: outcome[key] for key in keys}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or repeat clead train with --resume") from None
    return Training(method=config.to_dict()["method"]["name"], seed=config.train.seed, **costs)
