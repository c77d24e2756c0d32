"""Rows along axes: where the bits go, what rounding costs in the metric of the answers, and the table that comes of it."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress.axes import LEFT, CodeAxes, axes, fitted, shared_out
from pennyweight.compress.share import CodeTables
from pennyweight.compress.usage import information
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.spec import Model, call, spec_of
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, plan

ROWS, DIM = 500, 12


class Rated(nn.Module):
    """A click model whose answers rest on one direction of a user's row far more than on the others."""

    def __init__(self, rows: int = ROWS, dim: int = DIM, bag: bool = False) -> None:
        super().__init__()
        self.users = nn.EmbeddingBag(rows, dim, mode="sum") if bag else nn.Embedding(rows, dim, padding_idx=0)
        self.head = nn.Linear(dim, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.users.weight.copy_(torch.randn(rows, dim, generator=generator) * torch.logspace(0, -1, dim))
            if not bag:
                self.users.weight[0] = 0
            self.head.weight.copy_(torch.randn(1, dim, generator=generator).sign() * torch.logspace(-2, 0.5, dim))
            self.head.bias.zero_()

    def forward(self, user: Tensor) -> Tensor:
        """Logits [B]."""
        logits: Tensor = self.head(self.users(user)).squeeze(-1)
        return logits


def rows(n: int = 4000) -> Dataset:
    rng = np.random.default_rng(0)
    schema = Schema((Column("user", "user", "categorical", ROWS), Column("label", "label", "numeric")))
    return Dataset.from_arrays({"user": rng.integers(1, ROWS, n), "label": rng.integers(0, 2, n).astype(np.float32)}, schema)


def given() -> Bundle:
    spec = dataclasses.replace(spec_of(Rated, rows=ROWS, dim=DIM), inputs=("user",))
    return Bundle(Model.of(Rated(), spec))


ALLOW = (f"{__name__}:Rated",)
ENV = Env(train=rows(), allow=ALLOW)


def off(bundle: Bundle, before: Bundle) -> float:
    """The mean squared difference of logits over all users."""
    batch = {"user": torch.arange(1, ROWS)}
    a, b = (call(m.model.build(ALLOW), batch, m.model.spec.inputs) for m in (bundle, before))
    return float((a - b).detach().square().mean())


def test_bits_go_where_they_take_away_most() -> None:
    energy = [0.6, 0.25, 0.1, 0.04, 0.01]

    def cost(bits: tuple[int, ...]) -> float:
        return sum(e * LEFT[b] for e, b in zip(energy, bits, strict=True))

    for total in (1, 4, 7, 10):
        best = min((b for b in itertools.product(range(9), repeat=5) if sum(b) == total), key=cost)
        found = shared_out(energy, total, 1000)
        assert sum(found) == total and found == sorted(found, reverse=True) and all(found)
        assert cost((*found, *[0] * (5 - len(found)))) == pytest.approx(cost(best), rel=1e-9)
    assert shared_out([1.0, 0.0], 16, 1000) == [8, 8], "what is over has nowhere better to go"
    assert max(shared_out([1.0, 0.5], 8, 10)) <= 2, "ten rows are not worth eight levels"


def test_along_axes_costs_add_up() -> None:
    x = torch.randn(300, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    metric = half @ half.T
    turn, energy = axes(x, w, metric)
    assert energy.sum() == pytest.approx(1) and torch.equal(energy, energy.sort(descending=True).values)
    along = x @ turn
    gram = (along * w.unsqueeze(1)).T @ along / w.sum()
    torch.testing.assert_close(gram, torch.diag(energy), atol=1e-6, rtol=0)
    cost = (x @ metric * x).sum(1)  # squared lengths along the axes are costs, up to one factor
    ratio = along.square().sum(1) / cost
    assert ratio.std() / ratio.mean() < 1e-2


def test_what_answers_rest_on_is_kept_first() -> None:
    before = given()
    told = information(before.model, ENV, ["users"])["users"]
    strongest = torch.linalg.eigh(told).eigenvectors[:, -1].abs()
    assert int(strongest.argmax()) == DIM - 1, "where the head's weight is largest"
    here = CodeAxes(2.0).apply(before, ENV)
    evenly = CodeTables(bits=2).apply(before, ENV)
    blind = CodeAxes(2.0).apply(before, Env(allow=ALLOW))
    sizes = [sum(t.nbytes for n, t in b.model.state.items() if n.startswith("users.codes")) for b in (here, evenly, blind)]
    assert sizes == [ROWS * 3] * 3
    assert off(here, before) < 0.2 * off(evenly, before) and off(here, before) < 0.2 * off(blind, before)


def test_more_bits_lose_less_and_bytes_are_as_told(tmp_path: Path) -> None:
    """Without rows of data all directions are worth the same, and what is lost of the rows is what counts."""
    before, blind = given(), Env(allow=ALLOW)
    whole, lost = before.model.state["users.weight"], []
    for rate in (0.7, 2.0, 4.0):
        coded = CodeAxes(rate).apply(before, blind)
        table = coded.model.build(ALLOW).get_submodule("users")
        layer = Table.of(table)
        assert layer is not None and layer.layout == "axes" and layer.padding == 0
        assert layer.bytes() == sum(t.nbytes for n, t in coded.model.state.items() if n.startswith("users."))
        assert CodeAxes(rate).sketch().apply(before, blind).bytes == coded.bytes
        assert load(save(coded, tmp_path / f"{rate}")).bytes == coded.bytes
        lost.append(float((rows_of(table) - whole).square().mean()))
    assert lost[0] > 4 * lost[1] and lost[1] > 4 * lost[2]


def test_rows_are_the_same_however_they_are_looked_up() -> None:
    table = CodeAxes(2.5).apply(given(), ENV).model.build(ALLOW).get_submodule("users")
    ids = torch.randint(0, ROWS, (5, 4))
    ids[0, 0] = 0
    answered = table(ids)
    assert torch.equal(table(ids[0, 0]), torch.zeros(DIM)), "the padding row stays zero"
    torch.testing.assert_close(table.look(ids.reshape(-1), table.form()).reshape(answered.shape), answered)
    torch.testing.assert_close(table.small()(ids), answered)
    torch.testing.assert_close(table.plain()(ids), answered)


@pytest.mark.parametrize("bits", [(8, 5, 3, 1), (7, 7, 7), (1,), (3, 3, 3, 3, 3, 3, 3, 2)])
def test_places_come_back_from_their_bits(bits: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Table(50, 8, layout="axes", data_type="fp16", bits=bits)
    places = torch.stack([torch.randint(0, 1 << b, (50,), generator=generator) for b in bits], 1)
    levels = [torch.arange(1 << b).float() for b in bits]
    module = layer.build()
    module.load_state_dict(layer.encode_axes(places, levels, torch.eye(8)[: len(bits)]))
    for rows in (module.weight, module.small()(torch.arange(50))):
        assert torch.equal(rows[:, : len(bits)], places.float())


def test_bags_and_large_tables_are_looked_up_from_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(spec_of(Rated, rows=ROWS, dim=DIM, bag=True), inputs=("user",))
    before = Bundle(Model.of(Rated(bag=True), spec))
    coded = CodeAxes(3.0).apply(before, Env(allow=ALLOW))
    ids = torch.randint(0, ROWS, (6, 3))
    small = coded.model.build(ALLOW)(ids)
    monkeypatch.setattr("pennyweight.model.tables.HELD", 0)
    torch.testing.assert_close(coded.model.build(ALLOW)(ids), small)
    rows = coded.model.build(ALLOW).get_submodule("users").weight
    whole = before.model.state["users.weight"]
    assert (rows - whole).square().mean() < 0.05 * whole.square().mean()


def test_the_fit_takes_up_what_rounding_left() -> None:
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fitted(x, x @ truth, torch.ones(200, dtype=torch.float64)), truth, atol=1e-6, rtol=1e-6)


def test_what_cannot_get_smaller_is_refused() -> None:
    coded = CodeAxes(2.0).apply(given(), ENV)
    with pytest.raises(PlanError, match="no full fp32 table would get smaller"):
        CodeAxes(2.0).apply(coded, ENV)
    with pytest.raises(ConfigError, match="rate = 0"):
        CodeAxes(0.0)
    with pytest.raises(ConfigError, match="bits of axes"):
        Table(10, 4, bits=(3,))
    with pytest.raises(ConfigError, match="of 1 to 8 bits"):
        Table(10, 4, layout="axes", data_type="fp16", bits=(9,))
    with pytest.raises(ConfigError, match="fp16"):
        Table(10, 4, layout="axes", data_type="int8", bits=(4,))


def test_a_plan_with_it_goes_through_json() -> None:
    made = plan(CodeAxes(1.5, only=("users",)))
    assert "along axes in 1.5 bits a number" in made.describe()
