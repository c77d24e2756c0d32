"""Requests as they come: what latency is measured with.

A request is one user with a history and a few hundred candidates. Measuring with random users and uniform items flatters
a model, since real candidates are the popular ones and share their rows of the tables; so users are drawn from rows as
they occur, and candidates by how often an item occurs. A trace is kept as JSON lines, so it can be looked at, cut with
``head``, or written by somebody else's log.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pennyweight.core.config import decode, encode, write
from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.catalog import Catalog, Value
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: score these items for this user."""

    user: str | int | None
    """The user as named outside, not an id; None for somebody unknown."""
    history: tuple[int, ...]
    """Ids of items the user liked, oldest first."""
    items: tuple[int, ...]
    """Ids of the candidates."""
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of user and context columns, as before encoding."""
    time: int | None = None
    """When, in seconds since 1970; None where it is not known."""

    def batch(self, catalog: Catalog) -> dict[str, Tensor]:
        """What the model is asked: one row a candidate."""
        return catalog.request(self.user, self.history, np.asarray(self.items, np.int64), self.context)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in the order they came."""

    requests: tuple[Request, ...]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @classmethod
    def sample(cls, source: Dataset | Catalog, n: int, candidates: int, seed: int = 0) -> Trace:
        """``n`` requests with ``candidates`` distinct items each (all items where there are fewer).

        From a dataset, each takes the user, history, context and time of a random row, in time order; from a catalog
        alone, users are drawn evenly and histories by popularity.

        Raises:
            DataError: the source has no items.
        """
        if n < 1 or candidates < 1:
            raise ConfigError(f"a trace of {n} requests with {candidates} candidates: both must be at least 1")
        rng = np.random.default_rng(seed)
        catalog = source if isinstance(source, Catalog) else source.catalog
        askers = _rows(source, n, rng) if isinstance(source, Dataset) else _users(source, n, rng)
        drawn = (tuple(_draw(catalog, candidates, rng).tolist()) for _ in askers)
        return cls(tuple(dataclasses.replace(a, items=items) for a, items in zip(askers, drawn, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line."""
        write(path, "".join(json.dumps(encode(r), sort_keys=True, ensure_ascii=False) + "\n" for r in self.requests))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace.

        Raises:
            DataError: the file is missing, empty, or a line is not a request.
        """
        try:
            lines = Path(path).read_text("utf-8").splitlines()
            return cls(tuple(decode(Request, json.loads(line), f"{path}:{k}") for k, line in enumerate(lines, 1)))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; make a trace with Trace.sample(...).save(path)"
            ) from error
        except (ConfigError, ValueError) as error:
            raise DataError(f"{path} is not a trace: {error}") from error

    def batches(self, catalog: Catalog) -> list[dict[str, Tensor]]:
        """A batch a request."""
        return [r.batch(catalog) for r in self.requests]


def _draw(catalog: Catalog, k: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Distinct items with odds by popularity: the smallest of exponential clocks (Efraimidis and Spirakis 2006)."""
    ids = catalog.item_ids
    if k >= len(ids):
        return rng.permutation(ids)
    clocks = rng.exponential(size=len(ids)) / (catalog.popularity[ids] + 1)
    return ids[np.argpartition(clocks, k)[:k]]


def _rows(data: Dataset, n: int, rng: np.random.Generator) -> list[Request]:
    rows = np.sort(rng.integers(0, len(data), n))
    columns = {c.name: data.take(rows).column(c.name) for c in data.schema.columns}
    time = next((c.name for c in data.schema.role("time")), None)
    order = np.argsort(columns[time], kind="stable") if time else np.arange(n)
    return [_asker(data.catalog, {k: v[i] for k, v in columns.items()}, time) for i in order]


def _asker(catalog: Catalog, row: Mapping[str, Any], time: str | None) -> Request:
    schema, history, user = catalog.schema, catalog.schema.history, _named_user(catalog)
    given = [c for c in schema.role("user", "context") if c.name != user and c != history]
    return Request(
        user=catalog.vocabulary(user).decode(row[user][None])[0] if user else None,
        history=tuple(row[history.name][row[history.name] > 0].tolist()) if history else (),
        items=(),
        context={c.name: _value(catalog, c.name, row[c.name]) for c in given},
        time=int(row[time]) if time else None,
    )


def _named_user(catalog: Catalog) -> str | None:
    """The column that names users, if there is one."""
    return next((c.name for c in catalog.schema.role("user") if c.kind == "categorical"), None)


def _value(catalog: Catalog, name: str, stored: Any) -> Any:
    column = catalog.schema[name]
    if column.kind == "numeric":
        return stored.tolist()
    values = catalog.vocabulary(name).decode(np.atleast_1d(stored))
    return [v for v in values if v is not None] if column.kind == "sequence" else values[0]


def _users(catalog: Catalog, n: int, rng: np.random.Generator) -> list[Request]:
    user = _named_user(catalog)
    names: list[Value | None] = [None] * n
    if user:
        names = catalog.vocabulary(user).decode(rng.integers(FIRST, catalog.schema[user].size, n))
    length = catalog.schema.history.length if catalog.schema.history else 0
    lengths = rng.integers(0, length + 1, n).tolist()
    return [Request(u, tuple(_draw(catalog, k, rng).tolist()) if k else (), ()) for u, k in zip(names, lengths, strict=True)]
