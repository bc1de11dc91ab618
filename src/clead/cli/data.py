"""``clead data``: what would be read at a path."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clead.cli.app import OPEN, Json, app, echo, interruptible, write_json
from clead.cli.arguments import only, positional
from clead.errors import UserError

if TYPE_CHECKING:
    from clead.data.inspection import DataReport

_CLASSES, _LINES, _SIZES = 30, 10, 5
_SPLITS = {"train": "training", "val": "validation", "test": "test"}
_ORIGIN = {
    "test": "the data's own test split",
    "val": "the data's validation split: it has no test split",
    "train": "a fixed fifth of the training images: the data has no other split",
}


@app.command("data", context_settings=OPEN)
def data(
    context: typer.Context,
    show: Annotated[
        Path | None, typer.Option(help="Write a contact sheet, a few images per class, to this PNG.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Say what would be read: clead data PATH [--data.image_size 32] [--show sheet.png].

    Splits, sizes, classes with their counts and balance, files that are not read, equal and nearly equal images, whether
    mirrored images are still of their class, and why training would refuse it.
    """
    paths, overrides = positional(context.args)
    if len(paths) != 1:
        raise UserError(f"which data? give one folder or file, such as clead data photos, got {len(paths)}")
    only(overrides, ("data",), "settings of data do")
    from clead import api
    from clead.config import evaluation_config

    config = evaluation_config("data", ["--data.path", paths[0], *overrides])
    with interruptible():
        report = api.inspect_data(config.data, show=show)
    for line in _lines(report, " ".join(map(shlex.quote, ["--data.path", paths[0], *overrides]))):
        echo(line)
    if show is not None:
        echo(f"contact sheet: {show}")
    if json_file is not None:
        write_json(json_file, report.to_dict())


def _lines(report: DataReport, options: str) -> list[str]:
    """Return the report in words."""
    lines = [f"{sum(report.splits.values())} images of {len(report.classes)} classes, read as {report.layout}"]
    for name, count in report.splits.items():
        lines.append(
            f"  {_SPLITS[name]}: {count}" + (f" ({_ORIGIN[report.origin]})" if name == "test" and report.origin else "")
        )
    lines.append(f"sizes: {_sizes(report.sizes)}; {', '.join(f'{n} {name}' for name, n in report.channels.items())}")
    counted = {"segmentation": "images with it", "multilabel": "images that have it"}.get(report.task, "images")
    lines.append(f"classes (number, name, {counted}: {', '.join(_SPLITS[name] for name in report.splits)})")
    for k, (name, counts) in enumerate(list(report.classes.items())[:_CLASSES]):
        lines.append(f"  {k}  {name}  {'  '.join(map(str, counts.values()))}")
    if len(report.classes) > _CLASSES:
        lines.append(f"  … {len(report.classes) - _CLASSES} more classes")
    lines += _some("files that are not read", report.skipped) + _some("images that cannot be read", report.unreadable)
    lines += report.survey.sentences() if report.survey is not None else []
    within = sum(report.duplicates.within.values())
    lines.append(f"equal images within a split: {within or 'none'}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"training would refuse it: {problem}" for problem in report.problems]
    add = " ".join(["", *report.options])
    if report.survey is not None and not report.survey.flips.safe:
        add += " --data.augment.flip false"
    if report.task != "classification":
        add += f" --task {report.task}" + (" --model.name unet" if report.task == "segmentation" else "")
    name = "" if "--data.name" in options else "--data.name auto "
    if report.splits.get("train"):
        lines.append(f"next: clead train cifar10-small-pgd-at {name}{options}{add}".replace("  ", " "))
    else:
        lines.append(f"next: clead evaluate --model net.py:Net {options}{add}")
    return lines


def _sizes(sizes: dict[str, int]) -> str:
    if len(sizes) == 1:
        return f"all {next(iter(sizes))} (width x height)"
    sides = [
        sorted(int(size.split("x")[axis]) for size, count in sizes.items() for _ in range(count)) for axis in (0, 1)
    ]
    texts = [
        f"{name} {side[0]} to {side[-1]} (median {side[len(side) // 2]})"
        for name, side in zip(("width", "height"), sides, strict=True)
    ]
    most = ", ".join(f"{count} of {size}" for size, count in list(sizes.items())[:_SIZES])
    return f"{', '.join(texts)}; {len(sizes)} different: {most}{', …' if len(sizes) > _SIZES else ''}"


def _some(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"  … {len(items) - _LINES} more"] if len(items) > _LINES else []
    return [f"{title}: {len(items)}", *(f"  {item}" for item in items[:_LINES]), *more]
