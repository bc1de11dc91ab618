"""The figures of a task beside the accuracies of images, and the ROC curves of one logit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clead.report.run import RunResult
from clead.results.figure import Drawing, draw, head, new_axes, percent_axis, style
from clead.results.format import percent
from clead.results.record import Estimate, Metric
from clead.results.section import Cell, Note, Plot, Row, Section, Table

_POINTS = 200


def task_figures(runs: Sequence[RunResult]) -> list[Section]:
    """Return the section of the tasks' own figures, if a run has any."""
    measured = [(run, metric) for run in runs for metric in run.record.metrics]
    if not measured:
        return []
    rows = [
        (run.name, metric.name, _cell(metric, "clean"), _cell(metric, "robust"), f"{metric.n:,}")
        for run, metric in measured
    ]
    columns = ("Run", "Figure", "clean", "worst case", "cases")
    table = Table(columns, rows, "Figures of the task", "Figures of the task", text=("Figure",), strong=("worst case",))
    notes = [Note(f"{name}: {about}.") for name, about in {metric.name: metric.about for _, metric in measured}.items()]
    plots = [Plot(_roc(run, index, arrays)) for index, run in enumerate(runs) if (arrays := _scores(run))]
    tasks = ", ".join(dict.fromkeys(run.record.task for run, _ in measured))
    intro = f"What “right” means here: {tasks}. Each figure clean, and in the worst case over the attacks."
    return [Section("task", "Figures of the task", 0, intro, [table, *notes, *([Row(plots)] if plots else [])])]


def _cell(metric: Metric, which: str) -> Cell:
    value, interval = getattr(metric, which), getattr(metric, f"{which}_interval")
    if value is None or interval is None:
        return None if value is None else percent(value)
    return Estimate(accuracy=value, low=interval[0], high=interval[1], n=metric.n)


def _scores(run: RunResult) -> list[np.ndarray] | None:
    return run.arrays("score_clean", "score_worst", "score_labels")


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of negatives and of positives with a score above each threshold, both rising from 0 to 1.

    >>> [shares.tolist() for shares in roc(np.array([3.0, 2.0, 1.0]), np.array([1, 0, 1]))]
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]]
    """
    thresholds = np.append(np.unique(scores)[::-1], -np.inf)
    sides = [np.sort(scores[labels == side]) for side in (0, 1)]
    negatives, positives = (1 - np.searchsorted(side, thresholds, side="right") / len(side) for side in sides)
    return negatives, positives


def _roc(run: RunResult, index: int, arrays: Sequence[np.ndarray]) -> Drawing:
    """Draw the ROC curve, clean (dashed) and in the worst case (solid)."""
    figure, axes = new_axes(390, 300)
    color, labels, rows = style(index).color, arrays[2], []
    for scores, what, dash in ((arrays[0], "clean", "--"), (arrays[1], "worst case", "-")):
        negatives, positives = roc(scores, labels)
        shown = np.unique(np.linspace(0, len(negatives) - 1, _POINTS).round().astype(int))
        axes.plot(negatives[shown], positives[shown], dash, color=color, label=what)
        rows += [(what, *map(float, point)) for point in zip(negatives[shown], positives[shown], strict=True)]
    percent_axis(axes)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.legend(frameon=False, fontsize=9)
    head(axes, f"{run.name}: positives found, against", "negatives taken for positive")
    label = (
        f"ROC curves of {run.name}, clean and in the worst case: positives found against negatives taken for positive."
    )
    columns = ("images", "negatives taken for positive (fraction)", "positives found (fraction)")
    return draw(figure, f"roc-{index + 1}", label, columns, rows)
