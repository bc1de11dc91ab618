"""Where a study is kept: a journal in its directory, or a database that several machines reach."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
import sqlalchemy.exc
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock

from clead.atomic_io import read_json_lines, unshare
from clead.errors import UserError, first_line
from clead.tuning.leases import Leases, TableLeases

JOURNAL = "study.journal"
_ATTEMPTS = 5  # several processes that make the tables of a fresh database get in each other's way


class JournalLock(JournalFileOpenLock):
    """A lock that the kernel frees when its holder dies; it leaves the journal with whole lines only.

    Optuna's own waits 30 seconds for a dead holder, and what is appended to half a line of a full disk is lost.
    """

    def __init__(self, journal: Path, lock: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(lock, thread_local=False, mode=0o666)

    def acquire(self) -> bool:
        """Wait for the lock, and cut off half a line that a killed process or a full disk has left at the end."""
        self._lock.acquire()
        with self._journal.open("r+b") as file:
            size = whole = file.seek(0, os.SEEK_END)
            while whole and (file.seek(whole - 1), file.read(1))[1] != b"\n":
                whole -= 1
            if whole < size:
                file.truncate(whole)
        return True

    def release(self) -> None:
        """Free the lock."""
        self._lock.release()


def open_storage(out: Path, url: str | None, name: str, silence: float) -> tuple[BaseStorage, Leases]:
    """Return the study's storage and leases; raises UserError if the journal is damaged or the database refuses.

    Args:
        out: the study's directory.
        url: of a database, as SQLAlchemy takes it; None: a journal in ``out``.
        name: the study's.
        silence: seconds of silence after which a process that shares only the database counts as dead.
    """
    locks = out / "locks"
    if url is None:
        path = out / JOURNAL
        try:
            locks.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
            unshare(path)
            _check_journal(path)
            backend = JournalFileBackend(str(path), lock_obj=JournalLock(path, locks / "journal.lock"))
            return JournalStorage(backend), Leases(locks)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    shown, full = _url(url)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            # Asked before every use: a connection that waited through a training may be dead.
            storage = RDBStorage(full, engine_kwargs={"pool_pre_ping": True})
            return storage, Leases(locks, TableLeases(storage.engine, name, silence))
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise UserError(
                f"--storage {shown}: its driver is not installed ({first_line(error)}); for PostgreSQL: "
                "pip install psycopg2-binary"
            ) from None
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            if attempt == _ATTEMPTS:
                raise UserError(
                    f"--storage {shown}: cannot make its tables ({reason(error)}); see its rights"
                ) from None
            time.sleep(0.2 * attempt)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            raise UserError(
                f"--storage {shown} refuses: {reason(error)}; see that the database runs, is reached from here, and that name and "
                "password are right"
            ) from None
    raise AssertionError


class _Lines(BaseJournalBackend):
    """A journal in memory, which is read only."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines, self.taken = lines, 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Give the lines from this one on; ``taken`` counts those that were asked for."""
        for line in self.lines[log_number_from:]:
            self.taken += 1
            yield line

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse: to follow a journal writes nothing."""
        raise ValueError("its lines make Optuna write")


def _check_journal(path: Path) -> None:
    """Raise UserError naming the first line that is no JSON object, or that Optuna cannot follow."""
    lines = _Lines(read_json_lines(path, remedy="restore that line, or start the study elsewhere with another --out"))
    try:
        JournalStorage(lines)
    except Exception as error:  # it raises whatever a line that is not its own makes it raise
        what = type(error).__name__
        raise UserError(
            f"{path} line {lines.taken} is damaged (Optuna cannot follow it: {what}: {str(error)[:200]}); restore that line, or "
            "start the study elsewhere with another --out"
        ) from None


def _url(url: str) -> tuple[str, str]:
    """Return the URL as it may be shown, without its password, and in full, with a driver that is installed."""
    try:
        parsed = sql.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise UserError(
            f"--storage: must be a database's URL, got {_hidden(url)}; "
            "give such as --storage postgresql://user:password@host/database"
        ) from None
    if parsed.drivername == "postgresql":
        driver = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), "psycopg2")
        parsed = parsed.set(drivername=f"postgresql+{driver}")
    return parsed.render_as_string(hide_password=True), parsed.render_as_string(hide_password=False)


def _hidden(url: str) -> str:
    return repr(url) if "@" not in url else repr(f"…@{url.rpartition('@')[2]}")


def reason(error: BaseException) -> str:
    """Return the first line of what a database says, without its driver's class names."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause
    return " ".join(str(cause).split())[:200]


def silence_optuna() -> None:
    """Leave saying how it stands to this program: Optuna logs every trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
