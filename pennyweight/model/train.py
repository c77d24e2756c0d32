"""One training loop for every model and loss here: fit, early stop, checkpoint, exact resume.

A *recipe* is how a model is trained, as a value: it is stored with results, and a transform that recovers quality after
compression carries the user's own. Lightning and the like bring callbacks and a trainer that owns the program; what this
needs is a loop of a page whose every random number is accounted for, so that a run stopped anywhere and resumed ends with
the same bits as one that was not.

The weights as given are judged first, as epoch 0: fine-tuning that only harms gives back what it was given, and a
deadline or Ctrl-C at any moment leaves the best so far in the module. The cost is one pass over the validation rows.

Half of a step on a CPU used to be spent beside the matrix products: on memory that is freed and faulted in again
(``core/memory``), on dropout (``model/layers``), on tables visited whole (``model/sparse``). ``torch.compile`` of the loss was
tried: on two cores it took a minute to build, and the step it gave was no faster than these.

The loop is the same for workers that train one model together. What they must do as one (add up gradients, look rows up in
tables that are cut, decide to stop, keep the state) is asked of ``Workers``, whom ``distribute`` brings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.adam import adam

from pennyweight.core import memory
from pennyweight.core.config import dumps, encode, loads, write
from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST, Column, Schema
from pennyweight.model import losses, metrics, sparse, team
from pennyweight.model.hidden import Joined
from pennyweight.model.metrics import METRICS, Lists, Ranked
from pennyweight.model.mixed import Halved
from pennyweight.model.sparse import Sparse
from pennyweight.model.spec import Batch, call
from pennyweight.model.tables import RowwiseTable, Table

TICK_S = 0.5
"""Seconds between two reports of progress."""
SAVE_S = 60.0
"""Seconds between two checkpoints inside an epoch."""
TEACHER_BYTES = 1 << 30
"""A teacher's outputs are kept beside the rows up to this many bytes, and computed anew each batch above."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    loss: Literal["bce", "cross-entropy", "mse", "bpr", "sampled-softmax", "gbce"] = "bce"
    optimizer: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    """On everything but tables: (weight_decay / 2) * squares added to the loss (AdamW: decoupled)."""
    embedding_l2: float = 0.0
    """The same on tables, all rows at every step: FuxiCTR's ``embedding_regularizer``."""
    batch: int = 4096
    epochs: int = 100
    """At most."""
    patience: int = 2
    """Epochs without a better validation metric before training stops; at each the learning rate is decayed."""
    metric: str = "auc"
    """What validation looks at: a name of ``metrics.METRICS``, or ``ndcg@10``, ``recall@20``, ``hit_rate@10``."""
    select: str = ""
    """What chooses the best epoch and when to stop, if not ``metric``: ``refined_log_loss`` tells apart what accuracy on a few
    hundred rows cannot."""
    lr_decay: float = 0.1
    """Factor on the learning rate after an epoch that was no better; 1 keeps it."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """``plateau`` decays by ``lr_decay``; ``cosine`` falls to 0 over ``epochs``, which suits a training of known length."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0 is no limit."""
    negatives: int = 256
    """Random items a batch for ``sampled-softmax`` and ``gbce``; 0 uses the batch's own, the catalog's size all of it."""
    popularity: float = 0.0
    """Random items are drawn in proportion to their occurrences to this power; 0 is uniform."""
    calibration: float = 0.75
    """``t`` of ``gbce``: 0 is plain binary cross-entropy."""
    distill_alpha: float = 0.5
    """Weight of the teacher's outputs against the labels, when a teacher is given."""
    temperature: float = 1.0
    """Softens the teacher's and the student's probabilities."""
    dealt: float = 0.0
    """Weight of the teacher's outputs on pairs nobody labelled: a batch's items dealt anew to its users (needs items)."""
    mixup: float = 0.0
    """Rows blended two and two, by shares of Beta(mixup, mixup), labels too (needs numbers only); 0 is rows as they are."""
    tables: Literal["dense", "auto", "adagrad", "lazy-adam", "sgd"] = "dense"
    """``dense`` trains tables as the rest, all rows at every step. The others train the rows a batch touches and leave the rest
    alone, also ``embedding_l2``: row-wise Adagrad, Adam whose moments wait, plain SGD (see ``model/sparse``). ``auto`` is dense
    for tables of less than 2**24 numbers together, above that ``lazy-adam``, ``adagrad`` or ``sgd``, whichever is like
    ``optimizer``."""
    rows: Literal["fp32", "int8"] = "fp32"
    """How tables that are trained by touched rows are held, meanwhile and afterwards; ``int8`` is a byte a number and eight a
    row, rounded by chance (see ``model/sparse``)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products of dense layers in training; weights, sums and all else are fp32 (see ``model/mixed``). On a
    processor with bfloat16 instructions ``bf16`` is faster, the more so the wider the layers."""

    def __post_init__(self) -> None:
        for name, low in (("lr", 0.0), ("batch", 1), ("epochs", 1), ("patience", 1), ("lr_decay", 0.0), ("temperature", 0.0)):
            value = getattr(self, name)
            if value < low or value == 0:
                raise ConfigError(f"recipe {name} is {value}; it must be {'above 0' if low == 0 else 'at least 1'}")
        for name in ("weight_decay", "embedding_l2", "clip", "negatives", "dealt", "mixup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"recipe {name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.distill_alpha <= 1:
            raise ConfigError(f"recipe distill_alpha is {self.distill_alpha}; it must be between 0 and 1")
        if self.rows == "int8" and self.tables == "dense":
            raise ConfigError("recipe rows is int8, and tables is dense, which visits all; let tables be auto, adagrad or sgd")
        for name in (self.metric, self.selector):
            metrics.ranking(name)

    @property
    def selector(self) -> str:
        """The metric that chooses the best epoch."""
        return self.select or self.metric


@dataclasses.dataclass(frozen=True)
class EpochLog:
    """One epoch: mean training loss, validation metric, seconds both took."""

    epoch: int
    loss: float
    metric: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """What came of a training; the module holds the weights of ``best_epoch``."""

    history: tuple[EpochLog, ...]
    best_epoch: int
    """0: no epoch was better than the weights as given."""
    metric: float
    """The validation metric of the best epoch."""
    seconds: float
    stopped: Literal["patience", "epochs", "deadline", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training is, every half second."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    """Mean of the epoch so far."""
    metric: float
    """Best validation metric so far."""
    rows_per_s: float
    eta_s: float
    """Seconds left if no early stop comes."""
    workers: tuple[float, ...] = ()
    """Milliseconds a step of each worker since the last report, waiting for others left out; empty for one process."""


class Tables(Protocol):
    """Who trains a module's tables in place of the optimizer (``model/sparse``), in the order of these methods."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that the optimizer does not step."""

    def clear(self) -> None:
        """Forget the gradients of a batch."""

    def gather(self) -> Iterable[Tensor]:
        """The gradients of the rows a batch touched, summed by row."""

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Move them along their gradients, times ``scale``."""

    def state(self) -> dict[str, Tensor]:
        """What to keep to go on exactly, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""

    def release(self) -> None:
        """Leave the module as it was found."""


class Keeper(Protocol):
    """Where the state of a training is kept."""

    def save(self, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Keep this state in place of an older one."""

    def load(self, into: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
        """The state kept last, if there is one; read into these tensors where that can be."""


class Workers(team.Team, Protocol):
    """A team whose processes each run this loop on their part of every batch, and end with the same weights."""

    every: int
    """Steps between two checkpoints inside an epoch; 0 leaves it to the clock."""
    lean: bool
    """Whether memory is short: nothing is held twice."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of tensors of the module's state that are here in part, as they are as a whole."""

    def lend(self, module: nn.Module, kind: str, recipe: Recipe) -> Tables:
        """Prepare a module for its part of a batch, and take over its tables, trained as ``kind`` says."""

    def part(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """Inside, this worker's part of a batch of so many rows is computed."""

    def expect(self, params: Sequence[nn.Parameter]) -> None:
        """Gradients of these are about to be computed: add each up over all workers as soon as it is there."""

    def settle(self) -> None:
        """Wait for the sums."""

    def norm(self, whole: Sequence[Tensor]) -> float:
        """The norm of all gradients, of which ``whole`` are the same on all workers."""

    def agree(self, loss: Tensor, wishes: tuple[bool, ...]) -> tuple[Tensor, tuple[bool, ...]]:
        """The loss of the whole batch, and what any worker wishes."""

    def paces(self) -> tuple[float, ...]:
        """Milliseconds a step of each worker since this was asked last, waiting for others left out."""

    def keeper(self, path: Path) -> Keeper:
        """Where the workers keep their state."""

    def shelf(self, path: Path) -> Keeper | None:
        """Where they keep the best weights, if there is no memory to hold them twice."""


def fit(
    module: nn.Module,
    train: Dataset,
    valid: Dataset,
    recipe: Recipe,
    *,
    inputs: Sequence[str] = (),
    seed: int = 0,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress | EpochLog], None] | None = None,
    deadline_s: float | None = None,
    workers: Workers | None = None,
) -> Fit:
    """Train a module in place; it ends in evaluation mode with the weights of its best epoch.

    Args:
        module: any module with trainable parameters; pair losses need ``user_vectors`` and ``item_vectors``.
        train: rows to learn from, shuffled anew each epoch.
        valid: rows that decide when to stop and which epoch is best.
        recipe: how.
        inputs: columns handed to ``forward`` one by one; empty for the whole batch.
        seed: of shuffling, dropout and sampling; the caller's random state is left alone.
        teacher: a module of the same outputs (pair losses: of the same vectors) to learn from too.
        checkpoint: a file to keep the exact state in. If it exists, training goes on from it.
        progress: called about twice a second, and with an epoch's log when it was judged.
        deadline_s: seconds after which training stops, validation included.
        workers: who trains with this process, all calling this alike; the module may then hold its part of the tables only.

    Ctrl-C stops after the current step, with the best weights and the checkpoint written; a second one at once.

    Raises:
        ConfigError: the recipe does not fit the model or the data, or the checkpoint is of another training.
        DataError: the loss is no longer a number.
    """
    began = time.monotonic()
    if workers is not None and (teacher is not None or recipe.mixup or recipe.dealt):
        raise ConfigError("teachers, mixup and dealt pairs are for one worker; train without them, or with --workers 1")
    rows = _rows(module, train, recipe)
    taught, batchwise = _taught(rows, teacher, recipe, inputs)
    loss = _loss(module, taught, recipe, inputs, teacher if recipe.dealt else batchwise)
    judge = _judge(train, valid, recipe, inputs)
    identity = "" if checkpoint is None else dumps([encode(recipe), seed, train.fingerprint, _described(module, workers)])
    kept = contextlib.nullcontext() if workers is not None and workers.lean else memory.kept()
    with torch.random.fork_rng(devices=[]), kept, _interrupts() as interrupted, team.working(workers):
        torch.manual_seed(seed)
        with Learner(module, loss, recipe, workers) as learner:
            keeper = None if checkpoint is None else _File(checkpoint) if workers is None else workers.keeper(checkpoint)
            shelf = None if checkpoint is None or workers is None else workers.shelf(checkpoint)
            run = _Run(learner, taught, seed, judge, keeper, shelf, identity, progress, began, deadline_s, interrupted)
            return run.go()


def scores(module: nn.Module, dataset: Dataset, *, inputs: Sequence[str] = (), batch: int = 8192) -> NDArray[np.float32]:
    """The module's outputs for all rows in order, float32 [n] or [n, classes]; ``batch`` rows at a time."""
    with _evaluating(module):
        mine = dataset.batches(batch, part=team.share)
        parts = [team.gathered(call(module, rows, inputs).float()).numpy() for rows in mine]
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """What a retrieval model is asked in a full ranking: one row a user, the items to find, the items to leave out."""

    rows: Dataset
    truth: Lists
    seen: Lists

    @classmethod
    def of(cls, test: Dataset, seen: Sequence[Dataset] = ()) -> Queries:
        """One query for each user with a liked row in ``test``, asked as of the first one.

        What the user has in ``seen``, liked or not, and in the row's own history is left out.
        """
        right = np.flatnonzero(losses.liked(test))
        item = test.schema.item.name
        users = _users(test)
        known, first, query = np.unique(users[right], return_index=True, return_inverse=True)
        truth = Lists.group(query, test.column(item)[right], len(known))
        rows = test.take(right[first])
        pairs = [_known_pairs(known, _users(d), d.column(item)) for d in seen]
        history = test.schema.history
        if history is not None:
            past = rows.column(history.name)
            pairs.append((np.repeat(np.arange(len(known)), past.shape[1]), past.ravel()))
        who, what = (np.concatenate([p[i] for p in pairs] or [np.zeros(0, np.int64)]) for i in (0, 1))
        return cls(rows, truth, Lists.group(who, what, len(known)))

    def rank(self, module: nn.Module, k: int = 10) -> Ranked:
        """Recall, NDCG and hit rate at ``k`` of the whole catalogue ranked for each query.

        Raises:
            ConfigError: the module is no retrieval model.
        """
        if not hasattr(module, "item_vectors"):
            raise ConfigError(f"{type(module).__name__} cannot rank a catalogue: it has no user_vectors and item_vectors")
        retriever = cast(losses.Retriever, module)
        catalog = self.rows.catalog
        with _evaluating(module):
            mine = np.arange(*team.share(catalog.schema.item.size))
            items = team.gathered(retriever.item_vectors(catalog.item_batch(mine)))
            batches = self.rows.batches(512, part=team.share)
            users = torch.cat([team.gathered(retriever.user_vectors(b)) for b in batches])

            def score(start: int, stop: int) -> Tensor:
                scored = users[start:stop] @ items.T
                scored[:, :FIRST] = -math.inf
                return scored

            return metrics.full_ranking(score, self.truth, self.seen, k)


def _users(data: Dataset) -> NDArray[np.int64]:
    """The user of each row; without a user column each row is somebody else."""
    named = [c for c in data.schema.role("user") if c.kind == "categorical"]
    return data.column(named[0].name).astype(np.int64) if named else np.arange(len(data))


def _known_pairs(known: Any, users: Any, items: Any) -> tuple[Any, Any]:
    place = np.searchsorted(known, users).clip(max=len(known) - 1)
    found = known[place] == users
    return place[found], items[found].astype(np.int64)


def _rows(module: nn.Module, train: Dataset, recipe: Recipe) -> Dataset:
    """The rows a loss learns from: liked ones for pair losses, unless whole sequences are read."""
    if len(train) < 2:
        raise DataError(f"training needs at least 2 rows, got {len(train)}")
    if recipe.loss in losses.ROWS or hasattr(module, "states"):
        return train
    return train.take(np.flatnonzero(losses.liked(train)))


def _taught(
    train: Dataset, teacher: nn.Module | None, recipe: Recipe, inputs: Sequence[str]
) -> tuple[Dataset, nn.Module | None]:
    """The rows with the teacher's output beside them, or the teacher itself where that would not fit."""
    if teacher is None or recipe.loss not in losses.ROWS or recipe.mixup:
        return train, teacher  # what a pair loss asks depends on the items it draws, and blends are new each time
    classes = train.schema.label.size if recipe.loss == "cross-entropy" else 0
    stored = len(next(iter(train.columns.values())))
    if 4 * stored * max(1, classes) > TEACHER_BYTES:
        return train, teacher
    said = scores(teacher, train, inputs=inputs)
    column = np.zeros((stored, *said.shape[1:]), np.float32)
    column[np.asarray(train.rows)] = said
    schema = Schema((*train.schema.columns, Column(losses.TEACHER, "context", "numeric", length=classes)))
    columns = {**train.columns, losses.TEACHER: column}
    return dataclasses.replace(train, catalog=train.catalog.replace(schema=schema), columns=columns, digest=""), None


def loss_of(module: nn.Module, train: Dataset, recipe: Recipe, inputs: Sequence[str] = ()) -> losses.Loss:
    """The recipe's loss of a batch of these rows, without a teacher."""
    return _loss(module, _rows(module, train, recipe), recipe, inputs, None)


def _loss(module: nn.Module, train: Dataset, recipe: Recipe, inputs: Sequence[str], teacher: nn.Module | None) -> losses.Loss:
    if recipe.loss not in losses.ROWS:
        drawn = recipe.negatives, recipe.popularity, recipe.calibration
        return losses.pair_loss(module, recipe.loss, train, *drawn, teacher, recipe.distill_alpha, recipe.temperature)
    if recipe.mixup:
        asked, alpha, temperature = teacher and teacher.eval(), recipe.distill_alpha, recipe.temperature
        return losses.mixup_loss(module, asked, recipe.loss, train.schema, inputs, alpha, temperature, recipe.mixup)
    label = train.schema.label.name
    loss = losses.row_loss(module, recipe.loss, label, inputs, recipe.distill_alpha, recipe.temperature)
    if teacher is None:
        return loss
    if recipe.dealt and train.schema.role("item"):
        alpha, temperature = recipe.distill_alpha, recipe.temperature
        return losses.dealt_loss(module, teacher.eval(), recipe.loss, train.schema, inputs, alpha, temperature, recipe.dealt)
    if losses.TEACHER in train.schema:
        return loss

    def asking(batch: Batch) -> Tensor:
        with torch.no_grad():
            said = call(teacher.eval(), batch, inputs)
        return loss({**batch, losses.TEACHER: said})

    return asking


def _judge(train: Dataset, valid: Dataset, recipe: Recipe, inputs: Sequence[str]) -> Callable[[nn.Module], tuple[float, float]]:
    """A function from the module to the validation metric and to the one that selects; rows are scored once for both."""
    names = list(dict.fromkeys((recipe.metric, recipe.selector)))
    asked = {name: metrics.ranking(name) for name in names}
    labels = valid.column(valid.schema.label.name) if None in asked.values() else None
    queries = Queries.of(valid, [train]) if any(asked.values()) else None

    def judge(module: nn.Module) -> tuple[float, float]:
        said = None if labels is None else scores(module, valid, inputs=inputs)
        found = []
        for name, ranked in asked.items():
            if ranked is None:
                found.append(METRICS[name].of(cast(NDArray[Any], labels), cast(NDArray[Any], said)))
            else:
                found.append(float(getattr(cast(Queries, queries).rank(module, ranked[1]), ranked[0])))
        return found[0], found[-1]

    return judge


def optimizer(module: nn.Module, recipe: Recipe, without: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer | None:
    """The recipe's optimizer over the parameters that want a gradient: tables and the rest, each with its own decay.

    None if all of them are in ``without``, which somebody else trains. A bias that a batch norm takes away again stays as it
    is: its gradient is rounding alone, which Adam would make into steps of the whole learning rate. Nothing is learned by them,
    but the norm's running mean follows them late, so that scores would depend on the order sums were taken in.
    """
    tables = {id(p) for m in module.modules() if Table.of(m) is not None for p in m.parameters()}
    wanted = [p for p in module.parameters() if p.requires_grad]
    if not wanted and not any(isinstance(m, RowwiseTable) and m.lent for m in module.modules()):
        raise ConfigError(f"{type(module).__name__} has no parameter that can be trained; build it with copy=True")
    others = {*map(id, without), *map(id, _idle(module))}
    wanted = [p for p in wanted if id(p) not in others]
    if not wanted:
        return None
    groups = [
        {"params": [p for p in wanted if id(p) in tables], "weight_decay": recipe.embedding_l2},
        {"params": [p for p in wanted if id(p) not in tables], "weight_decay": recipe.weight_decay},
    ]
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=0.9, fused=True)
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[recipe.optimizer]
    made: torch.optim.Optimizer = kind(groups, recipe.lr, fused=True)
    return made


def _idle(module: nn.Module) -> Iterator[nn.Parameter]:
    """Biases of layers that a batch norm comes right after, and what our models say of themselves."""
    for child in module.modules():
        own = getattr(child, "idle", None) if type(child).__module__.startswith("pennyweight.") else None
        if callable(own):
            yield from own()
    for run in (m for m in module.modules() if isinstance(m, nn.Sequential)):
        for layer, after in itertools.pairwise(run):
            bias = getattr(layer, "bias", None)
            if isinstance(after, _BatchNorm) and isinstance(bias, nn.Parameter):
                yield bias


class _Stepper:
    """An optimizer's step without its ceremony: hooks, profiler marks and the search for gradients, 0.1 ms a step here.

    That is a fifth of a small network's step. State stays in the optimizer, whose own ``step`` does the first one and every
    one in which a parameter got no gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.params: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.lean = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def step(self, lr: float) -> None:
        """Move the parameters along their gradients."""
        state = self.optimizer.state
        if not self.lean or len(state) < len(self.params) or any(p.grad is None or p.grad.is_sparse for p in self.params):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            return
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                self._adam(group, lr)

    def _adam(self, group: Mapping[str, Any], lr: float) -> None:
        params = group["params"]
        held = [self.optimizer.state[p] for p in params]
        adam(
            params,
            [p.grad for p in params],
            [h["exp_avg"] for h in held],
            [h["exp_avg_sq"] for h in held],
            [],
            [h["step"] for h in held],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )


class Learner:
    """A module while it is trained, in a ``with``: the loss of a batch, its gradients, and who moves what along them.

    Tables of which only touched rows are trained, layers that multiply in bfloat16 and hidden layers computed as one are lent
    for as long (``recipe.tables``, ``recipe.precision``; ``joined=False`` computes layers one by one, as workers do).
    """

    def __init__(
        self, module: nn.Module, loss: losses.Loss, recipe: Recipe, workers: Workers | None = None, *, joined: bool = True
    ) -> None:
        self.module, self.loss, self.recipe, self.workers = module, loss, recipe, workers
        self.alone = joined and workers is None

    def __enter__(self) -> Learner:
        kind = _kind(self.module, self.recipe)
        self.sparse: Tables | None = None
        if self.workers is not None:
            self.sparse = self.workers.lend(self.module, kind, self.recipe)
        elif kind != "dense":
            self.sparse = Sparse(self.module, kind, self.recipe.embedding_l2, int8=self.recipe.rows == "int8")
        halved = self.recipe.precision == "bf16"
        self.joined = Joined(self.module, torch.bfloat16 if halved else None) if self.alone else None
        self.halved = Halved(self.module) if halved else None
        try:
            self.optimizer = optimizer(self.module, self.recipe, self.sparse.parameters if self.sparse else ())
        except ConfigError:
            self.__exit__()
            raise
        self.stepper = None if self.optimizer is None else _Stepper(self.optimizer)
        self.names = {id(p): name for name, p in self.module.named_parameters()}
        return self

    def __exit__(self, *_: object) -> None:
        for lent in (self.sparse, self.halved, self.joined):
            if lent is not None:
                lent.release()

    def learn(self, batch: Batch, lr: float, rows: int = 0) -> Tensor:
        """One step on a batch; its mean loss before it, to be read once there is no hurry.

        Among workers ``batch`` is this one's part of ``rows`` rows, and what is given back its share of the loss.
        """
        if self.stepper is not None:
            self.stepper.clear()
        if self.sparse is not None:
            self.sparse.clear()
        if self.workers is None:
            loss = self.loss(batch)
        else:
            with self.workers.part(rows):
                loss = self.loss(batch)
            self.workers.expect(self.stepper.params if self.stepper else ())
        loss.backward()  # type: ignore[no-untyped-call]
        touched = list(self.sparse.gather()) if self.sparse is not None else []
        if self.workers is not None:
            self.workers.settle()
        scale = self._clipped(touched)
        if self.stepper is not None:
            self.stepper.step(lr)
        if self.sparse is not None:
            self.sparse.step(lr, scale)
        return loss.detach()

    def _clipped(self, rows: Sequence[Tensor]) -> float:
        """Shorten the gradients of all but ``rows`` to the recipe's norm, counting both; by how much ``rows`` are to be."""
        if not self.recipe.clip:
            return 1.0
        if self.sparse is None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip)
            return 1.0
        own = [p.grad for p in (self.stepper.params if self.stepper else ()) if p.grad is not None]
        norm = nn.utils.get_total_norm([*own, *rows]).item() if self.workers is None else self.workers.norm(own)
        scale = min(1.0, self.recipe.clip / (norm + 1e-6))
        for gradient in own:
            gradient.mul_(scale)
        return scale

    def state(self) -> dict[str, Tensor]:
        """What the optimizers remember, by name."""
        held = {} if self.optimizer is None else self.optimizer.state
        of = {self.names[id(p)]: kept for p, kept in held.items()}
        state = {f"optimizer.{name}.{k}": v for name, kept in of.items() for k, v in kept.items() if isinstance(v, Tensor)}
        return state | ({} if self.sparse is None else {f"tables.{k}": v for k, v in self.sparse.state().items()})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        if self.optimizer is not None:
            params = self.stepper.params if self.stepper else []
            state = _by_parameter(_under("optimizer.", tensors), [self.names[id(p)] for p in params])
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.sparse is not None:
            self.sparse.restore(_under("tables.", tensors))


def _kind(module: nn.Module, recipe: Recipe) -> str:
    """How tables are trained: ``dense``, or by the rows that are touched and how."""
    if recipe.tables != "auto":
        return recipe.tables
    if sparse.numbers(module) < sparse.LARGE and recipe.rows == "fp32":
        return "dense"
    return {"adam": "lazy-adam", "adamw": "lazy-adam"}.get(recipe.optimizer, recipe.optimizer)


@dataclasses.dataclass(frozen=True)
class _State:
    """Where a training is, apart from its tensors."""

    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Steps done in the next one."""
    best: float | None = None
    """Of the metric that selects."""
    metric: float = 0.0
    """The validation metric of the best epoch."""
    best_epoch: int = 0
    waited: int = 0
    """Epochs since the best."""
    lr: float = 0.0
    history: tuple[EpochLog, ...] = ()
    seconds: float = 0.0
    """Seconds in the epoch so far."""
    stopped: Literal["", "patience", "epochs"] = ""


class _Run:
    """One training: the module, what trains it, and what must be kept to go on exactly."""

    def __init__(
        self,
        learner: Learner,
        train: Dataset,
        seed: int,
        judge: Callable[[nn.Module], tuple[float, float]],
        keeper: Keeper | None,
        shelf: Keeper | None,
        identity: str,
        progress: Callable[[Progress | EpochLog], None] | None,
        began: float,
        deadline_s: float | None,
        interrupted: threading.Event,
    ) -> None:
        self.learner, self.train, self.seed = learner, train, seed
        self.module, self.recipe = learner.module, learner.recipe
        self.judge, self.progress = judge, progress
        self.keeper, self.shelf, self.identity = keeper, shelf, identity
        self.workers = learner.workers
        self.began, self.interrupted = began, interrupted
        self.deadline = math.inf if deadline_s is None else began + deadline_s
        # Batch norm cannot train on a single row: one left over at the end of an epoch waits for the next shuffle.
        self.drop_last = len(train) % self.recipe.batch == 1 and len(train) > self.recipe.batch
        self.steps = -(-len(train) // self.recipe.batch) - self.drop_last
        self.state = _State(lr=self.recipe.lr)
        self.total = torch.zeros((), dtype=torch.float64)
        self.best: dict[str, Tensor] = {}
        self.judged_s = 0.0
        self.ticked = self.saved = time.monotonic()

    def go(self) -> Fit:
        stopped: Literal["patience", "epochs", "deadline", "interrupted"]
        if not self._restore():
            self._consider(0)
        try:
            while not self.state.stopped and (self._epoch() or self._cut_short()):
                self._close()
            stopped = self.state.stopped or ("interrupted" if self.interrupted.is_set() else "deadline")
        finally:
            if self.best:
                self.module.load_state_dict(self.best)
            self.module.eval()
        if self.shelf is not None:
            now = self.module.state_dict()
            found = self.shelf.load({f"module.{k}": v for k, v in now.items()})
            self.module.load_state_dict(_under("module.", found[0] if found else {}))
        assert self.state.best is not None
        return Fit(self.state.history, self.state.best_epoch, self.state.metric, time.monotonic() - self.began, stopped)

    def _epoch(self) -> bool:
        """Train to the end of the epoch; False if there is no time for all of it."""
        self.module.train()
        done, first, began = self.state.step, self.state.step, time.monotonic()
        earlier = self.state.seconds
        seed = self.seed * 1_000_003 + self.state.epoch
        size, every = self.recipe.batch, 0 if self.workers is None else self.workers.every
        batches = self.train.batches(size, shuffle=True, seed=seed, start=done, drop_last=self.drop_last, part=team.share)
        for batch in batches:
            loss = self.learner.learn(batch, self._rate(done), min(size, len(self.train) - done * size))
            done += 1
            now = time.monotonic()
            tick = now - self.ticked > TICK_S or done == self.steps
            over = self.interrupted.is_set() or now + self.judged_s > self.deadline
            save = now - self.saved > SAVE_S or (every > 0 and done % every == 0)
            if self.workers is not None:
                loss, (tick, over, save) = self.workers.agree(loss, (tick, over, save))
            self.total += loss
            if tick:
                self._tick(done, (done - first) / (now - began), now)
            if over or save:
                self.state = dataclasses.replace(self.state, step=done, seconds=earlier + now - began)
                self._save()
            if over:
                return False
        self.state = dataclasses.replace(self.state, step=done, seconds=earlier + time.monotonic() - began)
        return True

    def _rate(self, done: int) -> float:
        """The learning rate of a step; of the step's place alone, so that a resumed training has the same."""
        if self.recipe.schedule == "plateau":
            return self.state.lr
        place = (self.state.epoch + done / self.steps) / self.recipe.epochs
        return 0.5 * self.recipe.lr * (1 + math.cos(math.pi * place))

    def _tick(self, done: int, pace: float, now: float) -> None:
        self.ticked = now
        loss = self.total.item() / done
        if not math.isfinite(loss):
            raise DataError(
                f"the loss became {loss} in epoch {self.state.epoch + 1} by step {done} of {self.steps}; "
                f"lower the learning rate (now {self.state.lr:g}) or set recipe.clip, and look for extreme numbers in the data"
            )
        if self.progress is not None:
            left = (self.recipe.epochs - self.state.epoch) * self.steps - done
            rows = pace * self.recipe.batch
            eta = min(left / pace, self.deadline - now)
            paces = () if self.workers is None else self.workers.paces()
            at = self.state.epoch + 1, self.recipe.epochs, done, self.steps
            self.progress(Progress(*at, loss, self.state.metric, rows, eta, paces))

    def _consider(self, epoch: int) -> bool:
        """Judge the weights as they are, keep them if they are the best; True if so."""
        began = time.monotonic()
        metric, selected = self.judge(self.module)
        self.judged_s = time.monotonic() - began
        best = self.state.best
        sign = 1 if metrics.higher(self.recipe.selector) else -1
        better = best is None or sign * selected > sign * best
        if better:
            self._hold({k: v.detach() for k, v in self.module.state_dict().items()})
            self.state = dataclasses.replace(self.state, best=selected, metric=metric, best_epoch=epoch)
        if epoch:
            log = EpochLog(epoch, self.total.item() / self.state.step, metric, self.state.seconds + self.judged_s)
            self.state = dataclasses.replace(self.state, history=(*self.state.history, log))
            if self.progress is not None:
                self.progress(log)
        return better

    def _hold(self, now: Mapping[str, Tensor]) -> None:
        """Keep the weights as the best."""
        if self.shelf is not None:
            self.shelf.save({f"module.{k}": v for k, v in now.items()}, {})
        elif self.best:  # into the memory of the last best, so that large tables are held twice and not three times
            for name, tensor in now.items():
                self.best[name].copy_(tensor)
        else:
            self.best = {name: tensor.clone() for name, tensor in now.items()}

    def _close(self) -> None:
        """End an epoch: judge it, decay the learning rate, decide whether to go on."""
        better = self._consider(self.state.epoch + 1)
        state, recipe = self.state, self.recipe
        waited = 0 if better else state.waited + 1
        stopped: Literal["", "patience", "epochs"] = ""
        if waited >= recipe.patience:
            stopped = "patience"
        elif state.epoch + 1 >= recipe.epochs:
            stopped = "epochs"
        lr = state.lr if better else state.lr * recipe.lr_decay
        epoch = state.epoch + 1
        self.state = dataclasses.replace(state, epoch=epoch, step=0, waited=waited, lr=lr, seconds=0.0, stopped=stopped)
        self.total.zero_()
        self._save()

    def _cut_short(self) -> bool:
        """Judge the part of an epoch that was trained, so that it is not lost; the checkpoint was written before."""
        if math.isfinite(self.total.item()):
            self._consider(self.state.epoch + 1)
        return False

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.keeper is None:
            return
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= self.learner.state()
        tensors |= {"total": self.total, "random": torch.get_rng_state()}
        self.keeper.save(tensors, {"state": dumps(self.state), "identity": self.identity})

    def _restore(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        here = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        found = None if self.keeper is None else self.keeper.load(here)
        if found is None:
            return False
        tensors, notes = found
        if notes.get("identity") != self.identity:
            raise ConfigError(
                f"checkpoint {self.keeper} is of another training (recipe, seed, data or model differ); "
                "remove it or name another"
            )
        self.state = loads(_State, notes["state"], f"{self.keeper}: state")
        self.module.load_state_dict(_under("module.", tensors))
        self.best = _under("best.", tensors)
        self.learner.restore(tensors)
        self.total = tensors["total"]
        torch.set_rng_state(tensors["random"])
        return True


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _by_parameter(flat: Mapping[str, Tensor], names: Sequence[str]) -> dict[int, dict[str, Tensor]]:
    """What an optimizer keeps of each parameter, by its number as PyTorch counts them."""
    place = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in flat.items():
        name, _, key = path.rpartition(".")
        state.setdefault(place[name], {})[key] = value
    return state


class _File:
    """The state of a training in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def save(self, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        held = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
        write(self.path, safetensors.torch.save(held, dict(notes)))

    def load(self, into: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(str(self.path), "pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118  (not a mapping)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"checkpoint {self.path} cannot be read ({error}); remove it to start anew") from error


def _described(module: nn.Module, workers: Workers | None) -> list[str]:
    """What a module is, as far as it can be told: a sum of pairs has no weights, so two models may hold the same tensors."""
    whole = {} if workers is None else workers.shapes
    kinds = [f"{k} {type(m).__qualname__}" for k, m in module.named_modules()]
    return kinds + [f"{k} {v.dtype} {whole.get(k, tuple(v.shape))}" for k, v in module.state_dict().items()]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises as ever. Outside the main thread nothing is caught."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
