"""What training minimizes, as functions from a batch to a scalar.

Two kinds. *Row* losses compare the model's output with the row's label. *Pair* losses (``bpr``, ``sampled-softmax``, ``gbce``)
read only rows somebody liked and compare the vector of a user with those of the right item and of items drawn at random;
they need a model that has ``user_vectors`` and ``item_vectors``, or, for a whole sequence a row, ``states``. All pairs of a
batch share their random items, so that scoring them is one matrix product; drawing anew for each pair is the known
alternative, and costs a gather as large as the product. A teacher is asked about the same pairs and the same random items.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST, Schema
from pennyweight.model import team
from pennyweight.model.spec import Batch, call

Loss = Callable[[Batch], Tensor]
TEACHER = "teacher output"
"""The column that holds a teacher's outputs beside the rows it was asked about."""


class Retriever(Protocol):
    """What a pair loss needs of a module; ``states`` only where it reads whole sequences."""

    def user_vectors(self, batch: Batch) -> Tensor:
        """[B, D] from the user and context columns."""

    def item_vectors(self, batch: Batch) -> Tensor:
        """[N, D] from the item columns."""

    def states(self, batch: Batch) -> Tensor:
        """[B, L, D]: the user after each item of the history."""


ROWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "cross-entropy": F.cross_entropy,
    "mse": F.mse_loss,
}


def row_loss(module: nn.Module, name: str, label: str, inputs: Sequence[str], alpha: float, temperature: float) -> Loss:
    """Mean loss of a batch against its labels, mixed with the teacher's outputs where the batch holds them."""
    hard, soft = ROWS[name], functools.partial(SOFT[name], temperature)

    def of(batch: Batch) -> Tensor:
        output = call(module, batch, inputs)
        loss = hard(output, batch[label])
        loss = (1 - alpha) * loss + alpha * soft(output, batch[TEACHER]) if TEACHER in batch else loss
        return team.mean(loss, len(output))

    return of


def dealt_loss(
    module: nn.Module,
    teacher: nn.Module,
    name: str,
    schema: Schema,
    inputs: Sequence[str],
    alpha: float,
    temperature: float,
    weight: float,
) -> Loss:
    """``row_loss`` with a teacher, and ``weight`` times its loss on pairs nobody labelled.

    A batch's items are dealt anew to its users, and the teacher is asked about each pair. Rated pairs are few and the same
    every epoch; these are as many as one likes, so a small model learns what the teacher thinks, not what it saw. Both
    halves go through the model at once, which gives batch norm one set of statistics.
    """
    hard, soft = ROWS[name], functools.partial(SOFT[name], temperature)
    items = {c.name for c in schema.role("item")}
    features = [c.name for c in schema.features if c.name != TEACHER]
    label = schema.label.name

    def of(batch: Batch) -> Tensor:
        size = len(batch[label])
        deal = torch.randperm(size)
        dealt = {n: batch[n][deal] if n in items else batch[n] for n in features}
        output = call(module, {n: torch.cat([batch[n], dealt[n]]) for n in features}, inputs)
        with torch.no_grad():
            said = call(teacher, dealt, inputs)
            known = batch[TEACHER] if TEACHER in batch else call(teacher, batch, inputs)
        told = (1 - alpha) * hard(output[:size], batch[label]) + alpha * soft(output[:size], known)
        return told + weight * soft(output[size:], said)

    return of


def mixup_loss(
    module: nn.Module,
    teacher: nn.Module | None,
    name: str,
    schema: Schema,
    inputs: Sequence[str],
    alpha: float,
    temperature: float,
    spread: float,
) -> Loss:
    """Mean loss of a batch's rows blended two and two, against their blended labels and the teacher's answers about the blends.

    Labels as in mixup (Zhang et al. 2018, arXiv 1710.09412), with the share of each pair from Beta(spread, spread); the teacher
    is asked about the very rows the student sees (Beyer et al. 2022, arXiv 2106.05237). A few thousand rows become as many as
    one likes.

    Raises:
        ConfigError: the model reads ids, which have no blends.
    """
    hard, soft = ROWS[name], functools.partial(SOFT[name], temperature)
    names = [n for n in (inputs or (c.name for c in schema.features)) if n != TEACHER]
    ids = [n for n in names if schema[n].kind != "numeric"]
    if ids:
        raise ConfigError(f"mixup blends numbers, and {', '.join(ids)} holds ids; set mixup to 0")
    label, shares = schema.label.name, torch.distributions.Beta(spread, spread)

    def of(batch: Batch) -> Tensor:
        share = shares.sample((len(batch[label]),))
        deal = torch.randperm(len(share))

        def blend(values: Tensor) -> Tensor:
            return torch.lerp(values[deal], values, share.reshape(-1, *[1] * (values.dim() - 1)))

        rows = {n: blend(batch[n]) for n in names}
        output = call(module, rows, inputs)
        right = F.one_hot(batch[label], output.shape[1]) if name == "cross-entropy" else batch[label]
        loss = hard(output, blend(right.to(output.dtype)))
        if teacher is None:
            return loss
        with torch.no_grad():
            said = call(teacher, rows, inputs)
        return (1 - alpha) * loss + alpha * soft(output, said)

    return of


def _soft_bce(t: float, output: Tensor, teacher: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output / t, torch.sigmoid(teacher / t)) * t**2


def _soft_cross_entropy(t: float, output: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(output / t, 1), F.log_softmax(teacher / t, 1), reduction="batchmean", log_target=True) * t**2


def _soft_mse(t: float, output: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(output, teacher)


SOFT: Mapping[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "bce": _soft_bce,
    "cross-entropy": _soft_cross_entropy,
    "mse": _soft_mse,
}
"""The same losses against a teacher's output at a temperature, scaled by its square (Hinton et al. 2015)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """All items as batches: their feature columns indexed by id, and how often each occurs in training."""

    columns: Mapping[str, Tensor]
    counts: Tensor
    """Occurrences by id as float64 [N]; 0 for the two reserved ids."""

    @classmethod
    def of(cls, data: Dataset, sequences: bool = False) -> Items:
        """The items of a dataset's catalog, counted where they are right: in liked rows, and in histories if those train."""
        features = data.catalog.item_batch(np.arange(data.schema.item.size))
        right = [data.column(data.schema.item.name)[liked(data)]]
        if sequences and data.schema.history is not None:
            right.append(data.column(data.schema.history.name).ravel())
        counts = torch.from_numpy(np.bincount(np.concatenate(right), minlength=data.schema.item.size)).double()
        counts[:FIRST] = 0
        if not counts.sum():
            raise DataError(f"no row of {len(data)} has a known item that was liked; there is nothing to learn to retrieve")
        return cls(features, counts)

    def of_ids(self, ids: Tensor) -> Batch:
        """The item columns of these ids."""
        return {name: column[ids] for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.counts)


def liked(data: Dataset) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are positive: label > 0, or all where the schema has no label."""
    labels = data.schema.role("label")
    return data.column(labels[0].name) > 0 if labels else np.ones(len(data), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Vectors [T, D] of users (or of moments in their sequences), the item [T] that was right, and the user's id [T]."""

    vectors: Tensor
    items: Tensor
    users: Tensor | None


def pairs_of(module: Retriever, schema: Schema, sequences: bool) -> Callable[[Batch], Pairs]:
    """How a batch becomes pairs: one a row (all of them liked), or one a position where the module reads whole sequences."""
    user = next((c.name for c in schema.role("user") if c.kind == "categorical"), None)
    label = next((c.name for c in schema.role("label")), None)
    item, history = schema.item.name, schema.history

    def rows(batch: Batch) -> Pairs:
        return Pairs(module.user_vectors(batch), batch[item], batch[user] if user else None)

    def positions(batch: Batch) -> Pairs:
        assert history is not None
        past, last = batch[history.name], batch[item]
        last = last if label is None else torch.where(batch[label] > 0, last, 0)
        target = torch.cat([past[:, 1:], last.unsqueeze(1)], 1)
        keep = (past > 0) & (target >= FIRST)
        users = batch[user].unsqueeze(1).expand_as(past)[keep] if user else None
        return Pairs(module.states(batch)[keep], target[keep], users)

    return positions if sequences and history is not None else rows


@dataclasses.dataclass(frozen=True, eq=False)
class Contest:
    """A pair loss in its four steps, so that a teacher can be asked about the very items that were drawn."""

    rivals: Callable[[Pairs], Tensor]
    """Item ids drawn against a batch's pairs."""
    scores: Callable[[Retriever, Pairs, Tensor], Tensor]
    """A module's scores of the right and the drawn items, a row a pair; minus infinity for one that does not compete."""
    hard: Callable[[Tensor, Pairs], Tensor]
    """The loss of these scores, knowing which item was right."""
    soft: Callable[[float, Tensor, Tensor], Tensor]
    """The loss of these scores against a teacher's, at a temperature."""


def pair_loss(
    module: nn.Module,
    name: str,
    data: Dataset,
    negatives: int,
    popularity: float,
    calibration: float,
    teacher: nn.Module | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
) -> Loss:
    """Mean loss of a batch's pairs against items drawn from the catalog.

    Args:
        module: has ``user_vectors`` (or ``states``) and ``item_vectors``.
        name: ``bpr``, ``sampled-softmax`` or ``gbce``.
        data: the training rows: which items there are, how often, and who liked what.
        negatives: items drawn a batch; 0 takes the batch's own items, as many as the catalog or more takes all of it.
        popularity: items are drawn in proportion to occurrences to this power; 0 is uniform.
        calibration: ``t`` of gBCE.
        teacher: a module of the same methods, asked about the same pairs and drawn items.
        alpha: weight of the teacher against what was liked, 0 to 1.
        temperature: softens the teacher's and the student's probabilities.
    """
    if not hasattr(module, "item_vectors"):
        kind = type(module).__name__
        raise ConfigError(f"loss {name!r} needs a model with user_vectors and item_vectors, and {kind} has none; use 'bce'")
    sequences = hasattr(module, "states")
    items = Items.of(data, sequences)
    contest = _contest(name, data, items, negatives, popularity, calibration)
    student = cast(Retriever, module)
    pairs = pairs_of(student, data.schema, sequences)
    if teacher is None:
        return functools.partial(_fought, contest, student, pairs)
    teacher = teacher.eval()
    master = cast(Retriever, teacher)
    asked = pairs_of(master, data.schema, sequences)

    def of(batch: Batch) -> Tensor:
        found = pairs(batch)
        ids = contest.rivals(found)
        scores = contest.scores(student, found, ids)
        with torch.no_grad():
            told = contest.scores(master, asked(batch), ids)
        return (1 - alpha) * contest.hard(scores, found) + alpha * contest.soft(temperature, scores, told)

    return of


def _fought(contest: Contest, module: Retriever, pairs: Callable[[Batch], Pairs], batch: Batch) -> Tensor:
    found = pairs(batch)
    with team.computing(team.counted(len(found.items))):
        scores = contest.scores(module, found, contest.rivals(found))
        return team.mean(contest.hard(scores, found), len(found.items))


def _contest(name: str, data: Dataset, items: Items, negatives: int, popularity: float, calibration: float) -> Contest:
    draw = Draw(items.counts, negatives, popularity)
    if name == "bpr":
        return _bpr(items, Draw(items.counts, 1, popularity), Liked.of(data))
    if name == "gbce":
        return _gbce(items, draw, calibration)
    return _every(items) if draw.every else _drawn(items, draw) if draw.size else _within(items, draw)


class Draw:
    """Draws item ids, with replacement, and knows how often each is expected in a draw."""

    def __init__(self, counts: Tensor, size: int, popularity: float) -> None:
        weight = (counts + 1e-12) ** popularity if popularity else torch.ones_like(counts)
        weight[:FIRST] = 0
        self.every = size >= len(counts) - FIRST
        self.size = 0 if self.every else size
        self._upto = (weight / weight.sum()).cumsum(0)
        self.chance = (weight / weight.sum()).float()
        """The chance of each id in one draw, [N]."""
        self.natural = (counts / counts.sum()).float()
        """The share of each id among the right items, [N]: its chance to be in a batch."""

    def __call__(self, n: int) -> Tensor:
        """``n`` ids."""
        return torch.searchsorted(self._upto, torch.rand(n, dtype=torch.float64), right=True).clamp_(max=len(self._upto) - 1)


class Liked:
    """Who liked what in training, as sorted keys."""

    def __init__(self, keys: Tensor, width: int) -> None:
        self.keys, self.width = keys, width

    @classmethod
    def of(cls, data: Dataset) -> Liked | None:
        """The liked pairs of a dataset, or None where its schema has no user."""
        if not any(c.kind == "categorical" for c in data.schema.role("user")):
            return None
        rows, width = liked(data), data.schema.item.size
        keys = data.column(data.schema.user.name)[rows].astype(np.int64) * width + data.column(data.schema.item.name)[rows]
        return cls(torch.from_numpy(np.unique(keys)), width)

    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each user liked each item, bool [T]."""
        keys = users * self.width + items
        return self.keys[torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)] == keys


def _bpr(items: Items, draw: Draw, liked: Liked | None) -> Contest:
    """Bayesian personalized ranking (Rendle et al. 2009): the right item above one drawn for each pair."""

    def margins(module: Retriever, pairs: Pairs, ids: Tensor) -> Tensor:
        part = team.part()
        with team.computing(part and part.twice()):
            better, worse = _vectors(module, items, torch.cat([pairs.items, ids])).chunk(2)
        return (pairs.vectors * (better - worse)).sum(1)

    return Contest(lambda pairs: _unliked(pairs, draw, liked), margins, lambda s, pairs: F.softplus(-s).mean(), _soft_bce)


def _unliked(pairs: Pairs, draw: Draw, liked: Liked | None, tries: int = 3) -> Tensor:
    """An item for each pair; one the user likes is drawn again, a few times (who likes most of a catalog keeps some)."""
    wrong = team.drawn(len(pairs.items), draw)
    if liked is None or pairs.users is None:
        return wrong
    for _ in range(tries):
        again = liked(pairs.users, wrong).nonzero().squeeze(1)
        part = team.counted(len(again))
        if not part.total:
            break
        wrong[again] = part.of(draw(part.total))
    return wrong


def _every(items: Items) -> Contest:
    """Cross-entropy of the right item among all items."""

    def scores(module: Retriever, pairs: Pairs, ids: Tensor) -> Tensor:
        return pairs.vectors @ _rivals(module, items, ids).T

    every = torch.arange(FIRST, len(items))
    return Contest(lambda _: every, scores, lambda s, pairs: F.cross_entropy(s, pairs.items - FIRST), _soft_softmax)


def _drawn(items: Items, draw: Draw) -> Contest:
    """The same, the sum over all items estimated from those drawn.

    Each drawn item's exponential is divided by how often it is expected in the draw, so that the estimate is unbiased (Bengio
    & Senécal 2008); the right item is itself and is not divided.
    """

    def scores(module: Retriever, pairs: Pairs, ids: Tensor) -> Tensor:
        right = (pairs.vectors * _vectors(module, items, pairs.items)).sum(1, keepdim=True)
        wrong = pairs.vectors @ _rivals(module, items, ids).T - (draw.size * draw.chance[ids]).log()
        return torch.cat([right, wrong.masked_fill(pairs.items.unsqueeze(1) == ids, -math.inf)], 1)

    return Contest(lambda _: draw(draw.size), scores, _first, _soft_softmax)


def _within(items: Items, draw: Draw) -> Contest:
    """The same with the other pairs' right items for those drawn, expected as often as they occur (Yi et al. 2019)."""

    def scores(module: Retriever, pairs: Pairs, ids: Tensor) -> Tensor:
        scores = pairs.vectors @ _rivals(module, items, ids).T
        wrong = scores - (len(ids) * draw.natural[ids]).log()
        part = team.part()
        right = scores.diagonal(part.spans[0][0] if part else 0)[: len(scores)].unsqueeze(1)
        return torch.cat([right, wrong.masked_fill(pairs.items.unsqueeze(1) == ids, -math.inf)], 1)

    return Contest(
        lambda pairs: pairs.items if team.part() is None else team.gathered(pairs.items), scores, _first, _soft_softmax
    )


def _first(scores: Tensor, pairs: Pairs) -> Tensor:
    """Cross-entropy of the first of the scores [T, 1 + K]."""
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def _soft_softmax(t: float, scores: Tensor, told: Tensor) -> Tensor:
    """Cross-entropy against the teacher's choice among the same items."""
    out = told == -math.inf  # an infinity times a probability of zero is not a number
    return -(F.softmax(told / t, 1) * F.log_softmax(scores / t, 1).masked_fill(out, 0.0)).sum(1).mean() * t**2


def _gbce(items: Items, draw: Draw, calibration: float) -> Contest:
    """Generalized binary cross-entropy (Petrov & Macdonald 2023, gSASRec): weighs the right item down for having few rivals.

    A calibration of 0 is SASRec's plain binary cross-entropy, 1 undoes the overconfidence that sampling brings.
    """
    if draw.every or not draw.size:
        raise ConfigError(f"loss 'gbce' needs 1 to {len(items) - FIRST - 1} negatives; use 'sampled-softmax' for none or all")
    alpha = draw.size / (len(items) - FIRST - 1)
    beta = alpha * ((1 - 1 / alpha) * calibration + 1 / alpha)

    def scores(module: Retriever, pairs: Pairs, ids: Tensor) -> Tensor:
        right = (pairs.vectors * _vectors(module, items, pairs.items)).sum(1, keepdim=True)
        wrong = pairs.vectors @ _rivals(module, items, ids).T
        return torch.cat([right, wrong.masked_fill(pairs.items.unsqueeze(1) == ids, -math.inf)], 1)

    def hard(scores: Tensor, pairs: Pairs) -> Tensor:
        return (beta * F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).sum(1)).mean() / (1 + draw.size)

    def soft(t: float, scores: Tensor, told: Tensor) -> Tensor:
        keep = told > -math.inf
        return _soft_bce(t, scores[keep], told[keep])

    return Contest(lambda _: draw(draw.size), scores, hard, soft)


def _rivals(module: Retriever, items: Items, ids: Tensor) -> Tensor:
    """Vectors of items that all pairs share, the same on all workers."""
    with team.computing(None):
        return _vectors(module, items, ids)


def _vectors(module: Retriever, items: Items, ids: Tensor) -> Tensor:
    return module.item_vectors(items.of_ids(ids))
