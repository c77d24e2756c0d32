"""Scoring: how fast one thread answers, beside eager PyTorch and the engines anybody can install, all in turns.

Every contestant is called in turns, peers in processes of their own that stay open (``benchmarks.peers.turns``), so what slows
the machine slows all; a ratio is taken within each round, and the range shown is the 95 % bootstrap interval of its median. A
turn is one call that is not counted and as many more as take about five milliseconds, of which the median counts.

Peers get the stronger form: the graph with all tables in one and all columns in one input, as our exporter writes it, from
arrays that are ready. Eager gets columns as a service has them. Ours is a Runner with what was tuned for that size of batch
(``tune_sizes``), from one tensor of columns to a NumPy array. All on one thread. Weights are random where nothing is said of
quality: only time is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.accelerate.compile import export
from pennyweight.accelerate.factor import Shared, Work
from pennyweight.accelerate.fuse import fuse
from pennyweight.accelerate.record import record
from pennyweight.accelerate.runner import Runner
from pennyweight.accelerate.tune import tune_sizes
from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Runtime, load, save
from pennyweight.model.layers import Beside
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Batch, Model, build, spec_of
from pennyweight.model.transform import Env, plan

ROOT = Path(__file__).parents[1]
BATCHES = (1, 256, 4096)
CANDIDATES = (100, 500, 2000)
PEERS = ("onnxruntime", "openvino")
TURN_S = 0.005
ONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Turn = Callable[[int], Sequence[float]]
"""So many calls, after one that is not counted: the seconds of each."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was asked for on the command line."""

    options: Options
    venvs: Path | None
    work: Path
    """A folder for what peers are given."""
    cache: Path
    bundle: Path | None

    @property
    def rounds(self) -> int:
        """Turns of each contestant."""
        return 5 if self.options.quick else 60

    @property
    def seconds(self) -> float:
        """For choosing engines."""
        return 15.0 if self.options.quick else 60.0


# -- contestants -----------------------------------------------------------------------------------------------------------


class Peer:
    """A peer's process, asked line by line."""

    made: set[str]

    def __init__(self, name: str, python: Path) -> None:
        env = {**os.environ, **ONE, "PYTHONPATH": str(ROOT)}
        self.made = set()
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.turns", name],
            cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, **asked: Any) -> dict[str, Any]:
        """One line and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise ConfigError(f"{self.name} ended: {self.log.read()[-600:]}")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise ConfigError(f"{self.name}: {found['failed']}")
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def opened(setting: Setting) -> Iterator[list[Peer]]:
    """The peers that are installed, for as long as they are needed."""
    found = {} if setting.venvs is None else {p: setting.venvs / p / "bin" / "python" for p in PEERS}
    running = [Peer("eager", Path(sys.executable)), *(Peer(name, python) for name, python in found.items() if python.exists())]
    try:
        yield running
    finally:
        for peer in running:
            peer.close()


def timed(function: Callable[[], object]) -> Turn:
    """Turns of something in this process."""

    def turn(calls: int) -> list[float]:
        function()
        took = []
        for _ in range(calls):
            began = time.perf_counter()
            function()
            took.append(time.perf_counter() - began)
        return took

    return turn


def times(turns: Mapping[str, Turn], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds [rounds] of each contestant, in turns that start with another one each round."""
    names = list(turns)
    calls = {}
    for name in names:  # three turns of one call, then as many calls as make a turn
        typical = float(np.median([turns[name](1)[0] for _ in range(3)]))
        calls[name] = int(np.clip(TURN_S / max(typical, 1e-6), 1, 200))
    made = np.zeros((rounds, len(names)))
    for k in range(rounds):
        for j in range(len(names)):
            at = (j + k) % len(names)
            made[k, at] = np.median(turns[names[at]](calls[names[at]]))
    return {name: made[:, at] for at, name in enumerate(names)}


def ratio(slow: npt.NDArray[np.float64], fast: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Median over rounds of one's time in the other's, and its 95 % bootstrap interval."""
    found = slow / fast
    again = np.random.default_rng(0).integers(0, len(found), (500, len(found)))
    low, high = np.percentile(np.median(found[again], 1), [2.5, 97.5])
    return float(np.median(found)), float(low), float(high)


# -- models ----------------------------------------------------------------------------------------------------------------


def net(columns: tuple[Column, ...], dim: int, hidden: Sequence[int], seed: int = 0) -> Bundle:
    """A DNN of random weights that spread its logits."""
    spec = spec_of(DNN, columns=columns, dim=dim, hidden=list(hidden), norm=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(spec)
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=1.0)
    return Bundle(Model.of(module, spec))


def int8(bundle: Bundle) -> Bundle:
    """Tables and layers in int8."""
    return plan(QuantizeTables("int8"), QuantizeDense("int8")).apply(bundle, Env())


def drawn(columns: Sequence[Column], rows: int, seed: int) -> Tensor:
    """Ids [rows, columns], evenly: as hard on caches as can be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(2, c.size, (rows,), generator=generator) for c in columns], 1)


def apart(columns: Sequence[Column], ids: Tensor) -> dict[str, Tensor]:
    """Columns as a service has them."""
    return {c.name: ids[:, k].contiguous() for k, c in enumerate(columns)}


def given(setting: Setting, name: str, bundle: Bundle, columns: Sequence[Column]) -> Path:
    """The folder peers are given: one graph of one input."""
    folder = setting.work / name
    folder.mkdir(parents=True, exist_ok=True)
    ids = drawn(columns, 2048, 1)
    with torch.no_grad():
        exported = export(bundle.model.build(), apart(columns, ids[:8]))
    (column,) = exported.inputs
    (folder / "model.onnx").write_bytes(exported.graph)
    (folder / "columns.json").write_text(json.dumps([column]))
    np.savez(folder / "calib.npz", **{column: ids.numpy(), "label": np.zeros(len(ids), np.float32)})
    return folder


def peers_turns(
    running: Sequence[Peer], folder: Path, ids: Tensor, settings: Sequence[str], want: npt.ArrayLike
) -> dict[str, Turn]:
    """A turn for each peer and setting that runs; their fp32 answers must be the model's."""
    (column,) = json.loads((folder / "columns.json").read_text())
    file = folder / f"batch-{len(ids)}.npz"
    np.savez(file, **{column: ids.numpy()})
    found: dict[str, Turn] = {}
    for peer in running[1:]:
        for kind in settings:
            out = folder / f"{peer.name}-{kind}"
            if str(out) not in peer.made:
                peer.ask(make=kind, given=str(folder), out=str(out))
                peer.made.add(str(out))
            peer.ask(score=str(out), batch=str(file), to=str(out / "logits.npy"))
            if kind == "fp32":
                np.testing.assert_allclose(np.load(out / "logits.npy"), want, rtol=1e-3, atol=1e-3)
            found[f"{peer.name} {kind}"] = lambda calls, p=peer, o=out: p.ask(time=str(o), batch=str(file), calls=calls)[
                "seconds"
            ]  # type: ignore[misc]
    return found


def eager(peer: Peer, bundle: Bundle, folder: Path, batch: Batch) -> tuple[Turn, npt.NDArray[np.float32]]:
    """The plain module in a process of its own, whose memory nobody manages, and what it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(batch.values())))
    out, file = str(folder / "eager"), str(folder / f"eager-{rows}.npz")
    np.savez(file, **{n: t.numpy() for n, t in batch.items()})  # type: ignore[arg-type]
    if out not in peer.made:
        save(bundle, folder / "bundle")
        peer.ask(make="plain", given=str(folder), out=out)
        peer.made.add(out)
    peer.ask(score=out, batch=file, to=f"{out}/logits.npy")
    return lambda calls: peer.ask(time=out, batch=file, calls=calls)["seconds"], np.load(f"{out}/logits.npy")


def tuned(setting: Setting, bundle: Bundle, batch: Batch, sizes: Sequence[int], shared: bool = False) -> Bundle:
    """The bundle with the engine that is fastest here for each size of batch, on one thread."""
    engines = ["eager", "fused", "onnxruntime"]
    chosen, _ = tune_sizes(bundle, [batch], seconds=setting.seconds, sizes=sizes, engines=engines, threads=(1,), shared=shared)
    return chosen.apply(bundle, Env())


def compared(
    id: str, found: Mapping[str, npt.NDArray[np.float64]], bar: float, level: float | None, note: str, kind: str
) -> list[Row]:
    """Ours against eager and against the best peer of a kind."""
    told = ", ".join(f"{name} {np.median(t) * 1e3:.3g} ms" for name, t in found.items())
    rows = [Row(id, "speedup", *ratio(found["eager fp32"], found["ours"]), bar=bar, note=f"{note}; {told}")]
    rivals = {n: t for n, t in found.items() if n.endswith(kind) and n != "eager fp32"}
    if rivals:
        best = min(rivals, key=lambda n: float(np.median(rivals[n])))
        metric = "speedup_over_best_peer"
        rows.append(
            Row(id, metric, *ratio(rivals[best], found["ours"]), bar=level, peer=best, note=f"one thread, {kind} of each peer")
        )
    return rows


# -- rows ------------------------------------------------------------------------------------------------------------------


def batches(setting: Setting, rows: int) -> list[Row]:
    """26 tables of 20,000 rows of 16, three layers of 400."""
    columns = tuple(
        Column(f"c{k}", "user" if k < 13 else "item", "categorical", 200 if setting.options.quick else 20_000)
        for k in range(26)
    )
    plain = net(columns, 16, (400, 400, 400))
    small, names = int8(plain), tuple(c.name for c in columns)
    ids = drawn(columns, rows, 2)
    chosen = tuned(setting, small, apart(columns, drawn(columns, max(rows, 8), 3)), (rows,))
    with opened(setting) as running, Runner(chosen, probe=apart(columns, ids if rows > 1 else drawn(columns, 8, 3))) as runner:
        batch = Beside((names,), (ids,))
        turn, want = eager(running[0], plain, setting.work / "net", apart(columns, ids))
        turns = {"eager fp32": turn, "ours": timed(lambda: runner.score(batch))}
        folder = given(setting, "net", plain, columns)
        turns |= peers_turns(running, folder, ids, ("fp32", "int8"), want)
        off = float(np.abs(runner.score(batch) - want).mean() / np.abs(want).mean())
        found = times(turns, setting.rounds)
    note = (
        f"{chosen.runtime.engine}, cuts of {chosen.runtime.batch or 'no'} rows; int8 logits are off by {off:.1%} of their mean"
    )
    return compared(f"int8/{rows}", found, {1: 3.5, 256: 3.0, 4096: 4.0}[rows], 1.0, note, "int8")


WIDE = (
    *(Column(f"u{k}", "user", "categorical", 2000) for k in range(140)),
    *(Column(f"c{k}", "context", "categorical", 1000) for k in range(20)),
    *(Column(f"i{k}", "item", "categorical", 5000) for k in range(40)),
)
ITEMS = 20_000


def candidates(setting: Setting, count: int, small: bool) -> list[Row]:
    """One user, a wide model; nothing changed but who is computed when, or (``small``) in int8 too."""
    plain = net(WIDE, 16, (512, 256, 128))
    ours = (int8(plain) if small else plain).replace(runtime=Runtime("fused", 1, shared=True))
    asker, offered = [c for c in WIDE if c.role != "item"], [c for c in WIDE if c.role == "item"]
    catalogue, user = drawn(offered, ITEMS, 4), drawn(asker, 1, 5)
    catalogue[:, 0] = torch.arange(ITEMS) % 4998 + 2
    chosen = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(6))[:count]
    whole = torch.cat([user.expand(count, -1), catalogue[chosen]], 1)
    request = {c.name: user[:, k].expand(count) for k, c in enumerate(asker)} | apart(offered, catalogue[chosen])
    with opened(setting) as running, Runner(ours, probe=request) as runner:
        turn, want = eager(running[0], plain, setting.work / "wide", request)
        runner.keep(request, apart(offered, catalogue), np.arange(ITEMS), ITEMS)
        one, places = Beside((tuple(c.name for c in asker),), (user,)), chosen.numpy()
        both = Beside((tuple(c.name for c in asker), tuple(c.name for c in offered)), (user, catalogue[chosen]))
        turns = {
            "eager fp32": turn,
            "ours": timed(lambda: runner.ranked([one], [places])),
            "ours, nothing kept of items": timed(lambda: runner.score(both)),
        }
        got = runner.ranked([one], [places])[0]
        folder = given(setting, "wide", plain, WIDE)
        turns |= peers_turns(running, folder, whole, ("fp32", "int8"), want)
        found = times(turns, setting.rounds)
        shared = runner._kept
        assert shared is not None
    gap = float(np.abs(got - want).max())
    off = (
        f"largest difference {gap:.2g}"
        if not small
        else f"off by {np.abs(got - want).mean() / np.abs(want).mean():.1%} of the mean"
    )
    held = sum(t.nbytes for t in shared.kept)
    note = f"{shared.count.describe(count)}; {held / 1e6:.0f} MB kept of {ITEMS:,} items; {off}"
    if not small and gap > 1e-3:
        raise ConfigError(f"candidates/{count}: the rewrite is off by {gap}")
    kind = "int8" if small else "fp32"
    rows = compared(
        f"{'compressed' if small else 'candidates'}/{count}", found, 15.0 if small else 0.0, 5.0 if small else 3.0, note, kind
    )
    if small:
        return [dataclasses.replace(r, metric="speedup_over_best_peer_int8") if r.peer else r for r in rows]
    rows[0] = dataclasses.replace(rows[0], bar=None)
    need = needed(shared, count)
    value, low, high = ratio(found["ours"], np.full_like(found["ours"], need))
    told = f"needs {need * 1e3:.3g} ms at what was measured here: {rates()}"
    return [*rows, Row(f"candidates/{count}", "time_over_need", value, low, high, bar=1.2, at_most=True, note=told)]


# -- the limit -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine gives one thread."""

    flops: float
    """fp32 multiplies and adds a second, in the best product found."""
    whole: float
    """The same in int8."""
    bytes: float
    """Bytes a second, read and written, of a copy that stays in the last cache."""
    memory: float
    """The same from memory."""

    def __str__(self) -> str:
        arithmetic = f"{self.flops / 1e9:.0f} GF/s fp32, {self.whole / 1e9:.0f} G/s int8"
        return f"{arithmetic}, {self.bytes / 1e9:.0f} GB/s in cache, {self.memory / 1e9:.0f} GB/s in memory"


_RATES: list[Rates] = []


def rates() -> Rates:
    """Measured once a process, the best of many tries."""
    if not _RATES:
        _RATES.append(_measured())
    return _RATES[0]


def _measured() -> Rates:
    rows = inner = outputs = 512
    x, weight, bias = torch.randn(rows, inner), torch.randn(outputs, inner), torch.zeros(outputs)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    levels = torch.randint(-127, 128, (outputs, inner), dtype=torch.int8)
    whole, scales, zeros = (
        torch.ops.onednn.qlinear_prepack(levels, [rows, inner]),
        torch.ones(outputs),
        torch.zeros(outputs, dtype=torch.int32),
    )
    small = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
    near, far = torch.randn(1 << 19), torch.randn(1 << 26)
    copies = [(near, torch.empty_like(near)), (far, torch.empty_like(far))]
    fp32, rounded, count = torch.ops.mkldnn._linear_pointwise, torch.ops.onednn.qlinear_pointwise, 2.0 * rows * inner * outputs
    settings = (1.0, 0, torch.uint8, "none", [], "")
    work: dict[str, tuple[Callable[[], object], float, int]] = {
        "flops": (lambda: fp32(x, packed, bias, "none", [], ""), count, 200),
        "whole": (lambda: rounded(small, 1.0, 0, whole, scales, zeros, bias, *settings), count, 200),
        "bytes": (lambda: copies[0][1].copy_(copies[0][0]), 2.0 * near.nbytes, 200),
        "memory": (lambda: copies[1][1].copy_(copies[1][0]), 2.0 * far.nbytes, 10),
    }
    with torch.inference_mode():
        best = {name: amount / min(timed(function)(count)) for name, (function, amount, count) in work.items()}
    return Rates(**best)


def needed(shared: Shared, count: int) -> float:
    """Seconds a request needs at those rates: each part is bound by its arithmetic or by its bytes."""
    speed = rates()

    def least(work: Work, times: int) -> float:
        return max(work.flops * times / speed.flops, work.bytes * times / speed.bytes)

    return least(shared.count.request, 1) + least(shared.count.candidate, count)


def limit(setting: Setting) -> list[Row]:
    """How near the dense part and the lookups come to what the machine gives."""
    rows, sizes = 128 if setting.options.quick else 512, (416, 400, 400, 400, 1)
    columns = tuple(Column(f"c{k}", "user", "categorical", 200 if setting.options.quick else 20_000) for k in range(26))
    plain = net(columns, 16, (400, 400, 400))
    small = int8(plain)
    flops = 2.0 * rows * sum(a * b for a, b in itertools.pairwise(sizes))
    made = []
    probe = apart(columns, drawn(columns, rows, 2))
    for name, bundle, rate in (("fp32", plain, rates().flops), ("int8", small, rates().whole)):
        recorded = record(bundle.model.build(), probe)
        parts = fuse(recorded.root, recorded.graph, recorded.names, probe)
        ids = drawn(columns, rows, 2)
        lookup = parts.graph.get_submodule("rows_0")
        with torch.inference_mode():
            vectors = lookup(ids)
            called = [str(n.target) for n in parts.graph.graph.nodes if n.op == "call_module" and n.target != "rows_0"]
            dense = [parts.graph.get_submodule(name) for name in called]

            def stack(dense: Sequence[nn.Module] = dense, vectors: Tensor = vectors) -> Tensor:
                x = vectors
                for layer in dense:
                    x = layer(x)
                return x

            took = times({"dense": timed(stack), "lookup": timed(lambda lookup=lookup, ids=ids: lookup(ids))}, setting.rounds)  # type: ignore[misc]
        share = flops / rate / took["dense"]
        made.append(
            _share(f"dense_{name}_share", share, 0.5, f"{rows} rows through 416-400-400-400-1, of the best product: {rates()}")
        )
        moved = rows * 26 * (16 * 4 if name == "fp32" else 16 + 8) + rows * 26 * 16 * 4
        seconds = moved / rates().bytes / took["lookup"]
        made.append(
            _share(f"lookup_{name}_share", seconds, 0.4, f"{rows} x 26 rows of 16 read and written as fp32, of a copy in cache")
        )
    return made


def _share(metric: str, found: npt.NDArray[np.float64], bar: float, note: str) -> Row:
    low, high = np.percentile(found, [25, 75])
    return Row("limit", metric, float(np.median(found)), float(low), float(high), bar=bar, note=f"{note}; range: quartiles")


# -- Frappe ----------------------------------------------------------------------------------------------------------------


def pruned(setting: Setting, rows: int) -> list[Row]:
    """Frappe's DNN, and the smaller one that was proven."""
    folder = setting.cache / "frappe" / "seed-0"
    if not (folder / "bundle" / "manifest.json").exists():
        raise ConfigError(
            f"no model in {folder}/bundle; make one with: python -m benchmarks.compress --only baseline/frappe --cache ..."
        )
    whole = load(folder / "bundle")
    found = setting.bundle or min(folder.glob("standard*/**/chosen"), key=_weight, default=None)
    if found is None:
        smaller = plan(FoldNorms(), PruneNeurons(0.3, score="weight"), QuantizeTables("int8"), QuantizeDense("int8")).apply(
            whole, Env()
        )
        source = "30 % of the neurons and int8, by plan, NOT recovered or proven: the compression benchmark left no bundle"
    else:
        smaller = load(found)
        source = f"{found.parent.name}/{found.name} of the compression benchmark, {len(smaller.plan)} transforms"
    columns = tuple(_column(c) for c in whole.model.spec.args["columns"] if c["role"] in ("user", "item", "context"))
    names, ids = tuple(c.name for c in columns), drawn(columns, rows, 2)
    chosen = tuned(setting, smaller, apart(columns, drawn(columns, max(rows, 8), 3)), (rows,))
    with opened(setting) as running, Runner(chosen, probe=apart(columns, ids if rows > 1 else drawn(columns, 8, 3))) as runner:
        batch = Beside((names,), (ids,))
        turn, want = eager(running[0], whole, setting.work / "frappe", apart(columns, ids))
        turns = {"eager fp32": turn, "ours": timed(lambda: runner.score(batch))}
        given_to = given(setting, "frappe", whole, columns)
        turns |= peers_turns(running, given_to, ids, ("fp32", "int8"), want)
        took = times(turns, setting.rounds)
    note = f"{source}; {whole.bytes / smaller.bytes:.1f} times smaller; {chosen.runtime.engine}"
    return compared(f"pruned/{rows}", took, {1: 4.0, 256: 10.0, 4096: 15.0}[rows], None, note, "int8")


def _weight(folder: Path) -> int:
    return (folder / "weights.safetensors").stat().st_size


def _column(stored: Mapping[str, Any]) -> Column:
    return Column(**{k: v for k, v in stored.items() if k in {f.name for f in dataclasses.fields(Column)}})


def measures(setting: Callable[[Options], Setting]) -> dict[str, harness.Measure]:
    """Every row by its id."""
    made: dict[str, harness.Measure] = {}
    for rows in BATCHES:
        made[f"int8/{rows}"] = lambda o, rows=rows: batches(setting(o), rows)  # type: ignore[misc]
    for rows in BATCHES:
        made[f"pruned/{rows}"] = lambda o, rows=rows: pruned(setting(o), rows)  # type: ignore[misc]
    for count in CANDIDATES:
        made[f"candidates/{count}"] = lambda o, count=count: candidates(setting(o), count, False)  # type: ignore[misc]
    for count in CANDIDATES:
        made[f"compressed/{count}"] = lambda o, count=count: candidates(setting(o), count, True)  # type: ignore[misc]
    return {**made, "limit": lambda o: limit(setting(o))}


def main(argv: Sequence[str]) -> None:
    """Everything, or the rows asked for with --only."""
    torch.set_num_threads(1)
    own = argparse.ArgumentParser(add_help=False)
    usual = Path(tempfile.gettempdir()) / "pennyweight-compress"
    own.add_argument("--venvs", type=Path, help="folder of the peers' environments (benchmarks/peers/setup.sh makes them)")
    own.add_argument(
        "--cache", type=Path, default=usual, help="the compression benchmark's, with Frappe's models (default: %(default)s)"
    )
    own.add_argument("--bundle", type=Path, help="the compressed model of Frappe (default: the newest chosen one in the cache)")
    asked, _ = own.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="pennyweight-scoring-") as work:

        def setting(options: Options) -> Setting:
            return Setting(options, asked.venvs and asked.venvs.absolute(), Path(work), asked.cache.absolute(), asked.bundle)

        harness.run("scoring", measures(setting), timed=True, argv=argv, parents=[own])


if __name__ == "__main__":
    main(sys.argv[1:])
