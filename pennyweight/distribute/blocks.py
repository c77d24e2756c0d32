"""A model of which no worker could hold all: its large tables are made block by block, with the numbers one process would draw.

While the module is built, large tables of ours lie on no device; when random numbers are asked for them, the generator's state
is kept and as many numbers are drawn past in small pieces. A block is made later by going through the same numbers from that
state and keeping those that fall in it. So the first weights, and all later random numbers, are those of one process at any
number of workers. It costs the drawing of each table once more on every worker (about a second for 100 million numbers).

Drawing a stream of its own for each block is the known alternative: cheaper, and another model for each number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.model import spec as specs
from pennyweight.model.placement import Piece
from pennyweight.model.spec import Spec

CHUNK = 1 << 20
"""Numbers drawn at once, about: whole rows, and a multiple of the 16 that PyTorch draws together."""


@dataclasses.dataclass(frozen=True)
class Fill:
    """How a table's numbers were drawn last."""

    state: Tensor
    """Of the generator before."""
    mean: float
    std: float

    def block(self, shape: tuple[int, int], piece: Piece, padding: int | None) -> Tensor:
        """The numbers of a block of a table of this shape, its padding row zero."""
        (r0, r1), columns = piece.rows, slice(*piece.columns)
        made = torch.empty(r1 - r0, piece.columns[1] - piece.columns[0])
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            for start, rows in _drawn(shape, self.mean, self.std):
                first, last = max(start, r0), min(start + len(rows), r1)
                if first < last:
                    made[first - r0 : last - r0] = rows[first - start : last - start, columns]
        if padding is not None and r0 <= padding < r1:
            made[padding - r0] = 0
        return made


def built(spec: Spec, seed: int, allow: Sequence[str] = ()) -> tuple[nn.Module, Mapping[int, Fill]]:
    """``seeded(spec, seed)`` with large tables on no device, and how each is filled, by the weight's ``id``.

    A factory of the user's own is built whole, since what it does to a table afterwards is not known.
    """
    if not apart(spec):
        return specs.seeded(spec, seed, allow), {}
    with _Nowhere() as mode, _tables(mode):
        module = specs.seeded(spec, seed, allow)
    return module, {key: fill for key, (_, fill) in mode.fills.items()}


def apart(spec: Spec) -> bool:
    """Whether large tables of a model lie on no device while it is built."""
    return spec.factory.startswith("pennyweight.model.")


class _Nowhere(TorchFunctionMode):
    """Puts large tables on no device, and draws past the numbers they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[int, tuple[Tensor, Fill]] = {}
        self.inside = False
        """Whether a large table is being made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and self.inside:
            kwargs["device"] = "meta"
        elif func in (Tensor.normal_, nn.init.normal_):
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                given = {"mean": 0.0, "std": 1.0, **dict(zip(("mean", "std"), args[1:], strict=False)), **kwargs}
                self.fills[id(tensor)] = tensor, Fill(torch.get_rng_state(), given["mean"], given["std"])
                for _ in _drawn((tensor.shape[0], tensor.shape[1]), 0.0, 1.0):
                    pass
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def _tables(mode: _Nowhere) -> Iterator[None]:
    """Inside, whoever makes a large table tells the mode."""
    plain = {kind: kind.__init__ for kind in (nn.Embedding, nn.EmbeddingBag)}

    def telling(kind: Any) -> Any:
        def init(self: Any, rows: int, dim: int, *args: Any, **kwargs: Any) -> None:
            mode.inside = rows * dim >= specs.LARGE
            try:
                plain[kind](self, rows, dim, *args, **kwargs)
            finally:
                mode.inside = False

        return init

    for kind in plain:
        kind.__init__ = telling(kind)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, before in plain.items():
            kind.__init__ = before  # type: ignore[method-assign]


def _drawn(shape: tuple[int, int], mean: float, std: float) -> Iterator[tuple[int, Tensor]]:
    """All numbers of a table in the order ``normal_`` draws them, some rows at a time, with the first of them.

    PyTorch draws 16 at once and the last 16 anew where they are fewer, so pieces are multiples of 16 but for the last, which
    holds at least as many.
    """
    rows, dim = shape
    each = max(16, CHUNK // dim // 16 * 16)
    start = 0
    while start < rows:
        stop = start + each if (rows - start - each) * dim >= 16 else rows
        yield start, torch.empty(stop - start, dim).normal_(mean, std)
        start = stop
