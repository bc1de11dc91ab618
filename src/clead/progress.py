"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LOG_SECONDS = 30.0


class Tick(Protocol):
    """Says that some work is done, and how it stands."""

    def __call__(self, advance: float = 1, **status: float | str) -> None:
        """Advance by so many units; ``status`` are the current figures."""
        ...


@contextmanager
def progress(description: str, total: float, *, done: float = 0, show: bool = True) -> Generator[Tick, None, None]:
    """Show progress on stderr while the block runs.

    Args:
        description: what is being done.
        total: units of work in all.
        done: units done before (a resumed run).
        show: False for silence.
    """
    if not show:
        yield lambda advance=1, **status: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, status="")
            bar.update(task, completed=done)

            def tick(advance: float = 1, **status: float | str) -> None:
                if status:
                    bar.update(task, advance=advance, status=_text(status))
                else:
                    bar.update(task, advance=advance)

            yield tick
        return
    start = last = time.monotonic()
    at, shown = done, ""

    def log(advance: float = 1, **status: float | str) -> None:
        nonlocal at, last, shown
        before, at = at, at + advance
        shown = _text(status) if status else shown
        now = time.monotonic()
        if now - last >= _LOG_SECONDS or before < total <= at:
            last = now
            print(f"{description}: {at:g}/{total:g} in {now - start:.0f} s  {shown}", file=sys.stderr, flush=True)

    yield log


def _text(status: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in status.items()
    )
