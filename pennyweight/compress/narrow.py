"""Fewer numbers a row: a trained table as short rows and a matrix that widens them.

The rows of a table seldom fill the dimensions they were given. The principal axes of its rows, weighted by how often each is
looked up, say how many are used; the rest is left out, and what is kept is a table and a small dense layer of their own
(``hashed.Narrow``), so both are quantized, shared and trained on like any other. Training with fewer dimensions from the start
is the known alternative, and the best by thomasahle/cce's runs on ML-1M at 5 to 32 times; it must be decided before training,
and for each table. It costs a small product a lookup.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from pennyweight.compress.rewrite import Change, finite, rewrite, targets
from pennyweight.compress.rotate import axes_of
from pennyweight.compress.share import lookups
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle
from pennyweight.model.hashed import Narrow, like
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform


@named("narrow-tables")
@dataclasses.dataclass(frozen=True)
class NarrowTables(Transform):
    """Full fp32 tables to rows of fewer numbers, along the principal axes of their rows.

    A table that would not get smaller stays as it is.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    keep: float = 0.5
    """Share of a row's numbers that is kept, above 0 and at most 1."""
    dim: int = 0
    """Numbers kept, in place of ``keep``."""
    weigh: Literal["lookups", "evenly"] = "lookups"
    """How much a row counts: by how often it is looked up, or as much as any other."""
    only: tuple[str, ...] = ()
    """Patterns of paths to narrow; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.dim < 0:
            raise ConfigError(
                f"keep = {self.keep}, dim = {self.dim}: keep must be above 0 and at most 1, dim must not be negative"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables narrowed."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        new = {p: (m, to) for p, (m, t) in found.items() if (to := self._narrowed(p, t)) is not None}
        if not new:
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            asked = f"{self.dim} numbers" if self.dim else f"{self.keep:.0%} of their numbers"
            raise PlanError(f"no full fp32 table would get smaller with {asked} a row; tables: {have}")
        counts = lookups(bundle.model, env if self.weigh == "lookups" else Env(allow=env.allow), new)
        changes: dict[str, Change] = {}
        for path, (module, to) in new.items():
            rows = finite(path, rows_of(module))
            axes = principal(rows, counts[path].sqrt() + 0.1)[:, : to.width]
            changes[path] = (to, {"short.weight": rows @ axes, "wide.weight": axes.contiguous()})
        return bundle.replace(model=rewrite(bundle.model, changes))

    def _narrowed(self, path: str, table: Table) -> Narrow | None:
        if table.layout != "full" or table.data_type != "fp32" or path.endswith(".short"):
            return None
        width = self.dim or max(1, round(self.keep * table.dim))
        new = Narrow(**like(table), width=min(width, table.dim))
        return new if new.bytes() < table.bytes() else None

    def sketch(self) -> NarrowTables:
        """All rows alike: the same shapes."""
        return dataclasses.replace(self, weigh="evenly")

    def describe(self) -> str:
        """What it does."""
        return f"table rows of {self.dim} numbers" if self.dim else f"table rows cut to {self.keep:.0%} of their numbers"


def principal(rows: Tensor, weights: Tensor) -> Tensor:
    """Axes [dim, dim] of rows [n, dim] weighted by [n], most first."""
    scaled = rows.double() * weights.double().sqrt().unsqueeze(1)
    return axes_of(scaled.T @ scaled)
