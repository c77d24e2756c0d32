"""Synthetic data: seeded, as frequent as Zipf says, and with something to learn."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pennyweight.core.errors import ConfigError
from pennyweight.data import synthetic
from pennyweight.data.synthetic import Clicks, walks


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
