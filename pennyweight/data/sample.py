"""The sample the product ships: MovieLens ml-latest-small, as Parquet, prepared as a recommender's data.

100,004 ratings of 9,066 movies by 671 people (GroupLens, University of Minnesota; Harper and Konstan 2015,
doi:10.1145/2827872). Its README.txt lies beside the files and permits redistribution, transformations included, under
the same terms, for non-commercial use.

The task: will this person rate this movie 4 or more? Most people came once and rated for an hour, so one cut in time would
test almost only on people who were never seen. The split that fits is ``user``: each person's earliest 70 % to train on,
their latest 20 % to test.

Nothing leaks into a person's own test rows: vocabularies are learned from the rows that split trains on, and a history
holds only what came before the row's own second.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl

from pennyweight.core.errors import DataError
from pennyweight.data.catalog import Vocabulary, pad
from pennyweight.data.dataset import Array, Dataset
from pennyweight.data.history import histories
from pennyweight.data.schema import FIRST, Column, Schema

LIKED = 4.0
"""Stars from which a movie counts as liked."""
HISTORY = 20
GENRES = 6


def sample() -> Path:
    """The folder with ``ratings.parquet``, ``movies.parquet``, ``tags.parquet`` and the README with the terms."""
    return Path(__file__).parent / "ml-latest-small"


def prepare(out: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None, train: float = 0.7) -> Dataset:
    """The sample as a dataset in time order, written to ``out``.

    Columns: user, item, genre (sequence), era (five years), history (sequence of items), label (1 when rated 4 or more),
    time. The catalog's items show title, genres, year and popularity. ``train`` is the share of each
    person's rows, first in time, that vocabularies are learned from: that of the split to come.

    Raises:
        DataError: a file of the sample is missing or damaged.
    """
    ratings, movies = _read(Path(path) if path else sample())
    place = (pl.int_range(pl.len()) + 0.5) / pl.len()
    past = ratings.filter(place.over("user") < train)
    users, items = _learn(past["user"]), _learn(past["item"], min_count=2)
    genres = _learn(movies["genres"].explode(empty_as_null=False))
    eras = _learn(_era(movies["year"]).drop_nulls())
    schema = Schema(
        (
            Column("user", "user", "categorical", users.size),
            Column("item", "item", "categorical", items.size),
            Column("genre", "item", "sequence", genres.size, GENRES),
            Column("era", "item", "categorical", eras.size),
            Column("history", "user", "sequence", items.size, HISTORY, shares="item"),
            Column("label", "label", "numeric"),
            Column("time", "time", "time"),
        )
    )
    item, time, liked = items.encode(ratings["item"]), ratings["time"].to_numpy(), ratings["rating"].to_numpy() >= LIKED
    named, counts = movies["genres"].explode(empty_as_null=False), movies["genres"].list.len().to_numpy()
    facts = {
        "genre": pad(genres.encode(named), counts, schema["genre"]),
        "era": eras.encode(_era(movies["year"])),
    }
    rated = np.searchsorted(movies["item"].to_numpy(), ratings["item"].to_numpy())
    columns: dict[str, Array] = {
        "user": users.encode(ratings["user"]),
        "item": item,
        **{name: fact[rated] for name, fact in facts.items()},
        "history": histories(ratings["user"].to_numpy(), item, time, liked & (item >= FIRST), HISTORY),
        "label": liked,
        "time": time,
    }
    shown = movies.select("title", pl.col("genres").list.join(", "), "year")
    table = pl.DataFrame({"item": items.encode(movies["item"]), **facts}).hstack(shown)
    vocabularies = {"user": users, "item": items, "genre": genres, "era": eras}
    table = table.filter(pl.col("item") >= FIRST).sort("item")
    return Dataset.from_arrays(columns, schema, vocabularies, table).counted().save(out)


def _learn(values: pl.Series, min_count: int = 1) -> Vocabulary:
    counts = values.alias("value").drop_nulls().value_counts(name="n")
    return Vocabulary.learn(counts.filter(pl.col("n") >= min_count))


def _read(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    try:
        ratings = pl.read_parquet(folder / "ratings.parquet")
        movies = pl.read_parquet(folder / "movies.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"the sample in {folder} is missing or damaged ({error}); install pennyweight again") from error
    return ratings.sort("time", "user", maintain_order=True), movies.sort("item")


def _era(year: pl.Series) -> pl.Series:
    return year // 5 * 5
