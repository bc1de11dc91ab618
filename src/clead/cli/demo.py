"""``clead demo``: the whole way on handwritten digits."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from clead.cli.app import app, echo, interruptible
from clead.cli.printing import print_comparison


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="classification | segmentation: standard training and PGD-AT on scenes of digits with masks."
        ),
    ] = "classification",
    out: Annotated[Path | None, typer.Option(help="Output directory; runs/demo-TIME by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: the workings, not a result.")] = False,
) -> None:
    """Train standard, PGD-AT, TRADES and C-LEAD on digits at equal compute, attack them, and draw the report."""
    from clead.demo import run_demo

    with interruptible():
        comparison = run_demo(out, task=task, quick=quick)
    print_comparison(comparison)
    rows = comparison["rows"]
    if task == "segmentation":
        figures = [(row["run"], *row["metrics"]["mIoU"]) for row in rows]
        falls = "; ".join(f"{name} falls from {clean:.0%} to {robust:.0%}" for name, clean, robust in figures)
        echo(f"mIoU under attacks within {rows[0]['threat']}: {falls}. A stronger attack can only lower it further.")
    page = Path(comparison["report"])
    echo(f"report: {page.resolve()}")
    where = shlex.quote(str(page.parent))
    echo(f"attack them by hand: clead playground {where}/{rows[0]['run']} {where}/{rows[-1]['run']} --open")
