"""Rows as columns of ids and numbers in one memory-mapped Arrow file, read in batches.

    folder/
      rows.arrow       one uncompressed Arrow record batch: any Arrow reader opens it, and each column is one plain array
      dataset.json     number of rows and the SHA-256 of the data
      catalog.json …   the catalog: schema, vocabularies, items

A batch is one gather a column from the map, with no Python per row and no copy of the file in memory. Parquet is smaller
and is what data comes in as, but it must be decoded a row group at a time, which makes a shuffled batch cost a row group;
several Arrow record batches would make each gather a loop over them. So the rows are written once as one batch, at the
price of disk (4 bytes an id).

A shuffled epoch permutes all rows where they take at most ``WINDOW`` bytes. A larger set is shuffled in windows: blocks
of ``BLOCK`` rows in random order, a window of them at a time, the rows inside a window permuted, and the pages of a past
window given back, so that memory does not grow with the set (what is mapped is a few windows at most, since the kernel maps
the neighbours of a page with it). The order depends on the seed and the data, never on the
machine, and ``start`` finds any place in it again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor

from pennyweight.core.config import dumps, write
from pennyweight.core.errors import ConfigError, DataError, StorageError
from pennyweight.data.catalog import Catalog, Vocabulary
from pennyweight.data.history import ends, held_out, histories
from pennyweight.data.schema import FIRST, Column, Schema

if TYPE_CHECKING:
    from pennyweight.data.ingest import ColumnSpec

BLOCK = 4096
"""Rows that stay together on disk when a large set is shuffled."""
WINDOW = 256 << 20
"""Bytes of rows that are permuted as one; a larger set is shuffled window by window."""

Array = npt.NDArray[Any]
How = Literal["time", "last", "user", "random", "order"]


class Split(NamedTuple):
    """Three disjoint parts of a dataset; item popularity in their catalog is counted in ``train`` alone."""

    train: Dataset
    valid: Dataset
    test: Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded columns with a catalog. Part of one (``take``, ``split``) is a view: row numbers over the same columns."""

    catalog: Catalog
    columns: Mapping[str, Array]
    """All columns as stored: int32 ids [n] or [n, L], float32 numbers [n] or [n, N], int64 times [n]."""
    rows: npt.NDArray[np.int64] | range
    """The rows of ``columns`` this dataset has, in order."""
    digest: str = ""
    """SHA-256 of schema and data, where it is known already."""
    window: int = WINDOW
    """Bytes of rows that are shuffled as one."""
    mapped: mmap.mmap | None = None
    """The file behind ``columns``, to give its pages back; None for arrays in memory."""

    @classmethod
    def from_arrays(
        cls,
        columns: Mapping[str, Array],
        schema: Schema,
        vocabularies: Mapping[str, Vocabulary] | None = None,
        items: pl.DataFrame | None = None,
    ) -> Dataset:
        """A dataset in memory from encoded columns.

        Without ``vocabularies``, the value of id ``k`` is the number ``k - 2``. Without ``items``, a schema that has an item
        column gets them from the rows: the features of each item as first seen, and its ``popularity``.

        Raises:
            DataError: a column is missing or has another length or shape, an id is outside its size, or a number is NaN.
        """
        arrays = {c.name: _stored(c, columns) for c in schema.columns}
        n = len(arrays[schema.columns[0].name])
        for name, array in arrays.items():
            if len(array) != n:
                raise DataError(f"column {name!r} has {len(array)} rows, {schema.columns[0].name!r} has {n}; give all as many")
        if not n:
            raise DataError("a dataset needs at least one row, got none")
        dataset = cls(Catalog(schema, vocabularies or _counting(schema), items), arrays, range(n))
        return dataset if items is not None else dataset.counted()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Dataset:
        """The dataset in a folder, mapped, not read.

        Raises:
            DataError: no dataset there, or a file of it is truncated or damaged.
        """
        root = Path(path)
        head = _head(root)
        try:
            catalog = Catalog.parse({f: (root / f).read_bytes() for f in head["files"]})
            columns, mapped = _mapped(root / "rows.arrow", catalog.schema)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise DataError(f"{root} is incomplete or damaged ({error}); ingest the data again") from error
        if len(next(iter(columns.values()))) != head["rows"]:
            raise DataError(f"{root}/rows.arrow does not hold {head['rows']} rows as dataset.json says; ingest the data again")
        return cls(catalog, columns, range(head["rows"]), head["sha256"], WINDOW, mapped)

    @staticmethod
    def read_csv(paths: Any, columns: Sequence[ColumnSpec], out: str | os.PathLike[str], **options: Any) -> Dataset:
        """Ingest CSV files (also gzipped) in a stream; see ``pennyweight.data.ingest.read_csv``."""
        from pennyweight.data import ingest

        return ingest.read_csv(paths, columns, out, **options)

    @staticmethod
    def read_parquet(paths: Any, columns: Sequence[ColumnSpec], out: str | os.PathLike[str], **options: Any) -> Dataset:
        """Ingest Parquet files in a stream; see ``pennyweight.data.ingest.read_parquet``."""
        from pennyweight.data import ingest

        return ingest.read_parquet(paths, columns, out, **options)

    def save(self, path: str | os.PathLike[str]) -> Dataset:
        """Write the rows of this dataset to a folder, whole or not at all, and open it.

        Raises:
            StorageError: the disk is full or the folder not writable; an older dataset there is untouched.
        """
        with writing(path, self.catalog, len(self)) as store:
            for rows in self._stretches():
                store.put(int(rows[0]), {name: self._gather(name, rows) for name in self.columns})
        return Dataset.open(path)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Dataset({len(self):,} rows: {', '.join(c.name for c in self.schema.columns)})"

    @property
    def schema(self) -> Schema:
        """The columns."""
        return self.catalog.schema

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of schema and data: the same for the same rows, whatever file or view they are in."""
        return self.digest or _digest(self)

    def column(self, name: str) -> Array:
        """One column as stored: int32 ids, float32 numbers or int64 times; a view of the map where all rows are taken."""
        array = self.columns[self.schema[name].name]
        if isinstance(self.rows, range) and self.rows.step == 1:
            return array[self.rows.start : self.rows.stop]
        return array[self._at(np.arange(len(self)))]

    def take(self, rows: npt.NDArray[np.integer[Any]] | slice) -> Dataset:
        """A view of some rows, in the order given."""
        chosen = self.rows[rows] if isinstance(rows, slice) else self._at(np.arange(len(self))[rows])
        return dataclasses.replace(self, rows=chosen, digest="")

    def join(self, other: Dataset) -> Dataset:
        """The rows of two views of one dataset, one after the other: train and valid, for a last training.

        Raises:
            DataError: the two are not views of the same dataset.
        """
        if self.columns is not other.columns:
            raise DataError("only views of one dataset can be joined; save both as one file and ingest that")
        both = np.concatenate([self._at(np.arange(len(self))), other._at(np.arange(len(other)))])
        return dataclasses.replace(self, rows=both, digest="").counted()

    def head(self, n: int) -> Dataset:
        """A view of the first ``n`` rows."""
        return self.take(slice(0, n))

    def last(self) -> Dataset:
        """A view of each user's last row: with a history, one sequence a user, as SASRec is trained on."""
        order, last = ends(*_who_and_when(self))
        return self.take(np.sort(order[last]))

    def with_history(self, length: int, *, name: str = "history", liked: npt.NDArray[np.bool_] | None = None) -> Dataset:
        """The same rows with a column of the user's last ``length`` liked items from before each row's time, oldest first.

        Liked are rows with a positive label, unless ``liked`` bool [n] says otherwise; items without an id of their own are
        left out. The column is in memory (4 bytes an id) until it is saved.
        """
        item, (user, time) = self.schema.item, _who_and_when(self)
        kept = (self.column(self.schema.label.name) > 0 if liked is None else liked) & (self.column(item.name) >= FIRST)
        made = histories(user, self.column(item.name), time, kept, length)
        column = Column(name, "user", "sequence", item.size, length, shares=item.name)
        columns = {**{n: self.column(n) for n in self.columns}, name: made}
        catalog = self.catalog.replace(schema=Schema((*self.schema.columns, column)))
        return Dataset(catalog, columns, range(len(self)), "", self.window)

    def split(self, how: How = "time", fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
        """Train, valid and test.

        ``time`` cuts at two moments, so that nothing in a later part is older than anything in an earlier one; ``last``
        gives each user's last row to test and the one before to valid (users with fewer than three stay in train, and
        ``fractions`` is not read); ``user`` gives each user's earliest rows to train and latest to test, by ``fractions``;
        ``random`` draws rows; ``order`` cuts them as they lie, for data that comes with its parts one after the other.

        Raises:
            ConfigError: an unknown way, or fractions that are not positive and do not sum to 1.
            DataError: a part would be empty.
        """
        if how not in _SPLITS:
            raise ConfigError(f"unknown split {how!r}; known: {', '.join(_SPLITS)}")
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ConfigError(f"fractions {fractions} must be positive and sum to 1")
        part = _SPLITS[how](self, fractions, seed)
        for k, name in enumerate(Split._fields):
            if not (part == k).any():
                raise DataError(f"the {how} split leaves {name} empty ({len(self)} rows); give more rows or another split")
        train, valid, test = (self._part(part == k) for k in range(3))
        catalog = train.counted().catalog if self.catalog.items is not None else self.catalog
        return Split(*(dataclasses.replace(p, catalog=catalog) for p in (train, valid, test)))

    def batches(
        self,
        size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        start: int = 0,
        drop_last: bool = False,
        part: Callable[[int], tuple[int, int]] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of ``size`` rows, each a dict of tensors by column name.

        Categorical int64 [B]; sequence int64 [B, L], 0-padded; numeric float32 [B] or [B, N]; label float32 [B], or int64
        classes [B] where the label has a size; time int64 [B]. ``start`` skips that many batches without reading them. With
        ``part`` only those rows of each batch are read that it names, from the first to before the last, of so many.
        """
        if size < 1 or start < 0:
            raise ConfigError(f"batches of {size} rows from batch {start}: size must be at least 1 and start at least 0")
        for rows in _cut(self._order(shuffle, seed), size, start * size):
            if not drop_last or len(rows) == size:
                mine = rows if part is None else rows[slice(*part(len(rows)))]
                yield {c.name: _tensor(c, self._gather(c.name, mine)) for c in self.schema.columns}

    def _order(self, shuffle: bool, seed: int) -> Iterator[npt.NDArray[np.int64]]:
        """Every row number once, a window at a time; the pages of a past window are given back."""
        width = sum(a.nbytes // max(1, len(a)) for a in self.columns.values())
        blocks = np.arange(-(-len(self) // BLOCK), dtype=np.int64)
        if shuffle:
            blocks = np.random.default_rng(seed).permutation(blocks)
        together = max(1, self.window // (BLOCK * max(1, width)))
        for at in range(0, len(blocks), together):
            rows = (blocks[at : at + together, None] * BLOCK + np.arange(BLOCK)).ravel()
            rows = rows[rows < len(self)]
            yield np.random.default_rng((seed, at)).permutation(rows) if shuffle else rows
            if len(blocks) > together:
                self.release()

    def _gather(self, name: str, rows: npt.NDArray[np.int64]) -> Array:
        return self.columns[name].take(self._at(rows), axis=0)

    def _stretches(self) -> Iterator[npt.NDArray[np.int64]]:
        """All row numbers in order, some blocks at a time; the pages of past ones are given back."""
        for at in range(0, len(self), BLOCK * 16):
            yield np.arange(at, min(at + BLOCK * 16, len(self)))
            self.release()

    def release(self) -> None:
        """Give mapped pages back: they stay in the system's cache and no longer count as this process's memory."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)

    def _at(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where rows of this view lie in ``columns``."""
        return self.rows.start + self.rows.step * rows if isinstance(self.rows, range) else self.rows[rows]

    def _part(self, mask: npt.NDArray[np.bool_]) -> Dataset:
        """The rows of a mask; rows that lie together stay a slice of the map, which costs no row numbers."""
        rows = np.flatnonzero(mask)
        together = rows[-1] - rows[0] + 1 == len(rows)
        return self.take(slice(int(rows[0]), int(rows[-1]) + 1) if together else rows)

    def counted(self) -> Dataset:
        """The same rows, with the popularity of the catalog's items counted in them; items are found where there are none."""
        try:
            column = self.schema.item
        except ConfigError:
            return self
        counts, first = self._tally(column)
        items = self.catalog.items if self.catalog.items is not None else self._items(column, counts, first)
        popularity = pl.Series("popularity", counts[items[column.name].to_numpy()])
        return dataclasses.replace(self, catalog=self.catalog.replace(items=items.with_columns(popularity)))

    def described(self, items: pl.DataFrame) -> Dataset:
        """The same rows, with what there is to show of items (``title``, ``genres``, ``year``) in the catalog.

        ``items`` has the item column under its name, with values as before encoding, one row each; items without a row there
        show nothing, and of items that a hash throws together the first is shown.

        Raises:
            DataError: it has no such column, a value twice, or a column named like a feature of items.
        """
        name = self.schema.item.name
        taken = {*(c.name for c in self.schema.role("item")), "popularity"} - {name}
        if name not in items.columns or taken & set(items.columns):
            rule = f"it needs {name!r} and none of {', '.join(sorted(taken))}"
            raise DataError(f"the table of items has columns {', '.join(items.columns)}; {rule}")
        if items[name].n_unique() != len(items):
            raise DataError(f"the table of items has a {name!r} twice; keep one row each")
        ids = self.catalog.vocabulary(name).encode(items[name])
        shown = items.with_columns(pl.Series(name, ids)).filter(pl.col(name) >= FIRST).unique(name, keep="first")
        table = self.catalog.items if self.catalog.items is not None else self.counted().catalog.items
        assert table is not None, "a schema with items counts them"
        kept = table.select(c for c in table.columns if c in {name, *taken})
        joined = kept.join(shown, name, "left", maintain_order="left")
        return dataclasses.replace(self, catalog=self.catalog.replace(items=joined))

    def _tally(self, column: Column) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows of each item id, and the first of them, a block at a time: no copy of the column."""
        counts, first = np.zeros(column.size, np.int64), np.zeros(column.size, np.int64)
        for rows in self._stretches():
            ids, place, many = np.unique(self._gather(column.name, rows), return_index=True, return_counts=True)
            new = counts[ids] == 0
            first[ids[new]] = rows[place[new]]
            counts[ids] += many
        return counts, first

    def _items(self, column: Column, counts: npt.NDArray[np.int64], first: npt.NDArray[np.int64]) -> pl.DataFrame:
        """The items in the rows, with their features as first seen."""
        ids = np.flatnonzero(counts[FIRST:]) + FIRST
        others = [c.name for c in self.schema.role("item") if c.name != column.name]
        return pl.DataFrame({column.name: ids, **{name: self._gather(name, first[ids]) for name in others}})


def _counting(schema: Schema) -> dict[str, Vocabulary]:
    tables = (c for c in schema.features if c.size and not c.shares)
    return {c.name: Vocabulary.hashed(c.size) if c.hashed else Vocabulary.of(np.arange(c.size - FIRST)) for c in tables}


def _by_time(data: Dataset, fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.int8]:
    column = next(iter(data.schema.role("time")), None)
    if column is None:
        raise DataError("a split by time needs a column of role 'time'; name one, or split 'last' or 'random'")
    time = data.column(column.name)
    places = [min(len(time) - 1, int(len(time) * f)) for f in (fractions[0], fractions[0] + fractions[1])]
    cuts = np.partition(time, places)[places]
    return np.searchsorted(cuts, time, side="right").astype(np.int8)


def _who_and_when(data: Dataset) -> tuple[Array, Array | None]:
    """User and time of every row; None where rows have no time and stand in order."""
    time = next(iter(data.schema.role("time")), None)
    return data.column(data.schema.user.name), data.column(time.name) if time else None


def _by_last(data: Dataset, fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.int8]:
    return held_out(*_who_and_when(data))


def _by_chance(data: Dataset, fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.int8]:
    cuts = np.cumsum(fractions)[:2] * len(data)
    places = np.random.default_rng(seed).permutation(len(data))
    return np.searchsorted(cuts, places, side="right").astype(np.int8)


def _by_user(data: Dataset, fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.int8]:
    """Each user's rows in order of time; a user of two rows has them in train."""
    order, last = ends(*_who_and_when(data))
    counts = np.diff(last, prepend=-1)
    each = np.repeat(counts, counts)
    place = np.arange(len(data)) - np.repeat(last - counts + 1, counts)
    part = np.empty(len(data), np.int8)
    part[order] = np.searchsorted(np.cumsum(fractions)[:2], (place + 0.5) / each, side="right") * (each >= 3)
    return part


def _as_given(data: Dataset, fractions: tuple[float, float, float], seed: int) -> npt.NDArray[np.int8]:
    return np.searchsorted(np.cumsum(fractions)[:2] * len(data), np.arange(len(data)) + 0.5, side="right").astype(np.int8)


_SPLITS = {"time": _by_time, "last": _by_last, "user": _by_user, "random": _by_chance, "order": _as_given}


def _cut(chunks: Iterator[npt.NDArray[np.int64]], size: int, skip: int) -> Iterator[npt.NDArray[np.int64]]:
    """Batches of ``size`` from a stream of chunks, after the first ``skip`` rows; the last may be shorter."""
    rest = np.empty(0, np.int64)
    for chunk in chunks:
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        rest, skip = np.concatenate([rest, chunk[skip:]]), 0
        whole = len(rest) - len(rest) % size
        yield from (rest[i : i + size] for i in range(0, whole, size))
        rest = rest[whole:]
    if len(rest):
        yield rest


def _tensor(column: Column, array: Array) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.long() if array.dtype == np.int32 else tensor


def storage(column: Column) -> type[np.generic]:
    """The type a column is stored as; ids take 4 bytes, which holds two thousand million of them."""
    if column.role == "time":
        return np.int64
    if column.kind == "numeric" and not (column.role == "label" and column.size):
        return np.float32
    return np.float32 if column.role == "label" and not column.size else np.int32


def _stored(column: Column, columns: Mapping[str, Array]) -> Array:
    """One given column checked and in its storage type."""
    if column.name not in columns:
        raise DataError(f"no column {column.name!r}; given: {', '.join(columns) or 'none'}")
    given = np.asarray(columns[column.name])
    want = (column.length,) if column.length else ()
    if given.shape[1:] != want:
        raise DataError(f"column {column.name!r} has rows of shape {given.shape[1:]}, its schema says {want}")
    kind = storage(column)
    if given.dtype.kind not in "biuf" or (kind != np.float32 and given.dtype.kind == "f"):
        raise DataError(f"column {column.name!r} holds {given.dtype}, it needs {kind.__name__}; encode it first")
    check(column, given)
    return np.ascontiguousarray(given, kind)


def check(column: Column, values: Array, at: int = 0) -> None:
    """Refuse ids outside the column's size, and labels, numbers or times that are missing; ``at`` is the first row's number.

    Raises:
        DataError: names the column, the row and the value.
    """
    if storage(column) is np.int32:
        bad = (values < 0) | (values >= column.size)
        says = f"is outside its {column.size} {'classes' if column.role == 'label' else 'ids'}"
    elif values.dtype.kind == "f":
        bad, says = ~np.isfinite(values), "is not a finite number"
    else:
        return
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))[0])
        value = values[row] if values.ndim == 1 else values[row][bad[row]][0]
        many = f"{int(bad.sum())} such value(s) here, correct or drop them"
        raise DataError(f"column {column.name!r}, row {at + row}: {value} {says}; {many}")


def _digest(data: Dataset) -> str:
    sha = hashlib.sha256(dumps(data.schema).encode())
    for column in data.schema.columns:
        for rows in data._stretches():
            sha.update(data._gather(column.name, rows).data)
    return sha.hexdigest()


def _head(root: Path) -> dict[str, Any]:
    try:
        head = json.loads((root / "dataset.json").read_bytes())
        return {"rows": int(head["rows"]), "sha256": str(head["sha256"]), "files": [Path(f).name for f in head["files"]]}
    except FileNotFoundError as error:
        hint = "ingest one with Dataset.read_csv or read_parquet"
        raise DataError(f"{root} holds no dataset (no dataset.json); {hint}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{root}/dataset.json is damaged ({error}); ingest the data again") from error


def _arrow(column: Column) -> pa.DataType:
    scalar = pa.from_numpy_dtype(storage(column))
    return pa.list_(scalar, column.length) if column.length else scalar


def _mapped(path: Path, schema: Schema, access: int = mmap.ACCESS_READ) -> tuple[dict[str, Array], mmap.mmap]:
    """The columns of an Arrow file with one record batch as arrays over the map, without a copy."""
    with open(path, "rb" if access == mmap.ACCESS_READ else "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=access)
    whole = pa.py_buffer(mapped)
    batch = pa.ipc.open_file(whole).get_batch(0)
    return {c.name: _array(c, batch.column(c.name), whole, mapped) for c in schema.columns}, mapped


def _array(column: Column, values: pa.Array, whole: pa.Buffer, mapped: mmap.mmap) -> Array:
    flat = values.flatten() if column.length else values
    buffer = flat.buffers()[1]
    array = np.frombuffer(mapped, storage(column), len(flat), buffer.address - whole.address)
    return array.reshape(-1, column.length) if column.length else array


class Store:
    """A dataset being written: columns of known length that are filled in place."""

    def __init__(self, root: Path, catalog: Catalog, rows: int) -> None:
        self.root, self.catalog, self.rows = root, catalog, rows
        path = root / "rows.arrow"
        _allocate(path, catalog.schema, rows)
        self.columns, self._map = _mapped(path, catalog.schema, mmap.ACCESS_WRITE)

    def put(self, at: int, columns: Mapping[str, Array]) -> None:
        """Write rows from ``at`` on."""
        for name, values in columns.items():
            self.columns[name][at : at + len(values)] = values
        self._map.madvise(mmap.MADV_DONTNEED)  # the map is shared: what was written is the file's, and no longer our memory

    def whole(self) -> Dataset:
        """The rows as a dataset, once all are put."""
        return Dataset(self.catalog, self.columns, range(self.rows), "", WINDOW, self._map)

    def close(self) -> None:
        """Flush the rows and write the catalog and the head."""
        self._map.flush()
        files = self.catalog.files()
        for name, content in files.items():
            write(self.root / name, content)
        head = {"rows": self.rows, "sha256": _digest(self.whole()), "files": sorted(files)}
        write(self.root / "dataset.json", dumps(head))


class writing:
    """A folder written whole or not at all: rows and catalog go to a neighbour that is renamed at the end.

    The rows are allocated first, so a disk that cannot hold them says so before any work is done.
    """

    def __init__(self, path: str | os.PathLike[str], catalog: Catalog, rows: int) -> None:
        self.target, self.catalog, self.rows = Path(path), catalog, rows
        if not rows:
            raise DataError("a dataset needs at least one row, got none")

    def __enter__(self) -> Store:
        other = self.target.exists() and not (self.target / "dataset.json").is_file()
        if other and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise StorageError(f"{self.target} exists and is not a dataset; name another folder or remove it first")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.root = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
            self.store = Store(self.root, self.catalog, self.rows)
        except OSError as error:
            self._abandon()
            raise _storage(self.target, error) from error
        return self.store

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            self.store.close()
            _swap(self.root, self.target)
        except OSError as failed:
            self._abandon()
            raise _storage(self.target, failed) from failed

    def _abandon(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` at ``target``; what stands there is put aside first and put back if that fails."""
    aside = new.with_name(f"{new.name}.old")
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    target.chmod(0o755)
    shutil.rmtree(aside, ignore_errors=True)


def _allocate(path: Path, schema: Schema, rows: int) -> None:
    fields = pa.schema([pa.field(c.name, _arrow(c), nullable=False) for c in schema.columns])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, fields) as writer:
        writer.write_batch(pa.record_batch([_zeros(c, rows) for c in schema.columns], schema=fields))


def _zeros(column: Column, rows: int) -> pa.Array:
    """Zeros the kernel has not handed out yet: writing them costs disk, not memory."""
    flat = pa.array(np.zeros(rows * max(1, column.length), storage(column)))
    return pa.FixedSizeListArray.from_arrays(flat, column.length) if column.length else flat


def _storage(path: Path, error: OSError) -> StorageError:
    remedy = "free some room or name another folder"
    return StorageError(f"could not write the dataset {path}: {error.strerror or error}; {remedy}")
