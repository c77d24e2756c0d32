"""How good predictions are: exact, vectorized, and honest about ties.

Row metrics (AUC, log loss, calibration) take labels and probabilities; ranking metrics take which items were right and
their scores. scikit-learn is the oracle in the tests, not the engine: its AUC and NDCG sort in float64 with input checks,
3 to 10 times slower, and it has no full ranking over users that fits in memory.

Ties matter here more than elsewhere. A quantized model gives equal scores to many items, and a metric that lets the sort
decide who of them comes first rewards or punishes at random. Every metric below is the expectation over all orders of the
tied items, so a constant model scores what chance scores. The cost is one comparison per score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from pennyweight.core.errors import ConfigError, DataError

Floats = NDArray[np.float64]
CHUNK_BYTES = 64 << 20
"""Scores held at once in a full ranking."""


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive row outscores a negative one, ties counting a half.

    Args:
        labels: [B], positive where > 0.5.
        scores: [B], any monotone score (logits will do).

    Raises:
        DataError: only one class is there, or a score is not a number.
    """
    y, s = _pair(labels, scores)
    positive = y > 0.5
    n, p = len(y), int(positive.sum())
    if p in (0, n):
        raise DataError(f"AUC needs both classes, but of {n} labels {p} are positive; evaluate on more rows")
    _, group, count = np.unique(s, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[group[positive]].sum() - p * (p + 1) / 2) / (p * (n - p)))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of -log(probability of what happened), in nats; probabilities [B] are kept 1e-15 away from 0 and 1."""
    y, p = _pair(labels, probabilities)
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def cross_entropy(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean of -log(probability of the class that was right), in nats, from classes [B] and logits [B, C]."""
    y, z = np.asarray(labels).astype(np.int64), np.asarray(logits, np.float64)
    right = np.take_along_axis(z, y[:, None], 1)[:, 0]
    return float(np.mean(np.logaddexp.reduce(z, axis=1) - right))


def refined_log_loss(labels: ArrayLike, logits: ArrayLike) -> float:
    """Log loss after the one temperature that lowers it most: how well rows are told apart, whatever the confidence.

    A network that trains on grows too sure of itself, and its log loss rises while it still gets better; this does not,
    and has not the noise of accuracy on few rows (Berta et al. 2025, "Rethinking early stopping: refine, then calibrate").

    Args:
        labels: [B], 0 or 1, or classes.
        logits: [B], or [B, C].
    """
    z = np.asarray(logits, np.float64)

    def of(power: float) -> float:
        scaled = z * math.exp(power)
        return cross_entropy(labels, scaled) if z.ndim == 2 else log_loss(labels, sigmoid(scaled))

    return float(minimize_scalar(of, bounds=(-4.0, 4.0), method="bounded").fun)


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss divided by that of always predicting the mean label (He et al. 2014, Facebook); below 1 is useful."""
    y, _ = _pair(labels, probabilities)
    return log_loss(y, probabilities) / log_loss(y, np.full_like(y, y.mean()))


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Sum of predictions over sum of labels: 1 is calibrated, 1.1 promises 10 % too many clicks."""
    y, p = _pair(labels, probabilities)
    if y.sum() == 0:
        raise DataError(f"calibration needs a positive label, and there is none among {len(y)}; evaluate on more rows")
    return float(p.sum() / y.sum())


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: mean gap of prediction and frequency over equally wide bins, weighted by rows."""
    y, p = _pair(labels, probabilities)
    where = np.minimum((p * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(where, p - y, bins)).sum() / len(y))


def accuracy(labels: ArrayLike, scores: ArrayLike) -> float:
    """Share of rows classified right: probabilities [B] against one half, or class scores [B, C] by the largest."""
    y, s = np.asarray(labels), np.asarray(scores)
    return float(np.mean(s.argmax(1) == y if s.ndim == 2 else (s > 0.5) == (y > 0.5)))


def mse(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean squared error."""
    y, p = _pair(labels, predictions)
    return float(np.mean((y - p) ** 2))


def rmse(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Root of the mean squared error."""
    return math.sqrt(mse(labels, predictions))


def recall_at_k(truth: ArrayLike, scores: ArrayLike, k: int) -> float:
    """Mean over users of the share of their right items among the k best scored; users without any are left out.

    Args:
        truth: [U, N], nonzero where item n is right for user u.
        scores: [U, N]; minus infinity leaves an item out.
        k: length of the list.
    """
    return _matrix(truth, scores, k).recall


def ndcg_at_k(truth: ArrayLike, scores: ArrayLike, k: int) -> float:
    """Mean over users of the discounted gain of the k best over that of a perfect list (binary gains, log2 discount)."""
    return _matrix(truth, scores, k).ndcg


def hit_rate_at_k(truth: ArrayLike, scores: ArrayLike, k: int) -> float:
    """Share of users with at least one right item among the k best scored."""
    return _matrix(truth, scores, k).hit_rate


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Mean quality of top-k lists."""

    recall: float
    ndcg: float
    hit_rate: float
    users: int
    """Users with at least one right item, over whom the means are."""
    each: Floats = dataclasses.field(repr=False, compare=False, default_factory=lambda: np.empty((3, 0)))
    """Recall, NDCG and hit of each of those users, [3, users]: what a paired test needs."""


@dataclasses.dataclass(frozen=True)
class Lists:
    """A list of item ids for each of U users, end to end: user u's are ``items[starts[u]:starts[u + 1]]``."""

    starts: NDArray[np.int64]
    items: NDArray[np.int64]

    @classmethod
    def group(cls, users: NDArray[np.int64], items: NDArray[np.int64], count: int) -> Lists:
        """The lists of users 0 to ``count - 1`` from (user, item) pairs in any order; a pair given twice counts once."""
        width = int(items.max(initial=0)) + 1
        keys = np.unique(users.astype(np.int64) * width + items)
        return cls(np.searchsorted(keys, np.arange(count + 1) * width), keys % width)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def cut(self, start: int, stop: int) -> Lists:
        """The lists of users ``start`` to ``stop - 1``."""
        starts = self.starts[start : stop + 1]
        return Lists(starts - starts[0], self.items[starts[0] : starts[-1]])

    def rows(self) -> NDArray[np.int64]:
        """The user of each of ``items``."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def full_ranking(
    score: Callable[[int, int], Tensor], truth: Lists, seen: Lists | None = None, k: int = 10, chunk: int = 0
) -> Ranked:
    """Rank every item for every user, leaving out what a user has seen, in chunks of users.

    No sampled candidates: metrics over sampled negatives do not even keep the order of models (Krichene & Rendle, KDD 2020).

    Args:
        score: called with (start, stop), gives scores [stop - start, N] of all items; it may be written into.
        truth: each user's right items; a user with none is left out of the means.
        seen: items that are no candidates; one that is also right stays a candidate.
        k: length of the lists.
        chunk: users at a time; 0 takes as many as need about 64 MiB.
    """
    parts, start = [np.empty((3, 0))], 0
    while start < len(truth):
        stop = min(start + (chunk or 16), len(truth))
        right = truth.cut(start, stop)
        scores = score(start, stop)
        chunk = chunk or max(1, CHUNK_BYTES // (8 * scores.shape[1]))
        if seen is not None:
            _leave_out(scores, seen.cut(start, stop), right)
        parts.append(_expected(scores, right, k))
        start = stop
    found = np.concatenate(parts, 1)
    if not found.size:
        raise DataError(f"none of {len(truth)} users has a right item to find; evaluate on more rows")
    recall, ndcg, hit_rate = found.mean(1).tolist()
    return Ranked(recall, ndcg, hit_rate, found.shape[1], found)


def _leave_out(scores: Tensor, seen: Lists, right: Lists) -> None:
    rows, items = torch.from_numpy(right.rows()), torch.from_numpy(right.items)
    kept = scores[rows, items]
    scores[torch.from_numpy(seen.rows()), torch.from_numpy(seen.items)] = -math.inf
    scores[rows, items] = kept


def _expected(scores: Tensor, right: Lists, k: int) -> Floats:
    """Recall, NDCG and hit of each user with a right item, [3, users], expected over the orders of tied items.

    Only the k best are sorted. An item scored above the k-th is tied with items inside the list alone; one scored as
    the k-th shares the last places with all ``tied`` items of that score, which one pass over the row counts.
    """
    counts = np.diff(right.starts)
    some = torch.from_numpy(counts > 0)
    k = min(k, scores.shape[1])
    best = scores.topk(k, dim=1).values
    last = best[:, -1:]
    tied = (scores == last).sum(1).double()
    above = (best > last).sum(1).double()
    rows = torch.from_numpy(right.rows())
    mine = scores[rows, torch.from_numpy(right.items)].unsqueeze(1)
    boundary = (mine == last[rows]).squeeze(1)
    before = (best[rows] > mine).sum(1).double()
    equal = torch.where(boundary, tied[rows], (best[rows] == mine).sum(1).double())
    inside = (mine >= last[rows]).squeeze(1) & (mine > -math.inf).squeeze(1)
    upto = torch.minimum(before + equal, torch.tensor(float(k)))
    gain = torch.cat([torch.zeros(1), 1 / torch.arange(2, k + 2).log2()]).double().cumsum(0)
    equal = equal.clamp_min(1)
    place = torch.where(inside, (upto - before) / equal, 0.0)
    worth = torch.where(inside, (gain[upto.long()] - gain[before.long()]) / equal, 0.0)
    total = torch.from_numpy(counts).double()
    recall = torch.zeros(len(counts)).double().index_add(0, rows, place) / total
    ndcg = torch.zeros(len(counts)).double().index_add(0, rows, worth) / gain[total.clamp(max=k).long()]
    sure = torch.zeros(len(counts)).double().index_add(0, rows, (inside & ~boundary).double())
    maybe = torch.zeros(len(counts)).double().index_add(0, rows, (inside & boundary).double())
    hit = torch.where(sure > 0, 1.0, 1 - _none(tied, maybe, k - above))
    return torch.stack([recall, ndcg, hit])[:, some].numpy()


def _none(tied: Tensor, right: Tensor, drawn: Tensor) -> Tensor:
    """The chance that ``drawn`` of ``tied`` items, ``right`` of them right, hold no right one (hypergeometric)."""
    wrong = tied - right
    log = torch.lgamma(wrong + 1) - torch.lgamma((wrong - drawn).clamp_min(0) + 1)
    log += torch.lgamma(tied - drawn + 1) - torch.lgamma(tied + 1)
    return torch.where(right == 0, 1.0, torch.where(drawn > wrong, 0.0, log.exp()))


def _matrix(truth: ArrayLike, scores: ArrayLike, k: int) -> Ranked:
    y, s = np.asarray(truth), torch.as_tensor(np.asarray(scores))
    if y.shape != s.shape or y.ndim != 2:
        raise DataError(f"truth has shape {y.shape} and scores {tuple(s.shape)}; both must be [users, items]")
    users, items = np.nonzero(y)
    return full_ranking(lambda start, stop: s[start:stop], Lists.group(users, items, len(y)), None, k)


def _pair(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    y, s = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if y.shape != s.shape or y.ndim != 1 or not len(y):
        raise DataError(f"labels have shape {y.shape} and scores {s.shape}; both must be [rows], and not empty")
    if np.isnan(s).any():
        raise DataError(f"{int(np.isnan(s).sum())} of {len(s)} scores are not numbers; the model's weights or inputs hold NaN")
    return y, s


def sigmoid(logits: ArrayLike) -> Floats:
    """Probabilities from logits, in float64 without overflow."""
    z = np.asarray(logits, np.float64)
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row metric over a model's raw outputs."""

    of: Callable[[ArrayLike, ArrayLike], float]
    """From labels [B] and logits [B] (or class scores [B, C])."""
    higher: bool
    """Whether more is better."""


def _on_probabilities(metric: Callable[[ArrayLike, ArrayLike], float]) -> Callable[[ArrayLike, ArrayLike], float]:
    return lambda labels, logits: metric(labels, logits if np.ndim(logits) == 2 else sigmoid(logits))


METRICS: Mapping[str, Metric] = {
    "auc": Metric(auc, True),
    "log_loss": Metric(lambda y, z: cross_entropy(y, z) if np.ndim(z) == 2 else log_loss(y, sigmoid(z)), False),
    "refined_log_loss": Metric(refined_log_loss, False),
    "normalized_entropy": Metric(_on_probabilities(normalized_entropy), False),
    "calibration_error": Metric(_on_probabilities(calibration_error), False),
    "accuracy": Metric(_on_probabilities(accuracy), True),
    "mse": Metric(mse, False),
    "rmse": Metric(rmse, False),
}
"""Metrics of rows by name; ``ndcg@10``, ``recall@20`` and ``hit_rate@10`` name full rankings (see ``ranking``)."""


def ranking(name: str) -> tuple[str, int] | None:
    """The field of ``Ranked`` and the k that ``ndcg@10`` names, or None for a row metric.

    Raises:
        ConfigError: no such metric.
    """
    field, _, k = name.partition("@")
    if name in METRICS:
        return None
    if field in ("ndcg", "recall", "hit_rate") and k.isdigit() and int(k) > 0:
        return field, int(k)
    raise ConfigError(f"unknown metric {name!r}; known: {', '.join(METRICS)}, ndcg@K, recall@K, hit_rate@K")


def higher(name: str) -> bool:
    """Whether more of this metric is better."""
    return ranking(name) is not None or METRICS[name].higher
