"""Which outputs of layers can only go together, in a network of any shape.

Every output of a dense layer or convolution gets a label of its own. The network is run once, and beside each tensor goes one
of the same shape that says which output each of its numbers came from. What moves numbers (flatten, permute, cat) is run on
the labels as it is on the numbers; what treats each number alone keeps them, and ties the labels of what it joins (a residual
sum); pools and means keep a label that is the same all over what they join. A layer that reads then knows whose output each
of its inputs is, be it one of 49 behind a flatten or the third part of a cat. Everything else (a softmax, attention, the
output of the model, an operation not listed here) pins the labels it sees: those outputs stay. So does a ``view`` whose sizes
are written out, which narrower layers would break.

Torch-Pruning is the known library, and was tried (1.6.1): it takes an operation it does not know for one that treats each
number alone, and cut neurons under a softmax without a word; behind ``x.view(-1, 288)`` it left a network that cannot run; and
of a dense layer over time followed by a flatten it took away the wrong inputs. It also cuts by itself, where what remains is
solved anew here. This costs a list of operations to keep, and what is missing on it is not cut.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense, Norm
from pennyweight.model.layers import Dropout

Ids = npt.NDArray[np.int64]

POINTWISE_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Dropout, Dropout, nn.Identity),
)
"""Layers that treat each number on its own, so that neurons may go."""
_MOVING_LAYERS = (nn.Flatten,)
_POOLING_LAYERS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Dropout1d, nn.Dropout2d),
)
_POINTWISE = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "softsign"),
    *("hardswish", "hardtanh", "hardsigmoid", "logsigmoid", "dropout", "alpha_dropout", "exp", "log", "log1p", "abs", "sqrt"),
    *("rsqrt", "square", "neg", "pow", "clamp", "clamp_min", "clamp_max", "add", "sub", "mul", "div", "truediv", "rsub"),
    *("iadd", "isub", "imul", "itruediv", "where", "masked_fill", "maximum", "minimum", "max", "min"),
    *("float", "to", "type", "contiguous", "clone", "detach"),
}
_MOVING = {
    *("flatten", "reshape", "view", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
    *("cat", "concat", "concatenate", "getitem"),
}
_SIZED = {"reshape", "view"}
_JOINING = {"mean", "sum", "amax", "amin", "max", "min"}
_POOLING = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2)}
_ABOUT = {"size", "dim", "numel", "getattr"}
"""Operations whose result, if it is no tensor, says nothing of the numbers in one."""
_STRIDED = {"view", "view_as", "unflatten", "as_strided", "stride", "is_contiguous", "storage_offset"}
"""Operations that ask how a tensor lies in memory."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A layer of a group: for each of its outputs (or inputs, if it reads) the number of it in the group, or -1."""

    path: str
    slots: tuple[int, ...]

    def left(self, kept: Tensor) -> Tensor:
        """Which of its outputs (or inputs) stay where only these numbers do; those of other groups all stay."""
        slots = torch.tensor(self.slots)
        return ((slots < 0) | torch.isin(slots, kept)).nonzero().squeeze(1)


@dataclasses.dataclass(frozen=True)
class Group:
    """Outputs that are cut together: number k of each of the layers that write, and whatever comes from it."""

    writers: tuple[Member, ...]
    between: tuple[Member, ...]
    """Batch norms and depthwise convolutions, which have an output for each input."""
    readers: tuple[Member, ...]
    width: int

    @property
    def name(self) -> str:
        """The path of the first layer that writes."""
        return self.writers[0].path

    @property
    def paths(self) -> tuple[str, ...]:
        """All its layers."""
        return tuple(dict.fromkeys(m.path for m in (*self.writers, *self.between, *self.readers)))

    def under(self, path: str) -> Group:
        """The same where the module it was found in is a part of another, at ``path``."""

        def moved(members: tuple[Member, ...]) -> tuple[Member, ...]:
            return tuple(Member(f"{path}.{m.path}", m.slots) for m in members)

        return Group(moved(self.writers), moved(self.between), moved(self.readers), self.width)

    def without(self, other: Group, kept: Tensor) -> Group:
        """This group once another was cut to these of its numbers: a layer that reads both has fewer inputs."""

        def less(members: tuple[Member, ...], cut: tuple[Member, ...]) -> tuple[Member, ...]:
            left = {m.path: m.left(kept).tolist() for m in cut}
            return tuple(Member(m.path, tuple(m.slots[k] for k in left.get(m.path, range(len(m.slots))))) for m in members)

        between, readers = less(self.between, other.between), less(self.readers, other.readers)
        return dataclasses.replace(self, between=between, readers=readers)


def groups(module: nn.Module, example: Sequence[Tensor]) -> list[Group] | None:
    """The groups that may be cut, in the order in which their first layers run; None for a module that cannot be traced.

    Args:
        module: in evaluation mode.
        example: its inputs for a row or more.
    """
    graph = trace(module)
    if graph is None:
        return None
    flow = Flow(module, graph)
    try:
        with torch.no_grad():
            want, got = module(*(t.clone() for t in example)), flow.run(*(t.clone() for t in example))
    except Exception:  # whatever the code of somebody else raises on a path that tracing changed
        return None
    return list(flow.groups()) if isinstance(want, Tensor) and torch.allclose(want, got, 1e-3, 1e-4, equal_nan=True) else None


def runs(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]] | None:
    """Layers of which each reads what the one before gives, and nobody else does; None if it cannot be traced."""
    graph = trace(module)
    return None if graph is None else _runs(module, graph)


def _runs(module: nn.Module, graph: fx.Graph) -> Iterator[list[tuple[str, nn.Module]]]:
    shared = _shared(module, graph)
    calls = [n for n in graph.nodes if n.op == "call_module"]
    follows = {n: u for n in calls for u in n.users if len(n.users) == 1 and u.op == "call_module" and u.args == (n,)}
    follows = {n: u for n, u in follows.items() if not {str(n.target), str(u.target)} & shared}
    for node in (n for n in calls if n not in set(follows.values())):
        run = [node]
        while run[-1] in follows:
            run.append(follows[run[-1]])
        yield [(str(n.target), module.get_submodule(str(n.target))) for n in run]


def strided(module: nn.Module) -> bool:
    """Whether forward asks how what a convolution gave lies in memory, as ``view`` does; True for what cannot be traced."""
    graph = trace(module)
    if graph is None:
        return True
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not behind.isdisjoint(node.all_input_nodes):
            if _name(node) in _STRIDED or isinstance(layer, nn.Unflatten):
                return True
            behind |= set() if layer is not None and Dense.of(layer) else {node}
        elif layer is not None and Conv.of(layer):
            behind.add(node)
    return False


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of PyTorch's and of ours stay whole."""
        ours = type(m).__module__.startswith("pennyweight.") and not any(True for _ in m.children())
        return ours or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph | None:
    """The operations of a module's forward, layers whole; None where it decides by what it is given."""
    try:
        return _Tracer().trace(module)
    except Exception:  # whatever the code of somebody else raises when it is given stand-ins
        return None


def _name(node: fx.Node) -> str:
    """The plain name of an operation: ``add`` for ``torch.add``, ``+=`` and ``x.add_``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0].strip("_") if node.op in ("call_function", "call_method") else ""


def _shared(module: nn.Module, graph: fx.Graph) -> set[str]:
    """Layers that are called twice, or whose weights somebody else uses too: cutting them at one place cuts the other."""
    called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    layers = {path: module.get_submodule(path) for path in called}
    held = {path: [id(t) for t in (*layer.parameters(), *layer.buffers())] for path, layer in layers.items()}
    read = [id(t) for n in graph.nodes if n.op == "get_attr" if isinstance(t := _attribute(module, str(n.target)), Tensor)]
    uses = Counter([*(i for path in called for i in held[path]), *read])
    names = Counter(id(layer) for _, layer in module.named_modules(remove_duplicate=False))
    return {path for path, ids in held.items() if ids and (names[id(layers[path])] > 1 or any(uses[i] > 1 for i in ids))}


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


class Flow(fx.Interpreter):
    """Runs a graph, and beside it the labels of where each number came from; 0 is nowhere, and is pinned."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.layers = module
        self.shared = _shared(module, graph)
        self.labels: dict[fx.Node, Any] = {}
        self.count = 1
        self.pinned = {0}
        self.ties: list[Ids] = []
        self.writers: dict[str, Ids] = {}
        self.between: dict[str, Ids] = {}
        self.readers: dict[str, Ids] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of an operation; its labels are kept."""
        value = super().run_node(n)
        given = fx.node.map_arg((n.args, dict(n.kwargs)), self.labels.__getitem__)
        labels = self._labels(n, value, *given)
        if [t.shape for t in _tensors(labels)] != [t.shape for t in _tensors(value)]:
            labels = self._unknown(value, given)
        # A view is possible of the numbers, so it must be of their labels.
        self.labels[n] = labels.contiguous() if isinstance(labels, Tensor) else labels
        return value

    def _labels(self, n: fx.Node, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = _tensors((args, kwargs))
        if n.op in ("placeholder", "get_attr"):
            return _fixed(value)
        if n.op == "call_module" and len(given) == 1 and isinstance(value, Tensor):
            return self._layer(str(n.target), given[0], value)
        name = _name(n)
        if not any(labels.any() for labels in given) or (name in _ABOUT and not _tensors(value)):
            return _fixed(value)
        if name == "getitem" and isinstance(args[0], tuple):
            return args[0][args[1]]
        if name == "getattr" and isinstance(args[0], tuple):
            return args[0][0] if args[1] == "values" else self._unknown(value, args)
        if name in _MOVING:
            return self._moved(n, args, kwargs)
        if name in _JOINING and len(given) == 1:
            return self._reduced(args[0], value, *args[1:3], **kwargs)
        if name in _POOLING and len(given) == 1:
            return self._pooled(given[0], value)
        return self._joined(given, value) if name in _POINTWISE else self._unknown(value, given)

    # -- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, path: str, labels: Tensor, value: Tensor) -> Tensor:
        layer = self.layers.get_submodule(path)
        if path in self.shared:
            return cast(Tensor, self._unknown(value, labels))
        if type(layer) in POINTWISE_LAYERS or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            return labels
        if type(layer) in _MOVING_LAYERS:
            return self._checked(labels, cast(Tensor, layer(labels)))
        if type(layer) in _POOLING_LAYERS:
            return cast(Tensor, self._pooled(labels, value))
        dense, conv, norm = Dense.of(layer), Conv.of(layer), Norm.of(layer)
        if dense is not None and dense.data_type == "fp32":
            self.readers[path] = self._along(labels, -1)
            return self._written(path, value, -1)
        if conv is not None and conv.data_type == "fp32" and value.dim() == conv.dims + 2:
            return self._convolved(path, conv, labels, value)
        if norm is not None and norm.kind == "batch":
            return self._passed(path, labels, value)
        return cast(Tensor, self._unknown(value, labels))

    def _convolved(self, path: str, conv: Conv, labels: Tensor, value: Tensor) -> Tensor:
        if conv.groups == 1:
            self.readers[path] = self._along(labels, 1)
            return self._written(path, value, 1)
        if conv.groups == conv.inputs == conv.outputs:
            return self._passed(path, labels, value)
        return cast(Tensor, self._unknown(value, labels))

    def _written(self, path: str, value: Tensor, dim: int) -> Tensor:
        """New labels for the outputs of a layer."""
        new = torch.arange(self.count, self.count + value.shape[dim])
        self.count += len(new)
        self.writers[path] = new.numpy()
        return _spread(new, value, dim)

    def _passed(self, path: str, labels: Tensor, value: Tensor) -> Tensor:
        """A layer with one output for each input along dimension 1."""
        self.between[path] = self._along(labels, 1)
        return _spread(torch.from_numpy(self.between[path]), value, 1)

    def _along(self, labels: Tensor, dim: int) -> Ids:
        """The label of each input of a layer; inputs that are not the same everywhere are pinned."""
        rows = labels.movedim(dim, -1).flatten(0, -2)
        mixed = (rows != rows[:1]).any(0)
        self.pin(rows[:, mixed])
        return torch.where(mixed, 0, rows[0]).numpy()

    # -- operations --------------------------------------------------------------------------------------------------

    def _joined(self, given: Sequence[Tensor], value: Any) -> Any:
        """One number from one of each: they go together. What is one number for all along labels only gets read by them."""
        wide = [labels.expand(value.shape) for labels in given]
        dims = [d - value.dim() for d in range(value.dim()) if any(_varies(labels, d) for labels in wide)]
        spread = [any(labels.dim() < -d or labels.shape[d] < value.shape[d] for d in dims) for labels in given]
        for labels in (labels for labels, out in zip(given, spread, strict=True) if out):
            self.pin(labels)
        first, *rest = [labels for labels, out in zip(wide, spread, strict=True) if not out] or [_fixed(value)]
        for labels in rest:
            self.tie(first, labels)
        return first

    def _moved(self, n: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Labels go where their numbers go."""
        target: Any = n.target
        moved = getattr(args[0], target)(*args[1:], **kwargs) if n.op == "call_method" else target(*args, **kwargs)
        if not isinstance(moved, Tensor):
            return moved
        if _name(n) == "getitem" and _tensors(args[1:]):
            return self._unknown(moved, args)
        written = _sizes(n) if _name(n) in _SIZED else []
        if any(isinstance(size, int) and size >= 0 and _varies(moved, d) for d, size in enumerate(written)):
            return self._unknown(moved, args)
        return self._checked(torch.cat([t.flatten() for t in _tensors(args[:1])]), moved)

    def _checked(self, before: Tensor, after: Tensor) -> Tensor:
        """Labels after a move, if all are still there and lie along one dimension."""
        whole = torch.equal(torch.unique(before), torch.unique(after))
        return after if whole and sum(_varies(after, d) for d in range(after.dim())) <= 1 else self._unknown(after, before)

    def _reduced(self, labels: Tensor, value: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        dims = tuple(range(labels.dim())) if dim is None else dim
        low, high = labels.amin(dims, keepdim), labels.amax(dims, keepdim)
        if not torch.equal(low, high):
            return self._unknown(value, labels)
        return low if isinstance(value, Tensor) else (low, low)

    def _pooled(self, labels: Tensor, value: Any) -> Any:
        """A label for each channel, wherever its numbers are."""
        if not isinstance(value, Tensor) or value.dim() < 3 or labels.dim() != value.dim():
            return self._unknown(value, labels)
        return _spread(torch.from_numpy(self._along(labels, 1)), value, 1)

    def _unknown(self, value: Any, given: Any) -> Any:
        """Nothing is known of what comes out, and what went in must stay."""
        for labels in _tensors(given):
            self.pin(labels)
        return _fixed(value)

    def pin(self, labels: Tensor) -> None:
        """These outputs stay."""
        self.pinned.update(torch.unique(labels).tolist())

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Outputs whose numbers meet go together or not at all."""
        self.ties.append(torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1).numpy())

    # -- groups ------------------------------------------------------------------------------------------------------

    def groups(self) -> Iterator[Group]:
        """What may be cut, in the order of the first writers."""
        kind = _components(self.count, np.concatenate([np.zeros((2, 0), np.int64), *self.ties], 1))
        pinned = np.unique(kind[list(self.pinned)])
        paths = list(self.writers)
        owners = np.repeat(np.arange(len(paths)), [len(self.writers[p]) for p in paths])
        slots = np.concatenate([np.zeros(0, np.int64), *self.writers.values()])
        joint = _components(len(paths) + self.count, np.stack([owners, len(paths) + kind[slots]]))[: len(paths)]
        for first in dict.fromkeys(joint.tolist()):
            together = [paths[k] for k in np.flatnonzero(joint == first)]
            yield from self._group(together, kind, pinned)

    def _group(self, paths: Sequence[str], kind: Ids, pinned: Ids) -> Iterator[Group]:
        """The group of these writers, if each has every slot just once and none is pinned."""
        kinds = kind[self.writers[paths[0]]]
        if np.isin(kinds, pinned).any() or any(set(kind[self.writers[p]]) != set(kinds) for p in paths):
            return
        if any(len(self.writers[p]) != len(set(kinds.tolist())) for p in paths):
            return
        number = np.full(self.count, -1)
        number[kinds] = np.arange(len(kinds))

        def members(found: Mapping[str, Ids]) -> tuple[Member, ...]:
            slots = {path: number[kind[ids]] for path, ids in found.items()}
            return tuple(Member(path, tuple(s.tolist())) for path, s in slots.items() if (s >= 0).any())

        readers = members(self.readers)
        if readers:
            yield Group(members({p: self.writers[p] for p in paths}), members(self.between), readers, len(kinds))


def _components(count: int, pairs: Ids) -> Ids:
    edges = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(count, count))
    return cast(Ids, connected_components(edges, directed=False)[1].astype(np.int64))


def _fixed(value: Any) -> Any:
    """Labels that say nothing, for a tensor or a tuple of them; anything else as it is."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(_fixed(v) for v in value)
    return torch.zeros(value.shape, dtype=torch.long) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments, in order."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    return found


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes a ``view`` is given, as they are written."""
    parts = [*node.args[1:], *node.kwargs.values()]
    return [size for part in parts for size in (part if isinstance(part, (tuple, list)) else [part])]


def _spread(labels: Tensor, value: Tensor, dim: int) -> Tensor:
    """One label for each position along a dimension of a value."""
    shape = [1] * value.dim()
    shape[dim] = -1
    return labels.reshape(shape).expand(value.shape)


def _varies(labels: Tensor, dim: int) -> bool:
    return labels.numel() > 0 and bool((labels != labels.narrow(dim, 0, 1)).any())
