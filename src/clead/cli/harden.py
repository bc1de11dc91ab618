"""``clead harden``: photographs become a hardened, measured model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clead.cli.app import OPEN, Json, app, echo, interruptible, write_json
from clead.cli.arguments import allowance, positional
from clead.errors import UserError


@app.command(context_settings=OPEN)
def harden(
    context: typer.Context,
    minutes: Annotated[float, typer.Option("--minutes", help="For everything, from reading to the report.")] = 30,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="resnet18, timm:NAME, hf:NAME, net.py:make …; chosen by data and time by default."
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="A file or a run that it begins with.")] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.")] = "linf",
    eps: Annotated[
        str | None,
        typer.Option(
            "--eps", help="Radius, in pixels of [0, 1]; by default the usual one: 8/255 of linf, 0.5 of l2, 12 of l1."
        ),
    ] = None,
    flip: Annotated[
        str | None,
        typer.Option("--flip", help="yes or no: mirror images in training; by default unless that looks unsafe."),
    ] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Pixels a side; chosen by default.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="A new folder; runs/harden-NAME-TIME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the recipe, and stop.")] = False,
    json: Json = None,
) -> None:
    """Harden a network on the images at PATH: clead harden PATH [--minutes 30] [--group.key VALUE ...]."""
    paths, overrides = positional(context.args)
    if len(paths) != 1:
        raise UserError(f"give one path of images, such as clead harden photos, got {' '.join(paths) or 'none'}")
    if flip not in (None, "yes", "no"):
        raise UserError(f"--flip must be yes or no, got {flip}; give --flip no, or leave it out")
    if not Path(paths[0]).exists():
        raise UserError(
            f"no images at {paths[0]}; give a folder with one folder per class, or a file that clead data reads"
        )
    from clead.hardening import HardenOptions, make_plan
    from clead.hardening import harden as run
    from clead.hardening.command import describe, summary
    from clead.hardening.plan import recipe_yaml
    from clead.runs.directory import RunDir

    mirrored = None if flip is None else flip == "yes"
    with interruptible():
        if dry_run:
            options = HardenOptions(
                paths[0], minutes, model, weights, norm, eps, mirrored, image_size, seed, tuple(overrides)
            )
            plan, _ = make_plan(options)
            echo("\n".join(describe(plan)))
            echo(recipe_yaml(plan, "robust"))
            return
        hardened = run(
            paths[0],
            minutes=minutes,
            model=model,
            weights=weights,
            norm=norm,
            eps=eps,
            flip=mirrored,
            image_size=image_size,
            seed=seed,
            overrides=overrides,
            out=out,
            resume=resume,
        )
    folder = hardened.folder
    echo("\n".join(hardened.verdict.lines()))
    echo(f"report: {folder}/report.html\nmodel: {folder}/model/model.onnx\nrecipe: {folder}/recipe.yaml")
    allowed = allowance(RunDir.open(folder / "robust").config())
    echo(f"next, AutoAttack on all test images: clead evaluate {folder}/robust --suite standard{allowed}")
    if json is not None:
        write_json(json, summary(hardened))
