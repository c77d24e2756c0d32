"""Rows of ``benchmarks.distribute`` about plans: is the planner's placement the best there is, and is its prediction true?

``planner``: 20 small models drawn at random, each on two workers of this machine. Every placement of its tables (whole, one
owner, by row, by column, combined) is trained for some steps by the real engine; then the planner's own, TorchRec's planner's
and the three that came out fastest take turns. ``over_best`` is the planner's step over the fastest; ``over_torchrec`` over
that of TorchRec's placement on the same engine; ``prediction_error`` the median of |predicted / measured - 1| over all.

``scale/WORKERS``: on paper, with this machine's rates and the link that ``FAR`` names, steps of 65,536 rows parted among the
workers: DLRM and DCN-V2 with the tables of MLPerf's DLRM-DCNv2 (Criteo 1TB at 40 M rows), and SASRec over ten million items.
``scale/published`` holds the direction against the two-dimensional parallelism of TorchRec (arXiv 2508.03854, abstract: full
model parallelism meets intensive lookup communication; cut inside groups, speed is nearly linear up to 4K GPUs). Hardware,
models and batch differ: the direction is compared, no figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Row
from pennyweight.core import measure
from pennyweight.core.config import write
from pennyweight.core.errors import DeviceError
from pennyweight.core.hardware import Device, Link, Rates, Topology
from pennyweight.data.schema import Column
from pennyweight.distribute import calibrate, planner, scale, workload
from pennyweight.distribute.cost import Setting
from pennyweight.distribute.rehearse import Measured, Stage, Trial
from pennyweight.distribute.search import Search
from pennyweight.distribute.workload import Update, Workload
from pennyweight.model.placement import Placement, Shard
from pennyweight.model.ranking import DLRM, DNN, DCNv2, DeepFM
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import Spec, spec_of
from pennyweight.report import scaling
from pennyweight.report.charts import picture

ROOT = Path(__file__).parents[1]
WORKERS = 2
MODELS = 20
STEPS = 12
ROUNDS = 7
FINALISTS = 3
FAR = Link(50, 25e9 / 8 / 8)
"""Between hosts: 25 Gbit/s Ethernet shared by a host's 8 workers, 50 us a message."""
CRITEO = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14,
    40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip
"""Rows of MLPerf's DLRM-DCNv2 tables (mlcommons/training, recommendation_v2)."""
BATCH = 65536
"""Rows of a step where scaling is looked at: MLPerf's."""


# -- the planner -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Small:
    """A model that is small enough for all its placements to be tried."""

    spec: Spec
    batch: int
    update: Update


def small(seed: int, tables: int = 3) -> Small:
    """Drawn at random: 3 tables of a hundred to 300,000 rows, one of them perhaps looked up by a sequence."""
    rng = random.Random(seed)
    sizes = [int(10 ** rng.uniform(2, 5.5)) for _ in range(tables)]
    columns = [Column(f"c{k}", "item" if k else "user", "categorical", n) for k, n in enumerate(sizes)]
    if rng.random() < 0.5:
        columns.append(Column("history", "user", "sequence", sizes[1], rng.choice((5, 20)), shares="c1"))
    columns.append(Column("number", "context", "numeric"))
    factory = rng.choice((DNN, DeepFM, DCNv2, DLRM))
    spec = spec_of(factory, columns=tuple(columns), dim=rng.choice((8, 16, 32)), hidden=rng.choice(((32,), (128, 64))))
    update: Update = rng.choice(("lazy-adam", "sgd"))
    return Small(spec, rng.choice((512, 1024, 2048)), update)


def planner_rows(options: Options, venvs: Path | None = None) -> list[Row]:
    """The planner's placements against all others, and its predictions against measurements."""
    count, steps, rounds = (2, 3, 2) if options.quick else (MODELS, STEPS, ROUNDS)
    models = [small(seed, 2 if options.quick else 3) for seed in range(count)]
    top = calibrate.measured(1, WORKERS, 0.5 if options.quick else 2.0)
    works = [_work(m, top, 0.3 if options.quick else 1.0) for m in models]
    theirs = asked(works, venvs)
    over: list[float] = []
    against: list[tuple[float, float]] = []
    errors: list[float] = []
    with Stage(WORKERS) as stage:
        for k, (model, work) in enumerate(zip(models, works, strict=True)):
            run = _Runs(stage, model, Setting(work, top, 1), steps)
            errors += run.all()
            chosen = planner.plan(work, top).chosen.placement.shards
            found = run.final(chosen, theirs[k] if theirs else None, rounds)
            over.append(found["chosen"][0] / min(ratio for ratio, _ in found.values()))
            if theirs:
                against.append((found["chosen"][0] / found["torchrec"][0], found["chosen"][1]))
    low, high = np.percentile(errors, [10, 90]).tolist()
    made = [
        Row(
            "planner", "over_best", max(over), min(over), max(over), count, 1.1, at_most=True,
            note=f"worst of {count} models, every placement of each trained for {steps} steps on {WORKERS} workers; "
            f"median {statistics.median(over):.3f}",
        ),
        Row(
            "planner", "prediction_error", statistics.median(errors), low, high, count, 0.2, at_most=True,
            note=f"median over {len(errors)} placements; the range is of 80 % of them",
        ),
    ]  # fmt: skip
    if theirs:
        worst = [ratio for ratio, low in against if low > 1] or [1.0]
        ratios = [ratio for ratio, _ in against]
        note = f"the worst model that is slower with 95 % over {rounds} rounds in turns, 1 where none is; "
        made.append(
            Row(
                "planner", "over_torchrec", max(worst), min(ratios), max(ratios), count, 1.0, at_most=True,
                peer="torchrec 1.8.0's planner, on our engine", peer_value=1.0,
                note=f"{note}median {statistics.median(ratios):.3f}",
            )
        )  # fmt: skip
    return made


def _work(model: Small, top: Topology, seconds: float) -> Workload:
    each = model.batch // WORKERS
    timed = calibrate.timed(model.spec, (each // 4, each), model.update, seconds=seconds)
    return workload.count(model.spec, model.batch, model.update).replace(timed=timed)


class _Runs:
    """Placements of one model, trained for some steps each."""

    def __init__(self, stage: Stage, model: Small, setting: Setting, steps: int) -> None:
        self.stage, self.model, self.setting, self.steps = stage, model, setting, steps
        self.seen: dict[tuple[tuple[str, Shard], ...], float] = {}

    def all(self) -> list[float]:
        """Every placement once; how far each prediction was off."""
        errors = []
        for made in Search(self.setting).placements():
            shards = {path: shard for path, shard in made.items() if shard is not None}
            took = self.step(shards)
            self.seen[tuple(sorted(shards.items()))] = took
            predicted = self.setting.predict(Placement(WORKERS, shards=shards)).step.seconds
            errors.append(abs(predicted / took - 1))
        return errors

    def final(
        self, chosen: Mapping[str, Shard], theirs: Mapping[str, Shard] | None, rounds: int
    ) -> dict[str, tuple[float, float]]:
        """The fastest, the chosen and TorchRec's in turns: median seconds, and the lower bound against the last."""
        fastest = sorted(self.seen, key=lambda key: self.seen[key])[:FINALISTS]
        field: dict[str, Mapping[str, Shard]] = {f"#{k}": dict(key) for k, key in enumerate(fastest)}
        field["chosen"] = chosen
        if theirs is not None:
            field["torchrec"] = theirs
        times: dict[str, list[float]] = {name: [] for name in field}
        for turn in range(rounds):
            done: dict[str, float] = {}  # the same placement under two names is one run
            names = list(field)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                key = json.dumps({p: dataclasses.astuple(s) for p, s in sorted(field[name].items())})
                if key not in done:
                    done[key] = self.step(field[name])
                times[name].append(done[key])
        ratios = np.asarray(times["chosen"]) / np.asarray(times.get("torchrec", times["chosen"]))
        rng = np.random.default_rng(0)
        low = float(np.percentile(np.median(ratios[rng.integers(0, rounds, (1000, rounds))], axis=1), 2.5))
        return {name: (statistics.median(t), low if name == "chosen" else 0.0) for name, t in times.items()}

    def step(self, shards: Mapping[str, Shard]) -> float:
        """Seconds of a step."""
        placement = Placement(WORKERS, shards=dict(sorted(shards.items())))
        trial = Trial.of(self.model.spec, placement, self.model.batch, update=self.model.update, steps=self.steps)
        found: Measured = self.stage.measure(trial)
        return found.step


def asked(works: Sequence[Workload], venvs: Path | None) -> list[dict[str, Shard]]:
    """How TorchRec's planner would cut each model's tables; empty where it is not installed."""
    python = (venvs / "torchrec" / "bin" / "python") if venvs else None
    if python is None or not python.exists():
        return []
    models = [
        {
            "workers": WORKERS,
            "batch": w.batch,
            "tables": [{"name": t.path, "rows": t.rows, "dim": t.dim, "lookups": max(1.0, t.lookups)} for t in w.tables],
        }
        for w in works
    ]
    names = [{t["name"]: t["name"].replace(".", "/") for t in m["tables"]} for m in models]  # type: ignore[attr-defined, index]
    for model, renamed in zip(models, names, strict=True):
        for table in model["tables"]:  # type: ignore[attr-defined]
            table["name"] = renamed[table["name"]]
    done = subprocess.run(
        [str(python), "-W", "ignore", "-m", "benchmarks.peers.sharding"],
        input=json.dumps(models), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    answers = json.loads(done.stdout[done.stdout.index("[") :])
    return [
        {path: made for path, theirs in renamed.items() if (made := _shard(answer[theirs])) is not None}
        for answer, renamed in zip(answers, names, strict=True)
    ]


def _shard(answer: Mapping[str, object]) -> Shard | None:
    """TorchRec's words in ours; data parallel is no cut."""
    ranks = tuple(dict.fromkeys(answer["ranks"]))  # type: ignore[call-overload]
    kind = str(answer["type"])
    if kind == "data_parallel":
        return None
    if len(ranks) == 1:
        return Shard("table", ranks)
    return Shard("column", ranks) if "column" in kind else Shard("row", ranks)


# -- on paper --------------------------------------------------------------------------------------------------------------


def papers() -> dict[str, Workload]:
    """The three models, a worker's step of each."""
    tables = tuple(Column(f"c{k}", "item" if k else "user", "categorical", n + 2) for k, n in enumerate(CRITEO))
    columns = (*tables, Column("dense", "context", "numeric", 0, 13))
    top = (1024, 1024, 512, 256)
    items = (
        Column("user", "user", "categorical", 1000),
        Column("item", "item", "categorical", 10_000_000),
        Column("history", "user", "sequence", 10_000_000, 200, shares="item"),
    )
    specs = {
        "DLRM": spec_of(DLRM, columns=columns, dim=128, bottom=(512, 256), hidden=top),
        "DCN-V2": spec_of(DCNv2, columns=columns, dim=128, cross=3, rank=512, hidden=top, structure="stacked"),
        "SASRec": spec_of(SASRec, columns=items, dim=128, blocks=4, heads=4),
    }
    return {name: workload.count(spec, BATCH, "adagrad", name=name) for name, spec in specs.items()}


def host(rates: Rates, inside: Link) -> Topology:
    """Eight workers, a core and 80 GB each."""
    return Topology((Device("cpu", "cpu", 8, 8 * 80 * 10**9),), 1, 8, inside, FAR, rates)


def scale_rows(options: Options) -> list[Row]:
    """Efficiency of three models from 2 to 4,096 workers, where exchange overtakes compute, and the published direction."""
    sizes = scale.WORKERS[:4] if options.quick else scale.WORKERS
    there = calibrate.measured(1, 2, 0.5 if options.quick else 2.0)
    assert there.rates is not None and there.inside is not None
    top = host(there.rates, there.inside)
    works = papers()
    scaled = {name: scale.simulate(work, top, sizes, strong=True) for name, work in works.items()}
    made = []
    for k, n in enumerate(sizes):
        for name, points in scaled.items():
            p = points[k]
            kinds = ", ".join(f"{count} {kind}" for kind, count in p.kinds)
            made.append(
                Row(
                    f"scale/{n}", f"efficiency {name}", p.efficiency, p.efficiency, p.efficiency,
                    note=f"{p.groups} groups, tables {kinds}; compute {p.step.compute * 1e3:.4g} ms, exchange "
                    f"{p.step.exchange * 1e3:.4g} ms, {p.rate:,.0f} rows/s{'' if p.fits else '; does not fit'}",
                )
            )  # fmt: skip
    for name, points in scaled.items():
        at = scale.crossing(points)
        shown = at if math.isfinite(at) else float(sizes[-1])
        note = "exchange overtakes compute here" if math.isfinite(at) else f"not up to {sizes[-1]} workers"
        made.append(Row("scale/crossing", f"workers {name}", shown, shown, shown, note=note))
    made += published(works["DCN-V2"], sizes)
    if not options.quick:
        for name, draw in (("scale", scaling.talk(scaled)), ("scale-efficiency", scaling.efficiency(scaled))):
            write(ROOT / "docs" / "images" / f"{name}.svg", picture(draw))
    return made


GPU = Topology(
    (Device("cpu", "cpu", 64, 10**12), *(Device(f"cuda:{k}", "cuda", 108, 80 * 10**9) for k in range(8))),
    1,
    8,
    Link(10, 300e9),
    Link(20, 25e9),
    Rates(60e12, 5e9, 1.5e12, 5),
)
"""A host like those of the published runs: 8 GPUs of 80 GB, NVLink inside, 200 Gbit/s each between, by data sheets."""


def published(work: Workload, sizes: Sequence[int]) -> list[Row]:
    """A worker's rate at the largest size over that on eight hosts: in groups, and in one group over all."""
    first, last = (sizes[0], sizes[-1]) if sizes[-1] < 64 else (64, sizes[-1])
    many = work.replace(batch=4096, norms=0)  # theirs shares no statistics of batch norms
    made = []
    rates: dict[str, float] = {}
    for name, groups in (("in groups", None), ("one group", (1,))):
        few, all_ = scale.simulate(many, GPU, (first, last), groups=groups)
        rates[name] = (all_.rate / last) / (few.rate / first)
        made.append(
            Row(
                "scale/published", f"rate kept {name}", rates[name], rates[name], rates[name],
                note=f"a worker on {last} over {first}; {few.groups} and {all_.groups} groups; direction only: "
                "arXiv 2508.03854 reports nearly linear speed up to 4K GPUs with tables cut inside groups",
            )
        )  # fmt: skip
    ahead = rates["in groups"] / rates["one group"]
    made.append(Row("scale/published", "groups over one", ahead, ahead, ahead, bar=1.0, note="as published: at least 1"))
    return made


PARSER = argparse.ArgumentParser(add_help=False)
PARSER.add_argument("--venvs", type=Path, help="folder of the peers' environments (benchmarks/peers/setup.sh makes them)")


def timed(rows: Callable[[Options], list[Row]]) -> Callable[[Options], list[Row]]:
    """Rows that hold on a quiet machine only, in a file whose others hold on any."""

    def measured(options: Options) -> list[Row]:
        if options.quick:
            return rows(options)
        measure.quiet()
        with measure.Foreign() as others:
            made = rows(options)
        if others.share > measure.LOUD:
            raise DeviceError(f"others used {others.share:.0%} of the processor meanwhile; nothing was written, run it again")
        return made

    return measured


def rows() -> Iterator[tuple[str, Callable[[Options], list[Row]]]]:
    """What ``benchmarks.distribute`` measures about plans."""
    yield "planner", timed(lambda options: planner_rows(options, PARSER.parse_known_args()[0].venvs))
    yield "scale", timed(scale_rows)
