"""Ctrl-C, SIGTERM and a hang-up: the step is finished and the state saved before the training ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the state saved."""


@contextlib.contextmanager
def catch_signals(single_process: bool) -> Generator[Callable[[], bool], None, None]:
    """Turn Ctrl-C, SIGTERM and a hang-up into a flag that is read between steps; a second Ctrl-C stops at once.

    One of several processes leaves SIGTERM as it is: torchrun sends it when another is lost, for which this one would wait.
    """
    numbers = (signal.SIGINT, signal.SIGTERM) if single_process else (signal.SIGINT,)
    # Under nohup a hang-up is ignored, and stays so.
    if single_process and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers = (*numbers, signal.SIGHUP)
    caught: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in numbers}
    except ValueError:  # not the main thread: signals stay with the caller
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
