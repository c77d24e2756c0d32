"""Engines as one choice: the same module run by eager PyTorch, its fused form, ``torch.compile``, ONNX Runtime or OpenVINO.

Inductor's kernels are compiled while the module runs (``compile``) or ahead of time into a package (``aot``).

An engine is a way to call, not a model: it takes a module and gives a function from a batch to logits. What is fastest
depends on the shape (ONNX Runtime saves the overhead between small operators, a fused form multiplies large batches
faster), so ``tune`` measures; nothing here prefers one.

Every engine is checked when it is made: its outputs on a probe batch, and on the probe's first row alone, must equal those
of eager. The second size is what catches a graph that froze the number of candidates. An engine that cannot run a model
raises DeviceError with the reason; who asked decides whether to fall back, and says so.

Quantized layers use operators that exporters do not know; each offers ``plain()``, a module of ordinary operators with the
same weights, and the graph is made from those. This costs memory (fp32 weights beside the packed ones) and changes
rounding: a dynamically quantized layer rounds its inputs, its plain form does not. ONNX has that rounding as operators
(DynamicQuantizeLinear, MatMulInteger), over the same range of the batch, so large int8 layers stay int8 in ONNX Runtime.
Quality is measured through the Runner, so it is that of the engine that serves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.accelerate.fuse import direct, fused, lookups
from pennyweight.accelerate.record import Columns, beside, grouped, light, reads
from pennyweight.core import hardware
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.bundle import Runtime
from pennyweight.model.dense import PackedLinear, narrow
from pennyweight.model.onnx import session
from pennyweight.model.spec import Batch, call, replace

Scorer = Callable[[Batch], Tensor]
"""A batch to its logits, [B] or [B, classes]."""

Maker = Callable[[nn.Module, Runtime, Batch, Sequence[str]], Scorer]

EXACT = 1e-3
"""Largest difference from the module that was exported or compiled, absolute and relative: reordered fp32 sums."""
LEVELS = 0.01
"""Largest mean difference, as a share of the mean logit, between two ways to multiply the same rounded numbers."""
ROUNDING = 0.1
"""Largest mean difference, as a share of the mean logit, between a quantized module and its plain form."""


def make(module: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str] = ()) -> Scorer:
    """A function that scores batches of any size with the engine ``runtime`` names.

    Threads are the caller's to set, except for ONNX Runtime and OpenVINO, which have their own. ``probe`` is a batch of
    the kind to come.

    Raises:
        DeviceError: the engine is not installed, cannot run this module, or gave other outputs than eager.
    """
    if runtime.engine == "onnxruntime":
        return export(module, probe, inputs).scorer(runtime.threads)
    if runtime.engine == "openvino":
        return openvino(module, probe, inputs, runtime.threads)
    if runtime.engine == "eager":
        return eager(module, inputs)
    return {"fused": fuse, "compile": compiled, "aot": packaged}[runtime.engine](module, probe, inputs)


def eager(module: nn.Module, inputs: Sequence[str] = ()) -> Scorer:
    """The module as it is, operator by operator."""
    return lambda batch: call(module, batch, inputs)


def compiled(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Scorer:
    """The module through ``torch.compile``: kernels built by the C++ compiler, tens of seconds for a new shape.

    Raises:
        DeviceError: there is no compiler, the module cannot be captured as one graph, or outputs differ from eager.
    """
    if not hardware.compiler():
        raise DeviceError("engine 'compile' needs a C++ compiler and none was found; apt install g++, or use another engine")
    names, ordinary = reads(module, probe, inputs), plain(module)
    columns = Columns(ordinary, {n: (n,) for n in names}, inputs)
    # Isolated, or the fifth model of a process would hit the limit of recompilations that all of them share.
    fast = torch.compile(columns, dynamic=True, fullgraph=True, isolate_recompiles=True)  # type: ignore[call-overload]

    def score(batch: Batch) -> Tensor:
        output: Tensor = fast(*(batch[n] for n in names))
        return output

    with _failing("compile"):
        _check("compile", score, ordinary, probe, inputs)
    _same_model("compile", module, ordinary, probe, inputs)
    return score


def fuse(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Scorer:
    """The module with its operations joined (``accelerate.fuse``): no compiler, no package, a second.

    Raises:
        DeviceError: the module cannot be recorded, or outputs differ from eager.
    """
    with _failing("fused"):
        score = fused(module, probe, inputs)
        rounded = any(isinstance(m, PackedLinear) and m.whole for m in module.modules())
        _check("fused", score, module, probe, inputs, rounded=rounded)
    return score


def packaged(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Scorer:
    """The module as a package of native code that Inductor compiled ahead of time, kept on the machine it was made on.

    Packages lie in the user's cache under a digest of machine, PyTorch's version, graph and weights, so a bundle that starts
    again compiles nothing, and one that moves compiles anew.

    Raises:
        DeviceError: there is no compiler, the module cannot be exported, or outputs differ from eager.
    """
    if not hardware.compiler():
        raise DeviceError("engine 'aot' needs a C++ compiler and none was found; apt install g++, or use another engine")
    names, ordinary = reads(module, probe, inputs), plain(module)
    given = {n: (n,) for n in names} if inputs else grouped(probe, names)
    with _failing("aot"):
        running = _package(Columns(ordinary, given, inputs), probe, given)

        def score(batch: Batch) -> Tensor:
            output: Tensor = running(*(beside(batch, columns) for columns in given.values()))
            return output

        _check("aot", score, ordinary, probe, inputs)
    _same_model("aot", module, ordinary, probe, inputs)
    return score


def _package(columns: nn.Module, probe: Batch, given: Mapping[str, tuple[str, ...]]) -> Any:
    program = torch.export.export(columns, _arguments(probe, given), dynamic_shapes=_free(given))
    path = cached(program)
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/{path.name}")
            os.replace(made, path)
    return torch._inductor.aoti_load_package(str(path))


def cached(program: torch.export.ExportedProgram) -> Path:
    """Where the package of a program is kept: its name is a digest of machine, graph and weights."""
    digest = hashlib.sha256(hardware.fingerprint().encode())
    digest.update(str(program.graph).encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "pennyweight" / f"{digest.hexdigest()[:32]}.pt2"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model as an ONNX graph in memory: exported once, opened with as many threads as wanted."""

    graph: bytes
    inputs: Mapping[str, tuple[str, ...]]
    """The graph's inputs and the columns each takes: one as it is, several side by side."""
    found: Callable[[Batch], Sequence[Tensor]] | None = None
    """Rows of packed tables, looked up before and handed in as ``found_0`` ...; None where the graph holds all tables."""

    def scorer(self, threads: int = 0) -> Scorer:
        """A session of ONNX Runtime on the CPU; 0 threads is one for every core."""
        running, found = session(self.graph, threads), self.found
        outputs = [o.name for o in running.get_outputs()]

        def score(batch: Batch) -> Tensor:
            given = {name: beside(batch, columns).numpy() for name, columns in self.inputs.items()}
            if found is not None:
                for at, rows in enumerate(found(batch)):
                    given[f"found_{at}"] = rows.numpy()
            return torch.from_numpy(running.run(outputs, given)[0])

        return score


def openvino(module: nn.Module, probe: Batch, inputs: Sequence[str] = (), threads: int = 0) -> Scorer:
    """The module's ONNX graph run by OpenVINO on the CPU, in fp32; 0 threads is its own default.

    Raises:
        DeviceError: a package is missing, the module cannot be exported, or outputs differ from eager.
    """
    if importlib.util.find_spec("openvino") is None:
        raise DeviceError("engine 'openvino' needs openvino: pip install openvino onnx onnxscript")
    exported = export(module, probe, inputs, rounded=False, packed=False)
    with _failing("openvino"):
        core = importlib.import_module("openvino").Core()
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        running = core.compile_model(core.read_model(exported.graph), "CPU", settings).create_infer_request()

        def score(batch: Batch) -> Tensor:
            given = {name: beside(batch, columns).contiguous().numpy() for name, columns in exported.inputs.items()}
            return torch.from_numpy(running.infer(given, share_inputs=True)[0].copy())

        _check("openvino", score, plain(module), probe, inputs)
    return score


def export(
    module: nn.Module, probe: Batch, inputs: Sequence[str] = (), *, rounded: bool = True, packed: bool = True
) -> Exported:
    """The module as an ONNX graph with a free batch dimension, checked against eager.

    ``rounded`` keeps large int8 layers int8, their inputs rounded over the range of the batch as eager rounds them; ``packed``
    looks large packed tables up before, by FBGEMM, where they stay packed. Without them the graph is whole, and in fp32.

    Raises:
        DeviceError: a package is missing, the module cannot be exported, or outputs differ from eager.
    """
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        raise DeviceError(f"engine 'onnxruntime' needs {', '.join(missing)}: pip install onnxruntime onnx onnxscript")
    if any(t.device.type != "cpu" for t in probe.values()):
        raise DeviceError("engine 'onnxruntime' runs on the CPU, and the model is placed on a GPU; use 'eager' or 'compile'")
    rounded = rounded and any(_multiplied(m) for m in module.modules())
    names, ordinary = reads(module, probe, inputs), plain(module)
    given = {n: (n,) for n in names} if inputs else grouped(probe, names)
    with _failing("onnxruntime"):
        exported = _apart(module, probe, inputs) if packed else None
        if exported is None:
            whole = _whole(module) if rounded else ordinary
            exported = Exported(_graph(Columns(_fused(whole), given, inputs), probe, given), given)
        _check("onnxruntime", exported.scorer(1), module if rounded else ordinary, probe, inputs, rounded=rounded)
    _same_model("onnxruntime", module, ordinary, probe, inputs)
    return exported


def _apart(module: nn.Module, probe: Batch, inputs: Sequence[str]) -> Exported | None:
    """The graph behind large packed tables; None where there are none, or the model cannot be taken apart."""
    try:
        parts = lookups(module, probe, inputs)
    except ConfigError:
        return None
    if parts is None:
        return None
    before, rest, names = parts
    rows = {n: t if len(t) > 1 else t.expand(2, *t.shape[1:]) for n, t in probe.items()}
    with torch.no_grad():
        found = {f"found_{at}": t for at, t in enumerate(before(rows))}
    given = {n: before.named[n] for n in names}
    tensors = {n: beside(rows, columns) for n, columns in given.items()} | found
    graph = _graph(_whole(_Positional(rest)), tensors, {n: (n,) for n in tensors})
    return Exported(graph, given, direct(before))


class _Positional(nn.Module):
    """A graph behind a forward of any number of tensors, as all that is exported here has."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, *tensors: Tensor) -> Tensor:
        """The graph's output."""
        output: Tensor = self.inner(*tensors)
        return output


def _multiplied(module: nn.Module) -> bool:
    """Whether a dense layer is multiplied in int8 here and can be there."""
    return isinstance(module, PackedLinear) and module.whole and not narrow() and not isinstance(module.ready(), Tensor)


def _whole(module: nn.Module) -> nn.Module:
    """The plain form, except that large int8 layers are ONNX' operators for it."""
    kept = light(module)
    for path, child in list(kept.named_modules()):
        if isinstance(child, PackedLinear) and _multiplied(child):
            replace(kept, path, _Integer(child))
    return plain(kept)


class _Integer(nn.Module):
    """An int8 dense layer in ONNX' operators; ONNX Runtime joins them to one. It can be exported, not called."""

    levels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, dense: PackedLinear) -> None:
        super().__init__()
        self.register_buffer("levels", dense.levels().t().contiguous())
        self.register_buffer("scale", dense.scale)
        self.register_buffer("bias", dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """fp32 [B, outputs]."""
        ops, shape = torch.onnx.ops, [*x.shape[:-1], self.levels.shape[1]]
        kinds = [torch.uint8, torch.float32, torch.uint8]
        rounded, scale, zero = ops.symbolic_multi_out("DynamicQuantizeLinear", [x], dtypes=kinds, shapes=[x.shape, [], []])
        whole = ops.symbolic("MatMulInteger", [rounded, self.levels, zero], dtype=torch.int32, shape=shape)
        output = whole.float() * (scale * self.scale)
        return output if self.bias is None else output + self.bias


def _graph(columns: nn.Module, probe: Batch, inputs: Mapping[str, tuple[str, ...]]) -> bytes:
    program = torch.onnx.export(
        columns,
        _arguments(probe, inputs),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=_free(inputs),
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "the exporter returns a program unless it is given a file"
    graph: bytes = program.model_proto.SerializeToString()
    return graph


def _arguments(probe: Batch, inputs: Mapping[str, tuple[str, ...]]) -> tuple[Tensor, ...]:
    rows = {n: t if len(t) > 1 else t.expand(2, *t.shape[1:]) for n, t in probe.items()}  # one row would be frozen as 1
    return tuple(beside(rows, columns) for columns in inputs.values())


def _free(inputs: Mapping[str, tuple[str, ...]]) -> tuple[tuple[dict[int, Any], ...]]:
    free = torch.export.Dim("rows", min=1)
    return (tuple({0: free} for _ in inputs),)


def plain(module: nn.Module) -> nn.Module:
    """The module with every layer that offers ``plain()`` put in that form; other layers share their weights with it."""
    shared: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    out = copy.deepcopy(module, shared)
    special = [path for path, layer in out.named_modules() if hasattr(layer, "plain")]
    if special == [""]:
        return out.plain().eval()  # type: ignore[operator, no-any-return]
    for path in special:
        replace(out, path, out.get_submodule(path).plain())  # type: ignore[operator]
    return out.eval()


def _fused(module: nn.Module) -> nn.Module:
    """The module with every group of lookups that offers ``fused()`` in that form: one table, one operation."""
    found = {path: layer for path, layer in module.named_modules() if hasattr(layer, "fused")}
    for path, layer in found.items():
        replace(module, path, layer.fused())
    return module


def _check(
    engine: str, score: Scorer, module: nn.Module, probe: Batch, inputs: Sequence[str], *, rounded: bool = False
) -> None:
    """Outputs on the probe and on its first row; of rounded layers the mean may be off, as a last bit turns a level."""
    for batch in (probe, {n: t[:1] for n, t in probe.items()}):
        with torch.inference_mode():
            want, got = call(module, batch, inputs), score(batch)
        same = want.shape == got.shape
        if same and rounded:
            same = bool((got - want).abs().mean() <= LEVELS * want.abs().mean() + EXACT)
        elif same:
            same = torch.allclose(got, want, EXACT, EXACT, equal_nan=True)
        if not same:
            gap = (got - want).abs().max().item() if want.shape == got.shape else float("nan")
            allowed = LEVELS if rounded else EXACT
            raise DeviceError(
                f"engine {engine!r} gives other outputs than eager: {tuple(got.shape)} against {tuple(want.shape)} for "
                f"{len(want)} rows, largest difference {gap:.3g} where {allowed:g} is allowed; use another engine"
            )


def _same_model(engine: str, module: nn.Module, ordinary: nn.Module, probe: Batch, inputs: Sequence[str]) -> None:
    with torch.inference_mode():
        want, got = call(module, probe, inputs), call(ordinary, probe, inputs)
    gap, size = (got - want).abs().mean().item(), want.abs().mean().item()
    if not gap <= ROUNDING * size + EXACT:
        raise DeviceError(
            f"engine {engine!r}: the plain form of the model differs by {gap:.3g} on average, where its logits are "
            f"{size:.3g} and {ROUNDING:.0%} of that is allowed; use engine 'eager'"
        )


@contextlib.contextmanager
def _failing(engine: str) -> Iterator[None]:
    """Any failure of an engine's own machinery as a DeviceError that keeps the first lines of the reason."""
    try:
        with _quiet():
            yield
    except DeviceError:
        raise
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:240]
        raise DeviceError(f"engine {engine!r} cannot run this model: {type(error).__name__}: {reason}") from error


NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*The axis name: .* will not be used.*",
    r".*`torch\.jit\.script_method` is deprecated.*",
)
"""Warnings of the exporters about their own code; anything else is shown."""


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without the exporters' warnings of their own code."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    chatter = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with unwarned():
            yield
    finally:
        chatter.setLevel(level)
