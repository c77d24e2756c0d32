"""What leaves answers as the bundle does, is as small as the bundle, and says why where it cannot leave."""

import importlib.util
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from pennyweight import cli
from pennyweight.accelerate.runner import Runner
from pennyweight.compress.axes import CodeAxes
from pennyweight.compress.bands import DropFields, SplitRows
from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError, DataError, DeviceError, StorageError
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import Trace
from pennyweight.export import Export, export
from pennyweight.export import targets as ways
from pennyweight.export.graph import Graph
from pennyweight.export.targets import TARGETS, Arrived, Target
from pennyweight.model import graph
from pennyweight.model import keras as from_keras
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.cascade import Cascade
from pennyweight.model.onnx import read
from pennyweight.model.ranking import DeepFM
from pennyweight.model.retrieval import TwoTower
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import Model, Spec, build, spec_of
from pennyweight.model.transform import Env, Plan, plan

ort = pytest.importorskip("onnxruntime")

PLANS = {
    "as given": plan(),
    "int8 tables, int4 dense": plan(QuantizeTables("int8"), QuantizeDense("int4")),
    "int4 tables, int3 dense": plan(QuantizeTables("int4"), QuantizeDense("int3")),
    "shared rows": plan(ShareRows(parts=4, codes=32), QuantizeTables("int8"), QuantizeDense("bf16")),
    "bands": plan(
        SplitRows((0.2, 0.4), min_rows=100),
        QuantizeTables("int8", only=("*.band0",)),
        QuantizeTables("int4", only=("*.band1",)),
        DropFields(None, only=("*.band2",)),
    ),
    "along axes": plan(CodeAxes(2.0), QuantizeDense("bf16")),
    "codes of four bits": plan(ShareRows(parts=8, codes=16), QuantizeTables("int8")),
    "pruned": plan(PruneNeurons(keep=0.5, score="weight"), FoldNorms(), QuantizeTables("int2"), QuantizeDense("fp16")),
}
EDGE = plan(QuantizeTables("int4"), QuantizeDense("int8"))
GRAPH = 24_000
"""Bytes that a graph's operations and names may take beside its weights."""


def initialized(spec: Spec, movies: Dataset) -> Bundle:
    """A model with random weights, its tables wide enough apart for scores to differ."""
    torch.manual_seed(0)
    module = build(spec).eval()
    for name, weight in module.named_parameters():
        if "tables" in name:
            weight.data[1:].normal_(0, 0.3)
    return Bundle(Model.of(module, spec), movies.catalog)


@pytest.fixture(scope="module")
def ranker(movies: Dataset) -> Bundle:
    """A DeepFM whose first dense layer is large enough to run in int8."""
    return initialized(spec_of(DeepFM, columns=movies.schema.columns, dim=8, hidden=(416, 32)), movies)


@pytest.fixture(scope="module")
def given(movies: Dataset, ranker: Bundle) -> Bundle:
    """Two towers and such a DeepFM."""
    stages = spec_of(TwoTower, columns=movies.schema.columns, dim=8, std=1.0, user_id=False), ranker.model.spec
    named = {n: {"factory": s.factory, "args": dict(s.args)} for n, s in zip(("retrieval", "ranking"), stages, strict=True)}
    return initialized(spec_of(Cascade, **named), movies)


def applied(given: Bundle, made: Plan, movies: Dataset) -> Bundle:
    return made.apply(given, Env(train=movies, calib=movies))


@pytest.fixture(scope="module")
def left(given: Bundle, movies: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Export, Path]:
    """One bundle in everything that is installed."""
    bundle = applied(given, EDGE, movies)
    out = tmp_path_factory.mktemp("left") / "export"
    return bundle, export(bundle, out, seconds=0.2), out


def opened(file: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def fed(session: ort.InferenceSession, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {i.name: batch[i.name].numpy() for i in session.get_inputs()}


@pytest.mark.parametrize("name", PLANS)
def test_onnx_answers_as_the_bundle_and_is_as_small(name: str, ranker: Bundle, movies: Dataset, tmp_path: Path) -> None:
    bundle = applied(ranker, PLANS[name], movies)
    made = export(bundle, tmp_path / "out", ["onnx"], seconds=0.1)
    assert [(w.target, w.graph) for w in made.written] == [("onnx", "model")]
    assert made.written[0].exact < 1e-4
    room = GRAPH * (2 if name == "bands" else 1)  # a table in bands is some sixty operations
    assert 0.95 * bundle.model.bytes <= made.written[0].bytes <= bundle.model.bytes + room, (
        "as stored; norms may be folded away"
    )
    batch = Trace.sample(movies.catalog, 1, 33, seed=5).batches(movies.catalog)[0]  # rows and a size that no probe had
    session = opened(tmp_path / "out" / "model.onnx")
    with Runner(bundle) as runner:
        want = runner.score(batch)
    (got,) = session.run(None, fed(session, batch))
    rounded = name.endswith(("int4 dense", "int3 dense"))
    np.testing.assert_allclose(got, want, atol=0.05 * float(np.abs(want).mean()) if rounded else 1e-5)
    assert float(np.std(want)) > 1e-2, "scores that are all alike would prove nothing"


def test_retrieval_leaves_as_scores_of_users_and_items(left: tuple[Bundle, Export, Path], movies: Dataset) -> None:
    bundle, _, out = left
    catalog = movies.catalog
    users = {n: t.expand(2, *t.shape[1:]) for n, t in catalog.user_batch(1, catalog.item_ids[:3]).items()}
    items = catalog.item_batch(catalog.item_ids)
    session = opened(out / "retrieval.onnx")
    assert [o.name for o in session.get_outputs()] == ["scores", "user_vectors", "item_vectors"]
    scores, of, by = session.run(None, fed(session, {**users, **items}))
    with Runner(bundle) as runner:
        np.testing.assert_allclose(of, runner.user_vectors(users), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(by, runner.item_vectors(items), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, of @ by.T, rtol=1e-4, atol=1e-3)
    assert scores.shape == (2, len(catalog.item_ids))


def test_everything_is_measured_and_recorded(left: tuple[Bundle, Export, Path]) -> None:
    bundle, made, out = left
    said = json.loads((out / "export.json").read_text())
    assert not made.failed
    assert (
        {w["target"] for w in said["written"]} == {n for n, t in TARGETS.items() if not t.missing()} >= {"onnx", "pt2", "torch"}
    )
    assert said["bytes"] == bundle.bytes and said["plan"] == list(bundle.plan) and said["versions"]["torch"]
    assert [(i["name"], i["dtype"], i["shape"]) for i in said["parts"][0]["inputs"]][-1] == ("history", "int64", ["rows", 20])
    for row in said["written"]:
        assert row["p50_ms"] > 0 and row["runtime"] and 0 <= row["exact"] <= said["tolerance"]
        assert row["opset"] or row["target"] == "torch"
        assert [f["bytes"] for f in row["files"]] == [(out / f["name"]).stat().st_size for f in row["files"]]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["catalog.json", "export.json", *(f["name"] for w in said["written"] for f in w["files"])]
    )
    assert list(out.parent.iterdir()) == [out], "nothing half-written is left beside it"


def test_the_onnx_file_says_where_it_comes_from_and_nothing_of_this_machine(left: tuple[Bundle, Export, Path]) -> None:
    bundle, _, out = left
    held = opened(out / "model.onnx").get_modelmeta()
    assert held.custom_metadata_map["factory"] == bundle.model.spec.factory
    assert json.loads(held.custom_metadata_map["plan"]) == list(bundle.plan)
    for file in out.iterdir():
        assert str(Path(__file__).parents[1]).encode() not in file.read_bytes(), file.name


def test_the_same_bundle_leaves_as_the_same_bytes(tmp_path: Path, allow: tuple[str, ...]) -> None:
    names = ["onnx", "pt2", "torch"]
    made = [export(mine(Straight, width=4), tmp_path / n, names, allow=allow, data=FEW, seconds=0.1) for n in ("a", "b")]
    first, second = ({f.name: f.sha256 for w in m.written for f in w.files} for m in made)
    assert first == second and len(first) == 4


def test_the_torch_page_needs_only_torch(left: tuple[Bundle, Export, Path], movies: Dataset) -> None:
    bundle, _, out = left
    assert "pennyweight" not in (out / "model.py").read_text().replace("Pennyweight", "").lower()
    found = importlib.util.spec_from_file_location("left_model", out / "model.py")
    assert found is not None and found.loader is not None
    page = importlib.util.module_from_spec(found)
    found.loader.exec_module(page)
    batch = Trace.sample(movies.catalog, 1, 12, seed=9).batches(movies.catalog)[0]
    columns = [i.column for i in left[1].parts[0].inputs]
    with Runner(bundle) as runner:
        want = torch.from_numpy(runner.score(batch))
    got = page.load()(*(batch[c] for c in columns))
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * float(want.abs().mean()))


def test_a_pt2_holds_no_pickle(left: tuple[Bundle, Export, Path]) -> None:
    with zipfile.ZipFile(left[2] / "model.pt2") as archive:
        configs = [json.loads(archive.read(n)) for n in archive.namelist() if n.endswith("_config.json")]
        assert all(not held["use_pickle"] for config in configs for held in config["config"].values())
        assert not any(archive.read(n)[:2] == b"\x80\x02" for n in archive.namelist())


def test_the_catalog_leaves_as_json(left: tuple[Bundle, Export, Path], movies: Dataset) -> None:
    said = json.loads((left[2] / "catalog.json").read_text())
    items = movies.catalog.items
    assert items is not None
    assert said["items"]["title"] == items["title"].to_list()
    assert said["items"]["genre"] == items["genre"].to_list()
    values = said["vocabularies"]["item"]["values"]
    assert [values.index(v) + 2 for v in values[:5]] == movies.catalog.vocabularies["item"].encode(values[:5]).tolist()


def test_openvino_keeps_the_bytes(left: tuple[Bundle, Export, Path]) -> None:
    if TARGETS["openvino"].missing():
        pytest.skip("openvino is not installed: pip install openvino")
    bundle, made, _ = left
    (written,) = [w for w in made.written if (w.target, w.graph) == ("openvino", "model")]
    ranking = sum(t.nbytes for n, t in bundle.model.state.items() if n.startswith("ranking."))
    weights = next(f for f in written.files if f.name == "model.bin")
    assert weights.bytes <= ranking + 1_000, "the graph itself is text, in the other file"


# -- what cannot leave ------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Control flow by the numbers in the input, over a layer that can be replaced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x).squeeze(1)
        return self.linear(-x).squeeze(1)


class Straight(Branching):
    """None."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.tanh()).squeeze(1)


class Counting(Branching):
    """Control flow by the number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) * (2.0 if len(x) > 50 else 1.0)


class Sorting(Branching):
    """An operation that PyTorch can capture and ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.linalg.matrix_exp(x.unsqueeze(1).transpose(1, 2) @ x.unsqueeze(1)).sum(1)).squeeze(1)


def mine(module: type[nn.Module], **args: int) -> Bundle:
    torch.manual_seed(0)
    spec = spec_of(module, inputs=("x",), **args)
    return Bundle(Model.of(module(**args), spec))


@pytest.fixture
def allow() -> Iterator[tuple[str, ...]]:
    sys.modules.setdefault(__name__, sys.modules[Branching.__module__])
    yield (__name__,)


ROWS = {"x": torch.randn(60, 128, generator=torch.Generator().manual_seed(0)) / 20}
FEW = {"x": ROWS["x"][:, :4]}


def test_control_flow_is_named_by_its_line_and_leaves_as_its_own_class(tmp_path: Path, allow: tuple[str, ...]) -> None:
    bundle = EDGE.transforms[1].apply(mine(Branching, width=128), Env(allow=allow))
    made = export(bundle, tmp_path / "out", ["onnx", "pt2", "torch"], allow=allow, data=ROWS, seconds=0.1)
    assert [w.target for w in made.written] == ["torch"]
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "if x.sum() > 0" in text)
    for failed in made.failed:
        assert f"depends on the numbers it is given at {__file__}:{line} (if x.sum() > 0:)" in failed.reason
    assert {f.target for f in made.failed} == {"onnx", "pt2"}
    assert "as its own class, since" in made.written[0].note
    assert load_file(tmp_path / "out" / "model.safetensors")["linear.weight"].dtype == torch.float32


def test_rows_that_decide_are_named_too(tmp_path: Path, allow: tuple[str, ...]) -> None:
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "if len(x) > 50" in text)
    with pytest.raises(DeviceError, match=f"depends on the number of rows at {__file__}:{line}") as caught:
        export(mine(Counting, width=128), tmp_path / "out", ["onnx", "pt2"], allow=allow, data=ROWS, seconds=0.1)
    assert "nothing was exported: onnx: " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_operation_one_target_lacks_leaves_by_the_others(tmp_path: Path, allow: tuple[str, ...]) -> None:
    made = export(mine(Sorting, width=4), tmp_path / "out", ["onnx", "pt2", "torch"], allow=allow, data=FEW, seconds=0.1)
    assert [f.target for f in made.failed] == ["onnx"]
    assert "matrix_exp" in made.failed[0].reason
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.pt2", "model.py", "model.safetensors", "export.json"}


def test_wrong_answers_do_not_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allow: tuple[str, ...]) -> None:
    """A runtime that is off by a hundredth, and one that knows a single batch size."""

    def off(given: Graph, folder: Path) -> Arrived:
        arrived = ways.to_torch(given, folder)
        return Arrived(lambda *x: tuple(t + 0.01 for t in arrived.call(*x)), "off")

    def frozen(given: Graph, folder: Path) -> Arrived:
        arrived = ways.to_torch(given, folder)
        return Arrived(lambda *x: tuple(t[:1] for t in arrived.call(*x)), "frozen")

    for name, wrong, said in (("off", off, r"differ by up to 0\.01"), ("frozen", frozen, r"of 1 for 7 rows, where 7 is right")):
        monkeypatch.setitem(TARGETS, name, Target(wrong, (), ""))
        with pytest.raises(DeviceError, match=said):
            export(mine(Straight, width=4), tmp_path / "out", [name], allow=allow, data=FEW)
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allow: tuple[str, ...]) -> None:
    monkeypatch.setitem(TARGETS, "openvino", Target(ways.to_openvino, ("no_such_package",), "pip install it"))
    made = export(mine(Straight, width=4), tmp_path / "out", ["openvino", "torch"], allow=allow, data=FEW, seconds=0.1)
    assert [(f.target, f.reason) for f in made.failed] == [("openvino", "needs no_such_package: pip install it")]
    assert {w.target for w in made.written} == {"torch"}


def test_refusals(left: tuple[Bundle, Export, Path], tmp_path: Path, allow: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="unknown target 'tflite'; there are: onnx, openvino, pt2, torch"):
        export(left[0], tmp_path / "out", ["tflite"])
    (tmp_path / "mine").mkdir()
    with pytest.raises(StorageError, match="exists and is not an export"):
        export(left[0], tmp_path / "mine", ["torch"])
    with pytest.raises(DataError, match="name a dataset with --data"):
        export(mine(Branching, width=3), tmp_path / "out", ["torch"], allow=allow)


def test_weights_that_a_protobuf_cannot_hold_lie_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allow: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ways, "LARGE", 500)
    made = export(
        mine(Straight, width=2000), tmp_path / "out", ["onnx"], allow=allow, data={"x": torch.randn(9, 2000)}, seconds=0.1
    )
    assert [f.name for f in made.written[0].files] == ["model.onnx", "model.onnx.data"]
    assert made.written[0].files[1].bytes >= 8000


# -- other models -----------------------------------------------------------------------------------------------------------


def test_a_keras_model_leaves_without_a_catalogue(tmp_path: Path) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8), name="image"), keras.layers.Reshape((8, 8, 1)), keras.layers.Conv2D(4, 3, activation="relu")]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")])
    bundle = plan(QuantizeDense("int8")).apply(Bundle(from_keras.of(model)), Env())
    made = export(bundle, tmp_path / "out", ["onnx", "torch"], seconds=0.1)
    assert not made.failed
    images = np.random.default_rng(0).random((5, 8, 8), np.float32)
    (got,) = opened(tmp_path / "out" / "model.onnx").run(None, {"image": images})
    np.testing.assert_allclose(got, model(torch.from_numpy(images)).detach().numpy(), atol=2e-2)
    assert math.isclose(float(got.sum()), 5, rel_tol=1e-5)


class Text(nn.Module):
    """A convolution over word vectors, the largest of each channel, and a bag of the same words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(300, 16, padding_idx=0), nn.EmbeddingBag(300, 16, padding_idx=0)
        self.conv, self.linear = nn.Conv1d(16, 24, 3), nn.Linear(40, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.conv(self.words(ids).transpose(1, 2)).relu().amax(2)
        return self.linear(torch.cat([found, self.bag(ids)], 1)).squeeze(1)


def test_a_text_model_with_convolutions_leaves_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 300, (9, 20))
    bundle = Bundle(graph.of(Text().eval(), (words,), ("words",)))
    smaller = plan(QuantizeTables("int4"), QuantizeDense("int4")).apply(bundle, Env())
    made = export(smaller, tmp_path / "out", ["onnx", "torch"], seconds=0.1)
    assert not made.failed and made.written[0].bytes <= smaller.model.bytes + GRAPH / 3
    with Runner(smaller) as runner:
        (got,) = opened(tmp_path / "out" / "model.onnx").run(None, {"words": words.numpy()})
        np.testing.assert_allclose(got, runner.score({"words": words}), atol=1e-5)


def test_attention_over_a_history_leaves(movies: Dataset, tmp_path: Path) -> None:
    bundle = initialized(spec_of(SASRec, columns=movies.schema.columns, dim=8, blocks=1), movies)
    made = export(QuantizeTables("int4").apply(bundle, Env()), tmp_path / "out", ["onnx"], seconds=0.1)
    assert [(w.graph, w.exact < 1e-4) for w in made.written] == [("model", True), ("retrieval", True)]


def test_an_onnx_model_leaves_as_its_own_graph(left: tuple[Bundle, Export, Path], movies: Dataset, tmp_path: Path) -> None:
    bundle = Bundle(read(left[2] / "model.onnx"), movies.catalog)
    made = export(bundle, tmp_path / "out", ["onnx", "pt2"], seconds=0.1)
    assert [w.target for w in made.written] == ["onnx"] and made.written[0].exact < 1e-5
    assert "holds ONNX operations and no PyTorch ones" in made.failed[0].reason


def test_the_command_prints_and_fails_for_what_was_named(
    ranker: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "out_console", Console(width=250))
    monkeypatch.setitem(TARGETS, "openvino", Target(ways.to_openvino, ("no_such_package",), "pip install it"))
    folder = save(ranker, tmp_path / "bundle")
    with pytest.raises(DeviceError, match=r"not exported to openvino; .*bundle-export holds the others"):
        cli.export(folder, to=["torch", "openvino"], seconds=0.1)
    told = capsys.readouterr()
    assert "model.py, model.safetensors" in told.out and "within 0.001" in told.out
    assert "openvino: not exported (model): needs no_such_package: pip install it" in told.err
    assert (tmp_path / "bundle-export" / "model.py").is_file()
