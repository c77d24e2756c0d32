"""A dataset with every kind of column, small enough for a training to be seconds and skewed enough for rows to repeat."""

from pathlib import Path

import numpy as np
import pytest

from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema

COLUMNS = (
    Column("user", "user", "categorical", 300),
    Column("item", "item", "categorical", 400),
    Column("tags", "item", "sequence", 50, 5),
    Column("history", "user", "sequence", 400, 10, shares="item"),
    Column("hour", "context", "numeric"),
    Column("label", "label", "numeric"),
)


def clicks(n: int, seed: int = 0) -> Dataset:
    """Clicks by planted tastes; items and histories follow a power law."""
    rng, taste = np.random.default_rng(seed), np.random.default_rng(99)
    users, items = taste.normal(size=300), taste.normal(size=400)
    user, item = rng.integers(2, 300, n), 2 + rng.zipf(1.3, n) % 398
    hour = rng.normal(size=n).astype(np.float32)
    history = np.where(rng.random((n, 10)) < 0.3, 0, 2 + rng.zipf(1.3, (n, 10)) % 398)
    history = np.take_along_axis(history, np.argsort(history > 0, axis=1, kind="stable"), 1)
    label = rng.random(n) < 1 / (1 + np.exp(-(users[user] * items[item] + users[user] + items[item] + hour)))
    columns = {
        "user": user, "item": item, "tags": rng.integers(0, 50, (n, 5)), "history": history, "hour": hour,
        "label": label.astype(np.float32),
    }  # fmt: skip
    return Dataset.from_arrays(columns, Schema(COLUMNS))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset on disk."""
    path = tmp_path_factory.mktemp("clicks") / "data"
    clicks(2600).save(path)
    return path
