"""Packed layers in ordinary operations that stay small: what leaves for another runtime.

A packed layer runs here by operators that no exporter knows, and its ``plain()`` form has fp32 weights, four to eight times
the bytes. These modules hold the packed bytes as they are and turn them into numbers with what every runtime has: lookups,
casts, multiplies. Of a table only the rows that were looked up become numbers; a dense layer's weights are the same at each
call, so a runtime may fold them when it loads and the file stays small.

Bits are taken apart in floating point (``floor`` of a quotient), not by shifts: torch's ONNX exporter writes a shift of
bytes as seven operations of two types that ONNX Runtime refuses, and the quotients here are exact. ONNX' own 4-bit type was
the alternative; ONNX Runtime looks no rows up in it. The cost is time in eager PyTorch, where nothing is folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def numbers(packed: Tensor, bits: int) -> Tensor:
    """fp32 [..., m * 8 / bits] from bytes [..., m], the first number in a byte's lowest bits; at 8 bits only a cast."""
    rest = packed.float()
    parts = []
    for _ in range(8 // bits - 1):
        higher = torch.floor(rest / 2**bits)
        parts.append(rest - higher * 2**bits)
        rest = higher
    return torch.stack([*parts, rest], -1).flatten(-2) if parts else rest


PLANES = {4: (4,), 3: (2, 1), 2: (2,)}
"""How the bits of a number are laid out: those of all a row's numbers packed together, then the next. Three fill no byte."""
GRID = {4: (1, 8), 3: (2, 7), 2: (2, 3)}
"""Step and offset that make a weight's whole number of what is stored: -8 to 7, or the odd ones within 7 or 3."""

Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding and dilation of a convolution, one number a dimension each, and its groups."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """``F.conv1d`` or ``F.conv2d``, by the dimensions of the weights."""
    function = F.conv1d if weight.dim() == 3 else F.conv2d
    return function(x, weight, bias, *sizes)


class Weight(nn.Module):
    """fp32 weights of a shape, made at each call from floats, bytes, or ``bits`` a number below 8, and a scale."""

    packed: Tensor
    scale: Tensor | None

    def __init__(self, packed: Tensor, shape: Sequence[int], scale: Tensor | None = None, bits: int = 4) -> None:
        super().__init__()
        self.shape, self.bits = tuple(shape), bits
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def widen(self) -> None:
        """Parts of bytes to bytes, in place: the same numbers for a runtime that would make floats of them for good."""
        if self.packed.dtype == torch.uint8:
            self.packed = self._whole().to(torch.int8)

    def _whole(self) -> Tensor:
        """The whole numbers in parts of bytes: a matrix fills whole bytes row by row, anything else is one run of numbers."""
        count = self.shape[-1] if self.packed.dim() > 1 else math.prod(self.shape)
        at, (step, offset), parts = 0, GRID[self.bits], []
        for plane in PLANES[self.bits]:
            width = -(-count * plane // 8)
            part = numbers(self.packed[..., at : at + width], plane)[..., :count]
            parts.append(part * step if step > 1 else part)
            at, step = at + width, step * 2**plane
        return (sum(parts[1:], parts[0]) - offset).reshape(self.shape)

    def forward(self) -> Tensor:
        """The weights, in the shape given."""
        values = self._whole() if self.packed.dtype == torch.uint8 else self.packed.float()
        return values if self.scale is None else values * self.scale


class Linear(nn.Module):
    """A dense layer over a ``Weight``."""

    bias: Tensor | None

    def __init__(self, stored: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.stored = stored
        self.out_features, self.in_features = stored.shape
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """fp32 [outputs, inputs]."""
        made: Tensor = self.stored()
        return made

    def forward(self, input: Tensor) -> Tensor:
        """[..., outputs] fp32 from [..., inputs]."""
        return F.linear(input.float(), self.weight, self.bias)


class Conv(nn.Module):
    """A convolution over a ``Weight`` [outputs, taps], the weights of ``shape`` as a matrix."""

    bias: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None, shape: Sequence[int], sizes: Sizes) -> None:
        super().__init__()
        self.weight, self.shape, self.sizes = weight, tuple(shape), sizes
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """[B, outputs, ...] fp32 from [B, inputs, ...]."""
        return convolve(input.float(), self.weight().reshape(self.shape), self.bias, self.sizes)


class Lookup(nn.Module):
    """A table: what ``nn.Embedding`` says of itself, for code that asks."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, dim

    @property
    def weight(self) -> Tensor:
        """All rows, fp32 [rows, dim]."""
        every: Tensor = self(torch.arange(self.num_embeddings))
        return every


class Rows(Lookup):
    """Rows of whole numbers, each with a scale and a bias; ``values`` are bytes, two or four numbers to a byte below 8 bits."""

    values: Tensor
    affine: Tensor

    def __init__(self, values: Tensor, affine: Tensor, bits: int, dim: int) -> None:
        super().__init__(len(values), dim)
        self.bits = bits
        self.register_buffer("values", values)
        self.register_buffer("affine", affine)

    def forward(self, input: Tensor) -> Tensor:
        """fp32 rows [..., dim] of ids of any shape."""
        affine = F.embedding(input, self.affine).float()
        values = numbers(F.embedding(input, self.values), self.bits)[..., : self.embedding_dim]
        return values * affine[..., :1] + affine[..., 1:]


class Halves(Lookup):
    """fp16 rows, answered as fp32."""

    packed: Tensor

    def __init__(self, packed: Tensor) -> None:
        super().__init__(*packed.shape)
        self.register_buffer("packed", packed)

    def forward(self, input: Tensor) -> Tensor:
        """fp32 rows [..., dim] of ids of any shape."""
        return F.embedding(input, self.packed).float()


class Codes(Lookup):
    """Rows that are codes into codebooks ``books`` [parts, codes, width]; below 8 bits several of a row's codes are a byte."""

    codes: Tensor
    base: Tensor

    def __init__(self, codes: Tensor, books: Weight, dim: int, bits: int = 8) -> None:
        super().__init__(len(codes), dim)
        self.bits = bits
        self.register_buffer("codes", codes)
        parts, count, _ = books.shape
        self.register_buffer("base", torch.arange(parts, dtype=torch.int32) * count)
        self.books = books

    def widen(self) -> None:
        """Codebooks to floats, in place: OpenVINO (2026.4) looks nothing up in codebooks that have a scale."""
        self.books = Weight(self.books(), self.books.shape)

    def forward(self, input: Tensor) -> Tensor:
        """fp32 rows [..., dim] of ids of any shape."""
        stored = F.embedding(input, self.codes)
        codes = stored if self.bits == 8 else numbers(stored, self.bits)[..., : len(self.base)].to(torch.int32)
        at = codes + self.base
        return F.embedding(at, self.books().flatten(0, 1)).flatten(-2)[..., : self.embedding_dim]


class Axes(Lookup):
    """Rows as places along axes, all of a row's in one run of bits: ``bits`` an axis from ``starts`` on."""

    codes: Tensor
    levels: Tensor
    axes: Tensor
    byte: Tensor
    parts: Tensor

    def __init__(
        self, codes: Tensor, levels: Tensor, axes: Tensor, bits: Sequence[int], starts: Sequence[int], padding: int | None
    ) -> None:
        super().__init__(len(codes), axes.shape[1])
        self.padding = padding
        first = [sum(2**b for b in bits[:k]) for k in range(len(bits))]
        parts = [[2.0 ** (s % 8), 2.0 ** (s % 8 + b), 2.0**b, f] for s, b, f in zip(starts, bits, first, strict=True)]
        for name, tensor in (("codes", codes), ("levels", levels), ("axes", axes)):
            self.register_buffer(name, tensor)
        self.register_buffer("byte", torch.tensor([s // 8 for s in starts]))
        self.register_buffer("parts", torch.tensor(parts).T.contiguous())

    def forward(self, input: Tensor) -> Tensor:
        """fp32 rows [..., dim] of ids of any shape."""
        stream = F.pad(F.embedding(input, self.codes).float(), (0, 1))
        # Eight bits lie in two bytes, wherever they begin: below 2**16, so quotients and remainders are exact in fp32.
        words = stream[..., self.byte] + 256 * stream[..., self.byte + 1]
        low, high, size, first = self.parts
        places = torch.floor(words / low) - size * torch.floor(words / high) + first
        levels = F.embedding(places.to(torch.int32), self.levels.unsqueeze(1)).squeeze(-1)
        rows = levels.float() @ self.axes.float()
        return rows if self.padding is None else rows * input.ne(self.padding).unsqueeze(-1)


class Bag(nn.Module):
    """Bags of equal length joined to one row each, as ``nn.EmbeddingBag`` joins a matrix of ids."""

    def __init__(self, rows: Lookup, mode: str, padding: int | None) -> None:
        super().__init__()
        self.rows, self.mode, self.padding = rows, mode, padding
        self.num_embeddings, self.embedding_dim = rows.num_embeddings, rows.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """[bags, dim] from ids [bags, length]; zero for a bag that holds only padding."""
        return pooled(self.rows(input), input, self.mode, self.padding)


def pooled(rows: Tensor, ids: Tensor, mode: str, padding: int | None) -> Tensor:
    """Rows [bags, length, dim] of ids [bags, length] joined to [bags, dim]; zero for a bag that holds only padding."""
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids.ne(padding)
    inside = real.unsqueeze(-1)
    if mode == "max":
        most: Tensor = rows.masked_fill(~inside, -torch.inf).amax(1)
        return most.masked_fill(~inside.any(1), 0.0)
    total: Tensor = (rows * inside).sum(1)
    return total if mode == "sum" else total / inside.sum(1).clamp_min(1)
