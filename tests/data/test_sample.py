"""The shipped sample: whole, with its terms, and prepared without a look ahead."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pennyweight.core.errors import DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.sample import LIKED, prepare, sample


def test_the_sample_is_shipped_with_its_terms() -> None:
    folder = sample()
    assert folder.parent.name == "data" and folder.parent.parent.name == "pennyweight", "inside the package, so in a wheel"
    terms = (folder / "README.txt").read_text()
    assert "may redistribute the data set, including transformations" in terms and "GroupLens" in terms
    ratings = pl.read_parquet(folder / "ratings.parquet")
    assert (len(ratings), ratings["user"].n_unique(), ratings["item"].n_unique()) == (100_004, 671, 9_066)
    assert len(pl.read_parquet(folder / "movies.parquet")) == 9_125
    assert len(pl.read_parquet(folder / "tags.parquet")) == 1_296
    assert sum(f.stat().st_size for f in folder.iterdir()) < 600_000


def test_rows_are_the_ratings_in_time_order(movies: Dataset) -> None:
    ratings = pl.read_parquet(sample() / "ratings.parquet")
    time = movies.column("time")
    assert len(movies) == len(ratings) and (np.diff(time) >= 0).all()
    assert movies.column("label").sum() == (ratings["rating"] >= LIKED).sum()
    assert movies.schema.history is not None and movies.schema.history.shares == "item"


def test_a_history_holds_only_what_came_before(movies: Dataset) -> None:
    """Every item of a history was liked by that user, known to the vocabulary, at an earlier second."""
    ratings = pl.read_parquet(sample() / "ratings.parquet").sort("time", "user", maintain_order=True)
    items = movies.catalog.vocabulary("item")
    for row in np.random.default_rng(0).integers(0, len(movies), 60).tolist():
        user, time = ratings["user"][row], ratings["time"][row]
        before = ratings.filter((pl.col("user") == user) & (pl.col("time") < time) & (pl.col("rating") >= LIKED))
        ids = items.encode(before["item"])
        history = movies.column("history")[row]
        assert history[history > 0].tolist() == ids[ids > 1][-20:].tolist()


def test_vocabularies_are_learned_from_training_rows(movies: Dataset) -> None:
    train, _, test = movies.split("user", (0.7, 0.1, 0.2))
    counts = np.bincount(train.column("item"), minlength=movies.schema["item"].size)
    assert counts[2:].min() >= 2, "an item with an id of its own was rated twice in training"
    assert (train.column("item") == 1).any(), "so the id of unknown items is trained"
    assert 0 < (test.column("item") == 1).mean() < 0.2
    assert (test.column("user") > 1).all()


def test_the_same_each_time(tmp_path: Path, movies: Dataset) -> None:
    again = prepare(tmp_path / "d")
    assert again.fingerprint == movies.fingerprint and again.catalog.files() == movies.catalog.files()


def test_a_damaged_sample_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing or damaged"):
        prepare(tmp_path / "d", path=tmp_path)
    (tmp_path / "ratings.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="missing or damaged"):
        prepare(tmp_path / "d", path=tmp_path)
