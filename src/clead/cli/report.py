"""``clead report``: evaluated runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clead.cli.app import app, echo


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run directories, folders of clead evaluate --model, or record files (JSON).")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; RUN/report.html for one folder, else report.html here.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The heading of the page.")] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Write the plots and their numbers as files, too.")
    ] = True,
) -> None:
    """Write one self-contained HTML report of evaluated runs, and its figures.

    It shows what the runs have: the evaluation, the training, and what clead distances, corruptions, detect, certify, probe and
    attack have measured. Every plot is written as PNG and SVG, and its numbers as CSV, into the folder NAME-figures beside the
    page NAME.html, with an index; figures of an earlier report there are replaced.
    """
    from clead import api

    first = Path(runs[0])
    page = out or (first / "report.html" if len(runs) == 1 and first.is_dir() else Path("report.html"))
    folder = page.with_name(f"{page.stem}-figures") if figures else None
    echo(f"report: {api.write_report(runs, page, title=title, figures=folder)}")
    if folder:
        echo(f"figures: {folder}")
