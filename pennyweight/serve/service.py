"""What the service does, without HTTP: each method takes a message and gives a message.

A recommendation is: the user's state, candidates from the whole catalogue (retrieval), what was seen left out, the ranking
of what remains, the top k. Whoever the model can say nothing about gets what is similar to their likes, or what is
popular, and the answer says so: an error would help nobody, and a guess by an untrained row of a table would pretend.

The event loop never computes a forward: queries go to an ``Engine``, worker processes or the one thread of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pennyweight
from pennyweight.core.errors import Conflict, DataError, Overloaded, PennyweightError, RequestError, TooLarge
from pennyweight.data.catalog import Value
from pennyweight.data.events import Event
from pennyweight.model import bundle as bundles
from pennyweight.model.bundle import Bundle
from pennyweight.schedule.batcher import Seat, seated
from pennyweight.schedule.queue import Ticket
from pennyweight.serve import messages as m
from pennyweight.serve.binary import Packed
from pennyweight.serve.engine import Answer, Engine, Local
from pennyweight.serve.lookup import Lookup
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.pool import Pool
from pennyweight.serve.shadow import Difference
from pennyweight.serve.store import NOBODY, State, Store, opened
from pennyweight.serve.worker import By, Ids, Query, servable

CANDIDATES = 500
"""Items that retrieval hands to ranking, or k where that is more."""
EVENTS = 10_000
"""Events taken at once."""
HISTORY = 20
"""Liked items kept of a user where the model reads no history."""


class Service:
    """A bundle and its events (a file or a server's URL), answering messages.

    Args:
        bundle: what is served.
        log: the events.
        allow: import paths of factories that may be loaded.
        engine: who scores; a thread of this process by default.

    Raises:
        BundleError, ConfigError: the bundle cannot be served.
        DataError, DeviceError, StorageError: the events cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        log: str | Path,
        allow: Sequence[str] = (),
        engine: Callable[[Metrics], Engine] | None = None,
    ) -> None:
        self.policy = bundle.policy
        self._bytes = bundle.bytes
        self.catalog = servable(bundle)
        self.lookup = Lookup(self.catalog)
        history = self.catalog.schema.history
        self._reads_history = history is not None
        items = self.catalog.vocabulary(self.catalog.schema.item.name)
        self.metrics = Metrics(self.policy)
        self._exchanging = False
        self._exchange: asyncio.Task[Difference] | None = None
        self.engine = engine(self.metrics) if engine is not None else Local(bundle, allow, self.metrics)
        self.store = Store(opened(log), items, history.length if history else HISTORY)

    async def recommend(self, ask: m.Recommend) -> m.Recommendations:
        """The top k items for a user, for a list of likes, or for both."""
        if ask.user is None and not ask.liked:
            raise RequestError("nothing says whom to recommend for; name a user, or give liked items")
        state, liked = await self._state(ask.user), self.lookup.liked(ask.liked)
        history = np.concatenate([state.history, liked])
        hidden = np.concatenate([state.seen, liked]) if ask.exclude_seen else NOBODY.seen
        known = self.lookup.known(ask.user)
        by = self._by(known, history)
        count = max(CANDIDATES, ask.k)
        query = Query(ask.user, history, by, hidden=hidden, count=count, context=ask.context, k=ask.k)
        answer = await self._scored(query, self.engine.about.every or count, ask)
        shown = [self.lookup.item(i) for i in history[:-11:-1].tolist()]
        self.metrics.answers(answer.variant)
        best = self.lookup.scored(answer.ranked.items, answer.ranked.scores)
        return m.Recommendations(ask.user, known, by, shown, best, answer.variant, answer.gap)

    async def score(self, ask: m.Score | Packed) -> m.Scores:
        """The model's scores of some items for one person, in their order."""
        query = self._query(ask, await self._state(ask.user))
        return self.scores(ask, await self._scored(query, len(ask.items), ask))

    def begin(self, ask: m.Score | Packed, seat: Seat) -> Ticket | None:
        """``score`` without a coroutine; None, and nothing is begun, where the user's events have to be read first.

        The seat is told an ``Answer``, which ``scores`` makes a message of, or an error that ``wrong`` is to hear of.
        """
        state = NOBODY if ask.user is None else self.store.known(str(ask.user))
        if state is None:
            return None
        try:
            return self.engine.place(self._query(ask, state), seat, len(ask.items), **_asked(ask))
        except Overloaded as refused:
            self.wrong(ask, refused)
            raise

    def scores(self, ask: m.Score | Packed, answer: Answer) -> m.Scores:
        """An answer as a message."""
        self.metrics.answers(answer.variant)
        return m.Scores(ask.user, self.lookup.known(ask.user), answer.ranked.scores, answer.variant, answer.gap)  # type: ignore[arg-type]

    def wrong(self, ask: m.Scheduled, error: Exception) -> None:
        """Count a request that was refused for load."""
        if isinstance(error, Overloaded):
            self.metrics.shed(ask.priority, ask.tenant, error.reason)

    async def events(self, given: m.Event | list[m.Event]) -> m.Stored:
        """Store events: all of them, or none and an error."""
        given = given if isinstance(given, list) else [given]
        if len(given) > EVENTS:
            raise TooLarge(f"{len(given)} events at once, and {EVENTS} are taken; send them in parts")
        stored = await self.store.add([self._event(e) for e in given])
        return m.Stored(stored, len(given) - stored)

    async def items(self, ask: m.Search) -> m.Items:
        """Items by a part of their title."""
        return m.Items(self.lookup.items(ask.q, ask.k))

    async def users(self, ask: m.Search) -> m.Users:
        """Users of the model, then those that only events name."""
        known = self.lookup.users(ask.q, ask.k)
        texts = {str(user) for user in known}
        others = [user for user in await self.store.users(ask.q.strip(), ask.k) if user not in texts]
        return m.Users([m.User(user, self.lookup.known(user)) for user in [*known, *others][: ask.k]])

    async def health(self, ask: m.Nothing) -> m.Health:
        """What is served."""
        about, scheduler = self.engine.about, self.engine.scheduler
        variants = [v.name for v in scheduler.variants if v.name]
        workers = len(scheduler.workers) if isinstance(self.engine, Pool) else 0
        items, version = len(self.catalog.item_ids), pennyweight.__version__
        return m.Health("ok", about.model, items, self._bytes, about.engine, version, variants, workers)

    async def swap(self, ask: m.Swap) -> m.Swapped:
        """Serve another bundle from now on, or the one that its folder holds now, if their scores agree."""
        if not isinstance(self.engine, Pool):
            raise Conflict("one process serves this bundle; start the service with workers to exchange it")
        if ask.bundle in (".", "..") or any(sign in ask.bundle for sign in "/\\\0"):
            raise RequestError(f"bundle {ask.bundle!r} is no folder's name; name one beside the bundle that is served")
        now = self.engine.edition.folder
        folder = now.parent / ask.bundle if ask.bundle else now
        tolerance = math.inf if ask.tolerance is None else ask.tolerance
        if self._exchanging:
            raise Conflict("another bundle is being loaded; wait for it")
        self._exchanging = True
        try:
            other = await asyncio.get_running_loop().run_in_executor(None, self._other, folder)
            wanted = {"tolerance": tolerance, "requests": ask.requests, "seconds": ask.seconds}
            self._exchange = asyncio.create_task(self.engine.swap(folder, other.policy, **wanted))  # type: ignore[arg-type]
            await asyncio.wait([self._exchange])
            if self._exchange.cancelled():
                raise Conflict("the service is stopping; the other bundle will not serve")
            found = self._exchange.result()
        except PennyweightError as error:
            self.metrics.swap("refused")
            raise error if isinstance(error, RequestError) else Conflict(str(error)) from error
        finally:
            self._exchanging = False
        self.metrics.swap("done")
        self.policy, self._bytes = other.policy, other.bytes
        return m.Swapped(folder.name, found.requests, found.median)

    def leave(self) -> None:
        """The service is about to stop: let go of another bundle that is being loaded, and answer at once who waits."""
        self.engine.hurry()
        if self._exchange is not None:
            self._exchange.cancel()

    def _other(self, folder: Path) -> Bundle:
        """A bundle that can take this one's place: the same ids must mean the same, since requests that wait hold them."""
        other = bundles.load(folder, mapped=True)
        why = self.catalog.differs(servable(other)) or servable(other).differs(self.catalog)
        if why or self.catalog.files() != servable(other).files():
            raise Conflict(
                f"{folder.name} was made from another catalogue ({why or 'its items are others'}); start a service with it, "
                "and send its requests there"
            )
        return other

    async def close(self) -> None:
        """Finish what was accepted, then let go of model and log."""
        await self.engine.close()
        self.store.close()

    def _query(self, ask: m.Score | Packed, state: State) -> Query:
        if len(ask.items) > self.policy.candidates:
            raise TooLarge(
                f"{len(ask.items)} items to score, and the policy allows {self.policy.candidates}; send them in parts"
            )
        items, history = self.lookup.ids(ask.items), state.history
        if ask.liked:
            history = np.concatenate([history, self.lookup.liked(ask.liked)])
        return Query(ask.user, history, items=items, context=ask.context)

    async def _scored(self, query: Query, items: int, ask: m.Scheduled) -> Answer:
        asked = _asked(ask)
        try:
            answer: Answer = await seated(lambda seat: self.engine.place(query, seat, items, **asked), self.engine.leave)
        except Overloaded as refused:
            self.wrong(ask, refused)
            raise
        return answer

    async def _state(self, user: Value | None) -> State:
        return NOBODY if user is None else await self.store.state(str(user))

    def _by(self, known: bool, history: Ids) -> By:
        if known or (self._reads_history and len(history)):
            return "model"
        return "similarity" if len(history) and self.engine.about.similar else "popularity"

    def _event(self, event: m.Event) -> Event:
        """The event as it is logged: under the item's own name, whichever way it was written."""
        item = self.lookup.item(self.lookup.id(event.item)).id
        when = int(time.time()) if event.time is None else event.time
        with _given():
            return Event(event.id or uuid.uuid4().hex, str(event.user), str(item), event.kind, event.value, when)


def _asked(ask: m.Scheduled) -> dict[str, Any]:
    """What it says of how it wants to be scheduled, as ``Scheduler.offer`` takes it."""
    asked: dict[str, Any] = {}
    if ask.priority:
        asked["priority"] = ask.priority
    if ask.tenant:
        asked["tenant"] = ask.tenant
    if ask.deadline_ms is not None:
        asked["deadline_s"] = ask.deadline_ms / 1000
    if ask.degrade is not None:
        asked["degrade"] = ask.degrade
    return asked


@contextlib.contextmanager
def _given() -> Iterator[None]:
    """Data that is wrong here came with the request."""
    try:
        yield
    except DataError as error:
        raise RequestError(str(error)) from error
