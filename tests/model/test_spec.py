"""Specs and models: what a factory may be, how layers are put in place, and that a state fits or says so."""

import dataclasses
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.data.schema import Column
from pennyweight.model import graph
from pennyweight.model import spec as spec_module
from pennyweight.model.dense import Dense
from pennyweight.model.ranking import DNN, DeepFM
from pennyweight.model.spec import Model, Spec, build, call, leaves, replace, resolve, seeded, spec_of, untrained
from pennyweight.model.tables import Table

COLUMNS = (
    Column("user", "user", "categorical", 9),
    Column("item", "item", "categorical", 9),
    Column("label", "label", "numeric"),
)


class Net(nn.Module):
    def __init__(self, rows: int, dim: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, item: Tensor) -> Tensor:
        return self.head(self.table(item))


def not_a_module(rows: int) -> int:
    return rows


@pytest.fixture(autouse=True)
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's package that can be imported by name."""
    module = types.ModuleType("shop")
    for thing in (Net, not_a_module):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "shop", module)


SPEC = Spec("shop:Net", {"rows": 10}, {}, ("item",))
ALLOW = ("shop",)


def test_a_model_is_rebuilt_to_the_same_outputs() -> None:
    module = build(SPEC, ALLOW)
    model, batch = Model.of(module, SPEC), {"item": torch.arange(10)}
    want = call(module, batch, SPEC.inputs)
    assert want.shape == (10,)
    torch.testing.assert_close(call(model.build(ALLOW), batch, SPEC.inputs), want)
    assert model.bytes == 4 * (10 * 4 + 4 + 1)


def test_a_state_is_copied_when_made_and_when_trained() -> None:
    module = build(SPEC, ALLOW)
    model = Model.of(module, SPEC)
    with torch.no_grad():
        module.head.weight.fill_(7)
    assert not (model.state["head.weight"] == 7).any()
    trained = model.build(ALLOW, copy=True)
    assert all(p.requires_grad for p in trained.parameters()) and not trained.training
    with torch.no_grad():
        trained.head.weight.fill_(8)
    assert not (model.state["head.weight"] == 8).any()
    shared = model.build(ALLOW)
    assert shared.head.weight.data_ptr() == model.state["head.weight"].data_ptr()
    assert not any(p.requires_grad for p in shared.parameters())


def test_layers_are_put_in_place() -> None:
    layers = {"table": Table(10, 4, data_type="int4"), "head": Dense(4, 1, data_type="int8")}
    spec = SPEC.with_layers(layers)
    module = build(spec, ALLOW)
    assert Table.of(module.table) == layers["table"] and Dense.of(module.head) == layers["head"]
    assert SPEC.layers == {} and loads(Spec, dumps(spec)) == spec
    with pytest.raises(ConfigError, match="no layer 'tables' in Net"):
        build(SPEC.with_layers({"tables": layers["table"]}), ALLOW)


def test_weights_of_another_shape_are_refused() -> None:
    model = Model.of(build(SPEC, ALLOW), SPEC)
    with pytest.raises(BundleError, match=r"do not fit shop:Net"):
        Model(dataclasses.replace(SPEC, args={"rows": 11}), model.state).build(ALLOW)
    with pytest.raises(BundleError, match=r"head\.bias"):
        Model(SPEC, {k: v for k, v in model.state.items() if k != "head.bias"}).build(ALLOW)


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    build(SPEC.with_layers({"head": Dense(4, 1), "table": Table(10, 4)}), ALLOW)
    assert torch.equal(before, torch.get_rng_state())


def test_our_own_factories_decode_their_columns() -> None:
    spec = loads(Spec, dumps(spec_of(DNN, columns=COLUMNS, dim=4, hidden=(8,))))
    module = build(spec)
    batch = {"user": torch.tensor([2, 3]), "item": torch.tensor([4, 5])}
    assert call(module, batch).shape == (2,)
    tables = {"embeddings.tables.user", "embeddings.tables.item"}
    assert {path for path, _ in leaves(module)} >= tables | {"mlp.0", "mlp.1", "mlp.3"}


@pytest.mark.parametrize(
    ("factory", "args", "allow", "reason"),
    [
        ("shop.Net", {}, ALLOW, "not of the form"),
        ("shop:Net", {"rows": 3}, (), "allow it with --allow shop"),
        ("shop:Net", {"rows": 3}, ("shopping",), "not allowed"),
        ("shop:Missing", {}, ALLOW, "cannot be imported"),
        ("shop:not_a_module", {"rows": 3}, ALLOW, "gave a int"),
        ("shop:Net", {"row": 3}, ALLOW, "does not take these args"),
        ("os:system", {"command": "true"}, ALLOW, "not allowed"),
        ("pennyweight.model.spec:importlib", {}, (), "not one of Pennyweight's models"),
        ("pennyweight.model.ranking:DNN", {"columns": [{"name": "user"}]}, (), r"args\.columns\[0\]\.role: missing"),
    ],
)
def test_a_factory_that_will_not_do_is_named(
    factory: str, args: dict[str, object], allow: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(Spec(factory, args), allow)


def test_an_allowed_name_may_be_the_factory_itself() -> None:
    assert resolve("shop:Net", ("shop:Net",)) is Net


def test_a_root_cannot_be_replaced_by_a_path_that_is_not_there() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    replace(module, "0", nn.Identity())
    assert isinstance(module[0], nn.Identity)
    with pytest.raises(ConfigError, match=r"no layer '0\.weights'"):
        replace(module, "0.weights", nn.Identity())


def test_a_seeded_module_keeps_constants_and_starts_norms_afresh() -> None:
    spec = spec_of(DeepFM, columns=COLUMNS, dim=4, hidden=[8])
    used = seeded(spec, 0)
    used(dict.fromkeys(("user", "item"), torch.tensor([3, 4, 5])))  # a step in training moves the norm's statistics
    made = seeded(spec, 1, buffers=used.state_dict())
    assert torch.equal(made.mlp[1].running_mean, torch.zeros(8)) and not torch.equal(made.mlp[0].weight, used.mlp[0].weight)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 1)
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x * self.scale)

    taken = graph.of(Scaled(), (torch.ones(2, 3),), ("x",))
    fresh = seeded(taken.spec, 1, buffers=taken.state)
    assert torch.equal(fresh.get_buffer("scale"), torch.tensor([1.0, 2.0, 3.0]))


def test_an_untrained_model_has_no_large_tables_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are zeros of four bytes, small weights are drawn from the seed; what is built from it can be trained."""
    monkeypatch.setattr(spec_module, "LARGE", 4000)
    columns = (Column("user", "user", "categorical", 1000), Column("item", "item", "categorical", 50))
    made = untrained(spec_of(DNN, columns=columns, dim=8, hidden=[4]), 3)
    user, item = (made.state[f"embeddings.tables.{name}.weight"] for name in ("user", "item"))
    assert user.shape == (1000, 8) and user.untyped_storage().nbytes() == 4 and not user.any()
    assert item.std() > 0 and made.bytes > 4 * 8 * 1000
    again, other = (untrained(made.spec, seed) for seed in (3, 4))
    assert torch.equal(again.state["mlp.0.weight"], made.state["mlp.0.weight"])
    assert not torch.equal(other.state["mlp.0.weight"], made.state["mlp.0.weight"])
    module = made.build(copy=True)
    assert module.embeddings.tables["user"].weight.untyped_storage().nbytes() == 4 * 8 * 1000
    drawn = seeded(made.spec, 3)
    assert drawn.embeddings.tables["user"].weight.std() > 0, "who is to train it gets random numbers"
