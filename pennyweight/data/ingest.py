"""CSV and Parquet into a Dataset, a chunk at a time.

Polars reads the files lazily and sinks the columns asked for into one temporary Arrow file; two passes over its record
batches follow. The first counts values and learns the vocabularies, the second writes ids and numbers into columns that
were allocated at their full size, so a full disk is noticed before the work and not in the middle of it. At no time is
more than a chunk (and the vocabularies) in memory. Reading everything with ``read_csv`` is one line shorter and ends at
the size of memory; encoding without the temporary file would parse the text twice.

Every CSV field is read as text and converted here, so that an error names the column, the row and the value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.ipc

from pennyweight.core.errors import ConfigError, DataError, StorageError
from pennyweight.data.catalog import Catalog, Ids, Vocabulary, pad
from pennyweight.data.dataset import Dataset, check, storage, writing
from pennyweight.data.schema import FIRST, Column, Kind, Role, Schema

CHUNK = 65_536
"""Rows that are in memory at a time."""

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Numbers of the system's errors that are about writing."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """One column to be made, and what of the files it is made from."""

    name: str
    role: Role
    kind: Kind
    source: str | tuple[str, ...] = ""
    """The column in the files, when it is called otherwise; several for a vector of numbers."""
    hashed: bool = False
    """Ids by hash into a table of ``size``, without a vocabulary."""
    size: int = 0
    """Ids there may be, the two reserved ones included: the table of a hashed column, the limit of a learned one (0: none).
    Classes of a label."""
    min_count: int = 1
    """A value seen less often is out of vocabulary; 2 or more also trains that id."""
    overflow: Literal["error", "oov"] = "error"
    """What more distinct values than ``size`` allows mean: an error, or that the rarest are out of vocabulary."""
    length: int = 0
    """Ids a row of a sequence holds."""
    separator: str = " "
    """What stands between the values of a sequence that is text."""
    shares: str = ""
    """The column whose vocabulary this one uses."""
    fill: float | None = None
    """The number that stands for a missing one; without it a missing number is an error."""

    def __post_init__(self) -> None:
        if self.hashed and self.size <= FIRST:
            raise ConfigError(f"column {self.name!r} is hashed into {self.size} ids; give a size of at least {FIRST + 1}")
        if isinstance(self.source, tuple) and (self.kind != "numeric" or self.role in ("label", "time") or not self.source):
            raise ConfigError(f"column {self.name!r}: only a numeric feature can be made from several columns")
        if self.kind == "sequence" and not self.separator:
            raise ConfigError(f"column {self.name!r}: a sequence needs a separator that is not empty")

    @property
    def sources(self) -> tuple[str, ...]:
        """The columns of the files this one is made from."""
        return self.source if isinstance(self.source, tuple) else (self.source or self.name,)

    @property
    def coded(self) -> bool:
        """Whether it holds ids from a vocabulary or hash."""
        return self.kind in ("categorical", "sequence") and self.role not in ("label", "time")


def read_csv(
    paths: Paths,
    columns: Sequence[ColumnSpec],
    out: str | os.PathLike[str],
    *,
    separator: str = ",",
    header: bool = True,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    items: pl.DataFrame | None = None,
) -> Dataset:
    """Ingest UTF-8 CSV files, plain or gzipped, one after the other, into the folder ``out``.

    Without a ``header`` the columns are called ``column_1``, ``column_2`` and so on. ``vocabularies`` by column name are used
    as they are instead of learned (for a test file: those of the training file's catalog). ``items`` is what there is to
    show of items, see ``Dataset.described``.

    Raises:
        DataError: a file or column is missing, a file is truncated or not UTF-8, a value is of the wrong type or missing, a
            vocabulary overflows, or there are no rows.
        StorageError: the disk is full.
    """
    files = _files(paths)
    return _ingest(
        lambda: pl.scan_csv(
            files,
            infer_schema=False,
            separator=separator,
            has_header=header,
            glob=False,
            with_column_names=None if header else _counted,
        ),
        files,
        columns,
        out,
        vocabularies or {},
        items,
    )


def read_parquet(
    paths: Paths,
    columns: Sequence[ColumnSpec],
    out: str | os.PathLike[str],
    *,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    items: pl.DataFrame | None = None,
) -> Dataset:
    """Ingest Parquet files into the folder ``out``; see ``read_csv``. A sequence may be a list column."""
    files = _files(paths)
    return _ingest(lambda: pl.scan_parquet(files, glob=False), files, columns, out, vocabularies or {}, items)


def _counted(names: list[str]) -> list[str]:
    """Names for columns without: Polars' own begin at 0 or 1 by its version."""
    return [f"column_{k}" for k in range(1, len(names) + 1)]


def _files(paths: Paths) -> list[Path]:
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not files:
        raise DataError("no files to read; name at least one")
    for file in files:
        if not file.is_file():
            raise DataError(f"no file {file}; check the path")
    return files


def _ingest(
    scan: Callable[[], pl.LazyFrame],
    files: Sequence[Path],
    columns: Sequence[ColumnSpec],
    out: str | os.PathLike[str],
    given: Mapping[str, Vocabulary],
    items: pl.DataFrame | None,
) -> Dataset:
    target = Path(out)
    _consistent(columns)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            raw = Raw(_sink(scan, files, columns, Path(folder) / "raw.arrow"), columns)
            vocabularies = {**_vocabularies(raw, [c for c in columns if c.name not in given]), **given}
            return _encode(raw, columns, vocabularies, items, target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        remedy = "free some room or name another folder"
        raise StorageError(f"could not write near {target}: {error.strerror or error}; {remedy}") from error


def _consistent(columns: Sequence[ColumnSpec]) -> None:
    names = {c.name: c for c in columns}
    for c in columns:
        owner = names.get(c.shares)
        if c.shares and (owner is None or not owner.coded or owner.shares):
            rule = "which is not a column with one of its own"
            raise ConfigError(f"column {c.name!r} shares the vocabulary of {c.shares!r}, {rule}")


def _sink(scan: Callable[[], pl.LazyFrame], files: Sequence[Path], columns: Sequence[ColumnSpec], raw: Path) -> Path:
    """The columns asked for, as one Arrow file of small record batches."""
    named = ", ".join(map(str, files))
    wanted = list(dict.fromkeys(s for c in columns for s in c.sources))
    try:
        frame = scan()
        there = frame.collect_schema().names()
        lacking = [w for w in wanted if w not in there]
        if lacking:
            raise DataError(f"{named}: no column {', '.join(lacking)}; there are: {', '.join(there)}")
        frame.select(wanted).sink_ipc(raw, record_batch_size=CHUNK)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{named}: empty; give a file with rows") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{named}: cannot be read ({_reason(error)})") from error
    except OSError as error:
        told = re.search(r"os error (\d+)", str(error))  # Polars hides the number; none: a gzip stream ended too early
        if told and int(told[1]) in _REFUSED:
            raise OSError(int(told[1]), os.strerror(int(told[1]))) from error
        raise DataError(f"{named}: cannot be read ({error}); the file is truncated or damaged, fetch it again") from error
    return raw


def _reason(error: Exception) -> str:
    first = str(error).splitlines()[0]
    if "utf-8" in first.lower():
        return f"{first}: the text is not UTF-8; convert it first, for example with iconv -f latin1 -t utf8"
    return f"{first}; correct the file"


class Raw:
    """The temporary Arrow file, read a record batch at a time."""

    def __init__(self, path: Path, columns: Sequence[ColumnSpec]) -> None:
        self.columns = columns
        self._path = path
        with pa.OSFile(str(path)) as file:
            self.rows = pa.ipc.open_file(file).count_rows()
        if not self.rows:
            raise DataError("the files hold a header and no rows; give a file with rows")

    def chunks(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """Each chunk with the number of its first row."""
        at = 0
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for k in range(reader.num_record_batches):
                frame = pl.DataFrame(reader.get_batch(k))
                yield at, frame
                at += len(frame)


def _vocabularies(raw: Raw, columns: Sequence[ColumnSpec]) -> dict[str, Vocabulary]:
    """Vocabularies of the columns that have one of their own: hashed, or learned from all columns that use them."""
    own = [c for c in columns if c.coded and not c.shares]
    learned = [c for c in own if not c.hashed]
    counts = {c.name: pl.DataFrame() for c in learned}
    if learned:
        for _, frame in raw.chunks():
            for c in learned:
                users = [u for u in raw.columns if u.name == c.name or u.shares == c.name]
                counts[c.name] = _count(counts[c.name], [_values(u, frame)[0] for u in users])
    return {c.name: Vocabulary.hashed(c.size) if c.hashed else _learn(c, counts[c.name]) for c in own}


def _count(counts: pl.DataFrame, values: Sequence[pl.Series]) -> pl.DataFrame:
    new = [v.drop_nulls().value_counts(name="n").rename({v.name: "value"}) for v in values]
    return pl.concat([f for f in (counts, *new) if f.width]).group_by("value").agg(pl.col("n").sum())


def _learn(column: ColumnSpec, counts: pl.DataFrame) -> Vocabulary:
    kept = counts.filter(pl.col("n") >= column.min_count)
    if column.size and len(kept) + FIRST > column.size and column.overflow == "error":
        raise DataError(
            f"column {column.name!r}: vocabulary overflow, {len(kept)} values and {FIRST} reserved ids in a size of "
            f"{column.size}; raise size or min_count, or set overflow='oov' or hashed=True"
        )
    vocabulary = Vocabulary.learn(kept)
    return vocabulary.head(column.size - FIRST) if column.size else vocabulary


def _encode(
    raw: Raw, columns: Sequence[ColumnSpec], vocabularies: Mapping[str, Vocabulary], items: pl.DataFrame | None, out: Path
) -> Dataset:
    schema = Schema(tuple(_column(c, vocabularies) for c in columns))
    catalog = Catalog(schema, {n: v for n, v in vocabularies.items() if n in schema})
    with writing(out, catalog, raw.rows) as store:
        for at, frame in raw.chunks():
            for spec, column in zip(columns, schema.columns, strict=True):
                values = _coded(spec, column, frame, vocabularies) if spec.coded else _numbers(spec, column, frame, at)
                store.put(at, {spec.name: values})
        whole = store.whole().counted()
        store.catalog = (whole if items is None else whole.described(items)).catalog
    return Dataset.open(out)


def _column(spec: ColumnSpec, vocabularies: Mapping[str, Vocabulary]) -> Column:
    if not spec.coded:
        length = len(spec.source) if isinstance(spec.source, tuple) else 0
        return Column(spec.name, spec.role, spec.kind, spec.size if spec.role == "label" else 0, length)
    vocabulary = vocabularies[spec.shares or spec.name]
    if vocabulary.size <= FIRST:
        raise DataError(f"column {spec.name!r}: no value is seen {spec.min_count} times or more; lower min_count")
    return Column(spec.name, spec.role, spec.kind, vocabulary.size, spec.length, spec.shares, bool(vocabulary.buckets))


def _values(spec: ColumnSpec, frame: pl.DataFrame) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """The values of a column one after the other, and how many each row has."""
    series = frame[spec.sources[0]]
    if spec.kind == "categorical":
        return _plain(spec, series), np.ones(len(series), np.int64)
    if not isinstance(series.dtype, (pl.List, pl.Array)):
        series = series.cast(pl.String).str.split(spec.separator).list.filter(pl.element() != "")
    lists = series.cast(pl.List(series.dtype.inner)).fill_null([])  # type: ignore[attr-defined]
    return _plain(spec, lists.explode(empty_as_null=False)), lists.list.len().to_numpy().astype(np.int64)


def _plain(spec: ColumnSpec, series: pl.Series) -> pl.Series:
    """Whole numbers or texts; other types have no stable text to be looked up by."""
    if series.dtype.is_integer() or series.dtype == pl.String:
        return series
    if series.dtype in (pl.Categorical, pl.Enum, pl.Boolean):
        return series.cast(pl.String)
    rule = f"a {spec.kind} column needs whole numbers or texts"
    raise DataError(f"column {spec.name!r} holds {series.dtype}; {rule}, cast it first")


def _coded(spec: ColumnSpec, column: Column, frame: pl.DataFrame, vocabularies: Mapping[str, Vocabulary]) -> Ids:
    values, counts = _values(spec, frame)
    ids = vocabularies[spec.shares or spec.name].encode(values)
    return pad(ids, counts, column) if spec.kind == "sequence" else ids


def _numbers(spec: ColumnSpec, column: Column, frame: pl.DataFrame, at: int) -> npt.NDArray[Any]:
    """A label, time, number or vector of numbers, checked."""
    parts = [_number(spec, column, frame[s], at) for s in spec.sources]
    values = np.stack(parts, axis=1) if column.length else parts[0]
    check(column, values, at)
    return values


def _number(spec: ColumnSpec, column: Column, series: pl.Series, at: int) -> npt.NDArray[Any]:
    kind = pl.Float32 if storage(column) is np.float32 else pl.Int64
    numbers = _seconds(series) if spec.role == "time" else series.cast(kind, strict=False)
    noun = spec.role if spec.role in ("label", "time") else "number"
    wrong = (numbers.is_null() & series.is_not_null()).arg_true()
    if len(wrong):
        row = int(wrong[0])
        many = f"{len(wrong)} such value(s) here, correct or drop them"
        raise DataError(f"column {spec.name!r}, row {at + row}: {series[row]!r} is not a {noun}; {many}")
    if numbers.null_count() and spec.fill is None:
        row = int(numbers.is_null().arg_true()[0])
        raise DataError(f"column {spec.name!r}, row {at + row}: the {noun} is missing; drop such rows or give fill")
    return numbers.fill_null(spec.fill).to_numpy() if numbers.null_count() else numbers.to_numpy()


def _seconds(series: pl.Series) -> pl.Series:
    """Times as seconds since 1970, from whole numbers, dates, or ISO 8601 text."""
    if series.dtype.is_temporal():
        return series.cast(pl.Datetime("us")).dt.epoch("s")
    numbers = series.cast(pl.Int64, strict=False)
    if series.dtype == pl.String and numbers.null_count() > series.null_count():
        with contextlib.suppress(pl.exceptions.ComputeError):  # no format fits: they stay missing
            return series.str.to_datetime(strict=False, time_unit="us").dt.epoch("s")
    return numbers
