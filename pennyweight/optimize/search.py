"""From a model, data and a budget to the cheapest deployment that is proven as good.

Plans that need no training come first (seconds each), so something is on disk at once; then the mildest structure that can
meet the budget is trained, a stronger one if it held its quality, another of the mildest if not. One that fails rules out
all that are stronger on every axis. Every trained structure is tried with several data types. Recovery learns from an
ensemble: the given model and a few more by its recipe.

It chooses on validation rows only. What is left (a handful, from safest to cheapest) goes to the proof on the untouched
test rows, in that order and only as far as each is proven, which keeps the 5 % error of one test
(``prove.fixed_sequence``). Beside it runs the control: the given model with the same extra training and no compression,
since recovery alone often improves a model and that gain is not compression's.

It is anytime: after each trial the best bundle so far and the record are on disk, Ctrl-C ends the search and goes to the
proof with what there is, ``resume`` takes finished trials from disk. The compute cap is kept by predicting how long a
training will take from the epochs seen so far, and by ending one that would run over with its best so far.

A sampler over all plans (TPE, evolution) is the known alternative. It spends trials on learning what a prediction gives for
free here: bytes exactly, milliseconds nearly, and that more compression is cheaper and not better.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pennyweight.accelerate.tune import CHOSEN, SetRuntime, Timing, tune
from pennyweight.compress.onnx import types as graph_types
from pennyweight.compress.prune import FoldNorms, foldable
from pennyweight.compress.rewrite import Untouched, untouched
from pennyweight.core import hardware
from pennyweight.core.budget import Budget, size
from pennyweight.core.config import decode, dumps, encode, write
from pennyweight.core.errors import ConfigError, DataError, DeviceError, Infeasible, NotWorthIt, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle, Engine, Runtime, load, save
from pennyweight.model.losses import ROWS
from pennyweight.model.metrics import ranking
from pennyweight.model.spec import Model, seeded
from pennyweight.model.train import EpochLog, Progress, fit
from pennyweight.model.transform import Env, Plan, Transform, plan
from pennyweight.optimize import allocate, prove
from pennyweight.optimize.cost import Objective, calibrate, described, money, objective, predict, sketch
from pennyweight.optimize.evaluate import Bench, cost, memory, outcomes, parts, race
from pennyweight.optimize.space import (
    RETRIEVAL,
    Levels,
    Structure,
    forbidden,
    recoveries,
    spared,
    staged,
    stronger,
    structures,
    types,
)
from pennyweight.optimize.trial import Cost, Epoch, Price, Quality, Result, Trial, Tuned

Watch = Callable[["Step"], None]
Against = Literal["given", "control"]

RECORD = "search.json"

WAYS = 6.0
"""Another way of recovery is tried if this many times what the last one took is left."""

MIXED = 0.85
"""Share of the bytes of a structure's smallest data types that a mix of them, layer by layer, is hoped to come down to."""

TUNING = 0.15
"""Share of the compute cap that choosing runtimes may take; looking at plans ends before."""

TUNED = 3
"""Structures whose runtime is chosen by measurement: the cheapest plan may not be proven, and another's is another's."""

LEFT = (0.25, 0.5)
"""Share of what a structure loses on each axis (neurons, rows) that training is taken to leave.

On Frappe, a net cut to a quarter lost .0016 before 15 epochs of recovery and gained .0010 after; rows that share 3 codes lost
.0011 after them. What was right is no matter: the next structure is chosen by what came of the last.
"""

HOPE = 0.5
"""Share of the margin that the first structure trained may be taken to lose; interval and data types need the rest."""

BOLDER = 2.0
"""How many times more the next structure may lose than the last one that held, or less than one that did not."""

LOOKING = 0.3
"""Share of the compute cap after which no structure is looked at untrained."""

LISTING = 0.6
"""Share of what is left that measuring an allocator's choices may take; the rest is for trying the mixes."""

FINALISTS = 12
"""Plans put to the proof at most: each must be proven for the next to be tested, so more of them cost scoring alone."""

BRIEF = 0.1
"""Seconds that a trial is timed at most where its time decides nothing."""

EPOCHS = 0.75
"""Share of the compute cap that one recovery may take, were its epochs as long as the given model's."""

ALLOCATIONS = 5
"""Mixes of data types tried on a structure: bisection narrows the bytes by half in the logarithm each time."""

Z95 = 1.645
"""Standard errors from a mean to its one-sided 95 % bound."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What the search is doing, for whoever watches."""

    stage: str
    message: str
    share: float
    """Of the compute cap used, 0 to 1."""
    trial: Trial | None = None
    """Set when a trial ended."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to search."""

    metric: str = "auc"
    seconds: float = 600.0
    """Compute cap of the search, proof included; the control, a measurement, comes on top and takes at most as long again."""
    epochs: int = 10
    """Epochs of recovery at most; early stopping ends it before."""
    candidates: int = 500
    """Items in the request that is timed."""
    tries: int = 3
    """Structures trained at most."""
    teachers: int = 2
    """Models trained from other seeds by the recipe, to teach beside the one given."""
    timing_s: float = 0.5
    """Seconds each trial is timed; the final comparison takes five times that."""
    force: bool = False
    """Search even where the model is within the budget already."""
    skip: tuple[str, ...] = ()
    """Patterns of paths of layers that nothing may touch."""
    engines: tuple[Engine, ...] = ("eager", "onnxruntime")
    objective: Objective = "cost"
    """What is made small within the budget."""
    control: bool = True
    """Train the given model for as long as the others, beside the compute cap; without it nobody knows what of a gain is
    compression's."""
    against: Against = "given"
    """What a plan must be proven as good as: the model as given, or also the control."""
    price: Price | None = None
    model: str = "model"
    """The model's name, for the report."""
    data: str = ""
    """One line on the data, for the report."""
    references: tuple[tuple[str, float], ...] = ()
    epochs_before: tuple[Epoch, ...] = ()
    """The baseline's training, for the report."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The record, and the bundle to deploy: the chosen one, or the baseline where none was proven."""

    result: Result
    bundle: Bundle
    safest: Bundle
    """The plan within the budget that validation trusts most, proven or not: what to look at with more rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rung:
    """A structure with the data types to try on it and what each is predicted to cost."""

    levels: Levels
    structure: Structure
    dtypes: Sequence[Structure]
    guesses: Sequence[Cost]


def _next(rungs: Sequence[Rung], bold: bool) -> Rung:
    """The structure to train next: the mildest first, then half-way to the cheapest as long as quality holds."""
    if bold:
        return rungs[(len(rungs) - 1) // 2]
    return min(rungs, key=lambda r: sum(r.levels))


def _smallest(rungs: Sequence[Rung], lost: Mapping[Levels, float], room: float) -> Rung:
    """The smallest structure that is taken to lose no more than ``room``; where none is, the one that loses least."""
    hopeful = [r for r in rungs if lost[r.levels] <= room]
    if hopeful:
        return min(hopeful, key=lambda r: r.guesses[-1].bytes)
    return min(rungs, key=lambda r: (lost[r.levels], sum(r.levels)))


@dataclasses.dataclass(eq=False)
class Search:
    """One search: what it was given, and the trials so far."""

    bundle: Bundle
    env: Env
    budget: Budget
    test: Dataset
    options: Options
    out: Path | None
    watch: Watch
    started: float = dataclasses.field(default_factory=time.monotonic)
    trials: list[Trial] = dataclasses.field(default_factory=list)
    bundles: dict[str, Bundle] = dataclasses.field(default_factory=dict)
    vain: dict[str, str] = dataclasses.field(default_factory=dict)
    """What trainings that found nothing better said, by plan."""
    epochs: list[Epoch] = dataclasses.field(default_factory=list)
    epoch_s: float = 0.0
    scoring_s: float = 1.0
    """Seconds that scoring the test rows is taken to last."""
    norms: bool = False
    """Whether the model has norms that can be folded."""
    known: dict[str, Trial] = dataclasses.field(default_factory=dict)
    tuned: list[Tuned] = dataclasses.field(default_factory=list)
    """What was tried when runtimes were chosen."""
    interrupted: bool = False
    way: int | None = None
    """Which of the recoveries is used, once it is known."""

    # -- time --------------------------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds of the compute cap not used yet."""
        return self.options.seconds - (time.monotonic() - self.started)

    def say(self, stage: str, message: str, trial: Trial | None = None) -> None:
        """Tell whoever watches."""
        self.watch(Step(stage, message, min(1.0, 1 - self.left() / self.options.seconds), trial))

    # -- set-up ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def forbidden(self) -> tuple[str, ...]:
        """Patterns of layers that no transform may touch.

        Raises:
            ConfigError: one names no layer.
        """
        return forbidden(self.bundle, self.options.skip, self.env.allow)

    def measure_baseline(self) -> None:
        """Cost, parts and scores of the model as given, timed at its own best number of threads."""
        valid = self.env.valid
        assert valid is not None
        o, _ = self.options, self.forbidden  # a slip in a name is said before any work
        self.say("baseline", "timing the model as given")
        self.bench = Bench.of(self.test, o.candidates, self.env.requests, seed=self.env.seed)
        self.bench = dataclasses.replace(self.bench, seconds=self.timing)
        self.bundle, self.threads_note = self._at_best_threads(self.bundle)
        self.base = cost(self.bundle, self.bench, self.env.allow)
        self.before = parts(self.bundle, self.bench, self.env.allow)
        self.users = _users(self.test), _users(valid)
        self.labels = self.test.column(self.test.schema.label.name), valid.column(valid.schema.label.name)
        self.say("baseline", "scoring the validation rows")
        self.margin, began = 1.0, time.monotonic()
        self.valid_scores = self._outcomes(self.bundle, 1)
        self.scoring_s = (time.monotonic() - began) * len(self.test) / max(1, len(valid))
        self.margin = self.budget.margin(o.metric, self._compared(self.valid_scores, self.valid_scores, 1).baseline)
        self.rates = calibrate(o.candidates)

    def _at_best_threads(self, bundle: Bundle) -> tuple[Bundle, str]:
        if bundle.runtime.threads:
            return bundle, f"timed at {bundle.runtime.threads} thread(s), as its runtime says"
        choices = [bundle.replace(runtime=dataclasses.replace(bundle.runtime, threads=n)) for n in _threads()]
        times = race([bundle, *choices], self.bench, self.env.allow)
        best = min(range(len(times)), key=lambda k: times[k].p99_ms)
        used = choices[best - 1] if best else bundle
        return used, f"timed at {used.runtime.threads or 'default'} thread(s), the fastest for it of {len(times)} settings"

    def worth_it(self) -> None:
        """Refuse where there is nothing to gain.

        Raises:
            NotWorthIt: the budget limits something and the model is within all of it already.
        """
        limited = self.budget.misses() != ()
        if self.options.force or not limited or self._misses(self.base, self.bundle):
            return
        dense = sum(p.ms for p in self.before if not p.kind.startswith("table"))
        share = dense / max(sum(p.ms for p in self.before), 1e-9)
        raise NotWorthIt(
            f"the model is within {self.budget.describe()} as it is: {size(self.base.bytes)}, p99 {self.base.p99_ms:.2f} ms; "
            f"{share:.0%} of the time is the dense part. Leave it, set a tighter budget, or search all the same with --force"
        )

    def _misses(self, spent: Cost, bundle: Bundle, given: Cost | None = None, *, sketched: bool = False) -> tuple[str, ...]:
        """Which limits are not kept; of a sketch, whose memory cannot be measured, the bytes stand for it.

        ``given`` is what the model as given was measured to spend beside it, for limits that are multiples of that.
        """
        limits, given, price = self.budget, given or self.base, self.options.price
        measured = limits.memory_bytes is not None or "memory" in limits.times
        peak = memory(bundle, self.bench, self.env.allow) if measured and not sketched else spent.bytes
        asked = given.bytes if sketched or "memory" not in limits.times else self._given_memory
        paid = money(spent, bundle.runtime.threads, price) if price else None
        before = money(given, self.bundle.runtime.threads, price) if price else None
        limits = limits.against(
            p50_ms=given.p50_ms, p99_ms=given.p99_ms, bytes=given.bytes, memory_bytes=asked, cost=before
        )  # fmt: skip
        return limits.misses(p50_ms=spent.p50_ms, p99_ms=spent.p99_ms, bytes=spent.bytes, memory_bytes=peak, cost=paid)

    @property
    def most_bytes(self) -> float:
        """The budget's limit of bytes; without end where there is none."""
        return self.budget.against(bytes=self.base.bytes).bytes or math.inf

    @functools.cached_property
    def _given_memory(self) -> int:
        return memory(self.bundle, self.bench, self.env.allow)

    def _cost(self, bundle: Bundle) -> tuple[Cost, Cost]:
        """What a bundle costs, and the model as given beside it: in turns where the budget compares their times."""
        if self.budget.times.keys() & {"p50", "p99", "cost"}:
            given, spent = race([self.bundle, bundle], self.bench, self.env.allow)
            return spent, given
        return cost(bundle, self.bench, self.env.allow), self.base

    # -- trials ------------------------------------------------------------------------------------------------------

    def attempt(self, transforms: Sequence[Transform], predicted: Cost, name: str) -> Trial:
        """Apply a plan, measure it on the validation rows, keep it."""
        made = plan(transforms)
        key = _key(made)
        begun = time.monotonic()
        try:
            bundle = self._applied(made)
            if key in self.known:
                trial = self.known[key]
            else:
                spent, given = self._cost(bundle)
                trial = Trial(name, made, predicted, spent, self._validated(bundle), None, seconds=time.monotonic() - begun)
                trial = dataclasses.replace(trial, note="; ".join(self._misses(spent, bundle, given)))
        except (PlanError, DataError) as error:  # it cannot be applied, or answers so that nothing can be judged
            trial = Trial(name, made, predicted, note=str(error), seconds=time.monotonic() - begun)
        else:
            self.bundles[key] = bundle
        self.trials.append(trial)
        self._keep()
        self.say("trial", made.describe(), trial)
        return trial

    def _applied(self, made: Plan) -> Bundle:
        """The bundle after a plan; what training leaves behind is kept, in memory and on disk."""
        bundle, at = self.bundle, 0
        for k in range(len(made), 0, -1):
            kept = self._trained(Plan(made.transforms[:k]))
            if kept is not None:
                bundle, at = kept, k
                break
        for k in range(at, len(made)):
            step, prefix = made.transforms[k], Plan(made.transforms[: k + 1])
            if step.stage != "training":
                bundle = step.apply(bundle, self.env)
                continue
            self._refused(prefix)
            try:
                bundle = step.apply(bundle, self._listening(made.describe()))
            except PlanError as error:
                self._refuse(prefix, error)
                raise
            self._remember(prefix, bundle)
        return bundle

    def recovered(self, structure: Structure) -> Structure:
        """The structure with its training, or alone where training found nothing better than what compression left."""
        ways = recoveries(structure, self.env, self._epochs(), self.forbidden, self.options.objective == "bytes")
        if not ways:
            return structure
        if self.way is None:
            self.way = self._best_way(structure, ways)
        return structure if self._bound(structure, ways[self.way]) is None else (*structure, *ways[self.way])

    def _epochs(self) -> int:
        """Epochs of recovery, no more than fit the compute cap: a schedule that is cut off has not cooled down.

        An epoch is taken to last what one of the model as given lasted, whatever the clock says now, so that a busy machine
        does not change the plan.
        """
        each = [e.seconds for e in self.options.epochs_before]
        fit = int(EPOCHS * self.options.seconds / float(np.median(each))) if each else self.options.epochs
        return max(1, min(self.options.epochs, fit))

    def _best_way(self, structure: Structure, ways: Sequence[Structure]) -> int:
        """Which recovery serves this model best; another is tried while that costs little of what is left."""
        bounds: list[float] = []
        for way in ways:
            began = time.monotonic()
            bound = self._bound(structure, way)
            bounds.append(math.inf if bound is None else bound)
            if self.spare < WAYS * (time.monotonic() - began):
                break
        return bounds.index(min(bounds))

    def _bound(self, structure: Structure, way: Structure) -> float | None:
        """The 95 % bound of the drop on validation after training a structure so; None where training found nothing better."""
        try:
            return self._validated(self._applied(plan((*structure, *way)))).drop_upper_95
        except PlanError as error:
            self.say("train", f"kept without training: {error}")
            return None

    def _trained(self, prefix: Plan) -> Bundle | None:
        key = _key(prefix)
        if key in self.bundles:
            return self.bundles[key]
        folder = self.out / "trained" / key if self.out and prefix.transforms[-1].stage == "training" else None
        if folder is None or not self.known or not (folder / "manifest.json").exists():
            return None
        self.bundles[key] = load(folder)
        return self.bundles[key]

    def _remember(self, prefix: Plan, bundle: Bundle) -> None:
        self.bundles[_key(prefix)] = bundle
        if self.out is not None and not self.interrupted:
            save(bundle.replace(catalog=None), self.out / "trained" / _key(prefix))

    def _refused(self, prefix: Plan) -> None:
        """Raise what a training of an earlier search, or of this one, ended with where it found nothing better."""
        key = _key(prefix)
        if key not in self.vain and self.known and self.out is not None and (self.out / "trained" / f"{key}.txt").exists():
            self.vain[key] = (self.out / "trained" / f"{key}.txt").read_text(encoding="utf-8")
        if key in self.vain:
            raise PlanError(self.vain[key])

    def _refuse(self, prefix: Plan, error: PlanError) -> None:
        key = _key(prefix)
        self.vain[key] = str(error)
        if self.out is not None and not self.interrupted:
            (self.out / "trained").mkdir(parents=True, exist_ok=True)
            write(self.out / "trained" / f"{key}.txt", str(error))

    def _listening(self, run: str) -> Env:
        """The environment with a watcher that records epochs and holds the cap."""
        return dataclasses.replace(self.env, watch=self._hearing(run), deadline_s=max(1.0, self.spare))

    def _hearing(self, run: str) -> Callable[[Progress | EpochLog], None]:
        def hear(event: Progress | EpochLog) -> None:
            if isinstance(event, Progress):
                rate = f"{event.rows_per_s:,.0f} rows/s"
                self.say("train", f"{run}: epoch {event.epoch}, loss {event.loss:.4f}, {rate}")
                return
            self.epoch_s = event.seconds
            self.epochs.append(Epoch(run, event.epoch, event.loss, event.metric, event.seconds))

        return hear

    @property
    def timing(self) -> float:
        """Seconds that a trial is timed."""
        return self.options.timing_s if self.options.objective == "cost" else min(self.options.timing_s, BRIEF)

    @property
    def reserve(self) -> float:
        """Seconds kept back for the proof and the final timing; by what scoring took before, where that is all of it."""
        proof = 5.0 if self.options.objective == "cost" else 1.0 + 4 * self.scoring_s
        return min(0.25 * self.options.seconds, 10 * self.timing + proof)

    @property
    def spare(self) -> float:
        """Seconds left for looking at plans: what proof and timing need is kept back, and what choosing their runtime does."""
        tuning = min(TUNING * self.options.seconds, TUNED * 30 * self.options.timing_s)
        return self.left() - self.reserve - (tuning if self.options.objective == "cost" else 0.0)

    def _validated(self, bundle: Bundle) -> Quality:
        return self._compared(self._outcomes(bundle, 1), self.valid_scores, 1)

    def _outcomes(self, bundle: Bundle, which: int) -> npt.NDArray[Any]:
        """What is compared on the test rows (0) or the validation rows (1)."""
        assert self.env.valid is not None and self.env.train is not None
        data, seen = ((self.test, [self.env.train, self.env.valid]), (self.env.valid, [self.env.train]))[which]
        return outcomes(bundle, data, self.options.metric, seen, self.env.allow)

    def _compared(self, new: npt.NDArray[Any], old: npt.NDArray[Any], which: int) -> Quality:
        metric = self.options.metric
        if ranking(metric) is not None:
            return prove.judge(metric, prove.means(old, new), self.margin)
        users = self.users[which]
        return prove.prove(metric, self.labels[which], old, new, margin=self.margin, users=users, seed=self.env.seed)

    def _keep(self) -> None:
        """The record and the best bundle so far, on disk."""
        if self.out is None:
            return
        head = {"fingerprint": self.fingerprint, "trials": [encode(t) for t in self.trials]}
        write(self.out / RECORD, dumps(head))
        fit = [t for t in self.trials if self.acceptable(t)]
        if fit:
            # Those inside the margin first; then those that only noise may have put outside.
            best = min(fit, key=lambda t: (t.validation is not None and t.validation.drop > self.margin, self._objective(t)))
            if best is self.trials[-1]:
                save(self.bundles[_key(best.plan)], self.out / "best")

    @property
    def request(self) -> str:
        """What is timed, in words."""
        return f"one user with {self.bench.candidates} candidates" if self.bench.users else f"{self.bench.candidates} rows"

    @functools.cached_property
    def fingerprint(self) -> str:
        """What makes finished trials of an earlier search usable: same model, data, budget and options."""
        assert self.env.valid is not None and self.env.train is not None
        weights = hashlib.sha256(
            b"".join(
                v.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                for _, v in sorted(self.bundle.model.state.items())
            )
        )
        given = [
            weights.hexdigest(),
            self.env.train.fingerprint,
            self.env.valid.fingerprint,
            self.budget.describe(),
            str(self.env.seed),
        ]
        o = self.options
        asked = [o.metric, str(o.epochs), o.objective, o.against, *o.skip]
        return hashlib.sha256("|".join([*given, *asked]).encode()).hexdigest()

    def recall_record(self) -> None:
        """Take the trials of an earlier search of the same thing from disk.

        Raises:
            ConfigError: the folder holds a search of something else.
        """
        file = self.out / RECORD if self.out else None
        if file is None or not file.exists():
            return
        head = json.loads(file.read_bytes())
        if head["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"{file} is a search of another model, data, budget or objective; name another folder or leave --resume away"
            )
        found = [decode(Trial, t, f"{file}.trials") for t in head["trials"]]
        self.known = {_key(t.plan): t for t in found if t.measured is not None}

    # -- the grid ----------------------------------------------------------------------------------------------------

    def explore(self) -> None:
        """Free plans, then structures with recovery, milder or stronger as validation says."""
        layers = described(self.bundle, self.env.allow)
        norms = self.norms = foldable(self.bundle.model.build(self.env.allow), self.bundle.model.spec.inputs, self.forbidden)
        self.say("predict", "sketching the structures there are")
        found = structures(self.bundle, layers, self.env, self.forbidden, self.options.objective == "bytes")
        rungs = self._rungs(found if self.options.tries else {k: s for k, s in found.items() if not s}, norms)
        free = [r for r in rungs if not r.structure]
        for rung in free:
            self._attempt_types(rung, ())
        open_ = [r for r in rungs if r.structure and recoveries(r.structure, self.env, 1) and self._promising(r.guesses[-1])]
        if open_ and self.options.tries:
            self.train_teachers()
        if free and not (open_ and self.options.tries):
            self.allocate(())
        lost = self._unrecovered(open_) if self.options.objective == "bytes" and self.options.tries else {}
        held, room = True, HOPE * self.margin
        for tried in range(self.options.tries):
            if not open_ or not self._affordable():
                break
            rung = _smallest(open_, lost, room) if lost else _next(open_, bold=held and tried > 0)
            trained = self.recovered(rung.structure)
            held = self._attempt_types(rung, trained)
            if held and lost:  # what is to be mixed further must have room for it
                held = any(self._safe(t) for t in self.trials if t.plan.transforms[: len(trained)] == trained)
            if held:
                self.allocate(trained)
            room *= BOLDER if held else 1 / BOLDER
            open_ = [r for r in open_ if not (stronger(rung.levels, r.levels) if held else stronger(r.levels, rung.levels))]
        if free and not any(self.acceptable(t) for t in self.trials):
            self.allocate(())  # no structure came through, and bits alone may

    def _unrecovered(self, rungs: Sequence[Rung]) -> dict[Levels, float]:
        """What each structure is taken to lose on validation, by what its parts lose before any training.

        Structures that there was no time to look at lose without end.
        """
        self.say("predict", "measuring what structures lose before any training")
        alone: dict[Levels, float] = {}
        for rung in (r for r in rungs if sum(level > 0 for level in r.levels) == 1):
            if self.left() < (1 - LOOKING) * self.options.seconds:
                break
            with contextlib.suppress(PlanError):
                alone[rung.levels] = self._validated(self._applied(plan(rung.structure))).drop

        def lost(levels: Levels) -> float:
            axes = [(LEFT[k], tuple(level * (k == j) for j in range(len(levels)))) for k, level in enumerate(levels) if level]
            return sum(left * alone.get(axis, math.inf) for left, axis in axes)

        return {r.levels: lost(r.levels) for r in rungs}

    def _rungs(self, found: Mapping[Levels, Structure], norms: bool) -> list[Rung]:
        """Structures with their data types and predicted costs, cheapest last; those that cannot be applied are left out."""
        rungs = []
        for levels, structure in found.items():
            made: dict[Structure, Cost] = {}
            with contextlib.suppress(PlanError):
                drawn = sketch(self.bundle, structure, self.env)
                for suffix in self._types(drawn, norms):
                    with contextlib.suppress(PlanError):
                        drafted = sketch(drawn, suffix, self.env)
                        made[suffix] = predict(drafted, self.rates, self.base, self.before, self.env.allow)
            if made:
                rungs.append(Rung(levels, structure, list(made), list(made.values())))
        # By bytes and operations, not by milliseconds: the order must not depend on how busy the machine is.
        return sorted(rungs, key=lambda r: -r.guesses[-1].bytes * r.guesses[-1].flops)

    def _types(self, drawn: Bundle, norms: bool) -> Sequence[Structure]:
        """Data types to try: an ONNX graph's own, or those of its layers."""
        rows = self.env.calib is not None or self.env.train is not None
        graph = graph_types(drawn.model, self.env.calib is not None)
        if graph:
            return [spared(suffix, self.forbidden) for suffix in graph]
        return types(described(drawn, self.env.allow), norms, rows, self.forbidden)

    def _promising(self, guess: Cost) -> bool:
        """Whether a prediction leaves hope: milliseconds may be a third off and are eager's, a mix may take fewer bytes."""
        hope = 1.5 if set(self.options.engines) == {"eager"} else 3.0
        slack = dataclasses.replace(
            guess, bytes=int(MIXED * guess.bytes), p50_ms=guess.p50_ms / hope, p99_ms=guess.p99_ms / hope
        )
        return not self._misses(slack, self.bundle, sketched=True)

    def _affordable(self) -> bool:
        """Whether another training fits the cap beside the control and the proof."""
        return self.spare > 2 * max(self.epoch_s * min(3, self.options.epochs), 1.0)

    def train_teachers(self) -> None:
        """More models by the recipe, from other seeds, while at most a third of the cap is gone."""
        spec, recipe, env = self.bundle.model.spec, self.env.recipe, self.env
        if recipe is None or recipe.loss not in ROWS or spec.layers or env.train is None or env.valid is None:
            return
        for seed in range(env.seed + 1, env.seed + 1 + self.options.teachers):
            run = f"teacher {seed}"
            folder = self.out / "trained" / run.replace(" ", "-") if self.out else None
            if folder is not None and self.known and (folder / "manifest.json").exists():
                teacher = load(folder).model
            else:
                allowed = self.options.seconds / 3 - (time.monotonic() - self.started)
                # One stopped half-way teaches what the given model has unlearned.
                if allowed <= sum(e.seconds for e in self.options.epochs_before):
                    return
                module = seeded(spec, seed, env.allow, self.bundle.model.state)
                fit(
                    module,
                    env.train,
                    env.valid,
                    recipe,
                    inputs=spec.inputs,
                    seed=seed,
                    progress=self._hearing(run),
                    deadline_s=allowed,
                )
                teacher = Model.of(module, spec)
                if folder is not None:
                    save(Bundle(teacher), folder)
            self.env = env = dataclasses.replace(env, teachers=(*env.teachers, teacher))

    def _attempt_types(self, rung: Rung, trained: Structure) -> bool:
        """Try a structure's data types as long as they hold its quality, mild to strong; whether one did.

        Feedback costs as much as a short training, and bytes are known before: what misses their limit goes without it.
        """
        name, held = "recovered" if trained else "free", False
        limit = self.most_bytes
        for suffix, guess in zip(rung.dtypes, rung.guesses, strict=True):
            if guess.bytes > limit and any(getattr(t, "feedback", False) for t in suffix):
                continue
            if not self._held(self.attempt((*trained, *suffix), guess, name)):
                break
            held = True
        return held

    def allocate(self, trained: Structure) -> None:
        """Mix data types by what each layer bears: to the budget's bytes, and below while the bound of the drop allows it.

        Where bytes are limited, the least predicted loss within the limit comes first. From there on bisection between the
        smallest mix there is and the smallest that kept its bound, as a sum of losses alone is only a prediction.
        """
        fold: Structure = (FoldNorms(skip=self.forbidden),) if self.norms else ()
        prefix = plan((*trained, *fold))
        bundle = self._applied(prefix)
        # Mixes are made of this very model, so that what was seen in it is not looked for again.
        self.bundles[_key(prefix)] = bundle
        layers = described(bundle, self.env.allow)
        kept = (*self.forbidden, *(RETRIEVAL if staged(layers) else ()))
        self.say("allocate", "measuring what fewer bits cost each table and layer")
        offered = allocate.menu(bundle, self.env, skip=kept, seconds=max(0.0, LISTING * self.spare))
        if offered is None or not offered.groups:
            return
        head = bundle.bytes - sum(t.nbytes for t in bundle.model.state.values())
        limit = self.most_bytes
        good = [
            t.measured.bytes
            for t in self.trials
            if t.measured and t.plan.transforms[: len(trained)] == trained and self._safe(t)
        ]
        high, low = min(limit, *good, bundle.bytes) - head, float(offered.least)
        target = high if math.isfinite(limit) else high**0.75 * low**0.25  # a mild step first, for the proof to stand on
        seen: set[Structure] = set()
        took = 0.0
        for _ in range(ALLOCATIONS):
            found, began = offered.within(int(target)), time.monotonic()
            if found is None or found.transforms in seen or self.spare < 2 * took:  # more along axes takes longer
                break
            seen.add(found.transforms)
            trial = self.attempt((*trained, *fold, *found.transforms), self._foreseen(bundle, found.transforms), "allocated")
            took = time.monotonic() - began
            if trial.measured is None:
                break
            self._swap(trial, dataclasses.replace(trial, losses=found.losses))
            if trial.measured.bytes > limit:  # the file's header is longer than it was
                target -= trial.measured.bytes - limit
                continue
            high, low = (trial.measured.bytes - head, low) if self._safe(trial) else (high, target)
            target = math.sqrt(high * low)

    def _foreseen(self, bundle: Bundle, transforms: Structure) -> Cost:
        return predict(sketch(bundle, transforms, self.env), self.rates, self.base, self.before, self.env.allow)

    def _safe(self, trial: Trial) -> bool:
        """Within the margin on validation by its bound, so that the proof has a fair chance."""
        return trial.validation is not None and trial.validation.drop_upper_95 <= self.margin

    def _held(self, trial: Trial) -> bool:
        """No worse than the margin on validation.

        Accuracy moves by whole rows: what is within a standard error of the margin is left to the proof.
        """
        if trial.validation is None:
            return False
        found = trial.validation
        room = (found.drop - found.drop_low_95) / Z95 if self.options.metric == "accuracy" else 0.0
        return found.drop <= self.margin + room

    def acceptable(self, trial: Trial) -> bool:
        """Within the budget as measured, and no worse than the margin on validation."""
        return trial.measured is not None and not trial.note and self._held(trial)

    def _objective(self, trial: Trial) -> float:
        assert trial.measured is not None
        return objective(trial.measured, self.base, self.options.price, of=self.options.objective)

    # -- runtime, control, proof -------------------------------------------------------------------------------------

    def tune_finalists(self) -> None:
        """Choose engine and threads by measurement, for the best plan of each structure; it changes no bytes."""
        if self.options.objective == "bytes":
            return
        held = [t for t in self.trials if t.measured and self._held(t) and t.name != "control" and self._small(t)]
        if held:
            self.say("tune", "choosing engine and threads for the best plans by measurement")
        requests = [make() for make in self.bench.requests[:8]]
        for alike in _alike(sorted(held, key=self._objective)[:8])[:TUNED]:
            if self.left() < self.reserve:
                return
            chosen, trace = tune(
                self.bundles[_key(alike[0].plan)],
                requests,
                seconds=min(30 * self.options.timing_s, self.left() / 3),
                engines=self.options.engines,
                allow=self.env.allow,
            )
            self.tuned += [_tuned(alike[0].plan, t) for t in trace]
            runtime = Runtime(chosen.engine, chosen.threads, chosen.batch)
            for trial in alike:
                if self.bundles[_key(trial.plan)].runtime != runtime:
                    with contextlib.suppress(DeviceError):
                        self.attempt((*trial.plan.transforms, chosen), trial.predicted, trial.name)

    def _small(self, trial: Trial) -> bool:
        """Whether a trial keeps the limit of bytes, which no runtime changes."""
        assert trial.measured is not None
        return trial.measured.bytes <= self.most_bytes

    def run_control(self) -> Trial | None:
        """The given model after the same extra training, not compressed."""
        extra = [t for trial in self.trials for t in trial.plan.transforms if t.stage == "training"]
        if not extra or not self.options.control:
            return None
        self.say("control", "training the model as given for as long, without compression")
        used = time.monotonic() - self.started
        self.started = time.monotonic()  # it is a measurement: not what finding the plan takes, and it gets as much time again
        try:
            trial = self.attempt(extra[:1], self.base, "control")
        except KeyboardInterrupt:
            self.interrupted = True
            return None
        finally:
            self.started = time.monotonic() - used
        if trial.measured is not None:
            return trial
        self.bundles[_key(Plan())] = self.bundle
        return Trial("control", Plan(), self.base, self.base, note=f"the model as given: {trial.note}")

    def sequence(self, control: Trial | None = None) -> list[Trial]:
        """Finalists from safest to cheapest: each cheaper than the one before, and none but the best for its price.

        Safe is what validation says, against the control too where a plan must be as good as it: training gains what no plan
        without it has, so the mildest is not the safest there.
        """
        fit = [t for t in self.trials if t.name != "control" and self.acceptable(t)]
        # The runtime was chosen by a longer measurement than a trial's: a plan that has one stands for the same without.
        tuned = {t.plan.transforms[:-1] for t in fit if t.plan.transforms and t.plan.transforms[-1].stage == "runtime"}
        fit = sorted((t for t in fit if t.plan.transforms not in tuned), key=self._objective)
        bound = self._bounds(fit, control)
        kept: list[Trial] = []
        for trial in fit:
            if math.isfinite(bound[id(trial)]) and (not kept or bound[id(trial)] < bound[id(kept[-1])]):
                kept.append(trial)
        return kept[:FINALISTS][::-1]

    def _bounds(self, trials: Sequence[Trial], control: Trial | None) -> dict[int, float]:
        """The 95 % bound of each one's drop on validation; without end where it is more than the margin below the control."""
        own = {id(t): _bound(t) for t in trials}
        if control is None or self.options.against == "given":
            return own
        self.say("prove", "comparing plans with the control on the validation rows")
        base = self._outcomes(self.bundles[_key(control.plan)], 1)
        for trial in trials:
            beside = self._compared(self._outcomes(self.bundles[_key(trial.plan)], 1), base, 1)
            own[id(trial)] = max(own[id(trial)], beside.drop_upper_95) if beside.drop <= self.margin else math.inf
        return own

    def proof(self, finalists: Sequence[Trial], control: Trial | None) -> tuple[list[Trial], Trial | None]:
        """Put finalists to the test rows; those proven, the cheapest first, and the control with its proof."""
        self.say("prove", f"scoring {len(self.test):,} untouched rows")
        baseline = self.base_scores = self._outcomes(self.bundle, 0)
        if control is not None:
            controlled = self._outcomes(self.bundles[_key(control.plan)], 0)
            control = dataclasses.replace(control, proof=self._compared(controlled, baseline, 0))
        found: dict[str, tuple[Quality, Quality | None]] = {}

        def test(trial: Trial) -> Quality:
            scored = self._outcomes(self.bundles[_key(trial.plan)], 0)
            own = self._compared(scored, baseline, 0)
            beside = self._compared(scored, controlled, 0) if control is not None else None
            found[_key(trial.plan)] = own, beside
            return self._deciding(own, beside)

        proven: list[Trial] = []
        for trial, quality in prove.fixed_sequence(finalists, test)[1]:
            tested = dataclasses.replace(trial, proof=found[_key(trial.plan)][0], against_control=found[_key(trial.plan)][1])
            self._swap(trial, tested)
            proven += [tested] if quality.verdict == "proven" else []
        return proven[::-1], control

    def _deciding(self, own: Quality, beside: Quality | None) -> Quality:
        """The comparison that decides: where a plan must be as good as the control too, the worse of the two."""
        if beside is None or self.options.against == "given":
            return own
        return max(own, beside, key=lambda q: q.drop_upper_95)

    def _swap(self, old: Trial, new: Trial) -> None:
        self.trials[self.trials.index(old)] = new


def optimize(
    bundle: Bundle,
    env: Env,
    budget: Budget,
    test: Dataset,
    options: Options = Options(),
    *,
    out: Path | None = None,
    resume: bool = False,
    watch: Watch = lambda step: None,
) -> Outcome:
    """Search for the cheapest plan that is proven as good as ``bundle``.

    ``env.train`` and ``env.valid`` are what recovery and choice may use; ``test`` is read once, at the end. With ``out`` the
    best bundle so far is always in ``out/best`` and the record in ``out/search.json`` and ``out/result.json``.

    Raises:
        NotWorthIt: the model is within the budget already.
        Infeasible: nothing measured meets the budget; the frontier and what is missing are in the error and on disk.
        DataError: train, validation or test rows are missing, or weights are no numbers.
        ConfigError: a layer to leave alone is not there.
    """
    if env.train is None or env.valid is None or not len(test):
        raise DataError("optimize needs train, validation and test rows; split the data into three")
    _counted(bundle)
    env = dataclasses.replace(env, teachers=env.teachers or (bundle.model,))
    search = Search(bundle, env, budget, test, options, out, watch)
    search.measure_baseline()
    search.worth_it()
    if resume:
        search.recall_record()
    control = None
    with _interruptible(search):
        search.explore()
        control = search.run_control()
        search.tune_finalists()
    return _conclude(search, control)


def _counted(bundle: Bundle) -> None:
    """Refuse weights that are NaN, by the name of their layer: every comparison with such a model would be one with nothing."""
    for name, tensor in bundle.model.state.items():
        wrong = int(tensor.isnan().sum()) if tensor.is_floating_point() else 0
        if wrong:
            layer = name.rpartition(".")[0] or name
            raise DataError(f"layer {layer} holds {wrong:,} NaN weights of {tensor.numel():,}; train the model again")


@contextlib.contextmanager
def _interruptible(search: Search) -> Iterator[None]:
    """Ctrl-C ends the exploration, not the process: what was found is still put to the proof."""
    try:
        yield
    except KeyboardInterrupt:
        search.interrupted = True
        search.say("stop", "interrupted: going to the proof with what was found")


def _conclude(search: Search, control: Trial | None) -> Outcome:
    finalists = search.sequence(control)
    proven, control = search.proof(finalists, control)
    chosen, best = _timed(search, proven)
    result = _result(search, chosen, control, best)
    if search.out is not None:
        if chosen is not None:
            save(best, search.out / "best")
        write(search.out / "result.json", dumps(result))
    if not finalists:
        raise _infeasible(search)
    return Outcome(result, best, search.bundles[_key(finalists[0].plan)])


def _timed(search: Search, proven: Sequence[Trial]) -> tuple[Trial | None, Bundle]:
    """The cheapest proven plan that keeps the budget when timed at length beside the given model, and its bundle.

    Where all miss it by now (a busy machine), the cheapest is kept and its trial says what it misses.
    """
    bench = dataclasses.replace(search.bench, seconds=5 * search.timing)
    fallback: tuple[Trial, Bundle, Cost] | None = None
    for trial in proven:
        bundle = search.bundles[_key(trial.plan)]
        slow, fast = race([search.bundle, bundle], bench, search.env.allow)
        missed = search._misses(fast, bundle, slow)
        final = dataclasses.replace(trial, measured=fast, note="; ".join(missed), guards=_guards(search, bundle))
        search._swap(trial, final)
        if not missed:
            search.base = slow
            return final, bundle
        fallback = fallback or (final, bundle, slow)
    if fallback is None:
        return None, search.bundle
    search.base = fallback[2]
    return fallback[:2]


def _guards(search: Search, best: Bundle) -> tuple[Quality, ...]:
    """The retrieval stage before and after, where there is one."""
    assert search.env.train is not None
    try:
        given = search.test, "recall@100", [search.env.train], search.env.allow
        before, after = (outcomes(b, *given) for b in (search.bundle, best))
    except ConfigError:
        return ()
    return (prove.judge("recall@100", prove.means(before, after), 0.01),)


def _infeasible(search: Search) -> Infeasible:
    tried = [t for t in search.trials if t.measured is not None and t.validation is not None and t.name != "control"]
    frontier = tuple(sorted(tried, key=search._objective))[:5]
    metric = search.options.metric
    missing = tuple(
        t.note or f"{metric} drops by {t.validation.drop:.4f} on validation, the margin is {search.margin:g}"
        for t in frontier
        if t.validation
    )
    lines = [f"  {_short(t)}: {m}" for t, m in zip(frontier, missing, strict=True)]
    if not tried:
        left = [f"{u.path or 'the model itself'} ({u.kind}, {size(u.bytes)})" for u in _untouched(search)]
        left += [f"{pattern} (as asked)" for pattern in search.options.skip]
        notes = dict.fromkeys(t.note for t in search.trials if t.note)
        why = "; ".join(notes) or f"left alone: {', '.join(left) or 'nothing'}"
        return Infeasible(f"nothing in the model could be made smaller, which is {size(search.base.bytes)}; {why}")
    return Infeasible(
        f"nothing tried meets {search.budget.describe()}. The nearest, and what each lacks:\n" + "\n".join(lines)
        + "\nAllow more compute, a larger margin, or a larger limit.", frontier, missing,
    )  # fmt: skip


def _untouched(search: Search) -> list[Untouched]:
    return untouched(search.bundle.model.build(search.env.allow))


def _short(trial: Trial) -> str:
    spent = trial.measured
    assert spent is not None
    return f"{trial.plan.describe()} ({size(spent.bytes)}, p99 {spent.p99_ms:.2f} ms)"


def _result(search: Search, chosen: Trial | None, control: Trial | None, best: Bundle) -> Result:
    o = search.options
    tried = chosen or next((t for t in search.trials if t.proof is not None), None)
    quality = search._deciding(tried.proof, tried.against_control) if tried and tried.proof else None
    own = search._compared(search.base_scores, search.base_scores, 0)
    baseline = Trial("baseline", Plan(), search.base, search.base, None, own, note=search.threads_note)
    savings = _savings(search, chosen, best)
    if quality is not None:
        verdict, explanation = quality.verdict, prove.explain(quality)
    else:
        verdict, explanation = (
            "cannot tell",
            "no plan within the budget held its quality on the validation rows; nothing was put to the test",
        )
    return Result(
        model=o.model,
        budget=search.budget.describe(),
        baseline=baseline,
        control=control,
        chosen=chosen,
        trials=tuple(t for t in search.trials if t.name != "control"),
        parts_before=search.before,
        parts_after=parts(best, search.bench, search.env.allow) if chosen else (),
        epochs=(*o.epochs_before, *search.epochs),
        references=o.references,
        verdict=verdict,
        explanation=explanation + (" (interrupted before the search was done)" if search.interrupted else ""),
        seconds=time.monotonic() - search.started,
        compute_cap_s=o.seconds,
        seed=search.env.seed,
        machine=hardware.machine(),
        versions=hardware.versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        data=o.data,
        request=search.request,
        price=o.price,
        skip=o.skip,
        savings=savings,
        tuning=tuple(search.tuned),
    )


def _savings(search: Search, chosen: Trial | None, best: Bundle) -> tuple[str, ...]:
    price = search.options.price
    if price is None or chosen is None or chosen.measured is None:
        return ()
    before = money(search.base, search.bundle.runtime.threads, price)
    after = money(chosen.measured, best.runtime.threads, price)
    asked = f"{price.currency} per million requests of {search.request}"
    return (f"{before:.4g} -> {after:.4g} {asked}: {1 - after / before if before else 0.0:.0%} saved",)


def _alike(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials by structure and training, in order: what differs in data types only runs fastest the same way."""
    found: dict[Structure, list[Trial]] = {}
    for trial in trials:
        shape = tuple(t for t in trial.plan.transforms if t.stage in ("structure", "training"))
        found.setdefault(shape, []).append(trial)
    return list(found.values())


def _bound(trial: Trial) -> float:
    assert trial.validation is not None
    return trial.validation.drop_upper_95 if math.isfinite(trial.validation.drop_upper_95) else math.inf


def _tuned(plan: Plan, timing: Timing) -> Tuned:
    runtime, taken = timing.runtime, timing.latency
    words = SetRuntime(runtime.engine, runtime.threads, runtime.batch).describe()
    chosen = timing.note == CHOSEN
    note = "" if chosen else timing.note
    return Tuned(plan.describe(), words.removeprefix("run with "), taken.p50_ms if taken else None, note, chosen)


def _threads() -> tuple[int, ...]:
    cores = hardware.detect().cpu.cores
    return tuple(sorted({1, max(1, cores // 2), cores}))


def _users(data: Dataset) -> npt.NDArray[Any] | None:
    """Who each row belongs to; None where the data knows no users."""
    try:
        return data.column(data.schema.user.name)
    except ConfigError:
        return None


def _key(made: Plan) -> str:
    return hashlib.sha256(dumps(made).encode()).hexdigest()[:16]
