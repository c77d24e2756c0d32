"""What each user has done, as ids of the model that is served: a bounded cache over the durable log.

An answer needs a user's history and what was seen; the log has both, behind an index, in about a millisecond. Users come
back within seconds, so the last few thousand are kept, and an event forgets its user: the next answer reads the log again.
A cache that events update in place would save that read and could differ from the log.

Reads and writes have a thread each, so that a flush to disk holds up nobody who only reads. One process owns a file; what
several services share (a server) is read anew at each request, since another one may have written.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pennyweight.data.catalog import Vocabulary
from pennyweight.data.events import Event, EventLog, EventStore
from pennyweight.data.schema import FIRST
from pennyweight.data.valkey import ValkeyLog

Ids = npt.NDArray[np.int64]
CAPACITY = 10_000
EVERYTHING = 2**31


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What is known of a user, in ids of items the model knows."""

    history: Ids
    """Liked, oldest first."""
    seen: Ids
    """Touched in any way."""


NOBODY = State(np.empty(0, np.int64), np.empty(0, np.int64))


def opened(place: str | os.PathLike[str]) -> EventStore:
    """The events at ``place``: a file's name, or the URL of a Valkey or Redis server.

    Raises:
        ConfigError, DataError, DeviceError, StorageError: as for ``EventLog`` and ``ValkeyLog``.
    """
    return ValkeyLog(place) if isinstance(place, str) and "://" in place else EventLog(place)


class Store:
    """States of users over an event log, used from one event loop; it closes the log."""

    def __init__(self, log: EventStore, items: Vocabulary, length: int, capacity: int = CAPACITY) -> None:
        self._log = log
        self._items = items
        self._length = length
        self._capacity = 0 if log.shared else capacity
        self._cached: collections.OrderedDict[str, State] = collections.OrderedDict()
        self._writes = 0
        self._readers = ThreadPoolExecutor(1, "events-read")
        self._writers = ThreadPoolExecutor(1, "events-write")

    def __len__(self) -> int:
        return len(self._cached)

    def known(self, user: str) -> State | None:
        """The state of a user, if it is at hand."""
        state = self._cached.get(user)
        if state is not None:
            self._cached.move_to_end(user)
        return state

    async def state(self, user: str) -> State:
        """The state of a user, nobody's for one without events."""
        if (known := self.known(user)) is not None:
            return known
        writes = self._writes
        state = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, user)
        if writes == self._writes:  # else this may be from before an event that has been answered since
            self._cached[user] = state
            if len(self._cached) > self._capacity:
                self._cached.popitem(last=False)
        return state

    async def add(self, events: Sequence[Event]) -> int:
        """Store events durably; the number that were new. The next state of their users holds them."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writers, self._log.append, events)
        finally:
            self._writes += 1
            for event in events:
                self._cached.pop(event.user, None)

    async def users(self, prefix: str, limit: int) -> list[str]:
        """Users with events whose name starts with ``prefix``, the busiest first."""
        found = await asyncio.get_running_loop().run_in_executor(self._readers, self._log.users, prefix, limit)
        return [user for user, _ in found]

    def close(self) -> None:
        """Finish what was begun and close the log."""
        self._writers.shutdown()
        self._readers.shutdown()
        self._log.close()

    def _read(self, user: str) -> State:
        history = self._known(self._log.history(user, EVERYTHING))
        return State(history[-self._length :], self._known(sorted(self._log.seen(user))))

    def _known(self, items: Sequence[str]) -> Ids:
        ids = self._items.encode(items) if items else NOBODY.seen
        return ids[ids >= FIRST]
