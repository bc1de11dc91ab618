"""Accuracy under common corruptions: on images that nature, not an adversary, has spoilt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32
from clead.evaluation.mask_record import estimate_pixels
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.measurements import MEASUREMENTS
from clead.measurements.base import (
    Computation,
    Measured,
    Measurement,
    MeasurementRecord,
    MeasurementTarget,
    Result,
    new_table,
)
from clead.measurements.corruptions.transforms import (
    CORRUPTIONS,
    SEVERITIES,
    SMALLEST_SIDE,
    Pixels,
    check_choice,
    corrupt,
)
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.progress import Tick, progress
from clead.results.figure import ESTIMATED, Drawing, cell, cell_axes, draw, estimated, head, new_axes, style
from clead.results.format import percent
from clead.results.masks import Counts, mean_iou
from clead.results.record import Estimate, RecordModel
from clead.results.section import Details, Plot, Row, Section, Table
from clead.results.statistics import estimate
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION, Classification
from clead.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

__all__ = ["CORRUPTIONS", "SEVERITIES", "CommonCorruptions", "CorruptionResult", "corrupt", "evaluate_corruptions"]


class CorruptionCell(RecordModel):
    """Accuracy on all images, of masks that of pixels and the mIoU, under one corruption of one severity."""

    name: str
    severity: int = Field(ge=1, le=5)
    accuracy: Estimate
    miou: float | None = Field(None, ge=0, le=1)


class CorruptionResult(Result):
    """Accuracy under common corruptions: ``cells`` by corruption, then severity.

    ``mean_accuracy`` is the plain mean of all cells (1 − the paper's mCE without its division by AlexNet's errors, as is usual on
    CIFAR-10-C). It has no interval: the cells share their images.
    """

    n: int = Field(ge=1)
    seed: int
    names: list[str]
    severities: list[int]
    clean: Estimate
    cells: list[CorruptionCell]
    mean_accuracy: float = Field(ge=0, le=1)
    clean_miou: float | None = Field(None, ge=0, le=1)

    def accuracies(self) -> dict[str, list[float]]:
        """Return corruption -> accuracy at each of ``severities``."""
        rows: dict[str, list[float]] = {name: [] for name in self.names}
        for each in self.cells:
            rows[each.name].append(each.accuracy.accuracy)
        return rows

    def means(self) -> dict[str, float]:
        """Return corruption, as it is written in text, -> mean accuracy over the severities."""
        return {name.replace("_", " "): sum(row) / len(row) for name, row in self.accuracies().items()}

    def mious(self) -> dict[str, float]:
        """Return corruption, as it is written in text, -> mean mIoU over the severities, and ``mean`` of all; {} without masks."""
        rows: dict[str, list[float]] = {}
        for each in self.cells:
            if each.miou is not None:
                rows.setdefault(each.name.replace("_", " "), []).append(each.miou)
                rows.setdefault("mean", []).append(each.miou)
        return {name: sum(row) / len(row) for name, row in rows.items()}

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return accuracy by corruption and severity, and the means; of masks the mean mIoU, too."""
        levels, mious = [f"severity {severity}" for severity in self.severities], self.mious()
        heads = ["mean", "mean mIoU"] if mious else ["mean"]
        table = new_table(record, "common corruptions", "corruption", *levels, *heads)

        def last(name: str) -> list[str]:
            return [f"{mious[name]:.1%}"] if mious else []

        clean = [] if self.clean_miou is None else [f"{self.clean_miou:.1%}"]
        table.add_row("none (clean)", *[f"{self.clean.accuracy:.1%}"] * (len(levels) + 1), *clean)
        for (name, mean), row in zip(self.means().items(), self.accuracies().values(), strict=True):
            table.add_row(name, *[f"{value:.1%}" for value in row], f"{mean:.1%}", *last(name))
        columns = [[each.accuracy.accuracy for each in self.cells if each.severity == s] for s in self.severities]
        means = [f"{sum(column) / len(column):.1%}" for column in columns]
        table.add_row("mean", *means, f"{self.mean_accuracy:.1%}", *last("mean"), style="bold")
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return the mean accuracy and the worst corruption."""
        means = self.means()
        worst = min(means, key=lambda name: means[name])
        what = "mean accuracy" if self.clean_miou is None else "mean share of right pixels"
        miou = "" if self.clean_miou is None else f" mIoU {self.mious()['mean']:.1%}, {self.clean_miou:.1%} when clean."
        return (
            f"{record.about}: {what} {self.mean_accuracy:.1%} under {len(self.names)} common corruptions at severity "
            f"{', '.join(map(str, self.severities))}, {self.clean.accuracy:.1%} when clean; worst is "
            f"{worst} with {means[worst]:.1%}.{miou}"
        )

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section:
        """Return a map and a table of each run."""
        plots, tables = [], []
        for one in measured:
            result = cast(CorruptionResult, one.record.result)
            means = result.means()
            worst = min(means, key=lambda name: means[name])
            caption = (
                f"{one.name}, {result.n:,} {one.record.data.split} images: {percent(result.clean.accuracy)} right when clean, "
                f"{percent(result.mean_accuracy)} in the mean of all cells; worst is {worst} with {percent(means[worst])}."
            )
            mious = result.mious()
            if result.clean_miou is not None:
                caption += f" Right are pixels; mIoU {percent(mious['mean'])}, {percent(result.clean_miou)} when clean."
            plots.append(Plot(_draw(one, result, f"Accuracy under common corruptions. {caption}"), caption))
            rows = [
                [name, *map(percent, row), percent(mean), *([percent(mious[name])] if mious else [])]
                for (name, mean), row in zip(means.items(), result.accuracies().values(), strict=True)
            ]
            columns = ["Corruption", *(f"severity {severity}" for severity in result.severities), "mean"]
            columns += ["mean mIoU"] if mious else []
            label = f"Accuracy of {one.name} under corruptions"
            tables.append(Table(columns, rows, caption=one.name, label=label, strong=["mean"]))
        intro = (
            "Accuracy on images that nobody attacked, but that noise, blur, weather or compression has damaged, from severity 1 "
            "(weak) to 5 (strong)."
        )
        blocks = [Row(plots), Details("All numbers under corruptions", tables)]
        return Section("corruptions", "Common corruptions", 30, intro, blocks)


@MEASUREMENTS.register("corruptions")
@settings
class CommonCorruptions(Measurement):
    """Measure runs under 15 common corruptions: ``clead corruptions RUN ... [--severities 1,3,5]``.

    Noise, blur, weather and compression at 5 severities (Hendrycks & Dietterich 2019, arXiv:1903.12261), computed here: close to,
    not the same as, the published files.
    """

    result: ClassVar = CorruptionResult
    tasks: ClassVar[tuple[str, ...]] = ("multilabel", "segmentation")

    severities: tuple[int, ...] = setting(SEVERITIES, "Which of 1 to 5, with commas.")
    names: tuple[str, ...] | None = setting(None, "Which corruptions, with commas; all 15 if not given.")

    def run(self, target: MeasurementTarget, state: ResumableResults) -> CorruptionResult:
        """Corrupt and classify all images."""
        return evaluate_corruptions(
            target.model,
            target.images,
            target.computation(state),
            severities=self.severities,
            names=self.names,
            task=target.about.task,
        )


def evaluate_corruptions(
    model: nn.Module,
    images: ImageSet,
    how: Computation | None = None,
    *,
    severities: Sequence[int] = SEVERITIES,
    names: Sequence[str] | None = None,
    task: Task = CLASSIFICATION,
) -> CorruptionResult:
    """Measure accuracy under common corruptions (Hendrycks & Dietterich 2019, arXiv:1903.12261).

    What is drawn for an image depends on (seed, corruption, severity, its position) alone: not on batch size or device.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); in eval mode, left bit-identical.
        images: (N, C, H, W) uint8, C 1 or 3, sides of at least 8 pixels.
        how: batch size, seed of noise, directions and textures, device; its state has finished pairs of corruption and severity.
        severities: which of 1 to 5.
        names: which of ``CORRUPTIONS``; all 15 if None.
        task: what is right; of several labels an image counts if all are, of masks its pixels count.

    Raises UserError on unknown names or severities, images of another kind, or a model that returns no logits (B, K).
    """
    names = list(CORRUPTIONS) if names is None else list(names)
    check_choice(names, severities)
    how = how or Computation()
    seed, state = how.seed, how.state
    if how.batch_size < 1 or seed < 0:
        raise UserError(
            f"batch_size must be at least 1 and seed at least 0, got {how.batch_size} and {seed}; leave them out for 256 and 0"
        )
    model = wrapped(model)
    device = how.device_of(model)
    _check_images(model, images, device, task)
    arrays = np.ascontiguousarray(images.images.permute(0, 2, 3, 1).cpu().numpy())
    total = len(arrays) * (1 + len(names) * len(severities))
    cells = []
    with state.opened(), exact_float32(), progress("corruptions", total, show=how.show) as tick:

        def figures(key: str, corrupted: Callable[[int], Pixels]) -> tuple[Estimate, float | None]:
            if key in state.parts:
                tick(len(arrays))
            else:
                begun = time.monotonic()
                saved = _judged(model, task, corrupted, images.labels.to(device), how.batch_size, tick)
                state.save(key, saved, {"seconds": time.monotonic() - begun})
            return _accuracy_and_miou(state.parts[key][0], seed)

        clean, clean_miou = figures("clean", lambda index: arrays[index])
        for name in names:
            position = list(CORRUPTIONS).index(name)
            for severity in severities:

                def corrupted(index: int, name: str = name, place: tuple[int, int] = (position, severity)) -> Pixels:
                    return CORRUPTIONS[name](arrays[index], place[1], np.random.default_rng([seed, *place, index]))

                accuracy, miou = figures(f"{name}-{severity}", corrupted)
                each = CorruptionCell(name=name, severity=severity, accuracy=accuracy, miou=miou)
                tick(0, corruption=f"{name} {severity}", accuracy=each.accuracy.accuracy)
                cells.append(each)
    return CorruptionResult(
        n=len(images),
        seed=seed,
        names=names,
        severities=list(severities),
        clean=clean,
        cells=cells,
        mean_accuracy=float(np.mean([each.accuracy.accuracy for each in cells])),
        clean_miou=clean_miou,
    )


def _check_images(model: nn.Module, images: ImageSet, device: torch.device, task: Task) -> None:
    """Raise UserError on images that cannot be corrupted, labels that are not the model's, or logits that are not (B, K)."""
    pixels, labels = images.images, images.labels
    if (
        not len(images)
        or pixels.dtype != torch.uint8
        or pixels.dim() != 4
        or pixels.shape[1] not in (1, 3)
        or min(pixels.shape[2:]) < SMALLEST_SIDE
    ):
        raise UserError(
            f"images to corrupt must be uint8 (N, 1 or 3, H, W) with sides of at least {SMALLEST_SIDE} pixels, "
            f"got {pixels.dtype} {tuple(pixels.shape)}; give (255 * images).round().to(torch.uint8)"
        )
    first = pixels[:1].to(device).float() / 255
    check_inputs(first, labels[:1].to(device), task=task)
    if not isinstance(task, Classification):
        return task.check(logits_of(model, first), labels.to(device))
    classes = logits_of(model, first).shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(
            f"labels must be in [0, {classes}), got {int(labels.min())} … {int(labels.max())}; "
            "give labels - 1 if they count from 1, or data of the model's classes"
        )


def _accuracy_and_miou(saved: dict[str, Tensor], seed: int) -> tuple[Estimate, float | None]:
    """Return the accuracy of a finished part, and of masks the mIoU."""
    if "flags" in saved:
        return estimate(saved["flags"].tolist()), None
    counts = Counts(*saved["counts"].movedim(1, 0).numpy())
    return estimate_pixels(counts, seed), float(mean_iou(counts.total()))


def _judged(
    model: nn.Module, task: Task, corrupted: Callable[[int], Pixels], labels: Tensor, batch_size: int, tick: Tick
) -> dict[str, Tensor]:
    """Return ``flags`` (N,), which images, corrupted, are right, or of masks ``counts`` (N, 3, K); ``labels`` are on the device."""
    masks = isinstance(task, Segmentation)
    results = []
    for start in range(0, len(labels), batch_size):
        y = labels[start : start + batch_size]
        batch = np.stack([corrupted(index) for index in range(start, start + len(y))])
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(y.device).float() / 255
        with attack_mode(model), torch.no_grad():
            results.append((task.counts if masks else task.correct)(model(x), y).cpu())  # synchronises the device
        tick(len(batch))
    return {"counts" if masks else "flags": torch.cat(results)}


def _draw(one: Measured, result: CorruptionResult, label: str) -> Drawing:
    """Draw one cell per corruption and severity, shaded by its accuracy, which stands in it in percent."""
    figure, axes = new_axes(390, 90 + 20 * len(result.names))
    rows = []
    for each in result.cells:
        x, y, value = result.severities.index(each.severity), result.names.index(each.name), each.accuracy.accuracy
        cell(axes, x, y, value, f"{100 * value:.0f}", style(one.index).color)
        rows.append((each.name, each.severity, *estimated(each.accuracy)))
    columns = [str(severity) for severity in result.severities]
    cell_axes(axes, columns, [name.replace("_", " ") for name in result.names])
    head(axes, f"{one.name}, accuracy in %", "severity")
    name = f"corruptions-{one.index + 1}"
    return draw(figure, name, label, ("corruption", "severity (1 to 5)", *ESTIMATED), rows)
