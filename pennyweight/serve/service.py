"""What the service does, without HTTP: each method takes a message and gives a message.

A recommendation is: the user's state, candidates from the whole catalogue (retrieval), what was seen left out, the ranking
of what remains, the top k. Whoever the model can say nothing about gets what is similar to their likes, or what is
popular, and the answer says so: an error would help nobody, and a guess by an untrained row of a table would pretend.

The event loop never computes a forward: queries go through the batcher to the one thread of the model.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

import pennyweight
from pennyweight.accelerate.cache import hit_rate
from pennyweight.core.errors import DataError, RequestError, TooLarge
from pennyweight.data.catalog import Value
from pennyweight.data.events import Event
from pennyweight.model.bundle import Bundle
from pennyweight.schedule.batcher import Batcher
from pennyweight.serve import messages as m
from pennyweight.serve.lookup import Lookup
from pennyweight.serve.metrics import Metrics
from pennyweight.serve.store import NOBODY, State, Store, opened
from pennyweight.serve.worker import By, Ids, Query, Ranked, Worker

CANDIDATES = 500
"""Items that retrieval hands to ranking, or k where that is more."""
EVENTS = 10_000
"""Events taken at once."""
HISTORY = 20
"""Liked items kept of a user where the model reads no history."""


class Service:
    """A bundle and its events (a file or a server's URL), answering messages.

    Raises:
        BundleError, ConfigError: the bundle cannot be served.
        DataError, DeviceError, StorageError: the events cannot be used.
    """

    def __init__(self, bundle: Bundle, log: str | Path, allow: Sequence[str] = ()) -> None:
        self.policy = bundle.policy
        self._bytes = bundle.bytes
        self._model_thread = ThreadPoolExecutor(1, "model")
        self.worker = self._model_thread.submit(Worker, bundle, allow).result()
        self.catalog = self.worker.catalog
        self.lookup = Lookup(self.catalog)
        history = self.catalog.schema.history
        self._reads_history = history is not None
        items = self.catalog.vocabulary(self.catalog.schema.item.name)
        self.store = Store(opened(log), items, history.length if history else HISTORY)
        self.metrics = Metrics(lambda: len(self.batcher.queue))
        if self.worker.runner.hot:
            self.metrics.hot_rows(lambda: hit_rate(self.worker.runner.hot))
        self.batcher: Batcher[Query, Ranked] = Batcher(
            self.policy, self.worker.answer, self._model_thread, observe=self.metrics.batch
        )

    async def recommend(self, ask: m.Recommend) -> m.Recommendations:
        """The top k items for a user, for a list of likes, or for both."""
        if ask.user is None and not ask.liked:
            raise RequestError("nothing says whom to recommend for; name a user, or give liked items")
        state, liked = await self._state(ask.user), self.lookup.liked(ask.liked)
        history = np.concatenate([state.history, liked])
        hidden = np.concatenate([state.seen, liked]) if ask.exclude_seen else NOBODY.seen
        known = self.lookup.known(ask.user)
        by = self._by(known, history)
        query = Query(self._asker(ask, history), history, by, hidden=hidden, count=max(CANDIDATES, ask.k))
        ranked = (await self.batcher.submit(query, query.count)).top(ask.k)
        shown = [self.lookup.item(i) for i in history[:-11:-1].tolist()]
        return m.Recommendations(ask.user, known, by, shown, self.lookup.scored(ranked.items, ranked.scores))

    async def score(self, ask: m.Score) -> m.Scores:
        """The model's scores of some items for one person, in their order."""
        if len(ask.items) > self.policy.candidates:
            raise TooLarge(
                f"{len(ask.items)} items to score, and the policy allows {self.policy.candidates}; send them in parts"
            )
        items, liked = self.lookup.ids(ask.items), self.lookup.liked(ask.liked)
        state = await self._state(ask.user)
        history = np.concatenate([state.history, liked])
        ranked = await self.batcher.submit(Query(self._asker(ask, history), history, items=items), len(items))
        return m.Scores(ask.user, self.lookup.known(ask.user), ranked.scores.tolist())

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
        runner = self.worker.runner
        name = type(runner.module).__name__
        return m.Health("ok", name, len(self.worker.ids), self._bytes, runner.engine, pennyweight.__version__)

    async def close(self) -> None:
        """Finish what was accepted, then let go of model and log."""
        await self.batcher.close()
        self._model_thread.shutdown()
        self.store.close()

    async def _state(self, user: Value | None) -> State:
        return NOBODY if user is None else await self.store.state(str(user))

    def _by(self, known: bool, history: Ids) -> By:
        if known or (self._reads_history and len(history)):
            return "model"
        return "similarity" if len(history) and self.worker.vectors is not None else "popularity"

    def _asker(self, ask: m.Recommend | m.Score, history: Ids) -> dict[str, Tensor]:
        """The user's columns, made before queueing, so that a wrong one fails its own request and no other."""
        with _asked():
            return self.catalog.user_batch(ask.user, history, ask.context)

    def _event(self, event: m.Event) -> Event:
        """The event as it is logged: under the item's own name, whichever way it was written."""
        item = self.lookup.item(self.lookup.id(event.item)).id
        when = int(time.time()) if event.time is None else event.time
        with _asked():
            return Event(event.id or uuid.uuid4().hex, str(event.user), str(item), event.kind, event.value, when)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Data that is wrong here came with the request."""
    try:
        yield
    except DataError as error:
        raise RequestError(str(error)) from error
