"""Log lines as JSON, one object each, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

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


def log_as_json() -> None:
    """Write all log lines of this process, and Python's warnings, as JSON to stderr; requests and uvicorn's from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers.clear()
    root.addHandler(handler)
    logging.captureWarnings(True)
    for name in ("clead.serving", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    # It reports each broken byte of a request, which is refused anyway: clients could fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
