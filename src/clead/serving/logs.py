"""Log lines as JSON, one object each, on stderr."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

log = logging.getLogger("clead.serving")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


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
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Aside(logging.Handler):
    """Writes lines to a stream from a thread of its own: whoever reads them too slowly, or not at all, holds up no request.

    Lines beyond ``most`` that wait are dropped, and counted in a line of their own once there is room again.
    """

    def __init__(self, stream: Any, most: int = 10_000) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(most)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record to the thread."""
        try:
            if self._dropped:
                self._lines.put_nowait(
                    json.dumps({"level": "warning", "message": "log lines dropped", "count": self._dropped})
                )
                self._dropped = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError, ValueError):  # closed: nobody reads it
                self._stream.write(line + "\n")
                self._stream.flush()
            self._lines.task_done()

    def finish(self, seconds: float) -> None:
        """Wait until all is written, but not longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def log_as_json() -> Generator[None, None, None]:
    """Write all log lines of this process, and Python's warnings, as JSON to stderr; requests and uvicorn's from INFO on."""
    handler = _Aside(sys.stderr)
    handler.setFormatter(JsonFormatter())
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
