"""What all benchmarks share: the arguments, the stamp of the machine, the table, and the file of results.

A benchmark is a mapping from a row's id to the function that measures it. The rows of one file may come from several
runs (``--only``), so each keeps its own commit, date, seconds and the share of the processor that others used meanwhile. A
row whose bar was missed is written like any other, with ``"holds": false``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pennyweight.core import config, hardware, measure
from pennyweight.core.errors import ConfigError

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured claim, as an issue names it."""

    id: str
    metric: str
    value: float
    low: float
    high: float
    """Interval or range of ``value``; ``note`` says which where it is not the range over seeds."""
    seeds: int = 1
    bar: float | None = None
    """What the value must reach, or with ``at_most`` may not exceed."""
    baseline: float | None = None
    """What it is compared with: the published figure, or ours before."""
    peer: str | None = None
    """Another system and its version, measured beside ours."""
    peer_value: float | None = None
    note: str = ""
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bar is met; a row without one holds."""
        return self.bar is None or bool(self.value <= self.bar if self.at_most else self.value >= self.bar)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may say to any benchmark."""

    quick: bool
    """Under a minute, to check the harness and not the claim; nothing is written."""
    data: Path
    """The folder with the public data sets."""
    seeds: int
    """Seeds to average over."""


Measure = Callable[[Options], Row | Sequence[Row]]
"""Rows of one id; several where it is judged by several metrics."""


def run(
    name: str,
    rows: Mapping[str, Measure],
    *,
    timed: bool,
    seeds: int = 3,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Measure the rows asked for, print them, and write those of a full run to ``results/NAME.json``.

    Args:
        name: of the benchmark and its file.
        rows: how to measure each id.
        timed: values depend on a quiet machine: wait for one, and refuse when others use more than 15 %.
        seeds: the default number of seeds.
        argv: arguments instead of the command line's.
        parents: of arguments the benchmark reads itself.
    """
    given = arguments(name, rows, seeds, argv, parents)
    options = Options(given.quick, given.data, 1 if given.quick else given.seeds)
    for id in given.only or rows:
        if timed and not options.quick:
            measure.quiet()
        with measure.Foreign() as others:
            began, loaded = time.monotonic(), _when()  # the commit that runs, not one made meanwhile
            made = rows[id](options)
        found = [made] if isinstance(made, Row) else list(made)
        stamp = {"seconds": round(time.monotonic() - began, 1), "foreign_cpu": round(others.share, 3), **loaded}
        if timed and not options.quick and others.share > measure.LOUD:
            raise ConfigError(
                f"{id}: others used {others.share:.0%} of the processor meanwhile; nothing was written, run it again"
            )
        show(found, claim=not options.quick)
        if not options.quick:
            _keep(RESULTS / f"{name}.json", found, stamp, list(rows))


def show(rows: Sequence[Row], *, claim: bool = True) -> None:
    """Print rows as a table with their notes under it; without ``claim`` no bar is judged."""
    console = Console(width=max(110, Console().width), highlight=False)
    table = Table("id", "metric", "value", "range", "seeds", "compared with", "bar", "holds")
    for r in rows:
        bar = "" if r.bar is None else f"{'<=' if r.at_most else '>='} {r.bar:g}"
        compared = " ".join(f"{v:g}" for v in (r.baseline, r.peer_value) if v is not None)
        holds = "quick" if not claim else "yes" if r.holds else "NO"
        table.add_row(r.id, r.metric, f"{r.value:.5g}", f"{r.low:.5g} to {r.high:.5g}", str(r.seeds), compared, bar, holds)
    console.print(table)
    for r in rows:
        console.print(
            f"{r.id}: {r.note}" + (f"; {r.peer}: {r.peer_value:g}" if r.peer and r.peer_value is not None else ""), style="dim"
        )


def arguments(
    name: str,
    rows: Iterable[str],
    seeds: int,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.Namespace:
    """What the command line says to a benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", parents=parents)
    parser.add_argument("--quick", action="store_true", help="under a minute: check the harness, write nothing")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with the public data sets (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds to average over (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(rows), help="a row to measure; may be repeated")
    return parser.parse_args(argv)


def _when() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC)
    return {"commit": _git("rev-parse", "--short=12", "HEAD"), "date": now.isoformat(timespec="seconds")}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _keep(path: Path, made: Sequence[Row], stamp: Mapping[str, Any], order: Sequence[str]) -> None:
    """Put the rows of one id into the file, in place of older ones of that id."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(r["id"], r["metric"]): r for r in known if r["id"] not in {m.id for m in made}}
    rows |= {(m.id, m.metric): {**config.encode(m), "holds": m.holds, **stamp} for m in made}
    head = {"commit": stamp["commit"], "date": stamp["date"], "machine": hardware.machine(), "versions": hardware.versions()}
    kept = sorted(rows.values(), key=lambda r: (order.index(r["id"]) if r["id"] in order else len(order), r["id"]))
    config.write(path, json.dumps({**head, "rows": kept}, indent=2) + "\n")
