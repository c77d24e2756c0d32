"""Vocabularies and the catalog: ids there and back, requests built right, files the same each time."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.catalog import Catalog, Vocabulary, pad
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema

TEXTS = st.lists(st.text(min_size=1, max_size=6), unique=True, min_size=1, max_size=20)
NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=20)


@given(st.one_of(TEXTS, NUMBERS))
def test_values_come_back(values: list[str | int]) -> None:
    vocabulary = Vocabulary.of(values)
    ids = vocabulary.encode(values)
    assert ids.tolist() == list(range(2, len(values) + 2)) == [vocabulary.id(v) for v in values]
    assert [str(v) for v in vocabulary.decode(ids)] == [str(v) for v in values]


def test_unknown_and_missing_values_are_out_of_vocabulary() -> None:
    numbers, texts = Vocabulary.of([7, 3]), Vocabulary.of(["b", "a"])
    assert numbers.encode([3, None, 4, 7]).tolist() == [3, 1, 1, 2]
    assert numbers.encode(["3", "x", None]).tolist() == [3, 1, 1]
    assert texts.encode(["a", None, "c"]).tolist() == [3, 1, 1]
    assert [numbers.id(v) for v in ("7", 7, "x", None, "7.0")] == [2, 2, 1, 1, 1]
    assert numbers.encode([]).tolist() == []
    assert numbers.decode([0, 1, 2]) == [None, None, 7]


def test_texts_that_are_all_whole_numbers_are_numbers() -> None:
    assert Vocabulary.of(["7", "-3"]).decode([2, 3]) == [7, -3]
    assert Vocabulary.of(["7", "03"]).decode([2, 3]) == ["7", "03"]
    assert Vocabulary.of(["7", "03"]).id(7) == 2


def test_learned_by_frequency_then_by_value() -> None:
    counts = pl.DataFrame({"value": ["c", "b", "a"], "n": [2, 5, 2]})
    assert Vocabulary.learn(counts).values.to_pylist() == ["b", "a", "c"]


def test_a_vocabulary_of_duplicates_is_refused() -> None:
    with pytest.raises(DataError, match="distinct values"):
        Vocabulary.of([1, 1])


def test_a_hash_is_the_same_for_one_value_and_for_many_and_on_every_machine() -> None:
    hashed = Vocabulary.hashed(1000)
    values = ["a", "b", "a", None, "7"]
    ids = hashed.encode(values)
    assert ids.tolist() == [hashed.id(v) for v in values]
    assert ids.tolist() == [hashed.encode(["a"])[0], hashed.encode(["b"])[0], ids[0], 1, hashed.id(7)]
    assert ids.tolist() == [2 + 0xE6C632B61E964E1F % 998, 713, 961, 1, 952]  # XXH3-64 of "a" as its authors give it
    spread = Vocabulary.hashed(102).encode(np.arange(10_000))
    assert set(spread.tolist()) == set(range(2, 102))


def test_a_hash_needs_room() -> None:
    with pytest.raises(ConfigError, match="give at least 3"):
        Vocabulary.hashed(2)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="id 4 is outside the vocabulary of 4 ids"):
        Vocabulary.of([1, 2]).decode([2, 4])


def test_sequences_are_padded_on_their_own_side() -> None:
    ids, counts = np.array([2, 3, 4, 5]), np.array([3, 0, 1])
    user = Column("h", "user", "sequence", 9, 2)
    item = Column("g", "item", "sequence", 9, 2)
    assert pad(ids, counts, user).tolist() == [[3, 4], [0, 0], [0, 5]]
    assert pad(ids, counts, item).tolist() == [[2, 3], [0, 0], [5, 0]]
    assert pad(ids[:0], np.array([0]), user).tolist() == [[0, 0]]


def test_a_request_is_the_rows_of_the_dataset(movies: Dataset) -> None:
    """The same user, history and item give the batch that training saw."""
    rows = movies.take(np.flatnonzero((movies.column("item") > 1) & (movies.column("user") > 1))[50_000:50_020])
    batch = next(rows.batches(20))
    for k in range(20):
        user = movies.catalog.vocabulary("user").decode(batch["user"][k : k + 1])[0]
        history = batch["history"][k][batch["history"][k] > 0].tolist()
        request = movies.catalog.request(user, history, batch["item"][k : k + 1].numpy())
        assert set(request) == {c.name for c in movies.schema.features}
        for name, column in request.items():
            assert column.dtype == batch[name].dtype
            assert torch.equal(column[0], batch[name][k]), name


def test_a_request_broadcasts_the_user(movies: Dataset) -> None:
    items = movies.catalog.item_ids[:500]
    batch = movies.catalog.request(1, [5, 6], items)
    assert {len(v) for v in batch.values()} == {500}
    assert torch.equal(batch["item"], torch.from_numpy(items))
    assert batch["history"][499].tolist() == [0] * 18 + [5, 6]
    assert batch["user"].unique().tolist() == [movies.catalog.vocabulary("user").id(1)]


def test_a_history_keeps_its_newest(movies: Dataset) -> None:
    batch = movies.catalog.request(None, list(range(2, 40)), np.array([2]))
    assert batch["history"][0].tolist() == list(range(20, 40))
    assert batch["user"].tolist() == [1]


def test_context_is_given_as_values() -> None:
    schema = Schema(
        (
            Column("user", "user", "categorical", 4),
            Column("item", "item", "categorical", 4),
            Column("day", "context", "categorical", 4),
            Column("words", "context", "sequence", 4, 2),
            Column("price", "context", "numeric"),
            Column("place", "context", "numeric", 0, 2),
        )
    )
    words = {n: Vocabulary.of(["a", "b"]) for n in ("user", "item", "day", "words")}
    catalog = Catalog(schema, words, pl.DataFrame({"item": [2, 3], "popularity": [1, 1]}))
    row = catalog.user_batch("b", context={"day": "b", "words": ["b", "x", "a"], "price": 2, "place": [1, 2]})
    assert {n: v.tolist() for n, v in row.items()} == {
        "user": [3],
        "day": [3],
        "words": [[3, 1]],
        "price": [2.0],
        "place": [[1.0, 2.0]],
    }
    blank = catalog.user_batch(None)
    assert (blank["day"].tolist(), blank["price"].tolist(), blank["place"].tolist()) == ([1], [0.0], [[0.0, 0.0]])
    for wrong, message in (
        ({"dya": "a"}, "no user or context column 'dya'; known: user, day"),
        ({"price": "dear"}, "'price' needs one number"),
        ({"price": float("nan")}, "'price' needs finite numbers"),
        ({"place": [1]}, "'place' needs 2 number"),
    ):
        with pytest.raises(DataError, match=message):
            catalog.user_batch("b", context=wrong)


@pytest.mark.parametrize("item", [-1, 10**6])
def test_an_unknown_item_id_is_refused(movies: Dataset, item: int) -> None:
    with pytest.raises(DataError, match=f"item id {item} is outside the vocabulary"):
        movies.catalog.request(1, [], np.array([2, item]))
    with pytest.raises(DataError, match=f"item id {item} is outside the vocabulary"):
        movies.catalog.request(1, [item], np.array([2]))


def test_a_catalog_without_items_says_so() -> None:
    schema = Schema((Column("x", "context", "numeric"), Column("label", "label", "numeric")))
    with pytest.raises(DataError, match="no items"):
        _ = Catalog(schema, {}).item_ids
    with pytest.raises(ConfigError, match="'x' has no vocabulary"):
        Catalog(schema, {}).vocabulary("x")


def test_files_are_the_same_each_time_and_come_back(movies: Dataset) -> None:
    files = movies.catalog.files()
    again = Catalog.parse(files)
    assert again.files() == files == Catalog.parse(again.files()).files()
    assert again.schema == movies.schema
    assert again.items is not None and movies.catalog.items is not None
    assert again.items.equals(movies.catalog.items)
    items = movies.catalog.item_ids[::50]
    before, after = (c.request(3, [4], items) for c in (movies.catalog, again))
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["catalog.json", "vocabularies.arrow", "items.arrow"])
@pytest.mark.parametrize("damage", ["half", "noise", "missing"])
def test_a_damaged_catalog_is_one_clear_error(movies: Dataset, name: str, damage: str) -> None:
    files = movies.catalog.files()
    if damage == "missing" and name == "items.arrow":
        return  # a catalog without items is whole
    content = files.pop(name)
    if damage != "missing":
        files[name] = content[: len(content) // 2] if damage == "half" else b"\x00" * 64
    with pytest.raises(ConfigError, match="save it again"):
        Catalog.parse(files)


def test_the_catalog_shows_items(movies: Dataset) -> None:
    items = movies.catalog.items
    assert items is not None
    assert items["item"].is_sorted() and items["item"].is_unique().all()
    row = items.filter(pl.col("title") == "Toy Story").to_dicts()[0]
    assert row["genres"] == "Adventure, Animation, Children, Comedy, Fantasy"
    assert row["year"] == 1995
    assert row["popularity"] == np.count_nonzero(movies.column("item") == row["item"])
    genres = movies.catalog.vocabulary("genre").decode([g for g in row["genre"] if g])
    assert genres == ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]


def test_a_bundle_of_a_catalog_is_found_where_it_lies(tmp_path: Path, movies: Dataset) -> None:
    reopened = movies.take(slice(0, 100)).save(tmp_path / "few")
    assert reopened.catalog.files() == movies.catalog.files()
