"""Training while rounded: better than rounding afterwards, ships what was judged, and says when it cannot."""

import dataclasses

import numpy as np
import pytest
import torch

from pennyweight.compress.aware import TrainRounded
from pennyweight.compress.distill import Distill
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.rotate import RotateTables
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.bundle import Bundle
from pennyweight.model.retrieval import MatrixFactorization
from pennyweight.model.spec import Model, spec_of
from pennyweight.model.train import Queries, Recipe, fit, scores
from pennyweight.model.transform import Env, plan

COLUMNS = (Column("user", "user", "categorical", 400), Column("item", "item", "categorical", 600))
RECIPE = Recipe(loss="sampled-softmax", negatives=100, batch=256, lr=0.02, epochs=12, patience=12, metric="ndcg@10")


@pytest.fixture(scope="module")
def visits() -> Env:
    """Visits in a plane of tastes: people go to what is near."""
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(400, 4)), rng.normal(size=(600, 4))
    chance = np.exp(3 * here @ there.T / 2)
    chance[:, :2] = 0
    items = np.stack([rng.choice(600, 25, replace=False, p=c / c.sum()) for c in chance[2:]])
    data = Dataset.from_arrays({"user": np.repeat(np.arange(2, 400), 25), "item": items.ravel()}, Schema(COLUMNS))
    train, valid, _ = data.split("random", (0.8, 0.19, 0.01))
    return Env(train=train, valid=valid, recipe=RECIPE, seed=1)


@pytest.fixture(scope="module")
def found(visits: Env) -> Bundle:
    spec = spec_of(MatrixFactorization, columns=COLUMNS, dim=16, bias=False, scale=8.0)
    torch.manual_seed(0)
    module = MatrixFactorization(COLUMNS, 16, bias=False, scale=8.0)
    fit(module, visits.train, visits.valid, visits.recipe)
    return Bundle(Model.of(module, spec))


@pytest.fixture(scope="module")
def taught(visits: Env, found: Bundle) -> Env:
    return dataclasses.replace(visits, teachers=(found.model,))


def ndcg(bundle: Bundle, env: Env) -> float:
    return Queries.of(env.valid, [env.train]).rank(bundle.model.build(env.allow), 10).ndcg


TRAINING = Distill(epochs=10, lr=0.005, schedule="cosine")


@pytest.mark.parametrize(
    ("aware", "after"),
    [
        (TrainRounded("int2", training=TRAINING), QuantizeTables("int2")),
        (TrainRounded(parts=8, codes=16, training=TRAINING), ShareRows(8, 16)),
    ],
    ids=["rows", "codes"],
)
def test_training_takes_back_what_rounding_cost(aware: TrainRounded, after: ShareRows, found: Bundle, taught: Env) -> None:
    seen = []
    small = aware.apply(found, dataclasses.replace(taught, watch=seen.append))
    plain = after.apply(found, taught)
    assert small.bytes == plain.bytes
    assert small.model.spec == plain.model.spec
    lost, left = ndcg(found, taught) - ndcg(plain, taught), ndcg(found, taught) - ndcg(small, taught)
    assert lost > 0.01 and left < 0.7 * lost
    judged = max(log.metric for log in seen if hasattr(log, "loss") and hasattr(log, "seconds"))
    assert ndcg(small, taught) == pytest.approx(judged, abs=1e-4)


def test_codebooks_are_written_smaller_afterwards(found: Bundle, taught: Env) -> None:
    both = plan(TrainRounded(parts=4, codes=32, training=TRAINING), QuantizeTables("int8")).apply(found, taught)
    assert {layer.data_type for layer in both.model.spec.layers.values()} == {"int8"}
    assert not both.model.build().users.weight[0].any()


def test_the_rest_of_a_model_trains_along_and_bags_stay(given: Bundle, env: Env) -> None:
    small = TrainRounded("int4", training=Distill(epochs=1)).apply(given, env)
    assert {path: layer.data_type for path, layer in small.model.spec.layers.items()} == {"user": "int4", "item": "int4"}
    assert not torch.equal(small.model.state["net.0.weight"], given.model.state["net.0.weight"])
    assert small.model.state.keys() >= {"tags.weight", "item.packed"} and not any("grid" in n for n in small.model.state)
    assert np.isfinite(scores(small.model.build(env.allow), env.valid, inputs=small.model.spec.inputs)).all()


def test_what_cannot_be_rounded_is_said(found: Bundle, taught: Env) -> None:
    with pytest.raises(
        PlanError, match=r"no table would get smaller by tables to 4 shared codes.*users \(full fp32, 400 x 16\)"
    ):
        TrainRounded(parts=4, only=("users",)).apply(found, taught)
    with pytest.raises(PlanError, match=r"needs env\.teachers"):
        TrainRounded().apply(found, dataclasses.replace(taught, teachers=()))
    with pytest.raises(ConfigError, match="parts = -1, codes = 256"):
        TrainRounded(parts=-1)


def test_turning_changes_no_answer_and_puts_most_first(found: Bundle, taught: Env) -> None:
    turned = RotateTables().apply(found, taught)
    for path in ("users", "items"):
        before, after = (b.model.state[f"{path}.weight"] for b in (found, turned))
        assert torch.allclose(after.square().sum(1), before.square().sum(1), rtol=1e-4)
        assert not after[0].any()
    with pytest.raises(PlanError, match="lie along these axes already"):
        RotateTables().apply(turned, taught)
    both = torch.cat([turned.model.state[f"{path}.weight"] for path in ("users", "items")])
    energy = both.square().mean(0)
    assert energy[:8].sum() > energy[8:].sum()
    a, b = (scores(m.model.build(), taught.valid) for m in (found, turned))
    assert np.allclose(a, b, atol=1e-4)


def test_fewer_axes_lose_less_than_fewer_numbers(found: Bundle, taught: Env) -> None:
    narrow = RotateTables(dim=8).apply(found, taught)
    assert narrow.model.build().users.embedding_dim == 8
    cut = {n: torch.where(torch.arange(16) < 8, t, 0.0) for n, t in found.model.state.items()}
    assert ndcg(narrow, taught) > ndcg(found.replace(model=Model(found.model.spec, cut)), taught)


def test_axes_are_dealt_evenly_to_parts(found: Bundle, taught: Env) -> None:
    even = RotateTables(parts=4).apply(found, taught)
    energy = sum(even.model.state[f"{p}.weight"].square().mean(0) for p in ("users", "items"))
    parts = energy.log().reshape(4, 4).sum(1)
    assert float(parts.max() - parts.min()) < 2.0


def test_tables_that_are_read_otherwise_are_not_turned(given: Bundle, env: Env, found: Bundle, taught: Env) -> None:
    with pytest.raises(PlanError, match="not only added and multiplied"):
        RotateTables(only=("user", "item")).apply(given, env)
    with pytest.raises(PlanError, match="full, fp32 and of one width"):
        RotateTables().apply(given, env)
    with pytest.raises(PlanError, match="dim = 17, and rows have 16"):
        RotateTables(dim=17).apply(found, taught)
    with pytest.raises(ConfigError, match="dim a multiple of parts"):
        RotateTables(dim=9, parts=4)
