"""The shared blocks against their formulas written out."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import Column
from pennyweight.model import layers
from pennyweight.model.layers import FM, MLP, Beside, Cross, Dropout, Embeddings, Interaction

COLUMNS = (
    Column("user", "user", "categorical", 9),
    Column("seen", "user", "sequence", 12, 4, shares="item"),
    Column("item", "item", "categorical", 12),
    Column("genres", "item", "sequence", 6, 3),
    Column("price", "item", "numeric"),
    Column("place", "context", "numeric", length=2),
    Column("label", "label", "numeric"),
    Column("time", "time", "time"),
)
BATCH = {
    "user": torch.tensor([2, 3, 8]),
    "seen": torch.tensor([[0, 0, 4, 5], [0, 0, 0, 0], [2, 3, 4, 5]]),
    "item": torch.tensor([4, 5, 11]),
    "genres": torch.tensor([[2, 0, 0], [2, 3, 0], [5, 4, 3]]),
    "price": torch.tensor([1.0, 2.0, 3.0]),
    "place": torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
}


def test_embeddings_look_up_pool_and_append_numbers() -> None:
    made = Embeddings(COLUMNS, 3).eval()
    assert list(made.tables) == ["user", "item", "genres"]
    flat = made(BATCH)
    assert flat.shape == (3, made.width) == (3, 4 * 3 + 3)
    fields, numbers = made.fields(flat), made.numbers(flat)
    items = made.tables["item"].weight
    assert torch.equal(fields[:, 0], made.tables["user"].weight[[2, 3, 8]])
    assert torch.allclose(fields[0, 1], (items[4] + items[5]) / 2)
    assert torch.equal(fields[1, 1], torch.zeros(3))
    assert torch.allclose(fields[2, 1], items[2:6].mean(0))
    assert torch.allclose(numbers, torch.tensor([[1.0, 0, 1], [2, 2, 3], [3, 4, 5]]), atol=1e-4)


def test_tables_in_one_give_the_same() -> None:
    given = Embeddings(COLUMNS, 3, std=1.0).eval()
    fused = given.fused()
    assert fused is not given and fused.width == given.width
    torch.testing.assert_close(fused(BATCH), given(BATCH))
    beside = Beside([("user", "item"), *((n,) for n in BATCH if n not in ("user", "item"))], [
        torch.stack([BATCH["user"], BATCH["item"]], 1), *(BATCH[n] for n in BATCH if n not in ("user", "item"))
    ])  # fmt: skip
    assert dict(beside).keys() == BATCH.keys() and len(beside) == len(BATCH)
    torch.testing.assert_close(fused(beside), given(BATCH))
    torch.testing.assert_close(given(beside), given(BATCH))


def test_tables_that_are_not_plain_rows_stay_apart() -> None:
    given = Embeddings(COLUMNS, 4)
    given.tables["user"] = nn.EmbeddingBag(9, 4)
    assert given.fused() is given


def test_numbers_are_normalized_while_training() -> None:
    made = Embeddings(COLUMNS, 3)
    numbers = made.numbers(made(BATCH))
    assert torch.allclose(numbers.mean(0), torch.zeros(3), atol=1e-6)


def test_padding_rows_are_zero_and_stay_zero() -> None:
    made = Embeddings(COLUMNS, 3)
    made(BATCH).sum().backward()
    for t in made.tables.values():
        assert not t.weight[0].any() and not t.weight.grad[0].any()


def test_columns_named_like_methods_or_with_dots_get_tables() -> None:
    columns = tuple(Column(n, "context", "categorical", 5) for n in ("items", "type", "a.b", "plain"))
    made = Embeddings(columns, 2)
    assert list(made.tables) == ["items_", "type_", "a_b", "plain"]
    assert made({n: torch.tensor([3]) for n in ("items", "type", "a.b", "plain")}).shape == (1, 8)


def test_a_schema_without_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one user, item or context column"):
        Embeddings(COLUMNS[-2:], 4)


@pytest.mark.parametrize(("dropout", "norm"), [(0.0, True), (0.5, True), (0.5, False)])
def test_mlp_is_a_sequence_of_plain_layers(dropout: float, norm: bool) -> None:
    made = MLP(6, (8, 4), 1, dropout, norm)
    one = [nn.Linear, *([nn.BatchNorm1d] if norm else []), nn.ReLU, *([Dropout] if dropout else [])]
    assert [type(m) for m in made] == [*one, *one, nn.Linear]
    assert made(torch.randn(5, 6)).shape == (5, 1) and made.outputs == 1 and MLP(6, (8, 4)).outputs == 4


def test_fm_and_interaction_are_the_dot_products_of_all_pairs() -> None:
    rows = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))
    weights, fields = rows[:, :, 0], rows[:, :, 1:]
    pairs = torch.stack([(fields[:, i] * fields[:, j]).sum(1) for i, j in itertools.combinations(range(5), 2)], 1)
    assert torch.allclose(FM(5, 4)(rows.flatten(1)), weights.sum(1) + pairs.sum(1), atol=1e-5)
    assert not FM(5, 4).state_dict()
    made = Interaction(5)
    assert made.width == 10 and torch.allclose(made(fields), pairs, atol=1e-5)
    assert not made.state_dict()


@pytest.mark.parametrize("rank", [0, 2])
def test_cross_multiplies_the_input_once_more_a_layer(rank: int) -> None:
    made, x = Cross(6, 2, rank), torch.randn(4, 6)
    expected = x
    for layer in made.layers:
        expected = x * layer(expected) + expected
    assert torch.allclose(made(x), expected, atol=1e-6)
    assert sum(p.numel() for p in made.parameters()) == 2 * (36 if not rank else 24) + 2 * 6


def test_pooled_is_the_mean_of_what_is_not_padding() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 9, (20, 6)))
    rows = layers.table(9, 4)
    expected = nn.functional.embedding_bag(ids, rows.weight, mode="mean", padding_idx=0)
    assert torch.allclose(layers.pooled(rows, ids), expected, atol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    layer, x = Dropout(p), torch.ones(501, 401, requires_grad=True)
    out = layer(x)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.006)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())
    assert layer.eval()(x) is x


def test_dropout_follows_the_seed_and_treats_every_byte_alike() -> None:
    layer = Dropout(0.5)
    torch.manual_seed(1)
    first = layer(torch.ones(80_000))
    torch.manual_seed(1)
    assert torch.equal(layer(torch.ones(80_000)), first)
    shares = (first.view(-1, 8) == 0).float().mean(0)
    assert ((shares - 0.5).abs() < 0.02).all()


def test_a_row_expanded_over_the_batch_is_looked_up_once() -> None:
    made = Embeddings(COLUMNS, 4)
    columns = [c for c in COLUMNS if c.role in ("user", "item", "context")]
    row = {
        c.name: torch.ones(1, c.length, dtype=torch.long) if c.kind == "sequence" else torch.ones(1, dtype=torch.long)
        for c in columns
    }
    row |= {c.name: torch.ones(1, *([c.length] if c.length else [])) for c in columns if c.kind == "numeric"}
    asked: list[int] = []
    for table in made.tables.values():
        table.register_forward_hook(lambda _, given, __: asked.append(len(given[0])))
    made.eval()
    shared = made({n: v.expand(50, *v.shape[1:]) for n, v in row.items()})
    assert set(asked) == {1}
    assert torch.equal(shared, made({n: v.repeat(50, *[1] * (v.dim() - 1)) for n, v in row.items()}))
