"""A model's forward as operations over whole layers: what rewriting it for speed starts from.

``model.trace`` records one node an operation; here, beside the layers of ``torch.nn``, those that Pennyweight makes stay whole
too (a packed table is one node, whatever its operator), so that a rewrite sees tables, dense layers and what is between them.
Columns enter by position. The recorded module shares its weights with the one it was recorded from; only the parts that a
rewrite replaces are new.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import ConfigError
from pennyweight.model.dense import Dense
from pennyweight.model.hashed import SharedTable
from pennyweight.model.layers import Beside, Interaction
from pennyweight.model.packed import Packed
from pennyweight.model.residual import ResidualTable
from pennyweight.model.spec import Batch, call
from pennyweight.model.trace import Tracer, tensor_at, trace

WHOLE = (Packed, SharedTable, ResidualTable, Interaction)
"""Modules of ours that stay one node."""


class Columns(nn.Module):
    """A module with its columns as positional arguments, each one column or several of one type side by side."""

    def __init__(self, module: nn.Module, given: Mapping[str, tuple[str, ...]], inputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.given, self.inputs = module, tuple(given.values()), tuple(inputs)
        self.eval()

    def forward(self, *columns: Tensor) -> Tensor:
        """Logits [B] or [B, classes]."""
        return call(self.module, Beside(self.given, columns), self.inputs)


def grouped(probe: Batch, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of one number a row side by side, by type: to ONNX Runtime each input costs 2 µs a call, whatever is in it."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(str(probe[name].dtype).removeprefix("torch.") if probe[name].dim() == 1 else name, []).append(name)
    return {kind if len(columns) > 1 else columns[0]: tuple(columns) for kind, columns in kinds.items()}


def beside(batch: Batch, columns: Sequence[str]) -> Tensor:
    """One column as it is, several side by side; where they lie so already, as they are."""
    if len(columns) == 1:
        return batch[columns[0]]
    ready = batch.whole.get(tuple(columns)) if isinstance(batch, Beside) else None
    return torch.stack([batch[n] for n in columns], 1) if ready is None else ready


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


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A forward: its nodes over the layers of ``root``; placeholders are the columns ``names``, in order."""

    root: nn.Module
    graph: fx.Graph
    names: tuple[str, ...]


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch.nn and ours stay whole."""
        return isinstance(m, WHOLE) or super().is_leaf_module(m, module_qualified_name)


def record(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Recorded:
    """The forward of a module in evaluation, for batches of any size like ``probe`` (two rows or more).

    Raises:
        ConfigError: it cannot be recorded (see ``model.trace``), or has a node that is no tensor operation.
    """
    names = reads(module, probe, inputs)
    rows = {n: t if len(t) > 1 else t.expand(2, *t.shape[1:]) for n, t in probe.items()}
    many = [rows[n].contiguous() for n in names]
    columns = Columns(light(module), {n: (n,) for n in names}, inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx's about attributes of constants
        tracer = trace(columns, [t[:1] for t in many], many, [f"column_{at}" for at in range(len(names))], _Tracer)
    graph = tracer.graph
    _folded(tracer.root, graph)
    return Recorded(tracer.root, graph, names)


def light(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors, so that parts can be replaced at no cost."""
    shared: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared).eval()


def _folded(root: nn.Module, graph: fx.Graph) -> None:
    """Fold each batch norm into the fp32 dense layer before it: the same numbers up to rounding."""
    for node in list(graph.nodes):
        norm = layer(root, node)
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm1d) or not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        dense = layer(root, before)
        if type(dense) is nn.Linear and norm.running_mean is not None and dense.weight.dtype == torch.float32:
            root.add_module(name := free(root, "folded"), _affine(dense, norm))
            before.target = name
            node.replace_all_uses_with(before)
            graph.erase_node(node)


def _affine(dense: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = torch.rsqrt(norm.running_var + norm.eps)
    gain, shift = (gain, torch.zeros_like(gain)) if norm.weight is None else (gain * norm.weight, norm.bias)
    bias = torch.zeros_like(gain) if dense.bias is None else dense.bias
    return linear(dense.weight * gain.unsqueeze(1), (bias - norm.running_mean) * gain + shift)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A dense layer with these numbers."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None)  # type: ignore[no-untyped-call]
    state = {"weight": weight.detach(), **({} if bias is None else {"bias": bias.detach()})}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


def layer(root: nn.Module, node: Any) -> nn.Module | None:
    """The module a node calls; None where it calls none."""
    return root.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def dense(module: nn.Module | None) -> Dense | None:
    """What dense layer a module is, if it is one."""
    return None if module is None else Dense.of(module)


def free(root: nn.Module, name: str) -> str:
    """A name that no child of ``root`` has yet."""
    at = 0
    while hasattr(root, f"{name}_{at}"):
        at += 1
    return f"{name}_{at}"


def held(root: nn.Module, node: fx.Node) -> Tensor:
    """The tensor a node reads from the module."""
    found = tensor_at(root, str(node.target))
    if not isinstance(found, Tensor):
        raise ConfigError(f"{node.target} is no tensor")
    return found.detach()


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger's messages below errors are left out for a while."""
    chatter = logging.getLogger(name)
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatter.setLevel(level)
