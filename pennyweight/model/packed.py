"""Tensors stored small and made ready once: what packed tables and packed dense layers have in common.

The state dict holds what is shipped (uint8, int8, fp16); executing it may need another form (a kernel's own weight order,
a dequantized codebook). That form is made at the first forward after loading and forgotten when the weights change. The
alternative, a state dict in the kernel's order, ties a bundle to one library version and one instruction set. It costs
one packing at start and, where a second form is kept, its memory.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.model.compact import GRID, PLANES, Weight

M = TypeVar("M", bound=nn.Module)


class Packed(nn.Module, abc.ABC):
    """A module that executes from ``ready()``, a form of its stored tensors made by ``prepare`` on first use."""

    def __init__(self) -> None:
        super().__init__()
        self._ready: Any = None

    @abc.abstractmethod
    def prepare(self) -> Any:
        """The form the stored tensors are executed from."""

    @abc.abstractmethod
    def plain(self) -> nn.Module:
        """An equivalent module of ordinary fp32 operations, for engines that export or compile a graph."""

    def small(self) -> nn.Module:
        """An equivalent module of ordinary operations over the packed bytes, for files; ``plain()`` where there is none."""
        return self.plain()

    def ready(self) -> Any:
        """What ``prepare`` gave for the weights as they are now."""
        if self._ready is None:
            # Outside inference mode, or a form made while scoring could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._ready = self.prepare()
        return self._ready

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._ready = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}


FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits of the whole numbers that dense layers and convolutions can be stored as."""


def row_bytes(numbers: int, data_type: str) -> int:
    """Bytes of so many weights of an output, with their scale."""
    if data_type in BITS:
        return sum(-(-numbers * plane // 8) for plane in PLANES.get(BITS[data_type], (8,))) + 4
    return numbers * (4 if data_type == "fp32" else 2)


class PackedRows(Packed):
    """Weights as rows, one an output, as floats or whole numbers with a scale a row. The bias stays fp32."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, outputs: int, numbers: int, data_type: str, bias: bool) -> None:
        super().__init__()
        self.numbers, self.data_type = numbers, data_type
        self.whole = data_type in BITS
        width = row_bytes(numbers, data_type) - 4 if self.whole else numbers
        kind = {**FLOATS, "int8": torch.int8}.get(data_type, torch.uint8)
        self.register_buffer("packed", torch.zeros(outputs, width, dtype=kind))
        if self.whole:
            self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    def levels(self) -> Tensor:
        """The whole numbers the weights are stored as, int8 [outputs, numbers]."""
        return self.packed if self.data_type == "int8" else unpack_levels(self.packed, BITS[self.data_type], self.numbers)

    def stored(self) -> Weight:
        """The weights [outputs, numbers] in ordinary operations, as small as they are here."""
        shape, scale = (len(self.packed), self.numbers), self.scale.unsqueeze(1) if self.whole else None
        return Weight(self.packed, shape, scale, BITS.get(self.data_type, 8))


def encoded(rows: Tensor, bias: Tensor | None, data_type: str, scale: Tensor | None = None) -> dict[str, Tensor]:
    """The state of ``PackedRows`` from fp32 weights [outputs, numbers] and bias [outputs].

    With ``scale`` [outputs], whole numbers are rounded at that scale; without, at the one that loses least.
    """
    rest = {} if bias is None else {"bias": bias.clone()}
    if data_type in FLOATS:
        return {"packed": rows.to(FLOATS[data_type]), **rest}
    bits = BITS[data_type]
    whole, scale = scaled(rows, bits, (1,), scale if scale is None else scale.unsqueeze(1))
    return {"packed": whole if bits == 8 else pack_levels(whole, bits), "scale": scale.squeeze(1), **rest}


def blank(kind: type[M], *args: Any, **kwargs: Any) -> M:
    """A module of this class with zero weights: its constructor would draw random ones from the caller's generator.

    NumPy's zeros are memory that nobody touched yet; PyTorch's are written. A large table is about to be loaded over.
    """
    module = kind(*args, device="meta", **kwargs)
    module._apply(lambda t: torch.from_numpy(np.zeros(t.shape, np.float32)))  # type: ignore[no-untyped-call]
    return module


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2**bits, the first in a byte's lowest bits: uint8 [..., n] -> uint8 [..., n * bits / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    return (values.reshape(*values.shape[:-1], -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack_bits``: uint8 [..., m] -> uint8 [..., m * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def pack_levels(whole: Tensor, bits: int) -> Tensor:
    """Whole numbers int8 [..., n] of a ``nearest`` below 8 bits, as bytes uint8 [..., m]."""
    step, offset = GRID[bits]
    rest = ((whole + offset) // step).to(torch.uint8)
    planes = []
    for plane in PLANES[bits]:
        low = rest & (2**plane - 1)
        planes.append(pack_bits(F.pad(low, (0, -rest.shape[-1] % (8 // plane))), plane))
        rest = rest >> plane
    return torch.cat(planes, -1)


def unpack_levels(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_levels``: int8 [..., count]."""
    widths, (step, offset) = [-(-count * plane // 8) for plane in PLANES[bits]], GRID[bits]
    parts = zip(torch.split(packed, widths, -1), PLANES[bits], strict=True)
    low, *high = [unpack_bits(part, plane)[..., :count] for part, plane in parts]
    for plane in high:
        low = low | plane << PLANES[bits][0]
    return (low * step).to(torch.int8) - offset


def nearest(values: Tensor, bits: int) -> Tensor:
    """The whole numbers nearest to ``values`` that are stored in so many bits.

    All within 7 for 4 bits, within 127 for 8. Fewer bits hold the odd numbers within 7 or 3: there another level is worth
    more than a zero (for normal weights a fifth less squared error at 3 bits, a third at 2).
    """
    if bits < 4:
        top = 2**bits - 1
        return ((values - 1) / 2).round().mul(2).add(1).clamp(-top, top)
    top = 2 ** (bits - 1) - 1
    return values.round().clamp(-top, top)


def scaled(weight: Tensor, bits: int, dims: tuple[int, ...], scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric whole numbers and their fp32 scale, one scale for each slice along ``dims`` (kept with size 1).

    Below 8 bits the scale is the one, of 21 between half (or .3, below 4 bits) and the whole of the range, that loses least
    in squared error: clipping a few outliers leaves finer steps for the rest. From 4 bits, zero stays exactly zero.
    """
    if scale is None:
        scale = _search(weight, bits, dims)
    return nearest(weight / scale, bits).to(torch.int8), scale


def _search(weight: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    whole = weight.abs().amax(dims, keepdim=True).div(2**bits - 1 if bits < 4 else 2 ** (bits - 1) - 1)
    whole = torch.where(whole > 0, whole, 1.0)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in torch.linspace(1.0, 0.5 if bits >= 4 else 0.3, 21).tolist() if bits < 8 else (1.0,):
        scale = whole * share
        loss = (weight - nearest(weight / scale, bits) * scale).square().sum(dims, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best
