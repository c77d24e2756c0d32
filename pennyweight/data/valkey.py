"""What users did, kept in a Valkey or Redis server, for several replicas of a service that share it.

A user's events are a list in the order they came, so a history is one read and a sort, as it is in SQLite. A sorted set by
time would spare the sort and round times to 53 bits; a stream has no second reader here. The ids that are known are a set,
and one script looks an id up and stores its event: nothing comes in between, and the server's own log holds the whole
append or nothing of it.

Valkey acknowledges before it flushes unless it is told otherwise. What the service promises is an event that survives a
power cut, so a server that runs without ``appendfsync always``, or may evict keys, is refused and told how to start. Price:
a flush an append, as with SQLite, and one round trip a read; and a server to run. The script touches keys that it makes from
names, which a cluster of several shards forbids: one primary (with replicas behind it) is what this is for.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pennyweight.core.errors import ConfigError, DataError, DeviceError, StorageError
from pennyweight.data.events import Event, EventStore, latest

VERSION = "1"
IDS, USERS, EVENTS = "pennyweight:ids", "pennyweight:users", "pennyweight:events:"
TIMEOUT_S = 10
"""Seconds the server has for an answer."""
DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
OPTIONS = " ".join(f"--{name} {value}" for name, value in DURABLE.items())

# Users are kept by the negative of their count: ascending is then the busiest first, and equals by name.
_APPEND = """
local new = 0
for _, event in ipairs(cmsgpack.unpack(ARGV[1])) do
  local id, user, row = event[1], event[2], event[3]
  if redis.call('SADD', KEYS[1], id) == 1 then
    redis.call('RPUSH', KEYS[3] .. user, row)
    redis.call('ZINCRBY', KEYS[2], -1, user)
    new = new + 1
  end
end
return new
"""


class _Row(msgspec.Struct, array_like=True, frozen=True):
    """An event in its user's list."""

    id: str
    item: str
    kind: str
    value: float | None
    liked: int | None
    time: int


class ValkeyLog(EventStore):
    """The events in the server at ``url``: ``valkey://host:6379/0``, ``redis://``, or with TLS ``valkeys://``, ``rediss://``.

    Args:
        url: user and password may stand in it; no message of ours repeats them.
        liked: the rating from which an item counts as liked.

    Raises:
        ConfigError: the URL is not one of a Valkey or Redis server.
        DataError: the server holds events of another version.
        DeviceError: the client library is not installed.
        StorageError: the server does not answer, or would lose what it acknowledges.
    """

    shared = True

    def __init__(self, url: str, *, liked: float = 4.0) -> None:
        super().__init__(liked)
        self._library = _client()
        self._where = _shown(url)
        self._closed = False
        try:
            self._server = self._library.Valkey.from_url(
                url, decode_responses=True, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except ValueError as error:
            raise ConfigError(f"{self._where} is no server's URL ({error}); write valkey://HOST:6379") from error
        self._script = self._server.register_script(_APPEND)
        with self._told():
            self._prepare()

    def append(self, events: Iterable[Event]) -> int:
        """Store events in one script, flushed before it answers; the number that were new."""
        rows = [(e.id, e.user, msgspec.json.encode(self._row(e)).decode()) for e in events]
        with self._told():
            return int(self._script([IDS, USERS, EVENTS], [msgspec.msgpack.encode(rows)]))

    def history(self, user: str | int, limit: int, *, liked_only: bool = True) -> list[str]:
        """The user's last items, oldest first."""
        rows = sorted(self._rows(user), key=lambda row: row.time)  # stable: as they came, where the times are equal
        opinions = ((r.item, r.liked) for r in reversed(rows) if r.liked is not None or not liked_only)
        return latest(opinions, limit, liked_only)

    def seen(self, user: str | int) -> set[str]:
        """All items of the user's events."""
        return {row.item for row in self._rows(user)}

    def users(self, prefix: str = "", limit: int = 20) -> list[tuple[str, int]]:
        """Users by the beginning of their name, the busiest first."""
        with self._told():
            if not prefix:
                found = self._server.zrange(USERS, 0, limit - 1, withscores=True) if limit > 0 else []
            else:
                found = set(self._server.zscan_iter(USERS, _literal(prefix) + "*", count=1000))
        busiest = sorted((score, user) for user, score in found)
        return [(user, int(-score)) for score, user in busiest[:limit]]

    def __len__(self) -> int:
        with self._told():
            return int(self._server.scard(IDS))

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        self._server.close()

    def _row(self, event: Event) -> _Row:
        return _Row(event.id, event.item, event.kind, event.value, self._opinion(event), event.time)

    def _rows(self, user: str | int) -> list[_Row]:
        with self._told():
            return [msgspec.json.decode(row, type=_Row) for row in self._server.lrange(f"{EVENTS}{user}", 0, -1)]

    def _prepare(self) -> None:
        """Check that the server keeps what it acknowledges, and whose events it holds."""
        try:
            found = self._server.config_get(*DURABLE)
        except self._library.ResponseError as error:  # a hosted server, or rights too narrow
            told = f"{self._where} does not say how it keeps events ({error}); see that it runs with {OPTIONS}"
            logging.getLogger("pennyweight.data").warning(told)
            found = DURABLE
        wrong = ", ".join(f"{name} {found.get(name)}" for name, value in DURABLE.items() if found.get(name) != value)
        if wrong:
            raise StorageError(f"{self._where} runs with {wrong} and could lose events; start it with {OPTIONS}")
        self._server.set("pennyweight:version", VERSION, nx=True)
        if (version := self._server.get("pennyweight:version")) != VERSION:
            raise DataError(f"{self._where} holds events of version {version}; this one reads version {VERSION}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the client's errors into ours."""
        if self._closed:
            raise StorageError(f"the events in {self._where} are closed; open them again")
        try:
            yield
        except (self._library.AuthenticationError, self._library.exceptions.NoPermissionError) as error:
            raise StorageError(f"{self._where} refuses this user ({error}); check user and password in its URL") from error
        except (self._library.ConnectionError, self._library.TimeoutError) as error:
            raise StorageError(f"{self._where} does not answer ({error}); start it, or name another") from error
        except self._library.ValkeyError as error:
            raise StorageError(f"{self._where} refused ({error}); see its log, give it room and the rights to write") from error


def _client() -> Any:
    try:
        return importlib.import_module("valkey")
    except ImportError as error:
        raise DeviceError("events in a server need its client; pip install 'pennyweight[valkey]'") from error


def _shown(url: str) -> str:
    """The URL without who signs in."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{urlsplit(url).netloc.rpartition('@')[2]}{urlsplit(url).path}" if rest else scheme


def _literal(prefix: str) -> str:
    """The prefix as a pattern that matches itself alone."""
    return re.sub(r"([*?\[\]\\^-])", r"\\\1", prefix)
