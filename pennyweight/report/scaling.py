"""Models on more and more workers, on paper: what is left of each worker's speed, and where exchange overtakes compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from pennyweight.core.budget import size
from pennyweight.distribute.scale import Point, crossing
from pennyweight.report.charts import SPARE, Draw

Scaled = Mapping[str, Sequence[Point]]
"""Points by the model's name."""

COLOURS = ("var(--chosen)", "var(--control)", *(colour for colour, _ in SPARE))


def efficiency(scaled: Scaled) -> Draw:
    """Speed of a worker over that of one alone, by workers."""
    found = [
        {
            "model": name,
            "workers": p.workers,
            "share": 100 * p.efficiency,
            "tip": f"{name}, {p.workers} workers: {p.efficiency:.0%}",
        }
        for name, points in scaled.items()
        for p in points
    ]

    def draw(alt: Any) -> Any:
        up = alt.Y("share:Q", title="%", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
        chart = alt.Chart(alt.Data(values=found)).encode(x=_workers(alt), y=up, color=_models(alt, scaled))
        dots = chart.mark_circle(size=40, opacity=1).encode(description="tip:N")
        return (chart.mark_line(strokeWidth=2, aria=False) + dots).properties(height=260)

    return draw


def talk(scaled: Scaled) -> Draw:
    """Compute and exchange of a step, by workers; a mark where they are equal."""
    found, marks = [], []
    for name, points in scaled.items():
        for p in points:
            for part in ("compute", "exchange"):
                ms = getattr(p.step, part) * 1e3
                tip = f"{name}, {p.workers} workers: {ms:.3g} ms {part}"
                found.append({"model": name, "workers": p.workers, "part": part, "ms": max(ms, 1e-3), "tip": tip})
        at = crossing(points)
        if math.isfinite(at):
            logs = np.log([[p.workers, p.step.compute * 1e3] for p in points])
            ms = float(np.exp(np.interp(math.log(at), *logs.T)))  # lines between sizes are straight in logarithms
            marks.append(
                {"model": name, "workers": at, "ms": ms, "tip": f"{name}: exchange overtakes compute at about {at:.0f}"}
            )

    def draw(alt: Any) -> Any:
        up = alt.Y("ms:Q", title="ms", scale=alt.Scale(type="log", nice=False))
        dash = alt.StrokeDash(
            "part:N",
            scale=alt.Scale(domain=["compute", "exchange"], range=[[1, 0], [6, 4]]),
            legend=alt.Legend(orient="top", title=None),
        )
        chart = alt.Chart(alt.Data(values=found)).encode(x=_workers(alt), y=up, color=_models(alt, scaled))
        dots = chart.mark_circle(size=26, opacity=1).encode(description="tip:N")
        layers = chart.mark_line(strokeWidth=2, aria=False).encode(strokeDash=dash) + dots
        if marks:
            crossed = alt.Chart(alt.Data(values=marks)).mark_point(shape="cross", size=160, filled=True, color="var(--ink)")
            layers = layers + crossed.encode(x=_workers(alt), y=up, description="tip:N")
        return layers.properties(height=300)

    return draw


def _workers(alt: Any) -> Any:
    values = [2**k for k in range(1, 13)]
    return alt.X(
        "workers:Q",
        title="workers",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(values=values, format=",d", grid=False, labelOverlap=True),
    )


def _models(alt: Any, scaled: Scaled) -> Any:
    names = list(scaled)
    legend = alt.Legend(orient="top", title=None) if len(names) > 1 else None
    return alt.Color("model:N", scale=alt.Scale(domain=names, range=list(COLOURS[: len(names)])), legend=legend)


def table(name: str, points: Sequence[Point]) -> Table:
    """The points of one model, for a terminal."""
    at = crossing(points)
    where = (
        f"exchange overtakes compute at about {at:,.0f} workers" if math.isfinite(at) else "compute stays longer than exchange"
    )
    shown = Table(
        "workers", "groups", "tables", "compute ms", "exchange ms", "rows/s", "efficiency", "memory a worker", "sent a worker",
        title=f"{name} on paper: {where}", title_justify="left",
    )  # fmt: skip
    for p in points:
        kinds = ", ".join(f"{n} {kind}" for kind, n in p.kinds)
        shown.add_row(
            f"{p.workers:,}", f"{p.groups:,}", kinds, f"{p.step.compute * 1e3:.3g}", f"{p.step.exchange * 1e3:.3g}",
            f"{p.rate:,.0f}", f"{p.efficiency:.0%}", size(p.memory) + ("" if p.fits else " (too much)"), size(p.sent),
        )  # fmt: skip
    return shown
