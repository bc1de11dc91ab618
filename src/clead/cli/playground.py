"""``clead playground``: attack images by hand, in the browser."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clead.cli.app import OPEN, app, echo, interruptible
from clead.cli.arguments import only, runs_and_overrides, split_commas
from clead.cli.serve import Host, Port
from clead.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI


@app.command(context_settings=OPEN, options_metavar="RUN [RUN ...] [OPTIONS]")
def playground(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Names that are answered to, with commas, beside the address and localhost, such as a proxy's; * for all."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = False,
) -> None:
    """Attack images by hand in the browser: clead playground RUN [RUN2 ...] [--open] [--data.path PLACE].

    Two runs meet side by side, such as a standard and a hardened one; up to eight are on the leaderboard.
    """
    from clead.runs.directory import RunDir
    from clead.settings import validated

    if os.environ.get("CLEAD_API_KEY"):
        raise UserError(
            "CLEAD_API_KEY: the playground asks for no key, and this one is set; unset it, and put a proxy that asks before it"
        )
    runs, overrides = runs_and_overrides(context.args)
    only(overrides, ("data",), "settings of data and train.device do")
    for run in runs:  # before seconds of imports
        RunDir.open(Path(run))
    names = split_commas(allowed_hosts or "")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Uploaded files, and what gradio makes of pictures, lie in a folder that goes with the server.
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="clead-playground-")
    try:
        try:
            from clead.playground.page import PATH, add_playground
            from clead.serving import ServeSettings, create_app, serve
        except ModuleNotFoundError as error:
            raise MissingExtra(str(error.name), "ui", "the playground") from None

        def announce(text: str) -> None:
            echo(text)
            where = re.search(r"https?://[^;\s]+", text)
            if where is None:
                return
            address = f"{where[0]}{PATH}/"
            echo(f"playground: {address}")
            if show:
                webbrowser.open(address)

        # An open page holds a connection for as long as it is open.
        settings = validated(ServeSettings, {"drain_seconds": 2, "allowed_hosts": names}, "serve")

        def make() -> FastAPI:
            made = create_app(runs, settings, overrides)
            add_playground(made, settings)
            return made

        with interruptible():
            serve(make, settings, host=host, port=port, say=announce)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
