"""Placement on one machine: which table lives on which device.

A table's rows are read at random, a few for each example, so what a fast device buys is traffic and what it costs is bytes.
Tables go in order of *traffic per byte* (rows looked up for an example / rows held), each to the fastest device with room
left: the GPUs, then the CPU's memory, then, where allowed, the disk, memory-mapped. The dense layers are read whole for
every example: they go first, and are counted on the CPU too, through which they are loaded. This greedy rule is at most one
table from the best split; an integer program would find that table, and could not be explained in a line.

A table is never cut here; over several workers, ``distribute.planner`` does that. What is assumed and not measured: that a GPU
is faster for what fits in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

from torch import nn

from pennyweight.core.budget import size
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.hardware import Topology
from pennyweight.model.bundle import Bundle
from pennyweight.model.layers import key
from pennyweight.model.spec import build, leaves
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform


@dataclasses.dataclass(frozen=True)
class Held:
    """One embedding table of a model, as far as placing it needs to know."""

    path: str
    bytes: int
    rows: int
    lookups: int
    """Rows looked up for one example."""
    table: Table | None
    """What it is, where it is a kind that can be compressed."""

    @property
    def traffic(self) -> float:
        """Rows looked up for an example, for each row held: the share of its bytes that an example reads."""
        return self.lookups / self.rows


@named("place")
@dataclasses.dataclass(frozen=True)
class Place(Transform):
    """Put each table on the fastest device that has room for it; the topology comes from ``env``."""

    limit_bytes: int = 0
    """Memory the weights may take on the CPU, as a budget says; 0 is all there is."""
    reserve: float = 0.1
    """Share of each device's memory that is left free, for activations and the rest of the process."""
    disk: bool = False
    """Tables that fit nowhere are memory-mapped from disk: no memory, but a page read for a cold row."""

    family: ClassVar[Literal["distribute"]] = "distribute"
    stage: ClassVar[Literal["placement"]] = "placement"

    def __post_init__(self) -> None:
        if self.limit_bytes < 0 or not 0 <= self.reserve < 1:
            raise ConfigError(f"limit_bytes {self.limit_bytes} must not be negative, and reserve {self.reserve} is from 0 to 1")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with every table named in its placement, so that none can be forgotten in silence.

        Raises:
            PlanError: the tables do not fit; the message says by how much and names four ways out.
        """
        held = tables(bundle, env.allow)
        dense = bundle.model.bytes - sum(t.bytes for t in held)
        room = self.room(cast(Topology, env.need("topology", self)), dense)
        placed = {t.path: _first(t, room) for t in held}
        homeless = [t for t in held if placed[t.path] == "disk"]
        if room["cpu"] < 0 or (homeless and not self.disk):
            rest = [t for t in held if placed[t.path] in ("cpu", "disk")]
            raise PlanError(self._too_large(rest, homeless, dense, sum(t.bytes for t in homeless) - room["cpu"]))
        return bundle.replace(placement=dataclasses.replace(bundle.placement, tables=dict(sorted(placed.items()))))

    def room(self, topology: Topology, dense: int) -> dict[str, int]:
        """Bytes for tables on each device, the fastest first; less than none on the CPU where ``dense`` bytes do not fit."""
        free = {d.name: int(d.memory_bytes * (1 - self.reserve)) for d in (*topology.gpus, topology.cpu)}
        if self.limit_bytes:
            free["cpu"] = min(free["cpu"], self.limit_bytes)
        home = next(iter(free))
        if free[home] < dense:  # a GPU too small for the dense layers is no home for the model
            home, free = "cpu", {"cpu": free["cpu"]}
        return {name: bytes - dense * (name in (home, "cpu")) for name, bytes in free.items()}

    def describe(self) -> str:
        """One plain sentence."""
        limit = f" within {size(self.limit_bytes)} of memory" if self.limit_bytes else ""
        return f"place tables on the fastest device with room{limit}" + (", the rest mapped from disk" if self.disk else "")

    def _too_large(self, rest: Sequence[Held], homeless: Sequence[Held], dense: int, short: int) -> str:
        have = dense + sum(t.bytes for t in rest) - short
        setting = "Place(limit_bytes=...)" if self.limit_bytes else f"memory less a reserve of {self.reserve:.0%}"
        remedies = (
            f"quantize the tables ({_quantized(rest, short)})",
            f"have {size(have + short)} in place of {size(have)} for the weights ({setting})",
            f"Place(disk=True) ({_on_disk(homeless, dense, have)})",
            f"use smaller dims ({_narrower(rest, short)})",
        )
        ways = ", ".join(f"{n}) {text}" for n, text in enumerate(remedies, 1))
        return f"the weights that go to the CPU take {size(have + short)}, {size(short)} more than there is. Ways out: {ways}"


def tables(bundle: Bundle, allow: Sequence[str] = ()) -> list[Held]:
    """The embedding tables of a bundle's model, those with most traffic per byte first."""
    state = bundle.model.state
    found = []
    for path, module in leaves(build(bundle.model.spec, allow)):
        table = Table.of(module)
        if table is None and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        held = sum(t.numel() * t.element_size() for k, t in state.items() if k.startswith(f"{path}."))
        rows = table.rows if table else cast(nn.Embedding, module).num_embeddings
        found.append(Held(path, held, rows, _lookups(bundle, path), table))
    return sorted(found, key=lambda t: (-t.traffic, t.path))


def _lookups(bundle: Bundle, path: str) -> int:
    """Rows of a table that an example looks up: one a column, or the length of a sequence; one where no schema is known."""
    if bundle.catalog is None:
        return 1
    name = path.rpartition(".")[2]
    return sum(max(1, c.length) for c in bundle.catalog.schema.features if key(c.table) == name) or 1


def _first(table: Held, room: dict[str, int]) -> str:
    """Take room for a table on the first device that has it."""
    device = next((name for name, bytes in room.items() if bytes >= table.bytes), "disk")
    if device in room:
        room[device] -= table.bytes
    return device


def _quantized(rest: Sequence[Held], short: int) -> str:
    def saved(data_type: Literal["int8", "int4"]) -> int:
        kinds = [(t.bytes, dataclasses.replace(t.table, data_type=data_type).bytes()) for t in rest if t.table]
        return sum(max(0, now - then) for now, then in kinds)

    outcomes = ((name, saved(name) - short) for name in ("int8", "int4"))
    return ", ".join(f"{name} {'fits' if over >= 0 else f'still {size(-over)} too much'}" for name, over in outcomes)


def _on_disk(homeless: Sequence[Held], dense: int, have: int) -> str:
    if dense > have:
        return f"not enough: the dense layers alone take {size(dense)}"
    return f"{size(sum(t.bytes for t in homeless))} mapped from disk: {', '.join(t.path for t in homeless)}"


def _narrower(rest: Sequence[Held], short: int) -> str:
    dim = max((t.table.dim for t in rest if t.table), default=0)
    total = sum(t.bytes for t in rest)
    narrow = int(dim * (1 - short / total)) if total else 0
    return f"{dim} to {narrow}" if narrow >= 1 else "no dim is small enough: the tables are not what is too large"
