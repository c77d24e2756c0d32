import numpy as np
import polars as pl
import pytest

from pennyweight.core.errors import NotFound
from pennyweight.data.catalog import Catalog, Vocabulary
from pennyweight.data.schema import Column, Schema
from pennyweight.serve.lookup import Lookup, fold

TITLES = ["Amélie", "The Matrix", "Matrix Reloaded", "Heat", "Heat", ""]


@pytest.fixture
def catalog() -> Catalog:
    schema = Schema((Column("user", "user", "categorical", 6), Column("item", "item", "categorical", 8)))
    words = {"user": Vocabulary.of([123, 12, 2, 21]), "item": Vocabulary.of([f"m{i}" for i in range(6)])}
    table = {
        "item": np.arange(2, 8),
        "title": TITLES,
        "year": [2001, 1999, 2003, 1972, 1995, None],
        "genres": ["Comedy, Romance", "Action|Sci-Fi", "", None, "Crime", "Drama"],
        "popularity": [5, 9, 20, 1, 7, 0],
    }
    return Catalog(schema, words, pl.DataFrame(table))


@pytest.fixture
def lookup(catalog: Catalog) -> Lookup:
    return Lookup(catalog)


def titles(lookup: Lookup, q: str, k: int = 10) -> list[str]:
    return [item.title for item in lookup.items(q, k)]


def test_folds_case_and_accents() -> None:
    assert fold("  AMÉLIE ") == "amelie"


def test_titles_that_begin_so_come_first_then_the_popular(lookup: Lookup) -> None:
    assert titles(lookup, "matrix") == ["Matrix Reloaded", "The Matrix"]
    assert titles(lookup, "the ma") == ["The Matrix"]
    assert titles(lookup, "reloaded MATRIX") == ["Matrix Reloaded"]
    assert titles(lookup, "amelie") == ["Amélie"]
    assert titles(lookup, "zzz") == []


def test_an_empty_search_gives_the_most_popular(lookup: Lookup) -> None:
    assert titles(lookup, "", 3) == ["Matrix Reloaded", "The Matrix", "Heat"]


def test_words_are_taken_as_they_are_not_as_patterns(lookup: Lookup) -> None:
    assert titles(lookup, ".*") == []


def test_items_are_named_by_id_or_title_with_the_year_to_tell_them_apart(lookup: Lookup) -> None:
    assert lookup.liked(["m3", "heat", "Heat (1972)", "HEAT (1995)"]).tolist() == [5, 6, 5, 6]
    assert lookup.ids(["m0", "m5"]).tolist() == [2, 7]
    with pytest.raises(NotFound, match="no item 'Heat'"):
        lookup.ids(["Heat"])


def test_shows_what_the_catalogue_has(lookup: Lookup) -> None:
    assert (lookup.item(2).genres, lookup.item(3).genres, lookup.item(4).genres, lookup.item(5).genres) == (
        ["Comedy", "Romance"],
        ["Action", "Sci-Fi"],
        [],
        [],
    )
    assert lookup.item(7).title == "m5" and lookup.item(7).year is None


def test_a_catalogue_of_ids_alone_is_shown_by_ids(catalog: Catalog) -> None:
    assert catalog.items is not None
    bare = Lookup(catalog.replace(items=catalog.items.select("item", "popularity")))
    assert [item.title for item in bare.items("m4", 5)] == ["m4"]


def test_users_the_whole_id_first(lookup: Lookup) -> None:
    assert lookup.users("12", 10) == [12, 123]
    assert lookup.users("2", 10) == [2, 21, 12, 123]
    assert lookup.users("", 2) == [123, 12]
    assert lookup.known("12") and lookup.known(12) and not lookup.known("1") and not lookup.known(None)


def test_a_model_without_users_knows_nobody(catalog: Catalog) -> None:
    schema = Schema((catalog.schema["item"],))
    nobody = Lookup(catalog.replace(schema=schema))
    assert nobody.users("1", 5) == [] and not nobody.known(12)


@pytest.mark.parametrize("gap", [1, 3, 10**15], ids=["side by side", "with gaps", "far apart"])
def test_many_integer_names_are_found_and_no_others(catalog: Catalog, gap: int) -> None:
    names = (np.random.default_rng(0).permutation(40) - 11) * gap
    schema = Schema((catalog.schema["user"], Column("item", "item", "categorical", 42)))
    table = pl.DataFrame({"item": np.arange(2, 42), "popularity": np.zeros(40, np.int64)})
    words = {**catalog.vocabularies, "item": Vocabulary.of(names.tolist())}
    lookup = Lookup(Catalog(schema, words, table))
    assert lookup.ids(names).tolist() == list(range(2, 42)) == lookup.ids(names.tolist()).tolist()
    for other in (-12 * gap, 29 * gap, 2**63 - 1, -(2**63)):
        with pytest.raises(NotFound, match=f"no item {other}"):
            lookup.ids(np.append(names, other))
