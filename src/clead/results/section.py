"""What a section of a report is made of: plain blocks, which one template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from clead.results.figure import Drawing
from clead.results.record import Estimate

Cell = str | Estimate | None
"""Text; a fraction with its interval; or a dash."""


@dataclass(frozen=True)
class Table:
    """A table; the first column of ``rows`` heads its row.

    Attributes:
        columns: heads.
        rows: one cell for each column.
        caption: above the table.
        label: what it is, for a screen reader; unique in the page.
        text: heads of the columns that hold text, besides the first.
        strong: heads of the columns that matter most.
    """

    block: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    label: str
    text: Sequence[str] = ()
    strong: Sequence[str] = ()

    def of(self, row: Sequence[Cell]) -> list[tuple[str, Cell]]:
        """Return head and cell of each column but the first."""
        return list(zip(self.columns, row, strict=True))[1:]


@dataclass(frozen=True)
class Plot:
    """A drawing with what stands below it."""

    drawing: Drawing
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """An image: PNG as base64, its text alternative, and what stands below it; ``wide`` pictures have a line for themselves."""

    png: str
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Row:
    """Plots and pictures beside each other, and maybe a table beside them."""

    block: ClassVar[str] = "row"
    plots: Sequence[Plot] = ()
    pictures: Sequence[Picture] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    block: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph in small print."""

    block: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Details:
    """Tables that a reader opens."""

    block: ClassVar[str] = "details"
    summary: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        id: unique in the page.
        heading: what it is about.
        place: sections come in this order.
        intro: what a reader must know to understand it.
        blocks: what is shown.
        legend: names with the numbers of their styles, as in the plots.
        legend_of: what the names are of.
    """

    id: str
    heading: str
    place: int
    intro: str
    blocks: Sequence[Table | Row | Heading | Note | Details]
    legend: Sequence[tuple[str, int]] = ()
    legend_of: str = "Runs"


class DistanceCurves(NamedTuple):
    """How far each image is from a wrong answer, by attack.

    Attributes:
        norm: of the distances.
        radii: where robust accuracy is to be drawn, rising.
        attacks: attack -> distance of each image, None where no wrong answer is known; the last is the nearest of all.
    """

    norm: str
    radii: list[float]
    attacks: dict[str, list[float | None]]
