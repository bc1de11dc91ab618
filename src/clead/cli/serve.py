"""``clead serve``: runs answer over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from clead.atomic_io import read_regular
from clead.cli.app import OPEN, app, echo, interruptible
from clead.cli.settings_command import SettingsCommand
from clead.errors import MissingExtra, UserError

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")]
Port = Annotated[int, typer.Option(help="Port; 0 for any free one.", min=0, max=65535)]


class _ServeCommand(SettingsCommand):
    left_out = ("api_key",)

    def settings_class(self) -> Any:
        """Return the settings of a server."""
        from clead.inference.settings import ServeSettings

        return ServeSettings


@app.command(cls=_ServeCommand, context_settings=OPEN, options_metavar="RUN [RUN ...] [OPTIONS]")
def serve(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must send; $CLEAD_API_KEY works too.")
    ] = None,
) -> None:
    """Serve runs over HTTP: clead serve RUN ... [--engine onnx] [--data.path PLACE] [--train.device cpu].

    POST /v1/predict and /v1/explain, and /v1/search with --gallery FOLDER; /docs describes them.
    """
    from clead.cli.arguments import only, runs_and_overrides
    from clead.inference.settings import ServeSettings
    from clead.settings import validated

    runs, overrides = runs_and_overrides(context.args)
    only(overrides, ("data",), "settings of data and train.device do")
    try:
        from clead.serving import create_app
        from clead.serving import serve as run_server
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve", "serving") from None
    settings = validated(ServeSettings, context.meta["settings"] | {"api_key": _key(api_key_file)}, "serve")
    with interruptible():
        run_server(lambda: create_app(runs, settings, overrides), settings, host=host, port=port, say=echo)


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
