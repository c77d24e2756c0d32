"""Exact search is exact, approximate search says how near it is, and nobody is shown what is hidden."""

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest

from pennyweight.accelerate import index as module
from pennyweight.accelerate.index import Found, Ids, SetIndex, build, choose, opened, recall
from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PlanError
from pennyweight.model.bundle import Index
from pennyweight.model.transform import Transform

faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is missing: pip install faiss-cpu")
EVERY = [
    pytest.param(Index("exact", "fp32"), id="exact-fp32"),
    pytest.param(Index("exact", "fp16"), id="exact-fp16"),
    pytest.param(Index("exact", "int8"), id="exact-int8"),
    pytest.param(Index("ivf", "fp32", lists=64, probes=16), id="ivf-fp32", marks=faiss),
    pytest.param(Index("ivf", "fp16", lists=64, probes=16), id="ivf-fp16", marks=faiss),
    pytest.param(Index("ivf", "int8", lists=64, probes=16), id="ivf-int8", marks=faiss),
]


def clustered(items: int, queries: int = 32, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((50, dim)).astype(np.float32)
    vectors = centres[draw.integers(0, 50, items)] + 0.3 * draw.standard_normal((items, dim)).astype(np.float32)
    asked = centres[draw.integers(0, 50, queries)] + 0.3 * draw.standard_normal((queries, dim)).astype(np.float32)
    return vectors * draw.lognormal(0, 0.2, (items, 1)).astype(np.float32), asked


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, hidden: Sequence[Ids] = ()) -> list[Found]:
    """By a full sort in double precision."""
    out = []
    for n, query in enumerate(queries):
        scores = vectors.astype(np.float64) @ query.astype(np.float64)
        if hidden:
            scores[hidden[n]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[np.isfinite(scores[best])]
        out.append(Found(best, scores[best].astype(np.float32)))
    return out


@pytest.mark.parametrize("items", [1, 7, 4095, 70_000, 2 * 65536 + 1])
@pytest.mark.parametrize("k", [1, 100])
def test_exact_is_exact(items: int, k: int) -> None:
    vectors, queries = clustered(items, 5)
    found, wanted = build(vectors).search(queries, k), brute(vectors, queries, k)
    for f, w in zip(found, wanted, strict=True):
        assert len(f.places) == min(k, items) and f.scores == pytest.approx(w.scores, rel=1e-4, abs=1e-5)
    assert recall(found, wanted) > 0.999


def test_the_best_may_all_lie_in_one_group() -> None:
    """Selection by groups must not take one an item a group: here all of the best share one, and the next block has more."""
    vectors = np.full((100_000, 4), -1.0, np.float32)
    place = np.arange(32) * 128 + 5  # one group of the first block
    vectors[place] = np.arange(1, 33, dtype=np.float32)[:, None]
    vectors[90_000:90_050] = np.arange(33, 83, dtype=np.float32)[:, None]
    (found,) = build(vectors).search(np.ones((1, 4), np.float32), 60)
    assert found.places.tolist() == [*range(90_049, 89_999, -1), *place[:-11:-1].tolist()]


@pytest.mark.parametrize("index", EVERY)
def test_nearly_all_of_the_best_are_found(index: Index) -> None:
    vectors, queries = clustered(70_000)
    searcher = build(vectors, index, threads=1)
    assert recall(searcher.search(queries, 50), brute(vectors, queries, 50)) >= (0.999 if index.data_type == "fp32" else 0.97)
    per = {"fp32": 64, "fp16": 32, "int8": 16}[index.data_type]
    assert per <= searcher.bytes / len(vectors) <= per + 9, "bytes an item: the vector, a scale or an id, few for centroids"


@pytest.mark.parametrize("index", EVERY)
@pytest.mark.parametrize("items", [3_000, 70_000])
def test_what_is_hidden_is_left_out_inside_the_search(index: Index, items: int) -> None:
    vectors, queries = clustered(items, 4)
    searcher = build(vectors, index, threads=1)
    seen = [f.places for f in searcher.search(queries, 200)]
    seen[2] = np.empty(0, np.int64)
    found = searcher.search(queries, 50, seen)
    for f, out in zip(found, seen, strict=True):
        assert len(f.places) == 50 and not np.isin(f.places, out).any()
    assert recall(found, brute(vectors, queries, 50, seen)) > 0.9


@pytest.mark.parametrize("index", EVERY)
def test_k_are_found_while_k_are_left(index: Index) -> None:
    """Ten items are not hidden, wherever their lists are: all ten come, and no eleventh."""
    vectors, queries = clustered(3_000, 2)
    left = np.arange(0, 3_000, 300)
    hidden = [np.setdiff1d(np.arange(3_000), left), np.arange(3_000)]
    some, none = build(vectors, index, threads=1).search(queries, 50, hidden)
    assert sorted(some.places) == left.tolist() and len(none.places) == 0


@pytest.mark.parametrize("index", EVERY)
def test_cosine_forgets_lengths(index: Index) -> None:
    vectors, queries = clustered(70_000, 8)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = Index(index.kind, index.data_type, "cosine", index.lists, index.probes)
    found = build(vectors, cosine, threads=1).search(5 * queries, 50)
    assert recall(found, brute(unit, queries, 50)) > 0.9
    assert found[0].scores.max() <= 1.01


@faiss
def test_the_same_seed_builds_the_same_index() -> None:
    vectors, queries = clustered(20_000, 4)
    first, second = (build(vectors, Index("ivf", "int8", lists=64, probes=4), threads=1, seed=3) for _ in range(2))
    for f, s in zip(first.search(queries, 20), second.search(queries, 20), strict=True):
        assert f.places.tolist() == s.places.tolist()


@faiss
def test_the_choice_keeps_the_budget_for_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are given, recall is measured: the cheapest lists that lose at most the share allowed."""
    monkeypatch.setattr(module, "_ms", lambda searchers, *_: [3.0, 1.0 if searchers[-1].index.data_type == "int8" else 0.5])  # type: ignore[attr-defined]
    vectors, queries = clustered(30_000, 64)
    best, tried = choose(vectors, queries, k=50, drop=0.02, threads=1)
    assert (best.index.kind, best.index.data_type, best.index.k) == ("ivf", "fp16", 50) and best.index.recall >= 0.98
    assert [t.index.kind for t in tried] == ["exact", "ivf", "ivf"] and tried[2].note == "chosen"
    found = build(vectors, best.index, threads=1).search(queries, 50)
    assert recall(found, brute(vectors, queries, 50)) >= 0.975, "measured once more"
    monkeypatch.setattr(module, "_ms", lambda searchers, *_: [3.0, 2.9])
    assert choose(vectors, queries, k=50, threads=1)[0].index.kind == "exact", "not worth what it loses"


def test_small_catalogues_are_searched_exactly() -> None:
    vectors, queries = clustered(500, 8)
    best, tried = choose(vectors, queries)
    assert best.index == Index() and len(tried) == 1
    with pytest.raises(PlanError, match="got 1"):
        choose(vectors, queries[:1])


def test_without_faiss_it_is_exact_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "faiss" else real(name))
    vectors, queries = clustered(30_000, 8)
    with pytest.raises(DeviceError, match="pip install faiss-cpu"):
        build(vectors, Index("ivf"))
    searcher, note = opened(vectors, Index("ivf"), threads=1)
    assert "pip install faiss-cpu" in note and "exact instead" in note
    assert recall(searcher.search(queries, 20), brute(vectors, queries, 20)) == 1.0
    best, tried = choose(vectors, queries, k=20, threads=1)
    assert best.index.kind == "exact" and "pip install faiss-cpu" in tried[-1].note


def test_it_is_a_transform() -> None:
    made = SetIndex(Index("ivf", "int8", lists=4096, probes=32, recall=0.9912, k=100))
    assert decode(Transform, encode(made)) == made
    assert made.describe() == "find candidates in 32 of 4096 lists, item vectors in int8, recall 0.9912 of exact"
    assert SetIndex().describe() == "find candidates exactly, item vectors in fp32"


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda v, q: build(v[:0]), DataError, r"\(0, 16\)"),
        (lambda v, q: build(np.where(v > 1, np.nan, v)), DataError, "not finite"),
        (lambda v, q: build(v).search(q[:, :3], 5), DataError, r"\[queries, 16\], got shape"),
        (lambda v, q: build(v).search(q, 5, [np.array([1])]), ConfigError, "1 lists of hidden items for 32"),
        (lambda v, q: Index(probes=-1), ConfigError, "probes=-1"),
        (lambda v, q: Index(recall=1.5), ConfigError, "1.5"),
    ],
)
def test_bad_input(wrong, error: type[Exception], said: str) -> None:  # type: ignore[no-untyped-def]
    vectors, queries = clustered(100)
    with pytest.raises(error, match=said):
        wrong(vectors, queries)
