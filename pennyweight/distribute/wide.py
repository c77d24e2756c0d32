"""Wide dense layers cut over workers: each holds some of the outputs (``column``) or of the inputs (``row``) of a layer.

Workers compute different rows of a batch, and a cut layer needs all rows. So on the way in and out of a layer numbers are dealt
anew, by rows or by columns:

    column   the inputs of all rows are gathered, each worker computes its outputs, which are dealt back by rows
    row      inputs are dealt by columns, each worker computes its share of all sums, which are added up by rows

A layer's gradient is then that of the whole batch already, and its optimizer's state is cut with it. Any ``nn.Linear`` of any
module can be cut, by itself. Megatron's pairs (and DTensor's) leave out what is dealt between a ``column`` and a ``row`` layer,
which needs what lies between (norms, dropout) to be cut too; and they train the same rows on all workers of a group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.distribute.wire import Wire
from pennyweight.model.placement import Cut, Piece, Placement, span


@dataclasses.dataclass(eq=False)
class Part:
    """A worker's block of a layer's weight or bias, or of a table's packed rows."""

    shape: tuple[int, ...]
    """Of the whole."""
    mine: Piece
    shard: Cut | None
    """None: all of it, on every worker."""
    parameter: Tensor


def cut(module: nn.Module, placement: Placement, rank: int) -> dict[str, Part]:
    """Leave of each dense layer that a placement cuts this worker's block; the blocks by the names of parameters.

    Raises:
        ConfigError: the placement names a layer that is not there, or one with fewer outputs or inputs than workers.
    """
    found = {}
    layers = dict(module.named_modules())
    for path, kind in placement.dense.items():
        layer = layers.get(path)
        if type(layer) is not nn.Linear:
            known = ", ".join(p for p, m in layers.items() if type(m) is nn.Linear) or "none"
            raise ConfigError(f"the placement cuts {path}, which is no dense layer here; dense layers: {known}")
        outputs, inputs = layer.weight.shape
        many = outputs if kind == "column" else inputs
        if many < placement.group:
            raise ConfigError(f"{path} has {many} {'outputs' if kind == 'column' else 'inputs'} for {placement.group} workers")
        own = span(many, placement.group, rank)
        rows, columns = (own, (0, inputs)) if kind == "column" else ((0, outputs), own)
        layer.weight = nn.Parameter(layer.weight.detach()[slice(*rows), slice(*columns)].clone())
        found[f"{path}.weight"] = Part((outputs, inputs), Piece(rank, rows, columns), kind, layer.weight)
        if layer.bias is not None and kind == "column":
            layer.bias = nn.Parameter(layer.bias.detach()[slice(*rows)].clone())
            found[f"{path}.bias"] = Part((outputs,), Piece(rank, rows, (0, 1)), kind, layer.bias)
    return found


class Wide:
    """The cut layers of a module, until ``release()``.

    Args:
        module: whose layers are cut already.
        cuts: how, by path.
        near: the wire of the workers they are cut over.
    """

    def __init__(self, module: nn.Module, cuts: Mapping[str, Cut], near: Wire) -> None:
        self.layers = [cast(nn.Linear, module.get_submodule(path)) for path in cuts]
        for layer, kind in zip(self.layers, cuts.values(), strict=True):
            layer.__dict__["forward"] = functools.partial(_forward, layer, kind, near)

    def release(self) -> None:
        """Leave the layers as they are, but for their blocks."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, kind: Cut, wire: Wire, x: Tensor) -> Tensor:
    """What the whole layer answers for this worker's rows [..., inputs]."""
    rows = x.reshape(-1, x.shape[-1])
    sizes = wire.all(torch.tensor(len(rows)), "counts").tolist()
    if kind == "column":
        every = _Gathered.apply(rows, sizes, wire)  # type: ignore[no-untyped-call]
        widths = wire.all(torch.tensor(len(layer.weight)), "counts").tolist()
        y = _ByRows.apply(F.linear(every, layer.weight, layer.bias), sizes, widths, wire)  # type: ignore[no-untyped-call]
    else:
        cuts = [b - a for a, b in (span(x.shape[-1], wire.size, k) for k in range(wire.size))]
        mine = _ByColumns.apply(rows, sizes, cuts, wire)  # type: ignore[no-untyped-call]
        y = _Summed.apply(F.linear(mine, layer.weight), sizes, wire)  # type: ignore[no-untyped-call]
        y = y if layer.bias is None else y + layer.bias
    answer: Tensor = y.view(*x.shape[:-1], -1)
    return answer


def _gathered(rows: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
    """The rows of all workers [sum of sizes, n]."""
    n = rows.shape[1]
    out, into = [rows.numel()] * wire.size, [size * n for size in sizes]
    out[wire.rank] = into[wire.rank] = 0
    got = list(torch.split(wire.numbers(rows.flatten().repeat(wire.size - 1), out, into, "dense"), into))
    got[wire.rank] = rows.flatten()
    return torch.cat(got).view(-1, n)


def _summed(every: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
    """The sum over workers of this worker's rows, from rows of all [sum of sizes, n] on each."""
    n, mine = every.shape[1], sizes[wire.rank]
    got = wire.numbers(every.flatten(), [size * n for size in sizes], [mine * n] * wire.size, "dense")
    return got.view(wire.size, mine, n).sum(0)


def _by_rows(every: Tensor, sizes: Sequence[int], widths: Sequence[int], wire: Wire) -> Tensor:
    """All columns of this worker's rows, from its columns of all rows."""
    mine, width = sizes[wire.rank], widths[wire.rank]
    got = wire.numbers(every.flatten(), [size * width for size in sizes], [mine * w for w in widths], "dense")
    parts = torch.split(got, [mine * w for w in widths])
    return torch.cat([p.view(mine, w) for p, w in zip(parts, widths, strict=True)], 1)


def _by_columns(rows: Tensor, sizes: Sequence[int], widths: Sequence[int], wire: Wire) -> Tensor:
    """This worker's columns of all rows, from all columns of its rows."""
    mine, width = len(rows), widths[wire.rank]
    send = torch.cat([part.flatten() for part in torch.split(rows, list(widths), 1)])
    got = wire.numbers(send, [mine * w for w in widths], [size * width for size in sizes], "dense")
    return got.view(-1, width)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
        ctx.given = sizes, wire
        return _gathered(rows, sizes, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], *ctx.given), None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, sizes: Sequence[int], wire: Wire) -> Tensor:
        ctx.given = sizes, wire
        return _summed(every, sizes, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gathered(gradients[0].contiguous(), *ctx.given), None, None


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, sizes: Sequence[int], widths: Sequence[int], wire: Wire) -> Tensor:
        ctx.given = sizes, widths, wire
        return _by_rows(every, sizes, widths, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _by_columns(gradients[0], *ctx.given), None, None, None


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], widths: Sequence[int], wire: Wire) -> Tensor:
        ctx.given = sizes, widths, wire
        return _by_columns(rows, sizes, widths, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _by_rows(gradients[0].contiguous(), *ctx.given), None, None, None
