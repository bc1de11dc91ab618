"""Certified accuracy: what randomised smoothing proves, against the radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clead.evaluation.measurement import Measurement
from clead.evaluation.smoothing import Certificates
from clead.report.run import RunResult
from clead.results.figure import ESTIMATED, Drawing, draw, estimated, head, new_axes, percent_axis, style
from clead.results.format import percent


def certified(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    """Return one plot and one table of all runs that were certified; None if none was."""
    found = [
        (i, measured, measured.result)
        for i, run in enumerate(runs)
        if (measured := run.measured("certify")) and isinstance(measured.result, Certificates)
    ]
    if not found:
        return None
    captions = [
        f"{runs[i].name}: noise σ = {result.sigma:g}, {result.images:,} {measured.data.split} images, {result.n:,} draws each, "
        f"abstains on {percent(result.abstained.accuracy)}, average certified radius {result.average_radius:.3f}"
        for i, measured, result in found
    ]
    radii = sorted({point.radius for _, _, result in found for point in result.curve})
    rows = [
        (radius, [next((p.certified for p in result.curve if p.radius == radius), None) for _, _, result in found])
        for radius in radii
    ]
    return {
        "drawing": _draw(runs, found, f"Certified accuracy against the L2 radius. {'; '.join(captions)}."),
        "names": [(i, runs[i].name) for i, _, _ in found],
        "captions": captions,
        "rows": rows,
        "alphas": sorted({result.alpha for _, _, result in found}),
    }


def _draw(runs: Sequence[RunResult], found: Sequence[tuple[int, Measurement, Certificates]], label: str) -> Drawing:
    """Draw the fraction right and certified beyond each radius, with its interval; radii in pixels in [0, 1]."""
    figure, axes = new_axes(390, 270)
    rows = []
    for index, _, result in found:
        color, marker, dash = style(index)
        radii = [point.radius for point in result.curve]
        parts = [point.certified for point in result.curve]
        axes.fill_between(radii, [e.low for e in parts], [e.high for e in parts], color=color, alpha=0.14, linewidth=0)
        axes.plot(
            radii, [e.accuracy for e in parts], color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.8
        )
        rows += [(runs[index].name, result.sigma, r, *estimated(e)) for r, e in zip(radii, parts, strict=True)]
    percent_axis(axes)
    head(axes, "Certified accuracy against the radius", "L2 radius (pixels in [0, 1])")
    columns = ("run", "noise sigma (pixels in [0, 1])", "L2 radius (pixels in [0, 1])", *ESTIMATED)
    return draw(figure, "certified", label, columns, rows, [(runs[index].name, index) for index, _, _ in found])
