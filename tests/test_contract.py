"""The six laws, over every transform there is.

A transform that has no line in ``CASES`` fails the first test. A case says what to apply, and what would change nothing:
by default the same transform once more.
"""

import dataclasses
import functools
import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pennyweight
from pennyweight.accelerate.cache import KeepHot
from pennyweight.accelerate.compile import export
from pennyweight.accelerate.index import SetIndex
from pennyweight.accelerate.tune import SetRuntime
from pennyweight.compress.aware import TrainRounded
from pennyweight.compress.axes import CodeAxes
from pennyweight.compress.bands import DropFields, DropRows, SplitRows
from pennyweight.compress.distill import Distill
from pennyweight.compress.factor import FactorDense
from pennyweight.compress.narrow import NarrowTables
from pennyweight.compress.onnx import QuantizeOnnx
from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.residual import SubtractCentres
from pennyweight.compress.rotate import RotateTables
from pennyweight.compress.share import CodeTables, ShareRows
from pennyweight.compress.substitute import SubstituteTables
from pennyweight.core.config import dumps, encode, loads, members
from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.hardware import Device, Link, Rates, Topology
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import Trace
from pennyweight.data.schema import Column, Schema
from pennyweight.distribute.place import Place
from pennyweight.distribute.planner import Spread
from pennyweight.model.bundle import Bundle, Index, Priority, Tenant, Variant, load, save
from pennyweight.model.cascade import Cascade
from pennyweight.model.onnx import read
from pennyweight.model.ranking import DeepFM
from pennyweight.model.retrieval import MatrixFactorization, TwoTower
from pennyweight.model.spec import Model, build, call, leaves, seeded, spec_of
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import FIELD, Env, Plan, Transform
from pennyweight.optimize.space import spared
from pennyweight.schedule.policy import SetPolicy

CURVE = Curve(0.1, 0.0, 0.01)


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform that changes the bundle below, and one that changes nothing (``idle``; None: the same one again)."""

    transform: Transform
    idle: Transform | None = None

    @property
    def on(self) -> str:
        """The fixture it changes: graphs, factors, or the recommender."""
        return {QuantizeOnnx: "graph", RotateTables: "factors"}.get(type(self.transform), "recommender")


CASES = (
    Case(PruneNeurons(keep=0.5), idle=PruneNeurons(keep=1.0)),
    Case(FactorDense(keep=0.25, only=("*",)), idle=FactorDense(keep=0.9, only=("*",))),
    Case(FoldNorms()),
    Case(ShareRows(parts=2, codes=16)),
    Case(SubstituteTables("hot", ratio=4.0, min_rows=100), idle=SubstituteTables(min_rows=1000)),
    Case(RotateTables(dim=6), idle=RotateTables(dim=9)),
    Case(SubtractCentres(codes=16)),
    Case(NarrowTables(dim=3), idle=NarrowTables(keep=1.0)),
    Case(SplitRows((0.1, 0.3), min_rows=100), idle=SplitRows(min_rows=1000)),
    Case(DropRows(0.3, min_rows=100)),
    Case(DropFields(0.01), idle=DropFields(1e-12)),
    Case(TrainRounded("int4", training=Distill(epochs=1))),
    Case(Distill(epochs=2), idle=Distill(epochs=0)),
    Case(QuantizeTables(data_type="int4")),
    Case(CodeTables(bits=2)),
    Case(CodeAxes(rate=1.5)),
    Case(QuantizeDense(data_type="int8")),
    Case(QuantizeDense(data_type="bf16")),
    Case(QuantizeDense(data_type="int3", feedback=True)),
    Case(QuantizeOnnx("int8")),
    Case(QuantizeOnnx("int8-static")),
    Case(QuantizeOnnx("int4")),
    Case(Place()),
    Case(Spread(batch=128)),
    Case(SetRuntime(engine="eager", threads=1, batch=256)),
    Case(KeepHot(1 << 20)),
    Case(SetIndex(Index("ivf", "int8", lists=64, probes=8, recall=0.99, k=100))),
    Case(SetPolicy(batch=4, wait_ms=1.0, deadline_ms=100.0)),
    Case(SetPolicy(classes=(Priority("page"),), tenants=(Tenant("*", 10.0),), variants=(Variant("a", costs={"cpu": CURVE}),))),
)
every = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{type(c.transform).__name__}-{getattr(c.transform, 'data_type', '')}".rstrip("-")
)


@pytest.fixture(scope="module")
def env() -> Env:
    """A few thousand rows of easy and hard people and good and bad items, a trace, one machine, a recipe."""
    rng = np.random.default_rng(0)
    users, items, rows = 120, 600, 3000
    user, item = rng.integers(2, users, rows), rng.integers(2, items, rows)
    liked = rng.normal(size=users)[user] + rng.normal(size=items)[item] + rng.normal(size=rows)
    schema = Schema(
        (
            Column("user", "user", "categorical", users),
            Column("item", "item", "categorical", items),
            Column("genre", "item", "sequence", 12, 3),
            Column("age", "context", "numeric"),
            Column("history", "user", "sequence", items, 5, shares="item"),
            Column("label", "label", "numeric"),
            Column("time", "time", "time"),
        )
    )
    columns = {
        "user": user,
        "item": item,
        "genre": rng.integers(0, 12, (items, 3))[item],
        "age": rng.normal(size=rows),
        "history": rng.integers(0, items, (rows, 5)),
        "label": (liked > 0).astype(np.float32),
        "time": np.arange(rows),
    }
    train, valid, _ = Dataset.from_arrays(columns, schema).split("random")
    return Env(
        train=train,
        valid=valid,
        calib=train.head(512),
        requests=Trace.sample(train, n=8, candidates=50),
        topology=Topology(
            (Device("cpu", "cpu", cores=2, memory_bytes=2**33),), workers=2, inside=Link(50, 1e9), rates=Rates(1e10, 5e7, 1e10)
        ),
        recipe=Recipe(batch=128, epochs=2, lr=0.01),
        seed=7,
    )


@pytest.fixture(scope="module")
def recommender(env: Env) -> Bundle:
    """A recommender of two stages, trained for one epoch."""
    assert env.train and env.valid and env.recipe
    columns = env.train.schema.columns
    stages = {
        "retrieval": spec_of(TwoTower, columns=columns, dim=8),
        "ranking": spec_of(DeepFM, columns=columns, dim=8, hidden=(64, 32)),
    }
    spec = spec_of(Cascade, **{name: {"factory": s.factory, "args": s.args} for name, s in stages.items()})
    torch.manual_seed(0)
    module = build(spec)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    fit(module, env.train, env.valid, env.recipe, seed=0)
    return Bundle(Model.of(module, spec), env.train.catalog)


class Liking(torch.nn.Module):
    """A table and a dense layer, for an ONNX graph."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.out = torch.nn.Embedding(600, 16), torch.nn.Linear(16, 1)

    def forward(self, item: Tensor) -> Tensor:
        return self.out(self.items(item).relu())


@pytest.fixture(scope="module")
def graph(env: Env, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A file that came from elsewhere."""
    assert env.calib
    path = tmp_path_factory.mktemp("onnx") / "liking.onnx"
    torch.manual_seed(0)
    path.write_bytes(export(Liking().eval(), next(env.calib.batches(8)), ("item",)).graph)
    return Bundle(read(path), env.calib.catalog)


@pytest.fixture(scope="module")
def factors(env: Env) -> Bundle:
    """Two tables that meet in a dot product."""
    assert env.train
    spec = spec_of(MatrixFactorization, columns=env.train.schema.columns, dim=8)
    return Bundle(Model.of(seeded(spec, 0), spec), env.train.catalog)


@pytest.fixture
def given(case: Case, request: pytest.FixtureRequest) -> Bundle:
    """What a case's transform changes."""
    found: Bundle = request.getfixturevalue(case.on)
    return found


@pytest.fixture(scope="module")
def full(env: Env, recommender: Bundle) -> Env:
    return dataclasses.replace(env, teachers=(recommender.model,))


@pytest.fixture(scope="module")
def applied(full: Env) -> Callable[[Transform, Bundle], Bundle]:
    """What a transform makes of a bundle, made once."""
    return functools.cache(lambda transform, bundle: transform.apply(bundle, full))


@pytest.fixture
def changed(given: Bundle, applied: Callable[[Transform, Bundle], Bundle]) -> Callable[[Transform], Bundle]:
    """What a transform makes of the bundle."""
    return lambda transform: applied(transform, given)


def outputs(model: Model, env: Env) -> Tensor:
    assert env.calib
    with torch.inference_mode():
        return call(model.build(), next(env.calib.batches(256)), model.spec.inputs)


def content(bundle: Bundle) -> Any:
    """All a bundle says, comparable: tensors by their bytes."""
    state = {
        k: (t.dtype, t.shape, hashlib.sha256(t.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest())
        for k, t in bundle.model.state.items()
    }
    values = (bundle.model.spec, bundle.placement, bundle.runtime, bundle.policy, bundle.plan)
    return state, encode(values), bundle.catalog and bundle.catalog.files()


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_every_transform_is_here() -> None:
    for module in pkgutil.walk_packages(pennyweight.__path__, "pennyweight."):
        importlib.import_module(module.name)
    ours = {cls for cls in members(Transform).values() if cls.__module__.startswith("pennyweight.")}
    assert ours == {type(case.transform) for case in CASES}


@every
def test_1_a_model_is_its_spec_and_state(
    case: Case, changed: Callable[[Transform], Bundle], full: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build with the state of another gives its outputs, and a saved bundle loads to them with no transform replayed."""
    after = changed(case.transform)
    expected = outputs(after.model, full)
    monkeypatch.setattr(type(case.transform), "change", lambda *_: pytest.fail("a transform was replayed"))
    assert torch.equal(outputs(Model.of(after.model.build(), after.model.spec), full), expected)
    assert torch.equal(outputs(load(save(after, tmp_path / "bundle")).model, full), expected)


@every
def test_2_a_plan_goes_through_json(case: Case) -> None:
    plan = Plan((case.transform,))
    text = dumps(plan)
    assert loads(Plan, text) == plan
    assert dumps(loads(Plan, text)) == text
    wrong = encode(plan)
    wrong["transforms"][0]["colour"] = "red"
    with pytest.raises(ConfigError, match=r"\$\.transforms\[0\]\.colour: unknown field .*; known: "):
        loads(Plan, dumps(wrong))
    wrong = encode(plan)
    wrong["transforms"][0]["transform"] = "shrink"
    with pytest.raises(
        ConfigError, match=r"\$\.transforms\[0\]\.transform: unknown transform 'shrink'; known: .*quantize-tables"
    ):
        loads(Plan, dumps(wrong))


@every
def test_3_the_input_is_left_alone(case: Case, given: Bundle, full: Env) -> None:
    assert full.teachers and full.train and full.valid
    before, rows = content(given), (full.train.fingerprint, full.valid.fingerprint)
    written = {name: tensor._version for name, tensor in given.model.state.items()}
    case.transform.apply(given, full)
    assert content(given) == before
    assert {name: tensor._version for name, tensor in given.model.state.items()} == written, "written to, and put back"
    assert (full.train.fingerprint, full.valid.fingerprint) == rows


@every
def test_4_the_same_again(case: Case, given: Bundle, full: Env, changed: Callable[[Transform], Bundle]) -> None:
    """Whatever the global generators hold."""
    torch.manual_seed(123)
    np.random.seed(123)  # the generator a transform might use by mistake
    assert content(case.transform.apply(given, full)) == content(changed(case.transform))


@every
def test_5_saved_and_loaded(case: Case, changed: Callable[[Transform], Bundle], tmp_path: Path) -> None:
    after = changed(case.transform)
    back = load(save(after, tmp_path / "first"))
    assert content(back) == content(after)
    save(back, tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")


@every
def test_6_nothing_to_do_is_an_error(case: Case, given: Bundle, full: Env, changed: Callable[[Transform], Bundle]) -> None:
    with pytest.raises(PlanError):
        (case.idle or case.transform).apply(given if case.idle else changed(case.transform), full)


@every
def test_one_field_is_written(case: Case, given: Bundle, changed: Callable[[Transform], Bundle]) -> None:
    """A family writes its field and the record of the plan; everything else is the same object."""
    after, field = changed(case.transform), FIELD[case.transform.family]
    same = {f.name for f in dataclasses.fields(Bundle) if getattr(after, f.name) is getattr(given, f.name)}
    assert {f.name for f in dataclasses.fields(Bundle)} - same == {field, "plan"}
    assert after.plan == (*given.plan, encode(case.transform))


@every
def test_it_says_what_it_does(case: Case) -> None:
    text = case.transform.describe()
    assert text and len(text) <= 120 and "\n" not in text
    assert hash(case.transform) == hash(dataclasses.replace(case.transform))


@every
def test_what_is_to_be_left_alone_keeps_every_number(
    case: Case, given: Bundle, full: Env, changed: Callable[[Transform], Bundle]
) -> None:
    """Each compression has a list of layers to skip, and any layer that it changes can be on it."""
    if case.transform.family != "compress" or case.on == "graph":  # a graph's nodes have names, and no tensors of their own
        return
    before, after = given.model.state, changed(case.transform).model.state
    held = {path: [n for n in before if n.startswith(f"{path}.")] for path, _ in leaves(given.model.build())}
    moved = [p for p, names in held.items() if any(n not in after or not torch.equal(after[n], before[n]) for n in names)]
    for path in dict.fromkeys((moved[0], moved[-1])):
        try:
            state = spared((case.transform,), (path,))[0].apply(given, full).model.state
        except PlanError:  # nothing else was there to change
            continue
        assert all(torch.equal(state[name], before[name]) for name in held[path]), path
