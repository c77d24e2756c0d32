"""Sequential models: what comes next, read from the order of what came before.

SASRec is the published yardstick. It is a retrieval model too: the last state of the history is the user's vector, and an
item's vector is its row of the one table that the history is read from. Training uses every position of a sequence as a
target at once, so a user is one row; ``sequences`` picks such rows from a dataset that has one row an event.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import PAD, Column, Schema
from pennyweight.model.layers import table
from pennyweight.model.spec import Batch


class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang & McAuley 2018): a small causal transformer over item ids.

    As in the paper: positions are learned, norm comes before attention and feed-forward, the output table is the input
    table. Positions count back from the newest item, which is what left padding to a fixed length means.

    Args:
        columns: the schema's columns; only the item and the history are read.
        dim: width of items and states; a multiple of ``heads``.
        blocks: attention and feed-forward pairs.
        heads: attention heads.
        dropout: on the input, the attention and the feed-forward.
    """

    def __init__(
        self, columns: tuple[Column, ...], dim: int = 64, blocks: int = 2, heads: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        schema = Schema(tuple(columns))
        if schema.history is None:
            raise ConfigError("SASRec needs a history: a user sequence column that shares the item column's vocabulary")
        if dim % heads:
            raise ConfigError(f"SASRec dim {dim} is not a multiple of its {heads} heads")
        self.item, self.history = schema.item, schema.history
        self.items = table(self.item.size, dim, 0.02)
        self.positions = nn.Embedding(self.history.length, dim)
        nn.init.normal_(self.positions.weight, 0, 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def states(self, batch: Batch) -> Tensor:
        """The state after each item of the history, [B, L, dim]; meaningless at padding."""
        ids = batch[self.history.name]
        length = ids.shape[1]
        place = torch.arange(self.history.length - length, self.history.length, device=ids.device)
        real = ids.ne(PAD)
        x = self.dropout(self.items(ids) * math.sqrt(self.positions.embedding_dim) + self.positions(place))
        # A position sees real ones up to itself; padding sees itself, since attention to nothing is not a number.
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() & real.unsqueeze(1)
        mask = (mask | torch.eye(length, dtype=torch.bool, device=ids.device)).unsqueeze(1)
        for block in self.blocks:
            x = block(x, mask)
        states: Tensor = self.norm(x)
        return states

    def user_vectors(self, batch: Batch) -> Tensor:
        """The state after the newest item, [B, dim]."""
        return self.states(batch)[:, -1]

    def item_vectors(self, batch: Batch) -> Tensor:
        """Rows of the item table, [N, dim]."""
        vectors: Tensor = self.items(batch[self.item.name])
        return vectors

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B] of each row's item coming next."""
        return (self.user_vectors(batch) * self.item_vectors(batch)).sum(1)


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer at each position, each added to what came in."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.between = nn.LayerNorm(dim)
        self.wide = nn.Linear(dim, dim)
        self.narrow = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] and which positions see which [B, 1, L, L] to [B, L, D]."""
        query, keys, values = self.mix(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, keys, values, mask, rate)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        wide = self.dropout(F.relu(self.wide(self.between(x))))
        added: Tensor = x + self.dropout(self.narrow(wide))
        return added


def sequences(data: Dataset) -> Dataset:
    """The rows to train whole sequences on: of each user the last row and every L-th before it, L the history's length.

    Each event is then a target about once. Rows are in time order by the time column, or as they stand without one.
    """
    history = data.schema.history
    if history is None:
        raise ConfigError("this dataset has no history: a user sequence column that shares the item column's vocabulary")
    user = data.column(data.schema.user.name)
    time = data.schema.role("time")
    order = np.lexsort((data.column(time[0].name), user)) if time else np.argsort(user, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(user[order]) != 0, True))
    back = np.repeat(ends, np.diff(ends, prepend=-1)) - np.arange(len(order))
    return data.take(np.sort(order[back % history.length == 0]))
