"""The measured frontier of compression as a picture and a table: what was lost against how much smaller, ours and peers.

Nothing is measured here: rows come from ``results/compress.json``, the picture goes to ``docs/images/frontier.svg`` and the
table between the marks in ``docs/compress.md``. A point is a row of three seeds at its worst, the least ratio and the highest
95 % bound of the drop, with its mean drop at the other end of the line; a row that failed has none and stands in the table.
Without arguments both are written; ``--quick`` only says what would be.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from pennyweight.core.config import write
from pennyweight.optimize.prove import rounded
from pennyweight.report.charts import SIGNED, picture

DOCS = Path(__file__).parents[1] / "docs"
PICTURE, PAGE = DOCS / "images" / "frontier.svg", DOCS / "compress.md"
BEGIN, END = "<!-- figures: python -m benchmarks.frontier -->", "<!-- end of figures -->"
KINDS: Mapping[str, str] = {
    "free": "free", "free-6x": "free, smaller", "standard": "standard", "patient": "patient",
    "standard-given": "standard, given only", "retrieval": "retrieval",
    "retrieval-12x": "retrieval, smaller", "sequence": "sequence", "huge-tail": "huge tail",
}  # fmt: skip
"""Efforts and tasks by the first part of a row's id, in the table's order; another name stands for itself."""
SETS: Mapping[str, str] = {
    "frappe": "Frappe", "ml-1m": "MovieLens 1M", "ml-1m-sequences": "MovieLens 1M, sequences", "gowalla": "Gowalla",
    "beauty": "Amazon Beauty", "generated": "generated clicks",
}  # fmt: skip
METRIC: Mapping[str, str] = {"retrieval": "share of NDCG@20", "sequence": "share of NDCG@10"}
"""What is lost, where it is not AUC."""
OURS = "Pennyweight"
BAR = "M-1-.4H1V.4H-1Z"
STAR = "M0-1.1 .3-.35 1.1-.35 .45.15 .7.95 0 .5-.7.95-.45.15-1.1-.35-.3-.35Z"
TOOLS: Mapping[str, tuple[str, str]] = {
    OURS: ("circle", "#0068ad"), "small net": ("diamond", "#14181d"), "row-wise": (BAR, "#4a9bd1"),
    "onnxruntime": ("square", "#b86a00"), "openvino": ("triangle-up", "#00775a"), "pytorch": ("cross", "#bf3a1c"),
    "torchao": ("triangle-right", "#b0568c"), "neural-compressor": ("triangle-down", "#7a62c9"),
    "keras": ("triangle-left", "#c3a500"), "torch-pruning": (STAR, "#929ca7"),
}  # fmt: skip
"""Shape and colour of each tool, by how the third part of a row's id begins; the small net is trained from scratch."""
NOT_OURS = ("baseline", "sanity", "exactness")
GAP = 26


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the results."""

    kind: str
    data: str
    tool: str
    setting: str
    """Of a peer, as the id names it."""
    ratio: float
    drop: float
    upper: float
    """95 % bound of the drop, the worst of the seeds."""
    seconds: float
    bar: float | None
    """Times smaller, where a bar was set."""
    holds: bool
    alone: float | None = None
    """The drop against the control: what compression alone cost."""
    failed: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is no other's."""
        return self.tool == OURS


def points(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """A point for each id that has a ratio, in the order of kinds and sets, ours before others."""
    held: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not row["id"].startswith(NOT_OURS):
            held.setdefault(row["id"], {})[row["metric"]] = row
    found = [_point(id, by) for id, by in held.items() if "compression_ratio" in by]
    orders = [list(KINDS), list(SETS), list(TOOLS)]

    def place(p: Point) -> tuple[Any, ...]:
        return tuple(o.index(v) if v in o else len(o) for o, v in zip(orders, (p.kind, p.data, p.tool), strict=True))

    return sorted(found, key=lambda p: (place(p)[1], place(p)[2] > 0, place(p)[0], place(p)[2], p.setting))


def _point(id: str, by: Mapping[str, Mapping[str, Any]]) -> Point:
    kind, data, *rest = id.split("/")
    if kind.startswith("sequence"):
        data = f"{data}-sequences" if f"{data}-sequences" in SETS else data  # judged by another metric than its clicks
    setting = rest[0] if rest else ""
    ratio = by["compression_ratio"]
    value = {name: by[name]["value"] if name in by else 0.0 for name in ("drop", "drop_upper_95", "seconds")}
    alone = by["drop_against_control"]["value"] if "drop_against_control" in by else None
    failed = "" if "drop" in by else ratio["note"].removeprefix("failed: ") or "failed"
    holds = all(row["holds"] for row in by.values())
    return Point(
        kind, data, _tool(setting), setting, ratio["value"], *value.values(), ratio["bar"], holds, alone, failed,
    )  # fmt: skip


def _tool(setting: str) -> str:
    if setting == "from-scratch":
        return "small net"
    return next((name for name in TOOLS if setting.startswith(name)), setting) if setting else OURS


# -- the table -------------------------------------------------------------------------------------------------------------


def figures(found: Sequence[Point]) -> str:
    """Every point in Markdown, a table a data set; ours in bold where all its bars are met."""
    tables = []
    for data in dict.fromkeys(p.data for p in found):
        here = [p for p in found if p.data == data]
        unit = METRIC.get(here[0].kind.partition("-")[0], "AUC")
        head = f"**{SETS.get(data, data)}** ({unit})"
        lines = [
            f"| {head} | times smaller | drop | at most (95 %) | against the control | seconds |",
            "|---|---|---|---|---|---|",
        ]
        tables.append("\n".join([*lines, *map(_line, here)]))
    return "\n\n".join(tables)


def _line(p: Point) -> str:
    if p.failed:
        return f"| {p.setting} | – | | | | {_cell(p.failed)} |"
    alone = "" if p.alone is None else rounded(p.alone)
    asked = f", bar {p.bar:g}×" if p.bar is not None else ""
    name = f"{KINDS.get(p.kind, p.kind)}{asked}{'' if p.holds else ': missed'}" if p.ours else p.setting
    ratio = f"{rounded(p.ratio, 1, up=False)}×"
    cells = [
        name,
        f"**{ratio}**" if p.ours and p.holds else ratio,
        rounded(p.drop),
        rounded(p.upper, up=True),
        alone,
        f"{p.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Words that fit a cell."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())[:90]


def filled(page: str, table: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} lacks {BEGIN} or {END}")
    shown = f"\n![Loss against how much smaller, ours and others](images/{PICTURE.name})\n\n{table}\n\n" if table else ""
    return f"{before}{BEGIN}\n{shown}{END}{after}"


# -- the picture -----------------------------------------------------------------------------------------------------------


def chart(found: Sequence[Point], width: int = 720) -> str:
    """Loss against ratio, a panel a data set, one under the other, as an SVG file on white."""
    drawn = [p for p in found if not p.failed]
    return stacked([panel([p for p in drawn if p.data == data], width) for data in dict.fromkeys(p.data for p in drawn)])


def panel(found: Sequence[Point], width: int) -> str:
    """One data set."""
    tools = [name for name in TOOLS if any(p.tool == name for p in found)]
    largest = max(p.ratio for p in found)
    kind, name = found[0].kind.partition("-")[0], SETS.get(found[0].data, found[0].data)
    lost = f"{METRIC.get(kind, 'AUC')} lost"
    values = [
        {
            **{"ratio": p.ratio, "drop": p.drop, "upper": p.upper, "tool": p.tool},
            "text": KINDS.get(p.kind, p.kind) if p.ours else "",
            "side": p.ratio > 0.8 * largest,
            "tip": f"{p.setting or p.kind}: {p.ratio:.1f} times smaller, at most {rounded(p.upper, up=True)} lost",
        }
        for p in found
    ]
    unit = 0.001 if lost.startswith("AUC") else 0.005
    most = max(abs(v) for p in found for v in (p.upper, p.drop))
    ticks = [0.0, *(sign * unit * k for k in (1, 5, 25, 125) for sign in (1, -1) if unit * k <= 2 * most or k == 1)]

    def draw(alt: Any) -> Any:
        scale = alt.Scale(type="symlog", constant=unit, nice=False, padding=14)
        looks = [TOOLS[t] for t in tools]
        legend = alt.Legend(title=None, orient="right", symbolSize=70)
        colour = alt.Color("tool:N", scale=alt.Scale(domain=list(tools), range=[c for _, c in looks]), legend=legend)
        # A legend of both shows each in its shape and colour.
        shape = alt.Shape("tool:N", scale=alt.Scale(domain=list(tools), range=[s for s, _ in looks]), legend=legend)
        steps = alt.Axis(
            values=[1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150],
            labelExpr="datum.value + '×'",
            labelOverlap=True,
        )
        x = alt.X("ratio:Q", title=f"{name}: times smaller", scale=alt.Scale(type="log", nice=False, padding=22), axis=steps)
        y = alt.Y("upper:Q", title=f"{lost}, 95 % bound", scale=scale, axis=alt.Axis(values=ticks, labelExpr=SIGNED))
        shown = alt.Chart(alt.Data(values=values)).encode(x=x, color=colour)
        lines = alt.Chart(alt.Data(values=[{"at": 0.0}, {"at": unit}])).mark_rule(color="var(--line)", strokeDash=[5, 4])
        spread = shown.mark_rule(opacity=0.5).encode(y=alt.Y("drop:Q", scale=scale), y2="upper:Q")
        dots = shown.mark_point(filled=True, size=75, opacity=1).encode(y=y, shape=shape, description="tip:N")
        said = [
            (f"{'' if left else '!'}datum.side", "right" if left else "left", -8 if left else 8, 14 if left else -7)
            for left in (True, False)
        ]
        words = [
            shown.transform_filter(where).mark_text(align=align, dx=dx, dy=dy, fontSize=11).encode(y=y, text="text:N")
            for where, align, dx, dy in said
        ]
        rules = lines.encode(y=alt.Y("at:Q", scale=scale))
        return alt.layer(rules, spread, dots, *words).properties(height=300)

    return picture(draw, width)


def stacked(panels: Sequence[str]) -> str:
    """SVG files one under the other in one file; names of their clips are kept apart."""
    inner, top, width = [], 0, 0
    for k, svg in enumerate(panels):
        (w, h) = (
            int(float(n))
            for n in re.findall(r'<svg[^>]*? (?:width|height)="([\d.]+)"[^>]*?(?:width|height)="([\d.]+)"', svg)[0]
        )
        body = re.sub(r"\b(clip|gradient)(_?\d+)", rf"panel{k}\1\2", svg[svg.index("<svg") :])
        inner.append(body.replace("<svg", f'<svg y="{top}" overflow="visible"', 1))
        top, width = top + h + GAP, max(width, w + GAP)
    size = f'width="{width}" height="{max(0, top - GAP)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {max(0, top - GAP)}">'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(inner)}</svg>\n'


def main(argv: Sequence[str]) -> None:
    """Write both, or with ``--quick`` say what would be written."""
    found = points(json.loads((RESULTS / "compress.json").read_text())["rows"])
    if "--quick" in argv:
        print(figures(found))
        return
    if found:
        write(PICTURE, chart(found))
    write(PAGE, filled(PAGE.read_text(), figures(found)))
    print(f"{len(found)} rows: {PICTURE} and the figures of {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
