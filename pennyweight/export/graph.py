"""What leaves: modules from tensors to tensors, and each captured once as a graph of PyTorch's own operations.

A bundle has one such module, its scores; one that retrieves has a second, from users and items to their vectors and the
scores of all pairs, so that a foreign runtime can pick candidates as well as rank them. Packed layers go in their compact
form (``model.compact``), so what is captured is as small as the bundle.

Capturing is ``torch.export``, twice. The first graph drags along every weight the module holds, those of a cascade's other
stage included, and the lines of the code it came from; copied node by node, only what the outputs need is left, inputs have
their columns' names, and the second capture makes of that a program with nothing of this machine in it. Capturing each
stage's submodule alone was the alternative, and needs to know every kind of model. It costs a second or two.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import keyword
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.accelerate.compile import unwarned
from pennyweight.accelerate.record import reads
from pennyweight.accelerate.runner import Runner
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.export.probe import Batch, batches, cuts, retrieval
from pennyweight.model.bundle import Bundle
from pennyweight.model.compact import Codes, Weight
from pennyweight.model.onnx import Onnx
from pennyweight.model.packed import Packed
from pennyweight.model.spec import call, replace
from pennyweight.model.trace import trace

Answer = tuple[Tensor, ...]
"""A tensor for each output."""
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")


@dataclasses.dataclass(frozen=True)
class Input:
    """An input as a foreign runtime sees it."""

    name: str
    column: str
    """The column of a batch it is."""
    dtype: str
    shape: tuple[str | int, ...]
    """A name where the size is free."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A module as a graph: Python code over tensors, and the program ``torch.export`` makes of it."""

    flat: fx.GraphModule
    program: torch.export.ExportedProgram


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """One module that leaves, and how to know that it arrived."""

    name: str
    """``model`` or ``retrieval``: what its files are called."""
    module: nn.Module
    """From one tensor an input to a tensor, or a tuple of them."""
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    probes: tuple[tuple[Tensor, ...], ...]
    """Inputs of several sizes; the last, the largest, is what is timed."""
    served: Callable[[int], Answer]
    """What the bundle itself answers to a probe."""
    bundle: Bundle
    onnx: Onnx | None = None
    """The module itself where it is an ONNX graph, which leaves as it is."""

    def answer(self, at: int) -> Answer:
        """What the compact form answers to a probe, in eager PyTorch."""
        with torch.inference_mode():
            return _tuple(self.compact(*self.probes[at]))

    @functools.cached_property
    def compact(self) -> nn.Module:
        """The module with its packed layers in their compact form."""
        return small(self.module)

    def capture(self, wide: bool = False) -> Captured:
        """The graph; ``wide`` has what OpenVINO cannot keep small in a wider form (``compact``'s ``widen``).

        Raises:
            DeviceError: it cannot be captured; the message names the line where that is known.
        """
        if self.onnx is not None:
            raise DeviceError("an ONNX model holds ONNX operations and no PyTorch ones; export it to onnx or openvino")
        found = self._capture(_widened(self.compact)) if wide else self._narrow
        if isinstance(found, DeviceError):
            raise found
        return found

    @functools.cached_property
    def _narrow(self) -> Captured | DeviceError:
        return self._capture(self.compact)

    def _capture(self, module: nn.Module) -> Captured | DeviceError:
        names = {d for i in self.inputs for d in i.shape if isinstance(d, str)}
        dims = {name: torch.export.Dim(name, min=1) for name in sorted(names)}
        free = tuple({at: dims[d] for at, d in enumerate(i.shape) if isinstance(d, str)} for i in self.inputs)
        try:
            with quiet():
                first = torch.export.export(module, self.probes[-1], dynamic_shapes=(free,))
                flat = _flat(first, [i.name for i in self.inputs])
                return Captured(flat, torch.export.export(flat, self.probes[-1], dynamic_shapes=free))
        except Exception as error:  # whatever the code of somebody else raises
            return DeviceError(reason(error, self._decided(module)))

    def _decided(self, module: nn.Module) -> str:
        """Where forward looks at how many rows there are, which an export that failed for it does not say."""
        probe = self.probes[-1]
        try:
            trace(copy.deepcopy(module), [t[:1] for t in probe], probe, [i.name for i in self.inputs])
        except ConfigError as error:
            return _spot(error.__cause__ or error)
        return ""


def graphs(bundle: Bundle, runner: Runner, data: Batch | None = None, seed: int = 0) -> tuple[Graph, ...]:
    """What of a bundle leaves: its scores and, where it retrieves from a catalogue, its retrieval.

    Raises:
        DataError: nothing says what a batch looks like.
    """
    asked = batches(bundle, runner.module, data, seed)
    scores = _scores(bundle, runner, asked)
    retrieves = all(hasattr(runner.module, m) for m in ("user_vectors", "item_vectors"))
    found = retrieval(bundle.catalog, seed) if bundle.catalog is not None and retrieves else None
    return (scores,) if found is None else (scores, _retrieval(bundle, runner, *found))


def _scores(bundle: Bundle, runner: Runner, asked: Sequence[Batch]) -> Graph:
    module, given = runner.module, bundle.model.spec.inputs
    columns = tuple(given) or reads(module, asked[-1])
    probes = tuple(tuple(b[c].contiguous() for c in columns) for b in asked)
    names = [identifier(c) for c in columns]
    onnx = module if isinstance(module, Onnx) else None
    if onnx is not None:
        entries = onnx.ready()[1]
        names = [e.name for e in entries]
        probes = tuple(tuple(torch.from_numpy(e.fed(t)) for e, t in zip(entries, p, strict=True)) for p in probes)
    inputs = tuple(_input(n, c, ("rows",), t) for n, c, t in zip(names, columns, probes[-1], strict=True))

    def served(at: int) -> Answer:
        return (torch.from_numpy(runner.score(asked[at])),)

    return Graph("model", _Scores(module, columns, given), inputs, ("scores",), probes, served, bundle, onnx)


def _retrieval(bundle: Bundle, runner: Runner, askers: Batch, offered: Batch) -> Graph:
    module: Any = runner.module
    sides = reads(module.user_vectors, askers), reads(module.item_vectors, offered)
    sizes = cuts(askers, offered)
    probes = tuple((*(askers[c][:u] for c in sides[0]), *(offered[c][:i] for c in sides[1])) for u, i in sizes)
    free = [("users",)] * len(sides[0]) + [("items",)] * len(sides[1])
    columns = (*sides[0], *sides[1])
    inputs = tuple(_input(identifier(c), c, d, t) for c, d, t in zip(columns, free, probes[-1], strict=True))

    def served(at: int) -> Answer:
        users, items = sizes[at]
        of = runner.user_vectors({n: t[:users] for n, t in askers.items()})
        by = runner.item_vectors({n: t[:items] for n, t in offered.items()})
        return tuple(torch.from_numpy(a) for a in (of @ by.T, of, by))

    wrapped = _Retrieval(module, *sides)
    return Graph("retrieval", wrapped, inputs, ("scores", "user_vectors", "item_vectors"), probes, served, bundle)


class _Scores(nn.Module):
    """A module with its columns as positional arguments, which is all an exporter understands."""

    def __init__(self, module: nn.Module, columns: Sequence[str], inputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.columns, self.inputs = module, tuple(columns), tuple(inputs)
        self.eval()

    def forward(self, *columns: Tensor) -> Tensor:
        return call(self.module, dict(zip(self.columns, columns, strict=True)), self.inputs)


class _Retrieval(nn.Module):
    """Scores [users, items], vectors of the users and vectors of the items, from the columns of both."""

    def __init__(self, module: Any, users: Sequence[str], items: Sequence[str]) -> None:
        super().__init__()
        self.module, self.users, self.items = module, tuple(users), tuple(items)
        self.eval()

    def forward(self, *columns: Tensor) -> Answer:
        cut = len(self.users)
        users: Tensor = self.module.user_vectors(dict(zip(self.users, columns[:cut], strict=True)))
        items: Tensor = self.module.item_vectors(dict(zip(self.items, columns[cut:], strict=True)))
        return users @ items.T, users, items


def small(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its weights, each packed layer in its compact form."""
    out = copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})
    made: dict[int, nn.Module] = {}
    for path, layer in list(out.named_modules(remove_duplicate=False)):
        if isinstance(layer, Packed) and not isinstance(layer, Onnx):
            replace(out, path, made.setdefault(id(layer), layer.small()))
    return out.requires_grad_(False).eval()


def _widened(module: nn.Module) -> nn.Module:
    out = copy.deepcopy(module)
    for layer in out.modules():
        if isinstance(layer, (Codes, Weight)):
            layer.widen()
    return out


def _flat(program: torch.export.ExportedProgram, names: Sequence[str]) -> fx.GraphModule:
    """The program as one flat graph that holds the weights it uses and takes inputs of these names."""
    whole = program.module(check_guards=False)
    assert isinstance(whole, fx.GraphModule)
    graph = fx.Graph()
    given = [node for node in whole.graph.nodes if node.op == "placeholder"]
    held = {node: graph.placeholder(name) for node, name in zip(given, names, strict=True)}
    output: Any = graph.graph_copy(whole.graph, held)
    graph.output(output[0] if len(output) == 1 else tuple(output))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # a cast's belief about its input: noise on a page
    graph.eliminate_dead_code()
    return fx.GraphModule(whole, graph)


def identifier(column: str) -> str:
    """A column's name as Python takes it for an argument."""
    name = re.sub(r"\W", "_", column)
    return f"_{name}" if keyword.iskeyword(name) or not name or name[0].isdigit() else name


def _input(name: str, column: str, free: tuple[str, ...], example: Tensor) -> Input:
    return Input(name, column, str(example.dtype).removeprefix("torch."), (*free, *example.shape[1:]))


def _tuple(output: Tensor | Answer) -> Answer:
    return output if isinstance(output, tuple) else (output,)


def reason(error: Exception, decided: str = "") -> str:
    """What went wrong in one line, with the line of the user's code that was running, or else that ``decided``."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, DeviceError):
        return str(error)
    said, spot = " ".join(str(error).split()), _spot(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return f"what forward does depends on the numbers it is given{spot}; write that with torch.where"
    if "specialized it to be a constant" in said or "satisfy the generated guard" in said:
        decided = spot or decided
        return f"what forward does depends on the number of rows{decided}; write it for any, with x.shape[0] for len(x)"
    return f"{type(error).__name__}{spot}: {said[:240]}"


def _spot(error: BaseException) -> str:
    """The innermost line that is neither PyTorch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters log, and warn of their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with unwarned():
            yield
    finally:
        logging.disable(before)
