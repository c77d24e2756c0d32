"""Which worker or device holds what: the one value that planning writes and training, checkpoints and serving read.

A table is *whole* on every worker (data parallel) unless ``shards`` names it; then it is one of five cuts over the workers of
a group: one owner (``table``), blocks of rows, blocks of columns, or both at once (``grid``). Dense layers are whole unless
``dense`` names them, or they lie in a ``pipeline``. With ``replicas`` the world is that many groups of consecutive ranks, each
of which holds everything once: sharded inside a group (a host), replicated across (2D). So data parallel, model parallel,
hybrid and 2D are one small value and not four modes; TorchRec's plan, with a kernel and a device a shard, is the known
alternative.

A cut is even to one row or column: block ``k`` of ``n`` over ``w`` begins at ``n * k // w``. No block needs to be stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from pennyweight.core.errors import ConfigError

Kind = Literal["table", "row", "column", "grid"]
"""Ways to cut a table; one that is not cut is whole on every worker."""
Cut = Literal["column", "row"]
"""Ways to cut a dense layer: its outputs (``column``) or its inputs (``row``), as Megatron and DTensor call them."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block of a table that one worker holds."""

    rank: int
    """Inside the group."""
    rows: tuple[int, int]
    """First row and the one after the last."""
    columns: tuple[int, int]

    @property
    def numbers(self) -> int:
        """Numbers in it."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclasses.dataclass(frozen=True)
class Shard:
    """How one table is cut over the workers of a group."""

    kind: Kind
    ranks: tuple[int, ...]
    """Who holds its blocks, in order (ranks inside a group); of a grid, all row blocks of the first columns come first."""
    columns: int = 1
    """Of a grid: blocks of columns; ``len(ranks) / columns`` blocks of rows."""

    def __post_init__(self) -> None:
        said = f"shard {self.kind} over ranks {', '.join(map(str, self.ranks))}"
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ConfigError(f"{said}: name one rank or several from 0, each once")
        if self.kind == "table" and len(self.ranks) > 1:
            raise ConfigError(f"{said}: a table held whole has one owner; cut it by row or column, or leave it out of shards")
        if self.columns < 1 or len(self.ranks) % self.columns or (self.columns > 1 and self.kind != "grid"):
            raise ConfigError(f"{said}: {self.columns} blocks of columns; only a grid has them, and they divide its ranks")

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        if self.kind == "grid":
            return len(self.ranks) // self.columns, self.columns
        return (1, len(self.ranks)) if self.kind == "column" else (len(self.ranks), 1)

    def pieces(self, rows: int, dim: int) -> tuple[Piece, ...]:
        """The blocks of a table [rows, dim], in the order of ``ranks``."""
        down, across = self.blocks
        return tuple(
            Piece(self.ranks[c * down + r], span(rows, down, r), span(dim, across, c))
            for c in range(across)
            for r in range(down)
        )


def span(n: int, parts: int, k: int) -> tuple[int, int]:
    """Where part ``k`` of ``n`` things begins and ends."""
    return n * k // parts, n * (k + 1) // parts


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which worker or device holds what."""

    world_size: int = 1
    """Workers, in all groups together."""
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Table path -> where it lives: ``cpu``, ``disk`` (memory-mapped) or ``cuda:0``; one not named is on ``cpu``."""
    shards: Mapping[str, Shard] = dataclasses.field(default_factory=dict)
    """Table path -> how it is cut; one not named is whole on every worker."""
    dense: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    """Dense layer's path -> how it is cut over a group; one not named is whole on every worker."""
    pipeline: str = ""
    """Path of a list of blocks that follow one another, which a group's workers hold in turn; empty is none."""
    micro: int = 4
    """Of a pipeline: micro-batches that each worker's rows are cut into."""
    replicas: int = 1
    """Groups of ``world_size / replicas`` consecutive ranks that each hold everything."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.replicas < 1 or self.world_size % self.replicas:
            raise ConfigError(
                f"{self.world_size} workers in {self.replicas} replicas: give a world size of 1 or more, which they divide"
            )
        if self.micro < 1:
            raise ConfigError(f"{self.micro} micro-batches: give 1 or more")
        for path, shard in self.shards.items():
            if max(shard.ranks) >= self.group:
                raise ConfigError(f"{path}: shard on rank {max(shard.ranks)}, but a group has ranks 0 to {self.group - 1}")

    @property
    def group(self) -> int:
        """Workers of a group: ranks ``g * group`` to ``(g + 1) * group - 1`` are group ``g``."""
        return self.world_size // self.replicas

    def held(self, path: str, rows: int, dim: int) -> Iterator[Piece]:
        """The blocks of a table in a group: of one that is whole on every worker, all of it a rank."""
        if path in self.shards:
            yield from self.shards[path].pieces(rows, dim)
        else:
            yield from (Piece(rank, (0, rows), (0, dim)) for rank in range(self.group))
