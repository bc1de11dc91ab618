"""The command line: a thin layer over ``clead.api``. PyTorch is imported only by the commands that compute."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from clead import atomic_io
from clead.atomic_io import check_output, write_output
from clead.errors import NotEnoughMemory, UserError, out_of_memory, printable
from clead.output import exit_code, protect_streams

app = typer.Typer(
    name="clead",
    help="Train image classifiers that withstand adversarial attacks, measure them honestly, and see it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
OPEN: Any = {"allow_extra_args": True, "ignore_unknown_options": True}

Out = Annotated[Path | None, typer.Option("--out", help="Output directory, new or empty; runs/NAME-TIME by default.")]


def _writable(path: Path | None) -> Path | None:
    """Return the path; raises UserError, before any work, if nothing can be written there."""
    if path is not None:
        check_output(path)
    return path


Json = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Write the result to this JSON file too.")
]
ResultsOut = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results, instead of RUN/results; of one run.")
]
TrustState = Annotated[
    bool, typer.Option("--trust-state", help="Continue what another user or another machine has begun.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what a stopped call has left.")]


def _version(value: bool) -> None:
    if value:
        from clead import __version__

        print(f"clead {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FACTORY", help="Run this code if a recipe or run names it as its model; of any command."
        ),
    ] = None,
) -> None:
    if allow_code:
        from clead.models.user_model import allow_code as allow

        allow(*allow_code)


def _with_code(arguments: list[str]) -> list[str]:
    """Move ``--allow-code X``, which every command takes, before the command, wherever it was given.

    Code that the user names as the model, ``--model.name net.py:make``, is allowed by that.
    """
    moved: list[str] = []
    reordered: list[str] = []
    waiting = ""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if waiting:
            key, value = waiting, argument
        elif not equals and key in ("--allow-code", "--model.name", "--model.factory"):
            waiting = key
            continue
        if key == "--allow-code" or (key in ("--model.name", "--model.factory") and ":" in value):
            moved += ["--allow-code", value]
        if key != "--allow-code":
            reordered += [waiting, argument] if waiting else [argument]
        waiting = ""
    return [*moved, *reordered, *([waiting] if waiting else [])]


def echo(text: str) -> None:
    """Print at once, though a pipe reads it."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, all of it or nothing; through what is no file, such as /dev/stdout."""
    write_output(path, json.dumps(content, indent=1).encode())


class Stopped(Exception):
    """Ctrl-C: the command line's library would swallow a KeyboardInterrupt's message."""


@contextmanager
def interruptible() -> Generator[None, None, None]:
    """Let Ctrl-C, and what it left to say, reach ``main``."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(str(error) or "interrupted") from error


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    sinks = protect_streams()
    try:
        _run()
    except SystemExit as end:
        code = exit_code(end.code if isinstance(end.code, int) else 0, sinks, atomic_io.written > 0)
        end.code = code if isinstance(end.code, int) or code else end.code
        if (module := sys.modules.get("clead.distributed")) is not None:
            module.exit_process(end.code if isinstance(end.code, int) else 0)
        raise


def _run() -> None:
    logging.basicConfig(format="clead: %(message)s", level=logging.WARNING)
    try:
        code = app(_with_code(sys.argv[1:]), standalone_mode=False)
    except UserError as error:
        for problem in error.problems:
            print(f"clead: error: {problem}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NotEnoughMemory) else 2)
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        print(f"clead: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"clead: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        kind, usage = type(error).__name__, getattr(error, "format_message", None)
        if usage is not None and kind == "NoArgsIsHelpError":
            print(usage(), file=sys.stderr)
            sys.exit(2)
        if usage is not None:  # a usage error of the command line
            print(f"clead: error: {' '.join(usage().split())}", file=sys.stderr)
            sys.exit(2)
        if kind in ("NonFiniteLoss", "LostWorker"):
            print(f"clead: error: {error}", file=sys.stderr)
            sys.exit(1)
        if out_of_memory(error):
            print(
                "clead: error: not enough memory; lower data.batch_size, eval.batch_size or data.limit_train "
                "(such as --data.batch_size 16)",
                file=sys.stderr,
            )
            sys.exit(1)
        raise
    sys.exit(code if isinstance(code, int) else 0)
