"""Accuracy under common corruptions, a map of corruption against severity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clead.evaluation.corruptions import CorruptionResult
from clead.report.run import RunResult
from clead.report.sections.classes import cell, cell_axes
from clead.results.figure import ESTIMATED, Drawing, draw, estimated, head, new_axes, style
from clead.results.format import percent


def corruptions(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return map and table of each run that was measured under corruptions."""
    found = []
    for i, run in enumerate(runs):
        measured = run.measured("corruptions")
        if measured is None or not isinstance(result := measured.result, CorruptionResult):
            continue
        table = {name.replace("_", " "): values for name, values in result.table().items()}
        means = {name: sum(values) / len(values) for name, values in table.items()}
        worst = min(means, key=lambda name: means[name])
        caption = (
            f"{run.name}, {result.n:,} {measured.data.split} images: {percent(result.clean.accuracy)} right when clean, "
            f"{percent(result.mean_accuracy)} in the mean of all cells; worst is {worst} with {percent(means[worst])}."
        )
        drawing = _draw(run, i, result, f"Accuracy under common corruptions. {caption}")
        found.append(
            {
                "drawing": drawing,
                "caption": caption,
                "name": run.name,
                "rows": [(name, values, means[name]) for name, values in table.items()],
                "severities": result.severities,
            }
        )
    return found


def _draw(run: RunResult, index: int, result: CorruptionResult, label: str) -> Drawing:
    """Draw one cell per corruption and severity, shaded by its accuracy, which stands in it in percent."""
    figure, axes = new_axes(390, 90 + 20 * len(result.names))
    rows = []
    for part in result.cells:
        x, y = result.severities.index(part.severity), result.names.index(part.name)
        cell(axes, x, y, part.accuracy.accuracy, f"{100 * part.accuracy.accuracy:.0f}", style(index).color)
        rows.append((part.name, part.severity, *estimated(part.accuracy)))
    cell_axes(
        axes, [str(severity) for severity in result.severities], [name.replace("_", " ") for name in result.names]
    )
    head(axes, f"{run.name}, accuracy in %", "severity")
    return draw(figure, f"corruptions-{index + 1}", label, ("corruption", "severity (1 to 5)", *ESTIMATED), rows)
