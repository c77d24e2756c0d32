"""Tables trained by the rows a batch touches: a step costs what the batch holds, never the whole table.

PyTorch's optimizers take a gradient as large as the table and visit every row at every step, at 10 million rows a thousand
times more than a batch touches; its own remedy, ``SparseAdam``, takes one table at a time and sorts out repeated ids by a
general routine. Here all tables of one width lie end to end in one matrix, of which each table's weight becomes a view, and
a step is: the gradients of looked-up rows as they are (PyTorch's sparse gradients, which are only kept, never added up),
one sort of their ids, one sum a run of equal ids (by the kernel of ``embedding_bag``), and one write of the rows there are.
FBGEMM's fused operators are the known alternative; on a CPU these five operations of stock PyTorch take 1.2 ms for 40,960 ids
of 16 numbers, and need nothing installed.

What becomes of a row that a batch does not touch:

    adagrad     nothing. Row-wise Adagrad: one number a row is kept, the sum over steps of its gradient's mean square
                (Gupta et al. 2014; FBGEMM's ``EXACT_ROWWISE_ADAGRAD``). As a row without a gradient adds nothing to it,
                this is exactly what visiting all rows would do
    lazy-adam   nothing, while Adam would decay its moments and move it along them. When it is touched again its moments
                are as they were left and bias is corrected by the number of all steps, as in ``torch.optim.SparseAdam``.
                If every row is touched at every step, this is Adam
    sgd         nothing; there is no momentum

``embedding_l2`` is added to the gradient of the rows a batch touches, once a step, and not made up for steps a row was
missing from: rare rows are regularized less than when all rows are visited. The padding row gets no gradient.

``int8`` rows are a byte a number and eight a row (FBGEMM's format, as bundles have it) while they are trained too: a touched
row is read to fp32, moved, and written back rounded up or down by chance, in proportion to how near each is, so that steps
smaller than a level are not lost (Gupta et al. 2015; Zhang et al. 2018 for embeddings). The chance is drawn by row, column and
step, not from a stream: a row is rounded alike whoever holds it and whatever else a batch touches. The module then has packed
tables for good, of a quarter of the bytes.

Tables are plain ``nn.Embedding`` and ``nn.EmbeddingBag`` (sum, mean) in fp32, inside shared tables too; codebooks and
bags of the maximum are trained with the dense layers. Where a model reads a table's weight as a matrix, its gradient is
as large as the table, and every row counts as touched.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core import memory
from pennyweight.model.layers import Embeddings
from pennyweight.model.spec import Batch, replace
from pennyweight.model.tables import RowwiseTable, Table, joined

LARGE = 1 << 24
"""Numbers in all tables from which ``auto`` visits only touched rows: below, all rows at once cost a few milliseconds."""
TINY = 1e-30
"""Below any scale of a row that is not all one number."""
EPS = 1e-10
"""Of Adagrad, as in PyTorch's."""
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class Rows(abc.ABC):
    """Rows, and what an optimizer remembers of them.

    Args:
        n: how many.
        dim: numbers in each.
        kind: ``adagrad``, ``lazy-adam`` or ``sgd``.
        l2: on touched rows.
    """

    def __init__(self, n: int, dim: int, kind: str, l2: float) -> None:
        self.l2, self.kind, self.steps = l2, kind, 0
        kept: Mapping[str, Mapping[str, tuple[int, ...]]]
        kept = {"adagrad": {"squares": (n,)}, "lazy-adam": {"first": (n, dim), "second": (n, dim)}, "sgd": {}}
        self.kept = {name: torch.zeros(shape) for name, shape in kept[kind].items()}
        self.touched: tuple[Tensor, Tensor] | None = None

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget the gradients."""

    @abc.abstractmethod
    def gather(self) -> None:
        """From the gradients of a batch to the rows it touched, rising, and the sum of each one's gradients."""

    @abc.abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """These rows, fp32 [n, dim]."""

    @abc.abstractmethod
    def move(self, rows: Tensor, by: Tensor) -> None:
        """Add to these rows, each of which is there once."""

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Move the touched rows along their gradients, times ``scale``."""
        self.steps += 1
        if self.touched is None:
            return
        rows, sums = self.touched
        if scale != 1.0:
            sums = sums * scale
        if self.l2:
            sums = sums.add_(self.read(rows), alpha=self.l2)
        by: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]]
        by = {"adagrad": self._adagrad, "lazy-adam": self._adam, "sgd": lambda _, g, lr: g * -lr}
        self.move(rows, by[self.kind](rows, sums, lr))

    def _adagrad(self, rows: Tensor, sums: Tensor, lr: float) -> Tensor:
        held = self.kept["squares"]
        squares = held.index_select(0, rows).add_(torch.linalg.vecdot(sums, sums), alpha=1 / sums.shape[1])
        held.index_copy_(0, rows, squares)
        return sums * squares.sqrt_().add_(EPS).reciprocal_().mul_(-lr).unsqueeze(1)

    def _adam(self, rows: Tensor, sums: Tensor, lr: float) -> Tensor:
        (a, b), first, second = BETAS, self.kept["first"], self.kept["second"]
        m = first.index_select(0, rows).lerp_(sums, 1 - a)
        v = second.index_select(0, rows).mul_(b).addcmul_(sums, sums, value=1 - b)
        first.index_copy_(0, rows, m)
        second.index_copy_(0, rows, v)
        below = v.sqrt_().div_(math.sqrt(1 - b**self.steps)).add_(ADAM_EPS)
        return m.div_(below).mul_(-lr / (1 - a**self.steps))


class Rounded(Rows):
    """The rows of a packed int8 table.

    Args:
        table: whose rows; among workers its part of them.
        kind: ``adagrad``, ``lazy-adam`` or ``sgd``.
        l2: on touched rows.
        name: of the table, which rounds it otherwise than the next.
        first: the place of the part's first row in the whole.
    """

    def __init__(self, table: RowwiseTable, kind: str, l2: float, name: str, first: int = 0) -> None:
        super().__init__(len(table.packed), table.embedding_dim, kind, l2)
        self.table, self.first, self.salt = table, first, zlib.crc32(name.encode())
        self.stash: list[tuple[Tensor, Tensor]] = []
        """Ids that were looked up in this step and the gradients of their rows, as they came."""
        self.anchor = torch.zeros((), requires_grad=True)

    def clear(self) -> None:
        """Forget the gradients."""
        self.touched = None
        self.stash.clear()

    def look(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """What the table answers, its gradients put aside."""
        table, ids, weights = self.table, input, per_sample_weights
        if not (table.training and torch.is_grad_enabled()):
            return RowwiseTable.forward(table, ids, offsets, weights)
        flat = ids.reshape(-1)
        rows: Tensor = Looked.apply(self.anchor, self.read(flat), None, flat, self.stash)  # type: ignore[no-untyped-call]
        if table.layer.bag is None:
            return rows.view(*ids.shape, table.embedding_dim)
        return joined(table.layer, ids, rows, offsets, weights)

    def gather(self) -> None:
        """From the gradients of a batch to the rows it touched, rising, and the sum of each one's gradients."""
        if not self.stash:
            return
        ids, gradients = (torch.cat(part) for part in zip(*self.stash, strict=True))
        rows, sums = summed(ids, gradients)
        if self.table.padding_idx is not None:
            sums[rows == self.table.padding_idx] = 0
        self.touched = rows, sums

    def read(self, rows: Tensor) -> Tensor:
        """These rows, fp32 [n, dim]."""
        return self.table.look(rows, self.table.form())

    def move(self, rows: Tensor, by: Tensor) -> None:
        """Add to these rows and round by chance."""
        chance = _chance(rows + self.first, by.shape[1], self.steps, self.salt)
        self.table.write(rows, rounded(self.read(rows).add_(by), chance))


class Matrix(Rows):
    """Tables of one width end to end, and what an optimizer remembers of their rows.

    Args:
        tables: modules whose weights move in here; they stay views of it.
        kind: ``adagrad``, ``lazy-adam`` or ``sgd``.
        l2: on touched rows.
    """

    def __init__(self, tables: Sequence[nn.Module], kind: str, l2: float) -> None:
        weights = [t.get_parameter("weight") for t in tables]
        self.rows = nn.Parameter(_joined(weights))
        super().__init__(len(self.rows), self.rows.shape[1], kind, l2)
        self.sources: list[tuple[nn.Parameter, int]] = [(self.rows, 0), *zip(weights, map(_start, weights), strict=True)]
        padded = [_start(w) + t.padding_idx for w, t in zip(weights, tables, strict=True) if t.padding_idx is not None]  # type: ignore[operator]
        self.padding = torch.tensor(sorted(padded), dtype=torch.int64)

    def clear(self) -> None:
        """Forget the gradients."""
        self.touched = None
        for weight, _ in self.sources:
            weight.grad = None

    def gather(self) -> None:
        """From the gradients of a batch to the rows it touched, rising, and the sum of each one's gradients."""
        found = [_rows_of(w.grad, start) for w, start in self.sources if w.grad is not None]
        if not found:
            return
        ids, gradients = found[0] if len(found) == 1 else (torch.cat(part) for part in zip(*found, strict=True))
        rows, sums = summed(ids, gradients)
        if len(self.padding):
            place = torch.searchsorted(rows, self.padding).clamp_(max=len(rows) - 1)
            sums.index_fill_(0, place[rows[place] == self.padding], 0.0)
        self.touched = rows, sums

    def read(self, rows: Tensor) -> Tensor:
        """These rows, fp32 [n, dim]."""
        return self.rows.index_select(0, rows)

    def move(self, rows: Tensor, by: Tensor) -> None:
        """Add to these rows."""
        self.rows.index_add_(0, rows, by)


class Sparse:
    """The tables of a module, trained by the rows that batches touch; everything else is somebody else's.

    From ``Sparse(...)`` to ``release()`` the module's tables hand out sparse gradients, and those of our ``Embeddings`` are
    looked up at once while it trains. Weights stay where they are found by name; with ``int8`` the tables become packed ones.
    """

    def __init__(self, module: nn.Module, kind: str, l2: float, *, int8: bool = False) -> None:
        if int8:
            for table in list(trained(module)):
                put(module, table, packed(table, table.weight))
        self.rounded = [Rounded(t, kind, l2, path) for path, t in whole(module)] if int8 else []
        self.tables = list(trained(module))
        widths = dict.fromkeys(t.get_parameter("weight").shape[1] for t in self.tables)
        grouped = [[t for t in self.tables if t.get_parameter("weight").shape[1] == width] for width in widths]
        self.matrices = [Matrix(group, kind, l2) for group in grouped]
        self.joined = [m for m in module.modules() if type(m) is Embeddings and self._hold(m)]
        for table in self.tables:
            table.sparse = True
        for rows in self.rounded:
            rows.table.lend(rows.look)
        for each in self.joined:
            self._join(each)

    @property
    def held(self) -> list[Rows]:
        """All rows, in an order of their own."""
        return [*self.matrices, *self.rounded]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that are trained here, as their modules hold them."""
        return [t.get_parameter("weight") for t in self.tables]

    def clear(self) -> None:
        """Forget the gradients of a batch."""
        for matrix in self.held:
            matrix.clear()

    @torch.no_grad()
    def gather(self) -> Iterator[Tensor]:
        """The gradients of the rows a batch touched, summed by row, a matrix at a time; needed before ``step``."""
        for matrix in self.held:
            matrix.gather()
            if matrix.touched is not None:
                yield matrix.touched[1]

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Move the rows that were gathered."""
        for matrix in self.held:
            matrix.step(lr, scale)

    def state(self) -> dict[str, Tensor]:
        """What to keep to go on exactly, by name."""
        held = {f"{i}.{name}": t for i, m in enumerate(self.held) for name, t in m.kept.items()}
        return {**held, **{f"{i}.steps": torch.tensor(m.steps) for i, m in enumerate(self.held)}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for i, matrix in enumerate(self.held):
            for name, tensor in matrix.kept.items():
                tensor.copy_(state[f"{i}.{name}"])
            matrix.steps = int(state[f"{i}.steps"])

    def release(self) -> None:
        """Leave the module as it was found; its tables stay views of one matrix."""
        for table in self.tables:
            table.sparse = False
        for rows in self.rounded:
            rows.table.lend(None)
        for each in self.joined:
            each.__dict__.pop("forward", None)
        self.clear()

    def _hold(self, module: Embeddings) -> bool:
        """Whether all tables of a group of lookups are trained here."""
        known = set(map(id, self.tables))
        return all(id(t) in known for t in module.tables.values()) and len(module.tables) > 0

    def _join(self, module: Embeddings) -> None:
        weight = next(iter(module.tables.values())).get_parameter("weight")
        matrix = next(m for m in self.matrices if any(weight is w for w, _ in m.sources))
        whole = module.over(matrix.rows)

        def forward(batch: Batch) -> Tensor:
            flat: Tensor = whole(batch) if module.training else Embeddings.forward(module, batch)
            return flat

        module.__dict__["forward"] = forward


def trained(module: nn.Module) -> Iterator[nn.Embedding | nn.EmbeddingBag]:
    """The tables of a module that can be trained by touched rows, each weight once."""
    seen = set()
    for table in module.modules():
        # Not a subclass, which may look up differently; float64 for who wants to see what rounding does.
        if not isinstance(table, (nn.Embedding, nn.EmbeddingBag)) or type(table) not in (nn.Embedding, nn.EmbeddingBag):
            continue
        if table.weight.dtype not in (torch.float32, torch.float64):
            continue
        plain = not table.scale_grad_by_freq and table.max_norm is None and getattr(table, "mode", "sum") != "max"
        if plain and table.weight.requires_grad and id(table.weight) not in seen and table.weight.device.type != "cuda":
            seen.add(id(table.weight))
            yield table


def whole(module: nn.Module) -> Iterator[tuple[str, RowwiseTable]]:
    """The packed int8 tables of a module by path, each once."""
    for path, child in module.named_modules():
        if isinstance(child, RowwiseTable) and child.bits == 8:
            yield path, child


def packed(table: nn.Embedding | nn.EmbeddingBag, weight: Tensor) -> RowwiseTable:
    """An int8 table in the place of a plain one, its rows those of ``weight``, which may be a part of them."""
    layer = Table.of(table)
    assert layer is not None
    layer = dataclasses.replace(layer, data_type="int8")
    made = RowwiseTable(dataclasses.replace(layer, rows=0))
    made.layer, made.num_embeddings = layer, layer.rows
    made.packed = layer.encode(weight.detach())["packed"] if len(weight) else made.packed
    made.train(table.training)
    return made


def put(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one is."""
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if child is old:
            replace(module, path, new)


def layers(module: nn.Module) -> dict[str, Table]:
    """The layers that a spec must name for the packed int8 tables of a module, wherever they are."""
    every = module.named_modules(remove_duplicate=False)
    return {path: child.layer for path, child in every if isinstance(child, RowwiseTable) and child.bits == 8}


def numbers(module: nn.Module) -> int:
    """Numbers in the tables that can be trained by touched rows."""
    return sum(t.num_embeddings * t.embedding_dim for t in trained(module))  # not of the weight, which may be a part


def summed(ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, rising, and for each the sum [U, D] of its rows of ``gradients`` [n, D] in the order they stand in."""
    order, place = ids.sort(stable=True)
    rows, counts = torch.unique_consecutive(order, return_counts=True)
    return rows, F.embedding_bag(place, gradients, counts.cumsum(0) - counts, mode="sum")


class Looked(torch.autograd.Function):
    """Rows by place (None: all, in order); the gradient is put aside with the ids, for autograd does not know the table."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, place: Tensor | None, ids: Tensor, stash: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """fp32 [n, D]."""
        ctx.ids, ctx.stash = ids, stash
        return rows if place is None else F.embedding(place, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        """None of anything."""
        ctx.stash.append((ctx.ids, gradients[0].reshape(len(ctx.ids), -1)))
        return None, None, None, None, None


def rounded(rows: Tensor, chance: Tensor) -> Tensor:
    """FBGEMM's int8 rows, uint8 [n, dim + 8], of fp32 [n, dim], rounded up where ``chance`` in [0, 1) is above what is left."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    scale = (high - low) / 255
    levels = ((rows - low) / scale.clamp_min(TINY)).add_(chance).floor_().clamp_(0, 255)
    return torch.cat([levels.to(torch.uint8), torch.cat([scale, low], 1).view(torch.uint8)], 1)


def _chance(rows: Tensor, dim: int, step: int, salt: int) -> Tensor:
    """A number in [0, 1) for each column of each row at a step, by a hash of all three (SplitMix64), [n, dim]."""
    start = (step << 32 | salt) * 0x9E3779B1 & (1 << 62) - 1
    x = rows.unsqueeze(1) * -7046029254386353131 + (torch.arange(dim) + start)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x & 0xFFFFFF).float().mul_(2.0**-24)


def _joined(weights: Sequence[nn.Parameter]) -> Tensor:
    """One matrix with the rows of all; each weight becomes a view of it, one at a time, so that no more is held twice.

    Weights that lie end to end already, since they were trained so before, stay where they are.
    """
    first, n = weights[0], sum(map(len, weights))
    ends = [*itertools.accumulate(w.numel() for w in weights)]
    starts = [first.storage_offset() + end - w.numel() for w, end in zip(weights, ends, strict=True)]
    place = first.untyped_storage().data_ptr()
    behind = all(w.is_contiguous() and w.storage_offset() == s for w, s in zip(weights, starts, strict=True))
    if behind and starts[0] == 0 and all(w.untyped_storage().data_ptr() == place for w in weights):
        return first.data.as_strided((n, first.shape[1]), (first.shape[1], 1))
    rows = memory.huge(torch.empty(n, first.shape[1]))
    at = 0
    for weight in weights:
        part = rows[at : at + len(weight)]
        part.copy_(weight.data)
        weight.data = part
        at += len(weight)
    return rows


def _start(weight: Tensor) -> int:
    return weight.storage_offset() // weight.shape[1]


def _rows_of(gradient: Any, start: int) -> tuple[Tensor, Tensor]:
    """The rows of the matrix that a gradient speaks of, repeated as it does, and its numbers [n, D]."""
    if gradient.is_sparse:
        ids = gradient._indices()[0]
        return ids + start if start else ids, gradient._values().contiguous()
    return torch.arange(start, start + len(gradient)), gradient
