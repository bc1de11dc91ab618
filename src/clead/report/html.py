"""The report: one HTML file, no network, for one or several evaluated runs.

It shows what the records say and computes no statistics of its own; what a record cannot support is said in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clead.atomic_io import open_regular, write_output
from clead.config import dump_yaml
from clead.errors import UserError, did_you_mean, needs_extra
from clead.evaluation.suites import in_words, suite_label, under_suite, yardstick
from clead.report.comparison import caveats, caveats_together, comparable, on_survivors, same_images
from clead.report.figures import write_figures
from clead.report.run import RunResult
from clead.report.sections.classes import classes, confusion
from clead.report.sections.epsilon import epsilon
from clead.report.sections.masks import masks
from clead.report.sections.measurements import measurements
from clead.report.sections.pictures import galleries, maps
from clead.report.sections.stages import stages
from clead.report.sections.task import task_figures
from clead.report.sections.training import training
from clead.results import format as formats
from clead.results.figure import PALETTE, PALETTE_DARK, Drawing, style
from clead.results.section import Row, Section

GENERATOR = '<meta name="generator" content="clead">'
"""Stands in every report: a file without it is not ours to replace."""


def write_report(
    runs: Sequence[RunResult],
    path: Path,
    *,
    title: str,
    pairs: Sequence[Mapping[str, Any]] = (),
    figures: Path | None = None,
) -> Path:
    """Write the report of ``runs`` to ``path`` atomically (a reader sees the old file or all of the new one); return it.

    Args:
        runs: at least one; names must differ. Colours follow this order.
        path: the file written; missing folders are made.
        title: the heading.
        pairs: McNemar's exact tests between runs: ``a``, ``b`` (names), ``only_a``, ``only_b`` (images that only one of
            them held), ``p_value``. Shown for runs that were attacked on the same images within the same threat and under
            the same suite.
        figures: a folder for every plot as PNG and SVG and its numbers as CSV; see ``write_figures``.

    Raises:
        UserError: no runs, repeated names, an unknown name in ``pairs``, artifacts whose shapes disagree, or a file at ``path``
            that is no report.
        MissingExtra: matplotlib, jinja2 or (for the embedding map) scikit-learn is not installed.
    """
    names = [run.name for run in runs]
    if not runs:
        raise UserError("a report needs at least one run, got none; give the folder of an evaluated run")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"the names of a report's runs must differ, got {twice} more than once; rename one of them")
    for pair in pairs:
        for side in (pair["a"], pair["b"]):
            if side not in names:
                raise UserError(
                    f"a pair names the run {side!r}, which the report does not hold; {did_you_mean(side, names)}"
                )
    path = Path(path)
    check_target(path)
    template = _template()
    context = _context(runs, pairs)
    html = template.render(title=title, **context)
    if figures is not None:
        write_figures(list(_drawings(context)), figures)
    write_output(path, html.encode())
    return path


def check_target(path: Path) -> None:
    """Raise UserError if a report cannot be written to ``path`` without losing something that is no report."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"a report is a file whose name ends in .html, got {path}; name it so")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")
    if path.is_file():
        with open_regular(path) as file:
            if GENERATOR.encode() not in file.read(4096):
                raise UserError(
                    f"{path} is there and is no report of clead; remove it, or give another name with --out"
                )


def _template() -> Any:
    with needs_extra("report", "the report"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("percent", "interval", "duration", "p_value", "count", "settings_text", "size", "norm_of")
    environment.filters |= {name: getattr(formats, name) for name in names}
    return environment.get_template("report.html.jinja")


def _drawings(value: Any) -> Iterator[Drawing]:
    """Yield every drawing in what the template is given, in the order of the page."""
    if isinstance(value, Drawing):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _drawings(item)
    elif isinstance(value, Section):
        yield from (plot.drawing for block in value.blocks if isinstance(block, Row) for plot in block.plots)


def _context(runs: Sequence[RunResult], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything the template shows."""
    records = [run.record for run in runs]
    groups: list[list[int]] = []
    for i, record in enumerate(records):
        for group in groups:
            if comparable(records[group[0]], record):
                group.append(i)
                break
        else:
            groups.append([i])
    by_name = {run.name: run.record for run in runs}
    measured = [*task_figures(runs), *masks(runs), *measurements(runs)]
    context = {
        "runs": [_run(i, run) for i, run in enumerate(runs)],
        "groups": groups,
        "threats_differ": any(not same_images(records[0], record) for record in records),
        "attacks": list(
            dict.fromkeys(attack.name for record in records if not on_survivors(record) for attack in record.attacks)
        ),
        "overview": len(runs) > 1 or not on_survivors(records[0]),
        "suites": list(dict.fromkeys(in_words(record) for record in records)),
        "others": list(dict.fromkeys(label for record in records if (label := suite_label(record)))),
        "yardstick": " or ".join(dict.fromkeys(map(yardstick, records))),
        "stages": stages(runs),
        "pairs": [
            {**pair, "label": suite_label(by_name[pair["a"]])}
            for pair in pairs
            if comparable(by_name[pair["a"]], by_name[pair["b"]])
        ],
        "caveats": [note for run in runs for note in caveats(run, many=len(runs) > 1)] + caveats_together(runs),
        "curves": epsilon(runs),
        "training": training(runs),
        "galleries": galleries(runs),
        "classes": classes(runs),
        "confusion": confusion(runs),
        "maps": maps(runs),
        "measurements": [
            (section, [{**_swatch(index), "name": name} for name, index in section.legend]) for section in measured
        ],
        "created": max(record.created for record in records),
        "palette": list(zip(PALETTE, PALETTE_DARK, strict=True)),
        "generator": GENERATOR,
    }
    present = {
        "verdict": ("Verdict", True),
        "trained": ("What was trained", True),
        "results": ("Results per attack", True),
        "checks": ("Checks of gradient masking", True),
        "epsilon": ("Robustness against ε", context["curves"]),
        "training": ("Training", context["training"]),
        "gallery": ("Gallery", context["galleries"]),
        "classes": ("Per class", context["classes"]),
        "confusion": ("Confusion", context["confusion"]),
        "embedding": ("Embedding map", context["maps"]),
        **{section.id: (section.heading, True) for section in measured},
        "cost": ("Attacks and cost", True),
        "made": ("How it was made", True),
    }
    context["sections"] = [(key, heading) for key, (heading, shown) in present.items() if shown]
    return context


def _swatch(index: int) -> dict[str, Any]:
    """Return how the legend draws what has style ``index``."""
    look = style(index)
    dash = "" if look.dash == "solid" else " ".join(str(length) for length in look.dash[1])
    return {"color": f"var(--p{index % len(PALETTE)})", "marker": look.marker, "dash": dash}


def _run(index: int, run: RunResult) -> dict[str, Any]:
    record = run.record
    method = run.config.get("method")
    configured = method.get("name", "unknown") if isinstance(method, Mapping) else method or "unknown"
    return {
        **_swatch(index),
        "index": index,
        "name": run.name,
        "record": record,
        "threat": formats.threat_of(record),
        "method": record.training.method if record.training else str(configured),
        "yaml": dump_yaml(run.config) if run.config else "",
        "attacks": {} if on_survivors(record) else {attack.name: attack for attack in record.attacks},
        "suite": in_words(record),
        "label": suite_label(record),
        "under": under_suite(record),
        "failed": [check.name for check in record.checks if not check.passed],
        "measurements": [measured for kind in sorted(run.measurements) if (measured := run.measured(kind))],
    }
