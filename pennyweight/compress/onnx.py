"""Fewer bits a weight inside an ONNX graph, by ONNX Runtime's own quantizer.

The graph stays a graph: a MatMul becomes the runtime's integer MatMul, a table is gathered as int4, and what has no smaller
form stays. ONNX Runtime's tool is used rather than our own packing, because its operators are what runs fast there. It wants
a graph that was tidied first (norms folded into convolutions, constants computed), which is done here too.

    fp16          weights stored as fp16 and widened when the session is made: half the bytes, the same time
    int8          weights int8 by output channel, activations to 8 bits as they come, with one range for all rows of a
                  call: a row's score depends a little on the rows it is scored with
    int8-static   activations in ranges that calibration rows had, all of the graph in 8 bits; wants ``env.calib``
    int4          weights of MatMul and rows of tables in blocks that share a scale; activations stay

What it costs: convolutions have no int4 (a plan may hold int4 and then int8 for what is left), int8 tables have one scale
for all their rows, and 8-bit products saturate on x86 processors without VNNI unless ``reduce_range`` takes one bit away.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch

from pennyweight.compress.rewrite import chosen, finite, which
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.onnx import FACTORY, Onnx, library, of
from pennyweight.model.spec import Model
from pennyweight.model.transform import Env, Transform

ROWS = 1024
"""Calibration rows at most."""
BATCH = 256
BLOCKS = (16, 32, 64, 128, 256)

Feed = dict[str, Any]
"""Arrays by the names of a graph's inputs."""
DataType = Literal["fp16", "int8", "int8-static", "int4"]

_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "fp16": ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "GRU", "RNN"),
    "int8": ("MatMul", "Conv", "Gather", "LSTM"),
    "int8-static": ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"),
    "int4": ("MatMul", "Gather"),
}
"""Operators whose weights get smaller."""


@named("quantize-onnx")
@dataclass(frozen=True)
class QuantizeOnnx(Transform):
    """The weights of an ONNX graph to a smaller data type; for models that ``pennyweight.model.onnx`` made."""

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    data_type: DataType = "int8"
    block: int = 32
    """Numbers that share a scale in int4: 16, 32, 64, 128 or 256."""
    reduce_range: bool = False
    """7 bits for int8 weights, so that products do not saturate on x86 processors without VNNI."""
    only: tuple[str, ...] = ()
    """Patterns of names of nodes to quantize; all that have weights if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of names of nodes to leave alone."""

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(f"block = {self.block}; a block of int4 holds {', '.join(map(str, BLOCKS))} numbers")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its graph quantized."""
        module, inputs = bundle.model.build(env.allow), bundle.model.spec.inputs
        if not isinstance(module, Onnx):
            kind = type(module).__name__
            raise PlanError(f"{kind} is no ONNX graph; quantize it with quantize-tables and quantize-dense")
        feeds = self._feeds(module, inputs, env)
        try:
            with _silent():
                model = of(self._quantized(module.proto(), feeds), inputs)
            cast(Onnx, model.build()).ready()
        except PlanError:
            raise
        except Exception as error:  # the library's own checks are of many classes
            reason = " ".join(str(error).split())[:240]
            raise PlanError(f"ONNX Runtime cannot quantize this graph as {self.data_type}: {reason}") from error
        before, after = bundle.model.bytes, model.bytes
        if after >= before:
            raise PlanError(f"the graph would not get smaller as {self.data_type}: {before:,} to {after:,} bytes")
        return bundle.replace(model=model)

    def describe(self) -> str:
        """What it does."""
        how = {"int8-static": "int8, activations in calibrated ranges", "int4": f"int4 in blocks of {self.block}"}
        return f"weights of the ONNX graph{which(self.only)} stored as {how.get(self.data_type, self.data_type)}"

    def _quantized(self, proto: Any, feeds: Sequence[Feed]) -> Any:
        """The graph with the chosen nodes quantized."""
        every = [n.name for n in proto.graph.node]
        if self.data_type != "fp16":
            proto = _tidied(proto, opset=21 if self.data_type == "int4" else 13, split=self.data_type in ("int8", "int4"))
        found = _weighty(proto.graph, self.data_type)
        for pattern in (*self.only, *self.skip):
            if not fnmatch.filter([*found, *every] if pattern in self.skip else found, pattern):
                raise PlanError(f"no node with weights matches {pattern!r}; there are: {', '.join(found) or 'none'}")
        nodes = [name for name in found if chosen(name, self.only, self.skip)]
        if not nodes:
            raise PlanError(f"no node has fp32 weights that {self.data_type} could hold; it is quantized already, or has none")
        limit = "fp16" if self.data_type == "fp16" else "fp32"  # scales of the others stay fp32
        for node in nodes:
            for tensor in found[node]:
                finite(node, torch.from_numpy(library().numpy_helper.to_array(tensor).copy()), limit)
        if self.data_type == "fp16":
            return _halved(proto, {t.name for name in nodes for t in found[name]})
        if self.data_type == "int4":
            return _blocks(proto, nodes, self.block)
        return self._int8(proto, nodes, feeds)

    def _int8(self, proto: Any, nodes: Sequence[str], feeds: Sequence[Feed]) -> Any:
        tool = importlib.import_module("onnxruntime.quantization")
        static = self.data_type == "int8-static"
        options: dict[str, Any] = {
            "per_channel": True,
            "reduce_range": self.reduce_range,
            "weight_type": tool.QuantType.QInt8,
            "nodes_to_exclude": [
                n.name for n in proto.graph.node if n.op_type in _OPERATORS[self.data_type] and n.name not in nodes
            ],
        }
        with tempfile.TemporaryDirectory(prefix="pennyweight-") as folder:
            file = str(Path(folder) / "int8.onnx")
            if static:
                tool.quantize_static(proto, file, _Reader(feeds), activation_type=tool.QuantType.QUInt8, **options)
            else:
                tool.quantize_dynamic(proto, file, op_types_to_quantize=[*_OPERATORS["int8"]], **options)
            return library().load(file)

    def _feeds(self, module: Onnx, inputs: Sequence[str], env: Env) -> list[Feed]:
        """Calibration rows as the graph takes them; none where no ranges are wanted."""
        if self.data_type != "int8-static":
            return []
        rows = cast(Dataset, env.need("calib", self)).head(ROWS).batches(BATCH)
        return [{e.name: e.fed(batch[c]) for e, c in zip(module.ready()[1], inputs, strict=True)} for batch in rows]


def types(model: Model, calib: bool) -> list[tuple[QuantizeOnnx, ...]]:
    """Plans of data types to try on an ONNX model, mild first; with ``calib``, calibrated ones too. None for another model."""
    if model.spec.factory != FACTORY:
        return []
    graph = cast(Onnx, model.build()).proto().graph
    names = _weighty(graph, "fp16")
    held = {n.op_type for n in graph.node if n.name in names}
    plans: list[tuple[QuantizeOnnx, ...]] = [(QuantizeOnnx("fp16"),), (QuantizeOnnx("int8"),)]
    plans += [(QuantizeOnnx("int8-static"),)] if calib else []
    packed, rest = bool(held & {"MatMul", "Gemm", "Gather"}), bool(held & {"Conv", "LSTM"})
    plans += [(QuantizeOnnx("int4"),)] if packed else []
    plans += [(QuantizeOnnx("int4"), QuantizeOnnx("int8"))] if packed and rest else []
    return plans if held else []


def nodes(model: Model) -> list[str]:
    """Names of the nodes of an ONNX model that hold weights; none of another model."""
    return [*_weighty(cast(Onnx, model.build()).proto().graph, "fp16")] if model.spec.factory == FACTORY else []


class _Reader:
    """Calibration rows as the quantizer asks for them: one batch a call, then None."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.left = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.left, None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The quantizer logs to the root logger, which would set a handler up for the whole program where there is none."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _tidied(proto: Any, opset: int, split: bool) -> Any:
    """The graph with constants computed and norms folded, in at least this opset; ``split`` makes a Gemm MatMul and Add."""
    tool = importlib.import_module("onnxruntime.quantization")
    standard = next((o for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if standard is not None and standard.version < opset:
        proto = library().version_converter.convert_version(proto, opset)
    with tempfile.TemporaryDirectory(prefix="pennyweight-") as folder:
        given, file = str(Path(folder) / "given.onnx"), str(Path(folder) / "tidy.onnx")
        library().save(proto, given)  # handed over in memory, it would lose its tensors on the way
        tool.quant_pre_process(given, file, skip_symbolic_shape=True)
        tidy = library().load(file)
    if split:
        importlib.import_module("onnxruntime.quantization.onnx_model").ONNXModel(tidy).replace_gemm_with_matmul()
        for node in tidy.graph.node:
            node.name = node.name.removesuffix("_MatMul")
    return tidy


def _weighty(graph: Any, data_type: DataType) -> dict[str, list[Any]]:
    """Nodes by name, with their fp32 weights, that this data type can hold."""
    held = {t.name: t for t in graph.initializer if t.data_type == library().TensorProto.FLOAT and len(t.dims) > 1}
    found = {n.name: [held[i] for i in n.input if i in held] for n in graph.node if n.op_type in _OPERATORS[data_type]}
    if data_type == "int4":
        tables = {n.name for n in graph.node if n.op_type == "Gather"}
        found = {name: [t for t in ts if _long(t, name in tables)] for name, ts in found.items()}
    return {name: tensors for name, tensors in found.items() if tensors}


def _long(tensor: Any, table: bool) -> bool:
    """Whether what shares a scale in int4, part of a table's row or of a matrix' column, pays for the scale."""
    return (len(tensor.dims) == 2 and tensor.dims[1] >= 8) if table else tensor.dims[-2] >= 8


def _halved(proto: Any, names: set[str]) -> Any:
    """Tensors stored as fp16 with a cast back behind each, which the runtime computes once."""
    casts = []
    for tensor in (t for t in proto.graph.initializer if t.name in names):
        name, half = tensor.name, library().numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(library().numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(
            library().helper.make_node("Cast", [f"{name}_fp16"], [name], f"{name}_widened", to=library().TensorProto.FLOAT)
        )
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*casts, *nodes])
    return proto


def _blocks(proto: Any, nodes: Sequence[str], block: int) -> Any:
    tool = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    kept = [n.name for n in proto.graph.node if n.name not in nodes]
    # Level 4 multiplies in int8, each row with a range of its own; the default widens the weights to fp32 at each call.
    made = tool.MatMulNBitsQuantizer(
        proto, 4, block, accuracy_level=4, nodes_to_exclude=kept, op_types_to_quantize=_OPERATORS["int4"]
    )
    made.process()
    return made.model.model
