"""Any model, not only recommenders: how much smaller and faster, and what is lost, in four applications.

Each is the example of its name, run on public data; the baseline must first reach what is published or what another kind of
model reaches. Training is compared with ``keras.fit``, in turns, each framework at its faster number of threads, with
the same optimizer, batch and epochs.

Folds are searched and then timed. Only the timing needs a quiet machine, so ``--search`` does the searches alone, one process
a row if one likes (``OMP_NUM_THREADS=1``), into ``--cache``; a run with that folder then takes minutes. What was found is tuned
to the machine again before it is timed, beside the given model at its faster number of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

import pennyweight
from benchmarks import harness
from benchmarks.harness import Options, Row
from examples import credit, digits, images, text
from pennyweight.accelerate.tune import tune
from pennyweight.core.errors import Infeasible
from pennyweight.data import loaders
from pennyweight.data.dataset import Dataset, Split
from pennyweight.model import graph, keras, metrics
from pennyweight.model.bundle import Bundle, Runtime, load, save
from pennyweight.model.spec import Model
from pennyweight.model.train import Fit, Recipe, scores
from pennyweight.optimize import prove
from pennyweight.optimize.evaluate import Bench, race
from pennyweight.optimize.evaluate import scores as run
from pennyweight.optimize.prove import Comparison
from pennyweight.optimize.search import Outcome
from pennyweight.optimize.trial import Cost, Trial

QUICK = "bytes <= 100MB, quality drop <= 0.5"
"""The budget of a quick run, which anything meets."""
ROUNDS = 5
FOLDS = 10
ROWS = 100
"""Rows of the request that is timed."""


@dataclasses.dataclass(frozen=True)
class Setting(Options):
    """What was asked for."""

    cache: Path
    """Folder of what searches came to."""


@dataclasses.dataclass(frozen=True)
class Bars:
    """What an application must reach."""

    smaller: float
    faster: float
    margin: float
    rows: int = ROWS
    """Rows scored at once where speed is compared."""


def compressed(
    id: str, model: Any, parts: Split, budget: str, recipe: Recipe, fit: Fit, bars: Bars, o: Setting
) -> tuple[list[Row], pennyweight.Bundle | None]:
    """The rows of one optimization and its bundle; ``bars.rows`` are scored at once."""
    settings: dict[str, Any] = (
        {"seconds": 20, "tries": 1, "epochs": 1, "force": True} if o.quick else {"seconds": 300, "epochs": 15}
    )
    settings |= {"recipe": recipe, "trained": fit, "rows": bars.rows}
    try:
        outcome = pennyweight.optimize(model, parts, QUICK if o.quick else budget, **settings)  # type: ignore[operator]
    except Infeasible as error:
        return [Row(id, "compression_ratio", 1, 1, 1, bar=bars.smaller, note=str(error).splitlines()[0])], None
    return rows_of(id, outcome, bars), outcome.bundle


def rows_of(id: str, outcome: Outcome, bars: Bars) -> list[Row]:
    """What came of it against its bars; a plan that was not proven is shown as what it is."""
    result = outcome.result
    shown = result.chosen or next((t for t in result.trials if t.proof), None)
    if shown is None:
        return [
            Row(id, "compression_ratio", 1, 1, 1, bar=bars.smaller, note=f"nothing to put to the proof: {result.explanation}")
        ]
    before, after, proof = _spent(result.baseline), _spent(shown), shown.proof
    assert proof is not None and result.baseline.proof is not None
    name, value = proof.metric, proof.baseline
    note = f"{result.verdict}; {shown.plan.describe()}; {name} {value:.4f} -> {proof.value:.4f} on {proof.rows:,} rows"
    smaller = before.bytes / after.bytes
    p50, p99 = before.p50_ms / after.p50_ms, before.p99_ms / after.p99_ms
    timed = f"p50 of {bars.rows:,} rows, {before.p50_ms:.3f} -> {after.p50_ms:.3f} ms; p99 {p99:.2f}x; range: p50 and p99"
    told = f"the 95 % bound of the drop in {name}; drop {proof.drop:.4f}"
    control = f"; the control gains {-result.control.proof.drop:.4f}" if result.control and result.control.proof else ""
    return [
        Row(id, "compression_ratio", smaller, smaller, smaller, bar=bars.smaller, baseline=value, note=note),
        Row(id, "speedup", p50, min(p50, p99), max(p50, p99), bar=bars.faster, note=timed),
        Row(
            id, "drop_upper_95", proof.drop_upper_95, proof.drop_low_95, proof.drop_upper_95,
            bar=bars.margin, at_most=True, note=told + control,
        ),
    ]  # fmt: skip


def _spent(trial: Trial) -> Cost:
    assert trial.measured is not None
    return trial.measured


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="pennyweight-applications-"))


def keras_mnist(o: Setting) -> list[Row]:
    """The classic: training against ``keras.fit``, then compression."""
    parts = loaders.mnist(o.data / "mnist-5k", _folder() / "mnist")
    recipe = dataclasses.replace(digits.RECIPE, epochs=2 if o.quick else 10)
    both = [train_times(parts, recipe, threads, 2 if o.quick else ROUNDS) for threads in sorted({1, torch.get_num_threads()})]
    theirs = min((t[0] for t in both), key=np.median)
    ours = min((t[1] for t in both), key=np.median)
    ratios = np.asarray(theirs) / np.asarray(ours)
    accuracies = [np.mean([t[k] for t in both]) for k in (2, 3)]
    note = (
        f"median of {len(ours)} trainings in turns, each at its faster number of threads; range of the ratio; keras.fit "
        f"{np.median(theirs):.2f} s, test accuracy {accuracies[0]:.4f}; ours {np.median(ours):.2f} s, {accuracies[1]:.4f}, "
        "both with validation after each epoch, Keras' in one batch"
    )
    speedup = float(np.median(theirs) / np.median(ours))
    training = Row(
        "keras-mnist", "training_speedup", speedup, float(ratios.min()), float(ratios.max()), bar=5, note=note,
        peer=f"keras {digits.keras.__version__} on torch {torch.__version__}", peer_value=float(np.median(theirs)),
    )  # fmt: skip
    return [training, *pooled("keras-mnist", folds("keras-mnist", o), Bars(10, 3, 0.003, 1000))]


def _digits(fold: int, o: Setting) -> Question:
    parts = loaders.mnist(o.data / "mnist-5k", _folder() / f"mnist-{fold}", fold=fold)

    def search() -> Pair:
        model, fit = digits.trained(parts, fold)
        return searched(model, model, parts, digits.BUDGET, digits.RECIPE, fit, 1000, {"epochs": 40}, o)

    return Question(parts, 1000, search)


def train_times(parts: Split, recipe: Recipe, threads: int, rounds: int) -> tuple[list[float], list[float], float, float]:
    """Seconds of ``keras.fit`` and of ours, and both mean test accuracies, with so many threads; the first round warms up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, y = parts.train.column("x"), parts.train.column("label")
    held = parts.valid.column("x"), parts.valid.column("label")
    test, right = parts.test.column("x"), parts.test.column("label")
    theirs, ours, found = [], [], []
    try:
        for seed in range(rounds + 1):
            network = digits.network(seed)
            began = time.perf_counter()
            network.fit(x, y, recipe.batch, recipe.epochs, verbose=0, validation_data=held, validation_batch_size=len(held[1]))
            theirs.append(time.perf_counter() - began)
            given = keras.of(digits.network(seed), logits=True)
            module = given.build(copy=True)
            began = time.perf_counter()
            pennyweight.fit(module, parts.train, parts.valid, recipe, inputs=given.spec.inputs, seed=seed)
            ours.append(time.perf_counter() - began)
            mine = scores(module, parts.test, inputs=given.spec.inputs).argmax(1)
            found.append((np.mean(network.predict(test, verbose=0).argmax(1) == right), np.mean(mine == right)))
    finally:
        torch.set_num_threads(before)
    accuracy = np.mean(found, 0)
    return theirs[1:], ours[1:], float(accuracy[0]), float(accuracy[1])


def cnn_mnist(o: Setting) -> list[Row]:
    """Images."""
    parts = loaders.mnist(o.data / "mnist-5k", _folder() / "mnist")
    net, fit = images.trained(parts)
    accuracy = _quality("accuracy", net, parts.test, ["x"])
    first = Row("cnn-mnist", "baseline", accuracy, accuracy, accuracy, bar=0.96, note="test accuracy of the given network")
    rest, _ = compressed("cnn-mnist", net, parts, images.BUDGET, images.RECIPE, fit, Bars(8, 2, 0.01), o)
    return [first, *rest]


def movie_review(o: Setting) -> list[Row]:
    """Text: ten folds for the baseline and for the proof, whose rows are put together."""
    id = "text-cnn/movie-review"
    found = folds(id, o)
    base = [f.accuracy for f in found]
    note = f"test accuracy over {len(base)} folds"
    first = Row(id, "baseline", float(np.mean(base)), min(base), max(base), bar=0.75, note=note)
    return [first, *pooled(id, found, Bars(10, 2, 0.01))]


def sms_spam(o: Setting) -> list[Row]:
    """Text again, where the classes are uneven: one split."""
    id = "text-cnn/sms-spam"
    found = folds(id, o)
    base = found[0].accuracy
    return [Row(id, "baseline", base, base, base, note="test accuracy"), *pooled(id, found, Bars(10, 2, 0.01))]


def _review(fold: int, o: Setting) -> Question:
    return _text(loaders.movie_review(o.data / "movie-review", _folder() / f"review-{fold}", fold=fold), fold, o)


def _spam(_: int, o: Setting) -> Question:
    return _text(loaders.sms_spam(o.data / "sms-spam", _folder() / "spam"), 0, o, seconds=400)


def _text(parts: Split, seed: int, o: Setting, seconds: float = 260) -> Question:
    def search() -> Pair:
        net, fit = text.trained(parts, seed)
        length = parts.train.schema["text"].length
        given = graph.of(net, (torch.zeros(2, length, dtype=torch.int64),), ("text",))
        settings = {"seconds": seconds, "epochs": 3, "tries": 1, "teachers": 0}
        return searched(net, given, parts, text.BUDGET, text.RECIPE, fit, ROWS, settings, o)

    return Question(parts, ROWS, search)


def _credit(fold: int, o: Setting) -> Split:
    return loaders.credit_default(o.data / "credit-default", _folder() / f"credit-{fold}", fold=fold)


def _risk(fold: int, o: Setting) -> Question:
    parts = credit.normal(_credit(fold, o))

    def search() -> Pair:
        model, fit = credit.trained(parts, fold)
        return searched(model, model, parts, credit.BUDGET, credit.RECIPE, fit, ROWS, {"seconds": 300, "epochs": 15}, o)

    return Question(parts, ROWS, search)


Pair = tuple[Bundle, Bundle]
"""The model as given, and the best of the search."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One fold: its rows, how many are timed at once, and the search."""

    parts: Split
    rows: int
    search: Callable[[], Pair]


FOLDED: dict[str, tuple[int, Callable[[int, Setting], Question]]] = {
    "keras-mnist": (5, _digits),
    "text-cnn/movie-review": (10, _review),
    "text-cnn/sms-spam": (1, _spam),
    "credit": (5, _risk),
}
"""How many folds a row has, and one of them."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """What came of one fold."""

    smaller: float
    faster: float
    plan: str
    labels: Any
    outputs: tuple[Any, Any]
    """Of the given model and of the best of the search, on the test rows."""

    @property
    def right(self) -> tuple[Any, Any]:
        """1 where each is right."""
        given, best = (_right(o, self.labels) for o in self.outputs)
        return given, best

    @property
    def accuracy(self) -> float:
        """Of the given model."""
        return float(self.right[0].mean())


def folds(id: str, o: Setting) -> list[Fold]:
    """All folds of a row, searched if they were not yet, then timed."""
    return [timed(question, found(id, fold, question, o)) for fold, question in questions(id, o)]


def questions(id: str, o: Setting) -> Iterator[tuple[int, Question]]:
    """The folds of a row, one after the other."""
    count, of = FOLDED[id]
    yield from ((fold, of(fold, o)) for fold in range(1 if o.quick else count))


def found(id: str, fold: int, question: Question, o: Setting) -> Pair:
    """What a fold's search came to, from the cache where it is there."""
    folder = o.cache / id / f"fold-{fold}"
    names = ("given", "best")
    if not all((folder / name / "manifest.json").exists() for name in names):
        for name, bundle in zip(names, question.search(), strict=True):
            save(bundle, folder / name)
    return load(folder / "given"), load(folder / "best")


def searched(
    model: Any,
    given: Model,
    parts: Split,
    budget: str,
    recipe: Recipe,
    fit: Fit,
    rows: int,
    settings: dict[str, Any],
    o: Setting,
) -> Pair:
    """One fold's optimization; what its own thousand rows cannot prove, all folds' together may, so the safest goes to that.

    Where nothing kept the budget the model stays as it is.
    """
    if o.quick:
        settings = {"seconds": 20, "epochs": 1, "tries": 1, "teachers": 0, "force": True}
    settings = {**settings, "recipe": recipe, "trained": fit, "rows": rows}
    before = Bundle(given, catalog=parts.train.catalog)
    try:
        outcome = pennyweight.optimize(model, parts, QUICK if o.quick else budget, **settings)  # type: ignore[operator]
        return before, outcome.bundle if outcome.result.chosen else outcome.safest
    except Infeasible:
        return before, before


def timed(question: Question, pair: Pair) -> Fold:
    """The given model with one thread and with the default, of which the faster counts, and the best tuned to this machine."""
    (before, best), (_, valid, test) = pair, question.parts
    one = before.replace(runtime=dataclasses.replace(before.runtime, threads=1))
    best = _tuned(best, valid, question.rows) if best.plan else best
    *given, after = race([before, one, best], Bench.of(test, question.rows))
    plan = " + ".join(str(step["transform"]) for step in best.plan) or "as given"
    faster = min(c.p50_ms for c in given) / after.p50_ms
    outputs = run(before, test), run(best, test)
    return Fold(before.bytes / after.bytes, faster, plan, test.column("label").astype(np.float64), outputs)


def _tuned(bundle: Bundle, valid: Dataset, rows: int) -> Bundle:
    requests = [make() for make in Bench.of(valid, rows).requests[:8]]
    chosen, _ = tune(bundle, requests, seconds=15, engines=("eager", "onnxruntime"))
    return bundle.replace(runtime=Runtime(chosen.engine, chosen.threads, chosen.batch))


def _right(scores: Any, labels: Any) -> Any:
    answer = scores.argmax(1) if scores.ndim == 2 else scores > 0
    return (answer == labels).astype(np.float64)


def accuracies(folds: Sequence[Fold]) -> Comparison:
    """One test of all folds' rows."""
    return prove.means(*(np.concatenate([f.right[k] for f in folds]) for k in range(2)))


def aucs(folds: Sequence[Fold]) -> Comparison:
    """The mean over folds: logits of models trained apart have no common order, and their rows are not shared."""
    each = [prove.delong(f.labels, *f.outputs) for f in folds]
    rows, se = sum(c.rows for c in each), float(np.sqrt(sum(c.se**2 for c in each))) / len(each)
    base, value, drop = (float(np.mean([getattr(c, name) for c in each])) for name in ("baseline", "value", "drop"))
    half = float(NormalDist().inv_cdf(prove.CONFIDENCE)) * se
    return Comparison(rows, base, value, drop, se, drop - half, drop + half, f"DeLong, mean of {len(each)} folds")


def pooled(
    id: str,
    folds: Sequence[Fold],
    bars: Bars,
    metric: str = "accuracy",
    of: Callable[[Sequence[Fold]], Comparison] = accuracies,
) -> list[Row]:
    """Folds as rows: mean and range of size and speed, one proof over all test rows."""
    smaller, faster = ([getattr(f, name) for f in folds] for name in ("smaller", "faster"))
    joined = prove.judge(metric, of(folds), bars.margin)
    told = (
        f"{joined.verdict} on the {joined.rows:,} test rows of {len(folds)} folds together; {metric} {joined.baseline:.4f} -> "
        f"{joined.value:.4f}, drop {joined.drop:.4f}"
    )
    plans = " | ".join(sorted({f.plan for f in folds}))
    bound = joined.drop_upper_95
    return [
        Row(id, "compression_ratio", float(np.mean(smaller)), min(smaller), max(smaller), bar=bars.smaller, note=plans),
        Row(
            id,
            "speedup",
            float(np.mean(faster)),
            min(faster),
            max(faster),
            bar=bars.faster,
            note=f"p50 of {bars.rows:,} rows, in turns, the given model at its faster number of threads",
        ),
        Row(id, "drop_upper_95", bound, joined.drop_low_95, bound, bar=bars.margin, at_most=True, note=told),
    ]


def risk(o: Setting) -> list[Row]:
    """Financial risk: level with gradient boosting, and calibrated as before."""
    found = folds("credit", o)
    mine = [metrics.auc(f.labels, f.outputs[0]) for f in found]
    boosted = [boosting(_credit(fold, o), o.quick) for fold in range(len(found))]
    note = (
        f"test AUC, mean of {len(found)} folds; gradient boosting chosen on validation among learning rates and leaves; bar: "
        "within .01 of it"
    )
    peer, value, beside = "scikit-learn HistGradientBoosting", float(np.mean(mine)), float(np.mean(boosted))
    level = Row(
        "credit", "baseline", value, min(mine), max(mine), len(mine), bar=beside - 0.01, peer=peer, peer_value=beside, note=note
    )
    return [level, *pooled("credit", found, Bars(8, 3, 0.003), "auc", aucs), _calibrated(found)]


def _calibrated(folds: Sequence[Fold]) -> Row:
    """Expected calibration error before and after, on the same rows."""
    error, labels = metrics.METRICS["calibration_error"].of, np.concatenate([f.labels for f in folds])
    before, after = (error(labels, np.concatenate([f.outputs[k] for f in folds])) for k in range(2))
    each = [error(f.labels, f.outputs[1]) for f in folds]
    note = f"test rows of all folds; 15 bins; given {before:.4f}; bar: .005 above it; range: each fold by itself"
    return Row(
        "credit", "calibration_error", after, min(each), max(each), len(each), before + 0.005, before, note=note, at_most=True
    )


def boosting(parts: Split, quick: bool) -> float:
    """Test AUC of gradient boosting at its best setting on validation."""
    names = [c.name for c in parts.train.schema.features]
    coded = [c.kind == "categorical" for c in parts.train.schema.features]
    x = [np.stack([p.column(n).astype(np.float64) for n in names], 1) for p in parts]
    y = [p.column("label") for p in parts]
    best = (0.0, 0.0)
    for rate in (0.05,) if quick else (0.03, 0.05, 0.1):
        for leaves in (8,) if quick else (8, 16, 31):
            trees = HistGradientBoostingClassifier(
                learning_rate=rate, max_leaf_nodes=leaves, max_iter=400, early_stopping=True, l2_regularization=1.0,
                categorical_features=coded, random_state=0,
            ).fit(x[0], y[0])  # fmt: skip
            valid, test = (metrics.auc(y[k], trees.decision_function(x[k])) for k in (1, 2))
            best = max(best, (valid, test))
    return best[1]


def _quality(metric: str, net: torch.nn.Module, data: Dataset, inputs: Sequence[str] = ()) -> float:
    return metrics.METRICS[metric].of(data.column("label"), scores(net, data, inputs=inputs))


MEASURED: dict[str, Callable[[Setting], list[Row]]] = {
    "keras-mnist": keras_mnist,
    "cnn-mnist": cnn_mnist,
    "text-cnn/movie-review": movie_review,
    "text-cnn/sms-spam": sms_spam,
    "credit": risk,
}


def main(argv: Sequence[str]) -> None:
    """Everything, or the rows asked for with --only."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--cache", type=Path, help="folder for what searches came to; a new one after a change (default: none)")
    own.add_argument("--search", action="store_true", help="search the folds of --only into --cache, and time nothing")
    asked, rest = own.parse_known_args(argv)
    cache = (asked.cache or _folder() / "found").absolute()
    if not asked.search:
        rows = {id: lambda o, of=of: of(Setting(o.quick, o.data, o.seeds, cache)) for id, of in MEASURED.items()}  # type: ignore[misc]
        return harness.run("applications", rows, timed=True, argv=argv, parents=[own])
    given = harness.arguments("applications", FOLDED, 1, rest)
    for id in given.only or FOLDED:
        for fold, question in questions(id, o := Setting(given.quick, given.data, given.seeds, cache)):
            print(id, fold, found(id, fold, question, o)[1].plan, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
