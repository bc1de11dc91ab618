"""The training curves, all runs over one horizontal axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clead.report.run import RunResult
from clead.results.figure import INK, Drawing, draw, head, new_axes, percent_axis, style
from clead.results.format import percent

_X_AXES = (("forward_equivalents", "forward-equivalents per training image"), ("epoch", "epoch"), ("step", "step"))
_NOT_A_TERM = (
    "kind",
    "step",
    "epoch",
    "forward",
    "accuracy",
    "rate",
    "second",
    "norm",
    "memory",
    "time",
    "eps",
    "scale",
)
_MAX_POINTS = 150


def training(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    """Return the training plots, over the first of the axes that every run with a history logged; None if there is none."""
    histories = [run.history for run in runs]
    logged = [history for history in histories if history]
    axes = [axis for axis in _X_AXES if logged and all(any(axis[0] in line for line in h) for h in logged)]
    if not axes:
        return None
    x, xlabel = axes[0]
    wanted = [
        *(("clean_accuracy", "Clean accuracy"), ("robust_accuracy", "Robust accuracy")),
        *(("clean_miou", "Clean mIoU"), ("robust_miou", "Robust mIoU"), ("loss", "Loss")),
    ]
    plots = []
    for metric, title in wanted:
        last = [
            f"{run.name} {percent(v) if metric != 'loss' else format(v, '.3g')}"
            for run in runs
            if (v := _last(run.history, metric)) is not None
        ]
        if last:
            label = f"{title} during training against {xlabel}. Last values: {'; '.join(last)}."
            drawing = _curves(runs, metric, x=x, xlabel=xlabel, title=title, label=label)
            plots.append({"drawing": drawing, "caption": f"{title}, last: {', '.join(last)}."})
    for i, run in enumerate(runs):
        keys = dict.fromkeys(key for line in run.history if line.get("kind") == "train" for key in line)
        terms = [
            key
            for key in keys
            if key != "loss" and not any(word in key for word in _NOT_A_TERM) and _last(run.history, key) is not None
        ][:8]
        if terms:
            last = ", ".join(f"{term.replace('_', ' ')} {_last(run.history, term):.3g}" for term in terms)
            title = "Loss terms" if len(runs) == 1 else f"Loss terms of {run.name}"
            label, name = f"{title}. Last: {last}.", f"loss-terms-{i + 1}"
            drawing = _terms(run, terms, x=x, xlabel=xlabel, title=title, name=name, label=label)
            plots.append({"drawing": drawing, "caption": f"{title}, last: {last}."})
    return {"plots": plots, "x": xlabel, "equal": x == "forward_equivalents"} if plots else None


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the last value of ``key``: of validation if it was logged there, else of training."""
    for kind in ("validation", "train"):
        values = [line[key] for line in history if line.get("kind") == kind and _is_number(line.get(key))]
        if values:
            return float(values[-1])
    return None


def _series(history: Sequence[Mapping[str, Any]], kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the finite (x, y) of one kind of line, averaged in order into at most 150 points."""
    pairs = [
        (line[x], line[y])
        for line in history
        if line.get("kind") == kind and _is_number(line.get(x)) and _is_number(line.get(y))
    ]
    groups = np.array_split(np.asarray(pairs, dtype=float).reshape(-1, 2), max(1, min(len(pairs), _MAX_POINTS)))
    means = [group.mean(0) for group in groups if len(group)]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def _is_number(value: object) -> bool:
    """Return whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _curves(runs: Sequence[RunResult], metric: str, *, x: str, xlabel: str, title: str, label: str) -> Drawing:
    """Draw one metric of every run against ``x``: validation strong with markers, training thin.

    All but the loss get a percent axis.
    """
    figure, axes = new_axes(390, 250)
    rows = []
    for index, run in enumerate(runs):
        color, marker, dash = style(index)
        train, val = _series(run.history, "train", x, metric), _series(run.history, "validation", x, metric)
        only = not val[0]
        axes.plot(*train, color=color, linewidth=1.4 if only else 1.1, alpha=1 if only else 0.5)
        axes.plot(*val, color=color, linewidth=1.9, marker=marker, markersize=4, linestyle=dash,
                  markevery=max(1, len(val[0]) // 12))  # fmt: skip
        for images, series in (("training batches", train), ("validation", val)):
            rows += [(run.name, images, *point) for point in zip(*series, strict=True)]
    unit = "no unit" if metric == "loss" else "fraction"
    if unit == "fraction":
        percent_axis(axes)
    axes.margins(x=0.02)
    head(axes, title, xlabel)
    columns = ("run", "images", xlabel, f"{title[0].lower()}{title[1:]} ({unit})")
    key = [(run.name, i) for i, run in enumerate(runs)]
    return draw(figure, f"training-{metric.replace('_', '-')}", label, columns, rows, key)


def _terms(run: RunResult, terms: Sequence[str], *, x: str, xlabel: str, title: str, name: str, label: str) -> Drawing:
    """Draw the terms of one run's training loss against ``x``, each named at the end of its line."""
    figure, axes = new_axes(390, 250)
    ends, rows = [], []
    for index, term in enumerate(terms):
        xs, ys = _series(run.history, "train", x, term)
        axes.plot(xs, ys, color=style(index).color, linestyle=style(index).dash, linewidth=1.7)
        rows += [(term, a, b) for a, b in zip(xs, ys, strict=True)]
        if ys:
            ends.append((ys[-1], term, xs[-1]))
    low, high = axes.get_ylim()
    gap, floor = (high - low) * 0.075, -np.inf
    for y, term, end in sorted(ends):  # labels that would touch are pushed up
        floor = max(y, floor + gap)
        axes.annotate(
            term.replace("_", " "), (end, floor), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
            color=INK, annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.02)
    head(axes, title, xlabel)
    return draw(figure, name, label, ("term", xlabel, "loss term (no unit)"), rows)
