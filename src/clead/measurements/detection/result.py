"""What is left when detectors reject images, under attacks that know them and that do not: the numbers, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from clead.measurements.base import Measured, MeasurementRecord, Result, new_table, span
from clead.results.figure import ESTIMATED, MUTED, Drawing, draw, estimated, head, new_axes, percent_axis, style
from clead.results.format import count, norm_of, percent
from clead.results.record import Estimate, RecordModel
from clead.results.section import Cell, Details, Heading, Note, Plot, Row, Section, Table

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

_REJECTED = (0.05, 0.1)
"""Clean rejection rates at which the terminal's table shows a detector; sentence and caption take the first."""
_ATTACKS = {"oblivious": "attack does not know it", "aware": "attack knows it"}
_INTRO = (
    "A detector may reject an image instead of answering. An image is safe here if it is classified right or rejected; what it "
    "costs is the clean images that are rejected too. What counts is the attack that knows the detector and tries to look harmless "
    "to it. The grey line is the model without a detector."
)


class DetectedAttack(RecordModel):
    """How well a detector tells the clean images from the adversarial images of one attack.

    Only the ``n`` adversarial images that are misclassified, of images that are right when clean, count. ``auroc`` is the
    probability that one of them scores above a clean image; ``fpr95`` the fraction of the clean images that is rejected where 95 %
    of them are. None where n is 0.
    """

    name: str
    n: int
    auroc: float | None
    fpr95: float | None


class DetectionPoint(RecordModel):
    """One threshold, set where ``rate`` of clean images are rejected; ``threshold`` None: none is.

    ``clean_rejected`` is what that comes to on the evaluated images, ``accepted_accuracy`` the accuracy on those that are accepted
    (None: there is none). ``oblivious`` and ``aware``: the fraction of all images for which no image was found in the threat set,
    the clean one included, that is misclassified and accepted.
    """

    rate: float
    threshold: float | None
    clean_rejected: Estimate
    accepted_accuracy: Estimate | None
    oblivious: Estimate
    aware: Estimate


class DetectorResult(RecordModel):
    """One detector: separation per attack, and the curve of robust-or-rejected accuracy against the clean rejection rate."""

    name: str
    settings: dict[str, Any]
    attacks: list[DetectedAttack]
    curve: list[DetectionPoint]


class Detection(Result):
    """What ``evaluate_detection`` found; ``robust`` is the accuracy under the oblivious attacks without any detector."""

    images: int
    fitted: int
    calibrated: int
    norm: str
    eps: float
    eps_text: str
    steps: int
    restarts: int
    seed: int
    clean: Estimate
    robust: Estimate
    detectors: list[DetectorResult]
    seconds: float

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return how each detector separates images, and what it leaves at some rates."""
        columns = ["AUROC", "FPR@95TPR", *(f"held at {rate:.0%}" for rate in _REJECTED)]
        what = f"detectors, {self.norm} {self.eps_text}, attacks oblivious | aware"
        table = new_table(record, what, "detector", *columns)
        for one in self.detectors:
            *oblivious, aware = one.attacks
            row = []
            for key, worst in (("auroc", min), ("fpr95", max)):
                known = [value for attack in oblivious if (value := getattr(attack, key)) is not None]
                value = getattr(aware, key)
                row.append(f"{worst(known):.3f}" if known else "–")
                row[-1] += " | –" if value is None else f" | {value:.3f}"
            for rate in _REJECTED:
                point = _point(one, rate)
                row.append(f"{point.oblivious.accuracy:.1%} | {point.aware.accuracy:.1%}")
            table.add_row(one.name, *row)
        table.caption = (
            "oblivious: the worst of the attacks that do not know the detector; aware: of one that does. held: right, or "
            "rejected, where that fraction of clean images is rejected."
        )
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return what is left without a detector and with the best."""
        best = max(self.detectors, key=lambda one: _point(one, _REJECTED[0]).aware.accuracy)
        point = _point(best, _REJECTED[0])
        text = (
            f"{record.about}: {self.robust.accuracy:.1%} withstand {self.norm} {self.eps_text} (PGD) without a detector; with "
            f"{best.name}, which rejects {point.clean_rejected.accuracy:.1%} of them when clean, {point.oblivious.accuracy:.1%} "
            f"are right or rejected under attacks that do not know it, and {point.aware.accuracy:.1%} (95 % interval "
            f"{span(point.aware)}) under one that does."
        )
        if point.threshold is None:
            text += f"\n{self.calibrated} validation images are too few for a threshold at {_REJECTED[0]:.0%}: none is rejected."
        return text

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section:
        """Return two plots and two tables of each run."""
        blocks: list[Table | Row | Heading | Note | Details] = []
        for one in measured:
            result = cast(Detection, one.record.result)
            caption = (
                f"{one.name}, {result.images:,} {one.record.data.split} images, {norm_of(result.norm)} ε = {result.eps_text}, "
                f"attacks of {result.steps} steps with {result.restarts} {'restart' if result.restarts == 1 else 'restarts'}; "
                f"{percent(result.robust.accuracy)} are right without a detector."
            )
            if len(measured) > 1:
                blocks.append(Heading(one.name))
            blocks.append(Row([Plot(_draw(one, result, attack, caption)) for attack in _ATTACKS]))
            blocks.append(Note(f"{caption} Bands are 95\N{NO-BREAK SPACE}% intervals."))
            blocks.append(
                Details(
                    f"Numbers of {one.name}: each detector at each rate, and how well it tells attacks apart",
                    [_rejection(one.name, result), _separation(one.name, result)],
                )
            )
        first = cast(Detection, measured[0].record.result)
        return Section("detection", "Detection of attacks", 10, _INTRO, blocks, _key(first), "Detectors")


def _point(one: DetectorResult, rate: float) -> DetectionPoint:
    return min(one.curve, key=lambda point: abs(point.rate - rate))


def _key(result: Detection) -> list[tuple[str, int]]:
    return [(_written(one.name), index) for index, one in enumerate(result.detectors)]


def _written(name: str) -> str:
    return name.replace("_", " ")


def _rejection(name: str, result: Detection) -> Table:
    rows: list[list[Cell]] = [
        [_written(one.name), point.clean_rejected, point.accepted_accuracy, point.oblivious, point.aware]
        for one in result.detectors
        for point in one.curve
    ]
    return Table(
        ["Detector", "clean rejected", "accuracy on clean accepted", *_ATTACKS.values()],
        rows,
        caption=f"{name}: right or rejected, with 95\N{NO-BREAK SPACE}% intervals",
        label=f"Rejection of {name}",
        strong=[_ATTACKS["aware"]],
    )


def _separation(name: str, result: Detection) -> Table:
    rows: list[list[Cell]] = [
        [
            _written(one.name),
            attack.name,
            count(attack.n),
            None if attack.auroc is None else percent(attack.auroc),
            None if attack.fpr95 is None else percent(attack.fpr95),
        ]
        for one in result.detectors
        for attack in one.attacks
    ]
    return Table(
        ["Detector", "attack", "adversarial images", "AUROC", "clean rejected"],
        rows,
        caption=(
            f"{name}: AUROC is the chance that a successful adversarial image looks more suspicious than a clean one "
            "(50\N{NO-BREAK SPACE}% is a coin); the last column is the share of clean images rejected where "
            "95\N{NO-BREAK SPACE}% of the adversarial ones are"
        ),
        label=f"Separation of {name}",
        text=["attack"],
    )


def _draw(one: Measured, result: Detection, attack: str, caption: str) -> Drawing:
    """Draw what is right or rejected against the clean images rejected, under one of the two kinds of attacks."""
    figure, axes = new_axes(390, 270)
    rows, described = [], []
    for index, each in enumerate(result.detectors):
        color, marker, dash = style(index)
        points = sorted(each.curve, key=lambda point: point.clean_rejected.accuracy)
        x = [point.clean_rejected.accuracy for point in points]
        left = [getattr(point, attack) for point in points]
        axes.fill_between(x, [e.low for e in left], [e.high for e in left], color=color, alpha=0.12, linewidth=0)
        middle = [e.accuracy for e in left]
        axes.plot(x, middle, color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.7)
        rows += [(_written(each.name), rate, *estimated(value)) for rate, value in zip(x, left, strict=True)]
        near = _point(each, _REJECTED[0])
        described.append(
            f"{_written(each.name)} rejects {percent(near.clean_rejected.accuracy)} of the clean images and leaves "
            f"{percent(near.oblivious.accuracy)} right or rejected, {percent(near.aware.accuracy)} if the attack knows it"
        )
    axes.axhline(result.robust.accuracy, color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)))
    axes.annotate(
        "without a detector", (1, result.robust.accuracy), xycoords=("axes fraction", "data"), ha="right", va="top",
        xytext=(0, -3), textcoords="offset points", fontsize=9, color=MUTED,
    )  # fmt: skip
    rows.append(("none", None, *estimated(result.robust)))
    percent_axis(axes)
    axes.set_xlim(right=max(axes.get_xlim()[1], 0.1))
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    head(axes, f"{one.name}, {_ATTACKS[attack]}", "clean images rejected")
    columns = ("detector", "clean images rejected (fraction)", "right or rejected (fraction)", *ESTIMATED[1:])
    label = f"Detection, {_ATTACKS[attack]}. {caption} {'; '.join(described)}."
    return draw(figure, f"detection-{one.index + 1}-{attack}", label, columns, rows, _key(result))
