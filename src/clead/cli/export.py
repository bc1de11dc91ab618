"""``clead export``: a run becomes a folder that can be given away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clead.cli.app import app, echo, interruptible

ESTIMATES = ("clean_before", "clean", "before", "transferred", "white_box", "queries", "worst")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="The folder that is made; new or empty.")],
    format: Annotated[str, typer.Option(help="onnx | safetensors.")] = "onnx",
    precision: Annotated[
        str, typer.Option(help="float32; int8 (onnx) or bfloat16 (safetensors), and accuracy is measured again.")
    ] = "float32",
    weights: Annotated[str | None, typer.Option(help="best | last; the run's eval.weights by default.")] = None,
    images: Annotated[int, typer.Option(help="Test images that are attacked after rounding.")] = 200,
    licence: Annotated[str, typer.Option(help="For the model card: mit, apache-2.0, cc-by-4.0 …")] = "unknown",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the folder to the Hugging Face hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository there public.")] = False,
) -> None:
    """Write a run's model as ONNX or safetensors, with a model card: clead export RUN --out FOLDER [--precision int8]."""
    from clead import api

    with interruptible():
        result = api.export_run(
            run,
            out=out,
            format=format,
            precision=precision,
            weights=weights,
            images=images,
            licence=licence,
            push_to_hub=push_to_hub,
            private=not public,
        )
    echo(f"{out}/{result['file']}: {result['size']:,} bytes, {precision}")
    if result["difference"] is not None:
        before = " before quantisation" if precision == "int8" else ""
        echo(f"logits differ from PyTorch's by at most {result['difference']:.2g}{before}")
    if (remeasured := result["remeasured"]) is not None:
        accuracy = {name: f"{value['accuracy']:.1%}" for name, value in remeasured.items() if name in ESTIMATES}
        echo(
            f"on {remeasured['clean']['n']} images: clean {accuracy['clean_before']}, now {accuracy['clean']}; "
            f"robust {accuracy['before']} (quick suite), now {accuracy['worst']} (transferred {accuracy['transferred']}, "
            f"white-box {accuracy['white_box']}, queries {accuracy['queries']})"
        )
    echo(f"card: {out}/README.md")
    if "hub" in result:
        echo(f"uploaded: {result['hub']}")
