"""How many workers a load needs, as one page that opens offline: the answer, two charts and their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from pennyweight.report.charts import Draw, picture
from pennyweight.schedule.simulate import Point

STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #14181d; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } figure { display: inline-block; margin: 1rem 0 } figcaption { font-weight: bold }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #e8ecf0 } th { color: #55606c; font-weight: normal }
tr.enough { background: #e8f3fa; font-weight: bold } svg { max-width: 100%; height: auto } pre { white-space: pre-wrap }
"""


def answer(points: Sequence[Point], found: Point | None, p99_ms: float, on_time: float) -> str:
    """The answer in a sentence, with its numbers."""
    wanted = f"p99 <= {p99_ms:g} ms and {on_time:.1%} on time"
    most = max(points, key=lambda p: p.workers)
    if found is None:
        few = f"{_many(most.workers)} {'is' if most.workers == 1 else 'are'} too few for {wanted}"
        measured = f"p99 {_ms(most.p99_ms)} ms, {most.on_time:.2%} on time"
        return f"{few}: {measured}; try more with --workers, or give the policy a cheaper variant"
    said = f"{_many(found.workers)} for {wanted}: p99 {found.p99_ms:.3g} ms, {found.on_time:.2%} on time, {found.busy:.0%} busy"
    fewer = [p for p in points if p.workers < found.workers]
    if fewer:
        less = max(fewer, key=lambda p: p.workers)
        said += f"; with {less.workers}: p99 {less.p99_ms:.3g} ms, {less.on_time:.2%} on time"
    return said


def page(points: Sequence[Point], found: Point | None, p99_ms: float, on_time: float, trace: str) -> str:
    """The page as HTML.

    Raises:
        DeviceError: the packages that draw are not installed.
    """
    rows = [_row(p, p is found) for p in points]
    charts = [("p99 of those answered", _p99(points, p99_ms)), ("on time, of all requests", _share(points, on_time))]
    figures = [
        Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, Markup(picture(draw))) for title, draw in charts
    ]
    return str(
        Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            "<title>Workers</title><style>{}</style><h1>{}</h1><pre>{}</pre>{}"
            '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
            "<p>Simulated: the scheduler is the one that serves, the workers are modelled from the profile.</p></html>"
        ).format(
            Markup(STYLE),
            answer(points, found, p99_ms, on_time),
            trace,
            Markup("").join(figures),
            Markup("").join(Markup("<th>{}</th>").format(h) for h in heads(points)),
            Markup("").join(rows),
        )
    )


def heads(points: Sequence[Point]) -> tuple[str, ...]:
    """The table's columns: which model answered only where there are several."""
    usual = ("workers", "on time", "by items", "p50 ms", "p99 ms", "refused", "busy")
    return (*usual, "quality", "answered by") if len(points[0].mix) > 1 else usual


def cells(point: Point) -> tuple[str, ...]:
    """A row of the table."""
    usual = (
        str(point.workers), f"{point.on_time:.2%}", f"{point.on_time_items:.2%}", _ms(point.p50_ms), _ms(point.p99_ms),
        f"{point.refused:.2%}", f"{point.busy:.0%}",
    )  # fmt: skip
    if len(point.mix) == 1:
        return usual
    return (*usual, f"{point.quality:.4f}", ", ".join(f"{name} {share:.0%}" for name, share in point.mix.items() if share > 0))


def _row(point: Point, chosen: bool) -> Markup:
    shown = Markup("").join(Markup("<td>{}</td>").format(c) for c in cells(point))
    return Markup('<tr class="{}">{}</tr>').format("enough" if chosen else "", shown)


def _many(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _ms(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _p99(points: Sequence[Point], limit: float) -> Draw:
    rows = [
        {"workers": p.workers, "p99": p.p99_ms, "tip": f"{_many(p.workers)}: p99 {p.p99_ms:.3g} ms"}
        for p in points
        if math.isfinite(p.p99_ms)
    ]
    return _line(rows, "p99", "ms", limit, f"wanted: {limit:g} ms")


def _share(points: Sequence[Point], limit: float) -> Draw:
    rows = [
        {"workers": p.workers, "share": 100 * p.on_time, "tip": f"{_many(p.workers)}: {p.on_time:.2%} on time"} for p in points
    ]
    return _line(rows, "share", "%", 100 * limit, f"wanted: {limit:.1%}")


def _line(rows: Sequence[dict[str, Any]], y: str, unit: str, limit: float, words: str) -> Draw:
    """A value over the number of workers, and what is wanted of it."""

    def draw(alt: Any) -> Any:
        across = alt.X("workers:Q", title="workers", axis=alt.Axis(tickMinStep=1, format="d", grid=False))
        up = alt.Y(f"{y}:Q", title=unit, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
        chart = alt.Chart(alt.Data(values=list(rows))).encode(x=across, y=up)
        line = chart.mark_line(color="var(--chosen)", strokeWidth=2, aria=False)
        dots = chart.mark_circle(color="var(--chosen)", size=45, opacity=1).encode(description="tip:N")
        ends = alt.Chart(alt.Data(values=[{y: limit, "text": str(escape(words))}]))
        rule = ends.mark_rule(color="var(--worse)", strokeDash=[5, 4], aria=False).encode(y=alt.Y(f"{y}:Q"))
        word = ends.mark_text(align="right", dy=-7, color="var(--worse)").encode(
            y=f"{y}:Q", x=alt.value("width"), text="text:N"
        )
        return (rule + word + line + dots).properties(height=260)

    return draw
