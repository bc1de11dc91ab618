"""Accuracy per class, and what the images of a class are taken for, clean and under attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clead.evaluation.suites import suite_label
from clead.report.run import RunResult
from clead.report.sections.stages import bar_axes
from clead.results.figure import MUTED, Drawing, cell, cell_axes, draw, head, new_axes, style
from clead.results.format import percent
from clead.results.record import ClassAccuracy

MOST = 20
"""More classes than this are not drawn."""

_LISTED = 8


def classes(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the bars of each run that has accuracies per class."""
    rows = []
    for i, run in enumerate(runs):
        parts = run.record.per_class
        if parts:
            worst, best = (choose(parts, key=lambda each: each.robust_accuracy) for choose in (min, max))
            under = f" ({text})" if (text := suite_label(run.record)) else ""
            caption = (
                f"{run.name}{under}: least robust is {worst.name} ({percent(worst.robust_accuracy)} of {worst.n}), "
                f"most robust {best.name} ({percent(best.robust_accuracy)} of {best.n})."
            )
            drawing = _bars(parts, i, title=run.name, name=f"classes-{i + 1}", label=f"Accuracy per class. {caption}")
            rows.append({"drawing": drawing, "caption": caption, "parts": parts, "name": run.name + under})
    return rows


def _bars(parts: Sequence[ClassAccuracy], index: int, *, title: str, name: str, label: str) -> Drawing:
    """Draw clean (pale) and robust (full) accuracy per class; above 20 classes, the 20 least robust."""
    shown = list(parts)
    if len(shown) > MOST:
        shown = sorted(shown, key=lambda each: each.robust_accuracy)[:MOST]
    figure, axes = new_axes(390, 62 + 19 * len(shown))
    color, rows = style(index).color, np.arange(len(shown))
    axes.barh(rows, [each.clean_accuracy for each in shown], height=0.72, color=color, alpha=0.26, linewidth=0)
    axes.barh(rows, [each.robust_accuracy for each in shown], height=0.4, color=color, linewidth=0)
    for row, each in enumerate(shown):
        numbers = f"{100 * each.robust_accuracy:.0f} / {100 * each.clean_accuracy:.0f} %"
        axes.annotate(numbers, (1.02, row), va="center", fontsize=9, color=MUTED, annotation_clip=False)
    axes.set_yticks(rows, [shortened(each.name, 18) for each in shown])
    bar_axes(axes, len(shown), 1.2)
    head(axes, title)
    columns = ("class", "images", "clean accuracy (fraction)", "robust accuracy (fraction)")
    numbers = [(each.name, each.n, each.clean_accuracy, each.robust_accuracy) for each in shown]
    return draw(figure, name, label, columns, numbers)


def confusion(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the two matrices of each run whose record has the predictions, and the most frequent errors under attack."""
    maps = []
    for i, run in enumerate(runs):
        predictions = run.record.predictions
        if predictions is None:
            continue
        names = run.record.data.classes
        matrices = [np.zeros((len(names), len(names)), dtype=int) for _ in range(2)]
        for matrix, answers in zip(matrices, (predictions.clean, predictions.attacked), strict=True):
            np.add.at(matrix, (predictions.labels, answers), 1)
        clean, attacked = matrices
        errors = attacked * (1 - np.eye(len(names), dtype=int))
        order = np.argsort(-errors, axis=None, kind="stable")[:_LISTED]
        pairs = [(int(a), int(b)) for a, b in zip(*np.unravel_index(order, errors.shape), strict=True) if errors[a, b]]
        total = attacked.sum(1)
        listed = [
            {"truth": names[a], "answer": names[b], "clean": int(clean[a, b]), "attacked": int(attacked[a, b]), "of": int(total[a])}
            for a, b in pairs
        ]  # fmt: skip
        most = "; ".join(f"{e['truth']} as {e['answer']} ({e['attacked']} of {e['of']})" for e in listed[:3])
        caption = f"{run.name}, {len(predictions.labels):,} images. Under attack most often: {most or 'no error'}."
        drawings = []
        if len(names) <= MOST:
            drawings = [
                _matrix(run, i, matrix, what, f"Confusion, {what}. {caption}")
                for matrix, what in ((clean, "clean"), (attacked, "under attack"))
            ]
        maps.append({"drawings": drawings, "caption": caption, "name": run.name, "errors": listed})
    return maps


def _matrix(run: RunResult, index: int, matrix: np.ndarray, what: str, label: str) -> Drawing:
    """Draw a matrix (true class by row), each row shaded by its fractions and holding its numbers of images."""
    names = run.record.data.classes
    figure, axes = new_axes(390, 96 + 22 * len(names))
    shares, rows = matrix / np.maximum(matrix.sum(1, keepdims=True), 1), []
    for a, b in np.ndindex(matrix.shape):
        cell(axes, b, a, float(shares[a, b]), str(matrix[a, b]) if matrix[a, b] else "", style(index).color)
        rows.append((names[a], names[b], int(matrix[a, b]), float(shares[a, b])))
    cell_axes(axes, [shortened(name, 10) for name in names], [shortened(name, 14) for name in names])
    axes.tick_params(axis="x", rotation=90 if max(map(len, names)) > 2 else 0)
    head(axes, f"{run.name}, {what}", "taken for")
    columns = ("true class", "taken for", "number (images)", "share of the true class (fraction)")
    return draw(figure, f"confusion-{index + 1}-{what.replace(' ', '-')}", label, columns, rows)


def shortened(text: str, most: int) -> str:
    """Return ``text`` with at most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
