"""Do many workers give what one gives, with what traffic, through which faults, and in how little memory?

All on one machine over gloo, so ratios, bytes and equality, no times but the weak scaling's, which is shared cores.

``exactness/MODEL``: the first 200 steps on the sample, by 2 and 4 workers, every way to hold tables; the largest relative
difference of a loss from one worker's, and the difference of the AUC (SASRec: NDCG@100) on validation rows. Models are
trained in float64 for that: in fp32 Adam makes a whole step of a gradient that is all rounding, so that a sum in another
order parts two trainings as one bit of the first weights does, which is measured beside it (``fp32``, and ``control`` of one
worker). ``bytes``: what a worker sent in a step, against the least its placement needs, counted from the batches: every
distinct row of its rows that it does not hold, there and back with its id, and a ring's share of the dense gradients and
norms. ``bytes/tables``: the same of tables of 10 million rows, beside what dense gradients of them would be.
``traffic/TYPE``: fewer bytes on request, and what they cost in AUC. ``faults``: workers killed at random. ``memory``: a model
of 4 times what a worker may take, over 5.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness, planning
from benchmarks.double import Double, Sequence
from benchmarks.harness import Options, Row
from pennyweight.core.errors import DeviceError
from pennyweight.data.dataset import Dataset
from pennyweight.data.sample import prepare
from pennyweight.data.schema import Column, Schema
from pennyweight.distribute import launch, ways
from pennyweight.distribute.launch import Many, Told
from pennyweight.model import ranking, sequential, sparse, train
from pennyweight.model.placement import Placement
from pennyweight.model.sequential import sequences
from pennyweight.model.spec import Spec, seeded, spec_of
from pennyweight.model.train import EpochLog, Fit, Progress, Recipe, fit

SPLIT = ("user", (0.7, 0.1, 0.2))
MODELS = {"dnn": ranking.DNN, "deepfm": ranking.DeepFM, "dcnv2": ranking.DCNv2, "dlrm": ranking.DLRM}
WAYS = ("data", "table", "row", "column", "grid", "2d")
STEPS, BATCH = 200, 256


class Heard:
    """The loss of every step, in order, and of a step that was done again the last."""

    def __init__(self, also: Callable[[Progress], None] = lambda _: None) -> None:
        self.means: dict[tuple[int, int], float] = {}
        self.also = also

    def __call__(self, event: Progress | EpochLog) -> None:
        if isinstance(event, Progress):
            self.means[event.epoch, event.step] = event.loss
            self.also(event)

    def losses(self) -> list[float]:
        sums = {(e, s): mean * s for (e, s), mean in self.means.items()}
        return [total - sums.get((e, s - 1), 0.0) for (e, s), total in sorted(sums.items())]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its rows in a folder, and how it is trained."""

    spec: Spec
    data: Path
    recipe: Recipe
    seed: int = 0
    allow: tuple[str, ...] = ()

    def alone(self, nudge: int = 0) -> tuple[Fit, list[float]]:
        """By this process; a ``nudge`` is a seed of half a unit in the last place, up or down, in each first weight."""
        train.TICK_S, heard = -1.0, Heard()
        usual = torch.get_default_dtype()
        try:
            return self._alone(heard, nudge), heard.losses()
        finally:
            torch.set_default_dtype(usual)  # a model in float64 has changed it

    def _alone(self, heard: Heard, nudge: int) -> Fit:
        parts = Dataset.open(self.data).split(*SPLIT, self.seed)
        module = seeded(self.spec, self.seed, self.allow)
        if nudge:
            draws = torch.Generator().manual_seed(nudge)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.mul_(1 + (2 * torch.randint(0, 2, weight.shape, generator=draws) - 1) * 2.0**-24)
        return fit(module, parts.train, parts.valid, self.recipe, seed=self.seed, progress=heard)

    def double(self) -> Task:
        """The same in float64."""
        name = self.spec.factory.rpartition(":")[2]
        args = self.spec.args
        spec = spec_of(Sequence, **args) if name == "SASRec" else spec_of(Double, name=name, **args)
        return dataclasses.replace(self, spec=spec, allow=("benchmarks.double",))

    def together(self, many: Many, also: Callable[[Progress], None] = lambda _: None, home: Path | None = None) -> Made:
        """By workers."""
        with tempfile.TemporaryDirectory() as folder:
            heard, many = Heard(also), dataclasses.replace(many, tick_s=-1.0)
            _, told = launch.train(
                self.spec, self.data, SPLIT, self.recipe, self.seed, home or Path(folder), many, allow=self.allow, watch=heard
            )
            return Made(told, heard.losses())


@dataclasses.dataclass(frozen=True)
class Made:
    """What workers gave."""

    told: Told
    losses: list[float]


def apart(found: list[float], losses: list[float]) -> float:
    """The largest relative difference of a loss."""
    if len(losses) != len(found):
        return float("inf")
    return max(abs(a - b) / abs(a) for a, b in zip(losses, found, strict=True))


def sample(folder: Path, steps: int = STEPS) -> Dataset:
    """The sample's first rows, such that an epoch is so many steps."""
    data = prepare(folder / "whole")
    kept = data.head(min(len(data), int(steps * BATCH / 0.72)))
    return kept.save(folder / "data")


def task(name: str, folder: Path, quick: bool) -> Task:
    """A model on the sample, for about 200 steps."""
    steps = 20 if quick else STEPS
    data = sample(folder, steps)
    columns = data.schema.columns
    if name == "sasrec":
        data = sequences(data).save(folder / "rows")
        recipe = Recipe(loss="gbce", metric="ndcg@100", batch=32, lr=5e-3, negatives=64, patience=100, epochs=2 if quick else 3)
        return Task(spec_of(sequential.SASRec, columns=columns, dim=32, heads=2), folder / "rows", recipe)
    dropout = {} if name == "dlrm" else {"dropout": 0.2}
    spec = spec_of(MODELS[name], columns=columns, dim=16, hidden=(64, 64), **dropout)
    return Task(spec, folder / "data", Recipe(batch=BATCH, epochs=1, lr=1e-3, embedding_l2=1e-4))


def exactness(name: str) -> harness.Measure:
    """Rows of one model."""

    def measure(options: Options) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            plain = task(name, Path(folder), options.quick)
            given = plain.double()
            done, losses = given.alone()
            losses = losses[:STEPS]
            ways = (*WAYS, "pipeline") if name == "sasrec" else WAYS
            cases = [(w, way) for w in (2, 4) for way in ways if not (way == "2d" and w == 2)]
            errors, gaps, cuts = [], [], 0
            for workers, way in cases[:1] if options.quick else cases:
                many = Many(workers, "row" if way == "2d" else way, 2 if way == "2d" else 1)
                made = given.together(many)
                cuts += made.told.steps["bytes"].get("rows", 0) > 0
                errors.append(apart(made.losses[:STEPS], losses))
                gaps.append(abs(made.told.fit.metric - done.metric))
            single = plain.alone()[1][:STEPS]
            near = [
                apart(plain.together(Many(workers, "row")).losses[:STEPS], single)
                for workers in ((2,) if options.quick else (2, 4))
            ]
            nudged = [apart(plain.alone(nudge)[1][:STEPS], single) for nudge in range(1, 1 + options.seeds)]
            so = "fp32: rows of tables over 2 and 4 workers"
            rows = [
                Row(f"exactness/{name}", "relative_error_fp32", max(near), min(near), max(near), note=so),
                Row(f"exactness/{name}", "control_fp32", max(nudged), min(nudged), max(nudged), options.seeds,
                    note="fp32: one worker, each first weight half a unit in the last place up or down"),
            ]  # fmt: skip
        cut = f"tables cut in {cuts} of them" if cuts else "NO TABLE CUT"
        note = f"{len(losses)} steps, {len(errors)} placements ({', '.join(ways)}) of 2 and 4 workers, in float64, {cut}"
        metric = given.recipe.metric
        return [
            Row(f"exactness/{name}", "relative_error", max(errors), min(errors), max(errors), bar=1e-5, at_most=True,
                note=note),
            Row(f"exactness/{name}", f"{metric}_difference", max(gaps), min(gaps), max(gaps), bar=1e-4, at_most=True,
                baseline=done.metric, note=f"final {metric} against one worker's {done.metric:.4f}"),
            *rows,
        ]  # fmt: skip

    return measure


def spread(path: Path, rows: int, columns: int, n: int, seed: int = 0) -> Dataset:
    """Clicks whose ids follow a power law, in some columns of so many rows each."""
    rng = np.random.default_rng(seed)
    made = [Column(f"c{k}", "item" if k else "user", "categorical", rows) for k in range(columns)]
    ids = {c.name: 2 + (rng.pareto(0.6, n) * 20).astype(np.int64) % (rows - 2) for c in made}
    label = rng.random(n) < 0.3
    schema = Schema((*made, Column("label", "label", "numeric")))
    return Dataset.from_arrays({**ids, "label": label.astype(np.float32)}, schema, items=None).save(path)


def least(given: Task, placement: Placement) -> float:
    """Bytes a step that rank 0 must send, in the mean over the steps of an epoch.

    Rows: of each distinct id in another worker's part whose block lies here, the row; of each in the own part whose block lies
    elsewhere, its id there and its gradient. Of a table that is whole: the sums of the own part's distinct rows with their ids,
    to all others. Dense gradients and norms: what a ring or an exchange of them takes.
    """
    module = seeded(given.spec, given.seed)
    tables = {id(m): path for path, m in module.named_modules()}
    held = {tables[id(t)]: t for t in sparse.trained(module)}
    of = {path.rpartition(".")[2]: path for path in held}
    parts = Dataset.open(given.data).split(*SPLIT, given.seed)
    w, total, steps = placement.world_size, 0.0, 0
    columns = [c for c in parts.train.schema.features if c.kind in ("categorical", "sequence")]
    for batch in parts.train.batches(given.recipe.batch, shuffle=True, seed=given.seed * 1_000_003):
        n, steps = len(next(iter(batch.values()))), steps + 1
        for name, path in of.items():
            ids = [
                np.unique(
                    np.concatenate(
                        [batch[c.name][n * k // w : n * (k + 1) // w].numpy().ravel() for c in columns if c.table == name]
                    )
                )
                for k in range(w)
            ]
            table = held[path]
            ids = [i[i != 0] for i in ids]
            if path not in placement.shards:
                total += (w - 1) * len(ids[0]) * (4 + 4 * table.embedding_dim)
                continue
            for piece in placement.shards[path].pieces(table.num_embeddings, table.embedding_dim):
                width = 4 * (piece.columns[1] - piece.columns[0])
                inside = [int(((i >= piece.rows[0]) & (i < piece.rows[1])).sum()) for i in ids]
                total += sum(inside[1:]) * width if piece.rank == 0 else inside[0] * (4 + width)
    weights = {id(t.weight) for t in held.values()}
    idle = {id(p) for p in train._idle(module)}
    dense = sum(p.numel() for p in module.parameters() if id(p) not in weights | idle)
    norms = sum(2 * m.num_features for m in module.modules() if hasattr(m, "num_features"))
    ring = 2 * (w - 1) / w * 4
    return total / steps + ring * dense + (w - 1) * 4 * norms + ring * norms


def bytes_sent(options: Options) -> list[Row]:
    """What goes over the wire, and the least."""
    found: dict[str, list[float]] = {"row": [], "hybrid": [], "table": [], "column": [], "data": []}
    with tempfile.TemporaryDirectory() as folder:
        given = task("deepfm", Path(folder), options.quick)
        shapes = ways.tables(seeded(given.spec, 0))
        for way, workers in itertools.product(found, (2,) if options.quick else (2, 4)):
            placement = ways.placed(way, shapes, workers)
            steps = given.together(Many(workers, placement)).told.steps
            found[way].append(sum(steps["bytes"].values()) / steps["steps"] / least(given, placement))
    ratios = [r for each in found.values() for r in each]
    detail = ", ".join(f"{way} {max(r):.3f}" for way, r in found.items())
    note = f"bytes a step of rank 0 over the least its placement needs, DeepFM on the sample, 2 and 4 workers; {detail}"
    return [Row("bytes", "over_least", max(ratios), min(ratios), max(ratios), bar=1.1, at_most=True, note=note)]


def bytes_tables(options: Options) -> list[Row]:
    """Tables of many rows: hybrid beside dense gradients."""
    rows, batch = (100_000, 256) if options.quick else (10_000_000, 4096)
    with tempfile.TemporaryDirectory() as folder:
        data = spread(Path(folder) / "data", rows, 2, batch * 14)
        spec = spec_of(ranking.DeepFM, columns=data.schema.columns, dim=16, hidden=(64, 32))
        recipe = Recipe(batch=batch, epochs=1, tables="adagrad", embedding_l2=0.0)
        steps = Task(spec, Path(folder) / "data", recipe).together(Many(2, "hybrid")).told.steps
    sent = sum(steps["bytes"].values()) / steps["steps"]
    whole = 2 * 1 / 2 * 4 * 2 * rows * 16
    note = (
        f"2 tables of {rows:,} x 16, batch {batch}, 2 workers: a ring's {whole:,.0f} bytes of dense gradients over {sent:,.0f}"
    )
    return [Row("bytes/tables", "dense_over_hybrid", whole / sent, whole / sent, whole / sent, bar=10, note=note)]


def traffic(kind: str) -> harness.Measure:
    """Fewer bits on the way, and their price."""

    def measure(options: Options) -> list[Row]:
        ratios, drops = [], []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                given = dataclasses.replace(task("deepfm", Path(folder), options.quick), seed=seed)
                plain = given.together(Many(2, "row")).told
                fewer = given.together(Many(2, "row", traffic=kind)).told  # type: ignore[arg-type]
                ratios.append(sum(plain.steps["bytes"].values()) / sum(fewer.steps["bytes"].values()))
                drops.append(plain.fit.metric - fewer.fit.metric)
        note = f"DeepFM on the sample, 2 workers, rows and gradients in {kind}; AUC lost {statistics.mean(drops):+.5f}"
        ratio, drop = statistics.mean(ratios), statistics.mean(drops)
        return [
            Row(f"traffic/{kind}", "bytes_saved", ratio, min(ratios), max(ratios), options.seeds, note=note),
            Row(f"traffic/{kind}", "auc_drop", drop, min(drops), max(drops), options.seeds, bar=1e-3, at_most=True, note=note),
        ]

    return measure


def faults(options: Options) -> list[Row]:
    """Workers killed at random, again and again."""
    kills, every = (2, 5) if options.quick else (20, 10)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        given = task("deepfm", Path(folder), options.quick)
        given = dataclasses.replace(given, recipe=dataclasses.replace(given.recipe, epochs=3, patience=3))
        calm = given.together(Many(2, "row", every=every, timeout_s=20))
        losses = calm.losses
        steps = len(losses) // 3
        left = sorted(rng.sample(range(every, len(losses) - 1), kills))
        home, struck, redone = Path(folder) / "home", [0], [0]
        at = [0]

        def disturb(event: Progress) -> None:
            place = (event.epoch - 1) * steps + event.step
            redone[0] = max(redone[0], at[0] - place + 1)
            at[0] = place
            if left and place >= left[0]:
                left.pop(0)
                struck[0] += 1
                rank = rng.randrange(2)
                os.kill(int((home / f"rank-{rank}.pid").read_text()), signal.SIGKILL)

        made = given.together(Many(2, "row", every=every, timeout_s=20), disturb, home)
        gap = apart(made.losses, losses)
    note = (
        f"DeepFM on the sample, {len(losses)} steps, 2 workers, a checkpoint every {every} steps, one of them killed "
        f"{struck[0]} times; at most {redone[0]} steps done again, losses {gap:.1e} from two undisturbed workers', "
        f"AUC {made.told.fit.metric:.5f} and {calm.told.fit.metric:.5f}"
    )
    survived, intervals = struck[0] if gap < 1e-5 else 0, redone[0] / every
    return [Row("faults", "kills_survived", survived, survived, survived, bar=kills, note=note),
            Row("faults", "relative_error", gap, gap, gap, bar=1e-5, at_most=True, note=note),
            Row("faults", "intervals_lost", intervals, intervals, intervals, bar=1.0, at_most=True, note=note)]  # fmt: skip


def memory(options: Options) -> list[Row]:
    """A model that no worker could hold."""
    rows, dim = (200_000, 32) if options.quick else (8_000_000, 32)
    allowed = rows * dim * 4 // 4
    allowed = max(allowed, 64 << 20) if options.quick else allowed
    with tempfile.TemporaryDirectory() as folder:
        data = spread(Path(folder) / "data", rows, 1, 40_000)
        spec = spec_of(ranking.DNN, columns=data.schema.columns, dim=dim, hidden=(32,))
        given = Task(spec, Path(folder) / "data", Recipe(batch=512, epochs=1, tables="adagrad", embedding_l2=0.0))
        alone = ""
        if not options.quick:
            try:
                given.together(Many(1, "row", memory_bytes=allowed))
            except DeviceError as error:
                alone = str(error)
        made = given.together(Many(5, "row", memory_bytes=allowed))
    share = rows * dim * 4 / allowed
    note = (
        f"a table of {rows:,} x {dim} ({rows * dim * 4 / 1e6:.0f} MB) over 5 workers that may take {allowed / 1e6:.0f} MB "
        f"each beyond what Python and PyTorch take (RLIMIT_DATA), {made.told.steps['steps']} steps; one worker so limited: "
        f"{alone or 'not tried'}"
    )
    value = share if options.quick or alone else 0.0
    return [Row("memory", "model_over_allowed", value, value, value, bar=None if options.quick else 4, note=note)]


def weak(options: Options) -> list[Row]:
    """Twice the rows a step by twice the workers."""
    with tempfile.TemporaryDirectory() as folder:
        given = task("deepfm", Path(folder), options.quick)
        found = []
        for _ in range(options.seeds):
            paces = []
            for workers in (1, 2):
                recipe = dataclasses.replace(given.recipe, batch=512 * workers, epochs=1 if options.quick else 4, patience=9)
                told = dataclasses.replace(given, recipe=recipe).together(Many(workers, "hybrid")).told
                seconds = [e.seconds for e in told.fit.history]
                paces.append(told.steps["steps"] / len(seconds) * recipe.batch / statistics.median(seconds))
            found.append(paces[1] / paces[0] / 2)
    value = statistics.median(found)
    note = (
        "rows a second of 2 workers with batch 1024 over twice those of 1 with 512, epochs with their validation; on 2 cores "
        "that also run the launcher, and with messages a step whose latency does not shrink: norms, tables, losses"
    )
    return [Row("weak-scaling", "efficiency", value, min(found), max(found), options.seeds, note=note)]


def rows() -> Iterator[tuple[str, harness.Measure]]:
    """All rows of training, then those about plans (``benchmarks.planning``)."""
    for name in (*MODELS, "sasrec"):
        yield f"exactness/{name}", exactness(name)
    yield "bytes", bytes_sent
    yield "bytes/tables", bytes_tables
    for kind in ("fp16", "bf16", "int8"):
        yield f"traffic/{kind}", traffic(kind)
    yield "memory", memory
    yield "faults", faults
    yield "weak-scaling", weak
    yield from planning.rows()


ROWS: Mapping[str, harness.Measure] = dict(rows())

if __name__ == "__main__":
    harness.run("distribute", ROWS, timed=False, parents=[planning.PARSER])
