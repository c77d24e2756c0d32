"""Hot rows near the compute: the rows that are asked for most on the fast level, the rest where there is room.

Ids follow a power law: a few percent of a table's rows answer most lookups. So a table that lives on a slower level (on disk,
mapped, below memory; in memory, below a GPU) keeps copies of its most frequent rows on the fast one, and a model larger
than that one serves. The kernel's own page cache is the usual answer on disk: it keeps pages of 4096 bytes, 64 rows of 64,
for one hot row, and does not know which page another program's read is about to push out. An LRU of rows is another: one scan
over cold ids empties it, and each lookup writes.

Here the set is ranked by frequency, and changes only between windows of lookups: counts of the last window are added to those
before, halved each time, for twice as many rows as there is room for; so the set follows what is asked and a scan counts
once. Whatever the bound in bytes, it includes ids and counts. Rows are kept as they are stored (int8 rows stay int8), and
answers are those of the table itself, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import replace
from pennyweight.model.tables import HalfTable, Lookup, RowwiseTable, joined
from pennyweight.model.transform import Env, Transform

WINDOW = 1 << 14
"""Lookups between changes of the set; the first comes after a sixteenth of it."""
OWN = 8 + 2 * (8 + 4)
"""Bytes a hot row costs beside its numbers: its id, and ids and counts of the two rows ranked for it."""


@named("cache")
@dataclasses.dataclass(frozen=True)
class KeepHot(Transform):
    """Keep the most frequent rows of tables that live on a slower level on the fast one, within so many bytes."""

    bytes: int = 64 << 20

    family: ClassVar[Literal["accelerate"]] = "accelerate"
    stage: ClassVar[Literal["runtime"]] = "runtime"

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ConfigError(f"cache.bytes is {self.bytes}; give the bytes of fast memory for hot rows, or 0 for none")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with this room in its runtime; which tables it is for, the placement says."""
        return bundle.replace(runtime=dataclasses.replace(bundle.runtime, hot_bytes=self.bytes))

    def describe(self) -> str:
        """One plain sentence."""
        return f"keep {self.bytes:,} bytes of hot rows near the compute"


class HotTable(nn.Module):
    """A table whose most frequent rows have copies on ``device``; the others are read from where the table is.

    Args:
        table: plain fp32 rows (``nn.Embedding``), or rows in fp16, int8, int4 or int2 (``model.tables``).
        room: bytes on the fast device, all that is kept for it included.
        device: where ids come from and rows go to.
    """

    def __init__(self, table: nn.Module, room: int, device: str = "cpu") -> None:
        super().__init__()
        if not cacheable(table):
            raise ConfigError(f"a {type(table).__name__} has no rows to keep hot; only full tables have")
        self.table, self.device = table, torch.device(device)
        stored = self._stored
        self.size = min(len(stored), room // (stored[0].nbytes + OWN))
        """Rows that fit."""
        self._ids = torch.empty(0, dtype=torch.int64, device=self.device)
        self._rows = stored[:0].to(self.device)
        self._ranked = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.float32)
        self._window: list[Tensor] = []
        self._seen, self._due = 0, WINDOW // 16
        self.hits = self.lookups = 0

    @property
    def bytes(self) -> int:
        """Bytes on the fast device and of the counts."""
        return sum(t.nbytes for t in (self._ids, self._rows, self._ranked, self._counts))

    @property
    def hit_rate(self) -> float:
        """The share of lookups that a hot row answered."""
        return self.hits / self.lookups if self.lookups else 0.0

    def rank(self, ids: Tensor) -> None:
        """Start with these ids as the hot ones, most frequent first (a vocabulary's counts); lookups correct them."""
        self._ranked = ids[: 2 * self.size].to("cpu", torch.int64)
        self._counts = torch.linspace(1.0, 0.0, len(self._ranked) + 1)[:-1]
        self._take(self._ranked[: self.size])

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As the table: rows [..., dim] of ids of any shape, or joined rows [bags, dim]."""
        rows = self.look(input.reshape(-1))
        layer = self.table.layer if isinstance(self.table, Lookup) else None
        if layer is not None and layer.bag is not None:
            return joined(layer, input, rows, offsets, per_sample_weights)
        return rows.reshape(*input.shape, rows.shape[-1])

    def look(self, ids: Tensor) -> Tensor:
        """fp32 rows [n, dim] of ids [n]."""
        raw = self._gathered(ids.to(self.device, torch.int64))
        self._count(ids)
        if isinstance(self.table, nn.Embedding):
            return raw
        shell = _shell(self.table, raw)
        rows: Tensor = shell.look(torch.arange(len(raw), device=raw.device), shell.form())
        return rows

    @property
    def _stored(self) -> Tensor:
        stored: Tensor = self.table.weight if isinstance(self.table, nn.Embedding) else self.table.packed  # type: ignore[assignment]
        return stored.detach()

    def _gathered(self, ids: Tensor) -> Tensor:
        """Rows as they are stored, [n, bytes or numbers]."""
        self.lookups += len(ids)
        if not len(self._ids):
            return self._slow(ids)
        place = torch.searchsorted(self._ids, ids).clamp_(max=len(self._ids) - 1)
        hot = self._ids[place] == ids
        count = int(hot.sum())
        self.hits += count
        out = self._rows[place]
        if count < len(ids):
            cold = ~hot
            out[cold] = self._slow(ids[cold])
        return out

    def _slow(self, ids: Tensor) -> Tensor:
        stored = self._stored
        rows = stored[ids.to(stored.device)]
        if self.device.type == "cuda" and rows.device.type == "cpu":
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)

    def _count(self, ids: Tensor) -> None:
        if not self.size:
            return
        self._window.append(ids.detach().to("cpu", torch.int64, copy=True))
        self._seen += len(ids)
        if self._seen >= self._due:
            self._rerank()
            self._window, self._seen, self._due = [], 0, WINDOW

    def _rerank(self) -> None:
        """Counts of the window and halved ones of before; the most frequent are taken."""
        fresh, counts = torch.unique(torch.cat(self._window), return_counts=True)
        ids, at = torch.unique(torch.cat([self._ranked, fresh]), return_inverse=True)
        total = torch.zeros(len(ids)).index_add_(0, at, torch.cat([self._counts / 2, counts.float()]))
        best = total.argsort(descending=True, stable=True)[: 2 * self.size]
        self._ranked, self._counts = ids[best], total[best]
        self._take(self._ranked[: self.size])

    def _take(self, ids: Tensor) -> None:
        """Make these rows the hot ones; those that were are not read again."""
        wanted = ids.sort().values.to(self.device)
        before, self.lookups, self.hits = (self.lookups, self.hits), 0, 0
        self._rows = self._gathered(wanted)
        self._ids = wanted
        self.lookups, self.hits = before


def cacheable(table: nn.Module) -> bool:
    """Whether rows of a table can be kept hot."""
    return isinstance(table, (RowwiseTable, HalfTable)) or (type(table) is nn.Embedding and table.max_norm is None)


def _shell(table: nn.Module, raw: Tensor) -> Any:
    """A table of the same kind over these rows alone."""
    assert isinstance(table, Lookup)
    with torch.device("meta"):
        shell = type(table)(dataclasses.replace(table.layer, rows=max(1, len(raw)), padding=None))
    shell._buffers["packed"] = raw
    return shell


def keep_hot(module: nn.Module, tables: Mapping[str, str], home: str, room: int) -> dict[str, HotTable]:
    """Give each table that lives below ``home`` its share of ``room`` bytes by its size; the new tables by path."""
    below = [p for p, where in tables.items() if where != home and cacheable(module.get_submodule(p))] if room else []
    size = {
        p: sum(t.nbytes for t in (*module.get_submodule(p).parameters(), *module.get_submodule(p).buffers())) for p in below
    }
    made: dict[str, HotTable] = {}
    for path in below:
        table = module.get_submodule(path)
        table._forward_pre_hooks.clear()  # those that moved all ids and rows between devices: only cold ones move now
        table._forward_hooks.clear()
        made[path] = HotTable(table, room * size[path] // sum(size.values()), home)
        made[path].apart = True  # type: ignore[assignment]
        replace(module, path, made[path])
    return made


def hit_rate(hot: Mapping[str, HotTable]) -> float:
    """The share of all lookups in these tables that hot rows answered."""
    lookups = sum(t.lookups for t in hot.values())
    return sum(t.hits for t in hot.values()) / lookups if lookups else 0.0
