"""Images of several requests go through a model together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clead.serving.metrics import Metrics
from clead.serving.models import Outputs


@dataclass
class _Item:
    images: np.ndarray
    future: asyncio.Future[Outputs]
    loop: asyncio.AbstractEventLoop


class Batcher:
    """One thread that takes what waits, up to ``max_batch`` images, through ``work``.

    There is no timer: an idle model begins with the first image at once, and while it works the next batch gathers, which bounds
    the wait by one batch. Images of a request that has been given up in the meantime are not computed.

    Args:
        work: maps parts (n, C, H, W), uint8 or float32 in [0, 1], of ``max_batch`` images together at most, to outputs of all.
        max_batch: so many images at once at most.
        name: of the model, in metrics and as the thread's name.
        metrics: where sizes are counted.
    """

    def __init__(
        self, work: Callable[[list[np.ndarray]], Outputs], max_batch: int, name: str, metrics: Metrics
    ) -> None:
        self._work = work
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._sizes = metrics.batch.labels(name)
        self._depth = metrics.queue.labels(name)
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=f"batches of {self._name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    async def outputs(self, images: np.ndarray) -> Outputs:
        """Return the outputs of images (n, C, H, W), any n ≥ 1, in their order."""
        loop = asyncio.get_running_loop()
        parts = [images[i : i + self._max_batch] for i in range(0, len(images), self._max_batch)]
        items = [_Item(part, loop.create_future(), loop) for part in parts]
        self._depth.inc(len(images))
        for item in items:
            self._waiting.put(item)
        try:
            found = [await item.future for item in items]
        finally:
            for item in items:
                item.future.cancel()
        return found[0] if len(found) == 1 else Outputs.join(found)

    def _run(self) -> None:
        kept: _Item | None = None
        while True:
            item = kept or self._waiting.get()
            kept = None
            if item is None:
                return
            batch, size = [item], len(item.images)
            while size < self._max_batch:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    self._waiting.put(None)
                    break
                if size + len(item.images) > self._max_batch:
                    kept = item
                    break
                batch.append(item)
                size += len(item.images)
            self._depth.dec(size)
            self._compute([item for item in batch if not item.future.cancelled()])

    def _compute(self, batch: list[_Item]) -> None:
        if not batch:
            return
        sizes = [len(item.images) for item in batch]
        self._sizes.observe(sum(sizes))
        try:
            answers: list[Outputs | Exception] = list(self._work([item.images for item in batch]).split(sizes))
        except Exception as error:  # whatever a model raises belongs to the requests, not to this thread
            answers = [error] * len(batch)
        for loop in {item.loop for item in batch}:
            mine = [(item.future, found) for item, found in zip(batch, answers, strict=True) if item.loop is loop]
            loop.call_soon_threadsafe(_deliver, mine)


def _deliver(answers: list[tuple[asyncio.Future[Outputs], Outputs | Exception]]) -> None:
    for future, found in answers:
        if future.done():
            continue
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)
