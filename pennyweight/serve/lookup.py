"""Names for ids and back: items by id or title, and the search behind the page's fields.

Titles are folded once (case, accents) and scanned by Polars for each word of a question: a millisecond for ten thousand
items, some tens for a million, with no index to build or keep. A full-text index pays beyond that.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pennyweight.core.errors import ConfigError, NotFound
from pennyweight.data.catalog import Catalog, Value, Vocabulary
from pennyweight.data.schema import FIRST, OOV
from pennyweight.serve.messages import Item, Scored

Ids = npt.NDArray[np.int64]
FEW = 8
"""Names that are looked up one by one."""
FAR, SPARSE = 2**62, 8
"""Integers beyond which differences may not fit; places of a table for each name in it at most."""
NOTHING: Ids = np.empty(0, np.int64)


class Lookup:
    """The names of a catalogue's items and users."""

    def __init__(self, catalog: Catalog) -> None:
        assert catalog.items is not None, "a worker has made sure of it"
        self._vocabulary = catalog.vocabulary(catalog.schema.item.name)
        self._users = _users(catalog)
        ids = catalog.item_ids
        self._order = ids[np.argsort(-catalog.popularity[ids], kind="stable")]
        values = self._vocabulary.decode(ids)
        blank = [None] * len(ids)
        columns = [catalog.items[n].to_list() if n in catalog.items.columns else blank for n in ("title", "year", "genres")]
        shown = zip(ids.tolist(), values, *columns, strict=True)
        self._items = {i: Item(v, t or str(v), y, _words(g)) for i, v, t, y, g in shown if v is not None}
        self._folded = pl.Series([fold(self.item(i).title) for i in self._order.tolist()], dtype=pl.String)
        self._numbers = _Numbers(self._vocabulary)
        self._titled = _titled(self._items, self._order)
        self._user_texts = pl.Series([str(v) for v in self._users.values.to_pylist()] if self._users else [], dtype=pl.String)

    def id(self, value: Value) -> int:
        """The id of an item by its name in the data.

        Raises:
            NotFound: there is no such item.
        """
        found = self._vocabulary.id(value)
        if found == OOV:
            raise NotFound(f"no item {value!r}; find ids with /items?q=")
        return found

    def ids(self, values: Sequence[Value] | Ids) -> Ids:
        """The ids of several items.

        Raises:
            NotFound: one of them is not there.
        """
        if len(values) > FEW:  # one by one is faster for a few
            try:
                asked = np.asarray(values, np.int64) if isinstance(values, np.ndarray) else _integers(values)
            except TypeError:
                return np.fromiter((self.id(v) for v in values), np.int64)
            found = self._numbers.ids(asked)
            if found.min() > OOV:
                return found
            values = asked
        each: Iterable[Value] = values.tolist() if isinstance(values, np.ndarray) else values
        return np.array([self.id(v) for v in each], np.int64)

    def liked(self, values: Iterable[Value]) -> Ids:
        """The ids of items named by their id, or by their whole title with the year in brackets or without."""
        return np.array([self._titled.get(fold(str(v)), 0) or self.id(v) for v in values], np.int64)

    def item(self, item: int) -> Item:
        """What to show of an item."""
        return self._items.get(item) or Item(value := self._vocabulary.decode([item])[0] or item, str(value), None, [])

    def scored(self, items: Ids, scores: npt.NDArray[np.float32]) -> list[Scored]:
        """What to show of items with their scores."""
        shown = [(self.item(i), s) for i, s in zip(items.tolist(), scores.tolist(), strict=True)]
        return [Scored(item.id, item.title, item.year, item.genres, score) for item, score in shown]

    def known(self, user: Value | None) -> bool:
        """Whether the model was trained on this user."""
        return user is not None and self._users is not None and self._users.id(user) != OOV

    def items(self, q: str, k: int) -> list[Item]:
        """Items whose title holds every word of ``q``; those it begins come first, then the more popular."""
        rows = _holding(self._folded, fold(q).split())
        begins = self._folded[rows].str.starts_with(fold(q)).to_numpy()
        return [self.item(i) for i in self._order[_first(rows, ~begins, k)].tolist()]

    def users(self, q: str, k: int) -> list[Value]:
        """Users whose id holds ``q``: the shortest first among those it begins, then the rest."""
        if self._users is None or not len(self._user_texts):
            return []
        rows = _holding(self._user_texts, q.split())
        texts = self._user_texts[rows]
        rank = texts.str.len_chars().to_numpy() + 1000 * ~texts.str.starts_with(q.strip()).to_numpy()
        return [self._users.values[i].as_py() for i in _first(rows, rank if q.strip() else np.zeros(len(rows)), k).tolist()]


class _Numbers:
    """Names that are integers, many looked up at once: by a table where they lie close together, else by halving."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        whole = pa.types.is_integer(vocabulary.values.type)
        names = np.asarray(vocabulary.values, np.int64) if whole else NOTHING
        ids = np.arange(FIRST, FIRST + len(names))
        order = np.argsort(names, kind="stable")
        self._names, self._ids = names[order], ids[order]
        self._table: Ids | None = None
        low, high = (int(self._names[0]), int(self._names[-1])) if whole and len(names) else (0, 0)
        if -FAR < low <= high < FAR and high - low < SPARSE * len(names):
            self._low = low - 1
            self._table = np.full(high - low + 3, OOV)  # one more on either side, for all that lies outside
            self._table[names - self._low] = ids

    def ids(self, asked: Ids) -> Ids:
        """Their ids; ``OOV`` for one that is not there."""
        if self._table is not None:
            return self._table.take(asked - self._low, mode="clip")
        if not len(self._names):
            return np.full(len(asked), OOV)
        places = np.minimum(np.searchsorted(self._names, asked), len(self._names) - 1)
        return np.where(self._names[places] == asked, self._ids[places], OOV)


def fold(text: str) -> str:
    """Text as it is compared: no case, no accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold().strip()) if not unicodedata.combining(c))


def _holding(texts: pl.Series, words: Sequence[str]) -> Ids:
    """Rows whose text holds every word, ascending."""
    mask = np.ones(len(texts), bool)
    for word in words:
        mask &= texts.str.contains(word, literal=True).to_numpy()
    return np.flatnonzero(mask)


def _first(rows: Ids, rank: npt.NDArray[np.generic], k: int) -> Ids:
    """The ``k`` rows of lowest rank; of equals, those that come first."""
    return rows[np.argsort(rank, kind="stable")[:k]]


def _integers(values: Sequence[Value]) -> Ids:
    if not all(type(v) is int for v in values):
        raise TypeError("names that are no integers")
    return np.array(values, np.int64)


def _titled(items: Mapping[int, Item], order: Ids) -> dict[str, int]:
    """Ids by folded title, with the year and without; of several with one title, the most popular."""
    titled: dict[str, int] = {}
    for i in order.tolist():
        title = fold(items[i].title)
        titled.setdefault(title, i)
        titled.setdefault(f"{title} ({items[i].year})", i)
    return titled


def _words(genres: object) -> list[str]:
    """Genres as a list, from a list or from one text ("Action, Drama")."""
    if isinstance(genres, str):
        return [g for g in genres.replace("|", ", ").split(", ") if g]
    return [str(g) for g in genres] if isinstance(genres, Iterable) else []


def _users(catalog: Catalog) -> Vocabulary | None:
    try:
        return catalog.vocabulary(catalog.schema.user.name)
    except ConfigError:  # a model of items and histories alone knows nobody by name
        return None
