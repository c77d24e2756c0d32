"""One call for any model: ``pennyweight.optimize(model, data, budget=...)``.

A live PyTorch module or Keras model, an ONNX file, a ``.keras`` file or a SavedModel becomes a Model; arrays or a loader
become a Dataset; the task (and with it the loss and the metric) is read off the labels and the model's outputs. From there
on it is the same search with the same proof as for a recommender, so nothing here decides about quality. A wrapper a
framework would be the alternative, and as many meanings of "as good".

What is inferred is said in the result's line on the data, and each can be given instead. What it costs: a model must be one
whose structure can be read (see ``model.graph``), and rows the model was trained on prove nothing, so give ``test``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from pennyweight.core import hardware
from pennyweight.core.budget import Budget, parse
from pennyweight.core.errors import ConfigError, DataError, DeviceError, Infeasible
from pennyweight.core.hardware import Topology
from pennyweight.data.arrays import EXAMPLE, Pairs
from pennyweight.data.dataset import Dataset, Split
from pennyweight.distribute.place import Place
from pennyweight.job import draw
from pennyweight.job import epochs as history
from pennyweight.model import graph, keras, onnx
from pennyweight.model.bundle import Bundle, load
from pennyweight.model.metrics import ranking
from pennyweight.model.spec import Model, call
from pennyweight.model.train import Fit, Recipe
from pennyweight.model.transform import Env
from pennyweight.optimize import search
from pennyweight.optimize.cost import Objective
from pennyweight.optimize.search import Against, Options, Outcome, Step
from pennyweight.progress import watching

Task = Literal["binary", "multi-class", "regression", "ranking"]

USUAL: dict[Task, tuple[Literal["bce", "cross-entropy", "mse", "bpr"], str]] = {
    "binary": ("bce", "auc"),
    "multi-class": ("cross-entropy", "accuracy"),
    "regression": ("mse", "mse"),
    "ranking": ("bpr", "ndcg@10"),
}
"""Loss and metric of a task."""

OF_TASK: dict[Task, tuple[str, ...]] = {
    "binary": ("auc", "accuracy", "log_loss", "normalized_entropy"),
    "multi-class": ("accuracy", "log_loss"),
    "regression": ("mse",),
}
"""Metrics that can be proven of a task; a ranking's are ``ndcg@K``, ``recall@K`` and ``hit_rate@K``."""

BATCH = 128
"""Rows a step of recovery, where no recipe is given."""


def optimize(
    model: Any,
    data: Any,
    budget: str | Budget = "quality drop <= 0.001",
    *,
    test: Any = None,
    task: Task | None = None,
    metric: str | None = None,
    nodes: int = 1,
    gpus: int = 0,
    inputs: Sequence[str] = (),
    recipe: Recipe | None = None,
    trained: Fit | None = None,
    rows: int = 100,
    seconds: float = 600.0,
    epochs: int = 10,
    tries: int = 3,
    teachers: int = 4,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    skip: Sequence[str] = (),
    objective: Objective = "cost",
    against: Against = "given",
    allow: Sequence[str] = (),
    watch: Callable[[Step], None] | None = None,
) -> Outcome:
    """Search for the cheapest deployment of a model that is proven as good as it is.

    Args:
        model: a ``torch.nn.Module``; a Keras 3 model (torch backend); a Model or Bundle; or the path of a ``.keras`` or ONNX
            file, of a TensorFlow SavedModel, or of a bundle.
        data: a Dataset, three of them as a Split, a pair ``(x, y)`` of arrays (``x`` a tuple or mapping for several inputs),
            or a loader of such pairs, read once into memory. Some of it trains recovery, some chooses.
        budget: what may be spent and lost, as in ``"bytes <= 60kB, accuracy drop <= 0.003"``.
        test: rows the model has not seen, in any of those forms, for the proof. Without it a tenth of ``data`` is taken,
            which is only fair if the model was not trained on it.
        task: inferred from labels and outputs if None.
        metric: the budget's, or the task's usual one, if None.
        nodes: machines of the placement.
        gpus: GPUs of the placement.
        inputs: columns that a module's ``forward`` takes, in order; all features if empty.
        recipe: how the model was trained; recovery carries it. Inferred from the task if None (Adam at 1e-3).
        trained: the record of the model's training by ``pennyweight.fit``, for the report.
        rows: rows of the request that is timed; for a recommender, candidates of one user.
        seconds: compute cap of the search, proof included; the control comes on top, at most as long again.
        epochs: epochs of recovery at most.
        tries: structures trained at most; 0 keeps to what needs no training.
        teachers: models trained from other seeds to teach beside the given one, in at most a third of ``seconds``; only
            with a recipe, since only then it is known how.
        seed: every random number follows from it.
        out: a folder for the best bundle, the record, the summary and the report.
        resume: take finished trials from ``out``.
        force: search even if the model is within the budget already.
        skip: patterns of paths of layers that nothing may touch.
        objective: what is made small within the budget: a request's ``"cost"``, or ``"bytes"`` alone.
        against: what a plan must be proven as good as: the model as ``"given"``, or the ``"control"`` as well, the same model
            with the same extra training and no compression.
        allow: import paths of factories that may be loaded.
        watch: hears every step; progress is shown on standard error if None.

    Raises:
        DeviceError: this machine or installation lacks what was asked for; said before any work.
        ConfigError: the model's structure cannot be read, or task, metric and labels do not fit each other.
        DataError: the data cannot be read, is of another schema than the bundle, or a label is outside the classes.
        NotWorthIt, Infeasible: see ``pennyweight.optimize.search.optimize``.
    """
    topology = placeable(nodes, gpus)
    limit = parse(budget) if isinstance(budget, str) else budget
    rows_, held = _read(data), None if test is None else _read(test)
    name = _name(model)
    model = load(model) if isinstance(model, (str, os.PathLike)) and (Path(model) / "manifest.json").is_file() else model
    _fits(model, rows_)
    taken, rows_, held = _taken(_opened(model), rows_, held, tuple(inputs), tuple(allow))
    task, parts = _parted(taken, rows_, held, task, seed, tuple(allow))
    metric = _metric(limit, task, metric)
    given = recipe is not None
    recipe = recipe or Recipe(USUAL[task][0], batch=BATCH, epochs=epochs, patience=3, metric=metric)
    bundle = Bundle(taken, catalog=parts.train.catalog)
    env = Env(parts.train, parts.valid, parts.train, None, topology, recipe=recipe, seed=seed, allow=tuple(allow))
    options = Options(
        metric=metric,
        seconds=seconds,
        epochs=epochs,
        candidates=rows,
        tries=tries,
        teachers=teachers if given else 0,
        force=force,
        skip=tuple(skip),
        objective=objective,
        against=against,
        model=name,
        data=f"{task}; {' / '.join(f'{len(p):,}' for p in parts)} rows to train, choose, prove",
        epochs_before=() if trained is None else history("baseline", trained),
    )
    with watching(Console(stderr=True)) if watch is None else contextlib.nullcontext() as shown:
        placed = Place().apply(bundle, env) if gpus else bundle
        heard = watch or shown.step  # type: ignore[union-attr]  # one of the two is there
        return _searched(placed, env, limit, parts.test, options, None if out is None else Path(out), resume, heard)


def placeable(nodes: int, gpus: int) -> Topology:
    """The devices of a placement.

    Raises:
        DeviceError: this machine or installation does not have them; the message names the remedy.
    """
    there = hardware.detect()
    if nodes != 1:
        raise DeviceError(
            f"{nodes} machines were asked for, and a bundle is placed on one; use nodes=1 and run a replica on each"
        )
    if gpus < 0 or gpus > len(there.gpus):
        seen = f"PyTorch {torch.__version__} sees {len(there.gpus)}"
        raise DeviceError(
            f"{gpus} GPUs were asked for and {seen}; use gpus={len(there.gpus)}, or install a CUDA build of PyTorch"
        )
    return Topology((there.cpu, *there.gpus[:gpus]))


def _fits(model: Any, data: Rows) -> None:
    """Refuse rows that a bundle would misread.

    Raises:
        DataError: they are of another schema than its catalog.
    """
    train = data.train if isinstance(data, Split) else data
    if not isinstance(model, Bundle) or model.catalog is None or not isinstance(train, Dataset):
        return
    if why := model.catalog.differs(train.catalog):
        raise DataError(f"the rows are of another schema than the model: {why}; give rows ingested as its own were")


def _searched(
    bundle: Bundle, env: Env, limit: Budget, test: Dataset, options: Options, out: Path | None, resume: bool, watch: Any
) -> Outcome:
    try:
        outcome = search.optimize(bundle, env, limit, test, options, out=out, resume=resume, watch=watch)
    except Infeasible:
        if out is not None:
            draw(out)
        raise
    if out is not None:
        draw(out)
    return outcome


def _opened(model: Any) -> Any:
    """What a path names: a Keras model, an ONNX graph, a SavedModel or a bundle; anything else as it is."""
    if isinstance(model, Bundle):
        return model.model
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .keras or .onnx file, a SavedModel or a bundle, or the model itself")
    if path.suffix == ".keras":
        return keras.read(path)
    if path.suffix == ".onnx":
        return onnx.read(path)
    if (path / "saved_model.pb").is_file():
        return onnx.saved_model(path)
    raise ConfigError(f"{path} is no model that is known: a .keras or .onnx file, a folder with saved_model.pb, or a bundle")


def _read(data: Any) -> Pairs | Dataset | Split:
    return data if isinstance(data, (Dataset, Split)) else Pairs.of(data)


Rows = Pairs | Dataset | Split


def _taken(
    model: Any, data: Rows, test: Rows | None, inputs: tuple[str, ...], allow: tuple[str, ...]
) -> tuple[Model, Rows, Any]:
    """The model as a Model, and the rows in the form it takes."""
    if isinstance(model, Model):
        return _fed(model, inputs or _names(data)), data, test
    if not isinstance(model, nn.Module) and not _is_keras(model):
        raise ConfigError(f"a {type(model).__name__} is no model: give a torch.nn.Module, a Keras model, or a model's path")
    if _is_keras(model):
        return keras.of(model, inputs or _names(data), logits=keras.probabilities(model)), data, test
    if isinstance(data, Pairs) and not _runs(model, data.example()):
        data, test = data.numbers(), None if test is None else test.numbers()  # type: ignore[union-attr]
    names = inputs or _names(data)
    return graph.logits(graph.of(model, _example(data, names), names)), data, test


def _fed(model: Model, names: tuple[str, ...]) -> Model:
    """The model with the data's columns as its inputs, where it takes columns one by one and as many, under other names."""
    own = model.spec.inputs
    if not own or set(own) <= set(names) or len(own) != len(names):
        return model
    return Model(dataclasses.replace(model.spec, inputs=names), model.state)


def _is_keras(model: Any) -> bool:
    return any(c.__module__.partition(".")[0] == "keras" for c in type(model).__mro__)


def _names(data: Rows) -> tuple[str, ...]:
    if isinstance(data, Pairs):
        return tuple(data.features)
    return tuple(c.name for c in (data.train if isinstance(data, Split) else data).schema.features)


def _example(data: Rows, names: Sequence[str]) -> tuple[Tensor, ...]:
    if isinstance(data, Pairs):
        return data.example()
    batch = next(iter((data.train if isinstance(data, Split) else data).head(4).batches(4)))
    return tuple(batch[n] for n in names)


def _runs(module: nn.Module, example: Sequence[Tensor]) -> bool:
    """Whether a module takes an example as it is: whole numbers are ids to a table, and must be floats to a dense layer."""
    was = module.training
    try:
        with torch.inference_mode():
            module.eval()(*example)
    except RuntimeError:
        return False
    finally:
        module.train(was)
    return True


def _parted(
    model: Model, data: Rows, test: Rows | None, task: Task | None, seed: int, allow: tuple[str, ...]
) -> tuple[Task, Split]:
    """The task, and the rows to train, to choose and to prove."""
    if isinstance(data, Pairs):
        whole = data.join(test) if isinstance(test, Pairs) else data
        outputs = _outputs(model, whole.head(EXAMPLE).dataset(), allow)
        task = _task(whole.labels, outputs, task)
        every = whole.dataset(outputs.shape[1] if task == "multi-class" else 0)
        if test is None:
            return task, every.split("random", (0.8, 0.1, 0.1), seed)
        data, test = every.head(len(data)), every.take(slice(len(data), None))
    if isinstance(data, Split):
        task = _task(data.train.column(data.train.schema.label.name), _outputs(model, data.train, allow), task)
        return task, data
    task = _task(data.column(data.schema.label.name), _outputs(model, data, allow), task)
    if test is None:
        return task, data.split("time" if data.schema.role("time") else "random", (0.8, 0.1, 0.1), seed)
    if not isinstance(test, Dataset):
        raise DataError(f"data is a Dataset and test a {type(test).__name__}; give both in one form")
    shuffled = np.random.default_rng(seed).permutation(len(data))
    cut = -(-len(data) // 10)
    return task, Split(data.take(shuffled[cut:]), data.take(shuffled[:cut]), test)


def _outputs(model: Model, data: Dataset, allow: tuple[str, ...]) -> Tensor:
    """What the model gives for a few rows.

    Raises:
        ConfigError: it cannot be run on them.
    """
    batch = next(iter(data.head(4).batches(4)))
    try:
        with torch.inference_mode():
            outputs = call(model.build(allow), batch, model.spec.inputs)
    except (RuntimeError, KeyError, IndexError, TypeError) as error:
        said = str(error).splitlines()[0][:200]
        columns = ", ".join(model.spec.inputs or batch)
        raise ConfigError(
            f"the model cannot be run on the columns {columns}: {said}; name its inputs with inputs=(...)"
        ) from error
    if outputs.dim() > 2:
        raise ConfigError(
            f"the model gives {tuple(outputs.shape)} for 4 rows; one number or one row of class scores each is needed"
        )
    return outputs


def _task(labels: Any, outputs: Tensor, asked: Task | None) -> Task:
    """What is learned, from the labels and the outputs.

    Raises:
        ConfigError: another task was said than the outputs allow.
        DataError: a label is outside the classes.
    """
    if asked == "ranking":
        return asked
    y = np.asarray(labels)
    classes = outputs.shape[1] if outputs.dim() == 2 else 0
    found: Task = "multi-class" if classes else "binary" if np.isin(y, (0, 1)).all() else "regression"
    if asked is not None and ((asked == "multi-class") != (classes > 0)):
        gives = f"{classes} scores a row" if classes else "one number a row"
        raise ConfigError(f"task {asked!r} was said and the model gives {gives}, which fits {found!r}")
    wrong = y[(y < 0) | (y >= classes) | (y % 1 != 0)] if classes else y[~np.isin(y, (0, 1))] if asked == "binary" else y[:0]
    if len(wrong):
        known = f"the model's {classes} classes, 0 to {classes - 1}" if classes else "0 and 1"
        raise DataError(f"label {wrong[0]:g} is outside {known} ({len(wrong):,} such rows); encode labels from 0")
    return asked or found


def _metric(limit: Budget, task: Task, asked: str | None) -> str:
    """The metric to prove: as said, or the one the budget names, or the task's usual one.

    Raises:
        ConfigError: it cannot be proven of this task.
    """
    named = [m for m in (*limit.margins, *limit.relative) if m != "quality"]
    metric = asked or (named[0] if named else USUAL[task][1])
    if ranking(metric) is None and metric not in OF_TASK.get(task, ()):
        known = ", ".join(OF_TASK.get(task, ("ndcg@K", "recall@K", "hit_rate@K")))
        raise ConfigError(f"metric {metric!r} cannot be proven of a {task} model; use {known}")
    return metric


def _name(model: Any) -> str:
    return Path(model).name if isinstance(model, (str, os.PathLike)) else getattr(model, "name", "") or type(model).__name__
