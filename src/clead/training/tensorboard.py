"""TensorBoard, where it is installed: the numbers of metrics.jsonl as curves."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger("clead")

_AXES = ("kind", "step", "epoch", "seconds", "forward_equivalents", "images", "message")


@contextmanager
def tensorboard(folder: Path, step: int) -> Generator[Callable[[Mapping[str, Any]], None], None, None]:
    """Yield a function that draws one line of metrics.jsonl in TensorBoard; it does nothing if TensorBoard is not installed.

    Args:
        folder: where the event files go.
        step: where training starts; what an interrupted run drew beyond it is hidden.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = None

    def ended(error: OSError) -> None:
        nonlocal writer
        writer = None
        where = error.filename or folder
        _log.warning(
            "TensorBoard's curves end here: %s: %s; metrics.jsonl has the numbers", where, error.strerror or error
        )

    def draw(line: Mapping[str, Any]) -> None:
        try:
            for name, value in line.items():
                if name not in _AXES and writer is not None:
                    writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        except OSError as error:  # curves are not worth a training
            ended(error)

    with _quiet_writer():
        try:
            writer = SummaryWriter(str(folder), purge_step=step)
        except OSError as error:
            ended(error)
        try:
            yield draw
        finally:
            try:
                if writer is not None:
                    writer.close()
            except OSError as error:
                ended(error)


@contextmanager
def _quiet_writer() -> Generator[None, None, None]:
    """Keep TensorBoard's thread from printing a traceback of what ``draw`` will say."""
    before = threading.excepthook

    def hook(given: threading.ExceptHookArgs) -> None:
        if type(given.thread).__module__.partition(".")[0] != "tensorboard":
            before(given)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
