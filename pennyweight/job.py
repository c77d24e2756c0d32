"""The main job in steps, each leaving its folder behind: train a model, then optimize it under a budget.

A *run* is a folder that holds all the next step needs, so that steps can be repeated, resumed and looked into:

    run/
      data/            the prepared dataset
      bundle/          the trained model
      run.json         how it was split and trained, and every epoch of it
      events.db        what its users did, for serving
      best/            after optimize: the bundle to deploy
      result.json      after optimize: the whole record; report.html and summary.json are drawn from it

The command line, the demo and a notebook call the same functions; nothing here prints.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight.core.budget import Budget
from pennyweight.core.config import dumps, loads, write
from pennyweight.core.errors import ConfigError, DataError, Infeasible
from pennyweight.data.dataset import Dataset, How, Split
from pennyweight.data.events import EventLog
from pennyweight.distribute import launch
from pennyweight.distribute.launch import Many
from pennyweight.model import ranking, retrieval, sequential, sparse
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.cascade import Cascade
from pennyweight.model.pace import Pace, search
from pennyweight.model.spec import Model, Spec, seeded, spec_of
from pennyweight.model.train import EpochLog, Fit, Progress, Recipe, fit
from pennyweight.model.transform import Env
from pennyweight.optimize.search import Options, Outcome, Step, optimize
from pennyweight.optimize.trial import Epoch, Result
from pennyweight.report import render, summary

MODELS: Mapping[str, type[torch.nn.Module]] = {
    "dnn": ranking.DNN,
    "deepfm": ranking.DeepFM,
    "dcnv2": ranking.DCNv2,
    "dlrm": ranking.DLRM,
    "mf": retrieval.MatrixFactorization,
    "two-tower": retrieval.TwoTower,
    "sasrec": sequential.SASRec,
}
"""Models by the name the command line takes."""

USUAL: Mapping[str, tuple[str, str]] = {"two-tower": ("sampled-softmax", "ndcg@10"), "sasrec": ("gbce", "ndcg@10")}
"""Loss and validation metric of models that are not trained row by row with ``bce`` and ``auc``."""

Watch = Callable[[Progress | EpochLog], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model was trained: what recovery and proof must know to treat it fairly."""

    name: str
    """The model's name, as in ``MODELS``."""
    split: How
    fractions: tuple[float, float, float]
    recipe: Recipe
    seed: int
    epochs: tuple[Epoch, ...] = ()
    seconds: float = 0.0
    data: str = ""
    """One line on the data."""
    references: tuple[tuple[str, float], ...] = ()
    """Simple models on the same test rows."""


def train(
    data: Dataset,
    name: str,
    args: Mapping[str, Any],
    recipe: Recipe,
    out: Path,
    *,
    inputs: tuple[str, ...] = (),
    split: How = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    describe: str = "",
    allow: tuple[str, ...] = (),
    watch: Watch = lambda _: None,
    paced: bool = False,
    many: Many | None = None,
) -> Run:
    """Train a model and leave a run folder.

    ``paced`` looks for the fastest batch size and number of threads first (``model/pace``), in place of the recipe's batch.

    ``many`` lets several workers train it (``distribute/launch``); the run is the same but for the order sums are taken in.

    ``name`` is one of ``MODELS``, or the import path ``package.module:factory`` of the user's own, which ``allow`` must hold;
    ``inputs`` are the columns its ``forward`` takes one by one.

    Raises:
        ConfigError: no such model, one that is not allowed, or args it does not take.
        DataError: the split leaves a part empty, or the loss is no longer a number.
    """
    if name not in MODELS and ":" not in name:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(MODELS)}, or your own as package.module:factory")
    parts = data.split(split, fractions, seed)
    spec = Spec(name, args, {}, inputs) if ":" in name else spec_of(MODELS[name], columns=data.schema.columns, **args)
    if paced:
        recipe = _paced(spec, parts, recipe, seed, out, allow)
    if many is None:
        model, fitted = trained(spec, parts, recipe, seed, out / "checkpoint", watch, allow)
    else:
        if not launch.place(many.hosts):
            _stored(out, data)
        model, told = launch.train(
            spec, out / "data", (split, fractions), recipe, seed, out / "workers", many, allow=allow, watch=watch
        )
        fitted = told.fit
        if launch.place(many.hosts):  # the first host writes the run
            return Run(name, split, fractions, recipe, seed, epochs("baseline", fitted), fitted.seconds, describe)
        if fitted.stopped != "interrupted":  # other hosts may be reading what was fitted
            shutil.rmtree(out / "workers" / "checkpoint" if many.hosts else out / "workers", ignore_errors=True)
    run = Run(name, split, fractions, recipe, seed, epochs("baseline", fitted), fitted.seconds, describe)
    keep(out, Bundle(model, catalog=parts.train.catalog), data, run)
    return run


def _paced(spec: Spec, parts: Split, recipe: Recipe, seed: int, out: Path, allow: tuple[str, ...]) -> Recipe:
    """The recipe with the fastest batch size, the process with as many threads; as found before for a training gone on with."""
    file = out / "pace.json"
    if file.exists() and (out / "checkpoint").exists():
        found = loads(Pace, file.read_bytes(), str(file))
    else:
        found = search(seeded(spec, seed, allow), parts.train, recipe, inputs=spec.inputs)
        write(file, dumps(found))
    torch.set_num_threads(found.best.threads)
    return dataclasses.replace(recipe, batch=found.best.batch)


def trained(
    spec: Spec, parts: Split, recipe: Recipe, seed: int, checkpoint: Path | None, watch: Watch, allow: tuple[str, ...] = ()
) -> tuple[Model, Fit]:
    """The model a spec becomes by training, and its record; a checkpoint of an interrupted training is gone on from."""
    module = seeded(spec, seed, allow)
    fitted = fit(module, parts.train, parts.valid, recipe, inputs=spec.inputs, seed=seed, checkpoint=checkpoint, progress=watch)
    if checkpoint is not None and fitted.stopped != "interrupted":
        checkpoint.unlink(missing_ok=True)
    made = {path: layer for path, layer in sparse.layers(module).items() if path not in spec.layers}
    return Model.of(module, spec.with_layers(made)), fitted


def cascade(retriever: Model, ranker: Model) -> Model:
    """Two trained models as the two stages of one."""
    stages = {"retrieval": retriever, "ranking": ranker}
    args: dict[str, Any] = {name: {"factory": m.spec.factory, "args": dict(m.spec.args)} for name, m in stages.items()}
    state = {f"{name}.{key}": value for name, m in stages.items() for key, value in m.state.items()}
    return Model(spec_of(Cascade, **args), state)


def epochs(name: str, fitted: Fit) -> tuple[Epoch, ...]:
    """A training's epochs as the report takes them."""
    return tuple(Epoch(name, e.epoch, e.loss, e.metric, e.seconds) for e in fitted.history)


def keep(out: Path, bundle: Bundle, data: Dataset, run: Run) -> None:
    """Write a run folder: data, bundle, record, and the training events of its users."""
    _stored(out, data)
    save(bundle, out / "bundle")
    write(out / "run.json", dumps(run))
    if data.schema.role("user") and data.schema.role("item") and data.schema.role("time"):
        with EventLog(out / "events.db") as log:
            log.import_dataset(data.split(run.split, run.fractions, run.seed).train)


def _stored(out: Path, data: Dataset) -> None:
    if not (out / "data" / "dataset.json").exists() or Dataset.open(out / "data").fingerprint != data.fingerprint:
        data.save(out / "data")


def open_run(folder: Path) -> tuple[Run, Bundle, Dataset, Split]:
    """What a run folder holds.

    Raises:
        DataError: it is not a run folder.
    """
    file = folder / "run.json"
    if not file.is_file():
        raise DataError(f"{folder} is no run (no run.json); make one with: pennyweight train DATA --out {folder}")
    run = loads(Run, file.read_bytes(), str(file))
    data = Dataset.open(folder / "data")
    return run, load(folder / "bundle"), data, data.split(run.split, run.fractions, run.seed)


def located(folder: Path) -> tuple[Path | None, Path]:
    """The run that a folder is, or that it lies in as a bundle, and the bundle; None for a bundle without a run."""
    if (folder / "run.json").is_file() or not (folder / "manifest.json").is_file():
        return folder, folder / "bundle"
    run = folder.absolute().parent
    return (run if (run / "run.json").is_file() else None), folder


def improve(
    folder: Path,
    budget: Budget,
    options: Options,
    *,
    bundle: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    allow: tuple[str, ...] = (),
    watch: Callable[[Step], None] = lambda _: None,
) -> Outcome:
    """Optimize a run's bundle under a budget; the record, the report and the best bundle go to ``out`` (the run itself).

    ``bundle`` is another of the run's bundles to start from. It is judged by the metric that the budget names, or else by
    the run's own.

    Raises:
        DataError: ``folder`` is no run.
        NotWorthIt, Infeasible: see ``optimize``.
    """
    target = out or folder
    run, given, _, parts = open_run(folder)
    given = given if bundle is None else load(bundle)
    named = [m for m in (*budget.margins, *budget.relative) if m != "quality"]
    env = Env(train=parts.train, valid=parts.valid, calib=parts.train, recipe=run.recipe, seed=run.seed, allow=allow)
    rows = f"{len(parts.train):,} / {len(parts.valid):,} / {len(parts.test):,} rows, split by {run.split}"
    options = dataclasses.replace(
        options,
        model=run.name,
        metric=run.recipe.metric if run.recipe.metric in named or not named else named[0],
        data=f"{run.data} {rows}".strip(),
        references=run.references,
        epochs_before=run.epochs,
    )
    try:
        outcome = optimize(given, env, budget, parts.test, options, out=target, resume=resume, watch=watch)
    except Infeasible:
        draw(target)
        raise
    draw(target)
    return outcome


def draw(folder: Path) -> None:
    """The report and the summary of the record in a folder, beside it."""
    result = loads(Result, (folder / "result.json").read_bytes(), str(folder / "result.json"))
    write(folder / "report.html", render(result))
    write(folder / "summary.json", dumps(summary(result)))
