"""Rows of fewer numbers: what is kept, what is left alone, and what is refused."""

import dataclasses

import pytest
import torch

from pennyweight.compress.narrow import NarrowTables, principal
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.hashed import Narrow
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, seeded, spec_of
from pennyweight.model.tables import rows_of
from pennyweight.model.transform import Env


@pytest.fixture(scope="module")
def given() -> tuple[Bundle, Env]:
    """A net whose user table has rank 3, near enough."""
    data = Clicks(sizes=(600, 800, 6), seed=1, strength=0.7).dataset(3000)
    spec = spec_of(DNN, columns=data.schema.columns, dim=8, hidden=[16])
    model = Model.of(seeded(spec, 0), spec)
    path = "embeddings.tables.user.weight"
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(len(model.state[path]), 3, generator=g) @ torch.randn(3, 8, generator=g)
    flat += 1e-4 * torch.randn(flat.shape, generator=g)
    flat[0] = 0  # the padding's
    state = {**model.state, path: flat}
    return Bundle(Model(spec, state), data.catalog), Env(train=data)


def table(bundle: Bundle, name: str) -> torch.Tensor:
    return rows_of(bundle.model.build().get_submodule(f"embeddings.tables.{name}"))


def test_a_table_of_low_rank_loses_nothing(given: tuple[Bundle, Env], tmp_path) -> None:
    bundle, env = given
    narrow = NarrowTables(dim=3, only=("*.user",)).apply(bundle, env)
    layer = narrow.model.spec.layers["embeddings.tables.user"]
    assert isinstance(layer, Narrow) and layer.width == 3 and narrow.bytes < bundle.bytes
    torch.testing.assert_close(table(narrow, "user"), table(bundle, "user"), atol=2e-3, rtol=0)
    assert torch.equal(table(load(save(narrow, tmp_path / "b")), "user"), table(narrow, "user"))
    smaller = QuantizeTables("int8", only=("*.user.short",)).apply(narrow, env)
    assert smaller.bytes < narrow.bytes


def test_rows_that_are_looked_up_lose_least() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 8, generator=g)
    weights = torch.ones(500)
    weights[:20] = 1000

    def lost(axes: torch.Tensor) -> float:
        kept = axes[:, :3]
        return float((rows - rows @ kept @ kept.T)[:20].square().sum())

    assert lost(principal(rows, weights)) < 0.8 * lost(principal(rows, torch.ones(500)))


def test_small_tables_and_those_of_fewer_bits_stay(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    narrow = NarrowTables(keep=0.5).apply(bundle, env)
    assert "embeddings.tables.f0" not in narrow.model.spec.layers, "eight rows are smaller than the matrix"
    with pytest.raises(
        PlanError, match=r"no full fp32 table would get smaller with 50% of their numbers a row; tables: .*short"
    ):
        NarrowTables(keep=0.5).apply(narrow, env)
    int4 = QuantizeTables("int4").apply(bundle, env)
    with pytest.raises(PlanError, match="no full fp32 table"):
        NarrowTables(dim=4).apply(int4, env)


def test_impossible_settings_and_broken_rows_are_refused(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    with pytest.raises(ConfigError, match="keep must be above 0"):
        NarrowTables(keep=0)
    state = {
        **bundle.model.state,
        "embeddings.tables.user.weight": bundle.model.state["embeddings.tables.user.weight"] * torch.nan,
    }
    with pytest.raises(PlanError, match=r"layer embeddings\.tables\.user holds"):
        NarrowTables().apply(bundle.replace(model=Model(bundle.model.spec, state)), env)
    assert dataclasses.replace(NarrowTables(), dim=3).describe() == "table rows of 3 numbers"
