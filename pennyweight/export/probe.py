"""Probe batches: what a bundle and its exports are both asked, to see that they answer alike.

Real requests where the catalogue has items, drawn by popularity like those that latencies are measured with; else made up
from the schema, or from what a graph that was taken over says of its inputs. A file of saved probes was the alternative: a
bundle would then carry somebody's rows. Three sizes, one row among them: a graph that froze the size of a batch fails at
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError
from pennyweight.data.catalog import Catalog
from pennyweight.data.requests import Trace
from pennyweight.data.schema import FIRST, Column
from pennyweight.model import keras
from pennyweight.model.bundle import Bundle
from pennyweight.model.layers import height
from pennyweight.model.onnx import Onnx
from pennyweight.model.spec import Spec

Batch = Mapping[str, Tensor]

ROWS = (1, 7, 100)
"""Sizes of the probes, where there is as much."""
FREE = 16
"""Length at which a free dimension behind the batch is tried."""


def batches(bundle: Bundle, module: nn.Module, data: Batch | None = None, seed: int = 0) -> list[Batch]:
    """Batches of growing size that the module can score; ``data`` are rows to use instead.

    Raises:
        DataError: the bundle says nowhere what a batch looks like.
    """
    whole = data or _asked(bundle.catalog, seed) or _declared(bundle.model.spec, module, seed)
    if not whole:
        raise DataError("the bundle has no catalogue that says what a row looks like; name a dataset with --data")
    most = height(whole)
    if most < 2:  # a batch of one would be taken for the only size there is
        whole, most = {n: t.expand(2, *t.shape[1:]) for n, t in whole.items()}, 2
    return [{n: t[:rows].contiguous() for n, t in whole.items()} for rows in _sizes(most)]


def retrieval(catalog: Catalog, seed: int = 0) -> tuple[Batch, Batch] | None:
    """Users of some requests, a row each, and items of the catalogue; None where it has too few items."""
    if catalog.items is None or len(catalog.item_ids) < 2:
        return None
    askers = [catalog.user_batch(r.user, r.history, r.context) for r in Trace.sample(catalog, ROWS[1], 1, seed)]
    users = {name: torch.cat([a[name] for a in askers]) for name in askers[0]}
    return users, catalog.item_batch(catalog.item_ids[: ROWS[-1]])


def cuts(users: Batch, items: Batch) -> tuple[tuple[int, int], ...]:
    """How many users and items each probe of a retrieval has."""
    asking, offered = map(height, (users, items))
    return (1, 1), (1, offered), (asking, offered)


def _sizes(most: int) -> list[int]:
    return sorted({min(rows, most) for rows in ROWS})


def _asked(catalog: Catalog | None, seed: int) -> Batch | None:
    if catalog is None:
        return None
    if catalog.items is not None:
        return Trace.sample(catalog, 1, ROWS[-1], seed).batches(catalog)[0]
    rng = np.random.default_rng(seed)
    return {c.name: torch.from_numpy(_column(c, ROWS[-1], rng)) for c in catalog.schema.features}


def _column(column: Column, rows: int, rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    shape = (rows, column.length) if column.length else (rows,)
    if column.kind == "numeric":
        return rng.standard_normal(shape, np.float32)
    ids = rng.integers(FIRST, column.size, shape)
    if column.kind == "sequence":  # of any length: padding on the left, as a user's history has it
        ids *= np.arange(column.length) >= rng.integers(0, column.length, (rows, 1))
    return ids


def _declared(spec: Spec, module: nn.Module, seed: int) -> Batch | None:
    """A batch by what a module that was taken over from elsewhere says of its inputs; ids are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, Onnx):
        return {n: e.probe(ROWS[-1], generator) for n, e in zip(spec.inputs, module.ready()[1], strict=True)}
    wanted = keras.entries(module) or [(i["shape"], i["dtype"]) for i in spec.args.get("inputs", ()) if isinstance(i, Mapping)]
    if len(wanted) != len(spec.inputs):
        return None
    return {n: _numbers(shape, dtype, generator) for n, (shape, dtype) in zip(spec.inputs, wanted, strict=True)}


def _numbers(shape: Sequence[int | None], dtype: str, generator: torch.Generator) -> Tensor:
    full = (ROWS[-1], *(FREE if d is None else d for d in shape))
    if getattr(torch, dtype.removeprefix("torch.")).is_floating_point:
        return torch.randn(full, generator=generator)
    return torch.randint(0, 2, full, generator=generator)
