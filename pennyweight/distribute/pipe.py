"""Blocks that follow one another, each on one worker: a pipeline, for a model too deep for one device.

Stage ``k`` of ``S`` holds a run of the blocks, their gradients and their optimizer's state; nobody else does. Each worker's
rows of a batch are cut into micro-batches, which go through the stages one behind the other and come home to the worker whose
they are (GPipe, Huang et al. 2019); the way back is the same, backwards. All stages work at once but for ``S - 1`` turns of
``micro * workers + S - 1``. What a worker keeps for the way back is as much as without: its blocks of all rows, not all blocks
of its rows.

The result is that of one worker: random numbers are those of the whole batch, whichever stage draws them, since the state of
the generator travels with the first micro-batch; gradients are sums over all rows. ``torch.distributed.pipelining`` is the
known way. It splits a traced module and owns the loop; here the blocks of any module that calls them one after another are
taken as they are, and tables, losses and checkpoints stay what they were. Turns are taken in step, so the slowest stage sets
the pace, as it would anyway; 1F1B would keep fewer micro-batches at a time, which counts where activations do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pennyweight.core.errors import ConfigError
from pennyweight.distribute.wide import Part
from pennyweight.distribute.wire import Wire
from pennyweight.model import team
from pennyweight.model.placement import Piece, Placement, span

Run = Callable[[int, Tensor], Tensor]


def stack(module: nn.Module) -> str:
    """The path of the blocks that follow one another and hold most numbers.

    Raises:
        ConfigError: there are none.
    """
    found = {
        path: sum(p.numel() for p in child.parameters())
        for path, child in module.named_modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1 and len({type(c) for c in child}) == 1
    }
    path = max(found, key=lambda p: found[p], default="")
    if not path or not found[path]:
        raise ConfigError(
            f"{type(module).__name__} has no list of blocks of one kind that follow one another; a pipeline is for deep models "
            "(SASRec), others take --placement hybrid"
        )
    return path


def cut(module: nn.Module, placement: Placement, rank: int) -> dict[str, Part]:
    """Leave of a pipeline's blocks those of this worker's stage; what it holds by the names of parameters.

    Raises:
        ConfigError: the placement names no list of blocks, or one that cannot be cut so.
    """
    path = placement.pipeline
    if not path:
        return {}
    blocks = dict(module.named_modules()).get(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) < 2:
        raise ConfigError(f"the placement makes a pipeline of {path}, which is no list of two blocks or more")
    wrong = next((p for p in placement.dense if p.startswith(f"{path}.")), None)
    if wrong is not None:
        raise ConfigError(f"the placement cuts {wrong}, which is in its pipeline {path}; leave one of them out")
    if any(isinstance(m, _BatchNorm) for m in blocks.modules()):
        raise ConfigError(f"{path} has batch norms, which need all rows at once; a pipeline sees some at a time")
    found = {}
    for place, block in enumerate(blocks):
        mine = _stage(place, len(blocks), placement.group) == rank
        for child_path, child in block.named_modules():
            for name, parameter in list(child.named_parameters(recurse=False)):
                key = ".".join(filter(None, (path, str(place), child_path, name)))
                if parameter.dim() not in (1, 2):
                    raise ConfigError(f"{key} is {tuple(parameter.shape)}; a pipeline's weights are vectors and matrices")
                shape = tuple(parameter.shape)
                held = parameter
                if not mine:
                    held = nn.Parameter(parameter.detach()[:0].clone(), parameter.requires_grad)
                    setattr(child, name, held)
                across = shape[1] if len(shape) > 1 else 1
                found[key] = Part(shape, Piece(rank, (0, len(held)), (0, across)), "row", held)
    return found


def _stages(blocks: int, workers: int) -> int:
    return min(blocks, workers)


def _stage(place: int, blocks: int, workers: int) -> int:
    """The stage, which is the rank, that holds a block."""
    stages = _stages(blocks, workers)
    return next(k for k in range(stages) if place < span(blocks, stages, k)[1])


@dataclasses.dataclass(frozen=True)
class Micro:
    """Some rows of one worker."""

    home: int
    rows: tuple[int, int]
    """Of those of its worker."""
    at: int
    """Where they begin among the rows of all, in the order of ranks."""
    part: team.Part | None
    """Which of the rows of all groups they are."""

    @property
    def height(self) -> int:
        """Rows."""
        return self.rows[1] - self.rows[0]


class Pipe:
    """The pipeline of a module whose blocks are cut already, until ``release()``."""

    def __init__(self, module: nn.Module, placement: Placement, wire: Wire) -> None:
        self.path, self.micro, self.wire = placement.pipeline, placement.micro, wire
        self.blocks = list(cast(nn.ModuleList, module.get_submodule(placement.pipeline)))
        self.stages = _stages(len(self.blocks), wire.size)
        first, last = span(len(self.blocks), self.stages, wire.rank) if wire.rank < self.stages else (0, 0)
        self.mine = self.blocks[first:last]
        self.empty = [p for b in self.blocks if b not in self.mine for p in b.parameters() if p.requires_grad]
        self.anchor = torch.zeros(1, requires_grad=True)  # the way back leads here even where nothing before is trained
        self.answer: Tensor | None = None
        self.blocks[0].__dict__["forward"] = self._all
        for block in self.blocks[1:]:
            block.__dict__["forward"] = functools.partial(self._passed, block)

    def release(self) -> None:
        """Leave the blocks as they are, but for those that others hold."""
        for block in self.blocks:
            block.__dict__.pop("forward", None)

    def _all(self, x: Tensor, *more: Any) -> Tensor:
        """What all blocks answer, for this worker's rows."""
        if any(isinstance(each, Tensor) and each.requires_grad for each in more):
            raise ConfigError(
                f"{self.path} takes more that is trained than what goes from block to block; it makes no pipeline"
            )
        y: Tensor = _Piped.apply(x, self.anchor, self, more, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        self.answer = y
        return y

    def _passed(self, block: nn.Module, x: Tensor, *_: Any) -> Tensor:
        """A block that has been gone through already."""
        if x is not self.answer:
            raise ConfigError(f"{self.path} is not called one block after another, each on what the last gave: no pipeline")
        if block is self.blocks[-1]:
            self.answer = None
        return x

    def forward(self, x: Tensor, more: Sequence[Any], build: bool) -> tuple[Tensor, Any]:
        """The answers to this worker's rows, and what the way back needs."""
        micros = self._micros(len(x))
        every = [self._rows(each, len(x)) for each in more]
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        start = final = torch.get_rng_state()

        def run(m: int, given: Tensor) -> Tensor:
            micro = micros[m]
            rows = slice(micro.at, micro.at + micro.height)
            seen = [each[rows] if cut else each for each, cut in every]
            torch.set_rng_state(start)
            with team.computing(micro.part), torch.set_grad_enabled(build):
                given = given.detach().requires_grad_(build)
                out = given
                for block in self.mine:
                    out = cast(Tensor, type(block).forward(block, out, *seen))
            if out.shape != given.shape:
                raise ConfigError(
                    f"a block of {self.path} makes {tuple(out.shape)} of {tuple(given.shape)}; a pipeline's keep the shape"
                )
            if build:
                kept[m] = given, out
            return out.detach()

        def ticked(tick: int) -> None:
            """Hand the generator's state on to the next stage, and from the last one to all."""
            nonlocal start, final
            if tick < self.stages:
                final = self.wire.all(torch.get_rng_state(), "pipeline")[tick].clone()  # a view is read from its start
                start = final if tick == self.wire.rank - 1 else start

        ranks = list(range(self.stages))
        back = self._flow(micros, ranks, x, run, ticked)
        torch.set_rng_state(final)
        return back, (micros, kept)

    def backward(self, gradient: Tensor, held: Any) -> Tensor:
        """The gradient of this worker's rows; those of this stage's weights are added to what they have."""
        micros, kept = held

        def run(m: int, given: Tensor) -> Tensor:
            entered, out = kept.pop(m)
            torch.autograd.backward(out, given)
            gradient: Tensor | None = entered.grad
            assert gradient is not None
            return gradient

        ranks = list(range(self.stages))[::-1]
        found = self._flow(micros[::-1], ranks, gradient.contiguous(), lambda m, g: run(len(micros) - 1 - m, g))
        for parameter in self.empty:
            parameter.grad = torch.zeros_like(parameter)
        return found

    def _micros(self, rows: int) -> list[Micro]:
        """The micro-batches of all workers."""
        part = team.part()
        spans = [*(part.spans if part is not None else ()), (0, 0), (0, 0)][:2]
        mine = [rows, part.total if part is not None else -1, *spans[0], *spans[1]]
        made: list[Micro] = []
        at = 0
        for home, told in enumerate(self.wire.all(torch.tensor(mine), "counts").tolist()):
            count, total, *ends = told
            whole = None if total < 0 else team.Part(((ends[0], ends[1]), (ends[2], ends[3])), total)
            for k in range(self.micro):
                low, high = span(count, self.micro, k)
                made.append(Micro(home, (low, high), at + low, None if whole is None else whole.cut(low, high)))
            at += count
        return made

    def _rows(self, each: Any, rows: int) -> tuple[Any, bool]:
        """What a block takes beside its input: of the rows of all workers where it has a row for each, else as it is."""
        if not isinstance(each, Tensor) or not each.dim() or len(each) != rows:
            return each, False
        plain = each.byte() if each.dtype == torch.bool else each
        return self.wire.rows(plain, "pipeline").to(each.dtype), True

    def _flow(
        self,
        micros: Sequence[Micro],
        ranks: Sequence[int],
        mine: Tensor,
        run: Run,
        ticked: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Micro-batches through the stages, in this order, from home and back; what comes back of this worker's rows."""
        tail, me = mine.shape[1:], self.wire.rank
        back = torch.empty_like(mine)
        made: dict[int, Tensor] = {}
        stage = ranks.index(me) if me in ranks else None
        for tick in range(len(micros) + len(ranks)):
            came: dict[int, Tensor] = {}
            moves = list(_moves(micros, ranks, tick))
            send: list[list[Tensor]] = [[] for _ in range(self.wire.size)]
            into: list[list[tuple[int, int]]] = [[] for _ in range(self.wire.size)]
            for m, source, target, step in moves:
                micro = micros[m]
                if source == me:
                    given = mine[slice(*micro.rows)] if step == 0 else made.pop(m)
                    if target == me:
                        self._take(m, step, given, micro, len(ranks), came, back)
                    else:
                        send[target].append(given.reshape(-1))
                elif target == me:
                    into[source].append((m, step))
            sizes = [[micros[m].height * tail.numel() for m, _ in each] for each in into]
            flat = torch.cat([t for each in send for t in each]) if any(send) else mine.new_empty(0)
            out = [sum(t.numel() for t in each) for each in send]
            got = self.wire.numbers(flat, out, [sum(each) for each in sizes], "pipeline")
            parts = iter(torch.split(got, [n for each in sizes for n in each]))
            for m, step in (pair for each in into for pair in each):
                self._take(m, step, next(parts).view(micros[m].height, *tail), micros[m], len(ranks), came, back)
            if stage is not None and 0 <= tick - stage < len(micros):
                made[tick - stage] = run(tick - stage, came[tick - stage])
            ticked(tick)
        return back

    def _take(self, m: int, step: int, given: Tensor, micro: Micro, stages: int, came: dict[int, Tensor], back: Tensor) -> None:
        if step == stages:
            back[slice(*micro.rows)] = given
        else:
            came[m] = given


def _moves(micros: Sequence[Micro], ranks: Sequence[int], tick: int) -> Iterator[tuple[int, int, int, int]]:
    """What changes hands before a turn: micro-batch, from whom, to whom, and how many stages it has been through."""
    for step in range(len(ranks) + 1):
        m = tick - step
        if 0 <= m < len(micros):
            source = micros[m].home if step == 0 else ranks[step - 1]
            target = micros[m].home if step == len(ranks) else ranks[step]
            yield m, source, target, step


class _Piped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, pipe: Pipe, more: Sequence[Any], build: bool) -> Tensor:
        y, held = pipe.forward(x.detach(), more, build)
        ctx.pipe, ctx.held = pipe, held
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.pipe.backward(gradients[0], ctx.held), None, None, None, None
