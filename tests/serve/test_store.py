import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pennyweight.data.catalog import Vocabulary
from pennyweight.data.events import Event, EventLog
from pennyweight.serve.store import State, Store

ITEMS = Vocabulary.of(["a", "b", "c", "d"])


class Slow(EventLog):
    """A log whose reads wait until they are let go, after they have read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.began, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.reads = 0

    def history(self, user: str | int, limit: int, *, liked_only: bool = True) -> list[str]:
        found = super().history(user, limit, liked_only=liked_only)
        self.reads += 1
        self.began.set()
        assert self.go.wait(60)
        return found


@pytest.fixture
def log(tmp_path: Path) -> Slow:
    return Slow(tmp_path / "log.db")


@pytest.fixture
def store(log: Slow) -> Iterator[Store]:
    store = Store(log, ITEMS, length=2, capacity=2)
    yield store
    log.go.set()
    store.close()


def ids(state: State) -> tuple[list[int], list[int]]:
    return state.history.tolist(), state.seen.tolist()


def event(name: str, user: str, item: str, **more: object) -> Event:
    return Event(name, user, item, time=int(name), **more)  # type: ignore[arg-type]


def test_a_state_is_the_last_likes_and_all_that_was_seen_in_the_models_ids(store: Store) -> None:
    async def scene() -> State:
        items = ["a", "unknown", "b", "c"]
        await store.add([event(str(i), "u", item) for i, item in enumerate(items)] + [event("9", "u", "d", kind="view")])
        return await store.state("u")

    assert ids(asyncio.run(scene())) == ([3, 4], [2, 3, 4, 5])


def test_a_user_is_read_once_until_something_happens(store: Store, log: Slow) -> None:
    async def scene() -> list[int]:
        reads = []
        for step in range(4):
            if step == 2:
                await store.add([event("1", "u", "a")])
            await store.state("u")
            reads.append(log.reads)
        return reads

    assert asyncio.run(scene()) == [1, 1, 2, 2]


def test_only_the_latest_users_are_kept(store: Store, log: Slow) -> None:
    async def scene() -> int:
        for user in ("u", "v", "u", "w", "u"):
            await store.state(user)
        assert len(store) == 2 and log.reads == 3
        await store.state("v")
        return log.reads

    assert asyncio.run(scene()) == 4


def test_a_read_overtaken_by_an_event_is_not_kept(store: Store, log: Slow) -> None:
    async def scene() -> State:
        log.go.clear()
        early = asyncio.create_task(store.state("u"))
        assert await asyncio.to_thread(log.began.wait, 60)
        assert await store.add([event("1", "u", "a")]) == 1
        log.go.set()
        assert ids(await early) == ([], [2])
        return await store.state("u")

    assert ids(asyncio.run(scene())) == ([2], [2])


def test_users_with_events_are_found(store: Store) -> None:
    async def scene() -> list[str]:
        await store.add([event("1", "ann", "a"), event("2", "bob", "a"), event("3", "anna", "a"), event("4", "anna", "b")])
        return await store.users("an", 10)

    assert asyncio.run(scene()) == ["anna", "ann"]
