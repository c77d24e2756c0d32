"""ONNX files: the same outputs as their maker, rows of any number, and one clear error for each file that cannot be had."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
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
from pennyweight.core.config import decode, encode  # noqa: E402
from pennyweight.core.errors import BundleError, ConfigError, DataError, DeviceError  # noqa: E402
from pennyweight.model import onnx as bridge  # noqa: E402
from pennyweight.model.bundle import Bundle, Runtime, load, save  # noqa: E402
from pennyweight.model.onnx import Onnx, read, restore, saved_model  # noqa: E402
from pennyweight.model.spec import Model, Spec, call  # noqa: E402

HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
W = "float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
Write = Callable[..., Path]


class Text(nn.Module):
    """A convolution over word vectors, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.out = nn.Embedding(500, 16), nn.Conv1d(16, 8, 3), nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.words(ids).transpose(1, 2)
        return self.out(self.conv(found).relu().amax(2))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of a graph in ONNX' textual form, changed by ``edit``."""

    def written(body: str, *, head: str = HEAD, edit: Callable[[Any], object] = lambda proto: None) -> Path:
        proto = onnx.parser.parse_model(f"{head} {body}")
        edit(proto)
        onnx.save(proto, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return written


def score(model: Model, **columns: Tensor) -> Tensor:
    with torch.inference_mode():
        return call(model.build(), columns, model.spec.inputs)


def made(module: nn.Module, path: Path, **probe: Tensor) -> Path:
    path.write_bytes(export(module.eval(), probe, tuple(probe)).graph)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Digits as images, probabilities of ten classes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10), nn.Softmax(-1)).eval()
    return module, made(module, tmp_path_factory.mktemp("onnx") / "digits.onnx", pixels=torch.randn(2, 1, 28, 28))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = Text().eval()
    path = made(
        nn.Sequential(module, nn.Sigmoid()), tmp_path_factory.mktemp("onnx") / "text.onnx", ids=torch.ones(2, 20).long()
    )
    return module, path


def test_a_classifier_from_flat_columns(classifier: tuple[nn.Module, Path]) -> None:
    module, path = classifier
    model, x = read(path), torch.randn(7, 784)
    assert model.spec.inputs == ("pixels",)
    assert model.bytes == 4 * sum(p.numel() for p in module.parameters()) + 16, "weights, and the two numbers of a shape"
    got = score(model, pixels=x)
    with torch.inference_mode():
        torch.testing.assert_close(got, module[:-1](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(score(read(path, logits=False), pixels=x), module(x), rtol=1e-4, atol=1e-6)


def test_a_text_model_whose_sigmoid_is_left_out(text: tuple[nn.Module, Path]) -> None:
    module, path = text
    model, ids = read(path, ("words",)), torch.randint(0, 500, (9, 20))
    got = score(model, words=ids.int())
    with torch.inference_mode():
        torch.testing.assert_close(got, module(ids).squeeze(1), rtol=1e-4, atol=1e-5)
    assert got.shape == (9,)


def test_through_json_and_a_bundle(classifier: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, batch = read(classifier[1]), {"pixels": torch.randn(5, 784)}
    assert decode(Spec, encode(model.spec)) == model.spec
    back = load(save(Bundle(model), tmp_path / "bundle"))
    with Runner(Bundle(model)) as ours, Runner(back) as theirs:
        want = ours.score(batch)
        assert np.array_equal(theirs.score(batch), want)
    with Runner(back.replace(runtime=Runtime(threads=1, batch=2))) as cut:
        np.testing.assert_allclose(cut.score(batch), want, rtol=1e-5, atol=1e-6)
    assert read(classifier[1]).spec == model.spec, "the same file, the same spec"


def test_the_file_comes_out_again(text: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, ids = read(text[1]), torch.randint(0, 500, (4, 20))
    module = model.build()
    assert isinstance(module, Onnx)
    (tmp_path / "again.onnx").write_bytes(module.file())
    onnx.checker.check_model(module.proto())
    assert torch.equal(score(read(tmp_path / "again.onnx"), ids=ids), score(model, ids=ids))


@pytest.mark.parametrize(
    ("declared", "column"), [("int32[rows, 4]", (3, 4)), ("double[rows, 2, 2]", (3, 4)), ("float16[n, 4, 1]", (3, 4))]
)
def test_columns_are_reshaped_and_cast(declared: str, column: tuple[int, ...], write: Write) -> None:
    nodes = "a = Cast<to = 1>(x) b = Reshape(a, s) y = MatMul(b, w)"
    body = f"g ({declared} x) => (float[n, 2] y) <{W}, int64[2] s = {{-1, 4}}> {{ {nodes} }}"
    x = torch.arange(12.0).reshape(column)
    want = x @ torch.arange(1.0, 9).reshape(4, 2)
    assert torch.equal(score(read(write(body)), x=x), want)


def test_a_scalar_column_and_a_free_dimension(write: Write) -> None:
    nodes = "s = ReduceSum<keepdims = 0>(b, i) c = Squeeze(a, i) y = Add(s, c)"
    path = write(f"g (float[n, 1] a, float[n, length] b) => (float[n] y) <int64[1] i = {{1}}> {{ {nodes} }}")
    got = score(read(path, ("age", "past")), age=torch.tensor([1.0, 2.0]), past=torch.ones(2, 5))
    assert got.tolist() == [6, 7]


def test_a_column_that_does_not_fit(classifier: tuple[nn.Module, Path]) -> None:
    with pytest.raises(DataError, match=r"'pixels' takes 1 x 28 x 28 numbers a row, and the column holds 10"):
        score(read(classifier[1]), pixels=torch.randn(2, 10))


def test_ids_outside_a_table(text: tuple[nn.Module, Path]) -> None:
    with pytest.raises(DataError, match=r"cannot score these rows: .*out of data bounds, idx=500"):
        score(read(text[1]), ids=torch.full((2, 20), 500))


FROZEN = {
    "declared only": "{ y = MatMul(x, w) }",
    "written into a shape": "{ r = Reshape(x, s) m = MatMul(r, w) y = Identity(m) }",
    "in a constant": "{ t = Constant<value = int64[2] {1, -1}>() r = Reshape(x, t) y = MatMul(r, w) }",
}


@pytest.mark.parametrize("how", FROZEN)
def test_a_frozen_batch_is_set_free(how: str, write: Write) -> None:
    entry = "4" if how == "declared only" else "2, 2"
    model = read(write(f"g (float[1, {entry}] x) => (float[1, 2] y) <{W}, int64[2] s = {{1, -1}}> {FROZEN[how]}"))
    assert score(model, x=torch.eye(4)).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_a_batch_that_stays_frozen(write: Write) -> None:
    body = f"g (float[2, 4] x) => (float[2, 2] y) <{W}, float[2, 2] b = {{1, 2, 3, 4}}> {{ m = MatMul(x, w) y = Add(m, b) }}"
    with pytest.raises(ConfigError, match=r"^model.onnx: it does not score any number of rows; export it with a free batch"):
        read(write(body))


def test_rows_that_depend_on_one_another(write: Write) -> None:
    nodes = "a = ReduceMean(x, i) b = Sub(x, a) y = MatMul(b, w)"
    body = f"g (float[n, 4] x) => (float[n, 2] y) <{W}, int64[1] i = {{0}}> {{ {nodes} }}"
    with pytest.raises(ConfigError, match=r"rows change by [\d.]+ on average when scored together"):
        read(write(body))


@pytest.mark.parametrize(
    ("out", "ops"), [("float[a, b, c] y", "y = Unsqueeze(m, i)"), ("float[2] y", "y = ReduceSum<keepdims = 0>(m, i)")]
)
def test_an_output_that_is_no_score(out: str, ops: str, write: Write) -> None:
    body = f"g (float[n, 4] x) => ({out}) <{W}, int64[1] i = {{0}}> {{ m = MatMul(x, w) {ops} }}"
    with pytest.raises(ConfigError, match=r"3 rows give an output of .*, not one score or list of scores a row"):
        read(write(body))


TWO = f"""g (float[n, 4] x, float[n, 9] z) => (int64[n] label, float[n, 2] a, float[n, 9] b)
    <{W}, float[9] v = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}>
    {{ a = MatMul(x, w) b = Mul(z, v) label = ArgMax<axis = 1, keepdims = 0>(a) }}"""


def test_one_output_is_the_score(write: Write) -> None:
    """It is named where there are several; what the others need is left out."""
    with pytest.raises(ConfigError, match=r"2 outputs hold floats.*name it with output=: label \(no floats\), a \(float\), b"):
        read(write(TWO))
    with pytest.raises(ConfigError, match="no float output is called 'label'"):
        read(write(TWO), output="label")
    model = read(write(TWO), output="a")
    assert model.spec.inputs == ("x",) and list(model.state) == ["weights.w"] and model.bytes == 32
    assert score(model, x=torch.eye(4)).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    with pytest.raises(ConfigError, match="has 1 inputs \\(x\\), not the 2 named"):
        read(write(TWO), ("x", "z"), output="a")


def test_a_label_beside_the_probabilities(write: Write) -> None:
    """What scikit-learn's converter gives: the label is no float, so it is not the score."""
    body = TWO.replace(", float[n, 9] b", "").replace("b = Mul(z, v) ", "")
    assert score(read(write(body)), x=torch.eye(4)).shape == (4, 2)


@pytest.mark.parametrize(
    ("ops", "bare"),
    [
        ("y = Sigmoid(m)", True),
        ("y = Softmax<axis = 1>(m)", True),
        ("p = Sigmoid(m) q = Unsqueeze(p, i) y = Squeeze(q, i)", True),
        ("p = Sigmoid(m) y = Mul(p, p)", False),
        ("p = Sigmoid(m) q = Identity(p) y = Add(q, m)", False),
        ("y = LogSoftmax<axis = 1>(m)", False),
    ],
)
def test_a_last_sigmoid_or_softmax_is_left_out(ops: str, bare: bool, write: Write) -> None:
    path = write(f"g (float[n, 4] x) => (float[n, 2] y) <{W}, int64[1] i = {{1}}> {{ m = MatMul(x, w) {ops} }}")
    x = torch.eye(4)
    got, kept = score(read(path), x=x), score(read(path, logits=False), x=x)
    assert torch.equal(got, kept) != bare
    assert not bare or got.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_tensors_beside_the_file(text: tuple[nn.Module, Path], tmp_path: Path) -> None:
    onnx.save(onnx.load(text[1]), tmp_path / "large.onnx", save_as_external_data=True, location="large.bin", size_threshold=0)
    ids = torch.randint(0, 500, (4, 20))
    assert torch.equal(score(read(tmp_path / "large.onnx"), ids=ids), score(read(text[1]), ids=ids))
    (tmp_path / "large.bin").unlink()
    with pytest.raises(DataError, match=r"large.onnx: its tensors lie in another file.*large\.bin"):
        read(tmp_path / "large.onnx")


def test_every_type_of_tensor(write: Write) -> None:
    """Those PyTorch has not are held as bytes: seven int4 are four."""
    kinds = {"FLOAT16": (torch.float16, (7,)), "BFLOAT16": (torch.bfloat16, (7,)), "DOUBLE": (torch.float64, (7,))}
    kinds |= {
        "INT8": (torch.int8, (7,)),
        "BOOL": (torch.bool, (7,)),
        "INT64": (torch.int64, (7,)),
        "UINT16": (torch.uint8, (14,)),
    }
    kinds |= {"INT4": (torch.uint8, (4,)), "UINT4": (torch.uint8, (4,)), "FLOAT8E4M3FN": (torch.uint8, (7,))}
    numbers = [0.0, 1, 1, 0, 1, 0, 1]

    def edit(proto: Any) -> None:
        total = "x"
        for at, kind in enumerate(kinds):
            tensor = onnx.helper.make_tensor(f"{kind}.of", getattr(onnx.TensorProto, kind), [7], numbers)
            proto.graph.initializer.append(tensor)
            proto.graph.node.append(onnx.helper.make_node("Cast", [tensor.name], [f"f{at}"], to=onnx.TensorProto.FLOAT))
            proto.graph.node.append(onnx.helper.make_node("Add", [total, f"f{at}"], [total := f"t{at}"]))
        proto.graph.node.append(onnx.helper.make_node("Identity", [total], ["y"]))
        del proto.graph.node[0]

    head = HEAD.replace("20", "21")
    model = read(write("g (float[n, 7] x) => (float[n, 7] y) { unused = Identity(x) }", head=head, edit=edit))
    assert {k.removeprefix("weights."): (v.dtype, tuple(v.shape)) for k, v in model.state.items()} == {
        f"{k}_of": v for k, v in kinds.items()
    }
    assert score(model, x=torch.zeros(2, 7)).tolist() == [[len(kinds) * n for n in numbers]] * 2


def test_tensors_inside_nodes_and_branches_are_weights(write: Write) -> None:
    body = """g (float[n, 4] x) => (float[n, 4] y) {
        c = Constant<value = float[4] {1, 2, 3, 4}>() s = ReduceMax<keepdims = 0>(c) yes = Greater(s, z)
        y = If(yes) <then_branch = one () => (float[n, 4] t) <float[4] w = {5, 6, 7, 8}> { t = Mul(x, w) },
                     else_branch = two () => (float[n, 4] e) { e = Mul(x, c) }>
    }""".replace("=> (float[n, 4] y) {", "=> (float[n, 4] y) <float z = {0}> {")
    model = read(write(body))
    assert model.bytes == 4 + 16 + 16 and len(model.state) == 3
    assert score(model, x=torch.ones(2, 4)).tolist() == [[5, 6, 7, 8]] * 2


def test_older_files_list_tensors_among_the_inputs(write: Write) -> None:
    path = write(
        f"g (float[n, 4] x, float[4, 2] w) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}",
        head='<ir_version: 3, opset_import: ["": 9]>',
    )
    assert read(path).spec.inputs == ("x",)


def test_what_exporters_note_down_is_left_out(write: Write) -> None:
    def edit(proto: Any) -> None:
        proto.graph.node[0].doc_string = "File /home/someone/secret.py"
        entry = proto.graph.node[0].metadata_props.add()
        entry.key, entry.value = "stack_trace", "File /home/someone/secret.py"

    module = read(write(f"g (float[n, 4] x) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}", edit=edit)).build()
    assert isinstance(module, Onnx) and b"someone" not in module.graph
    assert module.proto().graph.node[0].name == "MatMul_0"


def test_names_that_modules_do_not_take(write: Write) -> None:
    """A tensor may be called as a method of a module is, or as another is but for its dots."""

    def edit(proto: Any) -> None:
        total = "x"
        for at, name in enumerate(("forward", "training", "a.b", "a_b", "/a/b:0")):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(4, 1 + at, np.float32), name))
            proto.graph.node.append(onnx.helper.make_node("Add", [total, name], [total := f"t{at}"]))
        proto.graph.node.append(onnx.helper.make_node("Identity", [total], ["y"]))
        del proto.graph.node[0]

    model = read(write("g (float[n, 4] x) => (float[n, 4] y) { unused = Identity(x) }", edit=edit))
    assert len(model.state) == 5
    assert score(model, x=torch.zeros(1, 4)).tolist() == [[15] * 4]


def test_the_session_follows_the_weights(write: Write) -> None:
    model = read(write(f"g (float[n, 4] x) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}"))
    module, x = model.build(), torch.eye(4)
    before = module(x)
    assert isinstance(module, Onnx) and module.ready() is module.ready()
    module.load_state_dict({"weights.w": 2 * model.state["weights.w"]})
    assert torch.equal(module(x), 2 * before)


def test_a_session_has_the_threads_of_its_runner(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(write(f"g (float[n, 4] x) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}"))
    asked: list[int] = []
    opened = bridge.session
    monkeypatch.setattr(bridge, "session", lambda graph, threads: asked.append(threads) or opened(graph, threads))
    with Runner(Bundle(model, runtime=Runtime(threads=2))) as runner:
        runner.score({"x": torch.eye(4)})
        runner.score({"x": torch.eye(4)})
    assert asked == [2]


@pytest.mark.parametrize("engine", ["compile", "onnxruntime"])
def test_other_engines_are_refused(engine: Any, write: Write) -> None:
    model = read(write(f"g (float[n, 4] x) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}"))
    with pytest.raises(DeviceError, match=r"ONNX Runtime runs already.*use 'eager'|needs a C\+\+ compiler"):
        Runner(Bundle(model, runtime=Runtime(engine)), probe={"x": torch.eye(4)})


ONE = f"g (float[n, 4] x) => (float[n, 2] y) <{W}> {{ y = MatMul(x, w) }}"


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (ONE.replace("MatMul", "Magic"), ConfigError, "cannot run the graph: .*No Op registered for Magic"),
        (ONE.replace("float[n, 4] x", "float x"), ConfigError, "input 'x' is a single number and has no batch dimension"),
        (ONE.replace("float[n, 4] x", "float[] x"), ConfigError, "input 'x' is of varying rank"),
        (
            ONE.replace("float[n, 4] x", "string[n, 4] x").replace("MatMul(x, w)", "Cast<to = 1>(x)"),
            ConfigError,
            r"takes tensor\(string\)",
        ),
        (ONE.replace("MatMul(x, w)", "Identity(w)"), ConfigError, "the score depends on no input"),
        (
            ONE.replace("float[n, 2] y", "int64[n, 2] y").replace("y = MatMul(x, w)", "m = MatMul(x, w) y = Cast<to = 7>(m)"),
            ConfigError,
            "0 outputs hold floats",
        ),
    ],
)
def test_graphs_that_cannot_be_had(body: str, error: type[Exception], message: str, write: Write) -> None:
    with pytest.raises(error, match=f"^model.onnx: .*{message}"):
        read(write(body))


def test_a_file_too_new(write: Write) -> None:
    with pytest.raises(
        DeviceError, match=r"uses opset 99, and ONNX Runtime [\d.]+ ends at \d+; export it with an older opset, or pip"
    ):
        read(write(ONE, head=HEAD.replace("20", "99")))
    with pytest.raises(DeviceError, match=r"uses IR version 99, and ONNX Runtime [\d.]+ ends at \d+"):
        read(write(ONE, head=HEAD.replace("ir_version: 10", "ir_version: 99")))


def test_custom_operators_are_never_loaded(write: Write) -> None:
    head = HEAD.replace('"": 20', '"": 20, "my.ops": 1')
    with pytest.raises(ConfigError, match=r"operator Twice of 'my.ops' .* libraries of custom operators are never loaded"):
        read(write(ONE.replace("MatMul(x, w)", "my.ops.Twice(x)"), head=head))
    own = '<domain: "my.ops", opset_import: ["": 20]> Twice (a) => (b) { b = Add(a, a) }'
    body = ONE.replace("y = MatMul(x, w)", "m = MatMul(x, w) y = my.ops.Twice(m)")
    assert score(read(write(f"{body} {own}", head=head)), x=torch.eye(4))[0].tolist() == [2, 4], "brought along as a function"


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", b"\x08\x07", b"\x00" * 100])
def test_files_that_are_not_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(DataError, match=r"^bad.onnx: not an ONNX file"):
        read(tmp_path / "bad.onnx")


def test_a_truncated_file(classifier: tuple[nn.Module, Path], tmp_path: Path) -> None:
    data = classifier[1].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"^cut.onnx: "):
        read(tmp_path / "cut.onnx")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^none.onnx: there is no such file"):
        read(tmp_path / "none.onnx")
    with pytest.raises(DataError, match=r"a folder; name the .onnx file in it"):
        read(tmp_path)


def test_packages_that_are_missing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(ONE)
    model = read(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for attempt in (lambda: read(path), model.build):
        with pytest.raises(DeviceError, match=r"needs onnx and onnxruntime: pip install pennyweight\[onnx\]"):
            attempt()


def test_more_than_a_session_is_made_of(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "LIMIT", 100)
    with pytest.raises(ConfigError, match="the graph holds 32 B, and a session is made of at most 100 B"):
        read(write(ONE))


def test_a_damaged_spec_and_weights_of_another_type(write: Write) -> None:
    for graph in ("!", "aGVsbG8gd29ybGQ="):
        with pytest.raises(ConfigError, match=r"not base64|not an ONNX graph"):
            restore(graph)
    model = read(write(ONE))
    with pytest.raises(BundleError, match=r"tensor 'w' is torch.float64 \(4, 2\), the graph says torch.float32"):
        score(Model(model.spec, {"weights.w": model.state["weights.w"].double()}), x=torch.eye(4))


# -- SavedModel ------------------------------------------------------------------------------------------------------------

TENSORFLOW = os.environ.get("PENNYWEIGHT_TENSORFLOW") or (sys.executable if importlib.util.find_spec("tensorflow") else "")


def test_a_saved_model_without_tensorflow(tmp_path: Path) -> None:
    """An interpreter without any package says which to install."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(DataError, match="holds no SavedModel"):
        saved_model(tmp_path, python=str(bare))
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(DeviceError, match="needs TensorFlow: pip install tensorflow-cpu tf2onnx"):
        saved_model(tmp_path, python=str(bare))


@pytest.mark.skipif(
    not TENSORFLOW, reason="no TensorFlow here; PENNYWEIGHT_TENSORFLOW may name a Python that has it with tf2onnx"
)
def test_a_saved_model(tmp_path: Path) -> None:
    code = """
import sys, numpy as np, tensorflow as tf
tf.keras.utils.set_random_seed(0)
entry = tf.keras.Input((28, 28), name="pixels")
hidden = tf.keras.layers.Dense(16, activation="relu")(tf.keras.layers.Flatten()(entry))
out = tf.keras.layers.Dense(10, activation="softmax")(hidden)
model = tf.keras.Model(entry, out)
model.export(sys.argv[1] + "/saved", verbose=False)
x = np.random.default_rng(0).random((5, 28, 28), dtype="float32")
np.save(sys.argv[1] + "/x.npy", x)
np.save(sys.argv[1] + "/y.npy", model(x).numpy())
"""
    subprocess.run([TENSORFLOW, "-c", code, str(tmp_path)], check=True, capture_output=True)
    model = saved_model(tmp_path / "saved", python=TENSORFLOW)
    x, want = torch.from_numpy(np.load(tmp_path / "x.npy")), torch.from_numpy(np.load(tmp_path / "y.npy"))
    torch.testing.assert_close(score(model, pixels=x.reshape(5, -1)).softmax(1), want, rtol=1e-4, atol=1e-6)
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="tf2onnx cannot convert SavedModel saved: "):
        saved_model(tmp_path / "saved", python=TENSORFLOW)
