"""Tables cut over workers, or whole on each: looked up, and trained by the rows that a batch touches.

A lookup of cut tables asks each owner once for all tables that are looked up together (all columns of a group of embeddings):
the distinct ids of this worker's rows that it has not fetched in this step, then their rows. After the backward pass each
worker adds up its gradients by row and sends every sum to the row's owner, who still knows which rows it gave; again for all
tables at once. Sums of tables that are whole go to everybody. So what travels is distinct rows, never a table, whatever the
recipe does with them then: with ``tables="dense"`` the owner visits all of its rows as the optimizer of one worker would, with
the others the touched ones only.

TorchRec's ``DistributedModelParallel`` is the known alternative and an engine to compare with. It is not what trains here: it
takes a model of its own tables and features, sends rows an id as often as it occurs, fuses an optimizer into the backward pass
that is none of our recipes', and knows no compressed tables. Here any plain table of any module is cut, the parts of hashed
and compositional ones too, and the numbers are those of one worker up to the order of sums. The cost is Python in each step,
about a tenth of a millisecond a table and worker.

A worker holds its block of a table in the place of the weight, so a state dict is this worker's part and an optimizer steps
it like any parameter. Whoever needs all of it asks the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import PAD
from pennyweight.distribute.blocks import Fill
from pennyweight.distribute.wide import Part
from pennyweight.distribute.wire import Wire
from pennyweight.model import layers, sparse, tables
from pennyweight.model.placement import Piece, Placement, Shard
from pennyweight.model.spec import Batch
from pennyweight.model.tables import RowwiseTable

Found = tuple[Tensor, Tensor]
"""Distinct ids, rising, and a row for each."""


@dataclasses.dataclass(eq=False)
class Held:
    """One table and what this worker has of it."""

    path: str
    module: nn.Embedding | nn.EmbeddingBag | RowwiseTable
    shard: Shard | None
    rank: int
    stash: list[Found] = dataclasses.field(default_factory=list)
    """Ids that were looked up in this step and the gradients of their rows, as they came."""
    fetched: Found | None = None
    """Rows of a cut table that this worker has got in this step."""
    asked: list[list[Tensor]] = dataclasses.field(default_factory=list)
    """Rows of this worker's block that each rank has fetched in this step."""
    touched: Found | None = None
    """Rows of this worker's part and the sums of their gradients."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole table."""
        return self.module.num_embeddings, self.module.embedding_dim

    @property
    def parameter(self) -> nn.Parameter | None:
        """What this worker holds, as the module's weight; None of packed rows."""
        return None if isinstance(self.module, RowwiseTable) else self.module.get_parameter("weight")

    @property
    def weight(self) -> Tensor:
        """What this worker holds of a table that is not packed."""
        assert self.parameter is not None
        return self.parameter

    def rows(self, ids: Tensor) -> Tensor:
        """These rows of what this worker holds, fp32."""
        if isinstance(self.module, RowwiseTable):
            return self.module.look(ids, self.module.form())
        return self.weight.detach().index_select(0, ids)

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The blocks of a cut table."""
        return self.shard.pieces(*self.shape) if self.shard is not None else ()

    @functools.cached_property
    def mine(self) -> Piece:
        """This worker's block; an empty one where it has none."""
        whole = Piece(self.rank, (0, self.shape[0]), (0, self.shape[1]))
        empty = Piece(self.rank, (0, 0), (0, self.shape[1]))
        return next((p for p in self.pieces if p.rank == self.rank), whole if self.shard is None else empty)

    @property
    def width(self) -> int:
        """Columns of this worker's block."""
        return self.mine.columns[1] - self.mine.columns[0]

    def inside(self, ids: Tensor) -> Iterator[tuple[Piece, tuple[int, int]]]:
        """The blocks, and which of these rising ids are in each."""
        bounds = torch.searchsorted(ids, torch.tensor([p.rows for p in self.pieces])).tolist()
        yield from zip(self.pieces, map(tuple, bounds), strict=True)

    def summed(self) -> Found:
        """The gradients of this step, one sum an id, the padding's left out."""
        if not self.stash:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.shape[1])
        ids, gradients = (torch.cat(part) for part in zip(*self.stash, strict=True))
        if not len(ids):
            return ids, gradients
        rows, sums = sparse.summed(ids, gradients)
        if self.module.padding_idx is None:
            return rows, sums
        keep = rows != self.module.padding_idx
        return rows[keep], sums[keep]


def held(module: nn.Module, placement: Placement, rank: int) -> list[Held]:
    """The tables of a module as a placement cuts them, seen from a rank of a group.

    Raises:
        ConfigError: the placement names a table that is not there, or one that cannot be cut.
    """
    paths = {id(m): path for path, m in module.named_modules()}
    found = [Held(paths[id(t)], t, placement.shards.get(paths[id(t)]), rank) for t in sparse.trained(module)]
    unknown = set(placement.shards) - {h.path for h in found}
    if unknown:
        known = ", ".join(sorted(h.path for h in found)) or "none"
        raise ConfigError(f"the placement cuts {', '.join(sorted(unknown))}, which cannot be; tables here: {known}")
    return found


def cut(held: Sequence[Held], fills: Mapping[int, Fill]) -> None:
    """Leave of each cut table this worker's block only; tables that lie on no device are made now, as ``blocks`` says."""
    for each in held:
        (r0, r1), (c0, c1) = each.mine.rows, each.mine.columns
        assert not isinstance(each.module, RowwiseTable)
        if each.weight.is_meta:
            block = fills[id(each.module.weight)].block(each.shape, each.mine, each.module.padding_idx)
            each.module.weight = nn.Parameter(block)
        elif each.shard is not None:
            each.module.weight = nn.Parameter(each.weight.detach()[r0:r1, c0:c1].clone())


def pack(module: nn.Module, held: Sequence[Held]) -> dict[str, Part]:
    """Make packed int8 tables of what this worker holds of each; their rows by the names of buffers.

    Raises:
        ConfigError: a table is cut by columns.
    """
    found = {}
    for each in held:
        if each.shard is not None and each.shard.blocks[1] > 1:
            raise ConfigError(f"int8 rows are whole, and {each.path} is cut by columns; cut it by rows, or train rows in fp32")
        assert not isinstance(each.module, RowwiseTable)
        made = sparse.packed(each.module, each.weight)
        sparse.put(module, each.module, made)
        each.module = made
        width = made.packed.shape[1]
        piece = Piece(each.rank, each.mine.rows, (0, width))
        found[f"{each.path}.packed"] = Part((each.shape[0], width), piece, "row" if each.shard else None, made.packed)
    return found


class Cut:
    """The tables of a module while workers train it, in the place of ``model.sparse.Sparse``.

    Args:
        module: whose tables are cut already (``cut``).
        held: its tables.
        kind: how rows are trained, as of a recipe; ``dense`` leaves gradients for an optimizer.
        l2: on touched rows, where rows are trained here.
        near: the wire of this worker's group, over which tables are cut.
        across: the wire of those that hold the same as this worker, one a group.
        world: the wire of all.
    """

    def __init__(
        self, module: nn.Module, held: Sequence[Held], kind: str, l2: float, near: Wire, across: Wire, world: Wire
    ) -> None:
        self.held, self.kind, self.near, self.across, self.world = held, kind, near, across, world
        self.module = module
        self.matrices: dict[str, sparse.Rows] = {}
        if kind != "dense":
            narrow = [h.path for h in held if h.shard is not None and h.shard.blocks[1] > 1]
            if kind == "adagrad" and narrow:
                raise ConfigError(
                    f"row-wise adagrad needs whole rows, and {narrow[0]} is cut by columns; cut it by rows, or train tables as "
                    "lazy-adam or dense"
                )
            self.matrices = {h.path: _trainer(h, kind, l2) for h in held}
        self.of = {id(h.module): h for h in held}
        self.anchor = torch.zeros((), requires_grad=True)
        self.lookups = [m for m in module.modules() if isinstance(m, layers.Lookup)]
        for each in held:
            each.module.__dict__["forward"] = functools.partial(self._table, each)
        for lookup in self.lookups:
            lookup.__dict__["forward"] = functools.partial(self._columns, lookup)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that are trained here and not by an optimizer."""
        return [] if self.kind == "dense" else [h.parameter for h in self.held if h.parameter is not None]

    def clear(self) -> None:
        """Forget the gradients and the rows of a batch."""
        for each in self.held:
            each.stash, each.fetched, each.asked, each.touched = [], None, [], None
            if each.parameter is not None:
                each.parameter.grad = None

    @torch.no_grad()
    def gather(self) -> Iterator[Tensor]:
        """Bring the gradients of a batch to who holds the rows; they are summed by row, a table at a time."""
        parted = [h for h in self.held if h.fetched is not None]
        used = [h for h in self.held if h.shard is None and (h.stash or _gradient(h) is not None)]
        found = self._pushed(parted)
        if self.across.size > 1:
            found = _spread(parted, found, self.across)
        found += [self._read(h, f) for h, f in zip(used, _spread(used, [h.summed() for h in used], self.world), strict=True)]
        for each, touched in zip([*parted, *used], found, strict=True):
            each.fetched, each.touched = None, touched
            if self.kind == "dense":
                each.module.weight.grad = torch.zeros_like(each.weight).index_copy_(0, *touched)
            else:
                self.matrices[each.path].touched = touched
            yield touched[1]

    def _read(self, each: Held, found: Found) -> Found:
        """The sums of a whole table's rows, and what reading its weight as a matrix adds to all of them."""
        gradient = _gradient(each)
        if gradient is None:
            return found
        self.world.sum(gradient, "gradients")
        return torch.arange(len(gradient)), gradient.index_add(0, *found)

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Move the rows that were gathered."""
        for matrix in self.matrices.values():
            matrix.step(lr, scale)

    def squares(self) -> tuple[Tensor, Tensor]:
        """The sums of squares of the gathered gradients: of this worker's blocks, and of whole tables."""
        total = [torch.zeros(()), torch.zeros(())]
        for each in self.held:
            if each.touched is not None:
                total[each.shard is None] += each.touched[1].square().sum()
        return total[0], total[1]

    def state(self) -> dict[str, Tensor]:
        """What to keep of this worker's part, by table."""
        kept = {f"{path}.weight.{name}": t for path, m in self.matrices.items() for name, t in m.kept.items()}
        return {**kept, **{f"{path}.steps": torch.tensor(m.steps) for path, m in self.matrices.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for path, matrix in self.matrices.items():
            for name, tensor in matrix.kept.items():
                tensor.copy_(state[f"{path}.weight.{name}"])
            matrix.steps = int(state[f"{path}.steps"])

    def release(self) -> None:
        """Stop looking up; the module keeps its blocks."""
        for module in (*(h.module for h in self.held), *self.lookups):
            module.__dict__.pop("forward", None)
        self.clear()

    # Lookups.

    def _table(self, each: Held, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """A table's ``forward``."""
        (rows,) = self._look([(each, ids)])
        layer = tables.Table.of(each.module)
        if layer is None or layer.bag is None:
            return rows
        return tables.joined(layer, ids, rows.reshape(-1, layer.dim), offsets, weights)

    def _columns(self, lookup: layers.Lookup, batch: Batch, tables: nn.ModuleDict) -> Tensor:
        """``Lookup.forward``, all columns at once."""
        asked = [(self.of.get(id(tables[t])), batch[name]) for name, t, _ in lookup.lookups]
        if any(each is None for each, _ in asked):
            return layers.Lookup.forward(lookup, batch, tables)
        rows = self._look(cast(list[tuple[Held, Tensor]], asked))
        parts = []
        for found, (_, ids), (_, _, many) in zip(rows, asked, lookup.lookups, strict=True):
            parts.append(found.sum(1) / ids.ne(PAD).sum(1, keepdim=True).clamp_min(1) if many else found)
        return lookup.join(batch, parts)

    def _look(self, asked: Sequence[tuple[Held, Tensor]]) -> list[Tensor]:
        """Rows [..., dim] of ids of any shape, of several tables."""
        flat = [ids.reshape(-1) for _, ids in asked]
        with torch.no_grad():
            sources = self._sources([h for h, _ in asked], flat)
        learning = self.module.training and torch.is_grad_enabled()
        found = []
        for (each, ids), own, (rows, place) in zip(asked, flat, sources, strict=True):
            looked = sparse.Looked.apply(self.anchor, rows, place, own, each.stash) if learning else F.embedding(place, rows)  # type: ignore[no-untyped-call]
            found.append(looked.view(*ids.shape, each.shape[1]))
        return found

    def _sources(self, asked: Sequence[Held], flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each column the rows to take from, and where in them each of its ids is."""
        apart: dict[str, list[Tensor]] = {}
        for each, ids in zip(asked, flat, strict=True):
            if each.shard is not None:
                apart.setdefault(each.path, []).append(ids)
        wanted = [h for h in dict.fromkeys(asked) if h.shard is not None]
        if wanted:
            self._fetch([(h, torch.unique(torch.cat(apart[h.path]))) for h in wanted])
        sources = []
        for each, ids in zip(asked, flat, strict=True):
            if each.fetched is None and each.parameter is None:
                distinct, place = torch.unique(ids, return_inverse=True)
                sources.append((each.rows(distinct), place))
            elif each.fetched is None:
                sources.append((each.weight.detach(), ids))
            else:
                sources.append((each.fetched[1], torch.searchsorted(each.fetched[0], ids)))
        if not self.module.training:  # what is fetched to score is kept for no step
            for each in wanted:
                each.fetched = None
        return sources

    def _fetch(self, wanted: Sequence[tuple[Held, Tensor]]) -> None:
        """Get the rows of these distinct ids from who holds them, but for those that are here already."""
        missing = []
        for each, ids in wanted:
            if each.fetched is not None:
                known = each.fetched[0]
                place = torch.searchsorted(known, ids).clamp_(max=max(0, len(known) - 1))
                ids = ids[known[place] != ids] if len(known) else ids
            missing.append((each, ids))
        route = _Route(missing, self.near)
        asked = route.ids()
        answer = [each.rows(ids) for each, ids in asked]
        rows = route.back(answer)
        if self.module.training:
            for j, (each, ids) in enumerate(asked):
                each.asked = each.asked or [[] for _ in range(self.near.size)]
                each.asked[j // len(missing)].append(ids)
        for (each, ids), got in zip(missing, rows, strict=True):
            if each.fetched is not None:
                ids, order = torch.cat([each.fetched[0], ids]).sort()
                got = torch.cat([each.fetched[1], got])[order]
            each.fetched = ids, got

    def _pushed(self, held: Sequence[Held]) -> list[Found]:
        """What all workers of the group have for this one's blocks: rows of the block, and their sums.

        Every fetched row is sent a sum, be it zero, in the order of ids: then its owner knows which it is.
        """
        if not held:
            return []
        size = range(self.near.size)
        parts: list[list[Tensor]] = [[] for _ in size]
        for each in held:
            assert each.fetched is not None
            ids, (rows, sums) = each.fetched[0], each.summed()
            values = torch.zeros(len(ids), each.shape[1]).index_copy_(0, torch.searchsorted(ids, rows), sums)
            for piece, (start, stop) in each.inside(ids):
                parts[piece.rank].append(values[start:stop, slice(*piece.columns)].flatten())
        mine = [[torch.cat(each.asked[k]).sort().values for each in held] for k in size]
        sizes = [[len(ids) * each.width for each, ids in zip(held, asked, strict=True)] for asked in mine]
        send = torch.cat([p for own in parts for p in own])
        got = self.near.numbers(send, [sum(map(len, own)) for own in parts], [sum(own) for own in sizes], "gradients")
        by_rank = torch.split(got, [sum(own) for own in sizes])
        split = [torch.split(part, own) for part, own in zip(by_rank, sizes, strict=True)]
        return [
            _added([mine[k][j] for k in size], [split[k][j].view(-1, each.width) for k in size], each.mine)
            for j, each in enumerate(held)
        ]


def _trainer(each: Held, kind: str, l2: float) -> sparse.Rows:
    """Who moves a table's rows."""
    if isinstance(each.module, RowwiseTable):
        return sparse.Rounded(each.module, kind, l2, each.path, each.mine.rows[0])
    return sparse.Matrix([each.module], kind, l2)


def _gradient(each: Held) -> Tensor | None:
    """Of a weight that was read as a matrix."""
    return None if each.parameter is None else each.parameter.grad


class _Route:
    """Which ids of which tables go to which rank, and the way back.

    One message to each rank holds, table after table, the ids of its block; how many they are of each table went before.
    """

    def __init__(self, wanted: Sequence[tuple[Held, Tensor]], wire: Wire) -> None:
        self.wanted, self.wire = wanted, wire
        self.segments: list[list[tuple[int, Piece, int, int]]] = [[] for _ in range(wire.size)]
        """For each rank: the place in ``wanted``, the block, and which of the ids are in it."""
        counts = torch.zeros(wire.size, len(wanted), dtype=torch.int64)
        for k, (each, ids) in enumerate(wanted):
            for piece, (start, stop) in each.inside(ids):
                self.segments[piece.rank].append((k, piece, start, stop))
                counts[piece.rank, k] = stop - start
        self.out = counts.tolist()
        self.into: list[list[int]] = wire.counts(counts).tolist()

    def ids(self) -> list[tuple[Held, Tensor]]:
        """The rows of this worker's blocks that each rank asks for, in turn."""
        parts = [self.wanted[k][1][start:stop] - piece.rows[0] for own in self.segments for k, piece, start, stop in own]
        send = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)]).int()
        got = self.wire.exchange(send, [sum(c) for c in self.out], [sum(c) for c in self.into], "ids")
        split = torch.split(got.long(), [n for counts in self.into for n in counts])
        self.asked = [(self.wanted[j % len(self.wanted)][0], ids) for j, ids in enumerate(split)]
        return self.asked

    def back(self, answer: Sequence[Tensor]) -> list[Tensor]:
        """Rows [n, dim] of the ids that were asked for, from the answers of each rank."""
        send = torch.cat([*(a.flatten() for a in answer), torch.zeros(0)])
        out = [sum(n * each.width for n, (each, _) in zip(counts, self.wanted, strict=True)) for counts in self.into]
        got = self.wire.numbers(send, out, self._numbers(), "rows")
        rows = [torch.empty(len(ids), each.shape[1]) for each, ids in self.wanted]
        at = 0
        for k, piece, start, stop in (s for own in self.segments for s in own):
            width = piece.columns[1] - piece.columns[0]
            n = (stop - start) * width
            rows[k][start:stop, slice(*piece.columns)] = got[at : at + n].view(-1, width)
            at += n
        return rows

    def _numbers(self) -> list[int]:
        """Numbers of the ids' blocks at each rank."""
        return [sum((stop - start) * (p.columns[1] - p.columns[0]) for _, p, start, stop in own) for own in self.segments]


def _spread(held: Sequence[Held], sums: Sequence[Found], wire: Wire) -> list[Found]:
    """The sums of all ranks of a wire, added up by row; all ranks hold the same of each table."""
    if not sums or wire.size == 1:
        return list(sums)
    counts = wire.all(torch.tensor([len(ids) for ids, _ in sums]), "counts").tolist()
    here = wire.rank
    copies = wire.size - 1
    ids = torch.cat([ids for ids, _ in sums]).int()
    values = torch.cat([v.flatten() for _, v in sums])
    widths = [v.shape[1] for _, v in sums]
    numbers = [sum(n * w for n, w in zip(c, widths, strict=True)) for c in counts]

    def around(mine: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        out = [len(mine) * (k != here) for k in range(wire.size)]
        into = [n * (k != here) for k, n in enumerate(sizes)]
        send = wire.numbers if mine.dtype == torch.float32 else wire.exchange
        got = list(torch.split(send(mine.repeat(copies), out, into, what), into))
        got[here] = mine
        return got

    every = around(ids, [sum(c) for c in counts], "ids")
    numbered = around(values, numbers, "gradients")
    split = [torch.split(part.long(), c) for part, c in zip(every, counts, strict=True)]
    sizes = [[n * w for n, w in zip(c, widths, strict=True)] for c in counts]
    valued = [torch.split(part, s) for part, s in zip(numbered, sizes, strict=True)]
    found = []
    for k, each in enumerate(held):
        parts = [(split[r][k], valued[r][k].view(-1, widths[k])) for r in range(wire.size)]
        found.append(_added([i for i, _ in parts], [v for _, v in parts], each.mine))
    return found


def _added(ids: Sequence[Tensor], values: Sequence[Tensor], piece: Piece) -> Found:
    """Distinct ids and the sums of their values, in the order of ranks."""
    every = torch.cat(list(ids))
    if not len(every):
        return every, torch.zeros(0, piece.columns[1] - piece.columns[0])
    return sparse.summed(every, torch.cat(list(values)))
