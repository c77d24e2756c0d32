"""Tables turned together, so that what the scores rest on comes first and the rest can be dropped or shared evenly.

Where rows are read only through dot products and norms, turning all tables by one rotation changes no answer. Along the
principal axes of their rows, the last axes carry least, and leaving them out is a narrower model that needs no training to
begin with. For shared codes (``parts``) axes are dealt out so that all parts carry the same, the parametric solution of
optimized product quantization (Ge et al. 2013): its other half, a rotation stored beside each table, lets tables differ but
costs a product of matrices at each lookup. Whether a model reads its rows like that is not asked but tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.losses import Retriever
from pennyweight.model.spec import Batch, Model, call
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform

PROBE = 256
"""Rows of data that a rotated model must answer as before."""


@named("rotate-tables")
@dataclasses.dataclass(frozen=True)
class RotateTables(Transform):
    """Full fp32 tables of one width along the principal axes of all their rows, the last ones left out.

    It is for models that join rows by sums, dot products and cosines, such as ``MatrixFactorization``; any other is refused.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    dim: int = 0
    """Axes kept; 0 keeps all."""
    parts: int = 0
    """Parts that rows will be shared in, to carry the same each; 0 leaves the axes in order."""
    only: tuple[str, ...] = ()
    """Patterns of paths to turn; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.dim < 0 or self.parts < 0 or (self.dim and self.parts and self.dim % self.parts):
            raise ConfigError(f"dim = {self.dim}, parts = {self.parts}: neither may be negative, dim a multiple of parts")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables turned."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        wide = {path: (module, t) for path, (module, t) in found.items() if t.dim > 1}  # a bias has nothing to turn
        kinds = {(t.layout, t.data_type, t.dim) for _, t in wide.values()}
        if len(kinds) != 1 or next(iter(kinds))[:2] != ("full", "fp32"):
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in wide.items()) or "none"
            raise PlanError(f"tables to turn must be full, fp32 and of one width; there are: {have}; name them with only=")
        rows = {path: finite(path, rows_of(module)) for path, (module, _) in wide.items()}
        layers = {path: t for path, (_, t) in wide.items()}
        axes = principal(list(rows.values()))
        self._tried(rows, bundle.model, turned(bundle.model, layers, rows, axes), env)
        keep = self.dim or len(axes)
        if keep > len(axes):
            raise PlanError(f"dim = {keep}, and rows have {len(axes)} numbers; give at most as many")
        new = turned(bundle.model, layers, rows, self._kept(list(rows.values()), axes[:, :keep]))
        if all(_close(row, new.state[f"{path}.weight"]) for path, row in rows.items()):
            raise PlanError(f"{', '.join(rows)} lie along these axes already; there is nothing to turn")
        return bundle.replace(model=new)

    def _kept(self, rows: list[Tensor], axes: Tensor) -> Tensor:
        """The axes [dim, kept] in the order that they are written."""
        if not self.parts:
            return axes
        return axes[:, dealt(torch.stack([(r @ axes).square().mean(0) for r in rows]).sum(0), self.parts)]

    def _tried(self, rows: Iterable[str], before: Model, after: Model, env: Env) -> None:
        """Raise PlanError if a turned model does not answer as before."""
        data = cast(Dataset, env.calib if env.calib is not None else env.need("train", self))
        batch = next(data.batches(PROBE))
        with torch.inference_mode():
            a, b = (_answers(m.build(env.allow), batch, m.spec.inputs) for m in (before, after))
        if not _close(a, b):
            most = float((a - b).abs().max())
            raise PlanError(
                f"turning {', '.join(rows)} moves the scores by {most:.2g}, so their rows are not only added and multiplied "
                "with one another; name those that are with only="
            )

    def describe(self) -> str:
        """What it does."""
        return f"tables turned to {self.dim or 'their'} principal axes"


def _answers(module: nn.Module, batch: Batch, inputs: Sequence[str]) -> Tensor:
    """The module's output, and the scores of retrieval, which a cascade's output does not show."""
    output: Tensor = call(module, batch, inputs)
    if not hasattr(module, "item_vectors"):
        return output
    retriever = cast(Retriever, module)
    scores = retriever.user_vectors(batch) @ retriever.item_vectors(batch).T
    both: Tensor = torch.cat([output.flatten(), scores.flatten()])
    return both


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * a.abs().max().clamp_min(1e-30))


def principal(rows: list[Tensor]) -> Tensor:
    """Principal axes [dim, dim] of several tables' rows, most energy first; each table weighs the same."""
    gram = sum(r.double().T @ r.double() / r.double().square().sum().clamp_min(1e-30) for r in rows)
    return axes_of(cast(Tensor, gram))


def axes_of(gram: Tensor) -> Tensor:
    """Principal axes [dim, dim] of the summed products [dim, dim] of rows, most first; an axis' largest number is positive."""
    axes: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()).float()  # an axis has no sign of its own


def dealt(energy: Tensor, parts: int) -> Tensor:
    """An order of axes in which each of ``parts`` runs of neighbours has about the same product of energies.

    From the strongest on, axes go to the parts in rounds, in each round the next to the part with the least product so far
    (after the eigenvalue allocation of Ge et al. 2013).
    """
    logs = energy.clamp_min(1e-30).log()
    held: list[list[int]] = [[] for _ in range(parts)]
    for axis in logs.argsort(descending=True).tolist():
        min(held, key=lambda part: (len(part), float(logs[part].sum()))).append(axis)
    return torch.tensor([axis for part in sorted(held, key=len, reverse=True) for axis in part])


def turned(model: Model, layers: dict[str, Table], rows: dict[str, Tensor], axes: Tensor) -> Model:
    """The model with these tables along these axes [dim, kept]."""
    changes: dict[str, Change] = {}
    for path, layer in layers.items():
        to = dataclasses.replace(layer, dim=axes.shape[1])
        changes[path] = (to, to.encode(rows[path] @ axes))
    return rewrite(model, changes)
