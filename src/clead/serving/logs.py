"""Log lines as JSON, one object each, on stderr."""

from __future__ import annotations

import json
import logging
import queue
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any

log = logging.getLogger("clead.serving")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, whatever was given as ``extra``, and the traceback if there is one."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _JsonHandler(QueueHandler):
    """Writes JSON lines to a stream from a thread of its own: whoever reads them too slowly, or not at all, holds up no request.

    Lines beyond ``most`` that wait are dropped, and counted in a line of their own once there is room again.
    """

    def __init__(self, stream: Any, most: int = 10_000) -> None:
        self.lines: queue.Queue[logging.LogRecord] = queue.Queue(most)
        super().__init__(self.lines)
        self.setFormatter(JsonFormatter())
        self.dropped = 0
        writer: Any = logging.StreamHandler(stream)
        writer.handleError = lambda record: None  # closed: nobody reads it
        QueueListener(self.lines, writer).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                lost = {"name": log.name, "levelname": "WARNING", "msg": "log lines dropped", "count": self.dropped}
                self.lines.put_nowait(self.prepare(logging.makeLogRecord(lost)))
                self.dropped = 0
            self.lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def finish(self, seconds: float) -> None:
        """Wait until all is written, but not longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def log_as_json() -> Generator[None, None, None]:
    """Write all log lines of this process, and Python's warnings, as JSON to stderr; requests and uvicorn's from INFO on."""
    handler = _JsonHandler(sys.stderr)
    root = logging.getLogger()
    root.handlers.clear()
    root.addHandler(handler)
    logging.captureWarnings(True)
    for name in ("clead.serving", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    # It reports each broken byte of a request, which is refused anyway: clients could fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        yield
    finally:
        handler.finish(2.0)
