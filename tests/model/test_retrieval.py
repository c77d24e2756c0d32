"""Retrieval models: forward is the dot product of the two vectors, and every pair loss teaches them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.schema import FIRST, Column, Schema
from pennyweight.model import losses
from pennyweight.model.ensemble import Retrievers
from pennyweight.model.retrieval import MatrixFactorization, TwoTower
from pennyweight.model.train import Queries, Recipe, fit

COLUMNS = (
    Column("user", "user", "categorical", 60),
    Column("age", "user", "numeric"),
    Column("history", "user", "sequence", 42, 6, shares="item"),
    Column("item", "item", "categorical", 42),
    Column("genre", "item", "sequence", 8, 2),
    Column("label", "label", "numeric"),
)
MODELS: list[tuple[Any, dict[str, Any]]] = [
    (MatrixFactorization, {}),
    (MatrixFactorization, {"bias": False}),
    (MatrixFactorization, {"bias": False, "scale": 10.0}),
    (TwoTower, {}),
    (TwoTower, {"user_id": False, "scale": 10.0}),
    (TwoTower, {"hidden": [16], "dropout": 0.1}),
]
IDS = ["MF", "MF-plain", "MF-cosine", "TwoTower", "TwoTower-cosine", "TwoTower-MLP"]


def rows(n: int = 3000) -> Split:
    """Each user likes one of four groups of items; the history shows which."""
    rng = np.random.default_rng(0)
    u, i = rng.integers(2, 60, n), rng.integers(2, 42, n)
    past = rng.integers(0, 10, (n, 6)) * 4 + (u % 4)[:, None] + 2
    columns = {
        "user": u,
        "age": rng.normal(size=n).astype(np.float32),
        "history": np.where(past < 42, past, 0),
        "item": i,
        "genre": np.stack([2 + (i - 2) % 4, np.where(i % 3 == 0, 6, 0)], 1),
        "label": ((i - 2) % 4 == u % 4).astype(np.float32),
    }
    return Dataset.from_arrays(columns, Schema(COLUMNS)).split("random", (0.6, 0.2, 0.2))


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_forward_is_the_dot_product_and_each_side_reads_its_own_columns(factory: Any, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = factory(COLUMNS, 8, **args).eval()
    batch = next(rows().train.batches(20))
    mine = {c.name: batch[c.name] for c in COLUMNS if c.role == "user"}
    theirs = {c.name: batch[c.name] for c in COLUMNS if c.role == "item"}
    dots = (module.user_vectors(mine) * module.item_vectors(theirs)).sum(1)
    assert torch.allclose(module(batch), dots, atol=1e-6) and dots.shape == (20,)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(loss="bpr"),
        Recipe(loss="sampled-softmax", negatives=0),
        Recipe(loss="sampled-softmax", negatives=20, popularity=0.5),
        Recipe(loss="sampled-softmax", negatives=1000),
        Recipe(loss="gbce", negatives=20),
        Recipe(loss="bce"),
    ],
    ids=["bpr", "in-batch", "sampled", "full", "gbce", "bce"],
)
@pytest.mark.parametrize(("factory", "args"), [MODELS[0], MODELS[4], MODELS[5]], ids=[IDS[0], IDS[4], IDS[5]])
def test_every_loss_teaches_whom_likes_what(factory: Any, args: dict[str, Any], recipe: Recipe) -> None:
    torch.manual_seed(0)
    train, valid, test = rows()
    module = factory(COLUMNS, 8, **args)
    epochs = 12 if recipe.loss == "bce" else 40  # it reads the rows nobody liked too
    recipe = dataclasses.replace(recipe, lr=0.02, batch=64, epochs=epochs, patience=epochs, lr_decay=1.0, metric="ndcg@5")
    fit(module, train, valid, recipe)
    assert Queries.of(test, [train, valid]).rank(module, 5).ndcg > 0.5


def test_a_cosine_has_neither_norms_nor_biases() -> None:
    made = MatrixFactorization(COLUMNS, 8, bias=False, scale=4.0)
    batch = next(rows().train.batches(20))
    assert torch.allclose(made.user_vectors(batch).norm(dim=1), torch.tensor(4.0))
    assert torch.allclose(made.item_vectors(batch).norm(dim=1), torch.tensor(1.0))
    with pytest.raises(ConfigError, match="a cosine has no biases, and scale is 4"):
        MatrixFactorization(COLUMNS, 8, scale=4.0)


PAIRED = [
    Recipe(loss="bpr"),
    Recipe(loss="sampled-softmax", negatives=0),
    Recipe(loss="sampled-softmax", negatives=20, popularity=0.5),
    Recipe(loss="sampled-softmax", negatives=1000),
    Recipe(loss="gbce", negatives=20),
]


@pytest.mark.parametrize("recipe", PAIRED, ids=["bpr", "in-batch", "sampled", "full", "gbce"])
def test_a_teacher_is_followed_where_likes_say_nothing(recipe: Recipe) -> None:
    """Students of shuffled likes learn the taste from the teacher alone; of two teachers, from the mean of their scores."""
    train, valid, test = rows()
    torch.manual_seed(0)
    teachers = [MatrixFactorization(COLUMNS, 8) for _ in range(2)]
    usual = dataclasses.replace(recipe, lr=0.02, batch=64, epochs=40, patience=40, lr_decay=1.0, metric="ndcg@5")
    for teacher in teachers:
        fit(teacher, train, valid, usual)
    shuffled = np.random.default_rng(0).permutation(train.column("item"))
    noise = Dataset.from_arrays({**{c.name: train.column(c.name) for c in COLUMNS}, "item": shuffled}, train.schema)
    student = MatrixFactorization(COLUMNS, 8)
    taught = dataclasses.replace(usual, distill_alpha=1.0, epochs=40)
    fit(student, noise, valid, taught, teacher=Retrievers(teachers))
    assert Queries.of(test, [train, valid]).rank(student, 5).ndcg > 0.5


def test_several_retrievers_score_the_mean_of_their_scores() -> None:
    torch.manual_seed(0)
    members = [MatrixFactorization(COLUMNS, 8), TwoTower(COLUMNS, 4)]
    batch = next(rows().train.batches(20))
    both = Retrievers(members)
    mean = (members[0](batch) + members[1].eval()(batch)) / 2
    assert torch.allclose((both.user_vectors(batch) * both.item_vectors(batch)).sum(1), mean, atol=1e-6)


def test_two_towers_share_the_item_table_and_leave_the_user_out_if_told() -> None:
    made = TwoTower(COLUMNS, 8, user_id=False)
    assert sorted(made.tables) == ["genre", "item"]
    assert sorted(TwoTower(COLUMNS, 8).tables) == ["genre", "item", "user"]


def test_towers_without_a_side_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 that describe the user"):
        TwoTower((COLUMNS[0], COLUMNS[3]), user_id=False)


def test_sampled_softmax_estimates_the_full_one() -> None:
    """With many draws the estimate comes near the exact loss, for uniform draws and for popular ones."""
    torch.manual_seed(0)
    train = rows().train.take(np.flatnonzero(rows().train.column("label") > 0))
    module = MatrixFactorization(COLUMNS, 8, std=0.5)
    batch = next(train.batches(200))
    exact = losses.pair_loss(module, "sampled-softmax", train, 10**6, 0.0, 0.0)(batch).item()
    for popularity in (0.0, 1.0):
        draw = losses.Draw(losses.Items.of(train).counts, 0, popularity)
        draw.size, draw.every = 20_000, False
        contest = losses._drawn(losses.Items.of(train), draw)
        pairs = losses.pairs_of(module, train.schema, False)(batch)
        near = contest.hard(contest.scores(module, pairs, contest.rivals(pairs)), pairs).item()
        assert near == pytest.approx(exact, abs=0.02)


def test_drawn_items_follow_their_chances_and_never_the_reserved_ids() -> None:
    counts = torch.tensor([0.0, 0, 1, 2, 4, 0])
    torch.manual_seed(0)
    for popularity, expected in ((0.0, [0.25] * 4), (1.0, [1 / 7, 2 / 7, 4 / 7, 0])):
        drawn = torch.bincount(losses.Draw(counts.double(), 1, popularity)(20_000), minlength=6) / 20_000
        assert not drawn[:FIRST].any()
        assert torch.allclose(drawn[FIRST:], torch.tensor(expected), atol=0.02)


def test_bpr_draws_again_what_the_user_likes() -> None:
    train = rows().train
    liked = losses.Liked.of(train)
    assert liked is not None
    users = torch.from_numpy(train.column("user")).long()
    items = torch.from_numpy(train.column("item")).long()
    right = torch.from_numpy(train.column("label") > 0)
    assert liked(users[right], items[right]).all()
    draw = losses.Draw(losses.Items.of(train).counts, 1, 0.0)
    pairs = losses.Pairs(torch.zeros(len(users), 1), items, users)
    torch.manual_seed(0)
    plain, again = liked(users, draw(len(users))), liked(users, losses._unliked(pairs, draw, liked))
    assert again.sum() < plain.sum() / 20


def test_nothing_liked_is_an_error() -> None:
    columns = (COLUMNS[0], COLUMNS[3], COLUMNS[5])
    zero = {"user": [2, 3, 4], "item": [2, 3, 4], "label": [0, 0, 0]}
    with pytest.raises(DataError, match="nothing to learn to retrieve"):
        losses.Items.of(Dataset.from_arrays({k: np.array(v) for k, v in zero.items()}, Schema(columns)))
    with pytest.raises(ConfigError, match="'gbce' needs 1 to 39 negatives"):
        losses.pair_loss(MatrixFactorization(COLUMNS), "gbce", rows().train, 1000, 0.0, 0.75)
