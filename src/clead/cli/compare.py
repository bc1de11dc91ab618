"""``clead compare``: evaluated runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clead.cli.app import Json, app, echo, write_json
from clead.cli.printing import print_comparison


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run directories or record files.")],
    json_file: Json = None,
    out: Annotated[Path | None, typer.Option(help="Write a report of all runs to this HTML file too.")] = None,
) -> None:
    """Print a table of evaluated runs, with McNemar's exact test between runs on the same images."""
    from clead import api

    comparison = api.compare(runs)
    print_comparison(comparison)
    if json_file:
        write_json(json_file, comparison)
    if out:
        echo(f"report: {api.write_report(runs, out)}")
