"""``clead serve``: runs answer over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from clead.atomic_io import read_regular
from clead.cli.app import OPEN, app, echo, interruptible
from clead.errors import MissingExtra, UserError


@app.command(context_settings=OPEN, options_metavar="RUN [RUN ...] [OPTIONS]")
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.", min=0, max=65535)] = 8000,
    engine: Annotated[
        str | None, typer.Option(help="torch | onnx; torch by default, onnx is much faster on a CPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; all cores but one by default.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Images that go through a model together; 32 by default.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="mahalanobis (default) | nearest_neighbours | disagreement | none.")
    ] = None,
    reject: Annotated[
        float | None, typer.Option(help="Part of clean images that the detector may reject; 0.05 by default.")
    ] = None,
    reference: Annotated[
        int | None, typer.Option(help="Training images to fit the detector and seek neighbours; 10000 by default.")
    ] = None,
    no_thumbnails: Annotated[
        bool, typer.Option("--no-thumbnails", help="Do not show training images in /v1/explain.")
    ] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must send; $CLEAD_API_KEY works too.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Images in one request; 64 by default.")] = None,
    max_body: Annotated[int | None, typer.Option(help="Bytes in one request; 16 MiB by default.")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Pixels in one request's files; 25 million by default.")
    ] = None,
    max_buffered: Annotated[
        int | None, typer.Option(help="Bytes of all requests in memory; 256 MiB by default.")
    ] = None,
    max_head: Annotated[int | None, typer.Option(help="Bytes of a request's head; 32 KiB by default.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests worked on at once; 64 by default.")] = None,
    max_connections: Annotated[int | None, typer.Option(help="Open connections; 1000 by default.")] = None,
    max_per_client: Annotated[
        int | None, typer.Option(help="Open connections from one address; 200 by default.")
    ] = None,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Names that are answered to, with commas, beside the address and localhost, such as a proxy's; * for all."
        ),
    ] = None,
    min_rate: Annotated[
        int | None, typer.Option(help="Bytes per second that a body must arrive at; 1024 by default.")
    ] = None,
    read_seconds: Annotated[float | None, typer.Option(help="Time for a request to arrive; 20 by default.")] = None,
    request_seconds: Annotated[float | None, typer.Option(help="Time for the answer; 30 by default.")] = None,
    drain_seconds: Annotated[int | None, typer.Option(help="Time to finish on SIGTERM; 30 by default.")] = None,
) -> None:
    """Serve runs over HTTP: clead serve RUN ... [--engine onnx] [--data.path PLACE] [--train.device cpu].

    POST /v1/predict and /v1/explain; /docs describes them.
    """
    from clead.cli.arguments import only, runs_and_overrides

    runs, overrides = runs_and_overrides(context.args)
    only(overrides, ("data",), "settings of data and train.device do")
    try:
        from clead.serving import ServeSettings, create_app
        from clead.serving import serve as run_server
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve", "serving") from None
    from clead.settings import validated

    given: dict[str, Any] = {
        "engine": engine,
        "threads": threads,
        "max_batch": max_batch,
        "detector": detector,
        "reject": reject,
        "reference": reference,
        "thumbnails": False if no_thumbnails else None,
        "api_key": _key(api_key_file),
        "max_images": max_images,
        "max_body": max_body,
        "max_pixels": max_pixels,
        "max_buffered": max_buffered,
        "max_head": max_head,
        "max_requests": max_requests,
        "max_connections": max_connections,
        "max_per_client": max_per_client,
        "allowed_hosts": None if allowed_hosts is None else split_hosts(allowed_hosts),
        "min_rate": min_rate,
        "read_seconds": read_seconds,
        "request_seconds": request_seconds,
        "drain_seconds": drain_seconds,
    }
    values = {key: value for key, value in given.items() if value is not None}
    if values.get("detector") == "none":
        values["detector"] = None
    settings = validated(ServeSettings, values, "serve")
    with interruptible():
        run_server(lambda: create_app(runs, settings, overrides), settings, host=host, port=port, say=echo)


def split_hosts(text: str) -> tuple[str, ...]:
    """Return the names of ``--allowed-hosts``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _key(file: Path | None) -> str | None:
    """Return the key in ``file``, else in the environment; never from the command line, which other users can see."""
    if file is None:
        return os.environ.get("CLEAD_API_KEY") or None
    try:
        key = read_regular(file, 10_000).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--api-key-file {file}: cannot be read as text ({error}); give a file with the key in it"
        ) from None
    if not key:
        raise UserError(f"--api-key-file {file}: is empty; write the key into it")
    return key
