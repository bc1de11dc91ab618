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
    out: Annotated[Path | None, typer.Option(help="Output directory; runs/demo-TIME by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: the workings, not a result.")] = False,
) -> None:
    """Train standard, PGD-AT, TRADES and C-LEAD on digits at equal compute, attack them, and draw the report."""
    from clead.demo import run_demo

    with interruptible():
        comparison = run_demo(out, quick=quick)
    print_comparison(comparison)
    page = Path(comparison["report"])
    echo(f"report: {page.resolve()}")
    where = shlex.quote(str(page.parent))
    echo(f"attack them by hand: clead playground {where}/standard {where}/clead --open")
