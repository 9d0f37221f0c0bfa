"""Users' events and added items in SQLite: on disk with `--state`, else in memory.

Of a model nothing is stored but the vectors of added items: a user's state is computed again from the events.
The store belongs to one thread at a time and to one process.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2rec.errors import UserError
from m2rec.serving.http.errors import RequestError

MAX_EVENTS = 10_000
"""Of one user; older ones are dropped."""

_APPLICATION_ID, _VERSION = 0x4D325243, 1
_SCHEMA = f"""
CREATE TABLE events (user TEXT NOT NULL, number INTEGER NOT NULL, item TEXT NOT NULL,
    PRIMARY KEY (user, number)) WITHOUT ROWID;
CREATE TABLE items (number INTEGER PRIMARY KEY, item TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
    vector BLOB NOT NULL, made_by TEXT NOT NULL);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""


class StoredItem(NamedTuple):
    """An item that was added, with its raw text vector (T0,)."""

    item: str
    title: str
    vector: NDArray[np.float32]
    made_by: str
    """What made the vector."""


class Event(NamedTuple):
    """What a user did."""

    user: str
    number: int
    """From 1, by user."""
    item: str


class Store:
    """Events by user in their order, and added items.

    Args:
        path: of the file, created if need be, for its owner alone; None to keep all in memory.

    Raises:
        ValueError: it is another kind of file, or another process uses it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            if path is not None:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection = sqlite3.connect(
                ":memory:" if path is None else path, timeout=1, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--state: {path}: can't be opened ({error}); name a file in a folder") from None
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._connection.close()
            is_locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
            reason = "another process uses it" if is_locked else f"not a state file ({error})"
            raise UserError(f"--state: {path}: {reason}; name another file") from None

    @property
    def is_kept(self) -> bool:
        """Whether the store is on disk."""
        return self.path is not None

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA locking_mode = EXCLUSIVE")  # until the process ends, however it does
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")  # what is committed is on the disk
        run("BEGIN EXCLUSIVE")
        (application,), (version,) = (
            run("PRAGMA application_id").fetchone(),
            run("PRAGMA user_version").fetchone(),
        )
        (n_tables,) = run("SELECT count(*) FROM sqlite_schema").fetchone()
        if n_tables and (application, version) != (_APPLICATION_ID, _VERSION):
            raise sqlite3.DatabaseError("made by another program or version")
        run("COMMIT")
        if not n_tables:
            self._connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, on the disk when it ends.

        Raises:
            ValueError: it can't be written; then nothing has changed.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                message = f"--state: can't be written ({error}); nothing has changed, make room and try again"
                raise RequestError(503, message) from error
            raise

    def add_events(self, events: Sequence[Event]) -> None:
        """Write events, each with its user's next number, in one transaction.

        Raises:
            ValueError: they can't be written; then none is.
        """
        old = [(event.user, event.number - MAX_EVENTS) for event in events if event.number > MAX_EVENTS]
        with self._transaction() as connection:
            connection.executemany("INSERT INTO events VALUES (?, ?, ?)", events)
            connection.executemany("DELETE FROM events WHERE user = ? AND number <= ?", old)

    def read_events(self, user: str) -> tuple[list[str], int]:
        """A user's items, oldest first, and the number of the last event, 0 for none."""
        query = "SELECT item, number FROM events WHERE user = ? ORDER BY number"
        rows = self._connection.execute(query, (user,)).fetchall()
        return [item for item, _ in rows], rows[-1][1] if rows else 0

    def delete_events(self, users: Iterable[str]) -> int:
        """Forget users; returns how many events they had.

        Raises:
            ValueError: it can't be written; then nothing has changed.
        """
        with self._transaction() as connection:
            cursor = connection.executemany("DELETE FROM events WHERE user = ?", ((user,) for user in users))
            return cursor.rowcount

    def add_items(self, items: Iterable[StoredItem]) -> None:
        """Write added items; one that is there already is replaced.

        Raises:
            ValueError: they can't be written; then none is.
        """
        rows = [(item.item, item.title, item.vector.astype("<f4").tobytes(), item.made_by) for item in items]
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO items (item, title, vector, made_by) VALUES (?, ?, ?, ?)", rows
            )

    def read_items(self) -> list[StoredItem]:
        """The added items, in the order in which they were added."""
        rows = self._connection.execute("SELECT item, title, vector, made_by FROM items ORDER BY number")
        return [
            StoredItem(item, title, np.frombuffer(vector, "<f4"), made_by)
            for item, title, vector, made_by in rows
        ]

    def count_users(self) -> int:
        """How many users have events."""
        (count,) = self._connection.execute("SELECT count(DISTINCT user) FROM events").fetchone()
        return int(count)
