"""Every ranking model: built from JSON, learns a planted signal, and its layers can be replaced by path."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model import ranking
from pennyweight.model.spec import Model, Spec, build, leaves, replace, spec_of
from pennyweight.model.train import Recipe, fit, scores

COLUMNS = (
    Column("user", "user", "categorical", 20),
    Column("item", "item", "categorical", 20),
    Column("history", "user", "sequence", 20, 5, shares="item"),
    Column("price", "item", "numeric"),
    Column("label", "label", "numeric"),
)
MODELS: list[tuple[Any, dict[str, Any]]] = [
    (ranking.DNN, {}),
    (ranking.DeepFM, {}),
    (ranking.DCNv2, {"structure": "parallel"}),
    (ranking.DCNv2, {"structure": "stacked", "rank": 3}),
    (ranking.DLRM, {}),
]
IDS = ["DNN", "DeepFM", "DCNv2-parallel", "DCNv2-stacked", "DLRM"]


def rows(columns: tuple[Column, ...] = COLUMNS, n: int = 4000) -> Dataset:
    rng = np.random.default_rng(0)
    u, i = rng.integers(2, 20, (2, n))
    price = rng.normal(size=n).astype(np.float32)
    history = np.where(rng.random((n, 5)) < 0.5, 0, rng.integers(2, 20, (n, 5)))
    label = (np.where((u + i) % 2 == 0, 1.5, -1.5) + price + rng.logistic(size=n) / 2 > 0).astype(np.float32)
    values = {"user": u, "item": i, "history": history, "price": price, "label": label}
    return Dataset.from_arrays({c.name: values[c.name] for c in columns}, Schema(columns))


def spec(factory: Any, args: dict[str, Any], columns: tuple[Column, ...] = COLUMNS) -> Spec:
    return spec_of(factory, columns=columns, dim=8, hidden=[32, 16], **args)


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_it_learns_what_features_do_together(factory: Any, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    train, valid, _ = rows(n=8000).split("random")
    module = build(spec(factory, args))
    done = fit(module, train, valid, Recipe(lr=0.02, batch=256, epochs=25, patience=8, lr_decay=0.5))
    assert done.metric > 0.9


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_spec_and_state_are_the_whole_model(factory: Any, args: dict[str, Any]) -> None:
    given = decode(Spec, json.loads(json.dumps(encode(spec(factory, args)))))
    torch.manual_seed(0)
    module = build(given)
    fit(module, rows(), rows(), Recipe(epochs=1, batch=512))
    again = Model.of(module, given).build()
    assert np.array_equal(scores(module, rows()), scores(again, rows()))
    assert scores(module, rows()).shape == (4000,)


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_all_tables_and_dense_layers_are_plain_and_can_be_replaced(factory: Any, args: dict[str, Any]) -> None:
    module = build(spec(factory, args)).eval()
    batch = next(rows().batches(50))
    before = module(batch)
    for path, leaf in list(leaves(module)):
        assert type(leaf) in (nn.Embedding, nn.Linear, nn.BatchNorm1d), path
        if isinstance(leaf, nn.Embedding):
            new: nn.Module = nn.Embedding.from_pretrained(leaf.weight.detach().clone())
        elif isinstance(leaf, nn.Linear):
            new = nn.Linear(leaf.in_features, leaf.out_features, leaf.bias is not None)
            new.load_state_dict(leaf.state_dict())
        else:
            continue
        replace(module, path, new)
    assert torch.allclose(module(batch), before, atol=1e-6)


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_without_numbers_and_with_one_row(factory: Any, args: dict[str, Any]) -> None:
    columns = tuple(c for c in COLUMNS if c.name != "price")
    module = build(spec(factory, args, columns)).eval()
    assert module(next(rows(columns).batches(1))).shape == (1,)


@pytest.mark.parametrize(("factory", "args"), MODELS, ids=IDS)
def test_a_broadcast_user_scores_like_repeated_rows(factory: Any, args: dict[str, Any]) -> None:
    module = build(spec(factory, args)).eval()
    batch = next(rows().batches(30))
    shared = {k: v[:1].expand(30, *v.shape[1:]) if k in ("user", "history") else v for k, v in batch.items()}
    copied = {k: v.contiguous() for k, v in shared.items()}
    assert torch.equal(module(shared), module(copied))


def test_dnn_gives_class_scores() -> None:
    made = ranking.DNN(COLUMNS, 4, (8,), outputs=3)
    assert made(next(rows().batches(6))).shape == (6, 3)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="'diagonal' is not one of"):
        ranking.DCNv2(COLUMNS, structure="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dim of at least 2"):
        ranking.DeepFM(COLUMNS, dim=1)
