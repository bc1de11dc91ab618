"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Protocol, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clead.output import Quiet, tell

_LOG_SECONDS = 30.0
_WIDE = 100  # columns from which on there is room for a bar and the time elapsed


class Tick(Protocol):
    """Says that some work is done, and how it stands."""

    def __call__(self, advance: float = 1, **status: float | str) -> None:
        """Advance by so many units; ``status`` are the current figures."""
        ...


def scaled(tick: Tick, factor: float) -> Tick:
    """Return a tick whose unit of work is ``factor`` units of ``tick``."""

    def each(advance: float = 1, **status: float | str) -> None:
        tick(factor * advance, **status)

    return each


@contextmanager
def progress(description: str, total: float, *, done: float = 0, show: bool = True) -> Generator[Tick, None, None]:
    """Show progress on stderr while the block runs.

    Args:
        description: what is being done.
        total: units of work in all.
        done: units done before (a resumed run).
        show: False for silence.

    The first of a tick's figures is the one that stays visible on a narrow terminal.
    """
    if not show:
        yield lambda advance=1, **status: None
        return
    console = Console(file=cast(IO[str], Quiet(sys.stderr))) if sys.stderr is not None else None
    if console is not None and console.is_terminal:
        wide = console.width >= _WIDE
        name = description if wide else description[: console.width // 4]
        columns = (
            TextColumn("{task.description}"),
            *((BarColumn(bar_width=12),) if wide else ()),
            MofNCompleteColumn(),
            *((TimeElapsedColumn(),) if wide else ()),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        # Cut to the line: else the bar and the times shrink to nothing on a narrow terminal.
        room = max(0, console.width - len(name) - 2 * len(f"{total:g}") - (34 if wide else 13))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total, status="")
            bar.update(task, completed=done)

            def tick(advance: float = 1, **status: float | str) -> None:
                if status:
                    bar.update(task, advance=advance, status=_text(status)[:room])
                else:
                    bar.update(task, advance=advance)

            yield tick
        return
    start = last = time.monotonic()
    position, shown, end = done, "", total * (1 - 1e-9)  # parts of work add up to the whole but for rounding

    def log(advance: float = 1, **status: float | str) -> None:
        nonlocal position, last, shown
        before, position = position, position + advance
        shown = _text(status) if status else shown
        now = time.monotonic()
        if now - last >= _LOG_SECONDS or before < end <= position:
            last = now
            left = (now - start) * (total - position) / (position - done) if position > done else 0.0
            times = f"in {now - start:.0f} s" + (f", {left:.0f} s left" if left >= 1 else "")
            tell(f"{description}: {int(position + 1e-6)}/{total:g} {times}  {shown}")

    yield log


def _text(status: dict[str, float | str]) -> str:
    shown = {
        key.replace("_accuracy", "").replace("validation", "val").replace("_", " "): v for key, v in status.items()
    }
    return "  ".join(f"{key} {v:.3g}" if isinstance(v, float) else f"{key} {v}" for key, v in shown.items())
