"""Models of ours in double precision: where sums in another order differ by 1e-16, what else differs shows.

They are built with float64 as PyTorch's default, and leave it so: what trains them makes its zeros by it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.data.schema import Column
from pennyweight.model import ranking, sequential
from pennyweight.model.spec import Batch


class Double(nn.Module):
    """``pennyweight.model.ranking.NAME`` of these arguments, all its weights and numbers in float64."""

    def __init__(
        self, name: str, columns: tuple[Column, ...], dim: int, hidden: tuple[int, ...], dropout: float | None = None
    ) -> None:
        torch.set_default_dtype(torch.float64)
        super().__init__()
        more = {} if dropout is None else {"dropout": dropout}
        self.inner = getattr(ranking, name)(columns=columns, dim=dim, hidden=hidden, **more)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B], float64."""
        output: Tensor = self.inner({n: t.double() if t.is_floating_point() else t for n, t in batch.items()})
        return output


class Sequence(sequential.SASRec):
    """``SASRec`` in float64."""

    def __init__(
        self, columns: tuple[Column, ...], dim: int = 64, blocks: int = 2, heads: int = 1, dropout: float = 0.2
    ) -> None:
        torch.set_default_dtype(torch.float64)
        super().__init__(columns, dim, blocks, heads, dropout)
