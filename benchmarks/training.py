"""How fast does it train? Ours and what can be installed, on the same rows, in turns; and how far from the machine's limit?

Each system is a process of its own that lives through a comparison (``benchmarks/peers/training``): the same rows, model,
optimizer, batch and threads, its own training loop. They take turns of about two seconds; a ratio is of one round, what is
shown is the median of the rounds and their least and largest. Peers get their batches ready made.

``MODEL/DATASET`` is bound by dense layers: 400-400-400, dim 10, dropout, Adam, batch 4096. Ours is timed in fp32 and with the
products in bfloat16, RecBole with and without its own mixed precision, the others know one. Ours and the fastest peer then
train to their end, and the judge here takes the AUC on test rows whose labels they were not given. The limit is what a step
would take were it its layers' products alone, at the rate measured in the same rounds.

``tables/ROWS`` is bound by tables: DeepFM, 10 fields x 16, a net of 64-32, ids by a power law, labels a coin toss, all systems
by Adagrad: ours row-wise on the rows of a batch, theirs on all. ``growth/ROWS`` is 26 fields of sizes like Criteo's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import harness
from benchmarks.harness import Options, Row
from benchmarks.peers.training import Task
from pennyweight.core import hardware, memory
from pennyweight.core.errors import DeviceError
from pennyweight.data import loaders
from pennyweight.data.dataset import Split
from pennyweight.data.sample import prepare
from pennyweight.data.synthetic import CRITEO
from pennyweight.model import metrics

ROOT = Path(__file__).parents[1]
ROUNDS = 7
TURN_S = 2.0
SAME = 0.001
"""AUC within which ours counts as as good as a peer's."""
SKEW = 1.05
"""Exponent of the ids' power law."""
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class System:
    """Something that trains: a module of ``benchmarks/peers``, in its environment, at a precision."""

    name: str
    module: str
    precision: str = "fp32"
    ours: bool = False


OURS = System("ours", "ours", ours=True)
HALVED = System("ours in bf16", "ours", "bf16", ours=True)
PEERS = (System("torch-rechub", "rechub"), System("FuxiCTR", "fuxictr"), System("RecBole", "recbole"))
AMP = System("RecBole in bf16", "recbole", "bf16")


class Worker:
    """A system's process."""

    def __init__(self, system: System, venvs: Path | None) -> None:
        self.system = system
        python = sys.executable if system.ours or venvs is None else str(venvs / system.module / "bin" / "python")
        # OpenBLAS' core type, if one is set, is for old builds of it.
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        command = [python, "-m", f"benchmarks.peers.{system.module}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.failed = ""

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to a line; empty once the process has failed, which ``failed`` tells why."""
        if self.failed:
            return {}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        said: dict[str, Any] = (
            json.loads(line) if line else {"failed": f"ended by itself or by the kernel ({self.process.poll()})"}
        )
        self.failed = str(said.get("failed", ""))
        return {} if self.failed else said

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process.wait(60)


IDLE: dict[str, list[Worker]] = {}
"""Processes of a quick run that wait for another task; they end with ours, whose end closes their input. Those of a full run
end with their row, so that the harness knows their time as ours."""


class Race:
    """Several systems over several tasks, each pair a process; in a ``with``."""

    def __init__(self, entries: Sequence[tuple[System, Task]], data: Mapping[str, Arrays], setting: Setting) -> None:
        venvs, self.reuse = setting.venvs, setting.options.quick
        self.folder = Path(tempfile.mkdtemp(prefix="pennyweight-training-"))
        self.entries, self.data = entries, data
        self.workers = [IDLE[s.module].pop() if IDLE.get(s.module) else Worker(s, venvs) for s, _ in entries]

    def __enter__(self) -> Race:
        self.versions: list[str] = []
        for k, (worker, (system, task)) in enumerate(zip(self.workers, self.entries, strict=True)):
            given = self.folder / str(k)
            given.mkdir()
            asked = dataclasses.replace(task, precision=system.precision, tables=task.tables if system.ours else "dense")
            (given / "task.json").write_text(json.dumps(dataclasses.asdict(asked)))
            for part, columns in self.data.items():
                np.savez(given / f"{part}.npz", **columns)  # type: ignore[arg-type]
            said = worker.ask("open", given=str(given), out=str(self.folder / f"out{k}"))
            (given / "train.npz").unlink()
            self.versions.append(said.get("version", worker.failed))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self.workers:
            if self.reuse and not worker.failed:
                worker.ask("rest")
                IDLE.setdefault(worker.system.module, []).append(worker)
            else:
                worker.close()
        shutil.rmtree(self.folder)

    def turn(self, steps: Sequence[int]) -> list[float]:
        """Rows a second of each entry over so many steps; 0 where it has failed."""
        return [w.ask("turn", steps=n).get("rows_per_s", 0.0) for w, n in zip(self.workers, steps, strict=True)]

    def steps(self) -> list[int]:
        """How many steps of each take a turn, after a first one that warms it up."""
        first = self.turn([3] * len(self.workers))
        batches = [task.batch for _, task in self.entries]
        return [3 if self.reuse else int(np.clip(TURN_S * r / b, 3, 200)) for r, b in zip(first, batches, strict=True)]

    def rounds(self) -> list[list[float]]:
        """A turn of each, again and again."""
        steps = self.steps()
        return [self.turn(steps) for _ in range(1 if self.reuse else ROUNDS)]

    def trained(self, k: int, label: npt.NDArray[Any]) -> tuple[float, dict[str, Any]]:
        """The AUC of an entry trained to its end, on the test rows, and what it says of itself."""
        said = self.workers[k].ask("fit")
        if not said:
            return float("nan"), {}
        return metrics.auc(label, np.load(self.folder / f"out{k}" / "logits.npy")), said


# -- data --------------------------------------------------------------------------------------------------------------


def frappe(options: Options, out: Path) -> Split:
    return loaders.frappe(options.data / "frappe-x1", out)


def ml_1m(options: Options, out: Path) -> Split:
    """Would this user rate this movie 4 or more? Rows 80/10/10 at random."""
    parts = loaders.ml_1m(options.data / "ml-1m", out, form="ratings")
    return parts.train.join(parts.valid).join(parts.test).split("random", (0.8, 0.1, 0.1), 0)


def sample(options: Options, out: Path) -> Split:
    """The shipped sample, some of it: what a quick run stands in for every set with."""
    return Split(*(part.head(2000) for part in prepare(out).split("time")))


def arrays(split: Split) -> tuple[dict[str, int], dict[str, Arrays]]:
    """The categorical columns of a split, user and item first, and its three parts as arrays."""
    schema = split.train.schema
    coded = [c for c in schema.role("user", "item", "context") if c.kind == "categorical"]
    first = [schema.user, schema.item]
    coded = [*first, *(c for c in coded if c not in first)]
    parts = {}
    for name, part in zip(Split._fields, split, strict=True):
        parts[name] = {c.name: np.asarray(part.column(c.name)) for c in coded}
        if name != "test":
            parts[name]["label"] = np.asarray(part.column(schema.label.name))
    return {c.name: c.size for c in coded}, parts


def generated(sizes: Sequence[int], rows: int, seed: int = 0) -> tuple[dict[str, int], dict[str, Arrays]]:
    """Fields of these sizes, their ids by a power law (the k-th most frequent as k to the minus 1.05), labels a coin toss."""
    rng = np.random.default_rng(seed)
    names = ["user", "item", *(f"c{k}" for k in range(2, len(sizes)))]
    columns: Arrays = {}
    for name, size in zip(names, sizes, strict=True):
        most = (size - 2) ** (1 - SKEW) - 1
        rank = (1 + rng.random(rows) * most) ** (1 / (1 - SKEW))
        columns[name] = np.minimum(rank.astype(np.int64) + 1, size - 1).astype(np.int32)
    columns["label"] = (rng.random(rows) < 0.25).astype(np.float32)
    few = {name: column[:8192] for name, column in columns.items()}
    return dict(zip(names, sizes, strict=True)), {"train": columns, "valid": few, "test": few}


# -- rows --------------------------------------------------------------------------------------------------------------


def cores(quick: bool) -> int:
    """Threads of each system; one where the machine need not be quiet."""
    return 1 if quick else hardware.limits()[0]


def dense(model: str, dataset: str, setting: Setting) -> list[Row]:
    """``MODEL/DATASET``: pace, distance to the limit, quality."""
    options, quick = setting.options, setting.options.quick
    with tempfile.TemporaryDirectory() as folder:
        split = (sample if quick else {"frappe": frappe, "ml-1m": ml_1m}[dataset])(options, Path(folder) / "rows")
        label = np.asarray(split.test.column(split.test.schema.label.name))
        fields, data = arrays(split)
    task = Task(
        model,
        fields,
        10,
        [400, 400, 400],
        0.2,
        4,
        512 if quick else 4096,
        1e-3,
        "adam",
        0.05,
        1 if quick else 40,
        2,
        cores(quick),
    )
    systems = (OURS, HALVED, *setting.peers, *((AMP,) if AMP.module in {p.module for p in setting.peers} else ()))
    id = f"{model}/{dataset}"
    with Race([(s, task) for s in systems], data, setting) as race:
        rounds, limits = race.rounds(), []
        for _ in range(1 if quick else 3):
            limits.append([race.workers[k].ask("limit") for k in (0, 1)])
        best = _best(systems, rounds)
        paces = {s.name: statistics.median(r[k] for r in rounds) for k, s in enumerate(systems)}
        told = [0, 1, *([best] if best is not None and not quick else [])]
        fits = {k: race.trained(k, label) for k in told}
    rows = _speedups(id, systems, rounds, best, race.versions, 1.6, (0, 1), _paces(paces, race))
    shares = [[r[k] / statistics.median(x[k]["rows_per_s"] for x in limits) for r in rounds] for k in (0, 1)]
    rates = {n: statistics.median(x[0][n] for x in limits) / 1e9 for n in ("fp32", "bf16", "onednn")}
    note = (
        f"fp32 against fp32 products at {rates['fp32']:.0f} GF/s ({limits[0][0]['flops'] / 1e6:.2f} MFLOP a row); bf16 reaches "
        f"{statistics.median(shares[1]):.2f} of its own {rates['bf16']:.0f} GF/s, what is beside the products being fp32; "
        f"oneDNN's fp32 products, which PyTorch does not use here, run at {rates['onednn']:.0f} GF/s"
    )
    rows.append(_row(id, "share_of_limit", shares[0], 0.7, note))
    peer = fits.get(best) if best is not None else None
    rows += [_quality(id, name, fits[k], peer, race.versions[best or 0]) for k, name in ((0, "auc_fp32"), (1, "auc"))]
    return rows


def _quality(
    id: str, metric: str, ours: tuple[float, dict[str, Any]], peer: tuple[float, dict[str, Any]] | None, version: str
) -> Row:
    """What a training comes to on the test rows, beside the peer's."""
    found, note = ours[0], f"best epoch by validation, of {ours[1].get('epochs')}"
    if peer is None:
        return Row(id, metric, found, found, found, note=note)
    note += f"; the peer's of {peer[1].get('epochs')}; level within {SAME}"
    return Row(id, metric, found, found, found, bar=peer[0] - SAME, peer=version, peer_value=peer[0], note=note)


def tables(rows: int, bar: float, setting: Setting) -> list[Row]:
    """``tables/ROWS``: who pays for the rows a batch does not touch."""
    id, quick = f"tables/{_short(rows)}", setting.options.quick
    fields, data = generated([rows // (500 if quick else 10)] * 10, 8_192 if quick else 409_600)
    task = _sparse(fields, quick)
    systems = (OURS, HALVED, *setting.peers)
    with Race([(s, task) for s in systems], data, setting) as race:
        rounds = race.rounds()
        paces = {s.name: statistics.median(r[k] for r in rounds) for k, s in enumerate(systems)}
        notes = f"DeepFM, 10 fields x 16, 64-32, power law, Adagrad; {_paces(paces, race)}"
        return _speedups(id, systems, rounds, _best(systems, rounds), race.versions, bar, (0, 1), notes)


def growth(rows: int, setting: Setting) -> list[Row]:
    """``growth/ROWS``: how much slower than with 100,000 rows, in turns; peers beside it until their memory ends."""
    id, quick = f"growth/{_short(rows)}", setting.options.quick
    count = 8_192 if quick else 409_600
    sizes = (_sizes(100_000), _sizes(rows if not quick else min(rows, 1_000_000)))
    both = [generated(s, count) for s in sizes]
    room = 0 if quick else int(0.8 * memory.free())
    small, large = (dataclasses.replace(_sparse(f, quick), memory=room) for f, _ in both)
    needed = 4 * rows * (16 + 16 + 1)
    with Race([(OURS, small)], both[0][1], setting) as one, Race([(OURS, large)], both[1][1], setting) as other:
        steps = [race.steps() for race in (one, other)]
        if other.workers[0].failed:
            raise DeviceError(
                f"{id}: {other.workers[0].failed}; {needed / 1e9:.1f} GB are needed, {room / 1e9:.1f} may be taken"
            )
        pairs = [(one.turn(steps[0])[0], other.turn(steps[1])[0]) for _ in range(1 if quick else ROUNDS)]
    slow = [a / b for a, b in pairs]
    beside = []
    for peer in setting.peers[:1] if quick else setting.peers:
        with Race([(peer, large)], both[1][1], setting) as race:
            pace = race.turn([3])[0]
            beside.append(f"{peer.name} {pace:,.0f}/s" if pace else f"{peer.name} fails ({race.workers[0].failed[:80]})")
    note = (
        f"26 fields x 16 of sizes like Criteo's, power law; {statistics.median(p[1] for p in pairs):,.0f} rows/s against "
        f"{statistics.median(p[0] for p in pairs):,.0f} with 100,000 rows; peers: {', '.join(beside) or 'none installed'}; "
        f"weights, the best epoch's copy and Adagrad's sums take {needed / 1e9:.1f} GB"
    )
    return [_row(id, "slowdown", slow, 1.5, note, at_most=True)]


def _sparse(fields: dict[str, int], quick: bool) -> Task:
    batch = 256 if quick else 4096
    return Task("deepfm", fields, 16, [64, 32], 0.0, 0, batch, 0.01, "adagrad", 0.0, 1, 1, cores(quick), tables="adagrad")


def _sizes(rows: int) -> list[int]:
    """Sizes of 26 fields in Criteo's proportions, about so many rows in all."""
    return [max(4, n * rows // sum(CRITEO)) for n in CRITEO]


def _short(rows: int) -> str:
    return f"{rows // 1_000_000}m" if rows >= 1_000_000 else f"{rows // 1000}k"


def _best(systems: Sequence[System], rounds: Sequence[Sequence[float]]) -> int | None:
    """The fastest peer by its median, if there is one."""
    peers = [k for k, s in enumerate(systems) if not s.ours and any(r[k] for r in rounds)]
    return max(peers, key=lambda k: statistics.median(r[k] for r in rounds), default=None)


def _speedups(
    id: str,
    systems: Sequence[System],
    rounds: Sequence[Sequence[float]],
    best: int | None,
    versions: Sequence[str],
    bar: float,
    ours: Sequence[int],
    note: str,
) -> list[Row]:
    """The last of ours against the best peer of each round, the others of ours without a bar."""
    if best is None:
        return [Row(id, "rows_per_s", *_spread([r[ours[-1]] for r in rounds]), note=f"{note}; no peer is installed")]
    peers = [k for k, s in enumerate(systems) if not s.ours]
    rows = []
    for k in ours:
        ratios = [r[k] / max(r[p] for p in peers) for r in rounds]
        last = k == ours[-1]
        metric = "speedup_over_best_peer" if last else "fp32_over_best_peer"
        pace = statistics.median(r[best] for r in rounds)
        row = _row(id, metric, ratios, bar if last else None, f"{systems[k].name}, {note}")
        rows.append(dataclasses.replace(row, peer=versions[best], peer_value=pace))
    return rows


def _row(id: str, metric: str, values: Sequence[float], bar: float | None, note: str, at_most: bool = False) -> Row:
    return Row(id, metric, *_spread(values), bar=bar, note=f"{note}; median and range of {len(values)} rounds", at_most=at_most)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _paces(paces: Mapping[str, float], race: Race) -> str:
    said = [f"{name} {pace:,.0f}" if pace else f"{name} fails" for name, pace in paces.items()]
    return f"rows/s on {race.entries[0][1].threads} threads: {', '.join(said)}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was asked for on the command line."""

    options: Options
    venvs: Path | None

    @property
    def peers(self) -> tuple[System, ...]:
        """Those that have an environment; one is enough to check the harness."""
        found = tuple(p for p in PEERS if self.venvs is not None and (self.venvs / p.module).is_dir())
        return found[:1] if self.options.quick else found


def measures(venvs: Path | None) -> dict[str, Callable[[Options], list[Row]]]:
    def of(function: Callable[..., list[Row]], *args: Any) -> Callable[[Options], list[Row]]:
        return lambda options: function(*args, Setting(options, venvs))

    rows = {f"{m}/{d}": of(dense, m, d) for d in ("frappe", "ml-1m") for m in ("deepfm", "dcnv2")}
    rows |= {f"tables/{_short(n)}": of(tables, n, bar) for n, bar in ((1_000_000, 5.0), (10_000_000, 80.0))}
    return rows | {f"growth/{_short(n)}": of(growth, n) for n in (100_000, 10_000_000, 100_000_000)}


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--venvs", type=Path, help="folder of the peers' environments (benchmarks/peers/setup.sh)")
    known, _ = own.parse_known_args()
    harness.run("training", measures(known.venvs), timed=True, parents=[own])
