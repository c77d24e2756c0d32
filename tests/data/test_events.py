"""The event log: durable, idempotent, whole under threads, and clear about every failure."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pennyweight.core.errors import DataError, StorageError
from pennyweight.data.dataset import Dataset
from pennyweight.data.events import Event, EventLog, EventStore
from pennyweight.data.schema import Column, Schema
from pennyweight.data.valkey import ValkeyLog


def event(k: int, user: str = "anna", item: str = "10", **more: object) -> Event:
    return Event(f"e{k}", user, item, **{"time": k, **more})  # type: ignore[arg-type]


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "deep" / "events.db")


@pytest.fixture(params=["sqlite", "valkey"])
def store(request: pytest.FixtureRequest) -> EventStore:
    """Each store in turn, empty: what takes it holds for all of them."""
    if request.param == "sqlite":
        log: EventLog = request.getfixturevalue("log")
        return log
    return ValkeyLog(request.getfixturevalue("valkey").url)


def test_a_log_outlives_its_process(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.db") as log:
        assert log.append([event(1), event(2, item="11")]) == 2
    with EventLog(tmp_path / "e.db") as log:
        assert log.history("anna", 10) == ["10", "11"] and len(log) == 2


def test_an_event_counts_once(store: EventStore) -> None:
    assert store.append([event(1), event(2)]) == 2
    assert store.append([event(2, item="99"), event(3), event(3)]) == 1
    assert len(store) == 3 and store.seen("anna") == {"10"}


def test_history_is_what_is_liked_now(store: EventStore) -> None:
    store.append([event(1, item="a"), event(2, item="b"), event(3, item="c", kind="rating", value=5.0)])
    assert store.history("anna", 10) == ["a", "b", "c"]
    store.append(
        [event(4, item="b", kind="dislike"), event(5, item="c", kind="rating", value=3.5), event(6, item="d", kind="view")]
    )
    assert store.history("anna", 10) == ["a"]
    store.append([event(7, item="b", kind="rating", value=4.0), event(8, item="a", kind="view")])
    assert store.history("anna", 10) == ["a", "b"]
    assert store.history("anna", 10, liked_only=False) == ["c", "d", "b", "a"]
    assert store.history("anna", 1) == ["b"]
    assert store.history("anna", 0) == store.history("nobody", 9) == []
    assert store.seen("anna") == {"a", "b", "c", "d"} and store.seen("nobody") == set()


def test_events_are_ordered_by_their_time_then_as_they_came(store: EventStore) -> None:
    store.append([event(1, item="late", time=9), event(2, item="x", time=5), event(3, item="y", time=5)])
    assert store.history("anna", 10) == ["x", "y", "late"]


def test_users_and_items_may_be_numbers(store: EventStore) -> None:
    store.append([event(1, user="7")])
    assert store.history(7, 5) == store.history("7", 5) == ["10"] and store.seen(7) == {"10"}


def test_users_are_found_by_their_beginning(store: EventStore) -> None:
    store.append([event(k, user=u) for k, u in enumerate(["anna", "andy", "andy", "bert", "an_", "a%", "[*]", "\\?"])])
    assert store.users("an") == [("andy", 2), ("an_", 1), ("anna", 1)]
    assert store.users("an_") == [("an_", 1)] and store.users("a%") == [("a%", 1)]
    assert store.users("[*") == [("[*]", 1)] and store.users("\\") == [("\\?", 1)] and store.users("*") == []
    assert store.users("", 1) == [("andy", 2)] and store.users("z") == store.users("", 0) == store.users("a", 0) == []


def test_ratings_are_imported_once(store: EventStore) -> None:
    ratings = pl.DataFrame({"user": [1, 1, 2], "item": [10, 11, 10], "rating": [4.0, 3.5, 5.0], "time": [3, 4, 5]})
    assert store.import_ratings(ratings) == 3 and store.import_ratings(ratings) == 0
    assert (store.history(1, 9), store.seen(1), store.history(2, 9)) == (["10"], {"10", "11"}, ["10"])


def test_a_dataset_is_imported_by_name(store: EventStore, movies: Dataset) -> None:
    some = movies.take(slice(40_000, 42_000))
    known = (some.column("user") > 1) & (some.column("item") > 1)
    assert store.import_dataset(some) == known.sum() and store.import_dataset(some) == 0
    user = some.catalog.vocabulary("user").decode(some.column("user")[known][:1])[0]
    rows = known & (some.column("user") == some.column("user")[known][0])
    items = some.catalog.vocabulary("item").decode(some.column("item")[rows])
    assert user is not None and store.seen(user) == {str(i) for i in items}
    liked = some.catalog.vocabulary("item").decode(some.column("item")[rows & (some.column("label") > 0)])
    assert set(store.history(user, 10_000)) == {str(i) for i in liked}


def test_hashed_users_cannot_be_imported(store: EventStore) -> None:
    schema = Schema(
        (
            Column("user", "user", "categorical", 9, hashed=True),
            Column("item", "item", "categorical", 9),
            Column("label", "label", "numeric"),
        )
    )
    ids = np.arange(2, 9)
    data = Dataset.from_arrays({"user": ids, "item": ids, "label": np.ones(7)}, schema)
    with pytest.raises(DataError, match="hashed, their names lost"):
        store.import_dataset(data)


def test_many_threads_lose_nothing(store: EventStore) -> None:
    failures: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for k in range(20):
                assert store.append([event(1000 * me + k, user=f"u{me}", item=str(k)), event(10**6, item="shared")]) in (1, 2)
                assert store.history(f"u{me}", 100) == [str(i) for i in range(k + 1)]
                assert len(store.seen(f"u{(me + 1) % 4}")) <= 20
        except BaseException as failure:  # a thread's own failure would go unseen
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 81


KILLED = """
import os, signal, sys
from pennyweight.data.events import Event, EventLog, EventStore
from pennyweight.data.valkey import ValkeyLog
log = EventLog(sys.argv[1])
for k in range(50):
    log.append([Event(f"e{k}", "anna", str(k), time=k)])
    print(k, flush=True)
    if k == 30:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "e.db")], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL
    acknowledged = run.stdout.split()
    with EventLog(tmp_path / "e.db") as log:
        assert log.history("anna", 100) == acknowledged and len(acknowledged) == 31


def test_every_commit_is_flushed(log: EventLog) -> None:
    run = log._writer.execute
    assert run("PRAGMA journal_mode").fetchone() == ("wal",)
    assert run("PRAGMA synchronous").fetchone() == (2,), "FULL: the log is flushed before a commit returns"


def test_a_full_disk_loses_nothing(log: EventLog) -> None:
    """The file may not grow: SQLite's own error for a full disk; nothing of the failed append stays, reading goes on."""
    log.append([event(1)])
    pages = log._writer.execute("PRAGMA page_count").fetchone()[0]
    log._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageError, match=r"could not be written .*full.*free some room"):
        log.append([event(k, item="x" * 500) for k in range(2, 200)])
    assert len(log) == 1 and log.history("anna", 5) == ["10"]
    log._writer.execute("PRAGMA max_page_count = 1000000")
    assert log.append([event(2)]) == 1, "once there is room it goes on"


FULL = """
import resource, signal, sys
from pennyweight.core.errors import StorageError
from pennyweight.data.events import Event, EventLog, EventStore
from pennyweight.data.valkey import ValkeyLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = EventLog(sys.argv[1])
log.append([Event("a", "anna", "1")])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
stored = 1
try:
    for k in range(1000):
        log.append([Event(f"e{k}", "anna", str(k) * 20)])
        stored += 1
except StorageError as error:
    print(stored, len(log), error)
"""


def test_a_refused_write_loses_nothing(tmp_path: Path) -> None:
    """The system refuses to let the file grow, as a full disk does, in the middle of a run of appends."""
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "e.db")], capture_output=True, text=True)
    stored, counted, message = run.stdout.split(" ", 2)
    assert "could not be written" in message, run.stderr
    with EventLog(tmp_path / "e.db") as log:
        assert len(log) == int(counted) == int(stored) > 1


def test_a_log_that_may_only_be_read_says_so(log: EventLog) -> None:
    log.append([event(1)])
    log._writer.execute("PRAGMA query_only = ON")  # the tests may run as root, whom no permission stops
    with pytest.raises(StorageError, match=r"could not be written .*readonly.*check the permissions"):
        log.append([event(2)])
    assert log.history("anna", 5) == ["10"]


def test_a_place_where_no_log_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not be opened"):
        EventLog(tmp_path / "file" / "events.db")
    with pytest.raises(StorageError, match="could not be opened"):
        EventLog(tmp_path)


def test_a_log_held_by_another_process_is_said(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.db") as log:
        log._writer.execute("PRAGMA busy_timeout = 10")
        other = sqlite3.connect(tmp_path / "e.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match=r"locked.*end the process that holds it"):
            log.append([event(1)])
        other.execute("ROLLBACK")
        other.close()
        assert log.append([event(1)]) == 1


@pytest.mark.parametrize("damage", ["noise", "middle", "half"])
def test_a_damaged_log_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "e.db"
    with EventLog(path) as log:
        log.append([event(k, item=str(k) * 9) for k in range(2000)])
    content = path.read_bytes()
    size = len(content)
    if damage == "noise":
        path.write_bytes(os.urandom(size))
    elif damage == "half":
        path.write_bytes(content[: size // 2])
    else:
        path.write_bytes(content[: size // 3] + b"\xff" * 20_000 + content[size // 3 + 20_000 :])
    with pytest.raises(DataError, match=r"damaged.*restore a copy, or move it away"):
        EventLog(path)
    assert path.exists(), "it is left for whoever can mend it"


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(DataError, match="another program's database; name another file"):
        EventLog(path)
    with EventLog(tmp_path / "new.db") as log:
        log._writer.execute("PRAGMA user_version = 9")
    with pytest.raises(DataError, match="an event log of version 9; this one reads version 1"):
        EventLog(tmp_path / "new.db")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": ""}, "needs an id, a user and an item"),
        ({"kind": "rating"}, "a rating needs a value"),
        ({"value": 3.0}, "nothing else has one"),
        ({"kind": "rating", "value": float("nan")}, "not a finite number"),
        ({"time": 2**63}, "not in seconds since 1970"),
        ({"time": -1}, "not in seconds since 1970"),
        ({"item": "\ud800"}, "text that UTF-8 can hold"),
    ],
)
def test_events_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Event(**{"id": "e", "user": "anna", "item": "1", **wrong})  # type: ignore[arg-type]


def test_one_bad_event_stores_none(store: EventStore) -> None:
    def some() -> object:
        yield event(1)
        yield event(2, kind="rating")

    with pytest.raises(DataError, match="a rating needs a value"):
        store.append(some())  # type: ignore[arg-type]
    assert len(store) == 0 and store.append([event(1)]) == 1


def test_a_closed_log_says_so(store: EventStore) -> None:
    store.append([event(1)])
    store.close()
    with pytest.raises(StorageError, match="closed; open"):
        store.append([event(2)])
