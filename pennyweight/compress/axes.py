"""Rows written along the axes that answers depend on, in as many bits as each axis is worth.

A number of a row is not worth as much as another: in a trained click model one direction of an item's row may carry four
fifths of what its answers rest on, and half of the directions nothing. So rows are turned to where they can be told apart
(the principal axes of the rows, in the metric of Fisher's information about the answers), each axis gets its bits by reverse
water-filling (the next bit always goes where it takes away most; Cover and Thomas 2006, 10.3.3), its levels are those of
least loss (Lloyd 1982, Max 1960), and axes without bits are left out. What turns levels into rows is fitted anew by least
squares to what was rounded. This is transform coding (Goyal 2001), as sound and pictures are stored.

Levels of equal bits for every number (``code-tables``) and narrower rows (``narrow-tables``) are the alternatives, and both
see only the rows. On ML-1M's click model, one seed, validation rows: 64 bits a row cost .0001 AUC here and .0013 as 16 numbers
of 4 bits; 32 bits cost .0008, and .0026 along the rows' own axes. It costs a small product a lookup where a table is too large
to be held as fp32 rows while it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pennyweight.compress.rewrite import Change, finite, rewrite, targets, which
from pennyweight.compress.rotate import axes_of
from pennyweight.compress.share import kmeans, lookups, nearest
from pennyweight.compress.usage import information
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, Transform

LEFT = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.000163, 0.0000413)
"""What is left of a normal variance by 0 to 8 bits at their best levels (Max 1960; beyond 5 bits a quarter a bit)."""
FLOOR = 1e-4
"""Of the mean information, added in every direction: a sample says nothing of directions that answers hardly depend on."""


@named("code-axes")
@dataclasses.dataclass(frozen=True)
class CodeAxes(Transform):
    """Full fp32 tables to places along axes of their own, after training; a table that would not get smaller stays.

    Information and lookups are taken from ``env.train`` (or else ``env.calib``); without rows, or for a table that no gradient
    reaches, all directions and rows are worth the same.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    rate: float = 2.0
    """Bits a number of a row, on average; a row is rounded to whole bytes."""
    iterations: int = 25
    """Rounds of search for levels at most."""
    only: tuple[str, ...] = ()
    """Patterns of paths to code; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 8 or self.iterations < 1:
            raise ConfigError(
                f"rate = {self.rate}, iterations = {self.iterations}: rate is above 0 and at most 8 bits a number"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables coded."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        able = {p: (m, t) for p, (m, t) in found.items() if t.layout == "full" and t.data_type == "fp32" and t.dim > 1}
        told, counts = information(bundle.model, env, able), lookups(bundle.model, env, able)
        changes: dict[str, Change] = {}
        for path, (module, table) in able.items():
            known = told.get(path, torch.eye(table.dim))
            new = self._coded(path, module, table, known, counts[path].sqrt() + 0.1, env.seed)
            if new is not None:
                changes[path] = new
        if not changes:
            have = ", ".join(f"{p} ({t.layout} {t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no full fp32 table would get smaller by {self.rate:g} bits a number along axes; tables: {have}")
        return bundle.replace(model=rewrite(bundle.model, changes))

    def _coded(self, path: str, module: nn.Module, table: Table, metric: Tensor, weights: Tensor, seed: int) -> Change | None:
        rows = finite(path, rows_of(module))
        weights = weights.double()
        if table.padding is not None:
            weights[table.padding] = 0
        turn, energy = axes(rows.double(), weights, metric)
        turn = turn * rows.square().mean().sqrt().sqrt()  # levels and axes are of one size then, and neither too small for fp16
        bits = shared_out(energy.tolist(), max(1, round(self.rate * table.dim / 8)) * 8, table.rows)
        new = dataclasses.replace(table, layout="axes", data_type="fp16", bits=tuple(bits))
        if new.bytes() >= table.bytes():
            return None
        places, levels = self._placed((rows.double() @ turn[:, : len(bits)]).float(), bits, weights.float(), seed)
        held = torch.stack([level[place] for level, place in zip(levels, places, strict=True)], 1).double()
        return new, new.encode_axes(torch.stack(places, 1), levels, fitted(held, rows.double(), weights).float())

    def _placed(self, along: Tensor, bits: Iterable[int], weights: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of each axis, the number of the nearest level of each row, and the levels."""
        places, levels = [], []
        for axis, count in enumerate(bits):
            points = along[:, axis].reshape(1, -1, 1).contiguous()
            generator = torch.Generator().manual_seed(seed)
            found = kmeans(points, weights, 1 << count, self.iterations, generator, zero=False).half().float()
            places.append(nearest(points, found)[0])
            levels.append(found[0, :, 0])
        return places, levels

    def sketch(self) -> CodeAxes:
        """One step of the search for levels: the same bits of the same axes."""
        return dataclasses.replace(self, iterations=1)

    def describe(self) -> str:
        """What it does."""
        return f"embedding tables{which(self.only)} stored along axes in {self.rate:g} bits a number"


def axes(rows: Tensor, weights: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The axes [dim, dim] of rows [n, dim] weighted by [n] in a metric [dim, dim], as columns, and the energy along each [dim].

    ``rows @ axes`` are places whose squared differences add up to what a change costs in that metric; most energy first, all
        energies together 1.
    """
    metric = metric.double() / metric.trace().clamp_min(1e-300) * len(metric)
    strength, directions = torch.linalg.eigh(metric + FLOOR * torch.eye(len(metric), dtype=torch.float64))
    root = directions * strength.clamp_min(FLOOR).sqrt()
    scaled = (rows @ root) * weights.sqrt().unsqueeze(1)
    turned = root @ axes_of(scaled.T @ scaled).double()
    energy = ((rows @ turned).square() * weights.unsqueeze(1)).sum(0)
    energy, order = energy.sort(descending=True)
    return turned[:, order] / energy.sum().clamp_min(1e-300).sqrt() * weights.sum().sqrt(), energy / energy.sum().clamp_min(
        1e-300
    )


def shared_out(energy: list[float], total: int, rows: int) -> list[int]:
    """Bits of each axis with any, ``total`` together: the next always where it takes away most of what rounding costs.

    No axis gets more than 8, nor more levels than half as many as there are rows.
    """
    most = min(8, max(1, (rows // 2).bit_length() - 1))
    bits = [0] * len(energy)
    for _ in range(min(total, most * len(energy))):
        open_ = [k for k in range(len(bits)) if bits[k] < most]
        best = max(open_, key=lambda k: (energy[k] * (LEFT[bits[k]] - LEFT[bits[k] + 1]), -k))
        bits[best] += 1
    return bits[: max(k for k, b in enumerate(bits) if b) + 1]


def fitted(held: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The matrix [axes, dim] that makes of what is held [n, axes] the rows [n, dim], with the least squared error by weight."""
    scaled = held * weights.unsqueeze(1)
    gram = scaled.T @ held
    gram = gram + 1e-9 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram, scaled.T @ rows)
    return found
