"""Workers that train one model as one: ``model.train.Workers`` over ``torch.distributed`` and a placement.

part        rows of a batch are parted evenly, in order; norms and dropout see all of them   (split)
lend        tables are cut or whole, and exchange distinct rows                              (shard)
expect      gradients of dense layers are added up in buckets, meanwhile                     (reduce)
agree       the loss, wishes to stop or save, and every worker's time in this step: one small sum a step
keeper      sharded checkpoints                                                              (checkpoint)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.distribute import pipe, shard, wide
from pennyweight.distribute.blocks import Fill
from pennyweight.distribute.checkpoint import Folder
from pennyweight.distribute.codec import Codec, Kind
from pennyweight.distribute.reduce import Buckets
from pennyweight.distribute.shard import Held
from pennyweight.distribute.split import Split
from pennyweight.distribute.wire import Wire
from pennyweight.model import team
from pennyweight.model.placement import Placement
from pennyweight.model.train import Keeper, Recipe, Tables

WHOLE = 1 << 16
"""Weight of a worker's even part of a batch."""
WEIGHED = 20
"""Steps after which parts are weighed anew."""


@dataclasses.dataclass
class Steps:
    """What was counted of the steps so far, the same on all workers but for ``bytes``."""

    done: int = 0
    seconds: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Of each worker in all steps together, waiting for others left out."""
    bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """That this worker sent in steps, by what for; not in scoring and in checkpoints."""


class Wires:
    """The groups of workers, and what they sent.

    Args:
        replicas: groups that each hold everything.
        timeout: how long an answer is waited for.
    """

    def __init__(self, replicas: int = 1, timeout: datetime.timedelta | None = None) -> None:
        wait = timeout or dist.default_pg_timeout
        self.sent: collections.Counter[str] = collections.Counter()
        self.world = Wire(None, self.sent, wait)
        self.near, self.across = self.world, Wire("alone", self.sent, wait)
        if replicas > 1:
            rank, size, n = dist.get_rank(), dist.get_world_size(), dist.get_world_size() // replicas
            groups = [dist.new_group(list(range(g * n, g * n + n)), wait) for g in range(replicas)]
            peers = [dist.new_group(list(range(k, size, n)), wait) for k in range(n)]
            self.near, self.across = (Wire(g, self.sent, wait) for g in (groups[rank // n], peers[rank % n]))
        self.side = dist.new_group(timeout=wait)
        """For what goes on beside the steps: checkpoints."""


class Crew:
    """This process as one of the workers; the process group is there already.

    Args:
        module: to be trained; its cut tables are left as this worker's blocks.
        placement: who holds what.
        wires: between the workers, for as many replicas.
        every: steps between two checkpoints inside an epoch; 0 leaves it to the clock.
        balance: workers that are slow get fewer rows of each batch; the sums are the same, their order then depends on time.
        traffic: how rows and gradients are written on the way.
        fills: how tables that lie on no device are filled.
        lean: nothing is held twice: checkpoints are written from where the weights lie, and the best weights lie on disk.
        int8: tables become packed ones, whose rows are rounded as they are trained.

    Raises:
        ConfigError: the placement is for another number of workers, or cuts what cannot be.
    """

    def __init__(
        self,
        module: nn.Module,
        placement: Placement,
        wires: Wires,
        *,
        every: int = 0,
        balance: bool = False,
        traffic: Kind = "fp32",
        fills: Mapping[int, Fill] | None = None,
        lean: bool = False,
        int8: bool = False,
    ) -> None:
        self.rank, self.size, self.every, self.lean = dist.get_rank(), dist.get_world_size(), every, lean
        if placement.world_size != self.size:
            raise ConfigError(f"the placement is for {placement.world_size} workers, and {self.size} are here")
        self.placement, self.steps = placement, Steps(seconds=torch.zeros(self.size, dtype=torch.float64))
        self.balance, self.weights = balance, [WHOLE] * self.size
        self.weighed = 0, self.steps.seconds.clone()
        self.told = 0, self.steps.seconds.clone()
        self.sent, self.side = wires.sent, wires.side
        self.world, self.near, self.across = wires.world, wires.near, wires.across
        self.generator = torch.Generator()
        for wire in (self.world, self.near, self.across):
            wire.codec, wire.generator = Codec(traffic), self.generator
        self.held = shard.held(module, placement, self.near.rank)
        shard.cut(self.held, fills or {})
        packed = shard.pack(module, self.held) if int8 else {}
        of = {id(h.module): h for h in self.held}
        modules = module.named_modules(remove_duplicate=False)
        self.names: dict[str, Held | wide.Part] = {f"{path}.weight": of[id(m)] for path, m in modules if id(m) in of}
        self.names |= packed
        self.wide = wide.cut(module, placement, self.near.rank)
        self.wide |= pipe.cut(module, placement, self.near.rank)
        self.names |= self.wide
        self.shapes: Mapping[str, tuple[int, ...]] = {name: part.shape for name, part in self.names.items()}
        self.folder: Folder | None = None
        self.buckets: Buckets | None = None
        self.began = time.perf_counter()
        self.waited = 0.0

    def share(self, n: int) -> tuple[int, int]:
        """This worker's of ``n`` things: as many as any other's, or by the workers' paces."""
        before, total = sum(self.weights[: self.rank]), sum(self.weights)
        return n * before // total, n * (before + self.weights[self.rank]) // total

    def counted(self, n: int) -> team.Part:
        """The part that ``n`` rows here are of all."""
        counts = self.world.all(torch.tensor(n), "counts").tolist()
        start = sum(counts[: self.rank])
        return team.Part(((start, start + n),), sum(counts))

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all workers."""
        return self.world.rows(rows, "gathered")

    def lend(self, module: nn.Module, kind: str, recipe: Recipe) -> Tables:
        """Take over a module's norms, dropout and tables."""
        if recipe.batch < self.size:
            raise ConfigError(
                f"a batch of {recipe.batch} rows cannot be parted among {self.size} workers; give at least a row each"
            )
        if self.wide and recipe.precision == "bf16":
            raise ConfigError(
                "dense layers that are cut or in a pipeline multiply in fp32; train with --precision fp32, or leave them whole"
            )
        self.split = Split(module, self.world)
        self.layers = wide.Wide(module, self.placement.dense, self.near)
        self.pipe = pipe.Pipe(module, self.placement, self.near) if self.placement.pipeline else None
        self.cut = shard.Cut(module, self.held, kind, recipe.embedding_l2, self.near, self.across, self.world)
        return _Lent(self)

    def part(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """This worker's part of a batch."""
        self._begin()
        return self.split.part(rows)

    def expect(self, params: Sequence[nn.Parameter]) -> None:
        """Listen for the gradients of dense layers."""
        if self.buckets is None:
            apart = {id(h.parameter) for h in self.held} | {id(part.parameter) for part in self.wide.values()}
            self.buckets = Buckets([p for p in params if id(p) not in apart], self.world)
        self.buckets.begin()

    def settle(self) -> None:
        """Wait for their sums."""
        assert self.buckets is not None
        self.buckets.settle()
        if self.across.size > 1:
            for part in self.wide.values():
                if part.parameter.grad is not None:
                    self.across.sum(part.parameter.grad, "dense")

    def norm(self, whole: Sequence[Tensor]) -> float:
        """The norm of all gradients; ``whole`` may hold blocks of cut tables, which are told apart."""
        blocks = [part.parameter.grad for part in self.wide.values() if part.parameter.grad is not None]
        apart = {id(h.parameter.grad) for h in self.held if h.parameter is not None} | set(map(id, blocks))
        mine, same = self.cut.squares()
        mine = mine + sum(g.square().sum() for g in blocks)
        self.near.sum(mine, "norms")
        dense = sum((g.square().sum() for g in whole if id(g) not in apart), torch.zeros(()))
        return float((mine + same + dense).sqrt())

    def agree(self, loss: Tensor, wishes: tuple[bool, ...]) -> tuple[Tensor, tuple[bool, ...]]:
        """Add up the loss, take up what any worker wishes, and learn how long each one's step took."""
        told = torch.zeros(1 + len(wishes) + self.size, dtype=torch.float64)
        told[0] = loss
        told[1 : 1 + len(wishes)] = torch.tensor(wishes, dtype=torch.float64)
        told[1 + len(wishes) + self.rank] = time.perf_counter() - self.began - (self._waited() - self.waited)
        self.world.sum(told, "agreement")
        self.steps.done += 1
        self.steps.seconds += told[1 + len(wishes) :]
        self.steps.bytes.update(self.sent - self.before)
        if self.balance and self.steps.done - self.weighed[0] >= WEIGHED:
            self._weigh()
        return told[0].clone(), tuple(bool(w) for w in told[1 : 1 + len(wishes)])

    def _weigh(self) -> None:
        """Give each worker rows by its pace in the last steps, half of the way there, and none less than a quarter of its part.

        All workers know all times, so all come to the same.
        """
        seconds = (self.steps.seconds - self.weighed[1]).tolist()
        pace = [w / max(s, 1e-9) for w, s in zip(self.weights, seconds, strict=True)]
        fair = [WHOLE * self.size * p / sum(pace) for p in pace]
        self.weights = [max(WHOLE // 4, round((w + f) / 2)) for w, f in zip(self.weights, fair, strict=True)]
        self.weighed = self.steps.done, self.steps.seconds.clone()

    def paces(self) -> tuple[float, ...]:
        """Milliseconds a step of each worker since this was asked last."""
        done, seconds = self.told
        self.told = self.steps.done, self.steps.seconds.clone()
        steps = max(1, self.steps.done - done)
        return tuple(round(1000 * s / steps, 3) for s in (self.steps.seconds - seconds).tolist())

    def keeper(self, path: Path) -> Keeper:
        """Sharded checkpoints in a folder."""
        self.folder = Folder(path, self.names, self.side, self.lean)
        return self.folder

    def shelf(self, path: Path) -> Keeper | None:
        """A folder beside the checkpoints for the best weights, where memory is short."""
        return Folder(path.with_name("best"), self.names, self.side, True) if self.lean else None

    def close(self) -> None:
        """Wait for what is being written."""
        if self.folder is not None:
            self.folder.wait()

    def _begin(self) -> None:
        self.generator.manual_seed(self.steps.done * self.size + self.rank)
        self.began, self.waited, self.before = time.perf_counter(), self._waited(), self.sent.copy()

    def _waited(self) -> float:
        return sum(w.waited for w in {id(w): w for w in (self.world, self.near, self.across)}.values())


class _Lent:
    """A crew's tables, which give back the norms too."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        cut = crew.cut
        self.clear, self.gather, self.step = cut.clear, cut.gather, cut.step
        self.state, self.restore = cut.state, cut.restore

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.crew.cut.parameters

    def release(self) -> None:
        """Leave the module as it was found, but for its blocks."""
        self.crew.cut.release()
        self.crew.split.release()
        self.crew.layers.release()
        if self.crew.pipe is not None:
            self.crew.pipe.release()
        if self.crew.buckets is not None:
            self.crew.buckets.release()
            self.crew.buckets = None
