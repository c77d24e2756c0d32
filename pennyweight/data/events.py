"""What users did, kept durably: what any store of it does, and an append-only log in SQLite.

An event is on disk before ``append`` returns (WAL with ``synchronous=FULL``, so a crash or a power cut loses nothing that
was acknowledged), and one sent twice under the same id counts once. A file of JSON lines would append as fast, but
``history`` and ``seen`` are asked at each request and need an index; a server scales further and must be installed and
watched, so it is there for whoever names one (``data/valkey.py``). The price of the durability is one flush to disk an
append, some milliseconds on a slow disk; appending several events at once pays it once.

One connection writes, under a lock; each thread reads with a connection of its own, never waiting for the writer.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import polars as pl

from pennyweight.core.errors import DataError, StorageError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST

APPLICATION = 0x50454E59  # "PENY", in the header of the file: whose database this is
VERSION = 1
_SCHEMA = f"""
CREATE TABLE event (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    user TEXT NOT NULL,
    item TEXT NOT NULL,
    kind TEXT NOT NULL,
    value REAL,
    liked INTEGER,
    time INTEGER NOT NULL
) STRICT;
CREATE INDEX event_user ON event (user, time, seq, item, liked);
CREATE INDEX event_item ON event (item);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


_INSERT = """
INSERT INTO event (id, user, item, kind, value, liked, time) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING
"""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something a user did with an item."""

    id: str
    """Chosen by the client; an event whose id is known already is not stored again."""
    user: str
    item: str
    """As named outside, so that a log outlives the vocabularies of any one model."""
    kind: Literal["rating", "like", "dislike", "view"] = "like"
    value: float | None = None
    """The stars of a rating."""
    time: int = 0
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        if not (self.id and self.user and self.item):
            raise DataError(f"an event needs an id, a user and an item, got {self.id!r}, {self.user!r}, {self.item!r}")
        if (self.kind == "rating") != (self.value is not None):
            raise DataError(f"event {self.id!r}: a rating needs a value and nothing else has one, got {self.kind} {self.value}")
        if self.value is not None and not math.isfinite(self.value):
            raise DataError(f"event {self.id!r}: {self.value} is not a finite number")
        if not 0 <= self.time < 2**63:
            raise DataError(f"event {self.id!r}: time {self.time} is not in seconds since 1970")
        if any("\ud800" <= c <= "\udfff" for c in self.id + self.user + self.item):
            raise DataError(f"event {self.id!r}: id, user and item must be text that UTF-8 can hold")


class EventStore(abc.ABC):
    """Events kept durably, whatever keeps them."""

    shared: ClassVar[bool]
    """Whether others write to it too, so that what was read may be out of date at once."""

    def __init__(self, liked: float = 4.0) -> None:
        self.liked = liked
        """The rating from which an item counts as liked."""

    @abc.abstractmethod
    def append(self, events: Iterable[Event]) -> int:
        """Store events durably; the number that were new. All of them are stored or, with an error, none.

        Raises:
            StorageError: there is no room or no right to write; what was stored before is untouched.
        """

    @abc.abstractmethod
    def history(self, user: str | int, limit: int, *, liked_only: bool = True) -> list[str]:
        """The user's last ``limit`` items, oldest first, each once at its latest event.

        Only items whose latest opinion is a like, unless ``liked_only`` is off; a view is no opinion.
        """

    @abc.abstractmethod
    def seen(self, user: str | int) -> set[str]:
        """All items of the user's events."""

    @abc.abstractmethod
    def users(self, prefix: str = "", limit: int = 20) -> list[tuple[str, int]]:
        """Users whose name starts with ``prefix`` and their number of events, the busiest first."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of events."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything; the store can be opened again."""

    @final
    def import_ratings(self, ratings: pl.DataFrame, prefix: str = "import") -> int:
        """Store a frame of ``user, item, rating, time`` in one step; the number that were new.

        Event ids are ``prefix-row``, so importing the same frame again adds nothing.
        """
        rows = enumerate(ratings.select("user", "item", "rating", "time").iter_rows())
        return self.append(Event(f"{prefix}-{k}", str(u), str(i), "rating", r, t) for k, (u, i, r, t) in rows)

    @final
    def import_dataset(self, data: Dataset, prefix: str = "import") -> int:
        """Store the rows of a dataset as likes and dislikes (by its label), for the users and items it has names for.

        Raises:
            DataError: it has no user or item column, or their names are hashed.
        """
        user, item = data.schema.user.name, data.schema.item.name
        time = next((c.name for c in data.schema.role("time")), None)
        names, items = data.catalog.vocabulary(user), data.catalog.vocabulary(item)
        if names.buckets or items.buckets:
            raise DataError("users or items of this dataset are hashed, their names lost; use import_ratings instead")
        rows = np.flatnonzero((data.column(user) >= FIRST) & (data.column(item) >= FIRST))
        known = data.take(rows)
        when = known.column(time).tolist() if time else [0] * len(rows)
        kinds = np.where(known.column(data.schema.label.name) > 0.5, "like", "dislike").tolist()
        people, things = names.decode(known.column(user)), items.decode(known.column(item))
        whole = zip(rows.tolist(), people, things, kinds, when, strict=True)
        return self.append(Event(f"{prefix}-{k}", str(u), str(i), kind, None, t) for k, u, i, kind, t in whole)

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(self, *failure: object) -> None:
        self.close()

    @final
    def _opinion(self, event: Event) -> int | None:
        """1 for a like, 0 for a dislike, None for neither."""
        opinions = {"like": 1, "dislike": 0, "view": None}
        return int(event.value >= self.liked) if event.value is not None else opinions[event.kind]


def latest(opinions: Iterable[tuple[str, int | None]], limit: int, liked_only: bool) -> list[str]:
    """The last ``limit`` items, oldest first, of items with their opinions, newest first."""
    first: dict[str, bool] = {}
    for item, liked in opinions:
        first.setdefault(item, bool(liked))
    kept = [item for item, liked in first.items() if liked or not liked_only]
    return kept[:limit][::-1]


class EventLog(EventStore):
    """The log at ``path``, made when it is not there.

    Args:
        path: the database file; SQLite keeps two more beside it (``-wal``, ``-shm``).
        liked: the rating from which an item counts as liked.

    Raises:
        DataError: the file is damaged, or another program's.
        StorageError: it cannot be made or written there.
    """

    shared = False

    def __init__(self, path: str | os.PathLike[str], *, liked: float = 4.0) -> None:
        super().__init__(liked)
        self.path = Path(path)
        self._lock = threading.Lock()
        self._own = threading.local()
        self._open: list[sqlite3.Connection] = []
        with self._told("opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            self._prepare()

    def append(self, events: Iterable[Event]) -> int:
        """Store events in one transaction, flushed when it commits; the number that were new."""
        with self._lock, self._told("written"):
            before = self._writer.total_changes
            with self._writer:  # one transaction: committed at the end, rolled back on an error
                self._writer.execute("BEGIN IMMEDIATE")
                self._writer.executemany(_INSERT, (self._row(e) for e in events))
            return self._writer.total_changes - before

    def history(self, user: str | int, limit: int, *, liked_only: bool = True) -> list[str]:
        """The user's last items, oldest first."""
        opinion = "liked IS NOT NULL" if liked_only else "TRUE"
        query = f"SELECT item, liked FROM event WHERE user = ? AND {opinion} ORDER BY time DESC, seq DESC"
        return latest(self._read(query, str(user)), limit, liked_only)

    def seen(self, user: str | int) -> set[str]:
        """All items of the user's events."""
        return {item for (item,) in self._read("SELECT DISTINCT item FROM event WHERE user = ?", str(user))}

    def users(self, prefix: str = "", limit: int = 20) -> list[tuple[str, int]]:
        """Users by the beginning of their name, the busiest first."""
        busiest = "GROUP BY user ORDER BY count(*) DESC, user LIMIT ?"
        query = f"SELECT user, count(*) FROM event WHERE user >= ? AND user < ? {busiest}"
        return list(self._read(query, prefix, prefix + "\U0010ffff", limit))

    def __len__(self) -> int:
        (count,) = self._read("SELECT count(*) FROM event")[0]
        return int(count)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()

    def _row(self, event: Event) -> tuple[Any, ...]:
        return (event.id, event.user, event.item, event.kind, event.value, self._opinion(event), event.time)

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._told("read"):
            return self._reader().execute(query, values).fetchall()

    def _reader(self) -> sqlite3.Connection:
        if not hasattr(self._own, "connection"):
            self._own.connection = self._connect()
            self._own.connection.execute("PRAGMA query_only = ON")
        connection: sqlite3.Connection = self._own.connection
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        self._open.append(connection)
        return connection

    def _prepare(self) -> None:
        """Check whose file this is and that it is whole, then set it up."""
        run = self._writer.execute
        owner, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        fresh = not run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not fresh and owner != APPLICATION:
            raise DataError(f"{self.path} is another program's database; name another file for the event log")
        if not fresh and version != VERSION:
            raise DataError(f"{self.path} is an event log of version {version}; this one reads version {VERSION}")
        fault = run("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise self._damaged(fault)
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        if fresh:
            self._writer.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")

    @contextlib.contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise StorageError(f"the event log {self.path} is closed; open it again") from error
        except (sqlite3.OperationalError, OSError) as error:
            remedy = "free some room, check the permissions, or end the process that holds it"
            raise StorageError(f"the event log {self.path} could not be {done} ({error}); {remedy}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, fault: object) -> DataError:
        told = " ".join(str(fault).split())
        return DataError(f"the event log {self.path} is damaged ({told}); restore a copy, or move it away to begin anew")
