"""What attacks that follow each other leave: the stages of a suite, from the clean images to the worst case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clead.evaluation.suites import in_words
from clead.report.comparison import on_survivors
from clead.report.run import RunResult
from clead.results.figure import INK, LINE, MUTED, Drawing, draw, head, new_axes, style
from clead.results.format import count, percent
from clead.results.record import Record


def stages(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return figure and rows of each run whose attacks met the survivors of those before them."""
    tables = []
    for i, run in enumerate(runs):
        record = run.record
        if not on_survivors(record):
            continue
        steps = "; ".join(
            f"after {attack.name} {percent(attack.robust.accuracy)} "
            f"({count(attack.num_successes)} of {count(attack.attacked)} broken)"
            for attack in record.attacks
        )
        label = (
            f"{run.name}, {in_words(record)}: {percent(record.clean.accuracy)} clean; {steps}; "
            f"worst case {percent(record.worst.accuracy)}."
        )
        drawing = draw_stages(record, i, title=run.name, name=f"stages-{i + 1}", label=label)
        tables.append({"drawing": drawing, "name": run.name, "suite": in_words(record), "record": record})
    return tables


def draw_stages(record: Record, index: int, *, title: str, name: str, label: str) -> Drawing:
    """Draw one bar each from clean to the worst case, the broken part pale.

    Args:
        record: whose ``attacks`` met the survivors of those before them.
        index: which run (colour).
        title: above the plot.
        name: of the drawing.
        label: the text alternative.
    """
    figure, axes = new_axes(390, 62 + 23 * (len(record.attacks) + 2))
    color, before = style(index).color, record.clean.accuracy
    rows = [("clean", before, before, f"{100 * before:.1f} %")]
    for attack in record.attacks:
        left, minus = attack.robust.accuracy, "−" if attack.num_successes else ""
        rows.append(
            (attack.name, before, left, f"{100 * left:.1f} %, {minus}{attack.num_successes:,} of {attack.attacked:,}")
        )
        before = left
    worst = record.worst
    rows.append(("worst case", worst.accuracy, worst.accuracy, f"{100 * worst.accuracy:.1f} %"))
    for row, (_, whole, left, numbers) in enumerate(rows):
        axes.barh(row, whole, height=0.66, color=color, alpha=0.26, linewidth=0)
        axes.barh(row, left, height=0.66, color=color, linewidth=0)
        axes.annotate(numbers, (1.03, row), va="center", fontsize=9, color=MUTED, annotation_clip=False)
    error = np.abs([[worst.accuracy - worst.low], [worst.high - worst.accuracy]])
    axes.errorbar([worst.accuracy], [len(rows) - 1], xerr=error, color=INK, capsize=3, linewidth=1.4)
    axes.set_yticks(range(len(rows)), [text if len(text) <= 24 else text[:23] + "…" for text, *_ in rows])
    bar_axes(axes, len(rows), 1.6)  # the numbers stand right of 100 %
    head(axes, title)
    numbers = [("clean", None, None, record.clean.accuracy, record.clean.low, record.clean.high)]
    numbers += [
        (
            each.name,
            each.attacked,
            each.num_successes,
            each.robust.accuracy,
            each.robust.low,
            each.robust.high,
        )
        for each in record.attacks
    ]
    numbers.append(("worst case", None, None, worst.accuracy, worst.low, worst.high))
    columns = ("after", "attacked (images)", "broken (images)", "still right (fraction)",
               "lower end of the 95 % interval", "upper end of the 95 % interval")  # fmt: skip
    return draw(figure, name, label, columns, numbers)


def bar_axes(axes: Any, rows: int, right: float) -> None:
    """Make the axes of horizontal bars of fractions, the first on top."""
    axes.tick_params(axis="y", colors=INK)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, right)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.spines["bottom"].set_visible(False)
