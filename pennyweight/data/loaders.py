"""Public data sets by their documented formats, from a folder the user names; none is shipped (but the sample).

Each loader writes one dataset and gives its train, valid and test as views of it. Where a set has a fixed split it is
kept row by row, since that is what makes published figures comparable; where it has none, the split is drawn with a
seed, stratified by the label. Formats are read as they are documented and anything else is refused: guessing a format is
how a benchmark goes wrong in silence.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.catalog import Ids, Vocabulary, pad
from pennyweight.data.dataset import Array, Dataset, Split
from pennyweight.data.history import ends, held_out, histories
from pennyweight.data.schema import FIRST, Column, Role, Schema

Place = str | os.PathLike[str]
TRAIN, VALID, TEST = 0, 1, 2
TOKEN = r"[\p{L}\p{N}]+|[^\p{L}\p{N}\s]"
"""A token: a run of letters and digits, or any other single character that is not a space."""


def load(name: str, path: Place, out: Place) -> Split:
    """One of the public sets from its folder, with the loader's own defaults.

    Raises:
        ConfigError: no loader of that name.
        DataError: a file is missing, truncated, or not in the documented format.
        StorageError: ``out`` cannot be written.
    """
    if name not in LOADERS:
        raise ConfigError(f"no loader {name!r}; known: {', '.join(LOADERS)}")
    return LOADERS[name](path, out)


def frappe(path: Place, out: Place) -> Split:
    """Frappe x1 as BARS splits it: ten categorical fields of context-aware app usage and a click.

    Ids in the files count through all fields; here each field has a vocabulary of its own, learned from train.
    """
    parts = [_csv(Path(path) / f"{part}.csv.gz") for part in ("train", "valid", "test")]
    names = parts[0].columns
    if names[:3] != ["label", "user", "item"] or any(p.columns != names for p in parts):
        raise DataError(f"{path}: headers are {[p.columns for p in parts]}; label,user,item,... in all three is needed")
    words = {n: _learned(parts[0][n]) for n in names[1:]}
    whole = pl.concat(parts)
    columns: dict[str, Array] = {n: words[n].encode(whole[n]) for n in words} | {"label": whole["label"].to_numpy()}
    roles: Mapping[str, Role] = {"user": "user", "item": "item"}
    features = [_id(n, w, roles.get(n, "context")) for n, w in words.items()]
    schema = Schema((*features, Column("label", "label", "numeric")))
    return _parted(columns, schema, words, np.repeat(range(3), [len(p) for p in parts]), out)


def ml_1m(path: Place, out: Place, *, form: Literal["sequences", "pairs", "ratings"] = "sequences", length: int = 0) -> Split:
    """MovieLens 1M, the last interaction of each user to test and the one before to valid.

    ``sequences`` and ``pairs`` read SASRec's own ``sasrec.txt.gz`` (``user item`` in time order; every rating counts).
    ``sequences`` has a row a user and part: an item and the ``length`` items before it; the row of train is all one needs
    to train on, since inside it each item is the answer to those before. ``pairs`` has every interaction. ``ratings`` reads
    ``ratings.csv.gz``, ``users.dat`` and ``movies.dat``: label 1 for 4 stars or more, side features, liked history. A
    history's ``length`` is 200, as in SASRec, or 50 with ``ratings``.
    """
    root = Path(path)
    if form == "ratings":
        return _ratings(root, out, length or 50)
    pairs = _csv(root / "sasrec.txt.gz", separator=" ", header=False)
    if pairs.width != 2:
        raise DataError(f"{root / 'sasrec.txt.gz'}: {pairs.width} numbers a line; a user and an item are needed")
    return _interactions(pairs[:, 0].to_numpy(), pairs[:, 1].to_numpy(), out, form, length or 200)


def amazon_beauty(path: Place, out: Place, *, form: Literal["sequences", "pairs"] = "sequences", length: int = 50) -> Split:
    """Amazon Beauty as S3-Rec cut it: a line is ``user item item ...`` in time order; see ``ml_1m`` for the forms.

    Items carry an ``attribute`` sequence (categories and brand).
    """
    root = Path(path)
    user, item = _baskets(root / "Beauty.txt")
    attributes = _attributes(root / "Beauty_item2attributes.json")
    return _interactions(user, item, out, form, length, attributes)


def gowalla(path: Place, out: Place, *, holdout: float = 0.05, seed: int = 0) -> Split:
    """Gowalla as LightGCN split it: a line is ``user item item ...``, without times.

    There is no validation part, so a share ``holdout`` of train is drawn for it; ``train.join(valid)`` is LightGCN's train.
    """
    if not 0 < holdout < 1:
        raise ConfigError(f"holdout {holdout} must be between 0 and 1")
    parts = [_baskets(Path(path) / f"{part}.txt.gz") for part in ("train", "test")]
    user, item = (np.concatenate([p[k] for p in parts]) for k in range(2))
    part = np.repeat([TRAIN, TEST], [len(p[0]) for p in parts])
    part[: len(parts[0][0])][np.random.default_rng(seed).random(len(parts[0][0])) < holdout] = VALID
    users, items = _numbered(user), _numbered(item)
    columns: dict[str, Array] = {"user": users.encode(user), "item": items.encode(item)}
    columns["label"] = np.ones(len(user), np.float32)
    schema = Schema((_id("user", users, "user"), _id("item", items, "item"), Column("label", "label", "numeric")))
    return _parted(columns, schema, {"user": users, "item": items}, part, out)


def credit_default(path: Place, out: Place, *, fold: int = 0, seed: int = 0) -> Split:
    """Taiwan credit-card customers (Yeh and Lien 2009): 23 features; the last column says who defaulted.

    SEX, EDUCATION, MARRIAGE and the six PAY_ states are categorical, the rest numbers as they are (dollars and years), so a
    model should normalize its input. Split 80/10/10, stratified; ``fold`` of ten is the test part.
    """
    _one_of(fold, 10)
    file = Path(path) / "UCI_Credit_Card.csv"
    frame = _csv(file)
    coded = [
        "SEX",
        "EDUCATION",
        "MARRIAGE",
        *(c for c in frame.columns if c.startswith("PAY_") and not c.startswith("PAY_AMT")),
    ]
    label = frame.columns[-1]
    numbers = [c for c in frame.columns[1:-1] if c not in coded]
    if len(coded) + len(numbers) != 23 or not set(coded) <= set(frame.columns):
        raise DataError(f"{file}: columns are {', '.join(frame.columns)}; an ID, 23 features and a label are needed")
    words = {c: Vocabulary.of(frame[c].unique().sort()) for c in coded}
    columns: dict[str, Array] = {c: words[c].encode(frame[c]) for c in coded}
    columns |= {c: frame[c].to_numpy() for c in numbers} | {"label": frame[label].to_numpy()}
    features = [_id(c, words[c], "context") for c in coded] + [Column(c, "context", "numeric") for c in numbers]
    schema = Schema((*features, Column("label", "label", "numeric")))
    tenth = (_stratified(columns["label"], (0.1,) * 10, seed) + fold) % 10
    return _parted(columns, schema, words, np.select([tenth == 9, tenth == 8], [TEST, VALID], TRAIN), out)


def mnist(path: Place, out: Place, *, fold: int = 0, seed: int = 0) -> Split:
    """5,000 handwritten digits: ``x`` is 784 pixels from 0 to 1, the label one of 10 classes; 3,500/500/1,000, stratified.

    ``fold`` of five is the test part; an eighth of the rest is valid.
    """
    _one_of(fold, 5)
    file = Path(path) / "mnist_5k.csv.gz"
    table = _csv(file, header=False).to_numpy()
    if table.shape[1] != 785 or table.min() < 0 or table[:, :784].max() > 255 or table[:, 784].max() > 9:
        found = f"{table.shape[1]} numbers a line from {table.min()} to {table.max()}"
        raise DataError(f"{file}: {found}; 784 pixels (0-255) and a digit are needed")
    columns = {"x": (table[:, :784] / 255).astype(np.float32), "label": table[:, 784]}
    schema = Schema((Column("x", "context", "numeric", 0, 784), Column("label", "label", "numeric", 10)))
    test = _stratified(columns["label"], (0.2,) * 5, seed) == fold
    part = np.full(len(test), TEST)
    part[~test] = _stratified(columns["label"][~test], (0.875, 0.125), seed + 1)
    return _parted(columns, schema, {}, part, out)


def movie_review(path: Place, out: Place, *, fold: int = 0, length: int = 56, seed: int = 0) -> Split:
    """Sentences of movie reviews (Pang and Lee 2005), 1 for positive: ``text`` is a sequence of token ids.

    ``fold`` of ten is the test part; a tenth of the rest, drawn, is valid. The vocabulary is learned from train alone, from
    tokens seen twice; see ``tokens``.
    """
    _one_of(fold, 10)
    file = Path(path) / "rt-polarity.all"
    lines = _lines(file, "latin-1")
    label, text = _labelled(file, [line.split(" ", 1) for line in lines], {"0": 0.0, "1": 1.0})
    tenth = _stratified(label, (0.1,) * 10, seed)
    rest = _stratified(label, (0.9, 0.1), seed + 1)
    return _texts(label, text, np.where(tenth == fold, TEST, rest), length, out)


def sms_spam(path: Place, out: Place, *, length: int = 64, seed: int = 0) -> Split:
    """Text messages (Almeida and Hidalgo 2011), 1 for spam: ``text`` is a sequence of token ids; 80/10/10, stratified."""
    file = Path(path) / "SMSSpamCollection"
    label, text = _labelled(file, [line.split("\t", 1) for line in _lines(file)], {"ham": 0.0, "spam": 1.0})
    return _texts(label, text, _stratified(label, (0.8, 0.1, 0.1), seed), length, out)


def tokens(text: pl.Series) -> pl.Series:
    """Lower-cased tokens of each text: runs of letters and digits, and every other character that is not a space by itself."""
    return text.str.to_lowercase().str.extract_all(TOKEN)


LOADERS: Mapping[str, Callable[[Place, Place], Split]] = {
    "frappe-x1": frappe,
    "ml-1m": ml_1m,
    "gowalla": gowalla,
    "amazon-beauty": amazon_beauty,
    "credit-default": credit_default,
    "mnist-5k": mnist,
    "movie-review": movie_review,
    "sms-spam": sms_spam,
}


def _interactions(
    user: Ids, item: Ids, out: Place, form: str, length: int, attributes: Mapping[int, Sequence[int]] | None = None
) -> Split:
    """Interactions in time order, with the last of each user left out."""
    if form not in ("sequences", "pairs"):
        raise ConfigError(f"unknown form {form!r}; known: sequences, pairs")
    users, items = _numbered(user), _numbered(item)
    who, what, ones = users.encode(user), items.encode(item), np.ones(len(user), np.float32)
    part, words = held_out(user), {"user": users, "item": items}
    columns: dict[str, Array] = {"user": who, "item": what, "label": ones, "time": _position(user)}
    features = [_id("user", users, "user"), _id("item", items, "item"), *_LABEL_TIME]
    facts: dict[str, Array] = {}
    if attributes is not None:
        words["attribute"], column, values = _attribute(items, attributes)
        columns["attribute"], facts["attribute"] = values[what], values[FIRST:]
        features.append(column)
    table = _items(items, what[part == TRAIN], facts)
    if form == "sequences":
        order, last = ends(user, least=3)
        rows = np.concatenate([order[last - 2], order[last - 1], order[last]])
        columns, part = {n: c[rows] for n, c in columns.items()}, part[rows]
        columns["history"] = histories(who, what, None, ones > 0, length, rows)
        features.append(Column("history", "user", "sequence", items.size, length, shares="item"))
    return _parted(columns, Schema(tuple(features)), words, part, out, table)


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Side features of users or items: a row for each of ``key``."""

    key: pl.Series
    words: dict[str, Vocabulary]
    facts: dict[str, Array]
    columns: tuple[Column, ...]

    def of(self, wanted: pl.Series) -> dict[str, Array]:
        """The features of each wanted key."""
        rows = _place(self.key, wanted)
        return {name: fact[rows] for name, fact in self.facts.items()}


def _ratings(root: Path, out: Place, length: int) -> Split:
    """MovieLens 1M with its ratings and the side features of users and movies."""
    ratings = _csv(root / "ratings.csv.gz")
    _named(root / "ratings.csv.gz", ratings, ("user_id", "position", "movie_id", "rating"))
    (movies, shown), people = _movies(root / "movies.dat"), _people(root / "users.dat")
    user, item, time = ratings["user_id"], ratings["movie_id"], ratings["position"].to_numpy()
    users, items, liked = _numbered(user.to_numpy()), _numbered(item.to_numpy()), (ratings["rating"] >= 4).to_numpy()
    who, what = users.encode(user), items.encode(item)
    columns = {"user": who, **people.of(user), "item": what, **movies.of(item), "label": liked, "time": time}
    columns["history"] = histories(who, what, time, liked, length)
    history = Column("history", "user", "sequence", items.size, length, shares="item")
    features = [_id("user", users, "user"), *people.columns, _id("item", items, "item"), *movies.columns, *_LABEL_TIME, history]
    words, part = {"user": users, **people.words, "item": items, **movies.words}, held_out(who, time)
    values = pl.Series("movie_id", items.values)
    table = _items(items, what[part == TRAIN], movies.of(values)).hstack(shown[_place(movies.key, values)])
    return _parted(columns, Schema(tuple(features)), words, part, out, table)


def _people(file: Path) -> Side:
    people = _fields(file, "::", ("user", "gender", "age", "occupation", "zip"))
    words = {n: _learned(people[n]) for n in ("gender", "age", "occupation")}
    facts = {n: w.encode(people[n]) for n, w in words.items()}
    return Side(people["user"], words, facts, tuple(_id(n, w, "user") for n, w in words.items()))


def _movies(file: Path) -> tuple[Side, pl.DataFrame]:
    """Features of movies, and what to show of them."""
    movies = _fields(file, "::", ("item", "title", "genres"))
    genres, year = movies["genres"].str.split("|"), movies["title"].str.extract(r"\((\d{4})\)$")
    flat, counts = genres.explode(), genres.list.len().to_numpy()
    words = {"genre": _learned(flat), "era": _learned(year)}
    genre = Column("genre", "item", "sequence", words["genre"].size, int(counts.max()))
    facts = {"genre": pad(words["genre"].encode(flat), counts, genre), "era": words["era"].encode(year)}
    title = movies["title"].str.replace(r"\s*\(\d{4}\)$", "")
    shown = pl.DataFrame({"title": title, "genres": genres.list.join(", "), "year": year.cast(pl.Int64)})
    return Side(movies["item"], words, facts, (genre, _id("era", words["era"], "item"))), shown


def _items(items: Vocabulary, train: Ids, facts: Mapping[str, Array]) -> pl.DataFrame:
    """The table of all items: ids, popularity in these rows, and features in the order of ids."""
    counts = np.bincount(train, minlength=items.size)[FIRST:]
    return pl.DataFrame({"item": np.arange(FIRST, items.size), **facts, "popularity": counts})


def _attribute(items: Vocabulary, attributes: Mapping[int, Sequence[int]]) -> tuple[Vocabulary, Column, Ids]:
    """The attributes' vocabulary, their column, and int64 [item ids, L] by item id."""
    lists = [list(attributes.get(int(v), ())) for v in items.values.to_pylist()]
    flat = np.array([a for row in lists for a in row], np.int64)
    words, counts = _numbered(flat), np.array([0] * FIRST + [len(row) for row in lists])
    column = Column("attribute", "item", "sequence", words.size, int(counts.max()))
    return words, column, pad(words.encode(flat), counts, column)


def _texts(label: Array, text: pl.Series, part: Array, length: int, out: Place) -> Split:
    """Texts as sequences of token ids with a label."""
    parts = tokens(text)
    words = _learned(parts.filter(pl.Series(part == TRAIN)).explode(empty_as_null=False), least=2)
    column = Column("text", "context", "sequence", words.size, length)
    ids = pad(words.encode(parts.explode(empty_as_null=False)), parts.list.len().to_numpy(), column)
    schema = Schema((column, Column("label", "label", "numeric")))
    return _parted({"text": ids, "label": label}, schema, {"text": words}, part, out)


_LABEL_TIME = (Column("label", "label", "numeric"), Column("time", "time", "time"))


def _parted(
    columns: Mapping[str, Array],
    schema: Schema,
    words: Mapping[str, Vocabulary],
    part: Array,
    out: Place,
    items: pl.DataFrame | None = None,
) -> Split:
    """Write the rows part by part and give each part as a view; without ``items``, popularity is counted in train."""
    order = np.argsort(part, kind="stable")
    data = Dataset.from_arrays({n: c[order] for n, c in columns.items()}, schema, words, items).save(out)
    edges = np.searchsorted(part[order], range(4))
    train, valid, test = (data.take(slice(int(a), int(b))) for a, b in itertools.pairwise(edges))
    for name, view in zip(Split._fields, (train, valid, test), strict=True):
        if not len(view):
            raise DataError(f"the split leaves {name} empty ({len(data)} rows); the files are not whole")
    catalog = data.catalog if items is not None else train.counted().catalog
    return Split(*(dataclasses.replace(v, catalog=catalog) for v in (train, valid, test)))


def _one_of(fold: int, folds: int) -> None:
    """Refuse a fold that is none of them."""
    if not 0 <= fold < folds:
        raise ConfigError(f"fold {fold} is not one of 0 to {folds - 1}")


def _stratified(label: Array, fractions: Sequence[float], seed: int) -> Array:
    """The part of each row, int8 [n]: every class is cut at the same fractions."""
    chance = np.random.default_rng(seed).random(len(label))
    order = np.lexsort((chance, label))
    first = np.searchsorted(label[order], label[order])
    sizes = np.searchsorted(label[order], label[order], side="right") - first
    place = (np.arange(len(label)) - first + 0.5) / sizes
    part = np.empty(len(label), np.int8)
    part[order] = np.searchsorted(np.cumsum(fractions)[:-1], place)
    return part


def _position(user: Ids) -> Ids:
    """The place of each row among its user's, in the order they stand."""
    order = np.argsort(user, kind="stable")
    people = user[order]
    position = np.empty(len(user), np.int64)
    position[order] = np.arange(len(user)) - np.searchsorted(people, people)
    return position


def _id(name: str, words: Vocabulary, role: Role) -> Column:
    return Column(name, role, "categorical", words.size)


def _numbered(values: Array) -> Vocabulary:
    """A vocabulary in the order of the values themselves, as published code numbers them."""
    return Vocabulary.of(np.unique(values))


def _learned(values: pl.Series, least: int = 1) -> Vocabulary:
    counts = values.alias("value").drop_nulls().value_counts(name="n")
    return Vocabulary.learn(counts.filter(pl.col("n") >= least))


def _read(file: Path) -> bytes:
    """The bytes of a plain or gzipped file."""
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no file {file}; name the folder that holds it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _lines(file: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text, split at line feeds only (a sentence may hold any other separator)."""
    try:
        lines = _read(file).decode(encoding).split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not {encoding} ({error}); convert it first, for example with iconv") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{file} is empty; fetch it again")
    return lines


def _csv(file: Path, *, separator: str = ",", header: bool = True) -> pl.DataFrame:
    """A table of numbers, every one of them there."""
    try:
        content = _read(file)
        frame = pl.read_csv(content, separator=separator, has_header=header, infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file} cannot be read ({str(error).splitlines()[0]}); fetch it again") from error
    if frame.is_empty():
        raise DataError(f"{file} has a header and no rows; fetch it again")
    for column in frame:
        if not column.dtype.is_numeric() or column.null_count():
            row = int(column.cast(pl.Float64, strict=False).is_null().arg_max() or 0)
            what = f"column {column.name!r}, row {row}: {column[row]!r} is not a number"
            raise DataError(f"{file}: {what}; correct it, or fetch the file again")
    return frame


def _named(file: Path, frame: pl.DataFrame, names: tuple[str, ...]) -> None:
    lacking = [n for n in names if n not in frame.columns]
    if lacking:
        raise DataError(f"{file}: no column {', '.join(lacking)}; there are: {', '.join(frame.columns)}")


def _fields(file: Path, separator: str, names: tuple[str, ...]) -> pl.DataFrame:
    """Lines of fields with a separator of several characters; latin-1 as documented, unless a copy was made UTF-8."""
    try:
        lines = _lines(file)
    except DataError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        lines = _lines(file, "latin-1")
    parts = [line.split(separator) for line in lines]
    wrong = next((k for k, p in enumerate(parts) if len(p) != len(names)), None)
    if wrong is not None:
        needed = f"{len(names)} are needed ({separator.join(names)})"
        raise DataError(f"{file}, line {wrong + 1}: {len(parts[wrong])} fields, {needed}")
    return pl.DataFrame(parts, schema=list(names), orient="row")


def _place(keys: pl.Series, wanted: pl.Series) -> Ids:
    """The row of each wanted key.

    Raises:
        DataError: a key is not there.
    """
    rows = Vocabulary.of(keys).encode(wanted) - FIRST
    if (rows < 0).any():
        raise DataError(
            f"{wanted.name} {wanted[int(np.argmin(rows))]} has no line in the file of side features; fetch it again"
        )
    return rows


def _baskets(file: Path) -> tuple[Ids, Ids]:
    """User and item of each interaction, from lines ``user item item ...``."""
    lists = pl.Series(_lines(file)).str.strip_chars().str.split(" ")
    counts = lists.list.len().to_numpy().astype(np.int64)
    numbers = lists.explode().cast(pl.Int64, strict=False)
    if numbers.null_count():
        line = int(np.searchsorted(np.cumsum(counts), int(numbers.is_null().arg_max() or 0), side="right"))
        raise DataError(f"{file}, line {line + 1}: {lists[line].to_list()[:5]} ... are not all whole numbers")
    flat, heads = numbers.to_numpy(), np.cumsum(counts) - counts
    return np.repeat(flat[heads], counts - 1), np.delete(flat, heads)


def _attributes(file: Path) -> dict[int, list[int]]:
    """Attributes by item, from a JSON object of lists."""
    try:
        return {int(k): [int(a) for a in v] for k, v in json.loads(_read(file)).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file} is not an object of lists of whole numbers ({error}); fetch it again") from error


def _labelled(file: Path, parts: Sequence[Sequence[str]], labels: Mapping[str, float]) -> tuple[Array, pl.Series]:
    """Labels float32 [n] and texts from split lines."""
    for k, part in enumerate(parts):
        if len(part) != 2 or part[0] not in labels:
            raise DataError(f"{file}, line {k + 1}: begins with {part[0]!r}; {' or '.join(labels)} and a text are needed")
    return np.array([labels[p[0]] for p in parts], np.float32), pl.Series([p[1] for p in parts])
