"""Plots of a report as inline SVG: pure functions from records, histories and arrays to a string.

Every SVG scales to its box, takes the page's text font and colours (CSS variables ``--ink``, ``--muted``, ``--line``,
``--p0`` … ``--p9``, each with a fallback, so one drawing reads on light and dark), and carries ids that start with the
given ``prefix``, so that several may stand in one page. Text stays text: it can be searched, copied and read aloud.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clead.errors import MissingExtra
from clead.report.record import ClassPart, Record

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

INK, MUTED, LINE = "#0a0b0c", "#7a7b7c", "#d0d1d2"  # stand-ins, replaced by CSS variables in _svg
_VARIABLES = {
    INK: "var(--ink,#16202c)",
    MUTED: "var(--muted,#5a6573)",
    LINE: "var(--line,#d8dde3)",
    **{color: f"var(--p{i},{color})" for i, color in enumerate(PALETTE)},
}
_MAX_POINTS = 150
_MAX_CLASSES = 20


class Style(NamedTuple):
    """How run i is drawn in every plot."""

    color: str
    marker: str
    dash: Any


def style(index: int) -> Style:
    """Return the colour, marker and dash of run ``index``."""
    return Style(PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


def parse_eps(value: Any) -> float | None:
    """Return a radius written as a number or a fraction such as ``"8/255"``; None if it is neither."""
    try:
        return float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        return None


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of ``width`` × ``height`` points, drawn without pyplot's global state, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "the report") from error
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=5)
    return figure, axes


def _title(axes: Axes, text: str, xlabel: str = "") -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=9)
    if xlabel:
        axes.set_xlabel(xlabel, color=MUTED, fontsize=9.5, labelpad=5)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """Return ``figure`` as one ``<svg role="img">`` named ``label`` that may stand in a page beside others."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class called "$x$" is no formula
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
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> inside an inline SVG would apply to the whole page.
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))

    def mend(match: re.Match[str]) -> str:
        tag = match[0].replace("xlink:href", "href")
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag)
        tag = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", tag)
        tag = re.sub(
            r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*;?|(?<= )transform=\"rotate\(-0 [^\"]*\"",
            "",
            tag,
        )
        tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
        return re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda m: _VARIABLES.get(m[0], m[0]), tag)

    # Only tags are rewritten (text holds no raw < or >), so a name that looks like an id or a colour stays as it is.
    text = re.sub(r"<[^>]*>", mend, text)
    text = re.sub(r">\s*\n\s*<", "><", text).replace(" \n", " ").strip()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    root = f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{escape(label)}">'
    return re.sub(r"^<svg[^>]*>", lambda _: root, text)


def epsilon_curve(
    records: Sequence[Record],
    trained: Mapping[float, str],
    *,
    prefix: str,
    label: str,
    indices: Sequence[int],
) -> str:
    """Draw robust accuracy against ε with its Wilson bands, the worst case as a hollow marker, training radii as lines.

    Args:
        records: records of one norm, whose ``curve`` may hold several attacks.
        trained: radius → how it was written, of the radii to be marked as trained against.
        prefix: starts every id.
        label: the text alternative.
        indices: which run (colour, marker) each record is.
    """
    figure, axes = _new(390, 270)
    texts = {0.0: "0"}
    for index, record in zip(indices, records, strict=True):
        color, marker, dash = style(index)
        for number, attack in enumerate(dict.fromkeys(point.attack for point in record.curve)):
            points = sorted((p for p in record.curve if p.attack == attack), key=lambda p: p.eps)
            texts.update((p.eps, p.eps_text) for p in points)
            eps = [p.eps for p in points]
            lines = [(p.robust.accuracy, p.robust.low, p.robust.high) for p in points]
            if eps and eps[0] > 0:
                eps, lines = (
                    [0.0, *eps],
                    [(record.clean.accuracy, record.clean.low, record.clean.high), *lines],
                )
            middle, low, high = zip(*lines, strict=True)
            axes.fill_between(eps, low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(eps, middle, color=color, marker=marker, markersize=4.5, linewidth=1.9, linestyle=DASHES[number]
                      if number else dash)  # fmt: skip
        worst = record.worst
        error = [[worst.accuracy - worst.low], [worst.high - worst.accuracy]]
        axes.errorbar(
            [record.threat.eps], [worst.accuracy], np.abs(error), color=color, marker=marker, markersize=8, capsize=3,
            markerfacecolor="none", markeredgewidth=1.6, linewidth=1.4,
        )  # fmt: skip
    texts.update((r.threat.eps, r.threat.eps_text) for r in records)
    texts.update(trained)
    _percent_axis(axes)
    right = max(texts)
    for row, (eps, text) in enumerate(sorted(trained.items())):
        late = eps > 0.6 * right
        axes.axvline(eps, color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            f"training ε = {text}", (eps, 1.0 - 0.07 * row), xytext=(-5 if late else 5, 0), textcoords="offset points",
            color=MUTED, fontsize=9, ha="right" if late else "left", va="center",
        )  # fmt: skip
    axes.set_xlim(-0.02 * right, right * 1.06 or 1)
    ticks: list[float] = []
    for eps in sorted(texts):  # a label needs room: about a ninth of the axis
        if not ticks or eps - ticks[-1] >= right / 9:
            ticks.append(eps)
    axes.set_xticks(ticks, [texts[eps] for eps in ticks])
    _title(axes, "Robust accuracy against ε", "perturbation radius ε")
    return _svg(figure, prefix, label)


def _series(history: Sequence[Mapping[str, Any]], kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the finite (x, y) of one kind of line, averaged in order into at most 150 points."""
    pairs = [
        (line[x], line[y])
        for line in history
        if line.get("kind") == kind and is_number(line.get(x)) and is_number(line.get(y))
    ]
    groups = np.array_split(np.asarray(pairs, dtype=float).reshape(-1, 2), max(1, min(len(pairs), _MAX_POINTS)))
    means = [group.mean(0) for group in groups if len(group)]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def is_number(value: object) -> bool:
    """Return whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def training_curves(
    histories: Sequence[Sequence[Mapping[str, Any]]],
    metric: str,
    *,
    x: str,
    xlabel: str,
    title: str,
    prefix: str,
    label: str,
) -> str:
    """Draw one metric of every run against ``x``: validation strong with markers, training thin.

    Args:
        histories: lines of ``metrics.jsonl``, one list per run, in the order of the runs.
        metric: the key drawn, such as ``"robust_accuracy"``; keys that end in ``accuracy`` get a percent axis.
        x: the key of the horizontal axis.
        xlabel: its name.
        title: above the plot.
        prefix: starts every id.
        label: the text alternative.
    """
    figure, axes = _new(390, 250)
    for index, history in enumerate(histories):
        color, marker, dash = style(index)
        train, val = _series(history, "train", x, metric), _series(history, "validation", x, metric)
        only = not val[0]
        axes.plot(*train, color=color, linewidth=1.4 if only else 1.1, alpha=1 if only else 0.5)
        axes.plot(*val, color=color, linewidth=1.9, marker=marker, markersize=4, linestyle=dash,
                  markevery=max(1, len(val[0]) // 12))  # fmt: skip
    if metric.endswith("accuracy"):
        _percent_axis(axes)
    axes.margins(x=0.02)
    _title(axes, title, xlabel)
    return _svg(figure, prefix, label)


def loss_terms(
    history: Sequence[Mapping[str, Any]],
    terms: Sequence[str],
    *,
    x: str,
    xlabel: str,
    title: str,
    prefix: str,
    label: str,
) -> str:
    """Draw the terms of one run's training loss against ``x``, each named at the end of its line."""
    figure, axes = _new(390, 250)
    ends = []
    for index, term in enumerate(terms):
        xs, ys = _series(history, "train", x, term)
        axes.plot(xs, ys, color=style(index).color, linestyle=style(index).dash, linewidth=1.7)
        if ys:
            ends.append((ys[-1], index, term, xs[-1]))
    low, high = axes.get_ylim()
    gap, floor = (high - low) * 0.075, -np.inf
    for y, index, term, end in sorted(ends):  # labels that would touch are pushed up
        floor = max(y, floor + gap)
        axes.annotate(
            term.replace("_", " "), (end, floor), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
            color=style(index).color, annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.02)
    _title(axes, title, xlabel)
    return _svg(figure, prefix, label)


def stages(record: Record, index: int, *, title: str, prefix: str, label: str) -> str:
    """Draw what attacks that follow each other leave: one bar each from clean to the worst case, the broken part pale.

    Args:
        record: whose ``attacks`` met the survivors of those before them.
        index: which run (colour).
        title: above the plot.
        prefix: starts every id.
        label: the text alternative.
    """
    figure, axes = _new(390, 62 + 23 * (len(record.attacks) + 2))
    color, before = style(index).color, record.clean.accuracy
    rows = [("clean", before, before, f"{100 * before:.1f} %")]
    for attack in record.attacks:
        left, minus = attack.robust.accuracy, "−" if attack.broken else ""
        rows.append((attack.name, before, left, f"{100 * left:.1f} %, {minus}{attack.broken:,} of {attack.attacked:,}"))
        before = left
    worst = record.worst
    rows.append(("worst case", worst.accuracy, worst.accuracy, f"{100 * worst.accuracy:.1f} %"))
    for row, (_, whole, left, numbers) in enumerate(rows):
        axes.barh(row, whole, height=0.66, color=color, alpha=0.26, linewidth=0)
        axes.barh(row, left, height=0.66, color=color, linewidth=0)
        axes.annotate(numbers, (1.03, row), va="center", fontsize=9, color=MUTED, annotation_clip=False)
    error = np.abs([[worst.accuracy - worst.low], [worst.high - worst.accuracy]])
    axes.errorbar([worst.accuracy], [len(rows) - 1], xerr=error, color=INK, capsize=3, linewidth=1.4)
    names = [name if len(name) <= 24 else name[:23] + "…" for name, *_ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", colors=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.6)  # the numbers stand right of 100 %
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.spines["bottom"].set_visible(False)
    _title(axes, title)
    return _svg(figure, prefix, label)


def class_bars(parts: Sequence[ClassPart], index: int, *, title: str, prefix: str, label: str) -> str:
    """Draw clean (pale) and robust (full) accuracy per class; above 20 classes, the 20 least robust."""
    shown = list(parts)
    if len(shown) > _MAX_CLASSES:
        shown = sorted(shown, key=lambda part: part.robust_accuracy)[:_MAX_CLASSES]
    figure, axes = _new(390, 62 + 19 * len(shown))
    color, rows = style(index).color, np.arange(len(shown))
    axes.barh(rows, [part.clean_accuracy for part in shown], height=0.72, color=color, alpha=0.26, linewidth=0)
    axes.barh(rows, [part.robust_accuracy for part in shown], height=0.4, color=color, linewidth=0)
    for row, part in enumerate(shown):
        numbers = f"{100 * part.robust_accuracy:.0f} / {100 * part.clean_accuracy:.0f} %"
        axes.annotate(numbers, (1.02, row), va="center", fontsize=9, color=MUTED, annotation_clip=False)
    axes.set_yticks(rows, [part.name if len(part.name) <= 18 else part.name[:17] + "…" for part in shown])
    axes.tick_params(axis="y", colors=INK)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.spines["bottom"].set_visible(False)
    _title(axes, title)
    return _svg(figure, prefix, label)


def project(clean: np.ndarray, adv: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Return clean and adversarial embeddings (m, D) in one plane, (m, 2) each, and how: t-SNE, or PCA for few points.

    t-SNE (van der Maaten & Hinton 2008) needs more than 15 distinct points in more than two dimensions; both sets are
    fitted together with a fixed seed.
    """
    both = np.concatenate([clean, adv]).astype(np.float64)
    if both.shape[1] > 2 and len(np.unique(both, axis=0)) > 15 and len(clean) > 15:
        try:
            from sklearn.manifold import TSNE
            from threadpoolctl import threadpool_limits  # a dependency of scikit-learn
        except ImportError as error:
            raise MissingExtra("scikit-learn", "report", "the embedding map of the report") from error
        perplexity = min(30.0, len(both) / 6)
        with threadpool_limits(1):  # so few points gain nothing from threads, and lose tenfold on busy cores
            plane = TSNE(random_state=seed, init="pca", perplexity=perplexity).fit_transform(both)
        how = "t-SNE"
    else:
        centred = both - both.mean(0)
        plane, how = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T, "PCA"
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    return plane[: len(clean)], plane[len(clean) :], how


def embedding_map(
    clean: np.ndarray,
    adv: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    prefix: str,
    label: str,
) -> str:
    """Draw planar points: clean as discs, adversarial as crosses, a thin line between the two of one image.

    Args:
        clean: (m, 2), the clean images.
        adv: (m, 2), the same images under attack.
        labels: (m,) in [0, K); a colour per class, its name at the median of its clean points.
        classes: the K names.
        title: above the plot.
        prefix: starts every id.
        label: the text alternative.
    """
    figure, axes = _new(390, 350)
    from matplotlib.collections import LineCollection

    colors = [PALETTE[int(k) % len(PALETTE)] for k in labels]
    axes.add_collection(LineCollection(np.stack([clean, adv], 1).tolist(), colors=colors, linewidths=0.5, alpha=0.35))
    for k in np.unique(labels):
        color, of = PALETTE[int(k) % len(PALETTE)], labels == k
        axes.plot(*clean[of].T, "o", color=color, markersize=3.6, markeredgewidth=0, alpha=0.85)
        axes.plot(*adv[of].T, "x", color=color, markersize=3.8, markeredgewidth=0.9, alpha=0.85)
    present = np.unique(labels)
    if len(present) <= _MAX_CLASSES:
        for k in present:
            name = classes[int(k)] if int(k) < len(classes) else str(int(k))
            axes.annotate(
                name[:18], np.median(clean[labels == k], axis=0).tolist(), ha="center", va="center", fontsize=10.5,
                fontweight="bold", color=INK,
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    _title(axes, title)
    return _svg(figure, prefix, label)
