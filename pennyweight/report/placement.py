"""A plan over workers, for a terminal, a script, and as one page that opens offline: who holds what, and what a step costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.table import Table

from pennyweight.core.budget import size
from pennyweight.core.config import encode
from pennyweight.distribute.cost import EXCHANGES, Predicted
from pennyweight.distribute.formulas import Formula
from pennyweight.distribute.planner import WORDS, Alternative, Made
from pennyweight.distribute.rehearse import Measured
from pennyweight.distribute.scale import Point
from pennyweight.report import scaling
from pennyweight.report.charts import Draw, picture
from pennyweight.report.serving import STYLE

PARTS: Mapping[str, str] = {
    "lookup": "var(--chosen)",
    "dense": "var(--other)",
    "ids": "var(--run4)",
    "rows": "var(--control)",
    "gradients": "var(--worse)",
    "sums": "var(--run2)",
}
"""The parts of a step and their colours, in their order."""
MANY = 16
"""Ranks that are drawn; of more, the first."""


def summary(made: Made, formulas: Sequence[Formula], measured: Measured | None = None) -> dict[str, Any]:
    """A plan as plain JSON values."""
    return {
        "model": made.work.name,
        "workers": made.topology.world,
        "batch": made.work.batch,
        "placement": encode(made.chosen.placement, slim=True),
        "predicted": _costs(made.chosen),
        "measured": encode(measured) if measured else None,
        "ranks": [{**encode(r), "memory": r.memory} for r in made.chosen.ranks],
        "limit": made.chosen.limit,
        "tables": encode(made.decisions),
        "alternatives": [{"name": a.name, **_costs(a.predicted)} for a in made.alternatives],
        "why": list(made.why),
        "formulas": [{**encode(f), "holds": f.holds} for f in formulas],
        "tried": made.tried,
        "exhaustive": made.exhaustive,
        "topology": encode(made.topology, slim=True),
    }


def _costs(p: Predicted) -> dict[str, Any]:
    return {
        "step_ms": p.step.seconds * 1e3,
        "parts_ms": {k: v * 1e3 for k, v in dataclasses.asdict(p.step).items()},
        "memory": p.memory,
        "sent": p.sent,
        "money": p.money,
        "fits": p.fits,
    }


def tables(made: Made) -> tuple[Table, Table]:
    """The placement, and its cost against the alternatives."""
    placed = Table("table", "rows x dim", "weights", "ids", "cut", "on", "why", title=title(made), title_justify="left")
    for d in made.decisions:
        placed.add_row(d.path, f"{d.rows:,} x {d.dim}", size(d.bytes), f"{d.lookups:g}", d.kind, _ranks(made, d.ranks), d.why)
    for path, cut in made.chosen.placement.dense.items():
        placed.add_row(path, "", "", "", f"{cut}-parallel", "all of a group", "wider than its exchange is long")
    costs = Table("placement", "step ms", "", "memory a worker", "sent a step", *_money(made), title_justify="left")
    for name, p in rows(made):
        fits = "" if p.fits else f" ({size(p.memory - p.limit)} too much)"
        ratio = f"{p.step.seconds / made.chosen.step.seconds:.2f}x"
        money = [f"{p.money:.4g}"] if _money(made) else []
        costs.add_row(name, f"{p.step.seconds * 1e3:.3g}", ratio, size(p.memory) + fits, size(p.sent), *money)
    return placed, costs


def title(made: Made) -> str:
    """The plan in a line."""
    top, groups = made.topology, made.chosen.placement.replicas
    on = f"{top.world} workers" if top.hosts == 1 else f"{top.world} workers on {top.hosts} hosts"
    apart = f", in {groups} groups that hold the same" if 1 < groups < top.world else ""
    return f"{made.work.name}, steps of {made.work.batch:,} rows on {on}{apart}"


def rows(made: Made) -> list[tuple[str, Predicted]]:
    """The chosen placement, then its alternatives, the fastest first."""
    order = sorted(made.alternatives, key=lambda a: (not a.predicted.fits, a.predicted.step.seconds))
    return [("chosen", made.chosen), *((a.name, a.predicted) for a in order)]


def lines(made: Made, formulas: Sequence[Formula], measured: Measured | None = None) -> list[str]:
    """What a person reads below the tables."""
    step = made.chosen.step
    parts = [f"{WORDS[n]} {getattr(step, n) * 1e3:.3g}" for n in PARTS]
    how = "all placements were costed" if made.exhaustive else "searched one table at a time"
    said = [f"a step of {step.seconds * 1e3:.3g} ms: {', '.join(parts)} (ms); {how}, {made.tried:,} in all", *made.why]
    if measured is not None:
        off = made.chosen.step.seconds / measured.step - 1
        sent = sum(measured.sent)
        took = f"a step of {measured.step * 1e3:.3g} ms, predicted {off:+.0%}"
        said.append(f"measured: {took}; {size(sent)} sent, predicted {size(made.chosen.sent)}")
    return [*said, *(f"{f.text}: {f.said}" for f in formulas)]


def _money(made: Made) -> tuple[str, ...]:
    price = made.topology.price
    return (f"{price.currency} a million rows",) if price.host_hour or price.gb_hour else ()


def _ranks(made: Made, ranks: Sequence[int]) -> str:
    if len(ranks) == made.chosen.placement.group:
        return "all" if made.chosen.placement.replicas in (1, made.topology.world) else "all of a group"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))


# -- the page --------------------------------------------------------------------------------------------------------------


def page(made: Made, formulas: Sequence[Formula], measured: Measured | None = None, scaled: Sequence[Point] = ()) -> str:
    """The page as HTML; ``scaled`` adds the model on more workers, on paper.

    Raises:
        DeviceError: the packages that draw are not installed.
    """
    figures = [
        ("Which table where", grid(made)),
        ("Bytes each worker holds", held(made, measured)),
        ("Bytes each worker sends in a step", traffic(made, measured)),
        ("Time of a step, ms", breakdown(made, measured)),
    ]
    if scaled:
        figures += [
            ("On more workers, on paper: ms a step", scaling.talk({made.work.name: scaled})),
            ("Share of a worker's speed that is left", scaling.efficiency({made.work.name: scaled})),
        ]
    placed, costs = tables(made)
    return str(
        Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            "<title>Placement</title><style>{}</style><h1>{}</h1>{}{}<h2>Tables</h2>{}<h2>Against other placements</h2>{}"
            "<h2>Four plain formulas</h2>{}<p>Predicted from rates measured on {}; {}.</p></html>"
        ).format(
            Markup(
                STYLE
                + "h2 { font-size: 1.15rem } td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }"
            ),
            title(made),
            Markup("").join(Markup("<p>{}</p>").format(line) for line in lines(made, (), measured)),
            Markup("").join(
                Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(name, Markup(picture(draw)))
                for name, draw in figures
            ),
            _html(placed),
            _html(costs),
            Markup("<ul>{}</ul>").format(
                Markup("").join(Markup("<li><b>{}</b> {}</li>").format(f.text, f.said) for f in formulas)
            ),
            made.topology.cpu.model or "the machine that was named",
            "measured in a rehearsal" if measured else "not rehearsed",
        )
    )


def _html(table: Table) -> Markup:
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    head = Markup("").join(Markup("<th>{}</th>").format(column.header) for column in table.columns)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row)) for row in cells
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(head, body)


def grid(made: Made) -> Draw:
    """Tables against ranks: a square where a rank holds a block, the darker the more bytes of the table."""
    placement = made.chosen.placement
    cells = []
    for t in made.work.tables:
        pieces = list(placement.held(t.path, t.rows, t.dim))
        kind = placement.shards[t.path].kind if t.path in placement.shards else "whole"
        for p in (p for p in pieces if p.rank < MANY):
            share = p.numbers / (t.rows * t.dim)
            tip = f"{t.path} on rank {p.rank}: rows {p.rows[0]:,} to {p.rows[1]:,}, columns {p.columns[0]} to {p.columns[1]}"
            cells.append({"table": _short(t.path), "rank": p.rank, "share": share, "kind": kind, "tip": f"{tip} ({kind})"})
    kinds = {
        "whole": "var(--other)",
        "table": "var(--chosen)",
        "row": "var(--control)",
        "column": "var(--run1)",
        "grid": "var(--run2)",
    }

    def draw(alt: Any) -> Any:
        seen = [k for k in kinds if any(c["kind"] == k for c in cells)]
        colour = alt.Color(
            "kind:N", scale=alt.Scale(domain=seen, range=[kinds[k] for k in seen]), legend=alt.Legend(orient="top", title=None)
        )
        across = alt.X("rank:O", title="rank of a group", axis=alt.Axis(labelAngle=0))
        down = alt.Y("table:N", sort=None, title=None, axis=alt.Axis(labelLimit=170))
        depth = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.35, 1]), legend=None)
        base = alt.Chart(alt.Data(values=cells)).encode(x=across, y=down, color=colour, opacity=depth, description="tip:N")
        return base.mark_rect(stroke="#fff").properties(height=90 + 26 * len(made.work.tables))

    return draw


def _short(path: str) -> str:
    return path.removeprefix("embeddings.tables.")


def held(made: Made, measured: Measured | None = None) -> Draw:
    """Bytes of each rank by what they are for, against what it may hold."""
    names = {"tables": "var(--chosen)", "dense": "var(--other)", "activations": "var(--run4)", "buffers": "var(--control)"}
    points = [
        {"rank": k, "bytes": b, "tip": f"rank {k}: {size(b)} of weights and optimizer measured"}
        for k, b in _few(measured, "held")
    ]
    return _bars(_each(made, names), names, "bytes", points)


def traffic(made: Made, measured: Measured | None = None) -> Draw:
    """Bytes each rank sends and receives in a step."""
    names = {"sent": "var(--chosen)", "received": "var(--other)"}
    points = [{"rank": k, "bytes": b, "tip": f"rank {k}: {size(b)} sent, measured"} for k, b in _few(measured, "sent")]
    return _bars(_each(made, names), names, "bytes", points, stacked=False)


def _each(made: Made, names: Iterable[str]) -> list[dict[str, Any]]:
    """A bar of bytes for each rank and field of it."""
    return [
        {
            "rank": r.rank,
            "what": name,
            "order": k,
            "bytes": getattr(r, name),
            "tip": f"rank {r.rank}: {size(getattr(r, name))} {name}",
        }
        for r in made.chosen.ranks[:MANY]
        for k, name in enumerate(names)
    ]


def _few(measured: Measured | None, field: str) -> list[tuple[int, int]]:
    return list(enumerate(getattr(measured, field)))[:MANY] if measured else []


def _bars(
    bars: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    y: str,
    points: Sequence[Mapping[str, Any]],
    *,
    stacked: bool = True,
) -> Draw:
    """Bars a rank, by colour; diamonds where something was measured."""

    def draw(alt: Any) -> Any:
        scale = alt.Scale(domain=list(names), range=list(names.values()))
        colour = alt.Color("what:N", scale=scale, legend=alt.Legend(orient="top", title=None))
        across = alt.X("rank:O", title="rank", axis=alt.Axis(labelAngle=0))
        up = alt.Y(f"{y}:Q", title=None, stack="zero" if stacked else None, axis=alt.Axis(format="~s", tickCount=5))
        chart = alt.Chart(alt.Data(values=list(bars))).mark_bar().encode(x=across, y=up, color=colour, description="tip:N")
        chart = chart.encode(order="order:Q") if stacked else chart.encode(xOffset="what:N")
        if points:
            marks = alt.Chart(alt.Data(values=list(points))).mark_point(
                shape="diamond", filled=True, color="var(--ink)", size=80
            )
            chart = chart + marks.encode(x=across, y=alt.Y(f"{y}:Q"), description="tip:N")
        return chart.properties(height=220)

    return draw


def breakdown(made: Made, measured: Measured | None = None) -> Draw:
    """A bar a placement by the parts of its step, and a line where the chosen one was measured."""
    shown: list[Alternative] = [Alternative(name, p) for name, p in rows(made)]
    bars = [
        {
            "placement": a.name + ("" if a.predicted.fits else " (too large)"),
            "part": WORDS[part],
            "order": k,
            "ms": getattr(a.predicted.step, part) * 1e3,
            "tip": f"{a.name}: {WORDS[part]} {getattr(a.predicted.step, part) * 1e3:.3g} ms",
        }
        for a in shown
        for k, part in enumerate(PARTS)
    ]

    def draw(alt: Any) -> Any:
        scale = alt.Scale(domain=[WORDS[p] for p in PARTS], range=list(PARTS.values()))
        legend = alt.Legend(orient="bottom", title=None, columns=2, labelLimit=230)
        down = alt.Y("placement:N", sort=None, title=None, axis=alt.Axis(labelLimit=150))
        across = alt.X("ms:Q", title="ms, predicted", axis=alt.Axis(tickCount=5))
        chart = alt.Chart(alt.Data(values=bars)).mark_bar()
        chart = chart.encode(
            x=across, y=down, color=alt.Color("part:N", scale=scale, legend=legend), order="order:Q", description="tip:N"
        )
        if measured:
            ends = [{"ms": measured.step * 1e3, "placement": "chosen", "tip": f"measured: {measured.step * 1e3:.3g} ms"}]
            tick = alt.Chart(alt.Data(values=ends)).mark_tick(color="var(--ink)", thickness=3, size=26)
            chart = chart + tick.encode(x=alt.X("ms:Q"), y=down, description="tip:N")
        return chart.properties(height=140 + 30 * len(shown))

    return draw


assert tuple(PARTS) == ("lookup", "dense", *EXCHANGES)
