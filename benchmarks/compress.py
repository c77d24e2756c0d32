"""How small at proven equal quality? Ours and what can be installed, from the same checkpoints, on the same rows, by one judge.

A model of published strength is trained three times and kept; every row starts from those checkpoints. Ours is one public call
a seed that makes bytes alone small; what it puts to the proof is a fixed sequence, so the 5 % error stays that of one test. A
peer runs in an environment of its own (``benchmarks/peers``), gets 2,048 training rows and the validation rows with labels and
the test rows without, and hands back logits. All logits are judged here, clustered by user.

Bytes are of the files a loader reads: our weights and manifest, a peer's graph and weights; the vocabularies, which serve every
size alike and which no peer's file holds, are left out. A row shows the worst of its seeds: the least ratio, the highest upper
bound of the drop. Beside the given model stands the control, the same model with the same extra training and no compression.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

import pennyweight
from benchmarks import harness, rankings, tail
from benchmarks.harness import Options, Row
from benchmarks.judged import Bars, Found, Setting, kept, listed, rows_of, size, trained
from pennyweight.compress.distill import Distill
from pennyweight.compress.prune import FoldNorms
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.config import write
from pennyweight.core.errors import Infeasible
from pennyweight.data import loaders
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.sample import prepare
from pennyweight.data.schema import Column, Schema
from pennyweight.export import export
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.ranking import DNN, DeepFM
from pennyweight.model.spec import Model, Spec, spec_of
from pennyweight.model.tables import Table
from pennyweight.model.train import Fit, Recipe
from pennyweight.model.transform import Env, plan
from pennyweight.optimize import prove
from pennyweight.optimize.cost import described
from pennyweight.optimize.evaluate import scores
from pennyweight.optimize.prove import Comparison
from pennyweight.optimize.search import Against, Outcome
from pennyweight.optimize.trial import Trial

ROOT = Path(__file__).parents[1]
CALIBRATION = 2048
"""Training rows a peer may calibrate on."""
ASKED = 0.9
"""Share of a bar's seconds that is asked for: a cap ends trainings, and lets a proof or a timing that is under way finish."""
LEVEL = 0.05
"""How far from .5 the AUC of random codes may be."""
QUICK_S = 3.0


# -- what is compressed ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """A data set, a model of known strength and its recipe."""

    read: Callable[[Path, Path], Split]
    """From the folder of public sets and one to write, to its three parts."""
    make: Callable[[tuple[Column, ...]], Spec]
    recipe: Recipe
    strength: float
    """Test AUC the given model must reach."""
    note: str
    small: tuple[int, ...]
    """Hidden widths of the small net that is trained from scratch beside the compressed ones."""


def frappe(data: Path, out: Path) -> Split:
    return loaders.frappe(data / "frappe-x1", out)


def ml_1m(data: Path, out: Path) -> Split:
    """Would this user rate this movie 4 or more? Rows 80/10/10 at random, so without what depends on their order."""
    parts = loaders.ml_1m(data / "ml-1m", out, form="ratings")
    whole = parts.train.join(parts.valid).join(parts.test)
    kept = [c for c in whole.schema.columns if c.name not in ("history", "time")]
    words = {c.table: whole.catalog.vocabularies[c.table] for c in kept if c.role != "label"}
    rows = Dataset.from_arrays({c.name: whole.column(c.name) for c in kept}, Schema(tuple(kept)), words)
    return rows.split("random", (0.8, 0.1, 0.1), 0)


def sample(data: Path, out: Path) -> Split:
    """The shipped sample, some of it: what a quick run stands in for every set with."""
    return Split(*(part.head(n) for part, n in zip(prepare(out).split("time"), (8000, 4000, 4000), strict=True)))


def dnn(columns: tuple[Column, ...]) -> Spec:
    """BARS's DNN for Frappe."""
    return spec_of(DNN, columns=columns, dim=10, hidden=[400, 400, 400], dropout=0.2)


def deepfm(columns: tuple[Column, ...]) -> Spec:
    """The strongest by validation of those tried on ML-1M."""
    return spec_of(DeepFM, columns=columns, dim=16, hidden=[256, 128], dropout=0.2)


SUBJECTS = {
    "frappe": Subject(
        frappe, dnn, Recipe(batch=4096, lr=1e-3, embedding_l2=0.05, patience=2), 0.983,
        "DNN by BARS's recipe (published: .984045, mean of 5); train negatives re-drawn by BARS's rule", (128, 128, 128),
    ),
    "ml-1m": Subject(
        ml_1m, deepfm, Recipe(batch=4096, lr=1e-3, embedding_l2=0.05, patience=2), 0.80,
        "DeepFM on user, movie and their side features; rating >= 4, rows 80/10/10 at random", (64, 32),
    ),
}  # fmt: skip
QUICK = Subject(sample, deepfm, Recipe(batch=1024, epochs=2, lr=2e-3), 0.5, "the shipped sample, a check of the harness", (16,))


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """One trained model: what every row of its seed starts from."""

    folder: Path
    """Holds ``bundle``, ``trained.json`` and what peers are given and made."""
    subject: Subject
    parts: Split
    bundle: Bundle
    fit: Fit
    seed: int

    @functools.cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """Logits of the test rows."""
        return scores(self.bundle, self.parts.test)

    @property
    def env(self) -> Env:
        """What transforms may use."""
        train, valid, _ = self.parts
        return Env(train, valid, train, teachers=(self.bundle.model,), recipe=self.subject.recipe, seed=self.seed)

    def compared(self, logits: npt.ArrayLike) -> Comparison:
        """Logits of the test rows against the given model's, clustered by user."""
        test = self.parts.test
        labels, users = test.column(test.schema.label.name), test.column(test.schema.user.name)
        return prove.delong(labels, self.scores, logits, users)

    @property
    def bytes(self) -> int:
        """Of the files its loader reads."""
        return size(self.folder / "bundle")


def subject_of(setting: Setting, name: str) -> Subject:
    """The subject of a name, which a quick run puts the sample in the place of."""
    return QUICK if setting.options.quick else SUBJECTS[name]


@functools.cache
def _parts(setting: Setting, name: str) -> Split:
    rows = setting.folder(name) / "rows"
    shutil.rmtree(rows, ignore_errors=True)
    return subject_of(setting, name).read(setting.options.data, rows)


@functools.cache
def given(setting: Setting, name: str, seed: int) -> Given:
    """The model of a seed, from the cache where it was trained by this recipe before."""
    subject, parts = subject_of(setting, name), _parts(setting, name)
    folder = setting.folder(name) / f"seed-{seed}"
    done = kept(subject.make(parts.train.schema.columns), parts, subject.recipe, seed, folder)
    return Given(folder, subject, parts, load(folder / "bundle"), done, seed)


# -- what came of it -------------------------------------------------------------------------------------------------------


def found(given: Given, ratio: float, logits: npt.ArrayLike, seconds: float, what: str, **more: Any) -> Found:
    """Test logits judged."""
    c = given.compared(logits)
    return Found(ratio, c.drop, c.upper, seconds, what, c.drop / c.se if c.se > 1e-12 else 0.0, **more)


# -- ours ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Effort:
    """A bar of ours: how small, at what drop, in how much time."""

    ratio: float
    margin: float
    seconds: float = 0.0
    trainings: float = 0.0
    """Compute cap as so many of the original trainings, where ``seconds`` is 0."""
    tries: int = 0
    epochs: int = 15
    teachers: int = 0
    against: Against = "given"

    def cap(self, given: Given) -> float:
        """Seconds it may take."""
        return self.seconds or self.trainings * given.fit.seconds


EFFORTS = {
    "free": Effort(4, 0.0002, seconds=30),
    "free-6x": Effort(6, 0.0005, seconds=30),
    "standard": Effort(20, 0.001, trainings=1, tries=2, against="control"),
    "standard-given": Effort(20, 0.001, trainings=1, tries=2),
    "patient": Effort(30, 0.001, trainings=5, tries=6, epochs=30, teachers=2),
}


def ours(id: str, name: str, effort: Effort, setting: Setting) -> list[Row]:
    """One effort on one set, seed by seed."""
    quick = setting.options.quick
    models = [given(setting, name, seed) for seed in range(setting.options.seeds)]
    each = [smallest(m, effort, m.folder / id.partition("/")[0], quick) for m in models]
    cap = max(effort.cap(m) for m in models)
    note = (
        f"the smallest at an AUC drop of at most {effort.margin}"
        f"{' from the given model and from the control' if effort.against == 'control' else ''}, "
        f"{'proven' if all(f.proven for f in each) else 'NOT proven'} for all seeds; bar of seconds: {cap:.0f} on one thread"
    )
    rows = rows_of(id, each, Bars(effort.ratio, effort.margin, cap, effort.against == "control"), note)
    if effort.trainings > 1:
        told = "the largest ratio put to the test at which the test AUC was not below the given model's"
        above = [f.above for f in each]
        rows.append(Row(id, "ratio_above_baseline", min(above), min(above), max(above), len(each), note=told))
    return rows


def smallest(given: Given, effort: Effort, out: Path, quick: bool) -> Found:
    """One public call that makes bytes alone small."""
    shutil.rmtree(out, ignore_errors=True)
    settings: dict[str, Any] = {"tries": effort.tries, "epochs": effort.epochs, "teachers": effort.teachers}
    if quick:
        settings = {"tries": min(effort.tries, 1), "epochs": 1, "teachers": 0}
    budget, seconds = f"auc drop <= {0.5 if quick else effort.margin}", QUICK_S if quick else ASKED * effort.cap(given)
    try:
        outcome = called(given, budget, seconds, out, against=effort.against, **settings)
    except Infeasible as error:
        return Found(1.0, 0.0, 0.0, seconds, str(error).splitlines()[0], proven=False)
    return judged(given, outcome, out / "chosen")


def called(given: Given, budget: str, seconds: float, out: Path, **settings: Any) -> Outcome:
    """The public call."""
    made: Outcome = pennyweight.optimize(  # type: ignore[operator]
        given.bundle, given.parts, budget, recipe=given.subject.recipe, trained=given.fit, seconds=seconds, seed=given.seed,
        out=out, watch=lambda _: None, objective="bytes", **settings,
    )  # fmt: skip
    return made


def judged(given: Given, outcome: Outcome, folder: Path) -> Found:
    """What was chosen, written, opened again and judged; or, where nothing was proven, the last that was put to the proof."""
    result = outcome.result
    control = result.control.proof if result.control else None
    above = max((given.bundle.bytes / _bytes(t) for t in result.trials if t.proof and t.proof.drop <= 0), default=1.0)
    more: dict[str, Any] = {"gain": -control.drop if control else 0.0, "above": above}
    if result.chosen is None:
        trial = next(t for t in reversed(result.trials) if t.proof)
        proof, ratio, what = trial.proof, given.bundle.bytes / _bytes(trial), f"{trial.plan.describe()}: {result.explanation}"
        assert proof is not None
        more |= {"control": trial.against_control, "proven": False}
        return Found(ratio, proof.drop, proof.drop_upper_95, result.seconds, what, **more)
    save(outcome.bundle.replace(catalog=None), folder)
    logits = scores(load(folder), given.parts.test)
    more |= {"control": result.chosen.against_control}
    what = f"{outcome.bundle.bytes:,} bytes of weights, {size(folder):,} with the manifest: {result.chosen.plan.describe()}"
    return found(given, given.bytes / size(folder), logits, result.seconds, what, **more)


def _bytes(trial: Trial) -> int:
    assert trial.measured is not None
    return trial.measured.bytes


# -- what stands beside ----------------------------------------------------------------------------------------------------


def baseline(id: str, name: str, setting: Setting) -> list[Row]:
    """Is the given model as strong as published?"""
    models = [given(setting, name, seed) for seed in range(setting.options.seeds)]
    found = [m.compared(m.scores).baseline for m in models]
    subject = models[0].subject
    note = (
        f"{subject.note}; validation {listed(m.fit.metric for m in models)}; trained in "
        f"{listed((m.fit.seconds for m in models), '.0f')} s on one thread; {models[0].bytes:,} bytes"
    )
    mean = statistics.fmean(found)
    return [Row(id, "auc", mean, min(found), max(found), len(found), subject.strength, note=note)]


def same(id: str, name: str, setting: Setting) -> list[Row]:
    """fp32 to fp32: written, opened and judged by the same code."""

    def one(model: Given) -> Found:
        folder = save(model.bundle, model.folder / "same")
        return found(model, model.bytes / size(folder), scores(load(folder), model.parts.test), 0.0, "as given")

    rows = rows_of(id, [one(given(setting, name, seed)) for seed in range(setting.options.seeds)])
    right = {"compression_ratio": 1.0, "drop": 0.0}
    return [dataclasses.replace(r, bar=right[r.metric], at_most=True) for r in rows if r.metric in right]


def random_codes(id: str, name: str, setting: Setting) -> list[Row]:
    """int4 tables whose rows are dealt anew: nothing may be left to rank by."""

    def one(model: Given) -> float:
        packed = plan(QuantizeTables("int4")).apply(model.bundle, model.env)
        state, generator = dict(packed.model.state), torch.Generator().manual_seed(model.seed)
        for path in (p for p, layer in described(packed).items() if isinstance(layer, Table)):
            for key in (k for k in state if k.startswith(f"{path}.")):
                state[key] = state[key][torch.randperm(len(state[key]), generator=generator)]
        dealt = packed.replace(model=Model(packed.model.spec, state))
        return model.compared(scores(dealt, model.parts.test)).value

    values = [one(given(setting, name, seed)) for seed in range(setting.options.seeds)]
    off = [abs(v - 0.5) for v in values]
    note = f"distance of the test AUC from .5 with the rows of all tables dealt at random: {listed(values)}"
    return [Row(id, "auc_from_half", max(off), min(off), max(off), len(off), LEVEL, note=note, at_most=True)]


def exactness(id: str, name: str, setting: Setting) -> list[Row]:
    """Caps are met to the byte, or refused with the frontier: at the smallest that needs no training, below it, and between."""
    model = given(setting, name, 0)
    seconds = QUICK_S if setting.options.quick else 30.0

    def at(cap: int) -> tuple[int | None, int]:
        try:
            outcome = called(model, f"bytes <= {cap}B, auc drop <= 0.5", seconds, model.folder / "exact", tries=0)
        except Infeasible as error:
            return None, len(error.frontier)
        return save_size(outcome.bundle, model.folder / "exact-best"), len(outcome.result.trials)

    loose = called(model, f"bytes <= {model.bundle.bytes - 1}B, auc drop <= 0.5", seconds, model.folder / "exact", tries=0)
    least = min(_bytes(t) for t in loose.result.trials if t.measured)
    caps = [least, least - 1, (least + model.bundle.bytes // 3) // 2]
    answers = [at(cap) for cap in caps]
    right = [
        (met is not None and met <= cap) if cap >= least else (met is None and frontier > 0)
        for cap, (met, frontier) in zip(caps, answers, strict=True)
    ]
    told = ", ".join(
        f"<= {cap:,}: {f'{met:,}' if met else f'refused with {frontier} on the frontier'}"
        for cap, (met, frontier) in zip(caps, answers, strict=True)
    )
    share = statistics.fmean(right)
    return [Row(id, "caps_kept", share, share, share, 1, 1.0, note=f"bytes of the weights file: {told}")]


def save_size(bundle: Bundle, folder: Path) -> int:
    """Bytes of the weights file of a bundle as written."""
    return (save(bundle.replace(catalog=None), folder) / "weights.safetensors").stat().st_size


def from_scratch(id: str, name: str, setting: Setting) -> list[Row]:
    """A small net trained by the same recipe, then int4: what compression must be better than."""

    def one(model: Given) -> Found:
        spec = narrowed(model.bundle.model.spec, model.subject.small)
        folder, began = model.folder / "from-scratch", time.monotonic()
        trained(spec, model.parts, model.subject.recipe, model.seed, folder)
        small = packed(load(folder), model.env)
        save(small, folder)
        seconds = time.monotonic() - began
        return found(
            model, model.bytes / size(folder), scores(load(folder), model.parts.test), seconds, f"{small.bytes:,} bytes"
        )

    each = [one(given(setting, name, seed)) for seed in range(setting.options.seeds)]
    widths = subject_of(setting, name).small
    note = f"hidden layers {widths} from the start, the same recipe, no teacher; then int4 tables and layers"
    return rows_of(id, each, note=note)


def narrowed(spec: Spec, widths: Sequence[int]) -> Spec:
    """The same model with other hidden widths."""
    return dataclasses.replace(spec, args={**spec.args, "hidden": list(widths)})


def packed(bundle: Bundle, env: Env) -> Bundle:
    """Norms folded, everything int4."""
    return plan(FoldNorms(), QuantizeTables("int4"), QuantizeDense("int4")).apply(bundle, env)


# -- peers -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    """One setting of one tool."""

    module: str
    """Of ``benchmarks.peers``, and its environment's folder."""
    setting: str
    note: str = "post-training: our recovery has nothing to train in it"


PEERS = {
    "onnxruntime-int8": Peer("onnxruntime", "int8"),
    "onnxruntime-int4": Peer("onnxruntime", "int4"),
    "openvino-int8": Peer("openvino", "int8"),
    "openvino-accuracy-control": Peer("openvino", "accuracy-control"),
    "openvino-weights-int8": Peer("openvino", "weights-int8"),
    "openvino-weights-int4": Peer("openvino", "weights-int4"),
    "torchao-int8": Peer("torch", "torchao"),
    "pytorch-int8": Peer("torch", "dynamic"),
    "pytorch-int4": Peer("torch", "dynamic-int4"),
    "neural-compressor-hqq": Peer("neural", "hqq"),
    "neural-compressor-rtn": Peer("neural", "rtn"),
    "keras-int8": Peer("keras", "int8"),
    "keras-int4": Peer("keras", "int4"),
    "torch-pruning": Peer("torch", "pruned", "as it comes, no training"),
}
RECOVERED = "torch-pruning-recovered"


def peers(id: str, name: str, peer: Peer, setting: Setting) -> list[Row]:
    """One setting of a peer on every seed; a failure is a row with its reason."""
    each, version = [], ""
    for seed in range(setting.options.seeds):
        model = given(setting, name, seed)
        report = ran(model, peer, setting)
        if "failed" in report:
            return [Row(id, "compression_ratio", 1, 1, 1, note=f"failed: {report['failed']}", peer=id.rpartition("/")[2])]
        version = report["version"]
        each.append(
            found(model, model.bytes / report["bytes"], report["logits"], report["seconds"], f"{report['bytes']:,} bytes")
        )
    return rows_of(id, each, note=f"{report['note']}; {peer.note}", peer=version)


def ran(model: Given, peer: Peer, setting: Setting) -> dict[str, Any]:
    """What a peer handed back for a checkpoint."""
    if setting.venvs is None or not (python := setting.venvs / peer.module / "bin" / "python").exists():
        return {"failed": f"no environment {peer.module} (benchmarks/peers/setup.sh FOLDER, then --venvs FOLDER)"}
    out = model.folder / "peers" / f"{peer.module}-{peer.setting}"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(python), "-m", f"benchmarks.peers.{peer.module}", peer.setting, str(exchanged(model)), str(out)]
    cap = max(600.0, 5 * model.fit.seconds)
    try:
        done = subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=cap
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {cap:.0f} s"}
    if done.returncode:
        return {
            "failed": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        }
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    measured = sum((out / name).stat().st_size for name in report["files"])
    return report | {"bytes": measured, "logits": np.load(out / "logits.npy"), "folder": out}


def exchanged(model: Given) -> Path:
    """The folder a peer is given (``benchmarks.peers.exchange``)."""
    folder = model.folder / "given"
    if (folder / "test.npz").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    features = [c.name for c in model.parts.train.schema.features]
    batch = next(iter(model.parts.train.head(100).batches(100)))
    written = export(model.bundle, folder, targets=["onnx"], data={n: batch[n] for n in features})
    columns = [i.column for i in written.parts[0].inputs]
    write(folder / "columns.json", json.dumps(columns))
    save(model.bundle, folder / "bundle")
    chosen = np.sort(np.random.default_rng(model.seed).permutation(len(model.parts.train))[:CALIBRATION])
    parts = {"calib": model.parts.train.take(chosen), "valid": model.parts.valid, "test": model.parts.test}
    for name, rows in parts.items():
        label = {} if name == "test" else {"label": rows.column(rows.schema.label.name)}
        np.savez(folder / f"{name}.npz", **{n: rows.column(n) for n in columns}, **label)  # type: ignore[arg-type]
    return folder


def recovered(id: str, name: str, setting: Setting) -> list[Row]:
    """What torch-pruning left, trained on by our distillation, in no more than a training's time."""
    each, version = [], ""
    for seed in range(setting.options.seeds):
        model = given(setting, name, seed)
        report = ran(model, PEERS["torch-pruning"], setting)
        if "failed" in report:
            return [Row(id, "compression_ratio", 1, 1, 1, note=f"failed: {report['failed']}", peer="torch-pruning")]
        version = report["version"]
        spec = narrowed(model.bundle.model.spec, json.loads((report["folder"] / "widths.json").read_text()))
        cut = Bundle(Model(spec, safetensors.torch.load_file(report["folder"] / "model.safetensors")))
        began, env = time.monotonic(), dataclasses.replace(model.env, deadline_s=max(1.0, model.fit.seconds))
        trained = Distill(1 if setting.options.quick else 15).apply(cut, env)
        folder = save(trained, report["folder"] / "recovered")
        seconds, logits = report["seconds"] + time.monotonic() - began, scores(load(folder), model.parts.test)
        each.append(found(model, model.bytes / size(folder), logits, seconds, f"{size(folder):,} bytes"))
    return rows_of(id, each, note=f"{report['note']}; then our Distill, 15 epochs at most", peer=version)


# -- the table -------------------------------------------------------------------------------------------------------------


def measures(setting: Callable[[Options], Setting]) -> Mapping[str, harness.Measure]:
    """How to measure each id."""
    made: dict[str, Callable[[Setting], list[Row]]] = {}

    def put(id: str, of: Callable[..., list[Row]], *more: object) -> None:
        made[id] = functools.partial(of, id, *more)

    for name in SUBJECTS:
        for kind, of in (
            ("baseline", baseline),
            ("sanity-fp32", same),
            ("sanity-random", random_codes),
            ("exactness", exactness),
        ):
            put(f"{kind}/{name}", of, name)
        for kind, effort in EFFORTS.items():
            put(f"{kind}/{name}", ours, name, effort)
        put(f"standard/{name}/from-scratch", from_scratch, name)
        for label, peer in PEERS.items():
            put(f"free/{name}/{label}", peers, name, peer)
        put(f"standard/{name}/{RECOVERED}", recovered, name)
    made |= rankings.measures() | tail.measures()
    return {id: lambda o, of=of: of(setting(o)) for id, of in made.items()}  # type: ignore[misc]


def arguments() -> argparse.ArgumentParser:
    """What this benchmark takes beside what all take."""
    parser = argparse.ArgumentParser(add_help=False)
    usual = Path(tempfile.gettempdir()) / "pennyweight-compress"
    parser.add_argument(
        "--cache", type=Path, default=usual, help="folder for checkpoints and what is made of them (default: %(default)s)"
    )
    parser.add_argument("--venvs", type=Path, help="folder of the peers' environments (benchmarks/peers/setup.sh makes them)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Everything, or the rows asked for with --only."""
    torch.set_num_threads(1)
    own = arguments()
    asked, _ = own.parse_known_args(argv)
    venvs = asked.venvs and asked.venvs.absolute()

    def setting(options: Options) -> Setting:
        return Setting(options, asked.cache.absolute(), venvs)

    harness.run("compress", measures(setting), timed=False, argv=argv, parents=[own])


if __name__ == "__main__":
    main(sys.argv[1:])
