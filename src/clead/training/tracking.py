"""TensorBoard, where it is installed: the numbers of metrics.jsonl as curves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

    with SummaryWriter(str(folder), purge_step=step) as writer:

        def draw(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if name not in _AXES:
                    writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

        yield draw
