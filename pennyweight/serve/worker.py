"""The model at work: candidates out of the whole catalogue, then their ranking, for several requests in one forward.

A worker is called from one thread only and knows nothing of HTTP, users or time. Retrieval searches the items' vectors, which
are computed once, by the index the bundle's runtime names: exact, or inverted lists where the catalogue is so large that
``accelerate.index.choose`` found them to pay. A model that only ranks scores every item instead: exact, and slow for large
catalogues.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pennyweight.accelerate.index import Searcher, best, opened
from pennyweight.accelerate.runner import Runner
from pennyweight.core.errors import BundleError, ConfigError, DataError, RequestError
from pennyweight.data.catalog import Catalog, Value
from pennyweight.data.schema import FIRST
from pennyweight.model.bundle import Bundle

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
By = Literal["model", "similarity", "popularity"]
Asker = Mapping[str, Tensor]
"""The user and context columns of one request, one row."""
NOTHING: Ids = np.empty(0, np.int64)
CHUNK = 65536
"""Items whose vectors are computed at once when the service starts."""


class Query(msgspec.Struct, frozen=True, eq=False):
    """One request to the model: names of the user and of context, ids of items."""

    user: Value | None
    """The user as named outside."""
    history: Ids
    """Ids of liked items, oldest first."""
    by: By = "model"
    """Who answers it."""
    items: Ids | None = None
    """Candidates to score; None to retrieve them."""
    hidden: Ids = NOTHING
    """Items that retrieval leaves out."""
    count: int = 500
    """Candidates to retrieve."""
    context: Mapping[str, Any] = {}
    """Values of user and context columns, as before encoding."""
    k: int = 0
    """How many of the best to give; 0 is all of them, in their order."""
    start: int = 0
    stop: int | None = None
    """Of the candidates, those from ``start`` to ``stop`` alone: a part that is scored here, others elsewhere."""

    def asker(self, catalog: Catalog) -> dict[str, Tensor]:
        """The user and context columns, one row.

        Raises:
            RequestError: the context names a column that is not there, or has a value that cannot be.
        """
        try:
            return catalog.user_batch(self.user, self.history, self.context)
        except DataError as error:
            raise RequestError(str(error)) from error


class Ranked(msgspec.Struct, frozen=True, eq=False):
    """Items in the order of the query (or of retrieval) and their scores."""

    items: Ids
    scores: Floats

    def top(self, k: int) -> Ranked:
        """The best ``k``, best first; of equals, the one retrieval preferred."""
        order = np.argsort(-self.scores, kind="stable")[:k]
        return Ranked(self.items[order], self.scores[order])


class Worker:
    """A loaded bundle that answers queries.

    Raises:
        BundleError: the bundle has no catalogue, or its items cannot be named.
        ConfigError: its model gives no single score a row, or its factory is not allowed.
    """

    def __init__(self, bundle: Bundle, allow: Sequence[str] = ()) -> None:
        self.catalog = servable(bundle)
        self.ids = self.catalog.item_ids
        probe = self.catalog.request(None, (), self.ids[:2])
        self.runner = Runner(bundle, allow, probe=probe, fallback=True)
        self.kept = self.runner.runtime.shared and len(self.ids) > 1 and self._keep(probe)
        shape = self.runner.score(probe).shape
        if shape != (len(self.ids[:2]),):
            raise ConfigError(
                f"the model gives scores of shape {shape} for {len(self.ids[:2])} items; serving needs one score an item"
            )
        self.vectors = self._vectors() if hasattr(self.runner.module, "item_vectors") else None
        self.index: Searcher | None
        self.index, self.note = (None, "") if self.vectors is None else opened(self.vectors, bundle.runtime.index)
        """What candidates are found by, and why it is not the index asked for where it is not."""
        self._places = np.full(self.catalog.schema.item.size, -1)
        self._places[self.ids] = np.arange(len(self.ids))

    def answer(self, queries: Sequence[Query]) -> list[Ranked | RequestError]:
        """Candidates and scores of each query, or what is wrong with it; those for the model share retrieval and ranking."""
        answers: list[Ranked | RequestError | None] = [None] * len(queries)
        asked: list[tuple[int, Query, dict[str, Tensor]]] = []
        for place, query in enumerate(queries):
            if query.by == "model":
                try:
                    asked.append((place, query, query.asker(self.catalog)))
                except RequestError as error:
                    answers[place] = error
            else:
                found = self._similarity(query) if query.by == "similarity" else self._popularity(query)
                part = slice(query.start, query.stop)
                answers[place] = Ranked(found.items[part], found.scores[part])
        modelled = self._modelled([q for _, q, _ in asked], [asker for _, _, asker in asked]) if asked else []
        for (place, _, _), ranked in zip(asked, modelled, strict=True):
            answers[place] = ranked
        return [a.top(q.k) if isinstance(a, Ranked) and q.k else a for q, a in zip(queries, answers, strict=True)]  # type: ignore[misc]

    def _keep(self, probe: Mapping[str, Tensor]) -> bool:
        """Compute every item's part now: all that can be named, which may be more than the table of items has."""
        named = np.arange(FIRST, self.catalog.schema.item.size)
        return self.runner.keep(probe, self.catalog.item_batch(named), named, self.catalog.schema.item.size)

    def _modelled(self, queries: Sequence[Query], askers: Sequence[Asker]) -> list[Ranked]:
        items = self._candidates(queries, askers)
        lengths = [len(chosen) for chosen in items]
        if not sum(lengths):
            return [Ranked(chosen, np.empty(0, np.float32)) for chosen in items]
        if self.kept:
            found = self.runner.ranked(askers, items)
            return [Ranked(i, _finite(scores, "scores")) for i, scores in zip(items, found, strict=True)]
        if self.runner.runtime.shared:  # each alone: what its candidates share is more than what requests do
            return [Ranked(i, self._scored(asker, i)) for asker, i in zip(askers, items, strict=True)]
        scores = _finite(self.runner.score(self._rows_of(askers, items, lengths)), "scores")
        if len(items) == 1:
            return [Ranked(items[0], scores)]
        ends = np.cumsum(lengths).tolist()
        return [Ranked(i, scores[stop - n : stop]) for i, n, stop in zip(items, lengths, ends, strict=True)]

    def _rows_of(self, askers: Sequence[Asker], items: Sequence[Ids], lengths: Sequence[int]) -> dict[str, Tensor]:
        """One batch of all requests: the items' columns are looked up together, the askers' rows repeated.

        A column of which all say the same is one row for all, not copied: every column of one request, and what nobody said.
        """
        batch, whose = self.catalog.item_batch(np.concatenate(items) if len(items) > 1 else items[0]), None
        for name, row in askers[0].items():
            said = [asker[name] for asker in askers]
            if all(other is row for other in said):
                batch[name] = row.expand(sum(lengths), *row.shape[1:])
            else:
                if whose is None:
                    whose = torch.from_numpy(np.repeat(np.arange(len(items)), lengths))
                batch[name] = torch.cat(said).index_select(0, whose)
        return batch

    def _scored(self, asker: Asker, items: Ids) -> Floats:
        if not len(items):
            return np.empty(0, np.float32)
        return _finite(self.runner.score(self._rows_of([asker], [items], [len(items)])), "scores")

    def _candidates(self, queries: Sequence[Query], askers: Sequence[Asker]) -> list[Ids]:
        retrieve = [(q, asker) for q, asker in zip(queries, askers, strict=True) if q.items is None]
        found = iter(self._retrieve(*zip(*retrieve, strict=True)) if retrieve else ())
        return [(next(found) if q.items is None else q.items)[q.start : q.stop] for q in queries]

    def _retrieve(self, queries: Sequence[Query], askers: Sequence[Asker]) -> list[Ids]:
        if self.index is None:
            return [self.ids[~np.isin(self.ids, q.hidden)] for q in queries]
        users = _finite(self.runner.user_vectors(_joined(askers)), "numbers of users' vectors")
        found = self.index.search(users, max(q.count for q in queries), [self._rows(q.hidden) for q in queries])
        return [self.ids[f.places[: q.count]] for f, q in zip(found, queries, strict=True)]

    def _similarity(self, query: Query) -> Ranked:
        """The items nearest (by cosine) to the mean of what was liked: for a model that reads no history."""
        scores = self._unit @ self._unit[self._rows(query.history)].mean(0)
        found = best(scores, query.count, self._rows(query.hidden))
        return Ranked(self.ids[found.places], found.scores)

    def _popularity(self, query: Query) -> Ranked:
        """The items most frequent in training; the score is how often they occur."""
        items = self._popular[: query.count + len(query.hidden)]
        items = items[~np.isin(items, query.hidden)][: query.count]
        return Ranked(items, self.catalog.popularity[items].astype(np.float32))

    @functools.cached_property
    def _popular(self) -> Ids:
        return self.ids[np.argsort(-self.catalog.popularity[self.ids], kind="stable")]

    @functools.cached_property
    def _unit(self) -> Floats:
        assert self.vectors is not None, "similarity is asked only of a model with item vectors"
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        unit: Floats = self.vectors / np.maximum(lengths, 1e-12)
        return unit

    def _rows(self, items: Ids) -> Ids:
        """Rows of the vectors these ids have; one without a row in the catalogue is left out."""
        places = self._places[items]
        return places[places >= 0]

    def _vectors(self) -> Floats:
        chunks = [self.ids[i : i + CHUNK] for i in range(0, len(self.ids), CHUNK)]
        return np.concatenate([self.runner.item_vectors(self.catalog.item_batch(chunk)) for chunk in chunks])


def _finite(values: Floats, what: str) -> Floats:
    if not np.isfinite(values).all():
        raise BundleError(f"{np.sum(~np.isfinite(values))} of {values.size} {what} are not finite; train the model again")
    return values


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch from several; one alone is passed on without a copy."""
    if len(batches) == 1:
        return dict(batches[0])
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def servable(bundle: Bundle) -> Catalog:
    """The catalogue of a bundle that can be served.

    Raises:
        BundleError: it has none, or its items cannot be named.
    """
    catalog = bundle.catalog
    if catalog is None or catalog.items is None or not len(catalog.items):
        raise BundleError(
            "this bundle has no catalogue of items, so it has nothing to recommend; train it on a dataset with items"
        )
    if catalog.vocabulary(catalog.schema.item.name).buckets:
        raise BundleError(
            "this bundle's item ids are hashed, so an answer could not name them; train with a learned item vocabulary"
        )
    return catalog
