"""Retrieval and ranking as one model: a few hundred candidates out of the whole catalogue, then the best of those.

One module, so that a recommender is one bundle with one state dict, and a transform reaches both stages by their paths
(``retrieval.users``, ``ranking.mlp.0``). They are trained one after the other, each with the loss of its kind: share nothing,
since what retrieval learns (is it among the good ones?) is not what ranking learns (which of the good ones?).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pennyweight.core.errors import ConfigError
from pennyweight.model.spec import Batch, Spec, build


class Cascade(nn.Module):
    """A retrieval model and a ranking model, each given as ``{"factory": import path, "args": {...}}`` of one of ours."""

    def __init__(self, retrieval: Mapping[str, Any], ranking: Mapping[str, Any]) -> None:
        super().__init__()
        self.retrieval = _stage("retrieval", retrieval)
        self.ranking = _stage("ranking", ranking)
        if not hasattr(self.retrieval, "item_vectors"):
            raise ConfigError(f"{retrieval['factory']} cannot retrieve: it has no user_vectors and item_vectors")

    def user_vectors(self, batch: Batch) -> Tensor:
        """Retrieval's vectors of users [B, D]."""
        vectors: Tensor = self.retrieval.user_vectors(batch)  # type: ignore[operator]
        return vectors

    def item_vectors(self, batch: Batch) -> Tensor:
        """Retrieval's vectors of items [N, D]."""
        vectors: Tensor = self.retrieval.item_vectors(batch)  # type: ignore[operator]
        return vectors

    def forward(self, batch: Batch) -> Tensor:
        """Ranking's logits [B]."""
        logits: Tensor = self.ranking(batch)
        return logits


def _stage(name: str, stage: Mapping[str, Any]) -> nn.Module:
    if set(stage) != {"factory", "args"}:
        raise ConfigError(f"Cascade's {name} needs 'factory' and 'args', got {', '.join(stage) or 'nothing'}")
    return build(Spec(stage["factory"], stage["args"]))
