"""How small does a model get that ranks a whole catalogue? Rows of compression for retrieval and for sequences.

A click rate forgives what the order of forty thousand items does not: four bits a number cost no AUC, and here a hundredth of
the NDCG. So these models have plans by hand, fixed on the validation rows of seed 0, and bars of their own. Drops are
shares of the given model's NDCG; their bounds are those of 2,000 draws of as many users as there are, both models judged
on the same users.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from benchmarks import baselines
from benchmarks.harness import Row
from benchmarks.judged import Bars, Found, Setting, kept, listed, rows_of, size
from pennyweight.compress.distill import Distill
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.residual import SubtractCentres
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import PlanError
from pennyweight.data import loaders
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.sample import prepare
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.retrieval import MatrixFactorization
from pennyweight.model.sequential import SASRec
from pennyweight.model.sequential import sequences as whole_sequences
from pennyweight.model.spec import Spec, spec_of
from pennyweight.model.train import Fit, Recipe
from pennyweight.model.transform import Env, Transform, plan
from pennyweight.optimize import prove
from pennyweight.optimize.evaluate import outcomes
from pennyweight.optimize.prove import Comparison

ROUNDS = 2000
"""Draws of users behind a bound."""
Bits = Literal["int8", "int4"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """What a model is trained and judged on."""

    split: Split
    seen: tuple[Dataset, ...]
    """What people have by the time of the test, which is no candidate."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A data set, a model of known strength and its recipe."""

    read: Callable[[Path, Path, int], Sets]
    """From the folder of public sets, one to write in and a seed."""
    make: Callable[[tuple[Column, ...]], Spec]
    recipe: Recipe
    metric: str
    """What drops are of, on test."""
    strength: tuple[str, float]
    """The metric that was published, and what the given model must reach."""
    note: str


def gowalla(data: Path, out: Path, seed: int) -> Sets:
    """LightGCN's split; a fiftieth of train is kept apart, the same for all seeds, and an eighth of its users choose epochs."""
    train, valid, test = loaders.gowalla(data / "gowalla", out, holdout=0.02)
    return Sets(Split(train, valid.take(np.flatnonzero(valid.column("user") % 8 == 0)), test), (train, valid))


def sequences(load: Callable[..., Split], name: str, length: int) -> Callable[[Path, Path, int], Sets]:
    """A person a row: the last item to test, the one before to validation."""

    def read(data: Path, out: Path, seed: int) -> Sets:
        every = load(data / name, out / "pairs", form="pairs")
        return Sets(load(data / name, out / "rows", form="sequences", length=length), (every.train, every.valid))

    return read


def sample(whole: bool) -> Callable[[Path, Path, int], Sets]:
    """The shipped sample, some of it: what a quick run stands in for every set with; pairs, or ``whole`` sequences."""

    def read(data: Path, out: Path, seed: int) -> Sets:
        train, valid, test = (part.head(n) for part, n in zip(prepare(out).split("time"), (8000, 2000, 2000), strict=True))
        return Sets(Split(whole_sequences(train) if whole else train, valid, test), (train, valid))

    return read


def factors(columns: tuple[Column, ...]) -> Spec:
    """Matrix factorization of cosines."""
    return spec_of(MatrixFactorization, columns=columns, dim=64, bias=False, scale=10.0)


def sasrec(dropout: float) -> Callable[[tuple[Column, ...]], Spec]:
    """SASRec, two blocks of 64."""
    return lambda columns: spec_of(SASRec, columns=columns, dim=64, blocks=2, heads=1, dropout=dropout)


# A falling rate is there in half the epochs that a constant one takes.
SASREC = dataclasses.replace(baselines.SASREC, schedule="cosine", epochs=20, patience=20)
SUBJECTS = {
    "gowalla": Subject(
        gowalla, factors, baselines.GOWALLA, "ndcg@20", ("recall@20", 0.16),
        "matrix factorization of cosines, LightGCN's split, all items ranked but those in train (published: BPR .1627, "
        "LightGCN .1820)",
    ),
    "beauty": Subject(
        sequences(loaders.amazon_beauty, "amazon-beauty", 20), sasrec(0.5), baselines.BEAUTY, "ndcg@10", ("ndcg@10", 0.0318),
        "SASRec, last item left out, all unseen items ranked (published by S3-Rec's authors: .0318)",
    ),
    "ml-1m": Subject(
        sequences(loaders.ml_1m, "ml-1m", 50), sasrec(0.2), SASREC, "ndcg@10", ("ndcg@10", 0.1259),
        "SASRec, last item left out, all unseen items ranked (published by gSASRec's authors: .1259)",
    ),
}  # fmt: skip
SHORT = Recipe(loss="sampled-softmax", epochs=2, lr=1e-2, metric="ndcg@10")
CHECK = "the shipped sample, a check of the harness"
QUICK = {
    "gowalla": Subject(sample(False), factors, SHORT, "ndcg@10", ("ndcg@10", 0.0), CHECK),
    "beauty": Subject(sample(True), sasrec(0.2), SHORT, "ndcg@10", ("ndcg@10", 0.0), CHECK),
    "ml-1m": Subject(sample(True), sasrec(0.2), SHORT, "ndcg@10", ("ndcg@10", 0.0), CHECK),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """One trained model: what every row of its seed starts from."""

    folder: Path
    subject: Subject
    sets: Sets
    bundle: Bundle
    fit: Fit
    seed: int

    @property
    def env(self) -> Env:
        """What transforms may use."""
        train, valid, _ = self.sets.split
        return Env(train, valid, train, teachers=(self.bundle.model,), recipe=self.subject.recipe, seed=self.seed)

    @property
    def bytes(self) -> int:
        """Of the files its loader reads."""
        return size(self.folder / "bundle")

    def outcomes(self, bundle: Bundle, metric: str = "") -> npt.NDArray[np.float64]:
        """A metric of each person of the test."""
        each: npt.NDArray[np.float64] = outcomes(bundle, self.sets.split.test, metric or self.subject.metric, self.sets.seen)
        return each

    @functools.cached_property
    def each(self) -> npt.NDArray[np.float64]:
        """What the given model gets for each person."""
        return self.outcomes(self.bundle)

    @functools.cache  # noqa: B019, one for each given model and training, and both live as long as the process
    def control(self, training: Distill) -> npt.NDArray[np.float64]:
        """What the same training gives without any compression; where no epoch is better, what there was."""
        try:
            return self.outcomes(plan(training).apply(self.bundle, self.env))
        except PlanError:
            return self.each


def given(setting: Setting, name: str, seed: int) -> Given:
    """The model of a seed, from the cache where it was trained by this recipe before."""
    return _given(setting, name, seed)


@functools.cache
def _given(setting: Setting, name: str, seed: int) -> Given:
    subject = (QUICK if setting.options.quick else SUBJECTS)[name]
    folder = setting.folder(f"{name}-ranked") / (name if setting.options.quick else f"seed-{seed}")
    shutil.rmtree(folder / "rows", ignore_errors=True)
    sets = subject.read(setting.options.data, folder / "rows", seed)
    done = kept(subject.make(sets.split.train.schema.columns), sets.split, subject.recipe, seed, folder)
    return Given(folder, subject, sets, load(folder / "bundle"), done, seed)


def relative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], seed: int = 0) -> Comparison:
    """From the values [users] of one model to those of another: the drop as a share of the first one's mean."""

    def lost(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        before = weights @ a
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw of users for whom nothing is right is left out
            return np.asarray((before - weights @ b) / before)

    drops = prove.bootstrap(lost, range(len(a)), rounds=ROUNDS, seed=seed)
    low, upper = np.quantile(drops, [1 - prove.CONFIDENCE, prove.CONFIDENCE])
    drop, method = float(lost(np.ones(len(a)))), f"{ROUNDS:,} draws of {len(a):,} users"
    return Comparison(len(a), float(a.mean()), float(b.mean()), drop, float(drops.std()), float(low), float(upper), method)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bar, and the plan that was found for it."""

    subject: str
    ratio: float
    margin: float
    plan: tuple[Transform, ...]
    training: Distill | None = None
    """What is in the plan of training, and the control gets too."""


def coded(books: int, centres: int, parts: int) -> tuple[Transform, ...]:
    """What rows have in common taken out, the rest shared in parts, all numbers in 8 bits: no training."""
    apart, rest = SubtractCentres(books, centres, iterations=12), ("*.rest",)
    return apart, ShareRows(parts, only=rest, iterations=12), QuantizeTables("int8")


def followed(apart: bool, data_type: Bits, training: Distill) -> tuple[Transform, ...]:
    """The same for a table of items, which the rest of the model then learns to live with; dense layers in few bits.

    For few items the centres, taken ``apart``, weigh more than they save.
    """
    shared = (SubtractCentres(only=("items",)), ShareRows(22, only=("*.rest",))) if apart else (ShareRows(22, only=("items",)),)
    return *shared, training, QuantizeTables("int8"), QuantizeDense(data_type)


RECOVERY = Distill(4, lr=1e-3, schedule="cosine")
GOALS = {
    "retrieval/gowalla": Goal("gowalla", 7, 0.005, coded(3, 128, 32)),
    "retrieval-12x/gowalla": Goal("gowalla", 12, 0.02, coded(3, 256, 16)),
    "sequence/beauty": Goal("beauty", 8, 0.01, followed(True, "int8", RECOVERY), RECOVERY),
    "sequence/ml-1m": Goal("ml-1m", 8, 0.01, followed(False, "int4", RECOVERY), RECOVERY),
}


def compressed(id: str, goal: Goal, setting: Setting) -> list[Row]:
    """A plan on every seed, against the given model and against the control."""

    def one(model: Given) -> Found:
        began = time.monotonic()
        made = applied(goal, model)
        folder = model.folder / id.partition("/")[0]
        save(made.replace(catalog=None), folder)
        seconds, each = time.monotonic() - began, model.outcomes(load(folder))
        found = judged(model, folder, each, seconds)
        if goal.training is None:
            return found
        control = model.control(goal.training)
        against = prove.judge(model.subject.metric, relative(control, each), goal.margin)
        return dataclasses.replace(found, control=against, gain=-relative(model.each, control).drop)

    each = [one(given(setting, goal.subject, seed)) for seed in range(setting.options.seeds)]
    note = (
        f"shares of the {SUBJECTS[goal.subject].metric} of the given model; a plan by hand: {plan(*goal.plan).describe()}; "
        f"{'within' if all(f.upper <= goal.margin for f in each) else 'NOT within'} {goal.margin:.1%} at 95 % for all seeds"
    )
    return rows_of(id, each, Bars(goal.ratio, goal.margin), note)


def applied(goal: Goal, model: Given) -> Bundle:
    """The plan; where no epoch of its training is better than none, all of it but the training."""
    try:
        return plan(*goal.plan).apply(model.bundle, model.env)
    except PlanError:
        if goal.training is None:
            raise
        return plan(*(t for t in goal.plan if t != goal.training)).apply(model.bundle, model.env)


def rounded(id: str, name: str, data_type: Bits, setting: Setting) -> list[Row]:
    """Every table and layer rounded row by row, without training: what the tools that can be installed do."""

    def one(model: Given) -> Found:
        began, both = time.monotonic(), (QuantizeTables(data_type), QuantizeDense(data_type))
        made = plan(both[: 1 if name == "gowalla" else 2]).apply(model.bundle, model.env)
        folder = save(made.replace(catalog=None), model.folder / id.replace("/", "-"))
        return judged(model, folder, model.outcomes(load(folder)), time.monotonic() - began)

    each = [one(given(setting, name, seed)) for seed in range(setting.options.seeds)]
    return rows_of(id, each, note=f"row-wise {data_type} tables and layers, no training, for comparison")


def judged(model: Given, folder: Path, each: npt.NDArray[np.float64], seconds: float) -> Found:
    """A compressed model's files and its values of each person, against the given model's."""
    c, bytes = relative(model.each, each), size(folder)
    return Found(model.bytes / bytes, c.drop, c.upper, seconds, f"{bytes:,} bytes", c.drop / max(c.se, 1e-12))


def baseline(id: str, name: str, setting: Setting) -> list[Row]:
    """Is the given model as strong as published?"""
    models = [given(setting, name, seed) for seed in range(setting.options.seeds)]
    subject = models[0].subject
    metric, bar = subject.strength
    found = [float(m.outcomes(m.bundle, metric).mean()) for m in models]
    note = (
        f"{subject.note}; {subject.metric} {listed(m.each.mean() for m in models)}; trained in "
        f"{listed((m.fit.seconds for m in models), '.0f')} s on one thread; {models[0].bytes:,} bytes"
    )
    return [Row(id, metric, statistics.fmean(found), min(found), max(found), len(found), bar, note=note)]


def measures() -> dict[str, Callable[[Setting], list[Row]]]:
    """How to measure each id."""
    made: dict[str, Callable[[Setting], list[Row]]] = {}
    for name in SUBJECTS:
        kind = "retrieval" if name == "gowalla" else "sequence"
        made[f"baseline-{kind}/{name}"] = functools.partial(baseline, f"baseline-{kind}/{name}", name)
        for id, goal in GOALS.items():
            if goal.subject == name:
                made[id] = functools.partial(compressed, id, goal)
        for data_type in get_args(Bits):
            id = f"{kind}/{name}/row-wise-{data_type}"
            made[id] = functools.partial(rounded, id, name, data_type)
    return made
