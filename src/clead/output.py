"""Standard output and error that cannot stop work: a full disk, a closed pipe or a poor encoding costs the text, nothing else."""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import io
import os
import re
import select
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from clead.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN = {
    **{"–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": ".", "±": "+-", "≤": "<=", "≥": ">=", "ε": "eps"},
    **{
        "“": '"',
        "”": '"',
        "„": '"',
        "‘": "'",
        "’": "'",
        "«": '"',
        "»": '"',
        "→": "->",
        "∞": "inf",
        "²": "2",
        "√": "sqrt",
    },
    **{"│": "|", "┃": "|", "─": "-", "━": "-", "•": "*"},
}


def plainly(error: UnicodeError) -> tuple[str, int]:
    r"""Spell what an encoding lacks: signs in ASCII, other letters as ``\xfc`` or ``\u65e5``; an error handler of ``codecs``.

    >>> "12 – 34 %, ε ≤ 8/255, Grün".encode("ascii", "clead.plain")
    b'12 - 34 %, eps <= 8/255, Gr\\xfcn'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    spelt = (_PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in missing)
    return "".join(spelt), error.end


codecs.register_error("clead.plain", plainly)


class Sink(io.RawIOBase):
    """A file descriptor whose writes never fail; ``error`` is the first that the system refused."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Say whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write all of it; what the system refuses is dropped."""
        size = memoryview(data).nbytes
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # somebody made it non-blocking, and its reader is slow
                select.select([], [self._descriptor], [], 60)
            except OSError as error:
                self.error = error
        return size


def protect_streams() -> list[Sink]:
    """Replace ``sys.stdout`` and ``sys.stderr`` of a program by streams that never fail; return what lies under them.

    Descriptors 0 to 2 that the caller closed are opened on the null device: else the next file that is opened would get such a
    number, and what is printed would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    return [sink for name, number in (("stdout", 1), ("stderr", 2)) if (sink := _protect(name, number)) is not None]


def _protect(name: str, number: int) -> Sink | None:
    stream: TextIO | None = getattr(sys, name)
    if stream is not None:
        try:
            if stream is not getattr(sys, f"__{name}__") or stream.fileno() != number:
                return None  # somebody else's
        except (OSError, ValueError):
            return None
    sink = Sink(number)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    made = io.TextIOWrapper(
        io.BufferedWriter(sink),
        encoding=encoding,
        errors="clead.plain",
        newline="" if os.linesep == "\n" else None,
        line_buffering=number == 2 or sink.isatty(),
    )
    setattr(sys, name, made)
    return sink


def tell(text: str) -> None:
    """Print a line on standard error at once; if nobody can read it, it is lost and the work goes on."""
    with contextlib.suppress(OSError, ValueError):  # closed, full, or an encoding without a sign
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


_NUMBER = re.compile(r"-[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")  # the one thing that begins so and is no formula


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    r"""Return rows as CSV, in which no text is a formula to a spreadsheet: such cells begin with an apostrophe.

    >>> csv_text([("=1+1", -0.5, "a\x1b"), ("-2", "+1", None)])
    "'=1+1,-0.5,a\\x1b\n-2,'+1,\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    if value[:1] in tuple("=+-@\t\r\n＝＋－＠") and value and not _NUMBER.fullmatch(value):
        value = f"'{value}"
    return printable(value)


def console(*, width: int | None = None) -> Console:
    """Return a console for tables: what is in brackets or colons is text, not markup, since names may come from elsewhere.

    Args:
        width: columns at least; as wide as the terminal if None.
    """
    from rich.console import Console

    made = Console(markup=False, emoji=False, highlight=False)
    return made if width is None else Console(markup=False, emoji=False, highlight=False, width=max(width, made.width))


class Quiet:
    """A text stream for libraries that draw: writes to it never raise."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def exit_code(code: int, sinks: list[Sink], wrote_files: bool) -> int:
    """Return what a program ends with whose standard output may have failed.

    An error's code stays. A closed pipe is 141, as for a program that SIGPIPE ended. A full disk is 1 where the text was all that
    there was, 0 where the results lie in files.
    """
    for stream in (sys.stdout, sys.stderr):
        Quiet(stream).flush()
    refused = next((sink.error for sink in sinks if sink.fileno() == 1 and sink.error is not None), None)
    if refused is None or code:
        return code
    if refused.errno == errno.EPIPE:
        return 141
    rest = "the results are in their files" if wrote_files else "give another place for it"
    tell(f"clead: {'' if wrote_files else 'error: '}standard output was not written: {refused.strerror}; {rest}")
    return 0 if wrote_files else 1
