"""Is the smaller model as good? A paired test on untouched rows that answers *proven*, *worse* or *cannot tell*.

Comparing two AUCs with their own intervals is the usual way and a blunt one: seed noise of a model trained from scratch
is three times the .001 that matters, while the *paired* difference on the same rows varies by a tenth of it. So
everything here is paired, and asks one question, non-inferiority: is the upper 95 % bound of the drop inside the margin
that was fixed before looking? A "no significant difference" proves nothing; too few rows would always find none.

- AUC: DeLong's variance, in O(n log n) (Sun & Xu, IEEE Signal Processing Letters 21, 2014).
- Rows come in users, and one user's rows rise and fall together; counting them as independent proves too much. Given
  ``users``, contributions are summed by user first (Obuchowski, Biometrics 53, 1997).
- Means over rows or users (accuracy, log loss, squared error, NDCG and recall per user): the same sum over paired differences.
- Ratios such as normalized entropy: a bootstrap that draws whole users (or rows).

Bounds use Student's t, with degrees of freedom from how evenly the units contribute (Satterthwaite): ten heavy users
among a thousand light ones are worth ten. What it costs: the answer is often *cannot tell*, with the rows it would take.
It holds for these two models and for rows like the test rows; it says nothing of another training run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit, xlogy

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.optimize.trial import Quality, Verdict

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights ``[draws, rows]`` (how often a draw holds each row) -> the metric of each draw ``[draws]``."""
T = TypeVar("T")

CONFIDENCE = 0.95
TESTED = ("auc", "accuracy", "log_loss", "normalized_entropy", "mse")
"""Metrics ``prove`` has a test for."""
_BLOCK = 1 << 22  # weights held at once in a bootstrap: 32 MB


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same rows, before a margin is laid against them."""

    rows: int
    baseline: float
    value: float
    drop: float
    """Quality lost, baseline to value; negative is better than the baseline."""
    se: float
    """Standard error of the drop."""
    low: float
    upper: float
    """One-sided 95 % bounds of the drop."""
    method: str


def delong(labels: ArrayLike, a: ArrayLike, b: ArrayLike, users: ArrayLike | None = None) -> Comparison:
    """AUC of baseline ``a`` and candidate ``b``, and the drop with its standard error.

    Args:
        labels: ``[rows]`` of 0 and 1.
        a: ``[rows]`` scores of the baseline; only their order matters.
        b: ``[rows]`` scores of the candidate.
        users: ``[rows]`` who each row belongs to; None takes rows as independent.

    Raises:
        DataError: lengths differ, a value is not finite, scores are constant, or a class is missing.
    """
    y, (a, b), who = _checked(labels, a, b, users)
    positive = _binary(y)
    for name, scores in (("baseline scores", a), ("candidate scores", b)):
        if scores.min() == scores.max():
            raise DataError(
                f"all {len(scores):,} {name} are {scores[0]:g}; a constant ranks nothing: check the model and its inputs"
            )
    return _compared(_placements(positive, a), _placements(positive, b), positive, who, "DeLong")


def _placements(positive: NDArray[np.bool_], scores: Floats) -> Floats:
    """Share of the other class each row is ranked right against (ties half): DeLong's V10 and V01 by mid-ranks."""
    overall = _ranks(scores)
    out = np.empty(len(scores))
    out[positive] = (overall[positive] - _ranks(scores[positive])) / (~positive).sum()
    out[~positive] = 1 - (overall[~positive] - _ranks(scores[~positive])) / positive.sum()
    return out


def _ranks(scores: Floats) -> Floats:
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[group])


def means(baseline: ArrayLike, values: ArrayLike, users: ArrayLike | None = None) -> Comparison:
    """Mean of a per-row or per-user value (more is better), and its drop from ``baseline`` to ``values``, paired.

    Args:
        baseline: ``[units]`` of the baseline: right or wrong per row, NDCG per user, minus the log loss per row, ...
        values: ``[units]`` of the candidate, same order.
        users: ``[units]`` who each row belongs to; None takes units as independent.

    Raises:
        DataError: lengths differ or a value is not finite.
    """
    _, (a, b), who = _checked(None, baseline, values, users)
    return _compared(a, b, np.zeros(len(a)), who, "paired t", max(1.0, float(np.ptp([a, b]))))


def _compared(
    a: Floats, b: Floats, classes: NDArray[Any], users: NDArray[Any] | None, test: str, span: float = 1.0
) -> Comparison:
    """The drop in the mean of a value of rows, ``a`` to ``b``, and its bounds.

    With two classes (AUC) each has the same mean, seen from its side, and each adds its own variance.
    """
    _, kind, counts = np.unique(classes, return_inverse=True, return_counts=True)
    last, lost = kind == len(counts) - 1, a - b
    drop = float(lost[last].mean())
    parts = (lost - drop) / counts[kind]
    if users is None:
        parts *= np.sqrt(counts / np.maximum(counts - 1, 1))[kind]
        method = f"{test} over {len(parts):,} rows"
    else:
        parts = _by_user(parts, kind, users)
        method = f"{test} clustered by {len(parts):,} users"
    se = float(np.sqrt((parts**2).sum()))
    half = se * float(stdtrit(_degrees(parts), CONFIDENCE)) if se > 1e-12 else _unseen(int(counts.min())) * span
    return Comparison(len(a), float(a[last].mean()), float(b[last].mean()), drop, se, drop - half, drop + half, method)


def _by_user(parts: Floats, kind: NDArray[np.int64], users: NDArray[Any]) -> Floats:
    """Contributions summed by user, as leaving that user out would move the drop (jackknife).

    Dividing by what is left of the class keeps the bound honest where a few users hold most rows: with 30 uneven users
    the plain sum proved a false claim in 8 % of simulations, this in 6 %.
    """
    codes = np.unique(users, return_inverse=True)[1]
    held = np.zeros((int(kind.max()) + 1, int(codes.max()) + 1))
    np.add.at(held, (kind, codes), 1)
    left = 1 - held / held.sum(1, keepdims=True)
    if not left.all():
        raise DataError("one user holds all rows of a class; a bound over users needs several, and some dozens to be tight")
    count = held.shape[1]
    sums = np.bincount(codes, weights=parts / left[kind, codes], minlength=count)
    return np.asarray(sums * math.sqrt((count - 1) / count))


def _degrees(parts: Floats) -> float:
    """Degrees of freedom of a variance summed from ``parts``: n - 1 if even, about twice the few that dominate if not."""
    squares = parts**2
    kurtosis = len(parts) * float((squares**2).sum()) / float(squares.sum()) ** 2
    return max(1.0, min(len(parts) - 1.0, 2 * len(parts) / max(kurtosis - 1, 1e-9)))


def _unseen(rows: int) -> float:
    """Share of rows that may differ where none of ``rows`` did (95 %, the exact "rule of three").

    Identical rankings leave no spread to measure, and a bound of 0 from ten rows would be a lie. A share p of rows moves
    AUC by at most p; if none of either class moved, the worst case puts it all on the rarer class.
    """
    return float(1 - (1 - CONFIDENCE) ** (1 / rows))


def bootstrap(statistic: Statistic, units: ArrayLike, *, rounds: int = 2000, seed: int = 0) -> Floats:
    """``[rounds]`` values of a statistic, each over as many units drawn with replacement as there are.

    A draw is a row of weights, so one call scores a block of draws without copying data; a pair of models drawn together
    is ``lambda w: f(w) - g(w)``. Draws that leave the statistic undefined (a class missing) are left out.

    Args:
        statistic: such as ``weighted_auc(labels, scores)`` or ``weighted_mean(values)``.
        units: ``[rows]`` the user of each row, drawn whole; ``range(rows)`` draws rows.
        rounds: draws.
        seed: same seed, same draws.
    """
    codes = np.unique(np.asarray(units), return_inverse=True)[1]
    count = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // len(codes))
    out = []
    for start in range(0, rounds, step):
        block = min(step, rounds - start)
        drawn = rng.integers(0, count, (block, count)) + np.arange(block)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=block * count).reshape(block, count)
        out.append(statistic(times[:, codes].astype(np.float64)))
    values = np.concatenate(out)
    return values[np.isfinite(values)]


def weighted_auc(labels: ArrayLike, scores: ArrayLike) -> Statistic:
    """AUC under row weights, sorted once for all draws."""
    scores = np.asarray(scores, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    positive = np.asarray(labels, dtype=np.float64)[order]
    ties = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))

    def statistic(weights: Floats) -> Floats:
        weights = weights[:, order]
        wins = np.add.reduceat(weights * positive, ties, axis=1)
        losses = np.add.reduceat(weights * (1 - positive), ties, axis=1)
        below = np.cumsum(losses, axis=1) - losses / 2
        with np.errstate(invalid="ignore"):
            return np.asarray((wins * below).sum(1) / (wins.sum(1) * losses.sum(1)))

    return statistic


def weighted_mean(values: ArrayLike) -> Statistic:
    """Mean of per-row or per-user values under weights."""
    values = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ values / weights.sum(1)


def weighted_entropy(labels: ArrayLike, logits: ArrayLike) -> Statistic:
    """Normalized entropy under weights: log loss over the entropy of the base rate (He et al. 2014); less is better."""
    labels = np.asarray(labels, dtype=np.float64)
    loss, rate = weighted_mean(_log_loss(labels, np.asarray(logits, dtype=np.float64))), weighted_mean(labels)

    def statistic(weights: Floats) -> Floats:
        share = rate(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(loss(weights) / -(xlogy(share, share) + xlogy(1 - share, 1 - share)))

    return statistic


def _resampled(before: Statistic, after: Statistic, units: NDArray[Any], unit: str, seed: int) -> Comparison:
    """A metric where less is better, by the bootstrap; percentile bounds."""
    drops = bootstrap(lambda w: after(w) - before(w), units, seed=seed)
    once = np.ones((1, len(units)))
    baseline, value = float(before(once)[0]), float(after(once)[0])
    low, upper = np.quantile(drops, [1 - CONFIDENCE, CONFIDENCE])
    method = f"bootstrap over {len(np.unique(units)):,} {unit}"
    return Comparison(len(units), baseline, value, value - baseline, float(drops.std()), float(low), float(upper), method)


def _log_loss(labels: Floats, logits: Floats) -> Floats:
    """-log(probability of what happened), in nats: logits of 1 against 0, or ``[rows, classes]``."""
    if logits.ndim == 1:
        return np.asarray(np.logaddexp(0, logits) - labels * logits)
    right = np.take_along_axis(logits, labels.astype(np.int64)[:, None], 1)[:, 0]
    return np.asarray(np.logaddexp.reduce(logits, axis=1) - right)


def _accuracy(labels: Floats, scores: Floats) -> Floats:
    """1 where the answer is right: sign of a logit against 0/1, or the largest of ``[rows, classes]``."""
    answer = scores.argmax(1) if scores.ndim == 2 else scores > 0
    return np.asarray(answer == labels, dtype=np.float64)


def prove(
    metric: str,
    labels: ArrayLike,
    baseline_scores: ArrayLike,
    scores: ArrayLike,
    *,
    margin: float,
    users: ArrayLike | None = None,
    seed: int = 0,
) -> Quality:
    """Compare a candidate with the baseline on the same rows and say whether its drop is inside the margin.

    Args:
        metric: ``auc``, ``accuracy``, ``log_loss``, ``normalized_entropy`` or ``mse``; for any other, compute a value per user
            and hand both arrays to ``means``, then ``judge``.
        labels: ``[rows]`` 0 and 1 (for accuracy and log loss over classes: the class).
        baseline_scores: ``[rows]`` logits of the baseline (or ``[rows, classes]``).
        scores: logits of the candidate, same rows.
        margin: largest drop that counts as equal, fixed before looking.
        users: ``[rows]`` who each row belongs to; give it whenever a user has several rows. People outside a vocabulary
            share one id and count as one user here, which is too careful: give their own ids where there are any.
        seed: of the bootstrap.

    Raises:
        DataError: nothing can be compared; the message says what is wrong with which array.
        ConfigError: unknown metric or impossible margin.
    """
    if metric not in TESTED:
        raise ConfigError(
            f"no test for metric {metric!r}; known: {', '.join(TESTED)}; for values per user, use `means` and `judge`"
        )
    if metric == "auc":
        return judge(metric, delong(labels, baseline_scores, scores, users), margin)
    y, (a, b), who = _checked(labels, baseline_scores, scores, users, classes=metric in ("accuracy", "log_loss"))
    if metric == "accuracy":
        return judge(metric, means(_accuracy(y, a), _accuracy(y, b), who), margin)
    if metric == "mse":
        return judge(metric, _lower(np.square(y - a), np.square(y - b), who), margin)
    if a.ndim == 1:
        _binary(y)
    if metric == "log_loss":
        return judge(metric, _lower(_log_loss(y, a), _log_loss(y, b), who), margin)
    units, unit = (np.arange(len(y)), "rows") if who is None else (who, "users")
    return judge(metric, _resampled(weighted_entropy(y, a), weighted_entropy(y, b), units, unit, seed), margin)


def _lower(a: Floats, b: Floats, users: NDArray[Any] | None) -> Comparison:
    """``means`` of a value of which less is better."""
    flipped = means(-a, -b, users)
    return dataclasses.replace(flipped, baseline=-flipped.baseline, value=-flipped.value)


def judge(metric: str, comparison: Comparison, margin: float) -> Quality:
    """A comparison held against a margin."""
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError(f"margin of {metric} is {margin}; it must be 0 or more, the drop that still counts as equal")
    c = comparison
    verdict: Verdict = "proven" if c.upper <= margin else "worse" if c.low > margin else "cannot tell"
    needed = _rows_needed(c, margin) if verdict == "cannot tell" else 0
    return Quality(metric, c.rows, c.baseline, c.value, c.drop, c.low, c.upper, margin, verdict, c.method, needed)


def _rows_needed(c: Comparison, margin: float) -> int:
    """Rows at which this drop with this spread would be proven; an interval shrinks with the root of the rows."""
    room = margin - c.drop
    return math.ceil(c.rows * ((c.upper - c.drop) / room) ** 2) if room > 0 else 0


def explain(quality: Quality) -> str:
    """The verdict in a sentence, rounded against whoever claims it."""
    q = quality
    margin, rows = exactly(q.margin), f"from {q.rows:,} rows"
    if q.verdict == "proven" and q.drop_upper_95 < 0:
        return f"proven: {q.metric} is better by at least {rounded(-q.drop_upper_95, up=False)} (95 %), {rows}"
    if q.verdict == "proven":
        return f"proven: {q.metric} drops by at most {_within(q)} (95 %), inside the margin of {margin}, {rows}"
    if q.verdict == "worse":
        return f"worse: {q.metric} drops by at least {_beyond(q)} (95 %), beyond the margin of {margin}, {rows}"
    bound = rounded(q.drop_upper_95, up=True)
    if q.rows_needed:
        more = f"about {about(q.rows_needed):,} rows would decide it"
    else:
        more = f"the drop itself, {rounded(q.drop)}, is not below the margin, so more rows like these would not prove it"
    return f"not proven at {margin}; proven at {bound} (95 %), {rows}; {more}"


def _within(q: Quality) -> str:
    """The upper bound rounded up, to as many digits as keep it inside the margin it is inside of."""
    return next(s for s in _finer(q.drop_upper_95, up=True) if Decimal(s) <= Decimal(repr(q.margin)))


def _beyond(q: Quality) -> str:
    return next(s for s in _finer(q.drop_low_95, up=False) if Decimal(s) > Decimal(repr(q.margin)))


def _finer(value: float, up: bool) -> Iterable[str]:
    return (*(rounded(value, digits, up=up) for digits in range(4, 17)), repr(value))


def rounded(value: float, digits: int = 4, *, up: bool | None = None) -> str:
    """``.0014`` of .00131: a bound rounded up (or down), a plain figure to nearest; no zero before the point."""
    mode = ROUND_HALF_EVEN if up is None else ROUND_CEILING if up else ROUND_FLOOR
    # repr, not the binary value: the ceiling of .0014 is .0014, though the float nearest to it lies a little above
    figure = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=mode)
    text = f"{abs(figure):f}"
    return ("-" if figure < 0 else "") + (text[1:] if text.startswith("0.") else text)


def exactly(value: float) -> str:
    """A margin as it was given, with four decimals at least."""
    return rounded(value, max(4, -int(Decimal(repr(float(value))).as_tuple().exponent)))


def about(rows: int) -> int:
    """Rows rounded up to two leading digits: an estimate should not look like a count."""
    step = int(10 ** max(0, len(str(rows)) - 2))
    return -(-rows // step) * step


def fixed_sequence(candidates: Iterable[T], test: Callable[[T], Quality]) -> tuple[T | None, list[tuple[T, Quality]]]:
    """Put candidates to the proof one after another, safest first, and stop at the first that is not proven.

    The same test rows may be used for each at the full 95 %, with no correction: the order is fixed before any test, and
    a candidate is tested only if all before it passed. To claim one falsely, the *first* truly unfit candidate in the
    order must pass, and that is one test with one chance of 5 % (Maurer, Hothorn & Lehmacher 1995; Westfall & Krishen
    2001). Trying on after a failure, or ordering by what the test rows say, would void it.

    Args:
        candidates: safest (largest) to cheapest.
        test: called lazily, once per candidate reached.

    Returns:
        The last one proven (the cheapest; None if the first failed) and every test made.
    """
    proven, made = None, []
    for candidate in candidates:
        quality = test(candidate)
        made.append((candidate, quality))
        if quality.verdict != "proven":
            break
        proven = candidate
    return proven, made


def _binary(labels: Floats) -> NDArray[np.bool_]:
    found = np.unique(labels)
    if not np.isin(found, (0, 1)).all():
        raise DataError(f"labels must be 0 or 1; found {', '.join(f'{v:g}' for v in found[:5])}: binarize them first")
    if len(found) < 2:
        raise DataError(
            f"all {len(labels):,} labels are {found[0]:g}; a ranking needs both classes: use a longer or another test split"
        )
    return labels > 0


def _checked(
    labels: ArrayLike | None, a: ArrayLike, b: ArrayLike, users: ArrayLike | None, classes: bool = False
) -> tuple[Floats, tuple[Floats, Floats], NDArray[Any] | None]:
    """Arrays of equal length without a NaN, scores as float64; with ``classes``, scores may have a column for each."""
    base, value = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    y = np.zeros(len(base)) if labels is None else np.asarray(labels, dtype=np.float64)
    who = None if users is None else np.asarray(users)
    arrays = {"labels": y, "baseline scores": base, "candidate scores": value}
    lengths = {name: len(array) for name, array in (arrays if who is None else {**arrays, "users": who}).items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{n:,} {name}" for name, n in lengths.items())
        raise DataError(f"rows differ: {listed}; score the same rows with both models")
    if base.shape != value.shape or base.ndim > 1 + classes:
        raise DataError(
            f"scores have shapes {base.shape} and {value.shape}; both must be [rows]{' or [rows, classes]' * classes}"
        )
    if len(base) < 2:
        raise DataError(f"a comparison needs at least 2 rows, got {len(base)}; is the test split empty?")
    for name, array in arrays.items():
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            raise DataError(f"{len(wrong):,} of {array.size:,} {name} are NaN or infinite, the first in row {wrong[0][0]:,}")
    return y, (base, value), who
