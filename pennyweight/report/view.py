"""The numbers and words of the report, before anything is laid out.

``view`` makes plain values from a Result; the page, its charts and the terminal only place them. A template that computes is
the usual alternative, and cannot be tested without reading HTML.

Nothing here rounds towards a claim: a gain is rounded down, a bound up, and what was not proven is called that in the headline.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pennyweight.core.budget import Budget, parse, size
from pennyweight.core.errors import BudgetError
from pennyweight.optimize.prove import about, exactly, rounded
from pennyweight.optimize.trial import Cost, Part, Price, Quality, Result, Trial, Tuned

NAMES = {"auc": "AUC", "log_loss": "log loss", "normalized_entropy": "normalized entropy"}
STRANGE = "other "
"""How the kind of a part begins that no compression knows."""
State = Literal["proven", "worse", "cannot tell", "none"]
Kind = Literal["baseline", "control", "chosen", "proven", "not proven", "dropped"]
Role = Literal["baseline", "control", "chosen", "nearest"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One of the large figures at the top."""

    figure: str
    what: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Column:
    """One deployment in the comparison at the top: its figures as text, by the name of their row."""

    role: Role
    figures: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Share:
    """One table or layer before and after."""

    name: str
    before: str
    after: str
    """What it is, such as ``table fp32 9068x16``; empty where it is not there."""
    bytes: tuple[str, str]
    ms: tuple[str, str]
    bars: tuple[float, float, float, float]
    """Bytes before and after, milliseconds before and after: per cent of the largest part."""


@dataclasses.dataclass(frozen=True)
class Layered:
    """One table or layer as it was given, and what became of it."""

    name: str
    before: str
    """What it was, such as ``table fp32 9068x16``."""
    done: str
    bytes: tuple[str, str]
    smaller: str
    loss: str
    """How far the answers move by this alone; empty where nobody measured it."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A row of the table of trials."""

    number: int
    kind: Kind
    plan: str
    bytes: str
    smaller: str
    predicted_ms: str
    p99_ms: str
    drop: str
    bound: str
    seconds: str
    fate: str


@dataclasses.dataclass(frozen=True)
class Ran:
    """One way to run a plan, as it was tuned."""

    runtime: str
    p50_ms: str
    """Empty where it was not timed."""
    slower: str
    """How many times the fastest of its plan."""
    note: str
    chosen: bool


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model's quality on the test rows, and its place on the scale in per cent."""

    name: str
    value: str
    place: float
    role: Role | None
    """None for a simple model beside ours."""


@dataclasses.dataclass(frozen=True)
class View:
    """Everything the page says in words and figures."""

    state: State
    headline: str
    explanation: str
    tiles: tuple[Tile, ...]
    columns: tuple[Column, ...]
    steps: tuple[tuple[str, str], ...]
    """Stage and sentence of each transform of the plan that is shown."""
    over: tuple[str, ...]
    """Limits that the chosen plan missed after all when it was timed for the last time."""
    missing: tuple[str, ...]
    """Without a chosen plan: the nearest, and what each lacked."""
    proof: tuple[tuple[str, str], ...]
    guards: tuple[str, ...]
    alone: str
    """What compression alone cost, against the control."""
    shares: tuple[Share, ...]
    layers: tuple[Layered, ...]
    """Every table and layer of the model as given, the heaviest first; empty without a chosen plan."""
    prediction: str
    references: tuple[Reference, ...]
    scale: tuple[str, str]
    """Ends of the scale of the references."""
    money: tuple[str, ...]
    tried: tuple[Tried, ...]
    tuning: tuple[tuple[str, tuple[Ran, ...]], ...]
    """Plans whose runtime was chosen by measuring, and what was measured, the fastest first."""
    facts: tuple[tuple[str, str], ...]
    metric: str
    date: str


def view(result: Result) -> View:
    """The record in figures and words."""
    trial = shown(result)
    return View(
        state=state_of(result),
        headline=_headline(result),
        explanation=result.explanation[:1].upper() + result.explanation[1:],
        tiles=_tiles(result, trial) if trial else (),
        columns=tuple(_column(role, each) for role, each in roles(result)),
        steps=tuple((t.stage, t.describe()) for t in trial.plan.transforms) if trial else (),
        over=over(result),
        missing=missing(result),
        proof=_proof(trial.proof) if trial and trial.proof else (),
        guards=tuple(_guard(g) for g in trial.guards) if trial else (),
        alone=_alone(result, trial),
        shares=_shares(result.parts_before, result.parts_after),
        layers=_layers(result) if result.parts_after else (),
        prediction=_prediction(result.trials),
        references=_references(result),
        scale=_scale(result)[0],
        money=(*result.savings, *([_priced(result.price)] if result.price and result.savings else [])),
        tried=tuple(_tried(result, number, each) for number, each in enumerate(result.trials, 1)),
        tuning=_tuning(result.tuning),
        facts=_facts(result),
        metric=metric_of(result),
        date=result.date.replace("T", " ").replace("+00:00", " UTC"),
    )


# -- what a record says --------------------------------------------------------------------------------------------------


def shown(result: Result) -> Trial | None:
    """The chosen trial, or the last one that was put to the proof and failed."""
    tested = [t for t in result.trials if t.proof is not None]
    return result.chosen or (tested[-1] if tested else None)


def state_of(result: Result) -> State:
    """The verdict to show; ``none`` where nothing was put to the proof."""
    trial = shown(result)
    return "none" if trial is None or trial.proof is None else trial.proof.verdict


def roles(result: Result) -> list[tuple[Role, Trial]]:
    """The deployments that are compared at the top."""
    found: list[tuple[Role, Trial]] = [("baseline", result.baseline)]
    if result.control is not None:
        found.append(("control", result.control))
    trial = shown(result)
    if trial is not None:
        found.append(("chosen" if result.chosen else "nearest", trial))
    return found


def kind_of(result: Result, trial: Trial) -> Kind:
    """How a trial ended."""
    if result.chosen is not None and trial.plan == result.chosen.plan:
        return "chosen"
    if trial.proof is not None:
        return "proven" if trial.proof.verdict == "proven" else "not proven"
    return "dropped"


def cost_of(trial: Trial) -> Cost:
    """What a trial costs: measured, or predicted where it was never measured."""
    return trial.measured or trial.predicted


def metric_of(result: Result) -> str:
    """The name of the metric that was decided on, as people write it."""
    trials = (t for t in (result.chosen, result.baseline, *result.trials) if t is not None)
    return next((name_of(q.metric) for t in trials for q in (t.proof, t.validation) if q), "quality")


def fate(result: Result, trial: Trial) -> str:
    """Why a trial is not the one that was chosen, in a few words."""
    kind, q = kind_of(result, trial), trial.validation
    if kind == "chosen":
        return "chosen: the cheapest that was proven"
    if trial.proof is not None:
        at = f"proven at {upper(trial.proof)}"
        failed = f"{trial.proof.verdict} on the test rows: not proven at {exactly(trial.proof.margin)}, {at}"
        return f"{at} too, but not the cheapest" if kind == "proven" else failed
    if trial.note:
        return trial.note
    if q is not None and q.drop > q.margin:
        return f"drops by {rounded(q.drop, up=True)} on validation, beyond the margin of {exactly(q.margin)}"
    return "not measured" if trial.measured is None else "not put to the proof: another costs less or keeps more"


def missing(result: Result) -> tuple[str, ...]:
    """Where no plan was chosen: the trials that came nearest, and what each lacked."""
    if result.chosen is not None:
        return ()
    found = [t for t in result.trials if t.measured]
    found.sort(key=lambda t: (t.proof is None, cost_of(t).bytes * cost_of(t).p99_ms))
    costs = [f"{size(cost_of(t).bytes)}, p99 {ms(cost_of(t).p99_ms)}" for t in found]
    return tuple(f"{t.plan.describe()} ({cost}): {fate(result, t)}" for t, cost in zip(found, costs, strict=True))[:5]


def budget_of(result: Result) -> Budget:
    """The limits that the budget's words name, as numbers; none where they cannot be read any more."""
    given = cost_of(result.baseline)
    try:
        return parse(result.budget).against(p50_ms=given.p50_ms, p99_ms=given.p99_ms, bytes=given.bytes)
    except BudgetError:
        return Budget()


def over(result: Result) -> tuple[str, ...]:
    """Limits of size and time that the chosen plan misses: its last timing may have met a busier machine than the search."""
    if result.chosen is None:
        return ()
    spent, limits = cost_of(result.chosen), dataclasses.replace(budget_of(result), memory_bytes=None, cost=None, times={})
    return limits.misses(bytes=spent.bytes, p50_ms=spent.p50_ms, p99_ms=spent.p99_ms)


def alone(result: Result) -> tuple[str, ...]:
    """Layers of a kind that no compression knows, and those that were to be left alone."""
    strange = (p for p in result.parts_before if p.kind.startswith(STRANGE))
    told = [
        f"{p.name} ({p.kind.removeprefix(STRANGE)}, {size(p.bytes)}): no compression knows this kind of layer" for p in strange
    ]
    return (*told, *(f"{pattern}: as asked" for pattern in result.skip))


# -- words and figures ---------------------------------------------------------------------------------------------------


def name_of(metric: str) -> str:
    """A metric as people write it."""
    return NAMES.get(metric, metric.replace("ndcg", "NDCG").replace("_", " "))


def ms(value: float) -> str:
    """Milliseconds to three digits, three decimals at most."""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f} ms" if value > 0 else "0 ms"


def upper(quality: Quality) -> str:
    """The upper bound of a drop, rounded up."""
    return rounded(quality.drop_upper_95, up=True)


def times(before: float, after: float, less: str, more: str, same: str) -> str:
    """``14.6× smaller``: a gain rounded down, a loss up."""
    ratio = before / after if min(before, after) > 0 else 1.0
    if 1 / 1.05 < ratio < 1.05:
        return same
    gain = ratio > 1
    return f"{rounded(ratio if gain else 1 / ratio, 0 if ratio >= 100 else 1, up=not gain)}× {less if gain else more}"


def gains(result: Result, trial: Trial) -> tuple[str, str]:
    """How much smaller and faster a trial is than the baseline."""
    before, after = cost_of(result.baseline), cost_of(trial)
    smaller = times(before.bytes, after.bytes, "smaller", "larger", "as large")
    return smaller, times(before.p99_ms, after.p99_ms, "faster", "slower", "as fast")


def _headline(result: Result) -> str:
    trial = shown(result)
    if trial is None:
        return "No plan held the budget and the quality" if result.trials else "The model stays as it is"
    end = {"proven": "proven as good", "worse": "but worse", "cannot tell": "not proven as good", "none": "not tested"}
    return ", ".join((*gains(result, trial), end[state_of(result)]))


def _tiles(result: Result, trial: Trial) -> tuple[Tile, ...]:
    before, after, q = cost_of(result.baseline), cost_of(trial), trial.proof
    smaller, faster = gains(result, trial)
    latency = f"p99, {result.request}"
    tiles = (
        Tile(smaller, "weights", f"{size(before.bytes)} → {size(after.bytes)}"),
        Tile(faster, latency, f"{ms(before.p99_ms)} → {ms(after.p99_ms)}"),
    )
    if q is None:
        return tiles
    bound = f"drop at most {upper(q)} (95 %), margin {exactly(q.margin)}"
    return (
        *tiles,
        Tile(f"{rounded(q.baseline)} → {rounded(q.value)}", f"{name_of(q.metric)} on {q.rows:,} untouched rows", bound),
    )


def _column(role: Role, trial: Trial) -> Column:
    spent, q = cost_of(trial), trial.proof or trial.validation
    timed = role != "control"  # it has the baseline's shape and is not to be deployed: only its quality says something
    figures = {
        "weights": size(spent.bytes),
        "p50": ms(spent.p50_ms) if timed else "",
        "p99": ms(spent.p99_ms) if timed else "",
        "operations a candidate": f"{spent.flops:,}" if spent.flops else "–",
        "quality": rounded(q.value) if q else "–",
    }
    if q is not None and role != "baseline":
        figures |= {"drop": rounded(q.drop), "drop at most (95 %)": upper(q), "margin": exactly(q.margin)}
    return Column(role, figures)


def _proof(q: Quality) -> tuple[tuple[str, str], ...]:
    needed = f"about {about(q.rows_needed):,}" if q.rows_needed else "no number would, at this drop"
    return (
        ("verdict", q.verdict),
        ("rows, untouched until now", f"{q.rows:,}"),
        ("test", q.method),
        (f"{name_of(q.metric)} before", rounded(q.baseline, 5)),
        (f"{name_of(q.metric)} after", rounded(q.value, 5)),
        ("drop", rounded(q.drop, 5)),
        ("drop at least (95 %)", rounded(q.drop_low_95, 5, up=False)),
        ("drop at most (95 %)", rounded(q.drop_upper_95, 5, up=True)),
        ("margin, fixed before", exactly(q.margin)),
        *([("rows that would decide it", needed)] if q.verdict == "cannot tell" else []),
    )


def _guard(q: Quality) -> str:
    kept = {"proven": "inside", "worse": "beyond", "cannot tell": "not proven inside"}[q.verdict]
    moved = f"{name_of(q.metric)} {rounded(q.baseline)} → {rounded(q.value)}, drop at most {upper(q)} (95 %, {q.method})"
    return f"{moved}; {kept} its margin of {exactly(q.margin)}."


def _alone(result: Result, trial: Trial | None) -> str:
    control = result.control.proof if result.control else None
    if trial is None or control is None:
        return ""
    moved = f"The same extra training without compression reaches {rounded(control.value)}"
    beside = trial.against_control
    if beside is None:
        return f"{moved}."
    return f"{moved}. Against that, compression alone costs {rounded(beside.drop)}, at most {upper(beside)} (95 %)."


def _tried(result: Result, number: int, trial: Trial) -> Tried:
    spent, q = trial.measured, trial.validation
    return Tried(
        number=number,
        kind=kind_of(result, trial),
        plan=trial.plan.describe(),
        bytes=size(cost_of(trial).bytes),
        smaller=_ratio(cost_of(result.baseline).bytes, cost_of(trial).bytes),
        predicted_ms=ms(trial.predicted.p99_ms),
        p99_ms=ms(spent.p99_ms) if spent else "–",
        drop=rounded(q.drop) if q else "–",
        bound=upper(q) if q else "–",
        seconds=f"{trial.seconds:.1f}",
        fate=fate(result, trial),
    )


def _tuning(tuned: Sequence[Tuned]) -> tuple[tuple[str, tuple[Ran, ...]], ...]:
    plans: dict[str, list[Tuned]] = {}
    for each in tuned:
        plans.setdefault(each.plan, []).append(each)
    return tuple((plan, _ran(each)) for plan, each in plans.items())


def _ran(tuned: Sequence[Tuned]) -> tuple[Ran, ...]:
    least = min((t.p50_ms for t in tuned if t.p50_ms is not None), default=math.inf)
    return tuple(
        Ran(
            t.runtime,
            "" if t.p50_ms is None else ms(t.p50_ms),
            "" if t.p50_ms is None else f"{t.p50_ms / least:.2f}×",
            "chosen" if t.chosen else t.note,
            t.chosen,
        )
        for t in sorted(tuned, key=lambda t: math.inf if t.p50_ms is None else t.p50_ms)
    )


def _ratio(before: float, after: float) -> str:
    """How many times smaller, rounded down; empty where that says nothing."""
    return f"{rounded(before / after, 1, up=False)}×" if before and after and before != after else ""


# -- where bytes and milliseconds are ------------------------------------------------------------------------------------


def _shares(before: Sequence[Part], after: Sequence[Part], most: int = 10) -> tuple[Share, ...]:
    """Parts by name, the heaviest first; what is beyond ``most`` is one row, and all of them are the last."""
    old, new = {p.name: p for p in before}, {p.name: p for p in after}
    bytes_all, ms_all = sum(p.bytes for p in before) or 1, sum(p.ms for p in before) or 1.0
    weight = {n: max(p.bytes / bytes_all + p.ms / ms_all for p in (old.get(n), new.get(n)) if p) for n in {**old, **new}}
    names = sorted(weight, key=lambda n: (-weight[n], n))
    few = names if len(names) <= most + 1 else names[:most]
    rows = [(n, old.get(n), new.get(n)) for n in few]
    rest = [n for n in names if n not in few]
    if rest:
        rows.append((f"{len(rest)} smaller parts", _sum(rest, old), _sum(rest, new)))
    found = [p for _, *pair in rows for p in pair if p]
    tops = max((p.bytes for p in found), default=0) or 1, max((p.ms for p in found), default=0.0) or 1.0
    shares = [_share(*row, *tops) for row in rows]
    return (*shares, _share("all", _sum(names, old), _sum(names, new), *tops)) if shares else ()


def _sum(names: Iterable[str], parts: Mapping[str, Part]) -> Part | None:
    found = [parts[n] for n in names if n in parts]
    return Part("", "", sum(p.bytes for p in found), sum(p.ms for p in found), sum(p.flops for p in found)) if found else None


def _share(name: str, before: Part | None, after: Part | None, most_bytes: float, most_ms: float) -> Share:
    pair = before, after
    bars = [100 * p.bytes / most_bytes if p else 0.0 for p in pair] + [100 * p.ms / most_ms if p else 0.0 for p in pair]
    what = [p.kind if p else "" for p in pair]
    held, spent = ["–" if p is None else size(p.bytes) for p in pair], ["–" if p is None else ms(p.ms) for p in pair]
    return Share(name, what[0], what[1], (held[0], held[1]), (spent[0], spent[1]), (bars[0], bars[1], bars[2], bars[3]))


# -- what was done to each part ------------------------------------------------------------------------------------------

REST = "everything else"


def _layers(result: Result, most: int = 60) -> tuple[Layered, ...]:
    """Every part as given with all that it has become; what is beyond ``most`` is one row, and all of them are the last."""
    became: dict[str, list[Part]] = {p.name: [] for p in result.parts_before}
    for part in result.parts_after:
        became.setdefault(_home(part.name, became), []).append(part)
    old = {p.name: p for p in result.parts_before}
    names = sorted(became, key=lambda n: (n == REST, -old[n].bytes if n in old else 0, n))
    few, rest = (names, []) if len(names) <= most + 1 else (names[:most], names[most:])
    rows = [_layered(n, old.get(n), became[n], result) for n in few if n != REST or old[n].bytes]
    if rest:
        rows.append(_summed(f"{len(rest)} smaller parts", rest, old, became))
    return (*rows, _summed("all", names, old, became))


def _home(name: str, before: Iterable[str]) -> str:
    """The part as given that a part after belongs to: itself, or the layer that it lies in by now."""
    return max((n for n in before if name == n or name.startswith(f"{n}.")), key=len, default=name)


def _layered(name: str, before: Part | None, after: Sequence[Part], result: Result) -> Layered:
    old, new = before.bytes if before else 0, sum(p.bytes for p in after)
    known = result.chosen.losses if result.chosen else {}
    losses = [known[p.name] for p in after if p.name in known]
    loss = f"{sum(losses):.1g}" if losses else ""
    spared = any(fnmatch.fnmatchcase(name, p) for s in result.skip for p in (s, f"{s}.*"))
    done = "left alone, as asked" if spared else _done(name, before, after)
    return Layered(name, before.kind if before else "", done, (size(old), size(new)), _ratio(old, new), loss)


def _summed(name: str, names: Sequence[str], old: Mapping[str, Part], became: Mapping[str, Sequence[Part]]) -> Layered:
    before, after = sum(old[n].bytes for n in names if n in old), sum(p.bytes for n in names for p in became[n])
    return Layered(name, "", "", (size(before), size(after)), _ratio(before, after), "")


def _done(name: str, before: Part | None, after: Sequence[Part]) -> str:
    """What became of a part, in words."""
    if before is None:
        return f"new: {', '.join(p.kind for p in after)}"
    if before.kind.startswith(STRANGE):
        return "left alone: no compression knows this kind of layer"
    if not after:
        return "folded into the layer beside it" if before.kind.startswith("norm ") else "left out"
    inner = [f"{p.name.removeprefix(f'{name}.')}: {p.kind}" for p in after if p.name != name]
    if inner:
        beside = ", and a map of its ids" if len(inner) < len(after) else ""
        return f"now {inner[0].partition(': ')[2]}" if len(after) == 1 else f"in {len(inner)}: {', '.join(inner)}{beside}"
    if name == REST:
        return "" if before.kind == after[0].kind else f"now {after[0].kind}"
    return _changed(before.kind.split(), after[0].kind.split())


def _changed(before: Sequence[str], after: Sequence[str]) -> str:
    """The difference of two kinds, such as ``table fp32 900x16`` and ``table codebook 4x256 int8 900x16``."""
    if before == after:
        return "as it was"
    (_, *old, shape), (kind, *new, now) = before, after
    said = [] if kind == before[0] else [f"now {kind}"]
    said += [f"{shape} → {now}"] if shape != now else []
    if "codebook" in new and "codebook" not in old:
        parts, _, codes = new[new.index("codebook") + 1].partition("x")
        said.append(f"rows share {codes} vectors in each of {parts} parts")
    said += [f"{old[-1]} → {new[-1]}"] if old and new and old[-1] != new[-1] else []
    return ", ".join(said) or " ".join(after)


def _prediction(trials: Sequence[Trial]) -> str:
    made = [(t.predicted, t.measured) for t in trials if t.measured]
    if not made:
        return ""
    off_bytes = _off([(p.bytes, m.bytes) for p, m in made])
    off_ms = _off([(p.p99_ms, m.p99_ms) for p, m in made])
    return f"Over {len(made)} measured trial{'s' * (len(made) > 1)}, predicted bytes are off by {off_bytes}, p99 by {off_ms}."


def _off(pairs: Sequence[tuple[float, float]]) -> str:
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs if measured]
    return f"{statistics.median(errors):.1%} (median; {max(errors):.0%} at worst)" if errors else "–"


def _references(result: Result) -> tuple[Reference, ...]:
    (_, (low, high)), found = _scale(result), _referred(result)
    rows = sorted(found, key=lambda r: r[1])
    return tuple(Reference(name, rounded(v), 100 * (v - low) / (high - low), role) for name, v, role in rows)


def _referred(result: Result) -> list[tuple[str, float, Role | None]]:
    ours = [(role, t.proof.value, role) for role, t in roles(result) if t.proof]
    return [*((name, value, None) for name, value in result.references), *ours]


def _scale(result: Result) -> tuple[tuple[str, str], tuple[float, float]]:
    """A round scale that holds all references."""
    values = [v for _, v, _ in _referred(result)]
    low, high = math.floor(min(values, default=0.0) * 20) / 20, math.ceil(max(values, default=1.0) * 20) / 20
    high = high if high > low else low + 0.05
    return (rounded(low, 2), rounded(high, 2)), (low, high)


def _priced(price: Price) -> str:
    parts = (("core-hour", price.core_hour), ("GPU-hour", price.gpu_hour), ("GB of memory a month", price.gb_month))
    return "Priced at " + ", ".join(f"{amount:g} {price.currency} a {what}" for what, amount in parts if amount) + "."


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    told = {"cores": "{} cores", "memory": "{} of memory"}
    known = {k: size(v) if k == "memory" and isinstance(v, int | float) else v for k, v in result.machine.items() if v}
    machine = ", ".join(told.get(k, "{}").format(v) for k, v in known.items())
    return (
        ("budget", result.budget),
        ("time", f"{result.seconds:.0f} s of a cap of {result.compute_cap_s:.0f} s"),
        ("seed", str(result.seed)),
        *([("baseline", result.baseline.note)] if result.baseline.note else []),
        ("machine", machine),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    )
