"""What a measurement says: a table for the terminal, and one sentence that can be quoted."""

from __future__ import annotations

from rich.table import Table

from clead.evaluation.attack_accuracy import AttackedResult
from clead.evaluation.corruptions import CorruptionResult
from clead.evaluation.detection import Detection, DetectionPoint, DetectorPart
from clead.evaluation.measurement import Measurement
from clead.evaluation.minimum_norm import MinimumNormResult
from clead.evaluation.smoothing import Certificates
from clead.results.record import Estimate

REJECTED = (0.05, 0.1)
"""Clean rejection rates at which the table shows a detector."""


def summary(measurement: Measurement) -> tuple[Table, str]:
    """Return the table and the sentence of a measurement."""
    result = measurement.result
    if isinstance(result, Certificates):
        return _certificates(measurement, result)
    if isinstance(result, Detection):
        return _detection(measurement, result)
    if isinstance(result, CorruptionResult):
        return _corruptions(measurement, result)
    if isinstance(result, MinimumNormResult):
        return _distances(measurement, result)
    return _unrestricted(measurement, result)


def _certificates(measurement: Measurement, result: Certificates) -> tuple[Table, str]:
    noise = f"noise σ {result.sigma:g}"
    table = _table(measurement, f"certified in L2, {noise}", "radius", "right and certified", "95 % interval")
    for point in result.curve:
        table.add_row(f"{point.radius:.4g}", *_shown(point.certified))
    table.add_row("none: right", *_shown(result.accuracy))
    table.add_row("none: abstains", *_shown(result.abstained))
    # Whole multiples of σ, and the smoothed model's own accuracy at 0.
    told = [point for step, point in enumerate(result.curve) if step % 4 == 0]
    radii = ", ".join(f"{point.certified.accuracy:.1%} at L2 radius {point.radius:g}" for point in told)
    said = (
        f"{_who(measurement)}: smoothed with {noise}, right and certified: {radii or 'none'} "
        f"(n0 {result.n0}, n {result.n}, each certificate fails with probability ≤ {result.alpha:g}); "
        f"abstains on {result.abstained.accuracy:.1%}; average certified radius {result.average_radius:.3f}."
    )
    return table, said


def _detection(measurement: Measurement, result: Detection) -> tuple[Table, str]:
    columns = ["AUROC", "FPR@95TPR", *(f"held at {rate:.0%}" for rate in REJECTED)]
    threat = f"{result.norm} {result.eps_text}"
    table = _table(measurement, f"detectors, {threat}, attacks oblivious | aware", "detector", *columns)
    for part in result.detectors:
        *oblivious, aware = part.attacks
        cells = []
        for key, worst in (("auroc", min), ("fpr95", max)):
            found = [value for attack in oblivious if (value := getattr(attack, key)) is not None]
            value = getattr(aware, key)
            cells.append(f"{worst(found):.3f}" if found else "–")
            cells[-1] += " | –" if value is None else f" | {value:.3f}"
        for rate in REJECTED:
            point = _point(part, rate)
            cells.append(f"{point.oblivious.accuracy:.1%} | {point.aware.accuracy:.1%}")
        table.add_row(part.name, *cells)
    table.caption = (
        "oblivious: the worst of the attacks that do not know the detector; aware: of one that does. held: right, or rejected, "
        "where that fraction of clean images is rejected."
    )
    best = max(result.detectors, key=lambda part: _point(part, REJECTED[0]).aware.accuracy)
    point = _point(best, REJECTED[0])
    said = (
        f"{_who(measurement)}: {result.robust.accuracy:.1%} withstand {threat} (PGD) without a detector; with {best.name}, which "
        f"rejects {point.clean_rejected.accuracy:.1%} of them when clean, {point.oblivious.accuracy:.1%} are right or rejected "
        f"under attacks that do not know it, and {point.aware.accuracy:.1%} (95 % interval {_interval(point.aware)}) under one "
        "that does."
    )
    if point.threshold is None:
        said += f"\n{result.calibrated} validation images are too few for a threshold at {REJECTED[0]:.0%}: none is rejected."
    return table, said


def _point(part: DetectorPart, rate: float) -> DetectionPoint:
    return min(part.curve, key=lambda point: abs(point.rate - rate))


def _corruptions(measurement: Measurement, result: CorruptionResult) -> tuple[Table, str]:
    levels = [f"severity {severity}" for severity in result.severities]
    table = _table(measurement, "common corruptions", "corruption", *levels, "mean")
    table.add_row("none (clean)", *[f"{result.clean.accuracy:.1%}"] * (len(levels) + 1))
    means = {}
    for name, row in result.table().items():
        means[name] = sum(row) / len(row)
        table.add_row(name.replace("_", " "), *[f"{value:.1%}" for value in row], f"{means[name]:.1%}")
    columns = [[cell.accuracy.accuracy for cell in result.cells if cell.severity == s] for s in result.severities]
    table.add_row("mean", *[f"{sum(c) / len(c):.1%}" for c in columns], f"{result.mean_accuracy:.1%}", style="bold")
    worst = min(means, key=lambda name: means[name])
    said = (
        f"{_who(measurement)}: mean accuracy {result.mean_accuracy:.1%} under {len(result.names)} common corruptions at severity "
        f"{', '.join(map(str, result.severities))}, {result.clean.accuracy:.1%} when clean; worst is "
        f"{worst.replace('_', ' ')} with {means[worst]:.1%}."
    )
    return table, said


def _distances(measurement: Measurement, result: MinimumNormResult) -> tuple[Table, str]:
    eps = 0.0 if measurement.threat is None else measurement.threat.eps
    radii = sorted({0.0, *(eps * part for part in (0.5, 1, 2))})
    names = [f"right at {radius:.4g}" for radius in radii]
    table = _table(measurement, f"distances in {result.norm}", "attack", "median", *names, "seconds")

    def at(distances: list[float | None], radius: float) -> str:
        return f"{sum(d is None or d > radius for d in distances) / len(distances):.1%}"

    for part in result.attacks:
        cells = [at(part.distances, radius) for radius in radii]
        table.add_row(part.attack, _length(part.median), *cells, f"{part.seconds:.1f}")
    cells = [at(result.distances, radius) for radius in radii]
    table.add_row("nearest of all", _length(result.median), *cells, f"{measurement.seconds:.1f}", style="bold")
    told = ", ".join(f"{cell} at radius {radius:.4g}" for cell, radius in zip(cells, radii, strict=True))
    half = "fewer than half fall at any distance" if result.median is None else f"half fall within {result.median:.4g}"
    said = (
        f"{_who(measurement)}: {half} of {result.norm} (median distance) under "
        f"{' and '.join(part.attack for part in result.attacks)}; right: {told}."
    )
    return table, said


def _unrestricted(measurement: Measurement, result: AttackedResult) -> tuple[Table, str]:
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    table = _table(measurement, result.attack, "attack", "accuracy", "95 % interval", "seconds")
    table.add_row("none (clean)", *_shown(result.clean), "")
    table.add_row(result.attack, *_shown(result.robust), f"{result.seconds:.1f}", style="bold")
    said = (
        f"{_who(measurement)}: {result.robust.accuracy:.1%} (95 % interval {_interval(result.robust)}) withstand the "
        f"{result.attack} attack ({settings}); {result.clean.accuracy:.1%} are right when clean."
    )
    return table, said


def _table(measurement: Measurement, what: str, *columns: str) -> Table:
    data = measurement.data
    table = Table(title=f"{measurement.run}: {data.n} {data.split} images, {what}", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _who(measurement: Measurement) -> str:
    return f"{measurement.run}, {measurement.data.n} {measurement.data.split} images"


def _shown(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.accuracy:.2%}", _interval(estimate)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.1%} – {estimate.high:.1%}"


def _length(distance: float | None) -> str:
    return "–" if distance is None else f"{distance:.4g}"
