"""A budget in words: what may be spent, and what must not be lost.

    p99 <= 10ms, bytes <= 1MB, memory <= 64MB, cost <= 0.5 USD/M, auc drop <= 0.001

Clauses are joined by a comma, a semicolon, a new line or "and". Each is a name, ``<=`` (``<`` and ``≤`` mean the same: a
measured number never sits exactly on a limit), a number and its unit. Words rather than flags or a file, because the same
line is typed, stored with the result and read back by a person; a unit is never guessed, since 10 could be ms or s.

Two kinds of limits:

* *spend* (``p50``, ``p99``, ``bytes``, ``memory``, ``cost``). A budget without any means: as cheap as possible. The unit
  ``x`` limits to so many times what the given model spends (``p50 <= 0.33x`` is three times faster), which says the same
  on every machine.
* *margins*: how far a quality metric may get worse, as ``METRIC drop <= NUMBER``. A plain number is absolute; with ``%``
  it is relative to the baseline's value (0.5 % of a recall of 0.2 is 0.001). ``quality`` stands for whichever metric the
  model is judged by. Where no margin is given it is 0.001, absolute: what MLPerf's 99.9 % rule comes to for an AUC of .8,
  and what BARS' maintainers call an exact reproduction. "Drop" is always towards worse, for a loss too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pennyweight.core.errors import BudgetError

DEFAULT_MARGIN = 0.001
"""The absolute drop allowed of a metric that no margin names."""

TIMES = "x"
"""The unit of a limit in multiples of what the given model spends."""

EXAMPLE = "p99 <= 10ms, bytes <= 1MB, auc drop <= 0.001"

TIME = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
SIZE = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SPENDS: dict[str, tuple[str, Mapping[str, float]]] = {
    "p50": ("p50_ms", TIME),
    "p99": ("p99_ms", TIME),
    "bytes": ("bytes", SIZE),
    "memory": ("memory_bytes", SIZE),
    "cost": ("cost", {}),
}
"""What may be limited: its name -> the field, and its units (in ms, in bytes; money has its own form)."""

METRICS = ("quality", "auc", "accuracy", "log_loss", "normalized_entropy", "mse", "recall@K", "ndcg@K", "hit_rate@K")
"""Metrics a margin may name; K is a number."""

ALIASES = {
    "size": "bytes", "ram": "memory", "price": "cost", "logloss": "log_loss", "ne": "normalized_entropy", "hr": "hit_rate",
}  # fmt: skip
"""Other words people write for them."""

_CLAUSE = re.compile(r"([^<>=≤≥]+)(<=|=<|≤|<|>=|≥|>|==?)([^<>=≤≥]*)")
_AMOUNT = re.compile(r"\s*(\$?)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(.*)", re.IGNORECASE)
_MONEY = re.compile(r"([A-Za-z]{3}|\$)\s*(/|per)\s*(m|million|million requests)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Upper limits; None is no limit. ``parse`` makes one from words, ``describe`` gives the words back."""

    p50_ms: float | None = None
    """Milliseconds for one request, half of the time."""
    p99_ms: float | None = None
    """Milliseconds for one request, 99 times of 100."""
    bytes: float | None = None
    """The weights file."""
    memory_bytes: float | None = None
    """Peak resident memory that loading and scoring adds to the process."""
    cost: float | None = None
    """Money for a million requests, in ``currency``."""
    currency: str = "USD"
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name of a spend (``p50``) -> the limit as a multiple of what the given model spends; see ``against``."""
    margins: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Metric -> the largest absolute drop."""
    relative: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Metric -> the largest drop as a share of the baseline's value (0.005 for 0.5 %)."""

    def __post_init__(self) -> None:
        for name, (field, _) in SPENDS.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BudgetError(f"{name} <= {value:g}: nothing can be that small; give a limit above 0, as in: {EXAMPLE}")
        for name, share in self.times.items():
            if name not in SPENDS:
                raise BudgetError(f"{name} <= {share:g}x: limits are of {', '.join(SPENDS)}, as in: {EXAMPLE}")
            if not (math.isfinite(share) and share > 0):
                raise BudgetError(
                    f"{name} <= {share:g}x: nothing can be that small; give a multiple above 0, as in: p50 <= 0.33x"
                )
            if getattr(self, SPENDS[name][0]) is not None:
                raise BudgetError(f"{name}: two limits, a number and a multiple of the given model's; keep one")
        for metric, drop in [*self.margins.items(), *self.relative.items()]:
            if not 0 <= drop < 1:
                raise BudgetError(f"{metric} drop <= {drop:g}: a drop lies between 0 and 1 (0 % and 100 %), as in: {EXAMPLE}")
        for metric in set(self.margins) & set(self.relative):
            raise BudgetError(f"{metric} drop: two limits, absolute and relative; keep one")

    def margin(self, metric: str, baseline: float) -> float:
        """The largest absolute drop of ``metric`` from ``baseline`` that this budget allows."""
        for name in (metric, "quality"):
            if name in self.margins:
                return self.margins[name]
            if name in self.relative:
                return self.relative[name] * abs(baseline)
        return DEFAULT_MARGIN

    def describe(self) -> str:
        """The budget in words that ``parse`` reads back to the same meaning; a default margin is written out."""
        spends = [f"{name} <= {self._show(field, getattr(self, field))}" for name, field in self._limited()]
        spends += [f"{name} <= {share:.10g}x" for name, share in self.times.items()]
        margins = [f"{m} drop <= {drop:.10g}" for m, drop in self.margins.items()]
        margins += [f"{m} drop <= {drop * 100:.10g}%" for m, drop in self.relative.items()]
        return ", ".join(spends + (margins or [f"quality drop <= {DEFAULT_MARGIN:g}"]))

    def against(
        self,
        *,
        p50_ms: float | None = None,
        p99_ms: float | None = None,
        bytes: float | None = None,
        memory_bytes: float | None = None,
        cost: float | None = None,
    ) -> Budget:
        """The budget with every multiple as a number, by what the given model spends; one it spends nothing of is kept."""
        spent = {"p50_ms": p50_ms, "p99_ms": p99_ms, "bytes": bytes, "memory_bytes": memory_bytes, "cost": cost}
        known = {name: value for name in self.times if (value := spent[SPENDS[name][0]])}
        limits: dict[str, Any] = {SPENDS[name][0]: self.times[name] * value for name, value in known.items()}
        return dataclasses.replace(self, **limits, times={n: share for n, share in self.times.items() if n not in known})

    def misses(
        self,
        *,
        p50_ms: float | None = None,
        p99_ms: float | None = None,
        bytes: float | None = None,
        memory_bytes: float | None = None,
        cost: float | None = None,
    ) -> tuple[str, ...]:
        """Which limits are not kept, a sentence each; empty when all are. A limit nothing was measured for is not kept."""
        spent = {"p50_ms": p50_ms, "p99_ms": p99_ms, "bytes": bytes, "memory_bytes": memory_bytes, "cost": cost}
        unknown = [f"{n} of the given model was not measured, and the limit is {x:.10g}x that" for n, x in self.times.items()]
        return (*(miss for name, field in self._limited() if (miss := self._miss(name, field, spent[field]))), *unknown)

    def _miss(self, name: str, field: str, value: float | None) -> str:
        limit = getattr(self, field)
        if value is None:
            return f"{name} was not measured, and the limit is {self._show(field, limit)}"
        if value <= limit:
            return ""
        return f"{name} is {self._show(field, value, 4)}, {value / limit:.3g}x the limit of {self._show(field, limit)}"

    def _limited(self) -> Iterable[tuple[str, str]]:
        return ((name, field) for name, (field, _) in SPENDS.items() if getattr(self, field) is not None)

    def _show(self, field: str, value: float, digits: int = 10) -> str:
        if field == "cost":
            return f"{value:.{digits}g} {self.currency}/M"
        if field.endswith("_ms"):
            return f"{value:.{digits}g} ms"
        return size(value, digits)


def size(bytes: float, digits: int = 3) -> str:
    """Bytes for a person: ``1.5 MB`` (a kB is 1000)."""
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if float(f"{bytes:.{digits}g}") >= s), (1, "B")
    )
    return f"{bytes / scale:.{digits}g} {unit}"


def parse(text: str) -> Budget:
    """The budget that a line of words names.

    Raises:
        BudgetError: the text is empty, or a clause has an unknown name or unit, a number no limit can have, or a name
            that was limited before; the message shows the clause, the known names and an example.
    """
    clauses = [c.strip() for c in re.split(r",|;|\n|\band\b", text) if c.strip()]
    if not clauses:
        raise BudgetError(f"the budget is empty; write what may be spent and what must not be lost, as in: {EXAMPLE}")
    fields: dict[str, object] = {}
    times: dict[str, float] = {}
    margins: dict[str, dict[str, float]] = {"margins": {}, "relative": {}}
    for clause in clauses:
        name, number, unit = _clause(clause)
        metric = name.removesuffix(" drop")
        if metric != name:
            kind, amount = _margin(clause, number, unit)
            _once(clause, margins["margins"].keys() | margins["relative"].keys(), found := _metric(clause, metric))
            margins[kind][found] = amount
            continue
        name = _spent(clause, name, number)
        _once(clause, fields.keys() | {SPENDS[n][0] for n in times}, SPENDS[name][0])
        if unit.lower() in (TIMES, "×"):
            times[name] = number
        else:
            fields |= _limit(clause, name, number, unit)
    return Budget(**fields, times=times, **margins)  # type: ignore[arg-type]


def _clause(clause: str) -> tuple[str, float, str]:
    found = _CLAUSE.fullmatch(clause)
    if not found:
        raise _wrong(clause, "is not of the form NAME <= NUMBER UNIT")
    name, sign, rest = found.groups()
    if sign not in ("<=", "=<", "≤", "<"):
        raise _wrong(clause, f"has {sign!r}; every limit is an upper one, written <=")
    amount = _AMOUNT.fullmatch(rest)
    if not amount:
        raise _wrong(clause, f"has {rest.strip()!r} where a number belongs (as 10, 0.5 or 1e-3)")
    number = float(amount[2])
    if number < 0 or not math.isfinite(number):
        raise _wrong(clause, f"limits to {number:g}, which nothing can keep")
    return re.sub(r"\s+", " ", name.strip().lower()), number, (amount[1] + amount[3]).strip()


def _margin(clause: str, number: float, unit: str) -> tuple[str, float]:
    if unit not in ("", "%"):
        raise _wrong(clause, f"has the unit {unit!r}; a drop is a plain number, or % of the baseline's value")
    amount = number / 100 if unit else number
    if amount >= 1:
        raise _wrong(clause, "would allow any loss; a drop lies between 0 and 1 (0 % and 100 %)")
    return ("relative" if unit else "margins"), amount


def _metric(clause: str, word: str) -> str:
    name, at, k = word.replace(" ", "_").partition("@")
    name = ALIASES.get(name, name)
    if f"{name}@K" in METRICS and re.fullmatch(r"[1-9]\d*", k):
        return f"{name}@{k}"
    if name in METRICS and not at:
        return name
    raise _wrong(clause, f"names an unknown metric {word!r}; known metrics: {', '.join(METRICS)} (K a number, as recall@20)")


def _spent(clause: str, word: str, number: float) -> str:
    name = ALIASES.get(word, word.removesuffix(" latency"))
    if name not in SPENDS:
        raise _wrong(clause, f"limits {word!r}; known: {', '.join(SPENDS)}, and METRIC drop (metrics: {', '.join(METRICS)})")
    if number == 0:
        raise _wrong(clause, "limits to 0, which nothing can keep")
    return name


def _limit(clause: str, name: str, number: float, unit: str) -> dict[str, object]:
    field, units = SPENDS[name]
    if field == "cost":
        money = _MONEY.fullmatch(unit)
        if not money:
            raise _wrong(clause, f"has {unit or 'no unit'!r}; money is per million requests, as in: cost <= 0.5 USD/M")
        return {field: number, "currency": "USD" if money[1] == "$" else money[1].upper()}
    if unit.lower() not in units:
        known = "us, ms, s" if units is TIME else "B, kB, MB, GB, KiB, MiB, GiB"
        known += f", and {TIMES} for multiples of the given model's"
        raise _wrong(clause, f"has the unit {unit!r}; known: {known}" if unit else f"has no unit; known: {known}")
    return {field: number * units[unit.lower()]}


def _once(clause: str, before: Iterable[str], name: str) -> None:
    if name in before:
        raise _wrong(clause, f"limits {name.removesuffix('_ms').removesuffix('_bytes')} a second time; keep one of the two")


def _wrong(clause: str, fault: str) -> BudgetError:
    return BudgetError(f"budget: {clause!r} {fault}. Example: {EXAMPLE}")
