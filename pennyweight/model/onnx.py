"""An ONNX file as a Model that keeps its graph: the graph is the spec, its tensors are the weights, ONNX Runtime runs it.

``read(path)`` takes every tensor out of the file's graph. What is left, a few kilobytes, is the factory's one argument; the
tensors are the state dict, so that bytes are counted, checked and shipped like any other model's. Turning the graph into
PyTorch layers was the alternative. It would open pruning and training to such a model, but for the operators that a
converter knows only, and a graph whose user chose ONNX is best left to its own runtime. The graph is written as base64 of
its protobuf: JSON or the textual form would be ten times longer, and both drop fields that a newer ONNX adds.

A model here gives one score for each row. So the graph's one float output is kept (or the one that is named) with the nodes
it needs, a batch dimension that was frozen at export is set free, and a last Sigmoid or Softmax is left out, since losses,
metrics and proofs take logits. Three rows, together and one by one, must then give the same scores.

What it costs: weights are in memory twice, as tensors and in the session; a graph may hold 2 GB, the most that a protobuf
carries; it runs on the CPU. Custom operators are refused, as their libraries would be foreign code.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.core.budget import size
from pennyweight.core.errors import BundleError, ConfigError, DataError, DeviceError, PennyweightError
from pennyweight.model.layers import key
from pennyweight.model.packed import Packed
from pennyweight.model.spec import Model, Spec

FACTORY = f"{__name__}:restore"
LIMIT = 2**31 - 1
"""Bytes of one protobuf at most."""
FREE = 64
"""Length at which a free dimension beside the batch is tried out."""
ROUNDING = 0.1
"""Largest mean difference, as a share of the mean score, between rows alone and together: dynamic int8 rounds by the batch."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
"""Where ONNX Runtime's own operators are."""

Shape = tuple[int | None, ...]
"""Sizes of dimensions; None where they are free."""


def read(path: str | os.PathLike[str], inputs: Sequence[str] = (), *, output: str = "", logits: bool = True) -> Model:
    """The Model that an ONNX file is, tensors that lie beside it included.

    Args:
        path: the file.
        inputs: the column that each of its inputs reads, in order; the names of its inputs if empty. Columns are flat and
            are reshaped and cast to what the graph declares.
        output: the output that is the score; its one float output if empty.
        logits: leave a last Sigmoid or Softmax out.

    Raises:
        DataError: there is no such file, it is not ONNX, or its tensors are not beside it.
        ConfigError: no one output can be the score, the batch dimension cannot be free, or an operator is unknown.
        DeviceError: a package is missing, or the file is newer than the installed ONNX Runtime.
    """
    source = Path(path)
    try:
        return _model(_loaded(source), tuple(inputs), output, logits)
    except PennyweightError as error:
        raise type(error)(f"{source.name}: {error}") from error


def saved_model(
    folder: str | os.PathLike[str],
    inputs: Sequence[str] = (),
    *,
    output: str = "",
    logits: bool = True,
    python: str = sys.executable,
) -> Model:
    """The Model that a TensorFlow SavedModel is, by way of ONNX (tf2onnx).

    TensorFlow runs in a process of its own and never in this one; ``python`` may name an interpreter of another environment,
    where the two would not install side by side. Otherwise as ``read``.

    Raises:
        DeviceError: TensorFlow or tf2onnx is not installed there.
        DataError: the folder holds no SavedModel.
        ConfigError: tf2onnx cannot convert it, or what ``read`` raises.
    """
    source = Path(folder)
    if not (source / "saved_model.pb").is_file():
        raise DataError(f"{source} holds no SavedModel (no saved_model.pb); export one with tf.saved_model.save")
    with tempfile.TemporaryDirectory(prefix="pennyweight-") as scratch:
        file = Path(scratch) / f"{source.name}.onnx"
        command = [python, "-m", "tf2onnx.convert", "--saved-model", str(source), "--output", str(file)]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
        if done.returncode or not file.exists():
            _unconverted(source, done.stderr)
        return read(file, inputs, output=output, logits=logits)


def _unconverted(source: Path, said: str) -> NoReturn:
    if re.search(r"No module named '(tensorflow|tf2onnx)", said):
        raise DeviceError(
            f"SavedModel {source.name} is read through ONNX, which needs TensorFlow: pip install tensorflow-cpu tf2onnx "
            "(in another environment, if you like; name its interpreter as python=)"
        )
    reason = (said.strip().splitlines() or ["no reason was given"])[-1]
    raise ConfigError(f"tf2onnx cannot convert SavedModel {source.name}: {reason[:300]}")


def of(proto: Any, inputs: Sequence[str] = ()) -> Model:
    """The Model of a graph in memory (``onnx.ModelProto``, which is emptied); whether it scores rows is not looked at.

    Raises:
        ConfigError: another number of inputs than named.
    """
    own = tuple(entry.name for entry in proto.graph.input)
    if inputs and len(inputs) != len(own):
        raise ConfigError(f"the ONNX graph has {len(own)} inputs ({', '.join(own)}), not the {len(inputs)} named")
    _strip(proto)
    state = {f"weights.{name}": _taken(tensor) for name, tensor in _tensors(proto).items()}
    graph = base64.b64encode(proto.SerializeToString(deterministic=True)).decode()
    return Model(Spec(FACTORY, {"graph": graph}, {}, tuple(inputs) or own), state)


def restore(graph: str) -> Onnx:
    """The module of a graph without its tensors, weights not loaded: the factory of the specs that ``read`` makes.

    Raises:
        DeviceError: onnx or onnxruntime is not installed.
        ConfigError: the argument is no such graph.
    """
    try:
        return Onnx(_parsed(base64.b64decode(graph, validate=True)).SerializeToString(deterministic=True))
    except ValueError as error:
        raise ConfigError(f"the spec's graph is not base64 of an ONNX graph ({error}); read the file again") from error


class Onnx(Packed):
    """A graph with its tensors as buffers, run by ONNX Runtime in a session that is made at the first forward.

    The session has as many threads as PyTorch has at that moment, which is how a runner sets them.
    """

    def __init__(self, graph: bytes) -> None:
        super().__init__()
        self.graph = graph
        self.weights = nn.Module()
        for name, tensor in _tensors(_parsed(graph)).items():
            shape, dtype = _form(tensor)
            self.weights.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def forward(self, *columns: Tensor) -> Tensor:
        """Scores [B] or [B, n] of columns [B] or [B, N], one for each input of the graph."""
        running, entries = self.ready()
        feeds = {e.name: e.fed(column) for e, column in zip(entries, columns, strict=True)}
        try:
            (output,) = running.run(None, feeds)
        except Exception as error:
            raise DataError(f"the ONNX graph cannot score these rows: {_reason(error)}") from error
        return torch.from_numpy(np.asarray(output, np.float32))

    def prepare(self) -> tuple[Any, tuple[Entry, ...]]:
        """A session, and what it wants to be fed."""
        try:
            running = session(self.file(), torch.get_num_threads())
        except PennyweightError:
            raise
        except Exception as error:
            _unrunnable(error)
        return running, tuple(Entry.of(e) for e in running.get_inputs())

    def plain(self) -> NoReturn:
        """Refused: the graph runs in ONNX Runtime whatever the engine."""
        raise DeviceError("an ONNX model is a graph that ONNX Runtime runs already, and no other engine can; use 'eager'")

    @property
    def kind(self) -> str:
        """What the graph is made of: the data types that hold a tenth of its bytes or more."""
        proto, held = _parsed(self.graph), Counter[str]()
        blocks = (n for n in proto.graph.node if n.op_type == "MatMulNBits")  # packed into bytes, whatever the bits
        packed = {n.input[1]: f"int{next(a.i for a in n.attribute if a.name == 'bits')}" for n in blocks}
        for name, tensor in _tensors(proto).items():
            kind = library().TensorProto.DataType.Name(tensor.data_type)
            kind = packed.get(tensor.name) or _SHORT.get(kind, kind.lower().removeprefix("u"))
            held[kind] += self.weights.get_buffer(name).nbytes
        return "onnx " + " + ".join(k for k, n in held.most_common() if 10 * n >= held.total())

    def proto(self) -> Any:
        """The whole graph, an ``onnx.ModelProto``."""
        proto = _parsed(self.graph)
        for name, tensor in _tensors(proto).items():
            _filled(tensor, self.weights.get_buffer(name), name)
        return proto

    def file(self) -> bytes:
        """The bytes of an ONNX file of this model, as it is now."""
        held = sum(t.numel() * t.element_size() for t in self.weights.buffers())
        if held + len(self.graph) > LIMIT:
            raise ConfigError(
                f"the graph holds {size(held)}, and a session is made of at most {size(LIMIT)}; cut the model in two"
            )
        written: bytes = self.proto().SerializeToString()
        return written


def session(graph: bytes | str, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU, of a graph or of the file it is in; 0 threads is one for every core."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for work by spinning take the cores of whatever else is timed or served beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Entry:
    """An input of a graph: what a flat column becomes."""

    name: str
    shape: Shape
    """Without the batch dimension."""
    dtype: torch.dtype

    @classmethod
    def of(cls, declared: Any) -> Entry:
        """An input as a session declares it."""
        kind = declared.type.removeprefix("tensor(").removesuffix(")")
        if kind not in _FED:
            raise ConfigError(f"input {declared.name!r} takes {declared.type}; columns hold numbers, so cast inside the graph")
        return cls(declared.name, tuple(d if isinstance(d, int) else None for d in declared.shape[1:]), _FED[kind])

    def fed(self, column: Tensor) -> Any:
        """A column [B] or [B, N] as the array the graph takes."""
        free = self.shape.count(None)
        if free < 2 and column.shape[1:] != self.shape:
            try:
                column = column.reshape(len(column), *(-1 if d is None else d for d in self.shape))
            except RuntimeError as error:
                wanted = " x ".join("any" if d is None else str(d) for d in self.shape) or "one"
                raise DataError(
                    f"input {self.name!r} takes {wanted} numbers a row, and the column holds {column[:1].numel()}; "
                    "name the column that it reads with inputs="
                ) from error
        return column.to(self.dtype).numpy()

    def probe(self, rows: int, generator: torch.Generator) -> Tensor:
        """Numbers to try it out with; ids are 0 and 1, which every table has."""
        shape = (rows, *(FREE if d is None else d for d in self.shape))
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator)
        return torch.randint(0, 2, shape, generator=generator)


_FED = {
    "float": torch.float32,
    "double": torch.float64,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""ONNX Runtime's names of the types that a column can be cast to."""

_HELD = {
    **{"FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16},
    **{"INT64": torch.int64, "INT32": torch.int32, "INT16": torch.int16, "INT8": torch.int8},
    **{"UINT8": torch.uint8, "BOOL": torch.bool},
}
"""ONNX' types that PyTorch has; a tensor of another (int4, float8) is held as its bytes."""

_SHORT = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


# -- tensors in and out of a graph ---------------------------------------------------------------------------------------


def library() -> Any:
    """The onnx package.

    Raises:
        DeviceError: it or onnxruntime is not installed.
    """
    missing = [p for p in ("onnx", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        raise DeviceError(f"an ONNX model needs {' and '.join(missing)}: pip install pennyweight[onnx]")
    return importlib.import_module("onnx")


def _parsed(graph: bytes) -> Any:
    onnx = library()
    try:
        proto = onnx.ModelProto.FromString(graph)
    except Exception as error:  # protobuf's own error class moved between its versions
        raise ConfigError(f"not an ONNX graph ({error}); it is damaged, read the file again") from error
    return proto


def _messages(message: Any) -> Iterator[Any]:
    """A message and all that it holds, subgraphs and attributes included, in order."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else (value,):
                yield from _messages(inner)


def _kind(message: Any) -> str:
    return str(message.DESCRIPTOR.name)


def _tensors(proto: Any) -> dict[str, Any]:
    """Every tensor of numbers in a graph under a name of its own: initializers, and constants wherever they are."""
    onnx, plain = library(), nn.Module()
    found: dict[str, Any] = {}
    for tensor in _messages(proto):
        if _kind(tensor) == "TensorProto" and tensor.data_type != onnx.TensorProto.STRING and math.prod(tensor.dims):
            name = key(tensor.name) or "constant"
            while name in found or hasattr(plain, name):
                name += "_"
            found[name] = tensor
    return found


def _form(tensor: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a tensor as it is held."""
    kind: str = library().TensorProto.DataType.Name(tensor.data_type)
    if kind in _HELD:
        return tuple(tensor.dims), _HELD[kind]
    bits = int(re.findall(r"\d+", kind)[0])  # INT4, UINT16, FLOAT8E4M3FN: the first number is that of its bits
    return (-(-math.prod(tensor.dims) * bits // 8),), torch.uint8


def _taken(tensor: Any) -> Tensor:
    """The numbers of a tensor, taken out of it; its shape and type stay."""
    helper = library().numpy_helper
    raw = tensor.raw_data or helper.from_array(helper.to_array(tensor)).raw_data
    shape, dtype = _form(tensor)
    kept = {field: getattr(tensor, field) for field in ("name", "data_type")} | {"dims": list(tensor.dims)}
    tensor.Clear()
    tensor.name, tensor.data_type = kept["name"], kept["data_type"]
    tensor.dims.extend(kept["dims"])
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _filled(tensor: Any, numbers: Tensor, name: str) -> None:
    shape, dtype = _form(tensor)
    if numbers.dtype != dtype or tuple(numbers.shape) != shape:
        raise BundleError(f"tensor {name!r} is {numbers.dtype} {tuple(numbers.shape)}, the graph says {dtype} {shape}")
    tensor.raw_data = numbers.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- from a file to a graph that scores rows -------------------------------------------------------------------------------


def _loaded(source: Path) -> Any:
    onnx = library()
    if not source.is_file():
        raise DataError("there is no such file" if not source.exists() else "a folder; name the .onnx file in it")
    try:
        proto = onnx.load(source, load_external_data=False)
    except Exception as error:
        raise DataError(f"not an ONNX file ({_reason(error)}); name one that was exported to ONNX") from error
    if not proto.graph.node:
        raise DataError(f"not an ONNX file, or an empty one ({source.stat().st_size} bytes, no node); export the model again")
    try:
        onnx.load_external_data_for_model(proto, str(source.parent))
    except Exception as error:
        raise DataError(f"its tensors lie in another file, which cannot be read; copy it along: {_reason(error)}") from error
    return proto


def _model(proto: Any, inputs: tuple[str, ...], output: str, logits: bool) -> Model:
    _known(proto)
    _trim(proto.graph, _score(proto.graph, output))
    frozen = _freed(proto.graph)
    if logits:
        _bare(proto.graph)
    whole = proto.SerializeToString()
    try:
        return _proven(proto, inputs)
    except ConfigError:
        again = _parsed(whole)
        if not frozen or not _unfrozen(again.graph, frozen):
            raise
    return _proven(again, inputs)


def _known(proto: Any) -> None:
    """Refuse operators of other domains, unless the file brings them as functions of standard ones."""
    ours = {(f.domain, f.name) for f in proto.functions}
    for node in (m for m in _messages(proto) if _kind(m) == "NodeProto"):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in ours:
            raise ConfigError(
                f"operator {node.op_type} of {node.domain!r} (node {node.name!r}) is not one of ONNX Runtime's, and libraries "
                "of custom operators are never loaded; export the model with standard operators"
            )


def _score(graph: Any, output: str) -> str:
    """The name of the output that is the score."""
    held = library().TensorProto
    floats = (held.FLOAT, held.DOUBLE, held.FLOAT16)
    found: dict[str, bool] = {o.name: o.type.tensor_type.elem_type in floats for o in graph.output}
    right = [name for name, fits in found.items() if fits and output in ("", name)]
    if len(right) == 1:
        return right[0]
    have = ", ".join(f"{name} ({'float' if fits else 'no floats'})" for name, fits in found.items()) or "none"
    if output:
        raise ConfigError(f"no float output is called {output!r}; outputs: {have}")
    raise ConfigError(f"{len(right)} outputs hold floats, and a model here has one, the score; name it with output=: {have}")


def _trim(graph: Any, score: str) -> None:
    """Keep the one output, and the nodes, tensors and inputs it comes from."""
    needed = {score}
    for at in reversed(range(len(graph.node))):  # nodes are in an order in which values are made before they are read
        if needed.isdisjoint(graph.node[at].output):
            del graph.node[at]
        else:
            needed.update(_reads(graph.node[at]))
    held = {t.name for t in graph.initializer}
    _drop(graph.output, lambda o: o.name != score)
    _drop(graph.initializer, lambda t: t.name not in needed)
    _drop(graph.input, lambda i: i.name not in needed or i.name in held)  # older files list tensors among the inputs


def _reads(node: Any) -> set[str]:
    """Values a node reads, those that its subgraphs read from outside included."""
    inner = list(_messages(node))
    names = {name for m in inner if _kind(m) == "NodeProto" for name in m.input}
    return names | {o.name for m in inner if _kind(m) == "GraphProto" for o in m.output}


def _drop(items: Any, unwanted: Callable[[Any], bool]) -> None:
    for at in reversed(range(len(items))):
        if unwanted(items[at]):
            del items[at]


def _freed(graph: Any) -> set[int]:
    """Set the batch dimension free; the sizes it was frozen at."""
    frozen = set()
    if not graph.input:
        raise ConfigError("the score depends on no input; name another with output=")
    for entry in graph.input:
        shape = entry.type.tensor_type.shape
        if not entry.type.tensor_type.HasField("shape"):
            raise ConfigError(f"input {entry.name!r} is of varying rank; export the model with fixed dimensions")
        if not shape.dim:
            raise ConfigError(f"input {entry.name!r} is a single number and has no batch dimension; make it a constant")
        frozen.add(shape.dim[0].dim_value)
        shape.dim[0].dim_param = "rows"
    for dim in graph.output[0].type.tensor_type.shape.dim[:1]:
        dim.dim_param = "rows"
    del graph.value_info[:]  # shapes in between, some of them frozen
    return frozen - {0}


def _unfrozen(graph: Any, frozen: set[int]) -> bool:
    """Reshape to as many rows as there are, where a frozen number is written into the graph; False where there is none."""
    helper = library().numpy_helper
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    held = {t.name: t for t in graph.initializer}
    held |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"}
    found = [tensor for name, tensor in held.items() if name in shapes and helper.to_array(tensor).reshape(-1)[0] in frozen]
    for tensor in found:
        numbers = helper.to_array(tensor).copy()
        numbers[0] = 0  # as long as the input's first dimension is
        tensor.CopyFrom(helper.from_array(numbers, tensor.name))
    return bool(found)


_SHAPING = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast")


def _bare(graph: Any) -> None:
    """Turn a last Sigmoid or Softmax into nothing, also where only the shape changes after it."""
    made = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in _reads(node))
    name = graph.output[0].name
    node = made.get(name)
    while node is not None and node.op_type in _SHAPING and uses[node.input[0]] == 1:
        node = made.get(node.input[0])
    if node is not None and node.op_type in ("Sigmoid", "Softmax"):
        node.op_type = "Identity"
        del node.attribute[:]


def _strip(proto: Any) -> None:
    """Give every node a name, and leave out what exporters note down (among it, paths of the machine they ran on)."""
    for message in _messages(proto):
        for field in {"doc_string", "metadata_props"}.intersection(message.DESCRIPTOR.fields_by_name):
            message.ClearField(field)
    taken = {node.name for node in proto.graph.node}
    for at, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{at}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)


def _proven(proto: Any, inputs: tuple[str, ...]) -> Model:
    """The model, if it scores rows: as many scores as rows, the same ones together and alone."""
    model = of(proto, inputs)
    module, generator = model.build(), torch.Generator().manual_seed(0)
    assert isinstance(module, Onnx)
    rows = [entry.probe(3, generator) for entry in module.ready()[1]]
    remedy = "export it with a free batch dimension (dynamic_shapes)"
    try:
        with torch.inference_mode():
            together = module(*rows)
            alone = [module(*(column[at : at + 1] for column in rows)) for at in range(3)]
    except DataError as error:
        raise ConfigError(f"it does not score any number of rows; {remedy}: {error}") from error
    if together.dim() not in (1, 2) or len(together) != 3 or any(a.shape != (1, *together.shape[1:]) for a in alone):
        raise ConfigError(f"3 rows give an output of {tuple(together.shape)}, not one score or list of scores a row; {remedy}")
    gap, scale = (torch.cat(alone) - together).abs().mean().item(), together.abs().mean().item()
    if gap > ROUNDING * scale + 1e-3:
        raise ConfigError(f"rows change by {gap:.3g} on average when scored together, where scores are {scale:.3g}; {remedy}")
    return model


def _unrunnable(error: Exception) -> NoReturn:
    version = importlib.import_module("onnxruntime").__version__
    newest = re.search(r"Opset (\d+) .* till opset (\d+)|IR version: (\d+).*IR version: (\d+)", str(error), re.DOTALL)
    if newest:
        asked, most = (g for g in newest.groups() if g is not None)
        kind = "opset" if newest[1] else "IR version"
        raise DeviceError(
            f"the graph uses {kind} {asked}, and ONNX Runtime {version} ends at {most}; export it with an older {kind}, or "
            "pip install --upgrade onnxruntime"
        ) from error
    raise ConfigError(
        f"ONNX Runtime {version} cannot run the graph: {_reason(error)}; export it with standard operators"
    ) from error


def _reason(error: Exception) -> str:
    """An error's first lines, without the runtime's own prefix."""
    said = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", said)[:300].rstrip(".")
