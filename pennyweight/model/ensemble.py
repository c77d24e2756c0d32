"""Several models of one task as one: their opinions averaged.

Used as a teacher. Models trained from different seeds make different mistakes, so their average is better than each, and a
small student of it can be better than the one large model it replaces (Zhu et al. 2020, arXiv 2011.04106). Averaging is of
what the loss is about: probabilities for a click or a class, the number itself for a regression; averaging logits lets one
overconfident member decide. Retrieval models are averaged by their scores, which is what a dot product can average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pennyweight.model.spec import Batch, call


class Ensemble(nn.Module):
    """The members' average, as logits again (as it is for ``mse``)."""

    def __init__(self, members: Sequence[nn.Module], loss: str, inputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.loss, self.columns = loss, tuple(inputs)

    def forward(self, *given: Batch | Tensor) -> Tensor:
        """Logits [B] or [B, classes], from what each member takes."""
        batch = dict(zip(self.columns, given, strict=True)) if self.columns else given[0]
        outputs = torch.stack([call(m, batch, self.columns) for m in self.members])  # type: ignore[arg-type]
        if len(self.members) == 1 or self.loss == "mse":
            return outputs.mean(0)
        if self.loss == "cross-entropy":
            return outputs.log_softmax(-1).exp().mean(0).log()
        return torch.logit(outputs.sigmoid().mean(0), eps=1e-6)


class Retrievers(nn.Module):
    """Several retrieval models as one whose score of a pair is the mean of theirs: their vectors, end to end."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def user_vectors(self, batch: Batch) -> Tensor:
        """[B, D of all] from the user and context columns."""
        return torch.cat([m.user_vectors(batch) for m in self.members], -1) / len(self.members)  # type: ignore[operator]

    def states(self, batch: Batch) -> Tensor:
        """[B, L, D of all]: the user after each item of the history."""
        return torch.cat([m.states(batch) for m in self.members], -1) / len(self.members)  # type: ignore[operator]

    def item_vectors(self, batch: Batch) -> Tensor:
        """[N, D of all] from the item columns."""
        return torch.cat([m.item_vectors(batch) for m in self.members], -1)  # type: ignore[operator]
