"""Traces: seeded, realistic, and the same after a file."""

from pathlib import Path

import numpy as np
import pytest

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import KINDS, Arrivals, Load, Request, Trace
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


# -- when they come ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_are_seeded_and_as_many_as_asked(kind: str) -> None:
    one, two, other = (Load(kind, rate=300.0, seconds=30.0, seed=seed).draw() for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert np.array_equal(one.at, two.at) and np.array_equal(one.items, two.items) and len(one.at) != len(other.at)
    assert one.at[0] >= 0 and (np.diff(one.at) >= 0).all() and one.at[-1] < 30
    assert len(one) == pytest.approx(9000, rel=0.25 if kind == "bursts" else 0.1)


def test_each_kind_is_as_bursty_as_it_says() -> None:
    made = {k: Load(k, rate=400.0, seconds=60.0, seed=5, variation=4.0).draw().burstiness() for k in KINDS}
    assert made["poisson"]["variation"] == pytest.approx(1, abs=0.05)
    assert made["poisson"]["dispersion_10ms"] == pytest.approx(1, abs=0.1)
    assert made["gamma"]["variation"] == pytest.approx(4, rel=0.15)
    assert made["bursts"]["variation"] > 1.3 and made["bursts"]["dispersion_1s"] > 20
    assert made["diurnal"]["peak"] > 1.3 and made["diurnal"]["dispersion_10ms"] < 2


def test_a_burst_lasts_as_long_as_keeps_the_average() -> None:
    trace = Load("bursts", rate=500.0, seconds=200.0, calm=0.5, burst=3.0, dwell_s=0.5).draw()
    assert len(trace) / 200 == pytest.approx(500, rel=0.1)
    counts = np.bincount((trace.at / 0.05).astype(int), minlength=4000) / 0.05
    assert (counts > 1000).mean() == pytest.approx(0.2, abs=0.05), "a fifth of the time"


def test_a_pulse_stands_in_the_middle() -> None:
    trace = Load(rate=200.0, seconds=20.0, pulse=10.0, pulse_s=5.0).draw()
    within = (trace.at >= 7.5) & (trace.at < 12.5)
    assert within.sum() / 5 == pytest.approx(2000, rel=0.05) and (~within).sum() / 15 == pytest.approx(200, rel=0.1)
    half = Load(rate=200.0, seconds=20.0, pulse=0.5, pulse_s=5.0).draw()
    assert ((half.at >= 7.5) & (half.at < 12.5)).sum() / 5 == pytest.approx(100, rel=0.15)


def test_sizes_have_the_tail_they_should() -> None:
    heavy, narrow, fixed = (Load(rate=1000.0, sizes=s).draw().items for s in ("heavy", "narrow", "fixed"))
    assert heavy.mean() == pytest.approx(144, rel=0.05) and heavy.max() == 1024 and heavy.min() >= 1
    assert np.sort(heavy)[-len(heavy) // 4 :].sum() / heavy.sum() == pytest.approx(0.62, abs=0.03)
    assert np.percentile(narrow, 95) < 1.5 * np.percentile(narrow, 50) and set(fixed.tolist()) == {144}


def test_classes_and_tenants_come_by_their_shares() -> None:
    trace = Load(rate=1000.0, classes={"page": 1.0, "mail": 3.0}, tenants={"a": 0.2, "b": 0.8}).draw()
    assert trace.priorities == ("page", "mail") and trace.priority.mean() == pytest.approx(0.75, abs=0.02)
    assert trace.tenants == ("a", "b") and trace.tenant.mean() == pytest.approx(0.8, abs=0.02)


def test_some_users_and_items_come_again_and_again() -> None:
    trace = Load(rate=500.0, users=5000, catalog=20_000).draw()
    assert np.bincount(trace.user).max() > 50 * len(trace) / 5000
    asked = [trace.candidates(k) for k in range(1000)]
    assert all(len(set(c.tolist())) == n for c, n in zip(asked, trace.items, strict=False))
    assert np.array_equal(asked[7], trace.candidates(7))
    counts = np.sort(np.bincount(np.concatenate(asked), minlength=20_000))
    assert counts[-200:].sum() / counts.sum() > 0.25 and (counts <= 1).mean() > 0.1
    small = Load(rate=10.0, catalog=5, sizes="fixed", items=9).draw()
    assert sorted(small.candidates(0).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["t.arrow", "t.jsonl"])
def test_no_arrival_is_lost_in_a_file(tmp_path: Path, name: str) -> None:
    trace = Load("bursts", rate=50.0, seconds=4.0, classes={"a": 1, "b": 1}, tenants={"t": 1.0}, seed=9).draw()
    trace.save(tmp_path / name)
    again = Arrivals.load_from(tmp_path / name)
    assert all(np.array_equal(getattr(again, c), getattr(trace, c)) for c in Arrivals.COLUMNS)
    assert (again.load, again.priorities, again.tenants) == (trace.load, ("a", "b"), ("t",))
    assert again.describe() == trace.describe() and "bursts" in trace.describe()


def test_the_same_requests_faster() -> None:
    trace = Load(rate=100.0).draw()
    twice = trace.scaled(2.0)
    assert len(twice) == len(trace) and twice.seconds == 5 and np.array_equal(twice.at, trace.at / 2)


HEAD = '{"load": {}, "priorities": [""], "tenants": [""]}\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.jsonl", ""),
        ("t.jsonl", "{}\n"),
        ("t.jsonl", HEAD),
        ("t.jsonl", HEAD + '{"at": 0, "items": 1, "user": 0, "priority": 1, "tenant": 0}\n'),
        ("t.jsonl", HEAD + '{"at": 0, "items": 0, "user": 0, "priority": 0, "tenant": 0}\n'),
        ("t.jsonl", '{"load": {"rate": 0}, "priorities": [""], "tenants": [""]}\n'),
        ("t.arrow", "not arrow"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_arrivals_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="is not a trace of arrivals"):
        Arrivals.load_from(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        Arrivals.load_from(tmp_path / "none.arrow")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rate": 0.0}, "load.rate is 0"),
        ({"seconds": float("inf")}, "load.seconds is inf"),
        ({"calm": 1.5}, "load.calm 1.5"),
        ({"classes": {"a": 0.0}}, "load.classes has shares"),
        ({"tenants": {"a": -1.0, "b": 2.0}}, "load.tenants has shares"),
    ],
)
def test_loads_that_cannot_be_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Load(**wrong)  # type: ignore[arg-type]
