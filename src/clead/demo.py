"""The demo: four methods on scikit-learn's digits at equal compute, or two on scenes of them with masks, in a few minutes."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from clead.api import compare, evaluate_run, train, write_report
from clead.atomic_io import write_atomically
from clead.config import load_recipe
from clead.errors import MissingExtra, UserError, did_you_mean

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
_SCENES = (
    *("--data.name", "digit_scenes", "--data.batch_size", "8", "--task", "segmentation"),
    *("--model.name", "unet", "--model.levels", "3", "--threat.eps", "8/255", "--attack.steps", "2"),
    *("--optim.lr", "0.01", "--train.budget", "null", "--train.epochs", "10", "--train.validate_every", "5"),
    *("--eval.suite", "sea-quick", "--eval.images", "40", "--eval.curve_points", "3", "--eval.check_images", "4"),
)
_QUICK_SCENES = (
    *("--train.epochs", "3", "--train.validate_every", "3", "--eval.steps", "15", "--eval.images", "20"),
    *("--eval.curve_points", "0", "--eval.check_images", "0"),
)


class _Demo(NamedTuple):
    """Which recipes are compared, changed how, and for ``--quick``; and what the report is called."""

    recipes: tuple[str, ...]
    settings: tuple[str, ...]
    quick: tuple[str, ...]
    title: str


DEMOS = {
    "classification": _Demo(RECIPES, _SUITE, _QUICK, "C-LEAD demo: four ways to train on handwritten digits"),
    "segmentation": _Demo(
        RECIPES[:2], _SCENES, _QUICK_SCENES, "C-LEAD demo: two ways to learn masks of handwritten digits, equal steps"
    ),
}
"""By task."""


def run_demo(
    out: Path | None, *, task: str = "classification", quick: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train, attack, compare and draw; return the comparison, with the report's path under ``report``.

    Args:
        out: a new or empty directory; ``runs/demo-TIME`` if None.
        task: classification, or segmentation: standard training and PGD-AT on ``digit_scenes``.
        quick: a seventh of the compute (of masks a third), half of the images and weaker attacks: a look at the workings, not a
            result.
        show: show progress on stderr.

    Leaves one run directory per recipe, ``summary.json`` (a list of rows) and ``report.html``.
    """
    if task not in DEMOS:
        raise UserError(f"--task: there is no demo of {task!r}; {did_you_mean(task, DEMOS)}")
    out = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; give an empty or new directory")
    for library in ("matplotlib", "jinja2", "sklearn"):  # before minutes of work, not after
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(library.replace("sklearn", "scikit-learn"), "demo", "the demo")
    demo = DEMOS[task]
    overrides = (*demo.settings, *demo.quick) if quick else demo.settings
    configs = [load_recipe(recipe, overrides) for recipe in demo.recipes]
    paths = []
    for config in configs:
        path = out / config.name.removeprefix("digits-")
        train(config, out=path, show=show)
        evaluate_run(path, show=show)
        paths.append(path)
    comparison = compare(paths)
    rows = [{**row, "method": row["run"]} for row in comparison["rows"]]
    write_atomically(out / "summary.json", json.dumps(rows, indent=1).encode())
    title = demo.title + (" (quick)" if quick else "")
    comparison["report"] = write_report(paths, out / "report.html", title=title)
    return comparison
