"""The report's charts, as SVG for a narrow and a wide screen.

Each kind of trial has a shape and a colour of its own, so that colour alone never decides; the colours keep apart under the
common kinds of colour blindness (Okabe and Ito). Every mark carries its words, for a pointer and for a screen reader.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from markupsafe import Markup

from pennyweight.core.budget import size
from pennyweight.core.errors import DeviceError
from pennyweight.model.transform import Plan, Transform
from pennyweight.optimize.prove import exactly, rounded
from pennyweight.optimize.trial import Epoch, Quality, Result, Trial
from pennyweight.report.view import Kind, budget_of, cost_of, kind_of, metric_of, ms, shown, upper

WIDE, NARROW = 520, 350
"""Pixels; the page's columns are as wide."""

STYLE: Mapping[Kind, tuple[str, str, int]] = {
    "dropped": ("cross", "var(--dropped)", 45),
    "not proven": ("square", "var(--worse)", 70),
    "proven": ("circle", "var(--other)", 80),
    "control": ("triangle-up", "var(--control)", 110),
    "baseline": ("diamond", "var(--ink)", 120),
    "chosen": ("circle", "var(--chosen)", 170),
}
"""Shape, colour and area of each kind, in the order of drawing."""

SPARE = (("var(--run1)", "6 3"), ("var(--run2)", "2 2"), ("var(--run3)", "8 3 2 3"), ("var(--run4)", "4 4"))
"""Colour and dash of trainings that are neither the baseline's nor the chosen one's."""

SIGNED = "datum.value == 0 ? '0' : format(datum.value, '+.4~f')"

PAPER: Mapping[str, str] = {
    **{"ink": "#14181d", "soft": "#55606c", "line": "#c3cbd3", "grid": "#e8ecf0", "chosen": "#0068ad", "other": "#4a9bd1"},
    **{"control": "#b86a00", "dropped": "#929ca7", "worse": "#bf3a1c", "good": "#00775a"},
    **{"run1": "#00775a", "run2": "#b0568c", "run3": "#7a62c9", "run4": "#7d7400"},
}
"""The page's colours by day, for a picture that leaves the page."""

Row = dict[str, Any]
Draw = Callable[[Any], Any]
"""From the altair module, which is imported late, to a chart."""


@dataclasses.dataclass(frozen=True)
class Series:
    """An entry of a legend."""

    name: str
    colour: str
    shape: str
    """A shape of ``STYLE``, or ``line`` and its dashes."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, drawn twice."""

    title: str
    wide: Markup
    narrow: Markup
    legend: tuple[Series, ...] = ()


def figures(result: Result) -> dict[str, Figure]:
    """Every chart that the record has the numbers for, by name.

    Raises:
        DeviceError: the packages that draw are not installed.
    """
    metric = metric_of(result)
    points = [_point(t, kind) for kind, t in _plotted(result) if t.measured]
    held = [p for p in points if p["drop"] is not None]
    tried = [p for p in points if p["kind"] not in ("baseline", "control")]
    found: dict[str, Figure] = {}
    if len(held) > 1:
        margin = next((t.validation.margin for t in result.trials if t.validation), 0.0)
        budget = budget_of(result)
        by_bytes = _frontier(held, "bytes", "weights, bytes", margin, budget.bytes)
        found["bytes"] = _figure(f"{metric} lost, by size", by_bytes, _legend(held))
        by_p99 = _frontier(held, "p99", "p99, ms", margin, budget.p99_ms)
        found["p99"] = _figure(f"{metric} lost, by p99", by_p99, _legend(held))
    if tried:
        found["predicted bytes"] = _figure("Weights, bytes", _agreement(tried, "bytes"), _legend(tried))
        found["predicted p99"] = _figure("p99, ms", _agreement(tried, "p99"), _legend(tried))
    if tested := _tested(result):
        found["proof"] = _figure(f"{metric} lost on the test rows", _intervals(tested))
    if result.epochs:
        runs = _runs(result)
        legend = tuple(runs.values())
        found["loss"] = _figure("Training loss", _lines([_step(e, runs[e.run], e.loss) for e in result.epochs], legend), legend)
        steps = [_step(e, runs[e.run], e.metric) for e in result.epochs]
        found["metric"] = _figure("Metric on the validation rows", _lines(steps, legend), legend)
    return found


def picture(draw: Draw, width: int = WIDE) -> str:
    """A chart as an SVG file of its own, on white.

    Raises:
        DeviceError: the packages that draw are not installed.
    """
    text = re.sub(r"var\(--(\w+)\)", lambda name: PAPER[name[1]], str(_svg(draw, width)))
    return text.replace('fill="transparent"', 'fill="#fff"', 1)


# -- rows ----------------------------------------------------------------------------------------------------------------


def _plotted(result: Result) -> list[tuple[Kind, Trial]]:
    """Baseline, control and trials; those that matter last, so that they lie on top."""
    found: list[tuple[Kind, Trial]] = [("baseline", result.baseline), *((kind_of(result, t), t) for t in result.trials)]
    if result.control is not None:
        # it has the baseline's shape, so its cost; when it was timed, the machine was doing something else
        found.append(("control", dataclasses.replace(result.control, measured=result.baseline.measured)))
    return sorted(found, key=lambda pair: list(STYLE).index(pair[0]))


def _point(trial: Trial, kind: Kind) -> Row:
    spent, guess, q = cost_of(trial), trial.predicted, trial.validation
    # the baseline is what others are compared with: its own drop is 0, without an interval
    at = (q.drop, q.drop_low_95, q.drop_upper_95) if q else (0.0, 0.0, 0.0) if kind == "baseline" else (None, None, None)
    name = kind if kind in ("baseline", "control") else f"{kind}: {trial.plan.describe()}"
    lost = f"\ndrop {rounded(q.drop)}, at most {upper(q)} (95 %)" if q else ""
    return {
        **dict(zip(("drop", "low", "upper"), at, strict=True)),
        **{"kind": kind, "bytes": spent.bytes, "p99": spent.p99_ms},
        **{"predicted bytes": guess.bytes, "predicted p99": guess.p99_ms},
        "tip": f"{name}\n{size(spent.bytes)}, p99 {ms(spent.p99_ms)} (predicted {ms(guess.p99_ms)}){lost}",
    }


def _tested(result: Result) -> list[Row]:
    """The drops measured on the test rows, in the order of the tests."""
    found: list[tuple[str, Kind, Quality | None]] = [("control", "control", result.control.proof if result.control else None)]
    found += [(f"#{n} {kind_of(result, t)}", kind_of(result, t), t.proof) for n, t in enumerate(result.trials, 1)]
    trial = shown(result)
    if trial is not None:
        found.append(("against control", kind_of(result, trial), trial.against_control))
    return [
        {
            **{"name": name, "kind": kind, "drop": q.drop, "low": q.drop_low_95, "upper": q.drop_upper_95, "margin": q.margin},
            "tip": f"{name}: drop {rounded(q.drop)}, at most {upper(q)} (95 %)",
        }
        for name, kind, q in found
        if q is not None
    ]


def _runs(result: Result) -> dict[str, Series]:
    """How each training is drawn, by the name the record gives it."""
    spare = itertools.cycle(SPARE)
    numbered = reversed(list(enumerate(result.trials, 1)))
    plans = {name: (n, t) for n, t in numbered for name in (t.plan.describe(), Plan(_trained(t)).describe())}
    controls = {"control", result.control.plan.describe()} if result.control else {"control"}
    found: dict[str, Series] = {}
    for run in dict.fromkeys(e.run for e in result.epochs):
        number, trial = plans.get(run, (0, None))
        if run in controls:
            found[run] = Series("control", "var(--control)", "line 6 2")
        elif trial is not None and result.chosen is not None and _trained(trial) == _trained(result.chosen):
            found[run] = Series(f"#{number}, of the chosen plan", "var(--chosen)", "line")
        elif not found and trial is None:
            found[run] = Series(shorten(run, 44, placeholder=" …"), "var(--ink)", "line")
        else:
            colour, dash = next(spare)
            found[run] = Series(f"#{number}" if trial else shorten(run, 44, placeholder=" …"), colour, f"line {dash}")
    return found


def _trained(trial: Trial) -> tuple[Transform, ...]:
    """The part of a plan that ends in its training: trials that share it were trained once."""
    at = [n for n, t in enumerate(trial.plan.transforms, 1) if t.stage == "training"]
    return trial.plan.transforms[: at[-1] if at else 0]


def _step(epoch: Epoch, series: Series, value: float) -> Row:
    return {"run": series.name, "epoch": epoch.epoch, "value": value, "tip": f"{series.name}, epoch {epoch.epoch}: {value:.4f}"}


def _legend(points: Sequence[Row]) -> tuple[Series, ...]:
    used = {p["kind"] for p in points}
    return tuple(Series(k, colour, shape) for k, (shape, colour, _) in reversed(list(STYLE.items())) if k in used)


# -- drawing -------------------------------------------------------------------------------------------------------------


def _figure(title: str, draw: Draw, legend: tuple[Series, ...] = ()) -> Figure:
    return Figure(title, _svg(draw, WIDE), _svg(draw, NARROW), legend)


def _svg(draw: Draw, width: int) -> Markup:
    alt = _altair()
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    chart = draw(alt).properties(
        width=width, autosize=fit, background="transparent", padding={"left": 12, "right": 4, "top": 4, "bottom": 2}
    )
    colours = {"gridColor": "var(--grid)", "domainColor": "var(--line)", "tickColor": "var(--line)"}
    words = {"labelColor": "var(--soft)", "titleColor": "var(--soft)", "titleFontWeight": "normal"}
    sizes = {"labelFontSize": 12, "titleFontSize": 12, "labelPadding": 6, "titlePadding": 8}
    chart = chart.configure(font="Helvetica, Arial, sans-serif").configure_view(stroke=None)
    file = io.StringIO()
    chart.configure_axis(**colours, **words, **sizes).save(file, format="svg")
    return Markup(file.getvalue())  # Vega escapes its texts


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401  (draws for altair)
    except ImportError as error:
        raise DeviceError(f"the report's charts need {error.name}: pip install 'pennyweight[report]'") from error
    return altair


def _data(alt: Any, rows: Sequence[Row]) -> Any:
    return alt.Chart(alt.Data(values=list(rows)))


def _marks(alt: Any) -> Row:
    """Colour, shape and size by kind, and the words of a mark."""
    shapes, colours, sizes = (list(column) for column in zip(*STYLE.values(), strict=True))
    scales = {"color": (alt.Color, colours), "shape": (alt.Shape, shapes), "size": (alt.Size, sizes)}
    kinds = list(STYLE)
    by_kind = {n: channel("kind:N", scale=alt.Scale(domain=kinds, range=r), legend=None) for n, (channel, r) in scales.items()}
    return {**by_kind, "description": "tip:N"}


def _frontier(points: Sequence[Row], x: str, title: str, margin: float, limit: float | None) -> Draw:
    """Quality lost against a cost; the line joins trials that none beats in both, shaded is what the budget allows."""
    unit = margin or 0.001
    ticks = [0.0, *(sign * unit * 10**k for k in range(5) for sign in (1, -1))]

    def draw(alt: Any) -> Any:
        # symlog: a plan that loses a hundred margins would press those within one onto a line
        scale = alt.Scale(type="symlog", constant=unit, nice=False, padding=14)
        lost = alt.Y("drop:Q", scale=scale, axis=alt.Axis(values=ticks, labelExpr=SIGNED, title=None))
        axis = _log_axis(alt, [*(p[x] for p in points), *([limit] if limit else [])])
        at = alt.X(f"{x}:Q", title=title, scale=alt.Scale(type="log", nice=False, padding=24), axis=axis)
        low = alt.Y("low:Q", scale=scale)
        ends = _data(alt, [{"drop": margin, x: limit, "text": f"margin {exactly(margin)}"}])
        allowed = ends.mark_rect(color="var(--good)", opacity=0.09, aria=False)
        allowed = (
            allowed.encode(x=at, x2=alt.value(0), y=lost, y2=alt.value("height"))
            if limit
            else allowed.encode(y=lost, y2=alt.value("height"))
        )
        rule = ends.mark_rule(color="var(--worse)", strokeDash=[5, 4], aria=False).encode(y=lost)
        word = ends.mark_text(align="right", dy=-7, color="var(--worse)", aria=False).encode(
            y=lost, x=alt.value("width"), text="text:N"
        )
        steps = _data(alt, _unbeaten(points, x)).mark_line(
            interpolate="step-after", color="var(--chosen)", opacity=0.4, aria=False
        )
        shown = _data(alt, points)
        spread = shown.mark_rule(opacity=0.5, aria=False).encode(x=at, y=low, y2="upper:Q", color=_marks(alt)["color"])
        dots = shown.mark_point(filled=True, opacity=1).encode(x=at, y=lost, **_marks(alt))
        return (allowed + steps.encode(x=at, y=lost) + rule + word + spread + dots).properties(height=300)

    return draw


def _unbeaten(points: Sequence[Row], x: str) -> list[Row]:
    """The deployments that lose less than every cheaper one; the control is none, it only tells training from compression."""
    best: list[Row] = []
    for p in sorted((p for p in points if p["kind"] != "control"), key=lambda p: (p[x], p["drop"])):
        if not best or p["drop"] < best[-1]["drop"]:
            best.append({x: p[x], "drop": p["drop"]})
    return best


def _log_axis(alt: Any, values: Sequence[float]) -> Any:
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high - low < 0.9 else (1, 2, 5) if high - low < 2 else (1, 3)
    ticks = [m * 10.0**k for k in range(math.floor(low) - 1, math.ceil(high) + 2) for m in steps]
    shown = "datum.value >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')"
    return alt.Axis(values=ticks, labelExpr=shown, labelOverlap=True)


def _agreement(points: Sequence[Row], x: str) -> Draw:
    """Predicted against measured, and the line on which they agree."""
    both = [p[k] for p in points for k in (x, f"predicted {x}") if p[k] > 0]
    ends = [{x: v, f"predicted {x}": v} for v in (min(both) / 1.25, max(both) * 1.25)]

    def draw(alt: Any) -> Any:
        scale = alt.Scale(type="log", nice=False, domain=[e[x] for e in ends])
        axis = _log_axis(alt, both)
        place = {
            "x": alt.X(f"predicted {x}:Q", title="predicted", scale=scale, axis=axis),
            "y": alt.Y(f"{x}:Q", title="measured", scale=scale, axis=axis),
        }
        line = _data(alt, ends).mark_line(color="var(--line)", strokeDash=[4, 4], aria=False).encode(**place)
        dots = _data(alt, points).mark_point(filled=True, opacity=1).encode(**place, **_marks(alt))
        return (line + dots).properties(height=260)

    return draw


def _intervals(tested: Sequence[Row]) -> Draw:
    """Each drop on the test rows with its bounds, against the margin."""

    def draw(alt: Any) -> Any:
        names = alt.Axis(labelLimit=150, ticks=False, domain=False)
        rows = _data(alt, tested).encode(y=alt.Y("name:N", sort=None, title=None, axis=names))
        axis = alt.Axis(labelExpr=SIGNED, tickCount=4, labelOverlap=True, labelSeparation=10)
        low = alt.X("low:Q", title="lost (left is better)", axis=axis)
        spread = rows.mark_rule(strokeWidth=2.5, opacity=0.6, aria=False).encode(
            x=low, x2="upper:Q", color=_marks(alt)["color"]
        )
        dots = rows.mark_point(filled=True, opacity=1).encode(x="drop:Q", **_marks(alt))
        limits = _data(alt, [{"at": 0, "colour": "var(--line)"}, {"at": tested[0]["margin"], "colour": "var(--worse)"}])
        rules = limits.mark_rule(strokeDash=[5, 4], aria=False).encode(x="at:Q", color=alt.Color("colour:N", scale=None))
        return (rules + spread + dots).properties(height=34 * len(tested) + 50)

    return draw


def _lines(rows: Sequence[Row], runs: Sequence[Series]) -> Draw:
    """A value over epochs, a line for each training."""
    names, colours = [s.name for s in runs], [s.colour for s in runs]
    dashes = [[int(n) for n in s.shape.split()[1:]] for s in runs]

    def draw(alt: Any) -> Any:
        colour = alt.Color("run:N", scale=alt.Scale(domain=names, range=colours), legend=None)
        dash = alt.StrokeDash("run:N", scale=alt.Scale(domain=names, range=dashes), legend=None)
        epochs = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, format="d", grid=False))
        value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
        chart = _data(alt, rows).encode(x=epochs, y=value, color=colour)
        dots = chart.mark_circle(size=28, opacity=1).encode(description="tip:N")
        return (chart.mark_line(strokeWidth=2, aria=False).encode(strokeDash=dash) + dots).properties(height=240)

    return draw
