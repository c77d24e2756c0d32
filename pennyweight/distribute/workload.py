"""What one step of training asks of its workers: rows looked up, numbers multiplied, bytes held.

Counted on a model without storage (PyTorch's ``meta`` device) by running it on two and on four rows: each table reports the ids
it was given, and PyTorch counts the operations. So a model of a billion rows is counted in a second on a machine that could not
hold it, and a user's own module is counted like ours. Reading shapes from a configuration, as TorchRec's planner does, is the
known alternative; it needs tables declared as such, and sees no dense layers.

What it cannot see: which ids are asked for. Distinct rows of a batch are those of ids drawn uniformly; skewed ids repeat more
often, so real traffic is below what is predicted unless ``seen`` says how many distinct rows a batch was measured to have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.core.config import decode
from pennyweight.core.errors import ConfigError
from pennyweight.data.schema import Column
from pennyweight.model import sparse
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Batch, Spec, build, call, leaves
from pennyweight.model.tables import Table
from pennyweight.model.train import Recipe

Update = Literal["dense", "adagrad", "lazy-adam", "sgd"]
"""How tables are trained (``Recipe.tables``)."""

PROBE = 2
"""Rows of the batch a model is counted with."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One table: what it holds and how often it is looked up."""

    path: str
    rows: int
    dim: int
    bytes: int
    """Of its weights, whatever layout they have."""
    lookups: float = 1.0
    """Ids for one example."""
    cuttable: bool = True
    """Whether its rows and columns lie apart: a codebook or a hashed table can only be held whole, here or elsewhere."""
    seen: float = 0.0
    """Distinct rows among a batch's ids over the ids, measured on data (between 0 and 1); 0 is as if ids were uniform."""

    def __post_init__(self) -> None:
        if (
            min(self.rows, self.dim, self.bytes) < 1
            or not math.isfinite(self.lookups)
            or self.lookups < 0
            or not 0 <= self.seen <= 1
        ):
            raise ConfigError(f"table {self.path}: rows, dim and bytes from 1, lookups from 0, seen from 0 to 1; got {self}")

    def distinct(self, ids: float) -> float:
        """Distinct rows among so many ids."""
        if self.seen:
            return min(self.seen * ids, float(self.rows))
        return self.rows * -math.expm1(ids * math.log1p(-1 / self.rows)) if self.rows > 1 else min(1.0, ids)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One dense layer that could be cut over workers."""

    path: str
    inputs: int
    outputs: int
    flops: float
    """Forward, for one example."""
    bytes: int


@dataclasses.dataclass(frozen=True)
class Timed:
    """A step of a model's dense layers on one worker: seconds = fixed + row * rows (``calibrate.timed``)."""

    fixed: float
    row: float

    def __post_init__(self) -> None:
        if not (0 <= self.fixed < math.inf and 0 <= self.row < math.inf):
            raise ConfigError(f"a timed step has seconds from 0, got {self}")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one step of training asks."""

    name: str
    batch: int
    """Examples in a step, over all workers."""
    tables: tuple[Asked, ...]
    layers: tuple[Layer, ...]
    dense_bytes: int
    """Of all weights that are in no table, ``layers`` among them."""
    flops: float
    """Dense operations for one example, forward only."""
    activations: int
    """Bytes an example's forward leaves for its backward."""
    calls: int
    """Modules called in a forward, each a few operations."""
    norms: int = 0
    """Batch norms, whose statistics all workers share at each step."""
    update: Update = "adagrad"
    timed: Timed | None = None
    """The dense layers as they were timed here; None is predicted from ``flops``."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"a batch of {self.batch} rows; give 1 or more")

    @property
    def bytes(self) -> int:
        """Of all weights, held once."""
        return self.dense_bytes + sum(t.bytes for t in self.tables)

    @property
    def narrow(self) -> bool:
        """Whether rows may be cut: row-wise Adagrad keeps one number a row, so it needs them whole."""
        return self.update != "adagrad"

    def kept(self, table: Asked, share: float = 1.0) -> float:
        """Bytes a share of a table takes while it is trained: its weights and what its optimizer keeps."""
        weights = table.bytes * share
        if self.update == "dense":  # a gradient and two moments of every row
            return 4 * weights
        return weights * {"lazy-adam": 3, "sgd": 1}.get(self.update, 1) + (
            4 * table.rows * share if self.update == "adagrad" else 0
        )

    def replace(self, **changes: Any) -> Workload:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def of(bundle: Bundle, batch: int, update: Update = "adagrad", allow: Sequence[str] = ()) -> Workload:
    """What training a bundle's model asks; its tables have the bytes they have in the bundle."""
    columns = bundle.catalog.schema.features if bundle.catalog is not None else None
    held: dict[str, int] = {}
    for name, tensor in bundle.model.state.items():
        path = name.rpartition(".")[0]
        held[path] = held.get(path, 0) + tensor.numel() * tensor.element_size()
    return count(bundle.model.spec, batch, update, allow, columns=columns, held=held)


def count(
    spec: Spec,
    batch: int,
    update: Update = "adagrad",
    allow: Sequence[str] = (),
    *,
    columns: Sequence[Column] | None = None,
    held: Mapping[str, int] | None = None,
    name: str = "",
) -> Workload:
    """What training a model asks, from its description alone.

    Args:
        spec: the model's.
        batch: examples in a step, over all workers.
        update: how its tables are trained.
        allow: import paths of factories the user allowed.
        columns: what a batch has; by default the ``columns`` of the spec's args.
        held: bytes of each path's tensors, where they are known.
        name: what to call it; the factory's name by default.

    Raises:
        ConfigError: the model cannot be built, or no column is known to run it on.
    """
    read = columns_of(spec, columns)
    with torch.device("meta"):
        module = build(spec, allow).eval()
        small, large = (probe(read, rows) for rows in (PROBE, 2 * PROBE))
    watched = _Watch(module)
    with torch.no_grad():
        call(module, small, spec.inputs)
        before = watched.ids
        watched.reset()
        with FlopCounterMode(display=False) as counter:
            call(module, large, spec.inputs)
    tables, layers, inside = [], [], 0
    for path, child in leaves(module):
        asked, first = watched.ids.get(path, 0), before.get(path, 0)
        alike = bool(asked) and asked == first  # as of positions, which are looked up once a batch: weights like any other
        if _is_table(child) and not alike:
            tables.append(_table(path, child, (asked - first) / PROBE, held))
            inside += _bytes(child)
        elif type(child) is nn.Linear:
            flops = 2.0 * child.in_features * child.out_features * watched.rows.get(path, 0) / (2 * PROBE)
            layers.append(Layer(path, child.in_features, child.out_features, flops, _bytes(child)))
    return Workload(
        name=name or spec.factory.rpartition(":")[2],
        batch=batch,
        tables=tuple(tables),
        layers=tuple(layers),
        dense_bytes=max(0, _bytes(module) - inside),
        flops=counter.get_total_flops() / (2 * PROBE),
        activations=int(watched.kept / (2 * PROBE)),
        calls=watched.calls,
        norms=sum(isinstance(m, _BatchNorm) for m in module.modules()),
        update=update,
    )


def update_of(recipe: Recipe, numbers: int) -> Update:
    """How a recipe trains tables of so many numbers together; ``auto`` resolved as the training does."""
    if recipe.tables != "auto":
        return recipe.tables
    if numbers < sparse.LARGE:
        return "dense"
    return "lazy-adam" if recipe.optimizer.startswith("adam") else cast(Update, recipe.optimizer)


def columns_of(spec: Spec, columns: Sequence[Column] | None = None) -> tuple[Column, ...]:
    """The columns a model reads: those given, or those of its own args.

    Raises:
        ConfigError: nothing says what they are.
    """
    if columns is not None:
        return tuple(columns)
    given = spec.args.get("columns")
    if not given:
        raise ConfigError(
            f"{spec.factory} does not say which columns it reads; plan a bundle with a catalog, whose schema does"
        )
    return decode(tuple[Column, ...], given, "args.columns")  # type: ignore[no-any-return]


def probe(columns: Sequence[Column], rows: int = PROBE) -> Batch:
    """A batch of these columns for so many rows, ids and numbers all zero, on the current device."""
    made: dict[str, Tensor] = {}
    for column in columns:
        if column.kind == "numeric":
            made[column.name] = torch.zeros(rows, column.length) if column.length else torch.zeros(rows)
        elif column.kind in ("categorical", "sequence"):
            shape = (rows, column.length) if column.kind == "sequence" else (rows,)
            made[column.name] = torch.zeros(shape, dtype=torch.int64)
    return made


class _Watch:
    """Hooks on every leaf of a module: ids that tables are given, rows through dense layers, bytes that are left."""

    def __init__(self, module: nn.Module) -> None:
        self.reset()
        for path, child in module.named_modules():
            if path and not any(True for _ in child.children()):
                child.register_forward_hook(self._hook(path, _is_table(child)))

    def reset(self) -> None:
        """Count from nothing again."""
        self.ids: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.kept, self.calls = 0, 0

    def _hook(self, path: str, table: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            self.calls += 1
            if isinstance(output, Tensor):
                self.kept += output.numel() * output.element_size()
                self.rows[path] = self.rows.get(path, 0) + output.numel() // max(1, output.shape[-1])
            if table and given and isinstance(given[0], Tensor):
                self.ids[path] = self.ids.get(path, 0) + given[0].numel()

        return hook


def _is_table(child: nn.Module) -> bool:
    return isinstance(child, (nn.Embedding, nn.EmbeddingBag)) or Table.of(child) is not None


def _table(path: str, child: nn.Module, lookups: float, held: Mapping[str, int] | None) -> Asked:
    weighs = (held or {}).get(path) or _bytes(child)
    if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
        return Asked(path, child.num_embeddings, child.embedding_dim, weighs, lookups)
    known = Table.of(child)
    assert known is not None
    return Asked(path, known.rows, known.dim, weighs, lookups, known.layout == "full")


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
