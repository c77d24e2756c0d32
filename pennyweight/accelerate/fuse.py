"""The ``fused`` engine: the recorded forward with fewer, larger operations, still PyTorch's own and ready at once.

Eager spends a request of one user on calls, not arithmetic, and a large batch on a matrix product that is not the fastest
there is: on an AMD processor MKL's gave 105 GF/s where oneDNN, which PyTorch carries too, gave 220 from weights packed for
it. So batch norms are folded into the dense layers before them, dense layers and their ReLU are one oneDNN call over weights
packed once (or FBGEMM's, for int8), and neighbouring tables of one kind are one table looked up once. What ``torch.compile``
does with freezing, without a compiler and in a second; it fuses less between the layers.

fp32 numbers are eager's up to the order of sums, and rounded layers stay rounded as they were proven: the range of a batch,
the same operator. The cost is memory: packed dense layers are a second copy, and while rows are joined so are the tables
(afterwards the module's own tables are views into the joined one).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pennyweight.accelerate.record import beside, free, grouped, layer, record
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.dense import PackedLinear, narrow
from pennyweight.model.spec import Batch
from pennyweight.model.tables import HalfTable, RowwiseTable

FEW = 4
"""Rows below which a plain product is faster than oneDNN's, whose call costs 20 microseconds."""
BLOCK = 1024
"""Rows computed at once: what they need between layers stays in a core's cache, and in memory that is mapped already."""
JOINED = 1 << 28
"""Bytes of tables that are joined at most: joining needs them twice for a moment."""

PACKED = HalfTable, RowwiseTable
"""Tables that are joined in the form they are executed from, and answer in fp32 whatever that is."""


def packable() -> bool:
    """Whether this PyTorch has oneDNN's products over packed weights."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Dense(nn.Module):
    """A dense layer and, with ``relu``, its ReLU, over weights in oneDNN's order, or turned where there are few rows.

    Each form is made when it is first needed: the user's part never sees many rows.
    """

    def __init__(self, dense: nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = dense.weight.detach(), None if dense.bias is None else dense.bias.detach(), relu
        self.turned: Tensor | None = None
        self.packed: Tensor | None = None
        self.packs = packable() and self.weight.dtype == torch.float32

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """[B, outputs] from [B, inputs]; ``shift`` [1, outputs] stands in for the bias, [B, outputs] is added to it."""
        bias = self.bias
        if shift is not None and len(shift) == 1:
            bias, shift = shift[0], None
        if len(x) < FEW or x.dim() != 2 or not self.packs:
            return self._few(x, bias, shift)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), BLOCK)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, bias, "relu" if self.relu and shift is None else "none", [], ""
        )
        return output if shift is None else output.add_(shift)

    def _few(self, x: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        """Through weights [inputs, outputs], which few rows read in order: up to twice as fast as PyTorch's layer."""
        if self.turned is None:
            self.turned = self.weight.t().contiguous()
        output = x @ self.turned if bias is None or x.dim() != 2 else torch.addmm(bias, x, self.turned)
        output = output + bias if bias is not None and x.dim() != 2 else output
        output = output if shift is None else output.add_(shift)
        return output.relu_() if self.relu else output


class Rounded(nn.Module):
    """An int8 dense layer and its ReLU in one call of FBGEMM's."""

    def __init__(self, dense: PackedLinear) -> None:
        super().__init__()
        self.dense, self.form = dense, dense.ready()
        self.multiply, self.narrow = torch.ops.quantized.linear_relu_dynamic, narrow()

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] from [B, inputs]."""
        if isinstance(self.form, Tensor):
            return self.dense(x).relu_()  # type: ignore[no-any-return]
        output: Tensor = self.multiply(x, self.form, self.narrow)
        return output


class Rows(nn.Module):
    """Several tables as one: ids side by side [B, k] to their rows side by side [B, k * dim]."""

    starts: Tensor
    rows: Tensor

    def __init__(self, tables: Sequence[nn.Module]) -> None:
        super().__init__()
        one = tables[0]
        unique = list(dict.fromkeys(tables))
        self.packed = isinstance(one, RowwiseTable) and one.ready()[0] is None
        self.operator = one.ready()[1] if isinstance(one, RowwiseTable) and self.packed else None
        self.dim = int(one.embedding_dim)  # type: ignore[arg-type]
        held = [stored(table) for table in unique]
        self.answers = torch.float32 if isinstance(one, PACKED) else held[0].dtype
        sizes = torch.tensor([0, *(len(h) for h in held)]).cumsum(0).tolist()
        starts = dict(zip(unique, sizes, strict=False))
        ready = _end_to_end(held)
        self.rows = torch.cat(held) if ready is None else ready
        if ready is None:
            for table, start in starts.items():
                _view(table, self.rows[start : start + len(stored(table))])
        self.register_buffer("starts", torch.tensor([starts[t] for t in tables]), persistent=False)
        self._form = (self.starts, self.rows, self.operator, self.dim)  # looking a buffer up costs what adding ids does
        self._arrays = (self.starts.numpy(), self.rows.numpy()) if self.packed and getattr(one, "bits", 0) == 8 else None

    def forward(self, ids: Tensor) -> Tensor:
        """[B, k * dim]."""
        starts, rows, look, dim = self._form
        if self._arrays is not None and len(ids) < FEW:
            return torch.from_numpy(self._few(ids.numpy()))
        at = ids + starts
        if look is None:
            return F.embedding(at, rows).flatten(1).to(self.answers)
        found: Tensor = look(rows, at.view(-1, 1))
        return (found if found.shape[1] == dim else found[:, :dim]).reshape(len(ids), -1)

    def _few(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Few int8 rows by NumPy, whose calls cost a third of PyTorch's."""
        starts, rows = self._arrays  # type: ignore[misc]
        found = rows.take(ids + starts, axis=0)
        affine = found[..., self.dim :].view(np.float32)
        vectors = found[..., : self.dim] * affine[..., :1]
        vectors += affine[..., 1:]
        made: npt.NDArray[np.float32] = vectors.reshape(len(ids), -1)
        return made


def stored(table: nn.Module) -> Tensor:
    """What a table is executed from: fp32 rows, fp16 rows, or packed ones."""
    if isinstance(table, PACKED):
        plain: Tensor | None = table.ready()[0]
        return table.packed if plain is None else plain
    weight: Tensor = table.get_parameter("weight")
    return weight.detach()


def _end_to_end(held: Sequence[Tensor]) -> Tensor | None:
    """Rows that lie end to end already, as they are after they were joined once; None where they do not."""
    first, at = held[0], held[0].data_ptr()
    for rows in held:
        if (
            rows.data_ptr() != at
            or not rows.is_contiguous()
            or rows.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        at += rows.nbytes
    return first.as_strided((sum(len(rows) for rows in held), *first.shape[1:]), first.stride())


def _view(table: nn.Module, rows: Tensor) -> None:
    """Let a table's own rows be these, the same numbers, so that they are in memory once: also for who shares its tensor."""
    if not isinstance(table, PACKED):
        table.get_parameter("weight").data = rows
    elif table.ready()[0] is None:
        table.packed.data = rows
    else:
        table._ready = (rows, None)


def kind_of(table: nn.Module | None) -> tuple[Any, ...] | None:
    """Tables of equal kind can be joined; None for one that cannot, or that lives elsewhere than in memory."""
    if getattr(table, "apart", False):
        return None
    if type(table) is nn.Embedding and table.max_norm is None and table.weight.device.type == "cpu":
        return ("rows", table.embedding_dim, table.weight.dtype)
    if isinstance(table, PACKED) and table.layer.bag is None and table.packed.device.type == "cpu":
        plain, form = table.ready()
        if plain is not None:
            return ("rows", table.embedding_dim, torch.float32)
        if isinstance(table, HalfTable):
            return ("halves", table.embedding_dim)
        return ("packed", table.embedding_dim, table.bits) if form is not None else None
    return None


class Fused(nn.Module):
    """A graph and the columns it takes: one tensor for each of ``given``, of one column or of several side by side."""

    def __init__(self, graph: fx.GraphModule, given: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.graph, self.given, self.named = graph, tuple(given.values()), dict(given)

    def forward(self, batch: Batch) -> Any:
        """What the graph gives for a batch."""
        return self.graph.forward(*(beside(batch, names) for names in self.given))  # nobody hooks it; a call costs 4 µs


def fused(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> Callable[[Batch], Tensor]:
    """The module with fewer operations, as a function of a batch.

    Raises:
        DeviceError: the module cannot be recorded.
    """
    try:
        recorded = record(module, probe, inputs)
    except ConfigError as error:
        raise DeviceError(f"engine 'fused' cannot run this model: {error}") from error
    made = fuse(recorded.root, recorded.graph, recorded.names, probe)

    def score(batch: Batch) -> Tensor:
        output: Tensor = made(batch)
        return output

    return score


def fuse(root: nn.Module, graph: fx.Graph, names: Sequence[str], probe: Batch, *, joined: bool = True) -> Fused:
    """The graph, whose first placeholders are the columns ``names``, with its operations joined; the graph is changed."""
    given = _side_by_side(graph, names, probe)
    module = fx.GraphModule(root, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    made = Fused(module, given)
    return join(made) if joined else made


def join(made: Fused) -> Fused:
    """Join the operations of what ``fuse`` gave, in place."""
    module, graph = made.graph, made.graph.graph
    _lookups(module, graph)
    _products(module, graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return made


def lookups(module: nn.Module, probe: Batch, inputs: Sequence[str] = ()) -> tuple[Fused, nn.Module, list[str]] | None:
    """A model in two: its joined packed tables, and the rest as a module of what they give and of the columns it reads besides.

    For engines that know no packed rows: those are looked up here, where they stay packed. None where there are none. The names
    are of the columns, or groups of them, that the rest takes first.

    Raises:
        ConfigError: the module cannot be recorded.
    """
    recorded = record(module, probe, inputs)
    made = fuse(recorded.root, recorded.graph, recorded.names, probe, joined=False)
    root, graph = made.graph, made.graph.graph
    _lookups(root, graph)
    found = [n for n in graph.nodes if _is_packed(layer(root, n))]
    if not found:
        return None
    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    first.graph_copy(graph, copies)  # its output is not used
    for node in list(first.nodes):
        if node.op == "output":
            first.erase_node(node)
    first.output(tuple(copies[n] for n in found))
    before = fx.GraphModule(root, first)
    before.graph.eliminate_dead_code()
    before.recompile()
    for at, node in enumerate(found):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.placeholder(f"found_{at}"))
    graph.eliminate_dead_code()
    _sorted(graph)
    given = dict(made.named)
    used = []
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], list(given), strict=False):
        if node.users:
            used.append(name)
        else:
            graph.erase_node(node)
    graph.lint()
    root.delete_all_unused_submodules()
    root.recompile()
    return Fused(before, given), root, used


def direct(before: Fused) -> Callable[[Batch], Sequence[Tensor]]:
    """What ``lookups`` found first, as a function: of one joined table over columns side by side, without a graph around it."""
    nodes = list(before.graph.graph.nodes)
    rows = layer(before.graph, nodes[1]) if len(nodes) == 3 else None
    if not isinstance(rows, Rows) or len(before.given) != 1:
        return before.forward
    look, names = rows.forward, before.given[0]
    return lambda batch: (look(beside(batch, names)),)


def _is_packed(table: nn.Module | None) -> bool:
    if isinstance(table, Rows):
        return table.packed
    return isinstance(table, RowwiseTable) and table.ready()[0] is None


def _side_by_side(graph: fx.Graph, names: Sequence[str], probe: Batch) -> dict[str, tuple[str, ...]]:
    """Placeholders for groups of columns instead of single ones."""
    every = [n for n in graph.nodes if n.op == "placeholder"]
    old = dict(zip(names, every, strict=False))
    given = grouped(probe, names)
    first = next(iter(graph.nodes))
    for at, columns in enumerate(given.values()):
        with graph.inserting_before(first):
            whole = graph.placeholder(f"given_{at}")
            whole.meta["columns"] = len(columns)
            for k, column in enumerate(columns):
                single = whole if len(columns) == 1 else graph.call_function(operator.getitem, (whole, (slice(None), k)))
                single.meta |= {"column": (whole, k)} if len(columns) > 1 else {}
                old[column].replace_all_uses_with(single)
    for node in old.values():
        graph.erase_node(node)
    _sorted(graph)
    return given


def _sorted(graph: fx.Graph) -> None:
    """Placeholders first, as a graph's code needs them."""
    with graph.inserting_before(next(iter(graph.nodes))):
        mark = graph.call_function(operator.neg, (0,))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        mark.prepend(node)
    graph.erase_node(mark)


def _lookups(root: nn.Module, graph: fx.Graph) -> None:
    """Neighbouring lookups of one kind become one; numbers laid side by side are the tensor they came in."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (torch.cat, torch.stack) and _dim(node) == 1:
            parts = list(node.args[0])
            runs = _runs(root, parts) if node.target is torch.cat else _columns(parts)
            if len(runs) < len(parts):
                with graph.inserting_before(node):
                    new = [run[0] if len(run) == 1 else _joined(root, graph, run) for run in runs]
                    whole = new[0] if len(new) == 1 else graph.call_function(torch.cat, (new, 1))
                node.replace_all_uses_with(whole)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _runs(root: nn.Module, parts: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Neighbours that can be one lookup."""
    runs: list[list[fx.Node]] = []
    last: Any = None
    size = 0
    for part in parts:
        table = layer(root, part)
        column = (
            part.args[0].meta.get("column") if table is not None and part.args and isinstance(part.args[0], fx.Node) else None
        )
        key = (kind_of(table), column[0]) if column and kind_of(table) else None
        more = stored(table).nbytes if key and table is not None else 0
        if key is not None and key == last and size + more <= JOINED:
            runs[-1].append(part)
            size += more
        else:
            runs.append([part])
            size = more
        last = key
    return runs


def _columns(parts: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """All of them, where they are columns that came side by side; else each alone."""
    found = [p.meta.get("column") for p in parts]
    together = all(found) and len({c[0] for c in found if c}) == 1
    return [list(parts)] if together and len(parts) > 1 else [[p] for p in parts]


def _joined(root: nn.Module, graph: fx.Graph, run: Sequence[fx.Node]) -> fx.Node:
    tables = [layer(root, part) for part in run]
    columns = [(part if table is None else part.args[0]).meta["column"] for part, table in zip(run, tables, strict=True)]  # type: ignore[union-attr]
    at = [k for _, k in columns]
    whole = columns[0][0]
    ids: fx.Node = whole
    if at != list(range(whole.meta["columns"])):
        near = at == list(range(at[0], at[0] + len(at)))
        chosen: Any = slice(at[0], at[0] + len(at)) if near else at
        ids = graph.call_function(operator.getitem, (whole, (slice(None), chosen)))
    found = [t for t in tables if t is not None]
    if not found:
        return ids
    root.add_module(name := free(root, "rows"), Rows(found))
    return graph.call_module(name, (ids,))


def _products(root: nn.Module, graph: fx.Graph) -> None:
    """Dense layers over packed weights, each with its ReLU."""
    for node in list(graph.nodes):
        dense = layer(root, node)
        if not isinstance(dense, (nn.Linear, PackedLinear, Shift)):
            continue
        plain = type(dense) is nn.Linear or (isinstance(dense, Shift) and type(dense.dense) is nn.Linear)
        after = next(iter(node.users)) if len(node.users) == 1 else None
        relu = after is not None and _is_relu(root, after)
        wide = relu and not (plain and isinstance(dense, Shift) and not dense.single)
        if plain:
            made: nn.Module = Dense(dense.dense if isinstance(dense, Shift) else dense, bool(wide))  # type: ignore[arg-type]
        elif wide and isinstance(dense, PackedLinear) and dense.whole:
            made = Rounded(dense)
        else:
            continue
        root.add_module(name := free(root, "dense"), made)
        node.target = name
        if wide:
            assert after is not None
            after.replace_all_uses_with(node)
            graph.erase_node(after)


def _is_relu(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(layer(root, node)) is nn.ReLU
    return node.target in (torch.relu, F.relu, "relu", "relu_") and len(node.args) == 1


class Shift(nn.Module):
    """A dense layer of a part of the inputs, and what the other part came to: ``single`` [1, outputs], else [B, outputs]."""

    def __init__(self, dense: nn.Module, single: bool) -> None:
        super().__init__()
        self.dense, self.single = dense, single

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """[B, outputs]."""
        output: Tensor = self.dense(x) + shift
        return output
