"""A drawing: one plot as it stands in the page, as picture files, and its numbers.

In the page it is an inline SVG that scales to its box and takes the page's text font and colours (CSS variables ``--ink``,
``--muted``, ``--line``, ``--p0`` … ``--p9``, each with a fallback, so one drawing reads on light and dark), with ids that no
other drawing has, so that several may stand in one page. Text stays text: it can be searched, copied and read aloud.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from clead.errors import needs_extra
from clead.output import csv_text
from clead.results.record import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (
    "#0072b2", "#d55e00", "#00855f", "#b0498a", "#946800", "#2594b8", "#3f2f9b", "#8c1d4f", "#6b6f76", "#5d7200",
)  # fmt: skip
"""Colours of runs and classes on a light page: distinct with a colour vision deficiency, contrast ≥ 3 on white."""

PALETTE_DARK = (
    "#56b4e9", "#ff8f52", "#3ccf9f", "#e79ccb", "#f0c64a", "#9be3f2", "#a9a0ff", "#ee7aa4", "#b3b8c0", "#bdd257",
)  # fmt: skip

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.6, 1.4, 1.6)))
"""Marker and dash of run i repeat after 6 and 4 runs: a run is never told by colour alone."""

INK, MUTED, LINE = "#0a0b0c", "#5f6062", "#d0d1d2"  # stand-ins in the page, where CSS variables replace them
_VARIABLES = {
    INK: "var(--ink,#16202c)",
    MUTED: "var(--muted,#5a6573)",
    LINE: "var(--line,#d8dde3)",
    **{color: f"var(--p{i},{color})" for i, color in enumerate(PALETTE)},
}
_DOTS_PER_INCH = 200
ESTIMATED = ("accuracy (fraction)", "lower end of the 95 % interval", "upper end of the 95 % interval", "images")
"""Heads of the columns that ``estimated`` fills."""


class Style(NamedTuple):
    """How run i is drawn in every plot."""

    color: str
    marker: str
    dash: Any


def style(index: int) -> Style:
    """Return the colour, marker and dash of run ``index``."""
    return Style(PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


@dataclass(frozen=True)
class Drawing:
    """One plot.

    Attributes:
        name: of its files, without a suffix; unique within one report.
        figure: what is drawn.
        svg: for the page, ``<svg role="img">`` with a text alternative.
        label: that text alternative.
        columns: the heads of its numbers, with units.
        rows: the numbers as plotted, one row per mark.
        key: what stands for what in a picture file, which has no legend of the page beside it: (words, index of a run).
    """

    name: str
    figure: Figure
    svg: str
    label: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    key: tuple[tuple[str, int], ...] = ()

    def csv(self) -> str:
        """Return the numbers as CSV; floats are written so that they are read back as they were."""
        return csv_text([self.columns, *self.rows])

    def pictures(self) -> dict[str, bytes]:
        """Return the PNG (200 dots per inch) and the SVG, both on white and in the colours of a light page, by suffix."""
        import matplotlib
        from matplotlib.lines import Line2D

        if len(self.key) > 1:
            handles = []
            for _, index in self.key:
                color, marker, dash = style(index)
                handles.append(Line2D([], [], color=color, marker=marker, linestyle=dash, markersize=4.5))
            texts = [text for text, _ in self.key]
            self.figure.legend(handles, texts, loc="outside lower left", ncols=2, fontsize=9, frameon=False)
        else:
            self.figure.set_layout_engine("none")  # it stays as it was laid out for the page
        contents = {}
        options: Any = {"svg.fonttype": "path", "svg.hashsalt": self.name, "text.parse_math": False}
        _plain_text(self.figure)
        with matplotlib.rc_context(options), warnings.catch_warnings():
            # A class name in a script that the font lacks is drawn as boxes; the CSV has it right.
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            for suffix, metadata in (
                (".png", {"Title": self.label, "Software": "clead"}),
                (".svg", {"Title": self.label, "Date": None, "Creator": "clead"}),
            ):
                buffer = io.BytesIO()
                self.figure.savefig(buffer, format=suffix[1:], dpi=_DOTS_PER_INCH, facecolor="white", metadata=metadata)
                contents[suffix] = buffer.getvalue()
        return contents


def estimated(estimate: Estimate) -> tuple[float, float, float, int]:
    """Return what a row of numbers holds of an estimate."""
    return estimate.accuracy, estimate.low, estimate.high, estimate.n


def draw(
    figure: Figure,
    name: str,
    label: str,
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    key: Sequence[tuple[str, int]] = (),
) -> Drawing:
    """Return the finished ``figure`` as a drawing; the arguments are its attributes."""
    return Drawing(name, figure, inline_svg(figure, name, label), label, tuple(columns), list(rows), tuple(key))


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of ``width`` × ``height`` points, drawn without pyplot's global state, and its axes."""
    with needs_extra("report", "the report"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=5)
    return figure, axes


def head(axes: Axes, text: str, xlabel: str = "") -> None:
    """Set the title and the name of the horizontal axis."""
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=9)
    if xlabel:
        axes.set_xlabel(xlabel, color=MUTED, fontsize=9.5, labelpad=5)


def percent_axis(axes: Axes) -> None:
    """Give fractions a vertical axis from 0 % to 100 %."""
    axes.set_ylim(-0.02, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def cell(axes: Any, x: float, y: float, share: float, text: str, color: str) -> None:
    """Draw one cell of a map, shaded so weakly that its number can be read on light and dark."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=color, alpha=0.03 + 0.37 * share, linewidth=0))
    if text:
        written = axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK)
        written.set_in_layout(False)  # it lies inside its cell: measuring hundreds of them takes seconds


def cell_axes(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Make the axes of a map of cells, the first row on top."""
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _plain_text(figure: Figure) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class called "$x$" is no formula


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """Return ``figure`` as one ``<svg role="img">`` named ``label`` that may stand in a page beside others."""
    import matplotlib

    _plain_text(figure)
    buffer = io.StringIO()
    options: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
    }
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(options), warnings.catch_warnings():
        # Text is only measured here, the browser's font draws it: a class name in another script is no defect.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root, _, content = buffer.getvalue().partition("<svg ")[2].partition(">")
    # What is referred to has an id that the salt makes unique; groups have the same ones in every drawing.
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    content = re.sub(
        r"<defs>\s*<style.*?</defs>", "", content, count=1, flags=re.DOTALL
    )  # it would apply to the whole page
    for color, variable in _VARIABLES.items():
        content = content.replace(f": {color}", f": {variable}")
    box = root[root.index("viewBox=") :].split('"')[1]
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{escape(label)}">'
        + content.replace("xlink:href=", "href=").strip()
    )
