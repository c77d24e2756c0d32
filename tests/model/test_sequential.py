"""SASRec: causal, blind to padding, trained on whole sequences; and the choice of the rows to train it on."""

import numpy as np
import pytest
import torch

from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST, Column, Schema
from pennyweight.model.sequential import SASRec, sequences
from pennyweight.model.train import Queries, Recipe, fit, scores

COLUMNS = (
    Column("user", "user", "categorical", 200),
    Column("history", "user", "sequence", 26, 8, shares="item"),
    Column("item", "item", "categorical", 26),
)


def model(**args: object) -> SASRec:
    torch.manual_seed(0)
    return SASRec(COLUMNS, dim=16, **args)  # type: ignore[arg-type]


def batch(*histories: list[int]) -> dict[str, torch.Tensor]:
    return {"history": torch.tensor(histories), "item": torch.full((len(histories),), 5)}


def test_a_state_does_not_see_what_comes_later() -> None:
    made = model().eval()
    one = made.states(batch([0, 0, 3, 4, 5, 6, 7, 8]))
    two = made.states(batch([0, 0, 3, 4, 5, 6, 9, 10]))
    assert torch.allclose(one[:, :6], two[:, :6], atol=1e-6)
    assert not torch.allclose(one[:, 6], two[:, 6], atol=1e-3)


def test_order_matters_and_padding_does_not() -> None:
    made = model().eval()
    forth, back = made.user_vectors(batch([0, 0, 0, 0, 0, 3, 4, 5])), made.user_vectors(batch([0, 0, 0, 0, 0, 4, 3, 5]))
    assert not torch.allclose(forth, back, atol=1e-3)
    short = made.user_vectors(batch([3, 4, 5]))
    assert torch.allclose(forth, short, atol=1e-5)
    assert torch.isfinite(made.user_vectors(batch([0] * 8))).all()


def test_forward_is_the_dot_product_with_the_item_table() -> None:
    made, rows = model(heads=2).eval(), batch([0, 0, 0, 0, 0, 3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 2])
    assert torch.allclose(made(rows), made.user_vectors(rows) @ made.items.weight[5], atol=1e-6)


def walks(*paces: int, n: int = 400) -> Dataset:
    """People who walk through items at a pace of their own: of several, only the last two items tell which."""
    rng = np.random.default_rng(0)
    start, pace = rng.integers(0, 24, n), rng.choice(paces, n)
    path = (start[:, None] + pace[:, None] * np.arange(9)) % 24 + FIRST
    hidden = np.arange(8) < rng.integers(0, 5, n)[:, None]
    columns = {"user": 2 + np.arange(n) % 198, "history": np.where(hidden, 0, path[:, :8]), "item": path[:, 8]}
    return Dataset.from_arrays(columns, Schema(COLUMNS))


@pytest.mark.parametrize(("loss", "paces"), [("sampled-softmax", (1, 5, 7)), ("bpr", (1, 5, 7)), ("gbce", (5,))])
def test_it_learns_order_that_no_bag_of_items_shows(loss: str, paces: tuple[int, ...]) -> None:
    train, valid, test = walks(*paces).split("random")
    module = model(dropout=0.0)
    recipe = Recipe(loss=loss, negatives=12, metric="ndcg@5", lr=0.01, batch=32, epochs=25, patience=25, lr_decay=1.0)  # type: ignore[arg-type]
    fit(module, train, valid, recipe)
    assert Queries.of(test).rank(module, 5).ndcg > 0.6
    assert scores(module, test).shape == (len(test),)


def test_sequences_cover_each_event_once() -> None:
    time = np.concatenate([np.arange(20), np.arange(3), np.arange(8)])
    user = np.repeat([5, 3, 9], [20, 3, 8])
    shuffle = np.random.default_rng(0).permutation(31)
    columns = {"user": user[shuffle], "history": np.zeros((31, 8), np.int64), "item": np.full(31, 4), "time": time[shuffle]}
    data = Dataset.from_arrays(columns, Schema((*COLUMNS, Column("time", "time", "time"))))
    chosen = sequences(data)
    found = sorted(zip(chosen.column("user").tolist(), chosen.column("time").tolist(), strict=True))
    assert found == [(3, 2), (5, 3), (5, 11), (5, 19), (9, 7)]


def test_a_schema_without_history_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a history"):
        SASRec((COLUMNS[0], COLUMNS[2]))
    with pytest.raises(ConfigError, match="16 is not a multiple of its 3 heads"):
        model(heads=3)
    with pytest.raises(ConfigError, match="no history"):
        sequences(Dataset.from_arrays({"user": np.array([2, 3]), "item": np.array([2, 3])}, Schema((COLUMNS[0], COLUMNS[2]))))
