"""What clusters of rows have in common, taken out and kept once (see ``model.residual``).

It changes no answer and saves nothing by itself: the rest of each row is smaller than the row, half of it after one book on
Gowalla, so the bits that ``share-rows``, ``train-rounded`` and ``quantize-tables`` spend on it go further.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.compress.share import lookups, quantize
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle
from pennyweight.model.residual import Residual
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform


@named("subtract-centres")
@dataclasses.dataclass(frozen=True)
class SubtractCentres(Transform):
    """Full fp32 tables to centres that many rows share and the rest of each row, both fp32 tables of their own.

    A table with fewer than two rows for each centre, or of bags, stays as it is.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    books: int = 1
    """One-byte codes a row, each naming a centre in a book of its own."""
    codes: int = 256
    """Centres in each book, at most 256."""
    iterations: int = 25
    """Rounds of k-means a book at most."""
    only: tuple[str, ...] = ()
    """Patterns of paths to change; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if self.books < 1 or not 2 <= self.codes <= 256 or self.iterations < 1:
            raise ConfigError(
                f"books = {self.books}, codes = {self.codes}, iterations = {self.iterations}: "
                "there must be at least 1 book and 1 iteration, and 2 to 256 codes"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables in two."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        fit = {p: (m, t) for p, (m, t) in found.items() if self._fits(p, t)}
        if not fit:
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no full fp32 table has {2 * self.codes} rows for {self.codes} centres; tables: {have}")
        counts = lookups(bundle.model, env, fit)
        changes: dict[str, Change] = {}
        for path, (module, table) in fit.items():
            codes, centres, rest = self._split(finite(path, rows_of(module)), table, counts[path].sqrt() + 0.1, env.seed)
            layer = Residual(table.rows, table.dim, self.books, self.codes, table.padding)
            changes[path] = (layer, {"codes": codes, "centres.weight": centres, "rest.weight": rest})
        return bundle.replace(model=rewrite(bundle.model, changes))

    def _fits(self, path: str, table: Table) -> bool:
        again = path.rpartition(".")[2] in ("centres", "rest")
        return (
            table.layout == "full"
            and table.data_type == "fp32"
            and not table.bag
            and not again
            and table.rows >= 2 * self.codes
        )

    def _split(self, rest: Tensor, table: Table, weights: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [rows, books], centres [books * codes, dim] and the rest [rows, dim] of rows [rows, dim]."""
        whole = dataclasses.replace(table, layout="codebook", parts=1, codes=self.codes)
        codes, books = [], []
        for _ in range(self.books):
            code, book = quantize(rest, whole, weights, self.iterations, seed)
            rest = rest - book[0][code[:, 0].long()]
            codes.append(code)
            books.append(book[0])
        return torch.cat(codes, 1), torch.cat(books), rest

    def describe(self) -> str:
        """What it does."""
        return f"{self.books * self.codes} centres taken out of table rows"
