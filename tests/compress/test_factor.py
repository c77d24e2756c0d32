"""Wide layers as two narrow ones: which are taken, how near they come, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from pennyweight.compress.factor import FactorDense, stiff
from pennyweight.compress.prune import PruneNeurons
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.dense import Dense, LowRank
from pennyweight.model.ranking import DCNv2
from pennyweight.model.spec import Model, call, seeded, spec_of
from pennyweight.model.transform import Env

COLUMNS = (
    Column("user", "user", "categorical", 40),
    Column("item", "item", "categorical", 40),
    Column("label", "label", "numeric"),
)
CROSS = ("cross.layers.0", "cross.layers.1")


@pytest.fixture
def rows() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = {n: torch.randint(2, 40, (600,), generator=draw).numpy() for n in ("user", "item")}
    return Dataset.from_arrays({**ids, "label": (ids["user"] % 2).astype("float32")}, Schema(COLUMNS))


@pytest.fixture
def given(rows: Dataset) -> Bundle:
    spec = spec_of(DCNv2, columns=COLUMNS, dim=24, cross=2, hidden=[64, 32])
    module = seeded(spec, 0)
    nn.init.normal_(module.get_submodule("embeddings.tables.user").weight)
    nn.init.normal_(module.get_submodule("embeddings.tables.item").weight)
    return Bundle(Model.of(module, spec), catalog=rows.catalog)


def outputs(bundle: Bundle, rows: Dataset) -> torch.Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(), next(rows.batches(600)))


def test_only_layers_that_cannot_be_pruned_are_taken(given: Bundle, rows: Dataset) -> None:
    assert tuple(stiff(given.model.build(), (), rows)) == CROSS
    made = FactorDense(0.25).apply(given, Env(rows))
    assert made.model.spec.layers == {p: LowRank(48, 16, 48) for p in CROSS}
    narrow = FactorDense(0.5, only=("mlp.*",)).apply(given, Env(rows))
    assert narrow.model.spec.layers == {"mlp.3": LowRank(64, 16, 32)}  # mlp.0, 48 x 64, would hold .88 of its weights


def test_nothing_is_stiff_where_it_hardly_matters() -> None:
    net = nn.Sequential(nn.Linear(48, 512), nn.ReLU(), nn.Linear(512, 48), nn.Softmax(1), nn.Linear(48, 24))
    assert not stiff(net, (), None)


def test_a_layer_of_low_rank_gives_what_it_gave(given: Bundle, rows: Dataset) -> None:
    draw = torch.Generator().manual_seed(1)
    low = torch.randn(48, 8, generator=draw) @ torch.randn(8, 48, generator=draw) / 8
    state = {**given.model.state, **{f"{p}.weight": low for p in CROSS}}
    given = given.replace(model=Model(given.model.spec, state))
    made = FactorDense(0.2).apply(given, Env(rows))
    assert made.model.bytes < given.model.bytes
    torch.testing.assert_close(outputs(made, rows), outputs(given, rows), rtol=1e-3, atol=1e-3)


def test_outputs_decide_and_not_weights(given: Bundle, rows: Dataset) -> None:
    """Inputs that never vary carry the largest weights: the components of the outputs do not look at them."""
    state = {k: v.clone() for k, v in given.model.state.items()}
    state["embeddings.tables.user.weight"][:] = 0.5
    state["embeddings.tables.item.weight"][:, 16:] = 0.5
    state["cross.layers.0.weight"][:, :24] *= 10
    given = given.replace(model=Model(given.model.spec, state))
    made = FactorDense(1 / 3, only=("cross.layers.0",)).apply(given, Env(rows))  # 16 numbers vary, so rank 16 is all there is
    torch.testing.assert_close(outputs(made, rows), outputs(given, rows), rtol=1e-3, atol=1e-2)


def test_both_parts_are_dense_layers_like_any(given: Bundle, rows: Dataset, tmp_path: Path) -> None:
    env = Env(rows)
    made = QuantizeDense("int8").apply(FactorDense(0.25).apply(PruneNeurons(0.5).apply(given, env), env), env)
    layers = made.model.spec.layers
    assert layers["cross.layers.0.0"] == Dense(48, 16, bias=False, data_type="int8")
    assert layers["cross.layers.0.1"] == Dense(16, 48, data_type="int8")
    save(made, tmp_path / "b")
    assert torch.equal(outputs(load(tmp_path / "b"), rows), outputs(made, rows))


def test_a_shared_rank_is_counted() -> None:
    layer = LowRank(48, 16, 32)
    assert layer.bytes() == 4 * (48 * 16 + 16 * 32 + 32) == sum(t.numel() * 4 for t in layer.build().state_dict().values())
    assert layer.flops() == 2 * 48 * 16 + 2 * 16 * 32 + 32


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            FactorDense(0.9),
            "no dense layer would lose a quarter of its weights at 90% of its rank; dense layers: cross.layers.0",
        ),
        (FactorDense(skip=("cross.*",)), "no dense layer would lose"),
        (FactorDense(only=("tower",)), "no layer matches 'tower'"),
    ],
)
def test_what_cannot_be_done_is_said(given: Bundle, rows: Dataset, transform: FactorDense, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        transform.apply(given, Env(rows))
    with pytest.raises(PlanError, match=r"needs env\.calib"):
        FactorDense(0.25).apply(given, Env())


def test_nan_weights_and_impossible_shares_are_refused(given: Bundle, rows: Dataset) -> None:
    state = {**given.model.state, "cross.layers.0.weight": torch.full((48, 48), torch.nan)}
    with pytest.raises(PlanError, match=r"layer cross.layers.0 holds 2304 NaN"):
        FactorDense(0.25, only=("cross.layers.0",)).apply(
            dataclasses.replace(given, model=Model(given.model.spec, state)), Env(rows)
        )
    with pytest.raises(ConfigError, match=r"keep = 1.0"):
        FactorDense(1.0)
