"""Ranking models: from the features of a user, an item and their context to the logit that the user acts on it.

Four published architectures over the same embeddings and MLP, told apart by how they multiply features: not at all
(``DNN``), all pairs summed (``DeepFM``), all pairs listed (``DLRM``), bounded powers (``DCNv2``). They are kept as four short
classes, not one with switches: each can be read beside its paper and copied. They differ from FuxiCTR's, whose recipes
they reproduce, where a line says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import Column
from pennyweight.model.layers import FM, MLP, Cross, Embeddings, Interaction, idle
from pennyweight.model.spec import Batch


class DNN(nn.Module):
    """Embeddings into a multi-layer perceptron (Covington et al. 2016)."""

    def __init__(
        self,
        columns: tuple[Column, ...],
        dim: int = 16,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        norm: bool = True,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(columns, dim)
        self.mlp = MLP(self.embeddings.width, hidden, outputs, dropout, norm)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B], or [B, outputs] for classes."""
        logits: Tensor = self.mlp(self.embeddings(batch))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def idle(self) -> tuple[nn.Parameter, ...]:
        """Parameters that no loss depends on (``model.train.optimizer``)."""
        return idle(self.embeddings.lookup, self.mlp)


class DeepFM(nn.Module):
    """An MLP and a factorization machine over the same embeddings, added (Guo et al. 2017).

    The paper's first-order weight is the first number of each row here, not a table of its own, which halves the lookups;
    a row's other ``dim - 1`` numbers are its factors. The MLP reads all of it.
    """

    def __init__(
        self,
        columns: tuple[Column, ...],
        dim: int = 16,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ConfigError(f"DeepFM needs a dim of at least 2 (one weight and the factors), got {dim}")
        self.embeddings = Embeddings(columns, dim)
        self.fm = FM(self.embeddings.lookup.fields, dim)
        self.mlp = MLP(self.embeddings.width, hidden, 1, dropout, norm)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        flat = self.embeddings(batch)
        logits: Tensor = self.mlp(flat).squeeze(1) + self.fm(self.embeddings.fields(flat).flatten(1))
        return logits

    def idle(self) -> tuple[nn.Parameter, ...]:
        """Parameters that no loss depends on (``model.train.optimizer``)."""
        return idle(self.embeddings.lookup, self.mlp)


class DCNv2(nn.Module):
    """A cross network and an MLP, side by side (``parallel``) or one after the other (``stacked``) (Wang et al. 2021)."""

    def __init__(
        self,
        columns: tuple[Column, ...],
        dim: int = 16,
        cross: int = 3,
        hidden: Sequence[int] = (400, 400, 400),
        structure: Literal["parallel", "stacked"] = "parallel",
        rank: int = 0,
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise ConfigError(f"DCNv2 structure {structure!r} is not one of 'parallel', 'stacked'")
        self.embeddings = Embeddings(columns, dim)
        width = self.embeddings.width
        self.cross = Cross(width, cross, rank)
        self.mlp = MLP(width, hidden, 0, dropout, norm)
        self.parallel = structure == "parallel"
        self.head = nn.Linear(self.mlp.outputs + (width if self.parallel else 0), 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        flat = self.embeddings(batch)
        crossed = self.cross(flat)
        last = torch.cat([crossed, self.mlp(flat)], 1) if self.parallel else self.mlp(crossed)
        logits: Tensor = self.head(last).squeeze(1)
        return logits


class DLRM(nn.Module):
    """Dot products of all pairs of embeddings, the numbers through an MLP as one more (Naumov et al. 2019).

    The top MLP reads the pairs and the numbers' vector; without numeric columns it reads the embeddings beside the pairs,
    since pairs alone would forget which feature they came from.
    """

    def __init__(
        self,
        columns: tuple[Column, ...],
        dim: int = 16,
        bottom: Sequence[int] = (64,),
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(columns, dim)
        numbers, fields = self.embeddings.lookup.numbers, self.embeddings.lookup.fields
        self.numeric = numbers > 0
        if self.numeric:
            self.bottom = MLP(numbers, hidden=(*bottom, dim), norm=norm)
        self.interaction = Interaction(fields + self.numeric)
        beside = dim if self.numeric else fields * dim
        self.mlp = MLP(self.interaction.width + beside, hidden, 1, dropout, norm)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        flat = self.embeddings(batch)
        fields = self.embeddings.fields(flat)
        beside = flat
        if self.numeric:
            beside = self.bottom(self.embeddings.numbers(flat))
            fields = torch.cat([fields, beside.unsqueeze(1)], 1)
        logits: Tensor = self.mlp(torch.cat([beside, self.interaction(fields)], 1)).squeeze(1)
        return logits

    def idle(self) -> tuple[nn.Parameter, ...]:
        """Parameters that no loss depends on (``model.train.optimizer``)."""
        return idle(self.embeddings.lookup, self.bottom) if self.numeric else ()
