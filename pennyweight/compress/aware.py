"""Tables trained while they are rounded: what rounding costs, training takes back where it can see it.

A retrieval model answers with the order of a whole catalogue, and rounding its rows after training shows there long before a
click rate notices. So each row a batch looks up is rounded on the way out, the loss sees what will be shipped, and its
gradient goes straight through to the row behind (Bengio et al. 2013). For shared rows the codes are found anew as rows move,
and the codebooks learn by the same gradient (van den Oord et al. 2017, without their commitment term: rows start at what
they are rounded to). Tuning codebooks with their codes frozen, the known alternative, is what ``ShareRows`` and then
``Distill`` do; it took back a fifth of the loss on Gowalla.

Ranges and codes are found for the whole table every ``REFRESH`` lookups rather than for a batch at each: a tenth of the time,
and rows move little in between. It costs epochs of training with full rows in memory.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.compress.distill import Distill
from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.compress.share import coded, lookups, means, points_of, quantize
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Model
from pennyweight.model.tables import BITS, CodebookTable, Table, pack_rows, rows_of, split_rows
from pennyweight.model.transform import Env, Transform

REFRESH = 40
"""Lookups of a table between two searches for ranges and codes."""
ITERATIONS = 12
"""Rounds of k-means to start codebooks with, at most; training goes on where they end."""

TRAINING = Distill(epochs=6, schedule="cosine")
"""Few epochs, since rows start at what they were."""


@named("train-rounded")
@dataclasses.dataclass(frozen=True)
class TrainRounded(Transform):
    """Full fp32 tables to ``data_type`` rows, or to ``parts`` shared codes a row, with a training that sees them so.

    Everything else in the model trains along and stays what it is. Bags, and tables that would not get smaller, are left alone.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["training"]] = "training"

    data_type: Literal["int8", "int4", "int2"] = "int4"
    """Of the rows, where they are not shared; codebooks stay fp32, for ``QuantizeTables`` to write smaller."""
    parts: int = 0
    """Codes a row; 0 does not share."""
    codes: int = 256
    """Centres a part, at most 256."""
    books: Literal["learned", "means"] = "learned"
    """Whether codebooks learn by gradient, or are the means of the rows that have their code, found anew as rows move: then a
    recipe that decays tables decays rows and codebooks alike."""
    training: Distill = TRAINING
    """How it is trained."""
    only: tuple[str, ...] = ()
    """Patterns of paths to round; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.parts < 0 or not 2 <= self.codes <= 256:
            raise ConfigError(f"parts = {self.parts}, codes = {self.codes}: parts must not be negative, codes 2 to 256")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables rounded and its model trained."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        new = {path: to for path, (_, table) in found.items() if (to := self._rounded(table)) is not None}
        if not new:
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no table would get smaller by {self.describe()}; tables: {have}")
        module = bundle.model.build(env.allow, copy=True)
        grids = self._grids(bundle.model, module, new, env)
        self.training.train(module, bundle.model.spec, env)
        tables = {path: cast(nn.Embedding, module.get_submodule(path)) for path in new}
        changes: dict[str, Change] = {p: (new[p], grids[p].written(rows_of(tables[p]))) for p in new}
        for table in tables.values():
            del table.grid
        return bundle.replace(model=rewrite(Model.of(module, bundle.model.spec), changes))

    def _rounded(self, table: Table) -> Table | None:
        if table.layout != "full" or table.data_type != "fp32" or table.bag is not None:
            return None
        if not self.parts:
            new = dataclasses.replace(table, data_type=self.data_type)
        elif table.rows < 2 * self.codes:
            return None
        else:
            new = dataclasses.replace(table, layout="codebook", parts=min(self.parts, table.dim), codes=self.codes)
        return new if new.bytes() < table.bytes() else None

    def _grids(self, model: Model, module: nn.Module, new: Mapping[str, Table], env: Env) -> dict[str, Grid]:
        """What each table is rounded to, put to work at its lookups."""
        counts = lookups(model, env, new) if self.parts else {}
        grids: dict[str, Grid] = {}
        for path, to in new.items():
            table = module.get_submodule(path)
            rows = finite(path, rows_of(table), to.data_type)
            grids[path] = Codes(to, rows, counts[path], env.seed, self.books) if self.parts else Levels(to)
            table.add_module("grid", grids[path])
            table.register_forward_hook(grids[path].hook, with_kwargs=True)
        return grids

    def sketch(self) -> TrainRounded:
        """One epoch: the same shapes."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, epochs=1))

    def describe(self) -> str:
        """What it does."""
        to = f"{self.parts} shared codes a row" if self.parts else f"{self.data_type} rows"
        return f"tables to {to}, trained while they are rounded"


class Grid(nn.Module, abc.ABC):
    """What the rows of one table are rounded to; a child of the table, so that fit finds what there is to train."""

    def __init__(self, to: Table) -> None:
        super().__init__()
        self.layer, self.age = to, REFRESH

    def train(self, mode: bool = True) -> Grid:
        """As ever; whoever judges the model next finds ranges and codes of the rows as they are."""
        self.age = REFRESH
        return super().train(mode)

    def hook(self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Tensor:
        """The rows a table looked up, rounded, with a gradient as if they were not."""
        ids = (*args, *kwargs.values())[0]
        if self.age >= REFRESH:
            self.refresh(rows_of(table))
            self.age = 0
        self.age += 1
        return self.rounded(rows, ids)

    @abc.abstractmethod
    def refresh(self, weight: Tensor) -> None:
        """Find ranges or codes for the rows [rows, dim] as they are."""

    @abc.abstractmethod
    def rounded(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows [..., dim] of these ids, rounded."""

    @abc.abstractmethod
    def written(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The rounded table's state."""


class Levels(Grid):
    """Row-wise levels: between two searches a row keeps its scale and bias."""

    affine: Tensor

    def refresh(self, weight: Tensor) -> None:
        """The scale and bias of each row."""
        self.affine = split_rows(pack_rows(weight, BITS[self.layer.data_type]), BITS[self.layer.data_type])[1].float()

    def rounded(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Each number at its nearest level."""
        scale, bias = F.embedding(ids, self.affine).chunk(2, -1)
        top = 2 ** BITS[self.layer.data_type] - 1
        levels = ((rows.detach() - bias) / scale).round().clamp(0, top)
        return rows + (torch.addcmul(bias, levels, scale) - rows).detach()

    def written(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Packed rows."""
        return self.layer.encode(weight)


class Codes(Grid):
    """Shared codes: between two searches a row keeps its codes, while the codebooks learn or stay."""

    def __init__(self, to: Table, weight: Tensor, counts: Tensor, seed: int, books: str) -> None:
        super().__init__(to)
        self.weights = counts.sqrt() + 0.1
        if to.padding is not None:
            self.weights[to.padding] = 0
        codes, centres = quantize(weight, to, self.weights, ITERATIONS, seed)
        self.table = CodebookTable(to)
        self.table.load_state_dict(to.encode_codebook(codes, centres))
        self.learned = books == "learned"
        self.table.codebooks.requires_grad_(self.learned)

    def refresh(self, weight: Tensor) -> None:
        """The nearest code of each part of each row, and codebooks that do not learn as the means of these rows."""
        centres = self.table.codebooks.detach()
        codes = coded(weight, self.layer, centres)
        if not self.learned:
            centres = means(points_of(weight, self.layer), self.weights, codes.T.long(), centres)
            if self.layer.padding is not None:
                centres[:, 0] = 0
            codes = coded(weight, self.layer, centres)
        self.table.load_state_dict({"codes": self.layer.pack_codes(codes), "codebooks": centres})

    def rounded(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Each part as its code's vector, which learns along with the row behind."""
        shared: Tensor = self.table(ids)
        return shared + (rows - rows.detach())

    def written(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Codes and codebooks."""
        self.refresh(weight)
        return {"codes": self.table.codes, **self.layer.encode_books(self.table.codebooks.detach())}
