"""Retrieval models: a vector for the user and one for the item, whose dot product says how well they fit.

Because the two meet only in a dot product, the items' vectors are computed once and a request is one matrix product over
the whole catalogue (or a nearest-neighbour search). That is all a ranking model cannot do, and the price is that user and
item features never multiply inside the network.

``user_vectors`` reads user and context columns, ``item_vectors`` item columns, so either runs on a batch that holds only
those; ``forward`` gives the logit of each row's own pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import Column, Schema
from pennyweight.model.layers import MLP, Lookup, table, tables
from pennyweight.model.spec import Batch


class MatrixFactorization(nn.Module):
    """A vector and a bias for each user and each item (Koren et al. 2009; trained with ``bpr``, Rendle et al. 2009).

    The biases ride in the vectors, [u, b_u, 1] against [i, 1, b_i], so that the dot product is the whole model.

    Args:
        columns: the schema's columns; only the user's and the item's ids are read.
        dim: width of both tables.
        bias: whether users and items have one.
        scale: if > 0, vectors are normalized and their cosine is multiplied by it, which with ``sampled-softmax`` makes this
            as strong as graph convolution (Wu et al. 2022, arXiv 2201.02327); its inverse is their temperature.
        std: of the initial numbers.
    """

    def __init__(
        self, columns: tuple[Column, ...], dim: int = 64, bias: bool = True, scale: float = 0.0, std: float = 0.1
    ) -> None:
        super().__init__()
        if bias and scale:
            raise ConfigError(f"a cosine has no biases, and scale is {scale}; give bias=False or scale=0")
        schema = Schema(tuple(columns))
        self.user, self.item = schema.user, schema.item
        self.users = table(self.user.size, dim, std)
        self.items = table(self.item.size, dim, std)
        self.bias, self.scale = bias, scale
        if bias:
            self.user_bias = table(self.user.size, 1, 0.0)
            self.item_bias = table(self.item.size, 1, 0.0)

    def user_vectors(self, batch: Batch) -> Tensor:
        """[B, dim], or [B, dim + 2] with biases."""
        ids = batch[self.user.name]
        vectors: Tensor = self.users(ids)
        if not self.bias:
            return F.normalize(vectors, dim=1) * self.scale if self.scale else vectors
        return torch.cat([vectors, self.user_bias(ids), torch.ones_like(vectors[:, :1])], 1)

    def item_vectors(self, batch: Batch) -> Tensor:
        """[N, dim], or [N, dim + 2] with biases."""
        ids = batch[self.item.name]
        vectors: Tensor = self.items(ids)
        if not self.bias:
            return F.normalize(vectors, dim=1) if self.scale else vectors
        return torch.cat([vectors, torch.ones_like(vectors[:, :1]), self.item_bias(ids)], 1)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        return (self.user_vectors(batch) * self.item_vectors(batch)).sum(1)


class TwoTower(nn.Module):
    """One tower reads the user's id, history, features and context, the other the item's id and features (Yi et al. 2019).

    The history looks up the item's own table, so what a user liked and what is recommended live in one space, and a new
    user needs no row anywhere. Without ``hidden`` a tower adds its embeddings up; with it, an MLP mixes them.

    Args:
        columns: the schema's columns; label and time are not read.
        dim: width of embeddings and of the two vectors.
        hidden: hidden widths of both MLPs; empty for sums.
        user_id: read the user's id too; without it the model is the same for everybody with the same history.
        scale: if > 0, vectors are normalized and their cosine is multiplied by it; if 0, they are taken as they are.
    """

    def __init__(
        self,
        columns: tuple[Column, ...],
        dim: int = 32,
        hidden: Sequence[int] = (),
        user_id: bool = True,
        scale: float = 0.0,
        dropout: float = 0.0,
        std: float = 0.1,
    ) -> None:
        super().__init__()
        schema = Schema(tuple(columns))
        asker = [c for c in schema.role("user", "context") if user_id or c != schema.user]
        offered = schema.role("item")
        if not asker or not offered:
            found = f"{len(asker)} that describe the user, {len(offered)} the item"
            raise ConfigError(f"TwoTower needs user and item columns; found {found}")
        self.tables = tables((*asker, *offered), dim, std)
        self.user_tower = _Tower(asker, dim, hidden, dropout)
        self.item_tower = _Tower(offered, dim, hidden, dropout)
        self.scale = scale

    def user_vectors(self, batch: Batch) -> Tensor:
        """[B, dim]."""
        return self._vectors(self.user_tower, batch) * (self.scale or 1.0)

    def item_vectors(self, batch: Batch) -> Tensor:
        """[N, dim]."""
        return self._vectors(self.item_tower, batch)

    def _vectors(self, tower: nn.Module, batch: Batch) -> Tensor:
        vectors: Tensor = tower(batch, self.tables)
        return F.normalize(vectors, dim=1) if self.scale else vectors

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        return (self.user_vectors(batch) * self.item_vectors(batch)).sum(1)


class _Tower(nn.Module):
    """The vector of one side; its tables belong to the model, since the two sides share the item's."""

    def __init__(self, columns: Sequence[Column], dim: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.lookup = Lookup(columns, dim)
        if hidden:
            self.mlp = MLP(self.lookup.width, hidden, dim, dropout, norm=False)
        elif self.lookup.numbers:
            self.numbers = nn.Linear(self.lookup.numbers, dim)
        self.hidden = len(hidden)

    def forward(self, batch: Batch, tables: nn.ModuleDict) -> Tensor:
        flat: Tensor = self.lookup(batch, tables)
        if self.hidden:
            vectors: Tensor = self.mlp(flat)
            return vectors
        fields, numbers = self.lookup.split(flat)
        return fields.sum(1) + self.numbers(numbers) if self.lookup.numbers else fields.sum(1)
