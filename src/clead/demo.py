"""The demo: four methods on scikit-learn's digits at equal compute, attacked, compared and drawn, in a few minutes."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from clead.api import compare, evaluate_run, train, write_report
from clead.atomic_io import write_atomically
from clead.config import load_recipe
from clead.errors import MissingExtra, UserError

RECIPES = ("digits-standard", "digits-pgd-at", "digits-trades", "digits-clead")
_SUITE = ("--eval.suite", "pgd")  # each attack on all images, for a table of attacks; AutoAttack would take minutes
_QUICK = (
    "--train.budget",
    "60",
    "--eval.steps",
    "20",
    "--eval.images",
    "180",
    "--eval.curve_points",
    "4",
    "--eval.check_images",
    "0",
)


def run_demo(out: Path | None, *, quick: bool = False, show: bool = True) -> dict[str, Any]:
    """Train, attack, compare and draw; return the comparison, with the report's path under ``report``.

    Args:
        out: a new or empty directory; ``runs/demo-TIME`` if None.
        quick: a seventh of the compute, half of the images and weaker attacks: a look at the workings, not a result.
        show: show progress on stderr.

    Leaves one run directory per recipe, ``summary.json`` (a list of rows) and ``report.html``.
    """
    out = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; give an empty or new directory")
    for library in ("matplotlib", "jinja2", "sklearn"):  # before minutes of work, not after
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(library.replace("sklearn", "scikit-learn"), "demo", "the demo")
    overrides = (*_SUITE, *_QUICK) if quick else _SUITE
    configs = [load_recipe(recipe, overrides) for recipe in RECIPES]
    paths = []
    for config in configs:
        path = out / config.name.removeprefix("digits-")
        train(config, out=path, show=show)
        evaluate_run(path, show=show)
        paths.append(path)
    comparison = compare(paths)
    rows = [{**row, "method": row["run"]} for row in comparison["rows"]]
    write_atomically(out / "summary.json", json.dumps(rows, indent=1).encode())
    title = "C-LEAD demo: four ways to train on handwritten digits" + (" (quick)" if quick else "")
    comparison["report"] = write_report(paths, out / "report.html", title=title)
    return comparison
