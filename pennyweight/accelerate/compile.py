"""Engines as one choice: the same module run by eager PyTorch, by ``torch.compile`` or by ONNX Runtime.

An engine is a way to call, not a model: it takes a module and gives a function from a batch to logits, with no file left
behind. What is fastest depends on the shape (ONNX Runtime saves the overhead between small operators, and gains nothing on
a large matrix product), so ``tune`` measures; nothing here prefers one.

Every engine is checked when it is made: its outputs on a probe batch, and on the probe's first row alone, must equal those
of eager. The second size is what catches a graph that froze the number of candidates. An engine that cannot run a model
raises DeviceError with the reason; who asked decides whether to fall back, and says so.

Quantized layers use operators that exporters do not know; each offers ``plain()``, a module of ordinary operators with the
same weights, and the graph is made from those. This costs memory (fp32 weights beside the packed ones) and changes
rounding: a dynamically quantized layer rounds its inputs, its plain form does not. Quality is measured through the Runner, so
it is that of the engine that serves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core import hardware
from pennyweight.core.errors import DeviceError
from pennyweight.model.bundle import Runtime
from pennyweight.model.layers import Beside
from pennyweight.model.onnx import session
from pennyweight.model.spec import Batch, call, replace

Scorer = Callable[[Batch], Tensor]
"""A batch to its logits, [B] or [B, classes]."""

Maker = Callable[[nn.Module, Runtime, Batch, Sequence[str]], Scorer]

EXACT = 1e-3
"""Largest difference from the module that was exported or compiled, absolute and relative: reordered fp32 sums."""
ROUNDING = 0.1
"""Largest mean difference, as a share of the mean logit, between a quantized module and its plain form."""


def make(module: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str] = ()) -> Scorer:
    """A function that scores batches of any size with the engine ``runtime`` names.

    Threads are the caller's to set, except for ONNX Runtime, which has its own. ``probe`` is a batch of the kind to come.

    Raises:
        DeviceError: the engine is not installed, cannot run this module, or gave other outputs than eager.
    """
    if runtime.engine == "eager":
        return eager(module, inputs)
    if runtime.engine == "compile":
        return compiled(module, probe, inputs)
    return export(module, probe, inputs).scorer(runtime.threads)


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
    columns = _Columns(ordinary, {n: (n,) for n in names}, inputs)
    # Isolated, or the fifth model of a process would hit the limit of recompilations that all of them share.
    fast = torch.compile(columns, dynamic=True, fullgraph=True, isolate_recompiles=True)  # type: ignore[call-overload]

    def score(batch: Batch) -> Tensor:
        output: Tensor = fast(*(batch[n] for n in names))
        return output

    with _failing("compile"):
        _check("compile", score, ordinary, probe, inputs)
    _same_model("compile", module, ordinary, probe, inputs)
    return score


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model as an ONNX graph in memory: exported once, opened with as many threads as wanted."""

    graph: bytes
    inputs: Mapping[str, tuple[str, ...]]
    """The graph's inputs and the columns each takes: one as it is, several side by side."""

    def scorer(self, threads: int = 0) -> Scorer:
        """A session of ONNX Runtime on the CPU; 0 threads is one for every core."""
        running = session(self.graph, threads)

        def score(batch: Batch) -> Tensor:
            (output,) = running.run(None, {name: _beside(batch, columns).numpy() for name, columns in self.inputs.items()})
            return torch.from_numpy(output)

        return score


def export(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Exported:
    """The module as an ONNX graph with a free batch dimension, checked against eager.

    Raises:
        DeviceError: a package is missing, the module cannot be exported, or outputs differ from eager.
    """
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        raise DeviceError(f"engine 'onnxruntime' needs {', '.join(missing)}: pip install onnxruntime onnx onnxscript")
    if any(t.device.type != "cpu" for t in probe.values()):
        raise DeviceError("engine 'onnxruntime' runs on the CPU, and the model is placed on a GPU; use 'eager' or 'compile'")
    names, ordinary = reads(module, probe, inputs), plain(module)
    given = {n: (n,) for n in names} if inputs else _grouped(probe, names)
    with _failing("onnxruntime"):
        exported = Exported(_graph(_Columns(_fused(ordinary), given, inputs), probe, given), given)
        score = exported.scorer(1)
        _check("onnxruntime", score, ordinary, probe, inputs)
    _same_model("onnxruntime", module, ordinary, probe, inputs)
    return exported


def _grouped(probe: Batch, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of one number a row side by side, by type: to ONNX Runtime each input costs 2 µs a call, whatever is in it."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(str(probe[name].dtype).removeprefix("torch.") if probe[name].dim() == 1 else name, []).append(name)
    return {kind if len(columns) > 1 else columns[0]: tuple(columns) for kind, columns in kinds.items()}


def _beside(batch: Batch, columns: Sequence[str]) -> Tensor:
    return batch[columns[0]] if len(columns) == 1 else torch.stack([batch[n] for n in columns], 1)


def _graph(columns: nn.Module, probe: Batch, inputs: Mapping[str, tuple[str, ...]]) -> bytes:
    rows = {n: t if len(t) > 1 else t.expand(2, *t.shape[1:]) for n, t in probe.items()}  # one row would be frozen as 1
    free = torch.export.Dim("rows", min=1)
    program = torch.onnx.export(
        columns,
        tuple(_beside(rows, given) for given in inputs.values()),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=(tuple({0: free} for _ in inputs),),
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "the exporter returns a program unless it is given a file"
    graph: bytes = program.model_proto.SerializeToString()
    return graph


class _Columns(nn.Module):
    """The module with its columns as positional arguments, which is all an exporter understands."""

    def __init__(self, module: nn.Module, given: Mapping[str, tuple[str, ...]], inputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.given, self.inputs = module, tuple(given.values()), tuple(inputs)
        self.eval()

    def forward(self, *columns: Tensor) -> Tensor:
        return call(self.module, Beside(self.given, columns), self.inputs)


def reads(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of a batch that the module looks at, in the batch's order; found by running it once."""
    watched = _Watched(probe)
    with torch.inference_mode():
        call(module, watched, inputs)
    return tuple(n for n in probe if n in watched.seen)


class _Watched(Mapping[str, Tensor]):
    def __init__(self, batch: Batch) -> None:
        self.batch, self.seen = batch, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        value = self.batch[name]
        self.seen.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


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


def _check(engine: str, score: Scorer, module: nn.Module, probe: Batch, inputs: Sequence[str]) -> None:
    for batch in (probe, {n: t[:1] for n, t in probe.items()}):
        with torch.inference_mode():
            want, got = call(module, batch, inputs), score(batch)
        if want.shape != got.shape or not torch.allclose(got, want, EXACT, EXACT, equal_nan=True):
            gap = (got - want).abs().max().item() if want.shape == got.shape else float("nan")
            raise DeviceError(
                f"engine {engine!r} gives other outputs than eager: {tuple(got.shape)} against {tuple(want.shape)} for "
                f"{len(want)} rows, largest difference {gap:.3g} where {EXACT:g} is allowed; use another engine"
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
