"""A table as centres that many rows share, and what each row has of its own.

A row is the sum of a centre from each of a few books and of its rest, found one after the other (residual quantization, Chen
et al. 2010). Rows lie in clusters (people of one city, films of one kind), so one byte of code takes half of what there is
to store, which no code of a few numbers at a time can see; what is left is small and even, and rounds well. The rest is a
table of its own at ``PATH.rest`` and the centres one at ``PATH.centres``, so whatever is done to tables is done to them.
Coding a row by centres alone was the alternative; later books explain ever less, and each has as many numbers as 256 rows.

It costs a second lookup, and a byte a row for each book.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model.packed import blank
from pennyweight.model.spec import Layer


@named("residual")
@dataclasses.dataclass(frozen=True)
class Residual(Layer):
    """An embedding table of ``rows`` of ``dim`` numbers in two: centres, ``books`` of ``codes`` each, and the rest."""

    rows: int
    dim: int
    books: int
    codes: int = 256
    """Centres in each book, at most 256."""
    padding: int | None = None
    """The id whose row is zero."""

    def __post_init__(self) -> None:
        if self.books < 1 or not 2 <= self.codes <= 256:
            raise ConfigError(f"a residual table has at least 1 book of 2 to 256 codes, got {self.books} of {self.codes}")

    def build(self) -> nn.Module:
        """The module, its parts plain."""
        return ResidualTable(self)

    def bytes(self) -> int:
        """Bytes of the codes; centres and rest are layers of their own."""
        return self.rows * self.books

    def flops(self) -> int:
        """Additions to look one id up."""
        return self.books * self.dim


class ResidualTable(nn.Module):
    """Centres by a row's codes, plus its rest; drop-in for ``nn.Embedding``."""

    codes: Tensor

    def __init__(self, layer: Residual) -> None:
        super().__init__()
        self.layer = layer
        self.num_embeddings, self.embedding_dim, self.padding_idx = layer.rows, layer.dim, layer.padding
        self.register_buffer("codes", torch.zeros(layer.rows, layer.books, dtype=torch.uint8))
        self.register_buffer("base", torch.arange(layer.books, dtype=torch.int32) * layer.codes, persistent=False)
        self.centres = blank(nn.Embedding, layer.books * layer.codes, layer.dim)
        self.rest = blank(nn.Embedding, layer.rows, layer.dim, padding_idx=layer.padding)

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., dim] of ids of any shape."""
        base: Tensor = self.get_buffer("base")
        rows: Tensor = self.centres(F.embedding(input, self.codes) + base).sum(-2) + self.rest(input)
        if self.padding_idx is None:
            return rows
        return rows * input.ne(self.padding_idx).unsqueeze(-1)

    @property
    def weight(self) -> Tensor:
        """All rows, fp32 [rows, dim]."""
        every: Tensor = self(torch.arange(self.layer.rows, device=self.codes.device))
        return every

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)
