"""Who runs what: a trial belongs to the process that holds its lease, and to nobody once that process is dead.

Files are for processes that share a disk: the kernel frees a lock the moment its process dies, and not before. A table is for
processes that share a database only: there a lease ends when its holder has been silent for a while, by the database's clock.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sql
import sqlalchemy.exc
from filelock import FileLock, Timeout

from clead.errors import UserError, first_line

_log = logging.getLogger("clead")
_POLL = 0.1
_BEATS = 4  # per time of silence after which a holder counts as dead


class Leases:
    """Leases on names, each with one holder at most: locked files in a folder, and rows of a database if there is one.

    With a database both are needed: a process on the same disk that the database takes for dead may be a stopped one, which is
    silent, but will write into its trial's directory when it goes on.
    """

    def __init__(self, folder: Path, rows: TableLeases | None = None) -> None:
        self._folder, self._rows = folder, rows
        self._files: dict[str, FileLock] = {}

    def acquire(self, name: str) -> bool:
        """Take the lease if nobody living holds it; say whether it is ours now. The file stays when the lock is gone."""
        lock = FileLock(self._folder / f"{name}.lock", blocking=False, thread_local=False, mode=0o666)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}: {error.strerror or error}; free some space or choose another directory"
            ) from error
        if self._rows is not None and not self._rows.acquire(name):
            lock.release()
            return False
        self._files[name] = lock
        return True

    def release(self, name: str) -> None:
        """Give the lease back."""
        if self._rows is not None:
            self._rows.release(name)
        self._files.pop(name).release()

    def is_held(self, name: str) -> bool:
        """Say whether a lease that was taken is still ours; of a file it is as long as the process lives."""
        return name in self._files and (self._rows is None or self._rows.is_held(name))


@contextmanager
def exclusive(leases: Leases, name: str) -> Generator[None, None, None]:
    """Hold a lease while the block runs; wait for it first."""
    while not leases.acquire(name):
        time.sleep(_POLL)
    try:
        yield
    finally:
        leases.release(name)


class TableLeases:
    """Rows of the table ``clead_leases``, kept fresh by a thread.

    Args:
        engine: of the database.
        study: leases of other studies are others.
        silence: seconds after which a holder that was not heard of counts as dead.
    """

    def __init__(self, engine: sql.Engine, study: str, silence: float) -> None:
        self._engine, self._study, self._silence = engine, study, silence
        self._me = uuid.uuid4().hex
        self._table = sql.Table(
            "clead_leases",
            sql.MetaData(),
            sql.Column("study", sql.String(512), primary_key=True),
            sql.Column("name", sql.String(64), primary_key=True),
            sql.Column("holder", sql.String(32), nullable=False),
            sql.Column("beat", sql.DateTime(timezone=True), nullable=False),
        )
        self._table.create(engine, checkfirst=True)
        self._thread: threading.Thread | None = None

    def acquire(self, name: str) -> bool:
        """Put our name into the row if there is none, or if its holder has been silent for too long."""
        row = self._table.c
        key = (row.study == self._study) & (row.name == name)
        try:
            with self._engine.begin() as connection:
                now = _now(connection)
                free = (row.holder == self._me) | (row.beat < now - timedelta(seconds=self._silence))
                # One statement: of several processes that find a dead holder, one changes the row and the others find it changed.
                taken = connection.execute(self._table.update().where(key & free).values(holder=self._me, beat=now))
                if not taken.rowcount:
                    connection.execute(
                        self._table.insert().values(study=self._study, name=name, holder=self._me, beat=now)
                    )
        except sql.exc.IntegrityError:  # there is a row, of a living holder
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="clead-leases", daemon=True)
            self._thread.start()
        return True

    def release(self, name: str) -> None:
        """Remove the row if it is still ours."""
        with self._engine.begin() as connection:
            connection.execute(self._table.delete().where(self._mine() & (self._table.c.name == name)))

    def is_held(self, name: str) -> bool:
        """Say whether the row still has our name, however long we have been silent."""
        with self._engine.begin() as connection:
            mine = self._mine() & (self._table.c.name == name)
            return connection.execute(sql.select(self._table.c.name).where(mine)).first() is not None

    def _mine(self) -> sql.ColumnElement[bool]:
        return (self._table.c.study == self._study) & (self._table.c.holder == self._me)

    def _beat(self) -> None:
        while True:
            time.sleep(self._silence / _BEATS)
            try:
                with self._engine.begin() as connection:
                    beat = self._table.update().where(self._mine()).values(beat=_now(connection))
                    connection.execute(beat)
            except sql.exc.SQLAlchemyError as error:  # it may come back before we count as dead
                _log.warning("the study's database does not answer: %s", first_line(error))


def _now(connection: sql.Connection) -> datetime:
    """Return the time by the database's clock: those of several machines may differ, and jump."""
    return connection.execute(sql.select(sql.func.now())).scalar_one()
