"""Images of several requests go through a model together, and fail one by one."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from clead.inference.models import Outputs
from clead.inference.problems import Problem
from clead.serving.logs import log
from clead.serving.metrics import Metrics


class _Item(NamedTuple):
    images: np.ndarray
    first: int  # place of its first image in the request
    future: Future[Outputs]


class Batcher:
    """One thread that takes what waits, up to ``max_batch`` images, through ``work``.

    There is no timer: an idle model begins with the first image at once, and while it works the next batch gathers, which bounds
    the wait by one batch. Images of a request that has been given up in the meantime are not computed.

    A batch that fails, whatever the model raises, is halved until the requests that make it fail are alone: only these get an
    error. So does NaN or infinity in an answer. What does not fit into memory is halved down to single images.

    Args:
        work: maps arrays (n, C, H, W), uint8 or float32 in [0, 1], of ``max_batch`` images together at most, to outputs of all;
            it must not change the arrays, for it may be asked again.
        max_batch: so many images at once at most.
        name: of the model, in metrics and as the thread's name.
        metrics: where sizes and failures are counted.
        stuck_seconds: a batch that takes longer is taken for one that never ends: nobody waits for it any more.
    """

    def __init__(
        self,
        work: Callable[[list[np.ndarray]], Outputs],
        max_batch: int,
        name: str,
        metrics: Metrics,
        stuck_seconds: float = 30.0,
    ) -> None:
        self._work, self._max_batch, self._name, self._stuck_seconds = work, max_batch, name, stuck_seconds
        self._metrics, self._depth = metrics, metrics.queue.labels(name)
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None

    def start(self) -> None:
        """Start the thread."""
        self._busy_since = None
        self._thread = threading.Thread(target=self._run, name=f"batches of {self._name}", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Finish what waits, and end the thread; give up after ``timeout`` seconds, for a model may never return."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(timeout)

    @property
    def busy_seconds(self) -> float:
        """For how long the thread has worked on its present batch; 0 if on none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def trouble(self) -> str | None:
        """Say why no answer can be expected at present, or None."""
        if self._thread is None or not self._thread.is_alive():
            return f"the worker of model {self._name} does not run; restart the server if this lasts"
        if (seconds := self.busy_seconds) > self._stuck_seconds:
            return f"model {self._name} has worked on one batch for {seconds:.0f} seconds; restart the server if this lasts"
        return None

    async def outputs(self, images: np.ndarray) -> Outputs:
        """Return the outputs of images (n, C, H, W), any n ≥ 1, in their order; raises Problem 500 or 503."""
        if trouble := self.trouble():
            raise _unavailable(trouble)
        starts = range(0, len(images), self._max_batch)
        items = [_Item(images[start : start + self._max_batch], start, Future()) for start in starts]
        self._depth.inc(len(images))
        for item in items:
            self._waiting.put(item)
        if self._thread is None or not self._thread.is_alive():  # it ended in this very moment
            self._fail_waiting()
        try:
            outputs = [await asyncio.wrap_future(item.future) for item in items]
        finally:
            for item in items:
                item.future.cancel()
        return outputs[0] if len(outputs) == 1 else Outputs.join(outputs)

    def _run(self) -> None:
        """Compute batch after batch until told to stop."""
        batch: list[_Item] = []
        following: _Item | None = None
        try:
            while (item := following or self._waiting.get()) is not None:
                batch, following = [item], None
                try:
                    batch, following = self._gathered(item)
                    self._depth.dec(sum(len(item.images) for item in batch))
                    self._busy_since = time.monotonic()
                    self._compute(batch)
                except BaseException:  # nothing may end this thread: all requests depend on it
                    log.exception("the worker of model %s failed, and goes on with the next batch", self._name)
                    for item in batch:
                        self._deliver(item, _unavailable(f"the worker of model {self._name} failed; try again"))
                self._busy_since = None
        finally:
            self._busy_since = None
            self._fail_waiting()

    def _gathered(self, item: _Item) -> tuple[list[_Item], _Item | None]:
        """Return the batch that begins with ``item``, and the item that no longer fits into it."""
        batch, size = [item], len(item.images)
        while size < self._max_batch:
            try:
                following = self._waiting.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._waiting.put(None)
                break
            if size + len(following.images) > self._max_batch:
                return batch, following
            batch.append(following)
            size += len(following.images)
        return batch, None

    def _compute(self, batch: list[_Item]) -> None:
        if batch := [item for item in batch if item.future.set_running_or_notify_cancel()]:
            for item, answer in self._answers(batch):
                self._deliver(item, answer)

    def _answers(self, batch: list[_Item]) -> Iterator[tuple[_Item, Outputs | Problem]]:
        """Yield an answer to each item: outputs, or the problem of those that make the batch fail, which are found by halving."""
        try:
            self._metrics.batch.labels(self._name).observe(sum(len(item.images) for item in batch))
            outputs = self._work([item.images for item in batch])
        except BaseException as error:  # SystemExit and the like too: whatever a model raises belongs to requests
            middle = len(batch) // 2
            if middle:
                yield from self._answers(batch[:middle])
                yield from self._answers(batch[middle:])
            else:
                yield batch[0], self._after_failure(batch[0], error)
            return
        for item, answer in zip(batch, outputs.split([len(item.images) for item in batch]), strict=True):
            row = answer.first_not_finite()
            if row is None:
                yield item, answer
            elif len(batch) > 1:  # it may have come from another request's image
                yield from self._answers([item])
            else:
                text = f"image {item.first + row}: the model answered NaN or infinity to finite pixels; leave this image out"
                yield item, self._failed("not_finite", None, Problem(500, text))

    def _after_failure(self, item: _Item, error: BaseException) -> Outputs | Problem:
        """Return the outputs of images that did not fit into memory together, computed in halves; or the failure as a problem."""
        if not _out_of_memory(error):
            kind = "error" if isinstance(error, Exception) else "exit"
            problem = Problem(500, "the model failed on this request; the server's log says why")
            return self._failed(kind, error, problem)
        middle = len(item.images) // 2
        if not middle:
            text = "the server has not enough memory for an image of this request; come back later"
            return self._failed("memory", error, Problem(503, text, {"Retry-After": "10"}))
        halves = []
        for start, images in ((0, item.images[:middle]), (middle, item.images[middle:])):
            ((_, answer),) = self._answers([_Item(images, item.first + start, item.future)])
            if isinstance(answer, Problem):
                return answer
            halves.append(answer)
        return Outputs.join(halves)

    def _failed(self, kind: str, error: BaseException | None, problem: Problem) -> Problem:
        self._metrics.failures.labels(self._name, kind).inc()
        log.error("model %s failed on a request: %s", self._name, kind, exc_info=error)
        return problem

    def _fail_waiting(self) -> None:
        while True:
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                self._depth.dec(len(item.images))
                self._deliver(item, _unavailable(f"the worker of model {self._name} has ended; try again"))

    @staticmethod
    def _deliver(item: _Item, answer: Outputs | Problem) -> None:
        with suppress(InvalidStateError):  # it has been given up, or answered
            if isinstance(answer, Problem):
                item.future.set_exception(answer)
            else:
                item.future.set_result(answer)


def _unavailable(text: str) -> Problem:
    return Problem(503, text, {"Retry-After": "5"})


def _out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory was too small: Python's, CUDA's, or that of PyTorch's CPU allocator or onnxruntime."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, Exception) and ("not enough memory" in text or "failed to allocate memory" in text)
