"""The one exception a user's mistake raises: value given, rule, remedy, on one line; and what is told apart from mistakes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake the user can mend. The CLI prints it as one line and exits with code 2.

    Args:
        *problems: one or several one-line problems; several are listed together, so that a user mends them at once. What they
            quote can be from a hostile file: line breaks, and codes that would command a terminal, are shown escaped; the middle of
            a very long one is left out.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_shortened(printable(problem)) for problem in problems)
        super().__init__("\n".join(self.problems))


_MOST = 1200


def _shortened(text: str) -> str:
    """Return a text without its middle if it is very long: a file may have ten thousand names, and the remedy stands at the end."""
    return text if len(text) <= _MOST else f"{text[: _MOST - 400]} … {text[-397:]}"


def printable(text: str) -> str:
    r"""Return ``text`` on one line, without codes that command a terminal; spaces that do not break become plain ones.

    >>> print(printable("unknown key 'a\nb\x1b[2J'"))
    unknown key 'a\nb\x1b[2J'
    """
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in plain)


class MissingExtra(UserError):
    """An optional library is not installed; the message names the install command."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed; run: pip install 'clead[{extra}]'")


@contextmanager
def needs_extra(extra: str, purpose: str) -> Generator[None, None, None]:
    """Let the block import libraries of an extra; raises MissingExtra if one is not installed."""
    try:
        yield
    except ImportError as error:
        library = (error.name or "a library").partition(".")[0]
        raise MissingExtra({"sklearn": "scikit-learn"}.get(library, library), extra, purpose) from None


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the error's kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_LONGEST = 250


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the tail of an error for an unknown name: the closest known names, else all of them."""
    known = sorted(known)
    close = get_close_matches(str(given), known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    shown = known[: max(1, sum(len(", ".join(known[:n])) <= _LONGEST for n in range(1, len(known) + 1)))]
    more = f", … ({len(known)} in all)" if len(shown) < len(known) else ""
    return f"known: {', '.join(shown) or 'none'}{more}"


def first_of(names: Sequence[str], count: int = 4) -> str:
    """Return the first names of a list, and how many there are."""
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")


class NotEnoughMemory(UserError):
    """Memory was too small; the message names the keys to lower."""


def out_of_memory(error: BaseException) -> bool:
    """Say whether memory was too small; PyTorch has a class for this on CUDA and none on CPU, Python and NumPy have MemoryError."""
    return isinstance(error, (MemoryError, NotEnoughMemory)) or (
        isinstance(error, RuntimeError)
        and any(phrase in str(error) for phrase in ("out of memory", "can't allocate memory", "bad_alloc"))
    )


@contextmanager
def memory_of(doing: str, *keys: str) -> Generator[None, None, None]:
    """Name ``keys``, which decide how much memory the block takes, if there is too little: raises NotEnoughMemory.

    >>> with memory_of("reading the images", "data.limit_train"):
    ...     raise MemoryError
    Traceback (most recent call last):
        ...
    clead.errors.NotEnoughMemory: not enough memory for reading the images; lower data.limit_train (--data.limit_train N)
    """
    try:
        yield
    except NotEnoughMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        lower = " or ".join(keys)
        raise NotEnoughMemory(f"not enough memory for {doing}; lower {lower} (--{keys[0]} N)") from error
