"""Quantized ONNX graphs: near outputs, fewer bytes, bundles that score, and a PlanError where there is nothing to do."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pennyweight.accelerate.compile import export  # noqa: E402
from pennyweight.accelerate.runner import Runner  # noqa: E402
from pennyweight.compress.distill import Distill  # noqa: E402
from pennyweight.compress.onnx import QuantizeOnnx, types  # noqa: E402
from pennyweight.compress.prune import FoldNorms, PruneNeurons  # noqa: E402
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables  # noqa: E402
from pennyweight.compress.share import ShareRows  # noqa: E402
from pennyweight.core.errors import ConfigError, PlanError  # noqa: E402
from pennyweight.data.dataset import Dataset  # noqa: E402
from pennyweight.data.schema import Column, Schema  # noqa: E402
from pennyweight.model.bundle import Bundle, load, save  # noqa: E402
from pennyweight.model.onnx import Onnx, read  # noqa: E402
from pennyweight.model.ranking import DNN  # noqa: E402
from pennyweight.model.spec import Model, build, spec_of  # noqa: E402
from pennyweight.model.train import Recipe  # noqa: E402
from pennyweight.model.transform import Env, Transform, plan  # noqa: E402
from pennyweight.optimize.evaluate import Bench, parts  # noqa: E402

WORDS, LENGTH = 2000, 12
Scores = np.ndarray[Any, Any]


class Text(nn.Module):
    """A convolution over word vectors, pooled, then dense layers; a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(WORDS, 32), nn.Conv1d(32, 16, 3)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.conv(self.words(ids).transpose(1, 2)).relu().amax(2))


def dataset(rows: int = 400) -> Dataset:
    rng = np.random.default_rng(0)
    columns = (
        Column("ids", "context", "sequence", WORDS, LENGTH),
        Column("pixels", "context", "numeric", 0, 144),
        Column("label", "label", "numeric"),
    )
    values = {
        "ids": rng.integers(0, WORDS, (rows, LENGTH)),
        "pixels": rng.normal(size=(rows, 144)),
        "label": rng.integers(0, 2, rows).astype(np.float32),
    }
    return Dataset.from_arrays(values, Schema(columns))


@pytest.fixture(scope="module")
def env() -> Env:
    data = dataset()
    return Env(train=data, valid=data, calib=data, recipe=Recipe(epochs=1))


def given(module: nn.Module, path: Path, **probe: Tensor) -> Bundle:
    path.write_bytes(export(module.eval(), probe, tuple(probe)).graph)
    return Bundle(read(path))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A text model and a classifier of images with a norm behind its convolution."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    image = nn.Sequential(
        conv, norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return {
        "text": given(Text(), folder / "text.onnx", ids=torch.ones(2, LENGTH).long()),
        "image": given(nn.Sequential(image, nn.Softmax(-1)), folder / "image.onnx", pixels=torch.randn(2, 1, 12, 12)),
    }


def score(bundle: Bundle, rows: int = 200) -> Scores:
    with Runner(bundle) as runner:
        return runner.score(next(dataset().batches(rows)))


PLANS = [(QuantizeOnnx(t),) for t in ("fp16", "int8", "int8-static", "int4")] + [(QuantizeOnnx("int4"), QuantizeOnnx("int8"))]
NEAR = {"fp16": 0.002, "int8": 0.05, "int8-static": 0.08, "int4": 0.3}
"""Mean difference of logits allowed, as a share of their spread, for weights nobody trained."""
SMALLER = {"fp16": 1.95, "int8": 3.5, "int8-static": 3, "int4": 3}
"""A scale or a zero point is 4 bytes and its line in the file's header 90, which counts in models as small as these."""


@pytest.mark.parametrize("which", ["text", "image"])
@pytest.mark.parametrize("transforms", PLANS, ids=lambda ts: "+".join(t.data_type for t in ts))
def test_near_and_smaller_through_a_bundle(
    which: str, transforms: tuple[QuantizeOnnx, ...], bundles: dict[str, Bundle], env: Env, tmp_path: Path
) -> None:
    before, last = bundles[which], transforms[0].data_type
    after = load(save(plan(transforms).apply(before, env), tmp_path / "bundle"))
    want, got = score(before), score(after)
    assert got.shape == want.shape
    assert np.abs(got - want).mean() < NEAR[last] * want.std()
    assert before.bytes / after.bytes > SMALLER[last]
    assert after.bytes == len((tmp_path / "bundle" / "weights.safetensors").read_bytes())


@pytest.mark.parametrize("data_type", ["fp16", "int8-static", "int4"])
def test_a_row_scores_the_same_in_any_company(data_type: Any, bundles: dict[str, Bundle], env: Env) -> None:
    for bundle in bundles.values():
        after = QuantizeOnnx(data_type).apply(bundle, env)
        np.testing.assert_allclose(score(after, 1), score(after)[:1], rtol=1e-4, atol=1e-5)


def test_which_plans_to_try(bundles: dict[str, Bundle], env: Env, tmp_path: Path) -> None:
    """Each of them can be applied; int8 after int4 only where a convolution is left for it."""
    assert types(bundles["text"].model, calib=True) == PLANS
    ones = ", ".join(["1"] * 144 * 10)
    dense = graph(tmp_path / "m.onnx", f"g (float[n, 144] pixels) => (float[n, 10] y) <float[144, 10] w = {{{ones}}}> {DENSE}")
    found = types(dense.model, calib=False)
    assert found == [(QuantizeOnnx("fp16"),), (QuantizeOnnx("int8"),), (QuantizeOnnx("int4"),)]
    assert all(plan(each).apply(dense, env).bytes < dense.bytes for each in found)
    assert types(Model(spec_of(DNN, columns=[]), {}), calib=True) == []


DENSE = "{ y = MatMul(pixels, w) }"


def nodes(bundle: Bundle) -> dict[str, str]:
    module = bundle.model.build()
    assert isinstance(module, Onnx)
    return {n.name: n.op_type for n in module.proto().graph.node}


def test_a_norm_is_folded_and_a_table_packed(bundles: dict[str, Bundle], env: Env) -> None:
    assert "BatchNormalization" not in nodes(QuantizeOnnx("int8").apply(bundles["image"], env)).values()
    after = QuantizeOnnx("int4").apply(bundles["text"], env)
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(nodes(after).values())
    table = [t for t in after.model.state.values() if t.numel() == WORDS * 32 // 2]
    assert [t.dtype for t in table] == [torch.uint8], "two ids of int4 a byte"


def test_smaller_blocks_are_nearer(bundles: dict[str, Bundle], env: Env) -> None:
    want = score(bundles["image"])
    gaps = [np.abs(score(QuantizeOnnx("int4", block=b).apply(bundles["image"], env)) - want).mean() for b in (16, 128)]
    assert gaps[0] < gaps[1]


def test_seven_bits_are_seven_bits(bundles: dict[str, Bundle], env: Env) -> None:
    after = QuantizeOnnx("int8", reduce_range=True).apply(bundles["image"], env)
    held = [t for t in after.model.state.values() if t.dtype == torch.int8 and t.numel() > 10]
    assert held and all(t.abs().max() <= 64 for t in held)


def test_only_some_nodes(bundles: dict[str, Bundle], env: Env) -> None:
    bundle = bundles["text"]
    table = next(name for name, kind in nodes(bundle).items() if kind == "Gather")
    only, rest = (QuantizeOnnx("int8", **{how: (table,)}).apply(bundle, env) for how in ("only", "skip"))
    assert not any(kind.endswith("Integer") for kind in nodes(only).values())
    assert {"ConvInteger", "MatMulInteger"} <= set(nodes(rest).values())
    assert only.bytes < rest.bytes < bundle.bytes
    assert QuantizeOnnx("int8").apply(only, env).bytes < rest.bytes, "the rest of it, later"
    with pytest.raises(PlanError, match=rf"no node with weights matches 'fc\*'; there are: .*{table}"):
        QuantizeOnnx("int8", only=("fc*",)).apply(bundle, env)


@pytest.mark.parametrize("data_type", ["fp16", "int8", "int8-static", "int4"])
def test_twice_is_nothing_to_do(data_type: Any, bundles: dict[str, Bundle], env: Env) -> None:
    once = QuantizeOnnx(data_type).apply(bundles["text"], env)
    with pytest.raises(PlanError, match=r"would not get smaller|no node has fp32 weights"):
        QuantizeOnnx(data_type).apply(once, env)


def graph(path: Path, body: str, opset: int = 20) -> Bundle:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {body}'), path)
    return Bundle(read(path))


def test_no_weights_that_could_be_smaller(env: Env, tmp_path: Path) -> None:
    ones = ", ".join(["1"] * 144)
    body = f"g (float[n, 144] pixels) => (float[n, 144] y) <float[144] w = {{{ones}}}> {{ y = Mul(pixels, w) }}"
    bundle = graph(tmp_path / "tiny.onnx", body)
    for each in ("fp16", "int8", "int8-static", "int4"):
        with pytest.raises(PlanError, match="no node has fp32 weights"):
            QuantizeOnnx(each).apply(bundle, env)  # type: ignore[arg-type]


def test_an_old_opset_is_brought_up(env: Env, tmp_path: Path) -> None:
    """Per-channel scales came with opset 13 and int4 with 21; Squeeze had its axes elsewhere before."""
    weights = ",".join(str(v) for v in np.random.default_rng(0).normal(size=144 * 16).round(3))
    ops = "m = MatMul(pixels, w) u = Unsqueeze<axes = [1]>(m) y = Squeeze<axes = [1]>(u)"
    body = f"g (float[n, 144] pixels) => (float[n, 16] y) <float[144, 16] w = {{{weights}}}> {{ {ops} }}"
    bundle = graph(tmp_path / "old.onnx", body, opset=11)
    want = score(bundle)
    for each in ("fp16", "int8", "int8-static", "int4"):
        after = QuantizeOnnx(each).apply(bundle, env)  # type: ignore[arg-type]
        assert np.abs(score(after) - want).mean() < 0.1 * want.std()


def test_weights_that_are_no_numbers(bundles: dict[str, Bundle], env: Env) -> None:
    model = bundles["image"].model
    name = max(model.state, key=lambda n: model.state[n].numel())
    for value, data_type, message in ((torch.nan, "int8", "NaN or infinite"), (7e4, "fp16", "fp16 ends at 65504")):
        broken = model.state[name].clone()
        broken.view(-1)[0] = value
        with pytest.raises(PlanError, match=message):
            QuantizeOnnx(data_type).apply(Bundle(Model(model.spec, {**model.state, name: broken})), env)  # type: ignore[arg-type]


def test_what_is_missing_is_said(bundles: dict[str, Bundle], env: Env) -> None:
    with pytest.raises(PlanError, match=r"needs env\.calib"):
        QuantizeOnnx("int8-static").apply(bundles["text"], Env())
    with pytest.raises(ConfigError, match="block = 33"):
        QuantizeOnnx("int4", block=33)
    spec = spec_of(DNN, columns=dataset().schema.columns[:1], dim=4, hidden=[8])
    with pytest.raises(PlanError, match="DNN is no ONNX graph; quantize it with quantize-tables and quantize-dense"):
        QuantizeOnnx().apply(Bundle(Model.of(build(spec), spec)), env)


@pytest.mark.parametrize(
    "transform",
    [PruneNeurons(), FoldNorms(), ShareRows(), QuantizeTables(), QuantizeDense(), Distill(epochs=1)],
    ids=lambda t: type(t).__name__,
)
def test_transforms_of_layers_say_that_there_are_none(transform: Transform, bundles: dict[str, Bundle], env: Env) -> None:
    with pytest.raises(PlanError):
        transform.apply(bundles["text"], dataclasses.replace(env, teachers=(bundles["text"].model,)))


def test_the_report_names_its_types(bundles: dict[str, Bundle], env: Env) -> None:
    bench = Bench.of(dataset(), candidates=50, n=2)
    kinds = {"fp16": "onnx fp16", "int8": "onnx int8", "int4": "onnx int4 + fp32"}
    for each, kind in kinds.items():
        after = QuantizeOnnx(each).apply(bundles["text"], env)  # type: ignore[arg-type]
        (part,) = parts(after, bench, rounds=1)
        assert (part.kind, part.bytes) == (kind, after.model.bytes)


def test_the_callers_logging_is_left_alone(
    bundles: dict[str, Bundle], env: Env, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for each in ("int8", "int8-static", "int4"):
        QuantizeOnnx(each).apply(bundles["image"], env)  # type: ignore[arg-type]
    assert logging.getLogger().handlers == [] and capfd.readouterr() == ("", "")
