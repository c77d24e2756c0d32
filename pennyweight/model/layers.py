"""The blocks our models share, over plain ``nn.Embedding``, ``nn.Linear`` and ``nn.BatchNorm1d``.

Plain, so that any table or dense layer can be replaced at its path by something smaller with the same call, and nothing
here has to know. Fused kernels over all tables at once are the known alternative (TorchRec); they take a plain model
away, and at one request's size they are slower on a CPU. The cost is one lookup call per column.

Row 0 of a table is padding and is zero; a replacement keeps that, since pooled sequences add it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import PAD, Column
from pennyweight.model import team
from pennyweight.model.spec import Batch


def table(size: int, dim: int, std: float = 0.01) -> nn.Embedding:
    """An embedding table with normal weights and a zero row for padding."""
    made = nn.Embedding(size, dim, padding_idx=PAD)
    with torch.no_grad():
        made.weight.normal_(0, std)[PAD] = 0
    return made


def key(name: str) -> str:
    """The name of a column's table in a ``ModuleDict``, which takes no dots and none of its own methods' names."""
    plain = name.replace(".", "_")
    return plain + "_" if hasattr(nn.ModuleDict, plain) else plain


def pooled(rows: nn.Module, ids: Tensor) -> Tensor:
    """The mean of the rows that padded ids [B, L] look up, [B, D]; zero where a row holds none.

    Not ``embedding_bag``: with a padding index it is 3 times slower here at the size of a request (500 x 50 ids).
    """
    count = ids.ne(PAD).sum(1, keepdim=True).clamp_min(1)
    total: Tensor = rows(ids).sum(1) / count
    return total


def tables(columns: Sequence[Column], dim: int, std: float = 0.01) -> nn.ModuleDict:
    """A table for each vocabulary of the categorical and sequence columns; columns that share one share its table."""
    sizes = {c.table: c.size for c in columns if c.kind in ("categorical", "sequence")}
    return nn.ModuleDict({key(name): table(size, dim, std) for name, size in sizes.items()})


class Beside(Mapping[str, Tensor]):
    """A batch whose columns lie side by side in few tensors, as an engine takes them: ``given`` names each tensor's columns."""

    def __init__(self, given: Sequence[tuple[str, ...]], tensors: Sequence[Tensor]) -> None:
        self.whole = dict(zip(given, tensors, strict=True))
        self.place = {name: (columns, k) for columns in given for k, name in enumerate(columns)}

    def __getitem__(self, name: str) -> Tensor:
        columns, k = self.place[name]
        return self.whole[columns][:, k] if len(columns) > 1 else self.whole[columns]

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


def height(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter((batch.whole if isinstance(batch, Beside) else batch).values())))


def stacked(batch: Batch, names: tuple[str, ...]) -> Tensor:
    """Columns [B] of one type side by side, [B, columns]; where they lie so already, as they are."""
    ready = batch.whole.get(names) if isinstance(batch, Beside) and len(names) > 1 else None
    return torch.stack([batch[n] for n in names], 1) if ready is None else ready


class Lookup(nn.Module):
    """Columns to one vector a row, by tables that somebody else holds: the embeddings, then the numbers, normalized.

    Sequences are pooled by their mean. Numbers are normalized over the batch (running figures when scoring), since raw
    ones of any scale are let in.
    """

    def __init__(self, columns: Sequence[Column], dim: int) -> None:
        super().__init__()
        embedded = [c for c in columns if c.kind in ("categorical", "sequence")]
        numeric = [c for c in columns if c.kind == "numeric"]
        self.lookups = [(c.name, key(c.table), c.kind == "sequence") for c in embedded]
        self._numbers = [(c.name, c.length > 0) for c in numeric]
        self.dim, self.fields = dim, len(embedded)
        self.numbers = sum(max(1, c.length) for c in numeric)
        self.width = self.fields * dim + self.numbers
        """Numbers in a row of the output."""
        if self.numbers:
            self.norm = nn.BatchNorm1d(self.numbers)

    def forward(self, batch: Batch, tables: nn.ModuleDict) -> Tensor:
        """[B, width]."""
        parts = [_looked_up(tables[t], batch[n], many) for n, t, many in self.lookups]
        return self.join(batch, parts)

    def join(self, batch: Batch, parts: list[Tensor]) -> Tensor:
        """[B, width] from the embeddings, one or several a tensor, and the batch's numbers."""
        if self._numbers and any(vector for _, vector in self._numbers):
            numbers = [batch[n] if vector else batch[n].unsqueeze(1) for n, vector in self._numbers]
            parts.append(self.norm(torch.cat(numbers, 1)))
        elif self._numbers:
            parts.append(self.norm(stacked(batch, tuple(n for n, _ in self._numbers))))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the output: the embeddings [B, F, D] and the numbers [B, N]."""
        cut = self.fields * self.dim
        return flat[:, :cut].view(-1, self.fields, self.dim), flat[:, cut:]


def _looked_up(rows: nn.Module, ids: Tensor, many: bool) -> Tensor:
    """The rows of a column [B, D], pooled where it holds many ids; once for all where every row of the batch is the same.

    A request's user columns are one row expanded over its candidates, which its stride of 0 tells at no cost. A graph that is
    being traced must hold for other batches too, so there every row is looked up.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    traced = tracing or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or isinstance(ids, torch.fx.Proxy)
    alone = not traced and len(ids) > 1 and ids.stride(0) == 0
    asked = ids[:1] if alone else ids
    found: Tensor = pooled(rows, asked) if many else rows(asked)
    return found.expand(len(ids), -1) if alone else found


class Embeddings(nn.Module):
    """The features of a schema to one vector a row, by tables of its own (at ``tables.<vocabulary>``)."""

    def __init__(self, columns: Sequence[Column], dim: int, std: float = 0.01) -> None:
        super().__init__()
        features = [c for c in columns if c.role in ("user", "item", "context")]
        if not features:
            raise ConfigError("a model needs at least one user, item or context column; the schema has none")
        self.tables = tables(features, dim, std)
        self.lookup = Lookup(features, dim)
        self.width = self.lookup.width

    def forward(self, batch: Batch) -> Tensor:
        """[B, width]."""
        flat: Tensor = self.lookup(batch, self.tables)
        return flat

    def fields(self, flat: Tensor) -> Tensor:
        """The embeddings in the output, a view [B, F, D]."""
        return self.lookup.split(flat)[0]

    def numbers(self, flat: Tensor) -> Tensor:
        """The numbers in the output, a view [B, N]."""
        return self.lookup.split(flat)[1]

    def fused(self) -> Embeddings:
        """The same with all tables in one, for engines that pay by the operation; itself where a table is not plain rows."""
        plain = all(type(t) is nn.Embedding for t in self.tables.values())
        if not plain:
            return self
        weights = [rows.get_parameter("weight").detach() for rows in self.tables.values()]
        every = torch.cat(weights)
        starts = torch.tensor([0, *map(len, weights[:-1])]).cumsum(0).tolist()
        rows = nn.Embedding(len(every), every.shape[1], _weight=every)
        return _Fused(rows, dict(zip(self.tables, starts, strict=True)), self.lookup, self.width)

    def over(self, matrix: nn.Parameter) -> Embeddings:
        """The same looked up in a matrix of which each table is a view already; its gradient is sparse."""
        starts = {name: t.get_parameter("weight").storage_offset() // matrix.shape[1] for name, t in self.tables.items()}
        rows = nn.Embedding(len(matrix), matrix.shape[1], _weight=matrix, sparse=True)
        rows.weight = matrix
        return _Fused(rows, starts, self.lookup, self.width)


class _Fused(Embeddings):
    """Tables end to end, each from its start on: neighbouring columns are looked up at once."""

    def __init__(self, rows: nn.Embedding, starts: Mapping[str, int], lookup: Lookup, width: int) -> None:
        nn.Module.__init__(self)
        self.rows, self.lookup, self.width = rows, lookup, width
        self._runs = []
        for pooling, run in groupby(lookup.lookups, key=lambda c: c[2]):
            columns = list(run)
            shift = torch.tensor([starts[table] for _, table, _ in columns])
            self._runs.append((tuple(name for name, _, _ in columns), pooling))
            self.register_buffer(f"shift{len(self._runs) - 1}", shift)

    def forward(self, batch: Batch) -> Tensor:
        """[B, width]."""
        parts = []
        for k, (names, pooling) in enumerate(self._runs):
            shift: Tensor = getattr(self, f"shift{k}")
            if pooling:
                parts += [_shifted(self.rows, batch[n], by) for n, by in zip(names, shift, strict=True)]
            else:
                parts.append(self.rows(stacked(batch, names) + shift).flatten(1))
        return self.lookup.join(batch, parts)


def _shifted(rows: nn.Module, ids: Tensor, by: Tensor) -> Tensor:
    """As ``pooled``, of a table that starts ``by`` rows later."""
    real = ids.ne(PAD)
    total: Tensor = (rows(ids + by) * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    return total


class Dropout(nn.Dropout):
    """``nn.Dropout`` with a byte of randomness a number, so ``p`` is rounded to a multiple of 1/256.

    PyTorch draws a double for each number, on one thread: 4 ms for 1,024 rows of 400 here, a third of a training step. Eight
    bytes cut out of each random word take a tenth of that; NumPy's SFC64, half of that again on a CPU. Its seed is one word of
    PyTorch's generator, so whoever sets or keeps the state of that one has these numbers too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The input in evaluation; in training each number is zeroed with probability ``p``, the rest scaled up."""
        if not self.training or not self.cut:
            return x
        kept = self.kept(self.drawn(x), x.dtype)
        return x * kept.mul_(self.up) if x.dtype in (torch.float32, torch.float64) else x * kept * self.up

    @property
    def cut(self) -> int:
        """Of 256 numbers so many are dropped."""
        return round(256 * self.p)

    @property
    def up(self) -> float:
        """What those that are kept are multiplied by."""
        return 256 / (256 - self.cut) if self.cut < 256 else 0.0

    def kept(self, drawn: Tensor, kind: torch.dtype) -> Tensor:
        """Ones and zeros, by random bytes."""
        # Compared as floats, in place: PyTorch neither compares bytes nor multiplies by booleans at full speed.
        return drawn.to(kind).ge_(self.cut)

    def drawn(self, x: Tensor) -> Tensor:
        """A random byte for each number of the input."""
        part = team.part()
        shape = (part.total, *x.shape[1:]) if part is not None and len(x) == part.rows else x.shape
        count = math.prod(shape)
        if x.device.type == "cpu":
            seed = int(torch.empty((), dtype=torch.int64).random_())
            words = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 8)).view(np.uint8))
        else:
            words = torch.empty(-(-count // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None).view(torch.uint8)
        drawn = words[:count].view(shape)
        return drawn if shape == x.shape or part is None else part.of(drawn)


class MLP(nn.Sequential):
    """Linear, batch norm, ReLU, dropout for each hidden width; then one linear layer if ``outputs`` is given.

    ReLU writes into its input: fresh memory for 500 x 96 numbers costs 50 µs here, ten times what ReLU does with it.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int = 0, dropout: float = 0.0, norm: bool = True) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(inplace=True)]
            layers += [Dropout(dropout)] if dropout else []
            inputs = width
        layers += [nn.Linear(inputs, outputs)] if outputs else []
        super().__init__(*layers)
        self.outputs = outputs or inputs
        """Width of the output."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


def idle(lookup: Lookup, mlp: MLP) -> tuple[nn.Parameter, ...]:
    """The bias of the numbers' norm, where nothing reads it but a layer whose own norm takes the mean away again."""
    norms = (lookup.norm, mlp[1]) if lookup.numbers and len(mlp) > 1 else ()
    return (lookup.norm.bias,) if norms and all(type(n) is nn.BatchNorm1d for n in norms) else ()


class FM(nn.Module):
    """Factorization machine (Rendle 2010): each field's weight, and the dot products of all pairs of fields' factors.

    A field's row is its weight, then its factors. Sums over fields are small matrix products, a third of the time of strided
    reductions at one request's size.
    """

    total: Tensor
    factors: Tensor

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.eye(dim).repeat(fields, 1), persistent=False)
        self.register_buffer("factors", (torch.arange(dim) > 0).to(self.total.dtype).repeat(fields), persistent=False)
        self.dim = dim

    def forward(self, flat: Tensor) -> Tensor:
        """[B, F * D] to [B], in F steps rather than F squared: pairs are half of (square of the sum - sum of the squares)."""
        total = flat @ self.total
        pairs = total.square() @ self.factors[: self.dim] - flat.square() @ self.factors
        return total[:, 0] + 0.5 * pairs


class Cross(nn.Module):
    """Cross network of DCN-V2 (Wang et al. 2021): each layer multiplies the input once more, x0 * (W x + b) + x.

    ``rank`` > 0 gives W as the product of two matrices of that rank.
    """

    def __init__(self, width: int, depth: int, rank: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width)) if rank else nn.Linear(width, width)
            for _ in range(depth)
        )

    def forward(self, first: Tensor) -> Tensor:
        """[B, width] to [B, width]."""
        x = first
        for layer in self.layers:
            x = torch.addcmul(x, first, layer(x))
        return x


class Interaction(nn.Module):
    """Dot products of all pairs of fields, as in DLRM (Naumov et al. 2019)."""

    pairs: Tensor

    def __init__(self, fields: int) -> None:
        super().__init__()
        rows, columns = torch.triu_indices(fields, fields, 1)
        self.register_buffer("pairs", rows * fields + columns, persistent=False)
        self.width = len(self.pairs)
        """Pairs: F (F - 1) / 2."""

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] to [B, pairs]."""
        return torch.bmm(fields, fields.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
