"""A ranking model of ours in double precision: where sums in another order differ by 1e-16, what else differs shows."""

from __future__ import annotations

from torch import Tensor, nn

from pennyweight.data.schema import Column
from pennyweight.model import ranking
from pennyweight.model.spec import Batch


class Double(nn.Module):
    """``pennyweight.model.ranking.NAME`` of these arguments, all its weights and numbers in float64."""

    def __init__(
        self, name: str, columns: tuple[Column, ...], dim: int, hidden: tuple[int, ...], dropout: float | None = None
    ) -> None:
        super().__init__()
        more = {} if dropout is None else {"dropout": dropout}
        self.inner = getattr(ranking, name)(columns=columns, dim=dim, hidden=hidden, **more).double()

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B], float64."""
        output: Tensor = self.inner({n: t.double() if t.is_floating_point() else t for n, t in batch.items()})
        return output
