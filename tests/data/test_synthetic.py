"""Synthetic data: seeded, as frequent as Zipf says, and with something to learn."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pennyweight.core.errors import ConfigError
from pennyweight.data import synthetic
from pennyweight.data.synthetic import CRITEO, Clicks, criteo_like, walks


def test_the_same_in_memory_and_on_disk_and_in_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK", 1000)
    clicks = Clicks(numbers=2, seed=3)
    assert clicks.write(2500, tmp_path / "d").fingerprint == clicks.dataset(2500).fingerprint
    assert clicks.dataset(2500).head(900).fingerprint == clicks.dataset(900).fingerprint
    assert clicks.dataset(900).fingerprint != Clicks(numbers=2, seed=4).dataset(900).fingerprint


def test_labels_follow_the_planted_model() -> None:
    clicks = Clicks(numbers=2)
    data = clicks.dataset(20_000)
    logits = clicks.logits({n: data.column(n) for n in data.columns})
    chance = 1 / (1 + np.exp(-logits))
    assert roc_auc_score(data.column("label"), logits) > 0.85
    assert abs(data.column("label").mean() - chance.mean()) < 0.02
    coin = Clicks(strength=0.0)
    assert abs(coin.dataset(20_000).column("label").mean() - 0.5) < 0.02


def test_frequencies_follow_zipf() -> None:
    counts = np.bincount(Clicks(sizes=(1000, 10), skew=1.0).dataset(65_000).column("user"), minlength=1002)[2:]
    share = counts[:10] / counts.sum()
    assert np.allclose(share, 1 / np.arange(1, 11) / np.sum(1 / np.arange(1, 1001)), rtol=0.15)


def test_walks_can_be_foretold() -> None:
    data = walks(40, 30, 50, history=5, noise=0.1, seed=1)
    later = data.column("time") > 0
    last = data.column("history")[later, -1]
    assert abs(np.mean((last - 2 + 1) % 30 + 2 == data.column("item")[later]) - 0.9) < 0.03
    assert (data.column("history")[~later] == 0).all()


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least a user's and an item's"):
        Clicks(sizes=(10,))


def test_criteo_like_has_its_shape_and_a_tail_worth_learning() -> None:
    """What the ids of the large fields add to the planted AUC, and what those that are seen often add."""
    clicks = criteo_like(200_000)
    assert len(clicks.names) == 26 and clicks.numbers == 13
    assert abs(sum(criteo_like(1_000_000).sizes) - 1_000_000) < 50_000
    assert [n for n in clicks.sizes if n < 10_000] == [n for n in CRITEO if n < 10_000]
    assert clicks.sizes.index(max(clicks.sizes)) == CRITEO.index(max(CRITEO))
    data = clicks.dataset(40_000)
    columns = {n: data.column(n) for n in (*clicks.names, "numbers", "label")}
    assert 0.15 < columns["label"].mean() < 0.35
    best = roc_auc_score(columns["label"], clicks.logits(columns))
    weights, _ = clicks._planted
    tail = np.zeros(40_000)
    for name, weight in zip(clicks.names, weights, strict=True):
        ids = columns[name] - 2
        tail += weight[ids] * (ids >= 100)
    without = roc_auc_score(columns["label"], clicks.logits(columns) - tail)
    assert 0.8 < best < 0.9 and best - without > 0.02
    assert criteo_like(200_000, seed=1).dataset(1000).fingerprint != data.head(1000).fingerprint


def test_the_bias_is_what_logits_start_from() -> None:
    clicks = Clicks(crossed=0.3)
    data = clicks.dataset(60_000)
    columns = {n: data.column(n) for n in clicks.names}
    assert abs(clicks.logits(columns).mean() - clicks.usual) < 0.05
    more = dataclasses.replace(clicks, bias=1.5)
    assert np.allclose(more.logits(columns), clicks.logits(columns) + 1.5)


def test_fewer_ids_than_the_shape_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5000 ids are too few for Criteo's shape; give at least 1\d+"):
        criteo_like(5000)
