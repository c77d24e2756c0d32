"""What serving needs of the data: the schema, the vocabularies that turn values into ids, and a table of items.

A catalog travels inside a bundle, so it is plain files (JSON and Arrow, never pickle) that come out byte for byte the
same each time. The obvious alternative for vocabularies, one JSON list each, takes seconds to parse at a million
values; Arrow is mapped in a millisecond and costs a dependency we have anyway.

``Catalog.request`` is on the serving path. What belongs to items is kept as dense arrays indexed by id, so a request of
500 candidates is one gather a column; what belongs to the user is one row, broadcast without a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import torch
import xxhash
from torch import Tensor

from pennyweight.core.config import decode, dumps
from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.schema import FIRST, OOV, PAD, Column, Schema

Ids = npt.NDArray[np.int64]
Value = str | int


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Values and their ids: the value at position ``i`` has id ``i + 2``; a hashed one keeps no values, only its size."""

    values: pa.Array
    """Distinct int64 or string values without nulls; empty when hashed."""
    buckets: int = 0
    """Ids of a hashed vocabulary, the two reserved ones included; 0 for a learned one."""

    @classmethod
    def of(cls, values: Any) -> Vocabulary:
        """A learned vocabulary of these distinct values (a list, array or Series), in this order.

        Texts that all are whole numbers as Python writes them are kept as numbers, so a CSV and a Parquet file agree.
        """
        series = _series(values)
        numbers = series.cast(pl.Int64, strict=False)
        if series.dtype == pl.String and (numbers.cast(pl.String) == series).fill_null(False).all():
            series = numbers
        if series.null_count() or series.n_unique() != len(series):
            raise DataError("a vocabulary needs distinct values, none missing; drop the duplicates first")
        return cls(_array(series.cast(pl.Int64) if series.dtype.is_integer() else series))

    @classmethod
    def learn(cls, counts: pl.DataFrame) -> Vocabulary:
        """The values of a frame with ``value`` and ``n``, the most frequent first, equally frequent ones by value."""
        return cls.of(counts.sort("n", "value", descending=[True, False])["value"])

    @classmethod
    def hashed(cls, size: int) -> Vocabulary:
        """A vocabulary that sends any value to one of ``size - 2`` ids by its xxh3 hash."""
        if size <= FIRST:
            raise ConfigError(f"a hashed vocabulary of {size} ids has no room for values; give at least {FIRST + 1}")
        return cls(pa.array([], pa.large_string()), size)

    @property
    def size(self) -> int:
        """Ids there are, padding and out-of-vocabulary included: the rows of an embedding table."""
        return self.buckets or FIRST + len(self.values)

    def head(self, n: int) -> Vocabulary:
        """The first ``n`` values."""
        return Vocabulary(self.values[:n], self.buckets)

    def encode(self, values: Any) -> Ids:
        """Ids int64 [n] of values (a list, array or Series); unknown and missing values get 1 (out of vocabulary)."""
        series = _series(values)
        if self.buckets:
            return self._hash(series)
        kin = pl.Int64 if pa.types.is_integer(self.values.type) else pl.String
        found = pc.index_in(_array(series.cast(kin, strict=False)), value_set=self.values, skip_nulls=True)
        return np.asarray(found.cast(pa.int64()).fill_null(OOV - FIRST), np.int64) + FIRST

    def id(self, value: Value | None) -> int:
        """The id of one value by a dictionary: what serving asks for; 1 when unknown or None."""
        if value is None:
            return OOV
        if self.buckets:
            return _bucket(value, self.buckets)
        known = self._index.get(value)
        return self._index.get(self._kin(value), OOV) if known is None else known  # type: ignore[arg-type]

    def decode(self, ids: Any) -> list[Value | None]:
        """Values of ids; None for padding, out of vocabulary, and for every id of a hashed vocabulary.

        Raises:
            DataError: an id is outside ``[0, size)``.
        """
        rows = np.asarray(ids, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.size):
            bad = rows[(rows < 0) | (rows >= self.size)][0]
            raise DataError(f"id {bad} is outside the vocabulary of {self.size} ids; it was encoded with another one")
        if self.buckets:
            return [None] * len(rows)
        known = pa.array(rows - FIRST, mask=rows < FIRST)
        values: list[Value | None] = self.values.take(known).to_pylist()
        return values

    @functools.cached_property
    def _index(self) -> dict[Value, int]:
        return {v: i for i, v in enumerate(self.values.to_pylist(), FIRST)}

    def _kin(self, value: Value) -> Value | None:
        """The same value in this vocabulary's type: "7" for 7 and back."""
        if not pa.types.is_integer(self.values.type):
            return str(value)
        text = str(value)
        return int(text) if text.removeprefix("-").isdecimal() else None

    def _hash(self, series: pl.Series) -> Ids:
        """Each distinct value is hashed once in Python: Polars' own vectorized hash may differ from version to version."""
        coded = _array(series).dictionary_encode()
        table = np.fromiter((_bucket(v, self.buckets) for v in coded.dictionary.to_pylist()), np.int64, len(coded.dictionary))
        rows = np.asarray(coded.indices.fill_null(len(table)), np.int64)
        return np.append(table, OOV)[rows]


def _series(values: Any) -> pl.Series:
    series = values if isinstance(values, pl.Series) else pl.Series(values, strict=False)
    return series.cast(pl.String) if series.dtype == pl.Null else series


def _array(series: pl.Series) -> pa.Array:
    """One Arrow array, texts with 64-bit offsets."""
    array = series.rechunk().to_arrow()
    return array if pa.types.is_integer(array.type) else array.cast(pa.large_string())


def _bucket(value: Value, size: int) -> int:
    return FIRST + xxhash.xxh3_64_intdigest(str(value).encode()) % (size - FIRST)


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """Schema, vocabularies by table name, and the items: one row an item id, sorted by id.

    ``items`` holds the id under the item column's name, the encoded item features under theirs, ``popularity`` (rows in
    training) and columns to show (``title``, ``genres``, ``year``). None where the data has no items.
    """

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]
    items: pl.DataFrame | None = None

    def vocabulary(self, column: str) -> Vocabulary:
        """The vocabulary a column's ids come from (its own, or the one it shares)."""
        table = self.schema[column].table
        if table not in self.vocabularies:
            known = ", ".join(self.vocabularies) or "none"
            raise ConfigError(f"column {column!r} has no vocabulary; those that have one: {known}")
        return self.vocabularies[table]

    def differs(self, rows: Catalog) -> str:
        """Why a model of this catalog would misread rows of another, in words; empty where it would not."""
        for column in self.schema.columns:
            if column.role not in ("label", "time") and column not in rows.schema.columns:
                have = next((c for c in rows.schema.columns if c.name == column.name), "no such column")
                return f"it reads {column}, they hold {have}"
        for table in self.vocabularies.keys() & rows.vocabularies.keys():
            if not self.vocabularies[table].values.equals(rows.vocabularies[table].values):
                return f"both have ids for {table!r}, and they stand for other values"
        return ""

    def replace(self, **changes: Any) -> Catalog:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def item_ids(self) -> Ids:
        """All item ids that can be recommended, int64, ascending."""
        return self._table()[self.schema.item.name].to_numpy(writable=True)

    @functools.cached_property
    def popularity(self) -> Ids:
        """Rows in training by item id, int64 [item size]; 0 for the reserved ids."""
        return self._dense("popularity", self.schema.item.size, np.int64)

    @functools.cached_property
    def features(self) -> Mapping[str, npt.NDArray[Any]]:
        """Item columns by name as arrays indexed by item id: int64 [size], int64 [size, L], float32 [size(, N)]."""
        size = self.schema.item.size
        ids = np.arange(size, dtype=np.int64)
        others = [c for c in self.schema.role("item") if c.name != self.schema.item.name]
        dense = {c.name: self._dense(c.name, size, np.float32 if c.kind == "numeric" else np.int64, c) for c in others}
        return {self.schema.item.name: ids, **dense}

    def item_batch(self, items: Ids) -> dict[str, Tensor]:
        """The item columns of these ids as a batch: int64 [N], int64 [N, L], float32 [N(, M)].

        Raises:
            DataError: an id is outside the item vocabulary.
        """
        rows = np.asarray(items, np.int64)
        self._known(rows)
        return {name: torch.from_numpy(array.take(rows, axis=0)) for name, array in self.features.items()}

    def user_batch(
        self, user: Value | None, history: Sequence[int] | Ids = (), context: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The user and context columns of one request, one row.

        ``user`` and ``context`` hold values as they were before encoding (``context`` may name any user or context
        column); unknown or missing ones are out of vocabulary, missing numbers 0. ``history`` holds the ids of liked
        items, oldest first. The rows may be those of another request that says the same: read them, do not write into them.
        """
        if user is None and not context and not len(history):
            return dict(self._blank)
        given = {} if self._user is None else {self._user.name: user}
        given.update(context or {})
        self._checked(given)
        said = {name for name, value in given.items() if value is not None}
        if self._history is not None and len(history):
            said.add(self._history.name)
        batch = dict(self._blank)  # most say little, and a row made anew takes ten times as long as all else here
        for name in said:
            batch[name] = torch.from_numpy(self._row(self.schema[name], given, history))
        return batch

    def request(
        self,
        user: Value | None,
        history: Sequence[int] | Ids,
        items: Ids,
        context: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """A batch that scores ``len(items)`` candidates for one user.

        The user's columns are one row expanded over the candidates (stride 0: read them, do not write into them).

        Raises:
            DataError: a candidate or a history id is outside the item vocabulary, or ``context`` names no such column.
        """
        batch = self.item_batch(items)
        for name, row in self.user_batch(user, history, context).items():
            batch[name] = row.expand(len(items), *row.shape[1:])
        return batch

    def files(self) -> dict[str, bytes]:
        """The catalog as named files, the same bytes every time."""
        hashed = {name: v.buckets for name, v in self.vocabularies.items()}
        found = sorted(self.vocabularies.items())  # the order they come back in: saved again, the same bytes
        tables = {name: pa.LargeListArray.from_arrays(pa.array([0, len(v.values)], pa.int64()), v.values) for name, v in found}
        files = {
            "catalog.json": dumps({"schema": self.schema, "buckets": hashed}).encode(),
            "vocabularies.arrow": _ipc(pa.table(tables) if tables else pa.table({"none": pa.array([0])})),
        }
        return files if self.items is None else {**files, "items.arrow": _ipc(_plain(self.items.to_arrow()))}

    @classmethod
    def parse(cls, files: Mapping[str, bytes]) -> Catalog:
        """The catalog from its files.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        try:
            head = json.loads(files["catalog.json"])
            tables = pa.ipc.open_file(files["vocabularies.arrow"]).read_all()
            items = pl.DataFrame(pa.ipc.open_file(files["items.arrow"]).read_all()) if "items.arrow" in files else None
            buckets: Mapping[str, int] = head["buckets"]
            vocabularies = {n: Vocabulary(tables[n].combine_chunks().flatten(), size) for n, size in buckets.items()}
            schema = decode(Schema, head["schema"], "catalog.json.schema")
        except KeyError as error:
            raise ConfigError(f"the catalog lacks {error}; save it again") from error
        except (ValueError, TypeError, AttributeError, pa.ArrowException, pl.exceptions.PolarsError) as error:
            raise ConfigError(f"the catalog is damaged ({error}); save it again") from error
        return cls(schema, vocabularies, items)

    @functools.cached_property
    def _asker(self) -> tuple[Column, ...]:
        return self.schema.role("user", "context")

    @functools.cached_property
    def _blank(self) -> dict[str, Tensor]:
        """The row of a request that says nothing of itself."""
        return {c.name: torch.from_numpy(self._row(c, {}, ())) for c in self._asker}

    @functools.cached_property
    def _user(self) -> Column | None:
        return next((c for c in self.schema.role("user") if c.kind == "categorical"), None)

    @functools.cached_property
    def _history(self) -> Column | None:
        return self.schema.history

    def _table(self) -> pl.DataFrame:
        if self.items is None:
            raise DataError("this catalog has no items; build the dataset with an item column")
        return self.items

    def _dense(self, name: str, size: int, kind: Any, column: Column | None = None) -> npt.NDArray[Any]:
        """A column of the item table as an array by item id; reserved ids hold out of vocabulary (numbers: 0)."""
        table = self._table()
        values = table[name].to_numpy()
        blank = OOV if column is not None and column.kind == "categorical" else 0
        dense = np.full((size, *values.shape[1:]), blank, kind)
        dense[table[self.schema.item.name].to_numpy()] = values
        return dense

    def _known(self, ids: Ids) -> None:
        size = self.schema.item.size
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            bad = ids[(ids < 0) | (ids >= size)][0]
            raise DataError(f"item id {bad} is outside the vocabulary of {size} ids; encode items with this catalog first")

    def _checked(self, given: Mapping[str, Any]) -> None:
        for name in given:
            if name not in self._blank:
                raise DataError(f"no user or context column {name!r}; known: {', '.join(self._blank) or 'none'}")

    def _row(self, column: Column, given: Mapping[str, Any], history: Sequence[int] | Ids) -> npt.NDArray[Any]:
        """One row of a user or context column."""
        value = given.get(column.name)
        if column.kind == "numeric":
            return _numbers(column, value)
        if column.kind == "categorical":
            return np.array([self.vocabulary(column.name).id(value)], np.int64)
        if column == self._history and value is None:
            ids = np.asarray(history[-column.length :], np.int64)
            self._known(ids)
        else:
            vocabulary = self.vocabulary(column.name)
            ids = np.array([vocabulary.id(v) for v in value or ()], np.int64)
        return pad(ids, np.array([len(ids)]), column)


def pad(ids: Ids, counts: npt.NDArray[np.integer[Any]], column: Column) -> Ids:
    """Sequences int64 [n, L] from their ids one after the other and the length of each.

    A user's sequence keeps its last L ids and is padded on the left, so the newest is always in the last place; any other
    keeps its first L and is padded on the right.
    """
    end = np.cumsum(counts, dtype=np.int64)[:, None]
    start = end - np.asarray(counts)[:, None]
    at = np.arange(column.length) + (end - column.length if column.role == "user" else start)
    inside = (at >= start) & (at < end)
    return np.where(inside, np.append(ids, PAD)[np.where(inside, at, -1)], PAD)


def _numbers(column: Column, value: Any) -> npt.NDArray[np.float32]:
    shape = (1, column.length) if column.length else (1,)
    try:
        row = np.zeros(shape, np.float32) if value is None else np.asarray(value, np.float32).reshape(shape)
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column.name!r} needs {column.length or 'one'} number(s), got {value!r}") from error
    if not np.isfinite(row).all():
        raise DataError(f"column {column.name!r} needs finite numbers, got {value!r}")
    return row


def _plain(table: pa.Table) -> pa.Table:
    """One chunk a column: the same rows give the same bytes however they were put together."""
    return table.combine_chunks()


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
