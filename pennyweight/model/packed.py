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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class PackedRows(Packed):
    """Weights as rows, one an output, in fp16, bf16, int8 or int4; whole numbers have a scale a row. The bias stays fp32."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, outputs: int, numbers: int, data_type: str, bias: bool) -> None:
        super().__init__()
        self.numbers, self.data_type = numbers, data_type
        self.whole = data_type in ("int8", "int4")
        width = -(-numbers // 2) if data_type == "int4" else numbers
        kind = {**FLOATS, "int8": torch.int8, "int4": torch.uint8}[data_type]
        self.register_buffer("packed", torch.zeros(outputs, width, dtype=kind))
        if self.whole:
            self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    def levels(self) -> Tensor:
        """The whole numbers the weights are stored as, int8 [outputs, numbers]."""
        if self.data_type == "int8":
            return self.packed
        return unpack_bits(self.packed, 4)[:, : self.numbers].to(torch.int8) - 8


def encoded(rows: Tensor, bias: Tensor | None, data_type: str) -> dict[str, Tensor]:
    """The state of ``PackedRows`` from fp32 weights [outputs, numbers] and bias [outputs]."""
    rest = {} if bias is None else {"bias": bias.clone()}
    if data_type in FLOATS:
        return {"packed": rows.to(FLOATS[data_type]), **rest}
    whole, scale = scaled(rows, 8 if data_type == "int8" else 4, (1,))
    if data_type == "int4":
        whole = pack_bits(F.pad((whole + 8).to(torch.uint8), (0, rows.shape[1] % 2)), 4)
    return {"packed": whole, "scale": scale.squeeze(1), **rest}


def blank(kind: type[M], *args: Any, **kwargs: Any) -> M:
    """A module of this class with zero weights: its constructor would draw random ones from the caller's generator."""
    module: M = nn.utils.skip_init(kind, *args, **kwargs)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
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


def scaled(weight: Tensor, bits: int, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Symmetric whole numbers and their fp32 scale, one scale for each slice along ``dims`` (kept with size 1).

    Below 8 bits the scale is the one, of 21 between half and the whole of the range, that loses least in squared error:
    clipping a few outliers leaves finer steps for the rest. Zero stays exactly zero.
    """
    top = 2 ** (bits - 1) - 1
    whole = weight.abs().amax(dims, keepdim=True).div(top)
    whole = torch.where(whole > 0, whole, 1.0)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in torch.linspace(1.0, 0.5, 21).tolist() if bits < 8 else (1.0,):
        scale = whole * share
        loss = (weight - (weight / scale).round().clamp(-top, top) * scale).square().sum(dims, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return (weight / best).round().clamp(-top, top).to(torch.int8), best
