"""Metrics against scikit-learn and against brute force over all orders of tied items."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.model import metrics
from pennyweight.model.metrics import Lists


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_row_metrics_agree_with_scikit_learn(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    p = (rng.integers(1, levels, 2000) / levels).astype(np.float32)
    y = (rng.random(2000) < 0.3).astype(np.float32)
    assert metrics.auc(y, p) == pytest.approx(oracle.roc_auc_score(y, p), abs=1e-12)
    assert metrics.log_loss(y, p) == pytest.approx(oracle.log_loss(y, p.astype(np.float64)), abs=1e-12)
    assert metrics.accuracy(y, p) == oracle.accuracy_score(y, p > 0.5)
    assert metrics.rmse(y, p) == pytest.approx(oracle.root_mean_squared_error(y, p.astype(np.float64)))
    base = oracle.log_loss(y, np.full(2000, y.mean()))
    assert metrics.normalized_entropy(y, p) == pytest.approx(metrics.log_loss(y, p) / base)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 4, 10**6])
@pytest.mark.parametrize("k", [1, 5, 30, 100])
def test_ndcg_agrees_with_scikit_learn_ties_included(seed: int, levels: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((20, 60)) < 0.1
    truth[:, 0] = True
    scores = rng.integers(0, levels, (20, 60)).astype(np.float32)
    assert metrics.ndcg_at_k(truth, scores, k) == pytest.approx(oracle.ndcg_score(truth, scores, k=k), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recall_and_hits_are_the_mean_over_all_orders_of_tied_items(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    truth = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    recalls, hits = [], []
    for order in itertools.permutations(range(n)):
        best = sorted(order, key=lambda i: -scores[i])[:k]
        found = sum(truth[i] for i in best)
        recalls.append(found / sum(truth))
        hits.append(found > 0)
    assert metrics.recall_at_k([truth], [scores], k) == pytest.approx(np.mean(recalls))
    assert metrics.hit_rate_at_k([truth], [scores], k) == pytest.approx(np.mean(hits))


def test_known_values() -> None:
    truth = [[1, 0, 1, 0], [0, 1, 0, 0]]
    scores = [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]
    assert metrics.recall_at_k(truth, scores, 2) == pytest.approx((0.5 + 1) / 2)
    assert metrics.hit_rate_at_k(truth, scores, 1) == pytest.approx(0.5)
    first = 1 / (1 + 1 / math.log2(3))
    assert metrics.ndcg_at_k(truth, scores, 2) == pytest.approx((first + 1 / math.log2(3)) / 2)


def test_a_constant_model_ranks_like_chance() -> None:
    truth = np.eye(50)
    assert metrics.recall_at_k(truth, np.zeros((50, 50)), 10) == pytest.approx(0.2)


def test_full_ranking_leaves_out_what_was_seen_and_users_without_truth() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0], [9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    truth = Lists.group(np.array([0, 2]), np.array([2, 2]), 3)
    seen = Lists.group(np.array([0, 0]), np.array([0, 1]), 3)
    found = metrics.full_ranking(lambda a, b: scores[a:b].clone(), truth, seen, k=1)
    assert (found.users, found.recall, found.ndcg) == (2, 1.0, 1.0)
    without = metrics.full_ranking(lambda a, b: scores[a:b].clone(), truth, None, k=1)
    assert without.recall == 0.5


def test_full_ranking_does_not_depend_on_the_chunk() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 9, (40, 70)).astype(np.float32))
    truth = Lists.group(rng.integers(0, 40, 99), rng.integers(0, 70, 99), 40)
    seen = Lists.group(rng.integers(0, 40, 200), rng.integers(0, 70, 200), 40)
    one, many = (metrics.full_ranking(lambda a, b: scores[a:b].clone(), truth, seen, 10, c) for c in (7, 256))
    assert one.ndcg == pytest.approx(many.ndcg) and one.recall == pytest.approx(many.recall) and one.users == many.users


def test_all_items_seen_but_one() -> None:
    truth, seen = Lists.group(np.array([0]), np.array([3]), 1), Lists.group(np.zeros(9, np.int64), np.arange(9), 1)
    assert metrics.full_ranking(lambda a, b: torch.zeros(1, 10), truth, seen, k=2).recall == 1.0


def test_lists_group_once_and_in_order() -> None:
    lists = Lists.group(np.array([2, 0, 2, 2]), np.array([5, 7, 1, 5]), 4)
    assert [lists.cut(u, u + 1).items.tolist() for u in range(4)] == [[7], [], [1, 5], []]


def test_calibration() -> None:
    y, p = np.array([1.0, 0, 0, 1]), np.array([0.9, 0.2, 0.2, 0.9])
    assert metrics.calibration(y, p) == pytest.approx(1.1)
    assert metrics.calibration_error(y, p) == pytest.approx((2 * 0.2 + 2 * 0.1) / 4)
    assert metrics.calibration_error(np.ones(3), np.ones(3)) == 0


def test_registry_takes_logits() -> None:
    y, z = np.array([1.0, 0, 1]), np.array([800.0, -800.0, 0.0])
    assert metrics.METRICS["log_loss"].of(y, z) == pytest.approx(math.log(2) / 3)
    assert metrics.METRICS["accuracy"].of([1, 0], [[0.1, 3.0], [0.2, 0.1]]) == 1.0
    assert metrics.higher("auc") and metrics.higher("ndcg@10") and not metrics.higher("log_loss")


def test_log_loss_of_classes_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 4, 200), rng.normal(size=(200, 4))
    said = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert metrics.METRICS["log_loss"].of(y, z) == pytest.approx(oracle.log_loss(y, said))
    two = np.stack([np.zeros(200), z[:, 0]], 1)
    assert metrics.METRICS["log_loss"].of(y % 2, two) == pytest.approx(metrics.METRICS["log_loss"].of(y % 2, z[:, 0]))


@pytest.mark.parametrize("classes", [0, 4])
def test_refined_log_loss_is_blind_to_confidence_and_not_to_order(classes: int) -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, classes or 2, 500)
    z = rng.normal(size=(500, classes)) + 2 * np.eye(classes)[y] if classes else rng.normal(size=500) + 2 * y - 1
    of = metrics.METRICS["refined_log_loss"].of
    assert of(y, z) == pytest.approx(of(y, 7 * z), rel=1e-4)
    assert of(y, z) <= metrics.METRICS["log_loss"].of(y, z)
    assert of(y, z + rng.normal(size=z.shape)) > of(y, z)


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="of 3 labels 0 are positive"):
        metrics.auc([0, 0, 0], [1, 2, 3])
    with pytest.raises(DataError, match="1 of 2 scores are not numbers"):
        metrics.auc([0, 1], [1, math.nan])
    with pytest.raises(DataError, match="shape"):
        metrics.log_loss([0, 1], [0.5])
    with pytest.raises(DataError, match="none of 2 users"):
        metrics.recall_at_k(np.zeros((2, 3)), np.ones((2, 3)), 1)
    with pytest.raises(ConfigError, match="unknown metric 'ndcg@x'; known: auc"):
        metrics.ranking("ndcg@x")
