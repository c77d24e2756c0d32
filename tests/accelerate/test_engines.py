"""Every engine gives the scores of every kind of bundle, or the test says that it is not installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate import compile as engines
from pennyweight.accelerate import tune as tuner
from pennyweight.accelerate.compile import export, fuse, make, packaged
from pennyweight.accelerate.fuse import Dense, Rows, fused, kind_of, lookups, stored
from pennyweight.accelerate.record import record
from pennyweight.accelerate.tune import SetRuntime
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.core import hardware
from pennyweight.core.errors import DeviceError, PlanError
from pennyweight.core.measure import Latency
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bucket, Bundle, Runtime
from pennyweight.model.layers import Beside
from pennyweight.model.ranking import DeepFM
from pennyweight.model.spec import Batch, Model, build, call, spec_of
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, plan

COLUMNS = (
    *(Column(f"c{k}", "user" if k < 2 else "item", "categorical", 17_000) for k in range(4)),
    Column("small", "item", "categorical", 30),
    Column("age", "user", "numeric"),
    Column("price", "item", "numeric"),
)
WAYS = {
    "as given": (),
    "int8": (QuantizeTables("int8"), QuantizeDense("int8")),
    "int4": (QuantizeTables("int4"), QuantizeDense("int4")),
    "shared rows": (ShareRows(parts=4, codes=16),),
}


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        c.name: torch.randn(rows, generator=g) if c.kind == "numeric" else torch.randint(2, c.size, (rows,), generator=g)
        for c in COLUMNS
    }


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    """DeepFM whose larger tables stay packed and whose dense layers are worth int8."""
    spec = spec_of(DeepFM, columns=COLUMNS, dim=16, hidden=[256, 128])
    torch.manual_seed(0)
    module = build(spec).eval()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.5)
    given = Bundle(Model.of(module, spec))
    return {name: (plan(*way).apply(given, Env()) if way else given).model.build() for name, way in WAYS.items()}


def installed(engine: str) -> None:
    if engine in ("compile", "aot") and not hardware.compiler():
        pytest.skip("no C++ compiler")
    needs = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}.get(engine, ())
    if missing := [p for p in needs if find_spec(p) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["eager", "fused", "onnxruntime", "openvino"])
def test_an_engine_gives_the_scores(modules: dict[str, nn.Module], engine: str, way: str) -> None:
    installed(engine)
    module = modules[way]
    score = make(module, Runtime(engine, 1), batch(8))  # type: ignore[arg-type]
    rounds = way.startswith("int")
    for rows in (1, 3, 8, 700):
        with torch.inference_mode():
            got, want = score(batch(rows, 1)), call(module, batch(rows, 1))
        assert got.shape == want.shape
        if rounds:
            assert (got - want).abs().mean() <= 0.05 * want.abs().mean()
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_int8_stays_int8_in_onnxruntime(modules: dict[str, nn.Module]) -> None:
    """Nearer to eager, which rounds inputs too, than the plain form is; and its packed rows are looked up outside."""
    installed("onnxruntime")
    import onnx

    module = modules["int8"]
    made, whole = export(module, batch(8)), export(module, batch(8), rounded=False, packed=False)
    used = {n.op_type for n in onnx.load_from_string(made.graph).graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= used and made.found is not None and whole.found is None
    assert len(made.graph) < len(whole.graph) / 8, "neither fp32 rows nor fp32 layers"
    with torch.inference_mode():
        want = call(module, batch(300, 1))
    off = [(e.scorer(1)(batch(300, 1)) - want).abs().mean() for e in (made, whole)]
    assert off[0] < off[1] / 2


@pytest.mark.skipif(not hardware.compiler(), reason="no C++ compiler")
def test_a_package_is_compiled_once_on_a_machine(
    modules: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).eval().requires_grad_(False)
    score = packaged(module, {"x": torch.randn(6, 3)}, ("x",))
    (kept,) = (tmp_path / "pennyweight").iterdir()
    made = kept.stat().st_mtime_ns
    again = packaged(module, {"x": torch.randn(6, 3)}, ("x",))
    for rows in (1, 6, 50):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(score({"x": x}), call(module, {"x": x}, ("x",)), rtol=1e-4, atol=1e-5)
        assert torch.equal(score({"x": x}), again({"x": x}))
    assert kept.stat().st_mtime_ns == made
    monkeypatch.setattr(hardware, "fingerprint", lambda: "elsewhere")
    packaged(module, {"x": torch.randn(6, 3)}, ("x",))
    assert len(list((tmp_path / "pennyweight").iterdir())) == 2, "another machine compiles anew"


def test_what_is_fused(modules: dict[str, nn.Module]) -> None:
    """Four large tables are one, norms are folded, dense layers take their ReLU; the module keeps its paths and its numbers."""
    module = modules["as given"]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    recorded = record(module, batch(8))
    assert not any(isinstance(recorded.root.get_submodule(str(n.target)), nn.BatchNorm1d)
                   for n in recorded.graph.nodes if n.op == "call_module" and "mlp" in str(n.target))  # fmt: skip
    made = engines.fused(module, batch(8))
    with torch.inference_mode():
        torch.testing.assert_close(made(batch(600, 2)), call(module, batch(600, 2)), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_joined_tables_are_in_memory_once(modules: dict[str, nn.Module]) -> None:
    for way, tables in (("as given", 5), ("int8", 4)):
        module = modules[way]
        fused(module, batch(8))
        held = [getattr(module.embeddings.tables[c.name], "packed" if way == "int8" else "weight") for c in COLUMNS[:tables]]  # type: ignore[index, union-attr]
        assert len({t.untyped_storage().data_ptr() for t in held}) == 1
        first = held[0].data_ptr()
        fused(module, batch(8))
        assert held[0].data_ptr() == first, "joined again, nothing moves"


def test_what_cannot_be_joined_stays() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(9, 4), nn.Embedding(9, 4, max_norm=1.0), nn.Embedding(9, 6)

        def forward(self, batch: Batch) -> Tensor:
            return torch.cat([self.a(batch["a"]), self.b(batch["b"]), self.c(batch["c"])], 1).sum(1)

    module = Mixed().eval().requires_grad_(False)
    ids = {n: torch.tensor([1, 2, 8]) for n in "abc"}
    torch.testing.assert_close(fuse(module, ids)(ids), call(module, ids))
    assert lookups(module, ids) is None


def test_the_parts_of_the_fused_form() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 7).requires_grad_(False)
    dense, x = Dense(layer, relu=True), torch.randn(9, 20)
    for rows in (1, 3, 9):
        torch.testing.assert_close(dense(x[:rows]), layer(x[:rows]).relu())
        shift = torch.randn(1, 7)
        want = (x[:rows] @ layer.weight.t() + shift).relu()
        torch.testing.assert_close(dense(x[:rows], shift), want)
    many = torch.randn(9, 7)
    torch.testing.assert_close(Dense(layer)(x, many.clone()), layer(x) + many)
    tables = [nn.Embedding(5, 4), nn.Embedding(6, 4)]
    ids = torch.tensor([[4, 5], [0, 0]])
    want = torch.cat([tables[0](ids[:, 0]), tables[1](ids[:, 1])], 1)
    torch.testing.assert_close(Rows(tables)(ids), want)


@pytest.mark.parametrize("rows", [9, 70_000])
def test_tables_of_halves_are_one(rows: int) -> None:
    """Small ones by their fp32 rows, large ones as they are stored, in memory once."""
    tables = [Table(rows + k, 4, data_type="fp16").build() for k in range(3)]
    for table in tables:
        table.packed.copy_(torch.randn(table.packed.shape))  # type: ignore[union-attr, operator]
    ids = torch.tensor([[3, 4, 5], [0, rows - 1, rows + 1], [1, 1, 1], [2, 7, 8], [8, 8, 8]])
    kinds = {kind_of(table) for table in tables}
    assert len(kinds) == 1 and None not in kinds
    want = torch.cat([table(ids[:, k]) for k, table in enumerate(tables)], 1)
    joined = Rows(tables)
    assert want.dtype == joined(ids).dtype == torch.float32 and torch.equal(joined(ids), want)
    assert torch.equal(torch.cat([table(ids[:, k]) for k, table in enumerate(tables)], 1), want)
    assert len({stored(table).untyped_storage().data_ptr() for table in tables}) == 1
    given = [nn.Embedding(rows, 4, dtype=torch.float16) for _ in range(2)]
    assert kind_of(given[0]) not in kinds and Rows(given)(ids[:, :2] % rows).dtype == torch.float16, "answers as it is given"


def test_columns_side_by_side_are_taken_as_they_are(modules: dict[str, nn.Module]) -> None:
    module, given = modules["int8"], batch(40, 3)
    score = make(module, Runtime("fused", 1), batch(8))
    kinds = {k: tuple(c.name for c in COLUMNS if (c.kind == "numeric") is k) for k in (False, True)}
    whole = [torch.stack([given[n] for n in kinds[k]], 1) for k in (False, True)]
    with torch.inference_mode():
        assert torch.equal(score(Beside(tuple(kinds.values()), whole)), score(given))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, probe = nn.Linear(3, 1), {"x": torch.randn(4, 3)}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="engine 'openvino' needs openvino: pip install openvino"):
        make(module, Runtime("openvino"), probe, ("x",))
    monkeypatch.setattr(hardware, "compiler", lambda: "")
    with pytest.raises(DeviceError, match=r"engine 'aot' needs a C\+\+ compiler .* apt install g\+\+"):
        make(module, Runtime("aot"), probe, ("x",))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.sum() > 0 else x.prod(1)


def test_what_cannot_be_recorded_says_why() -> None:
    with pytest.raises(DeviceError, match=r"engine 'fused' cannot run this model: .*Python decides by the numbers"):
        make(Branches(), Runtime("fused"), {"x": torch.randn(4, 3)}, ("x",))


def test_an_engine_is_chosen_for_each_size_and_marked_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fastest: here by word."""
    spec = spec_of(DeepFM, columns=COLUMNS[4:], dim=4, hidden=[8])
    given = Bundle(Model.of(build(spec).eval(), spec))
    asked: list[tuple[int, float]] = []

    def tune(bundle: Bundle, batches: list[Batch], *, seconds: float, **rest: object) -> tuple[SetRuntime, tuple[()]]:
        rows = len(batches[0]["small"])
        asked.append((rows, seconds))
        assert all(len(b["small"]) == rows for b in batches) and bundle.runtime == Runtime()
        return SetRuntime("onnxruntime" if rows == 1 else "fused", 1, 0 if rows < 600 else 512), ()

    monkeypatch.setattr(tuner, "tune", tune)
    chosen, traces = tuner.tune_sizes(given, [batch(3)], seconds=30, sizes=(1, 64, 1000), shared=True)
    assert [rows for rows, _ in asked] == [1, 64, 1000] == list(traces)
    assert all(s == pytest.approx(30 / (3 - k), rel=0.1) for k, (_, s) in enumerate(asked))
    runtime = chosen.apply(given, Env()).runtime
    assert (runtime.engine, runtime.batch, runtime.shared) == ("fused", 512, True)
    assert runtime.buckets == (Bucket(1, "onnxruntime", 1), Bucket(64, "fused", 1))
    assert (
        runtime.machine == hardware.fingerprint() and runtime.at(2).engine == "fused" and runtime.at(1).engine == "onnxruntime"
    )
    with pytest.raises(PlanError, match=r"sizes from 1 that grow; got 1 batches, sizes \[4, 2\]"):
        tuner.tune_sizes(given, [batch(3)], sizes=(4, 2))


def test_tune_says_whether_requests_share_work(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(DeepFM, columns=COLUMNS[4:], dim=4, hidden=[8])
    given = Bundle(Model.of(build(spec).eval(), spec))
    request = {n: t[:1].expand(9) if n == "age" else t for n, t in batch(9).items()}
    for ratio, wanted in ((0.5, True), (0.97, False)):
        took = [Latency(1, 1, 1, 1, 9), Latency(ratio, 1, 1, 1, 9, ratio=ratio)]
        monkeypatch.setattr(tuner, "interleaved", lambda calls, took=took, **_: [c() for c in calls] and took)
        assert tuner.sharing(given, SetRuntime("eager", 1), [request]).shared is wanted
    alone = Bundle(given.model, given.catalog)
    monkeypatch.setattr("pennyweight.accelerate.runner._roles", lambda bundle: ({}, ""))
    assert tuner.sharing(alone, SetRuntime("eager", 1), [request]) == SetRuntime("eager", 1)
