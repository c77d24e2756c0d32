"""The outcome for a script (``summary``) and for a terminal (``table``): the same figures as the page, fewer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pennyweight.core.budget import size
from pennyweight.core.config import encode
from pennyweight.model.transform import Transform
from pennyweight.optimize.prove import about, exactly, rounded
from pennyweight.optimize.trial import Part, Quality, Result, Trial
from pennyweight.report.view import alone, cost_of, gains, metric_of, missing, ms, name_of, over, roles, shown, upper, view

DATA_TYPES = ("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2")
TAUGHT = ("alpha", "temperature", "lr", "dealt", "regularize", "schedule")
"""How a training was done, which is the same for all plans of a search."""
FEW = 3
"""Layers that are named one by one."""
QUALITY = ("metric", "rows", "drop", "drop_low_95", "drop_upper_95", "margin", "method", "rows_needed")


def summary(result: Result) -> dict[str, Any]:
    """The outcome as plain JSON values, what ``summary.json`` holds.

    ``chosen`` is None unless a plan was proven; ``nearest`` is then the last that failed, if any was tested, and the drop
    and its bounds are those of that one.
    """
    trial = shown(result)
    proof = trial.proof if trial else None
    return {
        "baseline": _brief(result.baseline),
        "chosen": _brief(result.chosen) if result.chosen else None,
        "nearest": _brief(trial) if trial and not result.chosen else None,
        "control": _brief(result.control) if result.control else None,
        **{name: getattr(proof, name, None) for name in QUALITY},
        "proven": result.chosen is not None and proof is not None and proof.verdict == "proven",
        "over_budget": list(over(result)),
        "verdict": result.verdict,
        "explanation": result.explanation,
        "plan": trial.plan.describe() if trial else None,
        "budget": result.budget,
        "candidates": cost_of(result.baseline).candidates,
        "seconds": round(result.seconds, 1),
        "epochs": encode(result.epochs),
        "trials": [_tried(t) for t in result.trials],
        "tuning": encode(result.tuning),
        "parts": {"before": encode(result.parts_before), "after": encode(result.parts_after)},
        "left_alone": list(alone(result)),
    }


def _tried(trial: Trial) -> dict[str, Any]:
    held = {q.metric: q.value for q in (trial.validation,) if q}
    return {"plan": trial.plan.describe(), **_brief(trial), "validation": held, "seconds": trial.seconds, "note": trial.note}


def _brief(trial: Trial) -> dict[str, Any]:
    spent, q = cost_of(trial), trial.proof
    return {"bytes": spent.bytes, "p50_ms": spent.p50_ms, "p99_ms": spent.p99_ms, **({q.metric: q.value} if q else {})}


def table(result: Result) -> Table:
    """The outcome in a few lines; ``rich`` folds what is too long for the terminal."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, line in _lines(result):
        grid.add_row(Text(name), Text(line))
    return grid


def tried(result: Result) -> Table:
    """Every step of the search in the order it was tried: what it came to, and what became of it."""
    shown = Table(title=f"every step tried ({metric_of(result)} on the validation rows)", title_justify="left")
    for name in ("#", "bytes", "smaller", "drop", "at most", "s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("plan, and what came of it", ratio=1, overflow="fold")
    for row, trial in zip(view(result).tried, result.trials, strict=True):
        steps = " · ".join(map(step, trial.plan.transforms)) or "as given"
        what = Text(f"{steps}\n").append(row.fate, "bold" if row.kind == "chosen" else "dim")
        shown.add_row(str(row.number), row.bytes, row.smaller, row.drop, row.bound, row.seconds, what)
    return shown


def step(transform: Transform) -> str:
    """A transform as a plan names it, with what it was told: ``quantize-dense int3 feedback``."""
    told = {k: v for k, v in encode(transform, slim=True).items() if k not in ("transform", "skip") and not isinstance(v, dict)}
    kind = {k: v for k, v in encode(transform).items() if k in ("transform", "data_type")}
    lists = {k: f"{k}={','.join(v) if len(v) <= FEW else f'({len(v)} layers)'}" for k, v in told.items() if isinstance(v, list)}
    rest = [lists.get(k) or (k if v is True else f"{k}={v}") for k, v in told.items() if k not in (*kind, *TAUGHT)]
    return " ".join([*kind.values(), *rest])


def layers(result: Result) -> Table:
    """What became of every table and layer."""
    held = view(result).layers
    lossy = any(row.loss for row in held)
    shown = Table(title="every table and layer", title_justify="left")
    for name in ("part", "before", "what was done"):
        shown.add_column(name, overflow="fold")
    for name in ("bytes", "smaller", *(["moves by"] if lossy else [])):
        shown.add_column(name, justify="right")
    for row in held:
        cells = row.name, row.before, row.done, " → ".join(dict.fromkeys(row.bytes)), row.smaller
        shown.add_row(*map(Text, (*cells, row.loss) if lossy else cells))
    return shown


def _lines(result: Result) -> Iterable[tuple[str, str]]:
    trial = shown(result)
    for role, each in roles(result):
        spent, q = cost_of(each), each.proof or each.validation
        parts = result.parts_after if each is trial else result.parts_before
        quality = f"{name_of(q.metric)} {rounded(q.value)}" if q else ""
        time = " " * 12 if role == "control" else f"p99 {ms(spent.p99_ms):>8}"  # a control is not deployed, only compared
        what = f"{result.model}  {_types(parts):12}".lstrip()
        yield role, f"{what} {size(spent.bytes):>7}   {time}   {quality}".rstrip()
    request = result.request
    yield ("gain", f"{', '.join(gains(result, trial))} for {request}") if trial else ("request", request)
    if trial is not None:
        yield "plan", trial.plan.describe()
    yield "proof", _answer(trial.proof) if trial and trial.proof else result.explanation
    for line in over(result):
        yield "over", line
    for line in missing(result):
        yield "missing", line
    for line in alone(result):
        yield "left alone", line


def _answer(q: Quality) -> str:
    told = {"proven": "yes", "worse": "no, it is worse", "cannot tell": "no, the rows cannot tell"}[q.verdict]
    asked = f"drop <= {exactly(q.margin)} with 95 % confidence: {told}; proven at {upper(q)}, from {q.rows:,} rows"
    return f"{asked}; about {about(q.rows_needed):,} would decide it" if q.rows_needed else asked


def _types(parts: Sequence[Part]) -> str:
    """The two data types that hold most bytes: ``int8 + int4``."""
    held = {name: sum(p.bytes for p in parts if name in p.kind.split()) for name in DATA_TYPES}
    return " + ".join(name for name in sorted(held, key=lambda n: -held[n])[:2] if held[name])
