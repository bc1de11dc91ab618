"""``clead report``: evaluated runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clead.cli.application import app, say


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run directories or record files.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; RUN/report.html for one run.")] = None,
) -> None:
    """Write one self-contained HTML report of evaluated runs."""
    from clead import api

    first = Path(runs[0])
    path = out or (first / "report.html" if len(runs) == 1 and first.is_dir() else Path("report.html"))
    say(f"report: {api.write_report(runs, path)}")
