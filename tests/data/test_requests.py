"""Traces: seeded, realistic, and the same after a file."""

from pathlib import Path

import numpy as np
import pytest

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import Request, Trace
from pennyweight.data.schema import Column, Schema
from pennyweight.data.synthetic import Clicks


def test_a_trace_is_seeded(movies: Dataset) -> None:
    one, two, other = (Trace.sample(movies, 5, 100, seed) for seed in (1, 1, 2))
    assert one == two != other
    assert len(one) == 5 and all(len(set(r.items)) == 100 for r in one)


def test_users_come_with_what_was_known_of_them(movies: Dataset) -> None:
    trace = Trace.sample(movies, 50, 10)
    times = movies.column("time")
    assert [r.time for r in trace] == sorted(r.time or 0 for r in trace)
    for request in trace:
        user = movies.catalog.vocabulary("user").id(request.user)
        rows = np.flatnonzero((movies.column("user") == user) & (times == request.time))
        history = movies.column("history")[rows]
        assert any(tuple(h[h > 0]) == request.history for h in history)


def test_candidates_follow_popularity(movies: Dataset) -> None:
    trace = Trace.sample(movies, 200, 20)
    drawn = np.concatenate([r.items for r in trace])
    popularity = movies.catalog.popularity
    assert popularity[drawn].mean() > 3 * popularity[movies.catalog.item_ids].mean()
    assert len(set(drawn.tolist())) > 1000


def test_all_items_where_there_are_fewer() -> None:
    data = Clicks(sizes=(10, 5, 3)).dataset(200)
    (request,) = Trace.sample(data, 1, 100)
    assert sorted(request.items) == [2, 3, 4, 5, 6]
    assert set(request.context) == {"c2"}


def test_a_batch_is_the_candidates_of_the_request(movies: Dataset) -> None:
    trace = Trace.sample(movies, 3, 50)
    for request, batch in zip(trace, trace.batches(movies.catalog), strict=True):
        assert batch["item"].tolist() == list(request.items)
        row = batch["history"][0]
        assert tuple(row[row > 0].tolist()) == request.history
        assert set(batch) == {c.name for c in movies.schema.features}


def test_a_catalog_alone_gives_requests(movies: Dataset) -> None:
    trace = Trace.sample(movies.catalog, 20, 30)
    assert trace == Trace.sample(movies.catalog, 20, 30)
    assert all(movies.catalog.vocabulary("user").id(r.user) > 1 for r in trace)
    assert len({len(r.history) for r in trace}) > 5
    assert len(trace.batches(movies.catalog)) == 20


def test_nothing_is_lost_in_a_file(tmp_path: Path, movies: Dataset) -> None:
    odd = Request("zo\u00eb\n", (), (2, 3), {"hour": 7, "words": ["a"]}, None)
    trace = Trace((*Trace.sample(movies, 4, 7).requests, odd))
    trace.save(tmp_path / "t.jsonl")
    assert Trace.load(tmp_path / "t.jsonl") == trace
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json}\n", "is not a trace"),
        ('{"user": 1, "history": [], "items": ["2"]}\n', r"t.jsonl:1.items\[0\]: expected a whole number"),
        ('{"user": 1, "history": [], "items": [2], "tiem": 3}\n', "tiem: unknown field of Request; known: user"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        Trace.load(tmp_path / "t.jsonl")


def test_what_has_no_requests_is_refused(tmp_path: Path, movies: Dataset) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Trace.load(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="both must be at least 1"):
        Trace.sample(movies, 0, 10)
    schema = Schema((Column("x", "context", "numeric"), Column("label", "label", "numeric")))
    with pytest.raises(DataError, match="no items"):
        Trace.sample(Dataset.from_arrays({"x": np.zeros(3), "label": np.zeros(3)}, schema), 1, 1)
