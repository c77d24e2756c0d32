"""Which plans there are, and what is left of them where layers may not be touched."""

from pathlib import Path

import pytest
import torch

from pennyweight.accelerate.compile import export
from pennyweight.compress.aware import TrainRounded
from pennyweight.compress.distill import Distill
from pennyweight.compress.onnx import QuantizeOnnx, nodes
from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle
from pennyweight.model.onnx import read
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, seeded, spec_of
from pennyweight.model.train import Recipe
from pennyweight.model.transform import Env
from pennyweight.optimize.cost import described
from pennyweight.optimize.space import forbidden, recoveries, spared, structures, types

ROWS = Clicks(sizes=(600, 800), seed=0).dataset(2_000)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    spec = spec_of(DNN, columns=ROWS.schema.columns, dim=16, hidden=[64, 32])
    return Bundle(Model.of(seeded(spec, 0), spec), ROWS.catalog)


@pytest.fixture(scope="module")
def env(bundle: Bundle) -> Env:
    return Env(ROWS, ROWS, calib=ROWS, teachers=(bundle.model,), recipe=Recipe())


def test_a_block_stands_for_all_that_is_in_it(bundle: Bundle) -> None:
    assert forbidden(bundle, ("mlp.0",), ()) == ("mlp.0",)
    assert forbidden(bundle, ("mlp", "*.tables.user"), ()) == ("mlp", "mlp.*", "*.tables.user")
    with pytest.raises(ConfigError, match=r"no layer matches 'mlp\.00', which was to be left alone; there are: .*mlp\.0"):
        forbidden(bundle, ("mlp.00",), ())
    assert forbidden(bundle, (), ()) == ()


def test_every_transform_in_a_plan_is_told_and_those_inside_it() -> None:
    told = spared((ShareRows(skip=("a",)), TrainRounded(), QuantizeOnnx(), FoldNorms()), ("a", "b"))
    assert [t.skip for t in told] == [("a", "b")] * 4  # type: ignore[attr-defined]
    assert isinstance(told[1], TrainRounded) and told[1].training.skip == ("a", "b")
    assert spared((FoldNorms(),), ()) == (FoldNorms(),)


def test_plans_have_nothing_for_layers_that_may_not_be_touched(bundle: Bundle, env: Env) -> None:
    layers = described(bundle)
    assert any(isinstance(t, QuantizeTables) for plan in types(layers, True) for t in plan)
    tables = types(layers, True, skip=("*.tables.*",))
    assert tables and not any(isinstance(t, QuantizeTables) for plan in tables for t in plan)
    dense = types(layers, False, skip=("mlp.*",))
    assert dense and not any(isinstance(t, QuantizeDense) for plan in dense for t in plan)
    assert types(layers, False, skip=("*",)) == []


def test_structures_keep_away_from_them_too(bundle: Bundle, env: Env) -> None:
    layers = described(bundle)

    def kinds(*skip: str) -> set[type]:
        return {type(t) for plan in structures(bundle, layers, env, skip).values() for t in plan}

    assert kinds() == {PruneNeurons, ShareRows}
    assert kinds("mlp.*") == {ShareRows} and kinds("*.tables.*") == {PruneNeurons}
    assert kinds("*.tables.user") == {PruneNeurons, ShareRows}
    ways = recoveries((PruneNeurons(),), env, 2, ("mlp.0",))
    assert all(isinstance(t, Distill) and t.skip == ("mlp.0",) for way in ways for t in way) and ways


def test_a_graphs_nodes_are_named_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
    (tmp_path / "net.onnx").write_bytes(export(net, {"x": torch.zeros(2, 64)}, ["x"]).graph)
    graph = Bundle(read(tmp_path / "net.onnx"))
    first, second = nodes(graph.model)
    assert forbidden(graph, (first,), ()) == (first,)
    with pytest.raises(ConfigError, match=f"there are: {first}, {second}"):
        forbidden(graph, ("nowhere",), ())
    whole, part = (QuantizeOnnx("int8", skip=s).apply(graph, Env()).bytes for s in ((), (first,)))
    assert whole < part < graph.bytes
