"""A budget says what it means, in both directions, and names what it does not understand."""

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.core.budget import DEFAULT_MARGIN, METRICS, SPENDS, Budget, parse, size
from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import BudgetError, ConfigError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("p99 <= 10ms, bytes <= 1MB, auc drop <= 0.001", {"p99_ms": 10.0, "bytes": 1e6, "margins": {"auc": 0.001}}),
        ("p50 < 2 s; memory ≤ 64 MiB", {"p50_ms": 2000.0, "memory_bytes": 64 * 2**20}),
        ("p99 latency <= 250us and size <= 3 KB", {"p99_ms": 0.25, "bytes": 3000.0}),
        ("p99 <= 1e1 ms\nram <= .5GB", {"p99_ms": 10.0, "memory_bytes": 5e8}),
        ("cost <= 0.5 USD/M", {"cost": 0.5}),
        ("cost <= $0.5/M", {"cost": 0.5}),
        ("price <= 2 eur per million requests", {"cost": 2.0, "currency": "EUR"}),
        ("recall@20 drop <= 0.5%", {"relative": {"recall@20": 0.005}}),
        ("log loss drop <= 0.002, NDCG@10 drop <= 0", {"margins": {"log_loss": 0.002, "ndcg@10": 0.0}}),
        ("hr@10 drop <= .01", {"margins": {"hit_rate@10": 0.01}}),
        ("p50 <= 0.33x, size <= .1 X, cost <= 1x", {"times": {"p50": 0.33, "bytes": 0.1, "cost": 1.0}}),
        ("p99 <= 0.5x, bytes <= 1MB", {"bytes": 1e6, "times": {"p99": 0.5}}),
    ],
)
def test_words(text: str, wanted: dict[str, Any]) -> None:
    assert parse(text) == Budget(**wanted)


@pytest.mark.parametrize(
    ("text", "piece", "says"),
    [
        ("", "", "empty"),
        (" , ; ", "", "empty"),
        ("hello", "'hello'", "NAME <= NUMBER UNIT"),
        ("p99 <= 1 <= 2 ms", "'p99 <= 1 <= 2 ms'", "NAME <= NUMBER UNIT"),
        ("bytes <= 1MB, pp <= 3 ms", "'pp <= 3 ms'", "known: p50, p99, bytes, memory, cost"),
        ("auc <= 0.1", "'auc <= 0.1'", "METRIC drop"),
        ("p99 >= 3 ms", "'p99 >= 3 ms'", "upper"),
        ("p99 <= fast", "'p99 <= fast'", "'fast' where a number"),
        ("p99 <= nan ms", "'p99 <= nan ms'", "where a number"),
        ("p99 <= 1e999 ms", "'p99 <= 1e999 ms'", "inf"),
        ("p99 <= -3 ms", "'p99 <= -3 ms'", "nothing can keep"),
        ("bytes <= 0 MB", "'bytes <= 0 MB'", "nothing can keep"),
        ("p99 <= 10", "'p99 <= 10'", "no unit; known: us, ms, s"),
        ("p99 <= 10 MB", "'p99 <= 10 MB'", "unit 'MB'; known: us, ms, s"),
        ("memory <= 1 parsec", "'memory <= 1 parsec'", "unit 'parsec'; known: B, kB, MB"),
        ("cost <= 5 USD", "'cost <= 5 USD'", "0.5 USD/M"),
        ("f1 drop <= 0.1", "'f1 drop <= 0.1'", "unknown metric 'f1'; known metrics: quality, auc"),
        ("ndcg drop <= 0.1", "'ndcg drop <= 0.1'", "ndcg@K"),
        ("recall@0 drop <= 0.1", "'recall@0 drop <= 0.1'", "recall@20"),
        ("auc drop <= 3", "'auc drop <= 3'", "would allow any loss"),
        ("auc drop <= 100%", "'auc drop <= 100%'", "would allow any loss"),
        ("auc drop <= 1 ms", "'auc drop <= 1 ms'", "unit 'ms'"),
        ("p99 <= 0x", "'p99 <= 0x'", "nothing can keep"),
        ("speed <= 3x", "'speed <= 3x'", "known: p50, p99, bytes"),
        ("auc drop <= 0.5x", "'auc drop <= 0.5x'", "unit 'x'"),
        ("p99 <= 3ms, p99 <= 0.5x", "'p99 <= 0.5x'", "p99 a second time"),
        ("size <= .1x, bytes <= 3MB", "'bytes <= 3MB'", "bytes a second time"),
        ("p99 <= 3ms, p99 <= 4ms", "'p99 <= 4ms'", "p99 a second time"),
        ("bytes <= 3MB, size <= 4MB", "'size <= 4MB'", "bytes a second time"),
        ("auc drop <= 1%, auc drop <= .01", "'auc drop <= .01'", "auc a second time"),
    ],
)
def test_what_is_not_understood_is_shown(text: str, piece: str, says: str) -> None:
    with pytest.raises(BudgetError) as error:
        parse(text)
    assert piece in str(error.value)
    assert says in str(error.value)
    assert "p99 <= 10ms, bytes <= 1MB, auc drop <= 0.001" in str(error.value), "an example"


@pytest.mark.parametrize(
    "wrong",
    [
        {"p99_ms": 0.0},
        {"bytes": math.inf},
        {"margins": {"auc": 1.0}},
        {"relative": {"auc": -0.1}},
        {"times": {"p98": 0.5}},
    ],
)
def test_impossible_values_are_refused_without_words_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=r"as in: p99 <= 10ms"):
        Budget(**wrong)
    with pytest.raises(BudgetError, match="keep one"):
        Budget(margins={"auc": 0.1}, relative={"auc": 0.1})
    with pytest.raises(BudgetError, match="keep one"):
        Budget(p50_ms=3.0, times={"p50": 0.5})
    with pytest.raises(BudgetError, match=r"as in: p50 <= 0.33x"):
        Budget(times={"p50": 0.0})


def test_margin_is_absolute_relative_or_the_default() -> None:
    budget = parse("auc drop <= 0.002, recall@20 drop <= 0.5%")
    assert budget.margin("auc", 0.8) == 0.002
    assert budget.margin("recall@20", 0.2) == pytest.approx(0.001)
    assert budget.margin("ndcg@10", 0.2) == DEFAULT_MARGIN
    assert parse("quality drop <= 1%").margin("auc", 0.8) == pytest.approx(0.008)


def test_misses_say_what_was_spent_and_by_how_much() -> None:
    budget = parse("p99 <= 10ms, bytes <= 1MB, memory <= 64MB, cost <= 0.5 USD/M")
    misses = budget.misses(p50_ms=99.0, p99_ms=12.5, bytes=1e6, cost=0.75)
    assert misses == (
        "p99 is 12.5 ms, 1.25x the limit of 10 ms",
        "memory was not measured, and the limit is 64 MB",
        "cost is 0.75 USD/M, 1.5x the limit of 0.5 USD/M",
    )
    assert Budget().misses() == ()


def test_multiples_are_of_what_the_given_model_spends() -> None:
    budget = parse("p50 <= 0.25x, bytes <= 0.1x, memory <= 64MB, auc drop <= 0.002")
    numbers = budget.against(p50_ms=8.0, p99_ms=20.0, bytes=5e6)
    assert numbers == parse("p50 <= 2ms, bytes <= 500kB, memory <= 64MB, auc drop <= 0.002")
    assert numbers.misses(p50_ms=3.0, bytes=4e5, memory_bytes=1.0) == ("p50 is 3 ms, 1.5x the limit of 2 ms",)
    assert budget.against(p50_ms=8.0).misses(p50_ms=1.0, bytes=1.0, memory_bytes=1.0) == (
        "bytes of the given model was not measured, and the limit is 0.1x that",
    )


def test_an_empty_budget_describes_its_default() -> None:
    assert Budget().describe() == "quality drop <= 0.001"


amounts = st.floats(1e-3, 1e6).map(lambda x: float(f"{x:.9g}"))
shares = st.floats(0, 0.9).map(lambda x: float(f"{x:.6g}"))
names = st.sampled_from([m.replace("K", "20") for m in METRICS])


@given(
    st.dictionaries(st.sampled_from([f for f, _ in SPENDS.values()]), amounts),
    st.dictionaries(st.sampled_from(list(SPENDS)), amounts),
    st.dictionaries(names, shares, min_size=1),
)
def test_words_and_json_lead_back(spends: dict[str, float], times: dict[str, float], margins: dict[str, float]) -> None:
    times = {name: share for name, share in times.items() if SPENDS[name][0] not in spends}
    budget = Budget(**spends, times=times, margins=margins)
    again = parse(budget.describe())
    for field in fields(Budget):
        wanted = getattr(budget, field.name)
        assert getattr(again, field.name) == (pytest.approx(wanted) if isinstance(wanted, float | dict) else wanted)
    assert loads(Budget, dumps(budget)) == budget


def test_json_refuses_what_words_refuse() -> None:
    with pytest.raises(ConfigError, match="unknown field"):
        loads(Budget, '{"p98_ms": 3}')
    with pytest.raises(BudgetError, match="p99"):
        loads(Budget, '{"p99_ms": -3}')


@pytest.mark.parametrize(("bytes", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.54 kB"), (2.5e6, "2.5 MB"), (3e9, "3 GB")])
def test_size(bytes: float, text: str) -> None:
    assert size(bytes) == text
