"""Work that a request's candidates share, done once: one user, N items, and a forward in three parts.

What depends on the user and the context alone is computed once a request; what depends on the item alone once an item,
beforehand where memory allows; the rest once a candidate. A model is not written in these parts. They are derived from the
recorded forward: each column's role (user or context, item) is followed along the graph, and where both meet side by side
(``cat``), what comes next is split by columns as long as it can be:

    W [u; i] + b  =  (W_u u + b)  +  W_i i                    a dense layer, a matrix product
    norm, square, sum, slices, an activation                 each part alone
    dots of all pairs (DLRM)                                 user-user once, item-item once an item, user-item a candidate

so DeepFM's pairs, both its linear parts, the first layer of every MLP and cross network, and the towers of two-tower models
need no rule of their own. Anything else is computed a candidate, on user rows repeated. Writing each model twice, the usual
way, is faster to do once and wrong at the next change; hand-written kernels know one architecture.

The rewrite is exact in fp32 up to the order of sums. A rounded dense layer rounds what it is given: its parts are rounded
each over its own range, which is never wider than that of the whole, so the result is as near to the unrounded one as
before, and not bit-equal. Both are checked on a probe when made. Batches must be requests: every user column one row.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pennyweight.accelerate.fuse import BLOCK, Fused, Shift, fuse, join
from pennyweight.accelerate.record import Recorded, beside, dense, free, held, layer, linear, record
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.dense import PackedLinear
from pennyweight.model.layers import Beside, Interaction
from pennyweight.model.packed import BITS, pack_levels
from pennyweight.model.spec import Batch, call
from pennyweight.model.tables import Table

Kind = Literal["user", "item", "each"]
"""How often a value is computed: once a request, once an item, once a candidate."""
KINDS: tuple[Kind, ...] = ("user", "item", "each")

EXACT = 1e-4
"""Largest difference from the plain forward in fp32, absolute and relative."""
ROUNDED = 0.05
"""Largest mean difference where layers round their inputs, as a share of the mean logit."""

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic."""

    flops: float = 0.0
    """Multiplies and adds."""
    bytes: float = 0.0
    """Of what is read and written between operations, of rows looked up, and (where it is once a request) of weights."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Count:
    """What a request costs before and after."""

    plain: Work
    """A candidate in the plain forward."""
    candidate: Work
    """A candidate now."""
    request: Work
    """Once a request, weights included."""
    item: Work
    """Once an item, ahead of any request; nothing where items are not kept."""

    def saved(self, candidates: int) -> float:
        """How many times less arithmetic a request of so many candidates needs."""
        return self.plain.flops * candidates / (self.candidate.flops * candidates + self.request.flops)

    def describe(self, candidates: int = 500) -> str:
        """A line of text."""
        return (
            f"{self.plain.flops:,.0f} operations a candidate before, {self.candidate.flops:,.0f} and "
            f"{self.request.flops:,.0f} a request now: {self.saved(candidates):.1f} times less for {candidates} candidates"
        )


def kinds_of(roles: Mapping[str, str], names: Sequence[str], items: bool) -> dict[str, Kind]:
    """How often each column changes; items count as candidates unless they are kept."""
    return {n: ("item" if items else "each") if roles.get(n) == "item" else "user" for n in names}


class Shared(nn.Module):
    """A model in three parts. A batch has its user columns as one row [1, ...], or as rows that are all the same."""

    def __init__(self, parts: Mapping[Kind, Fused | None], item: str, count: Count) -> None:
        super().__init__()
        self.user, self.item, self.each = parts["user"], parts["item"], parts["each"]
        self.column, self.count = item, count
        assert self.each is not None
        self.order = _order(self.each)
        self.together = False
        """Whether the users' part of several requests can be one forward."""
        self.kept: tuple[Tensor, ...] = ()
        self.places: Tensor | None = None
        self.block = BLOCK

    @property
    def columns(self) -> tuple[str, ...]:
        """User and context columns it reads."""
        return () if self.user is None else tuple(n for names in self.user.given for n in names)

    def once(self, batch: Batch) -> tuple[Tensor, ...]:
        """What a request computes once, from its user columns."""
        if self.user is None:
            return ()
        made: tuple[Tensor, ...] = self.user.graph.forward(*(_row(batch, names) for names in self.user.given))
        return made

    def each_once(self, askers: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
        """``once`` of each of several requests: in one forward, whose calls are most of what a user's single row costs."""
        if len(askers) == 1 or not self.together:
            return [self.once(asker) for asker in askers]
        return self._joined(askers)

    def _joined(self, askers: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
        assert self.user is not None
        rows = [torch.cat([_row(asker, names) for asker in askers]) for names in self.user.given]
        made = self.user.graph.forward(*rows)
        return list(zip(*(t.split(1) for t in made), strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [N] of a request's candidates."""
        assert self.each is not None
        once, rows = self.once(batch), len(batch[self.column])
        columns = [beside(batch, names) for names in self.each.given]
        items = [] if self.item is None else [beside(batch, names) for names in self.item.given]
        made = []
        for at in range(0, rows or 1, self.block):
            cut = slice(at, at + self.block) if rows > self.block else slice(None)
            found = [] if self.item is None else self.item.graph.forward(*(t[cut] for t in items))
            made.append(self._rest([t[cut] for t in columns], found, once))
        return made[0] if len(made) == 1 else torch.cat(made)

    def ranked(self, once: Sequence[Tensor], items: Tensor) -> Tensor:
        """Logits [N] of items known by id [N], from what was kept of them (see ``keep``), for whom ``once`` was computed."""
        assert self.places is not None and self.each is not None
        at = self.places[items]
        parts = []
        for a in range(0, max(1, len(at)), self.block):
            cut = at[a : a + self.block]
            parts.append(
                self._rest([], [F.embedding(cut, t) if t.dim() == 2 else t.index_select(0, cut) for t in self.kept], once)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keep(self, batch: Batch, ids: Tensor, size: int) -> int:
        """Compute the items' part for a catalogue's items now, by their ids below ``size``; the bytes that takes."""
        assert self.item is not None
        chunks = [self.item({n: t[a : a + 4096] for n, t in batch.items()}) for a in range(0, len(ids), 4096)]
        self.kept = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
        self.places = torch.full((size,), len(ids), dtype=torch.int64)
        self.places[ids] = torch.arange(len(ids))
        return sum(t.nbytes for t in self.kept)

    def _rest(self, columns: Sequence[Tensor], items: Sequence[Tensor], once: Sequence[Tensor]) -> Tensor:
        assert self.each is not None
        given = {"user": once, "item": items}
        output: Tensor = self.each.graph.forward(*columns, *(given[kind][at] for kind, at in self.order))
        return output


def _row(batch: Batch, names: tuple[str, ...]) -> Tensor:
    """The first row of columns side by side."""
    if isinstance(batch, Beside) and names in batch.whole:
        return batch.whole[names][:1]
    columns = [batch[n] for n in names]
    if len(columns[0]) > 1:
        columns = [c[:1] for c in columns]
    return columns[0] if len(names) == 1 else torch.cat(columns).unsqueeze(0)


def repeated(batch: Batch, shared: Shared) -> bool:
    """Whether a batch is a request: every user column one row, repeated without a copy."""
    if isinstance(batch, Beside) and shared.user is not None:
        whole = [batch.whole.get(names) for names in shared.user.given]
        if all(t is not None for t in whole):
            return all(t.shape[0] == 1 or t.stride(0) == 0 for t in whole if t is not None)
    return all(t.shape[0] == 1 or t.stride(0) == 0 for t in (batch[n] for n in shared.columns))


def factor(
    module: nn.Module,
    probe: Batch,
    roles: Mapping[str, str],
    item: str,
    inputs: Sequence[str] = (),
    *,
    items: bool = False,
    joined: bool = True,
) -> Shared:
    """The module in three parts, checked against its plain forward.

    Args:
        module: in evaluation; it is left as it was.
        probe: a request's batch, two candidates or more.
        roles: of columns by name, as in a schema.
        item: the column that names the item.
        inputs: columns handed to forward one by one; empty for a module that takes the batch.
        items: make the items' part one of its own, to be kept ahead (``Shared.keep``).
        joined: also join operations (``accelerate.fuse``); without it the parts hold ordinary layers, for other engines.

    Raises:
        DeviceError: the module cannot be recorded, nothing is shared, or the outputs differ.
    """
    try:
        recorded = record(module, probe, inputs)
        builder = _Builder(recorded, kinds_of(roles, recorded.names, items))
        last = builder.run()
    except ConfigError as error:
        raise DeviceError(f"what candidates share cannot be told apart: {error}") from error
    if last.kind != "each":
        raise DeviceError(
            f"nothing is to be shared: the model gives the same for every {'item' if last.kind == 'user' else 'user'}"
        )
    if not any(kind == "user" for kind in builder.kinds.values()):
        raise DeviceError("nothing is to be shared: the model reads no user and no context column")
    made = builder.made(last, probe, item, joined)
    _check(made, module, probe, inputs)
    made.together = items and made.user is not None and _joins(made, probe)  # others are scored one by one
    return made


def _check(made: Shared, module: nn.Module, probe: Batch, inputs: Sequence[str]) -> None:
    """Against the plain forward of candidates of one user."""
    names = made.columns
    batch = {n: t[:1].expand(len(t), *t.shape[1:]) if n in names else t for n, t in probe.items()}
    with torch.inference_mode():
        want, got = call(module, batch, inputs), call(made, batch)
    rounds = _rounds(module)
    gap = (got - want).abs() if got.shape == want.shape else torch.tensor([float("inf")])
    same = gap.mean() <= ROUNDED * want.abs().mean() + EXACT if rounds else torch.allclose(got, want, EXACT, EXACT)
    if got.shape != want.shape or not bool(same):
        raise DeviceError(
            f"sharing what candidates have in common changes the scores by up to {gap.max():.3g}; score them plainly"
        )


def _rounds(module: nn.Module) -> bool:
    """Whether some layer rounds what it is given."""
    return any(isinstance(m, PackedLinear) and m.whole for m in module.modules())


def _joins(made: Shared, probe: Batch) -> bool:
    """Whether the users' part gives two requests in one forward what it gives each."""
    one = {n: probe[n][:1] for n in made.columns}
    askers = [one, {n: torch.zeros_like(t) for n, t in one.items()}]
    with torch.inference_mode():
        alone = [made.once(asker) for asker in askers]
        try:
            both = made._joined(askers)
        except (RuntimeError, ValueError):  # an operation over the rows, or numbers that have none
            return False
    close = ROUNDED if _rounds(made) else EXACT
    pairs = [pair for a, b in zip(alone, both, strict=True) for pair in zip(a, b, strict=True)]
    return all(a.shape == b.shape and bool((a - b).abs().mean() <= close * (a.abs().mean() + EXACT)) for a, b in pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A tensor of one kind: its node in that kind's graph."""

    kind: Kind
    node: fx.Node


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    """A tensor [N, width, ...] whose columns are of several kinds: each kind's part and the places its columns have."""

    parts: Mapping[Kind, tuple[fx.Node, tuple[int, ...]]]
    width: int
    tail: int = 0
    """Numbers behind each place, as the D of [N, F, D]; 0 for none."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    tensor: Any


class _Rows:
    """The number of rows."""


_Any = _Value | _Split | _Constant | _Rows

UNARY_LAYERS = (
    *(nn.ReLU, nn.Identity, nn.Dropout, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.ReLU6),
    *(nn.Softplus, nn.Mish),
)
UNARY = {
    *("square", "relu", "neg", "abs", "sigmoid", "tanh", "exp", "float", "gelu", "silu", "pow", "mul", "add", "sub", "truediv"),
    *("div", "clamp", "clamp_min", "clamp_max", "leaky_relu", "contiguous", "sqrt", "log1p", "sign", "dropout"),
}
"""Functions and methods that give each number its own, where all other arguments are plain numbers."""
BROADCAST = {
    *("add", "sub", "mul", "truediv", "div", "addcmul", "addcdiv", "maximum", "minimum", "pow", "where", "rsub", "lerp", "eq"),
    *("gt", "lt", "ge", "le", "ne", "iadd", "imul"),
}
"""Functions and methods that repeat an operand of one row by themselves."""


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_")


class _Builder:
    """The graphs of the three kinds, from a recorded one."""

    def __init__(self, recorded: Recorded, columns: Mapping[str, Kind]) -> None:
        self.recorded, self.kinds, self.root = recorded, columns, recorded.root
        self.graphs: dict[Kind, fx.Graph] = {kind: fx.Graph() for kind in KINDS}
        self.values: dict[fx.Node, _Any] = {}
        self.given: dict[tuple[Kind, fx.Node], fx.Node] = {}
        self.needed: dict[Kind, list[fx.Node]] = {kind: [] for kind in KINDS}
        self.constants: dict[tuple[Kind, int], fx.Node] = {}
        self.joins: dict[int, _Value] = {}
        self.rows = len(next(n for n in recorded.graph.nodes if n.op == "placeholder").meta["seen"][1])

    def run(self) -> _Value:
        """Every node in turn; the value of the output."""
        names = iter(self.recorded.names)
        for node in self.recorded.graph.nodes:
            if node.op == "placeholder":
                kind = self.kinds[next(names)]
                self.values[node] = _Value(kind, self.graphs[kind].placeholder(node.name))
            elif node.op == "output":
                return self.whole(self.values[node.args[0]])
            else:
                self.values[node] = self.value(node)
        raise AssertionError("a graph has an output")

    def value(self, node: fx.Node) -> _Any:
        """What a node becomes."""
        inputs = [self.values[n] for n in node.all_input_nodes]
        if node.op == "get_attr":
            return _Constant(held(self.root, node))
        if all(isinstance(v, _Constant) for v in inputs):
            return _Constant(node.meta["seen"][0])
        if not node.meta.get("tensor", True):
            return self.number(node)
        if any(isinstance(v, _Split) for v in inputs) or _name(node) in ("cat", "concat", "stack"):
            made = self.split(node)
            if made is not None:
                return made
        return self.plain(node, inputs)

    def number(self, node: fx.Node) -> _Any:
        one, many = node.meta["seen"]
        if isinstance(one, int) and (one, many) == (1, self.rows):
            return _Rows()
        if isinstance(one, tuple):  # a shape: what is taken out of it is looked at
            return _Rows()
        if type(one) is type(many) and one == many:  # a device
            return _Constant(one)
        raise ConfigError(f"a number that depends on the batch ({_name(node)})")

    # Plain nodes

    def plain(self, node: fx.Node, inputs: Sequence[_Any]) -> _Value:
        """The node as it is, in the graph of what its inputs have in common; the user's rows are repeated where needed."""
        values = {
            n: self.whole(v) for n, v in zip(node.all_input_nodes, inputs, strict=True) if isinstance(v, (_Value, _Split))
        }
        kinds = {v.kind for v in values.values()}
        kind: Kind = next(iter(kinds)) if len(kinds) == 1 else "each"
        graph = self.graphs[kind]
        like = next((self.use(v, kind) for v in values.values() if v.kind != "user"), None)
        rank = _rank(node)
        alone = _name(node) in BROADCAST and node.op != "call_module"

        def mapped(n: fx.Node) -> Any:
            value = self.values[n]
            if isinstance(value, _Constant):
                return self.constant(value, kind)
            if isinstance(value, _Rows):
                first = like if like is not None else self.use(next(iter(values.values())), kind)
                return graph.call_method("size", (first, 0))
            used, own = self.use(values[n], kind), values[n].kind
            if own != "user" or kind == "user":
                return used
            _rows_first(n, self.rows)
            if alone and _rank(n) == rank:
                return used
            assert like is not None
            return graph.call_method("expand", (used, graph.call_method("size", (like, 0)), *[-1] * (_rank(n) - 1)))

        made = graph.node_copy(node, mapped)
        made.meta = {}
        return _Value(kind, made)

    def use(self, value: _Value, kind: Kind) -> fx.Node:
        """A value's node in the graph of another kind: given to it there."""
        if value.kind == kind:
            return value.node
        if kind != "each":
            raise ConfigError(f"the {kind}'s part would read a candidate's")
        key = (kind, value.node)
        if key not in self.given:
            self.needed[value.kind].append(value.node)
            self.given[key] = self.graphs[kind].placeholder(f"{value.kind}_{len(self.needed[value.kind])}")
            self.given[key].meta["from"] = value
        return self.given[key]

    def constant(self, value: _Constant, kind: Kind) -> Any:
        if not isinstance(value.tensor, Tensor):
            return value.tensor
        key = (kind, id(value.tensor))
        if key not in self.constants:
            self.root.register_buffer(name := free(self.root, "constant"), value.tensor, persistent=False)
            self.constants[key] = self.graphs[kind].get_attr(name)
        return self.constants[key]

    def whole(self, value: _Any) -> _Value:
        """A split value as one tensor, the user's columns repeated."""
        if isinstance(value, _Value):
            return value
        if not isinstance(value, _Split):
            raise ConfigError("the output does not depend on the columns")
        if id(value) not in self.joins:
            self.joins[id(value)] = self._join(value)
        return self.joins[id(value)]

    def _join(self, value: _Split) -> _Value:
        graph = self.graphs["each"]
        nodes = {kind: self.use(_Value(kind, node), "each") for kind, (node, _) in value.parts.items()}
        like = next(n for kind, n in nodes.items() if kind != "user")
        rest = [-1] * (2 if value.tail else 1)
        if "user" in nodes:
            nodes["user"] = graph.call_method("expand", (nodes["user"], graph.call_method("size", (like, 0)), *rest))
        made = graph.call_function(torch.cat, (list(nodes.values()), 1))
        places = [p for _, at in value.parts.values() for p in at]
        if places != sorted(places):
            order = torch.tensor(places).argsort()
            made = graph.call_function(torch.index_select, (made, 1, self.constant(_Constant(order), "each")))
            self.values[made] = _Constant(order)  # keeps it alive: constants go by identity
        return _Value("each", made)

    # Split nodes

    def split(self, node: fx.Node) -> _Any | None:
        """What a node becomes of whose input some columns are the user's and some are not; None where no rule fits."""
        name = _name(node)
        if name in ("cat", "concat", "stack"):
            return self.cat(node, name == "stack")
        first = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if not isinstance(first, _Split):
            return None
        module = layer(self.root, node)
        if module is not None:
            return self.layer(node, module, first)
        others = [n for n in node.all_input_nodes if n is not node.args[0]]
        if name in UNARY and not others and not any(isinstance(v, (tuple, list)) for v in node.args[1:]):
            return self.each(first, lambda graph, part, _: graph.node_copy(node, lambda n: part))
        if name == "matmul" and isinstance(self.values[others[0]] if others else None, _Constant) and not first.tail:
            return self.matmul(first, self.values[others[0]].tensor)  # type: ignore[union-attr]
        if name == "linear" and not first.tail and all(isinstance(self.values[n], _Constant) for n in others):
            tensors = [self.values[n].tensor for n in others]  # type: ignore[union-attr]
            return self.linear(first, linear(*tensors, *[None] * (2 - len(tensors))))
        rules: dict[str, Callable[[fx.Node, _Split], _Any | None]] = {
            "getitem": self.getitem,
            "view": self.view,
            "reshape": self.view,
            "flatten": self.flatten,
            "sum": self.sum,
        }
        return rules[name](node, first) if name in rules else None

    def cat(self, node: fx.Node, stack: bool) -> _Any | None:
        """Columns side by side."""
        given = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        rank = _rank(node)
        if not isinstance(given, (list, tuple)) or dim not in (1, 1 - rank) or rank not in (2, 3):
            return None
        values = [self.values[n] for n in given]
        if not all(isinstance(v, (_Value, _Split)) for v in values):
            return None
        kinds = {v.kind for v in values if isinstance(v, _Value)}
        if len(kinds) < 2 and not any(isinstance(v, _Split) for v in values):
            return None
        tail = node.meta["seen"][0].shape[2] if rank == 3 else 0
        pieces: dict[Kind, list[tuple[fx.Node, tuple[int, ...]]]] = {}
        at = 0
        for source, value in zip(given, values, strict=True):
            width = 1 if stack else source.meta["seen"][0].shape[1]
            found = {value.kind: (value.node, tuple(range(width)))} if isinstance(value, _Value) else value.parts  # type: ignore[union-attr]
            for kind, (part, places) in found.items():
                pieces.setdefault(kind, []).append((part, tuple(at + p for p in places)))
            at += width
        function = torch.stack if stack else torch.cat
        parts: dict[Kind, tuple[fx.Node, tuple[int, ...]]] = {}
        for kind, few in pieces.items():
            alone = len(few) == 1 and not stack
            made = few[0][0] if alone else self.graphs[kind].call_function(function, ([n for n, _ in few], 1))
            parts[kind] = (made, tuple(p for _, places in few for p in places))
        return _Split(parts, at, tail)

    def each(self, value: _Split, make: Callable[[fx.Graph, fx.Node, tuple[int, ...]], fx.Node]) -> _Split:
        """The same for every part."""
        parts = {kind: (make(self.graphs[kind], node, at), at) for kind, (node, at) in value.parts.items()}
        for made, _ in parts.values():
            made.meta = {}
        return dataclasses.replace(value, parts=parts)

    def added(self, parts: Mapping[Kind, fx.Node], fresh: bool = False) -> _Value:
        """The sum of parts of several kinds, each [rows, ...]; ``fresh`` ones are read by nobody else and added in place."""
        if len(parts) == 1:
            return _Value(*next(iter(parts.items())))
        order = sorted(parts, key=KINDS.index, reverse=True)  # candidates first, so that the user's row is repeated
        nodes = [self.use(_Value(kind, parts[kind]), "each") for kind in order]
        total = nodes[0]
        for node in nodes[1:]:
            function = operator.iadd if fresh and order[0] != "user" else operator.add
            total = self.graphs["each"].call_function(function, (total, node))
        return _Value("each", total)

    def layer(self, node: fx.Node, module: nn.Module, value: _Split) -> _Any | None:
        if dense(module) is not None and not value.tail:
            return self.linear(value, module)
        if isinstance(module, nn.BatchNorm1d) and not value.tail and module.running_mean is not None:
            return self.each(value, lambda graph, part, at: graph.call_module(self.put("norm", _norm(module, at)), (part,)))
        if isinstance(module, UNARY_LAYERS):
            fresh = nn.ReLU() if isinstance(module, nn.ReLU) else module  # in place, a part may be read elsewhere
            name = self.put("alone", fresh)
            return self.each(value, lambda graph, part, _: graph.call_module(name, (part,)))
        if isinstance(module, Interaction) and value.tail:
            return self.dots(value)
        return None

    def put(self, name: str, module: nn.Module) -> str:
        self.root.add_module(found := free(self.root, name), module)
        return found

    def linear(self, value: _Split, module: nn.Module) -> _Value:
        """W [u; i] + b, part by part; the bias goes to the part that is computed least often."""
        order = sorted(value.parts, key=KINDS.index)
        made: dict[Kind, fx.Node] = {}
        for kind in order:
            part, at = value.parts[kind]
            sliced = _columns(module, at, bias=kind == order[0])
            if kind == "each" and made:
                shift = self.use(self.added(made), "each")
                name = self.put("shift", Shift(sliced, single=set(made) == {"user"}))
                return _Value("each", self.graphs["each"].call_module(name, (part, shift)))
            made[kind] = self.graphs[kind].call_module(self.put("part", sliced), (part,))
        return self.added(made, fresh=True)

    def matmul(self, value: _Split, matrix: Tensor) -> _Value:
        made: dict[Kind, fx.Node] = {}
        for kind, (part, at) in value.parts.items():
            rows = _Constant(matrix[list(at)].contiguous())
            self.values[part] = self.values.get(part, rows)
            self.keepalive(rows)
            made[kind] = self.graphs[kind].call_function(torch.matmul, (part, self.constant(rows, kind)))
        return self.added(made)

    def keepalive(self, value: _Constant) -> None:
        self.alive = [*getattr(self, "alive", []), value]

    def sum(self, node: fx.Node, value: _Split) -> _Value | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if dim not in (1, [1], (1,)) or keep or node.kwargs.get("dtype"):
            return None
        return self.added({k: self.graphs[k].call_method("sum", (part, 1)) for k, (part, _) in value.parts.items()})

    def getitem(self, node: fx.Node, value: _Split) -> _Any | None:
        key = node.args[1]
        if not isinstance(key, tuple) or len(key) != 2 or key[0] != slice(None) or not isinstance(key[1], (slice, int)):
            return None
        wanted = list(range(value.width))[key[1] if isinstance(key[1], slice) else slice(key[1], key[1] % value.width + 1)]
        parts: dict[Kind, tuple[fx.Node, tuple[int, ...]]] = {}
        for kind, (part, at) in value.parts.items():
            chosen = [k for k, place in enumerate(at) if place in set(wanted)]
            if len(chosen) == len(at):
                parts[kind] = (part, tuple(wanted.index(p) for p in at))
            elif chosen:
                near = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
                index: Any = slice(chosen[0], chosen[0] + len(chosen)) if near else chosen
                cut = self.graphs[kind].call_function(operator.getitem, (part, (slice(None), index)))
                parts[kind] = (cut, tuple(wanted.index(at[k]) for k in chosen))
        if not parts:  # such as the numbers, where there are none
            return None
        if isinstance(key[1], int):
            ((kind, (part, _)),) = parts.items()
            return _Value(kind, self.graphs[kind].call_function(operator.getitem, (part, (slice(None), 0))))
        if len(parts) > 1:
            return _Split(parts, len(wanted), value.tail)
        ((kind, (part, at)),) = parts.items()
        return _Value(kind, part) if list(at) == sorted(at) else None

    def view(self, node: fx.Node, value: _Split) -> _Any | None:
        """[N, F * D] as [N, F, D]."""
        shape = node.meta["seen"][0].shape
        if value.tail or len(shape) != 3 or shape[1] * shape[2] != value.width:
            return None
        fields, dim = int(shape[1]), int(shape[2])
        parts: dict[Kind, tuple[fx.Node, tuple[int, ...]]] = {}
        for kind, (part, at) in value.parts.items():
            starts = at[::dim]
            if [p for s in starts for p in range(s, s + dim)] != list(at) or any(s % dim for s in starts):
                return None
            graph = self.graphs[kind]
            parts[kind] = (graph.call_method("reshape", (part, -1, len(starts), dim)), tuple(s // dim for s in starts))
        return _Split(parts, fields, dim)

    def flatten(self, node: fx.Node, value: _Split) -> _Split | None:
        """[N, F, D] as [N, F * D]."""
        if not value.tail or node.args[1:] != (1,) or node.kwargs:
            return None
        dim = value.tail
        parts = {
            kind: (self.graphs[kind].call_method("flatten", (part, 1)), tuple(p * dim + d for p in at for d in range(dim)))
            for kind, (part, at) in value.parts.items()
        }
        return _Split(parts, value.width * dim)

    def dots(self, value: _Split) -> _Split:
        """All pairs of fields: the user's once, the item's once an item, those between them a candidate."""
        found: dict[Kind, list[tuple[fx.Node, tuple[int, ...]]]] = {}

        def pair(a: int, b: int) -> int:
            low, high = min(a, b), max(a, b)
            return low * value.width - low * (low + 1) // 2 + high - low - 1

        kinds = sorted(value.parts, key=KINDS.index)
        for kind in kinds:
            part, at = value.parts[kind]
            if len(at) > 1:
                name = self.put("pairs", Interaction(len(at)))
                places = tuple(pair(at[a], at[b]) for a in range(len(at)) for b in range(a + 1, len(at)))
                found.setdefault(kind, []).append((self.graphs[kind].call_module(name, (part,)), places))
        graph = self.graphs["each"]
        for k, kind in enumerate(kinds):
            for other in kinds[k + 1 :]:
                (left, at), (right, beside) = value.parts[kind], value.parts[other]
                nodes = [self.use(_Value(kind, left), "each"), self.use(_Value(other, right), "each")]
                crossed = graph.call_module(self.put("across", Across(kind == "user")), tuple(nodes))
                found.setdefault("each", []).append((crossed, tuple(pair(a, b) for b in beside for a in at)))
        parts = {
            kind: (few[0][0] if len(few) == 1 else self.graphs[kind].call_function(torch.cat, ([n for n, _ in few], 1)),
                   tuple(p for _, places in few for p in places))
            for kind, few in found.items()
        }  # fmt: skip
        return _Split(parts, value.width * (value.width - 1) // 2)

    # The modules

    def made(self, last: _Value, probe: Batch, item: str, joined: bool) -> Shared:
        """The three graphs as modules, with what they cost."""
        self.graphs["each"].output(last.node)
        for kind in ("user", "item"):
            self.graphs[kind].output(tuple(self.needed[kind]))
        parts: dict[Kind, Fused | None] = {}
        for kind, graph in self.graphs.items():
            names = [n for n in self.recorded.names if self.kinds[n] == kind]
            parts[kind] = fuse(self.root, graph, names, probe, joined=False) if names or kind == "each" else None
        count = _counted(self.root, self.recorded.graph, parts, probe)
        for part in parts.values():
            if joined and part is not None:
                join(part)
        return Shared(parts, item, count)


def _rank(node: fx.Node) -> int:
    seen = node.meta["seen"][0]
    return seen.dim() if isinstance(seen, Tensor) else 0


def _rows_first(node: fx.Node, rows: int) -> None:
    one, many = (tuple(t.shape) for t in node.meta["seen"])
    if not one or one[0] != 1 or many[0] != rows or one[1:] != many[1:]:
        raise ConfigError(f"{node.name} has rows elsewhere than first: {list(one)} for one, {list(many)} for {rows}")


def _columns(module: nn.Module, at: Sequence[int], bias: bool) -> nn.Module:
    """A dense layer of some of its inputs, in this order; rounded weights stay as they are, with their scale."""
    chosen = list(at)
    if not isinstance(module, PackedLinear):
        assert isinstance(module, nn.Linear)
        return linear(module.weight[:, chosen].contiguous(), module.bias if bias else None)
    made = PackedLinear(dataclasses.replace(module.layer, inputs=len(chosen), bias=bias and module.bias is not None))
    if module.whole:
        levels, bits = module.levels()[:, chosen].contiguous(), BITS[module.data_type]
        state = {"packed": levels if bits == 8 else pack_levels(levels, bits), "scale": module.scale}
    else:
        state = {"packed": module.packed[:, chosen].contiguous()}
    if made.layer.bias and module.bias is not None:
        state["bias"] = module.bias
    made.load_state_dict(state, assign=True)
    return made.eval()


def _norm(module: nn.BatchNorm1d, at: Sequence[int]) -> nn.BatchNorm1d:
    chosen = list(at)
    made = nn.BatchNorm1d(len(chosen), module.eps, module.momentum, module.affine)
    state = {k: t[chosen] if t.dim() else t for k, t in module.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


class Across(nn.Module):
    """Dot products of the fields of two sides, [N, Fb * Fa] from a [N or 1, Fa, D] and b [N, Fb, D]."""

    def __init__(self, single: bool) -> None:
        super().__init__()
        self.single = single

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The products; where ``a`` is one row, as one matrix product."""
        turned = a[0].t() if self.single else a.transpose(1, 2)
        return torch.matmul(b, turned).flatten(1)


VIEWS = {
    "getitem",
    "view",
    "reshape",
    "expand",
    "size",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    "getattr",
    "contiguous",
}
"""Operations that cost nothing but their call."""


def _counted(root: nn.Module, graph: fx.Graph, parts: Mapping[Kind, Fused | None], probe: Batch) -> Count:
    """The work of the plain graph, from what was seen while recording, and of each part, from running it on one row."""
    plain = Work()
    for node in graph.nodes:
        if node.op.startswith("call") and isinstance(node.meta["seen"][0], Tensor):
            plain += _work(root, node, [n.meta["seen"][0] for n in node.all_input_nodes], node.meta["seen"][0])
    works: dict[Kind, Work] = {}
    weights = 0
    given: dict[Kind, Sequence[Tensor]] = {"user": (), "item": ()}
    for kind in KINDS:
        part = parts[kind]
        counter = None if part is None else _Counter(part.graph)
        if part is not None and counter is not None:
            columns = [beside({n: probe[n][:1] for n in names}, names) for names in part.given]
            with torch.inference_mode():
                found = counter.run(*columns, *(given[k][at] for k, at in (_order(part) if kind == "each" else ())))
            given[kind] = found
        works[kind] = Work() if counter is None else counter.work
        weights += 0 if counter is None or kind == "item" else counter.weights
    return Count(plain, works["each"], works["user"] + Work(0, weights), works["item"])


def _order(part: Fused) -> list[tuple[Kind, int]]:
    """What the candidates' part is handed of the others, behind its columns: whose, and which of theirs."""
    places = [str(n.target) for n in part.graph.graph.nodes if n.op == "placeholder"][len(part.given) :]
    return [("item" if name.startswith("item_") else "user", int(name.rpartition("_")[2]) - 1) for name in places]


class _Counter(fx.Interpreter):
    """Runs a graph and adds up what its operations cost."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.work, self.weights = Work(), 0

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, counted."""
        value = super().run_node(n)
        if n.op.startswith("call") and isinstance(value, Tensor):
            self.work += _work(self.module, n, [self.env[i] for i in n.all_input_nodes], value)
            module = layer(self.module, n)
            if module is not None and not _is_table(module):
                self.weights += sum(t.nbytes for t in module.state_dict().values())
        return value


def _is_table(module: nn.Module) -> bool:
    return hasattr(module, "num_embeddings")


def _work(root: nn.Module, node: fx.Node, inputs: Sequence[Any], output: Tensor) -> Work:
    """Of one operation on one row."""
    if _name(node) in VIEWS and node.op != "call_module":
        return Work()
    module = layer(root, node)
    moved = 2.0 * output.nbytes  # written by this one, read by the next
    inner = module.dense if isinstance(module, Shift) else module
    kind = dense(inner)
    if kind is not None:
        return Work(kind.flops() + (kind.outputs if isinstance(module, Shift) else 0), moved)
    if module is not None and _is_table(module):
        looked, ids = Table.of(module), inputs[0].numel()
        bytes_ = sum(t.nbytes for t in module.state_dict().values()) / int(module.num_embeddings)  # type: ignore[arg-type]
        return Work(ids * looked.flops() if looked else output.numel(), bytes_ * ids + moved)
    if isinstance(module, (Interaction, Across)):
        return Work(2.0 * inputs[0].shape[-1] * output.numel(), moved)
    if _name(node) in ("matmul", "mm", "bmm", "einsum"):
        return Work(2.0 * output.numel() * inputs[0].shape[-1], moved)
    copies = _name(node) in ("cat", "stack", "concat", "index_select")
    return Work(0.0 if copies else output.numel(), moved)
