"""How much each row of a table is used: how often it is looked up, times how hard the answers pull at it.

The product of frequency and gradient norm is what AdaEmbed (OSDI 2023) prunes rows by while it trains, as a moving average.
Here the model is trained already, so it is a sum over rows of data, and no labels are needed: they are drawn from the
model's own answers, and the squared gradients are then Fisher's information, what a change of a row costs at second order.
Frequency alone is the known alternative, and what is left where no gradient comes through (integer kernels).

Lookups are counted in all rows where what a table reads is a column, since a row seen once in a sample may be seen never or
thirty times in the data; gradients are averaged over a sample, a row's towards its table's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.compress.share import BATCH, BATCHES, lookups
from pennyweight.core.errors import PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.spec import Model, call, leaves
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform

_CHUNK = 1 << 20
Sums = tuple[Tensor, float, float]
"""The mean gradient norm of each row's lookups, float [rows]; all norms added up, and the lookups they came with."""


def rows_for(env: Env, by: Transform) -> Dataset:
    """The data that use is seen in: ``env.train``, or else ``env.calib``.

    Raises:
        PlanError: neither was given, or it is empty.
    """
    data = env.train if env.train is not None else env.calib
    if data is None or not len(data):
        raise PlanError(
            f"{type(by).__name__} looks at lookups and needs env.train (or env.calib), which was not given or is empty"
        )
    return data


def importance(model: Model, env: Env, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The use of each row, float [rows] by path: its lookups, each worth its mean gradient over that of all tables' lookups.

    The lookups themselves where the model lets no gradient through to one of the tables.
    """
    sums = _gradients(model, env, tuple(counts))
    total, asked = (sum(each[k] for each in sums.values()) for k in (1, 2))
    if not total > 0 or any(counts[path].any() and not seen for path, (_, _, seen) in sums.items()):
        return dict(counts)
    return {path: (counts[path] * mean).mul_(asked / total) for path, (mean, _, _) in sums.items()}


def information(model: Model, env: Env, paths: Iterable[str]) -> dict[str, Tensor]:
    """What a change of what a table answers costs, by path: Fisher's information [dim, dim], a mean over its lookups.

    Half the cost of a small change d of a row is ``d @ information @ d``, in nats where answers are probabilities. A table that
    no gradient reaches, or that no row looks up, has none and is left out.
    """
    data = env.train if env.train is not None else env.calib
    loss = env.recipe.loss if env.recipe is not None else "bce"
    known, asked = _INFORMED.setdefault(model, {}), {path: (path, env.seed, loss) for path in paths}
    missing = [path for path, key in asked.items() if key not in known or known[key][0] is not data]
    if data is None:
        return {}
    if missing:
        # All tables while the rows pass by: whoever asks for one asks for the others next.
        every = dict.fromkeys((*missing, *(p for p, m in leaves(model.build(env.allow)) if Table.of(m) is not None)))
        found = _informed(model, env, tuple(every), data, loss)
        known |= {(path, env.seed, loss): (data, found.get(path)) for path in every}
    told = {path: known[key][1] for path, key in asked.items()}
    return {path: each for path, each in told.items() if each is not None}


_INFORMED: WeakKeyDictionary[Model, dict[tuple[str, int, str], tuple[Dataset, Tensor | None]]] = WeakKeyDictionary()
"""Information by table, seed and loss, with the rows it was seen in: who tries several rates asks again for each."""


def _informed(model: Model, env: Env, paths: Sequence[str], data: Dataset, loss: str) -> dict[str, Tensor]:
    sums: dict[str, tuple[Tensor, int]] = {}
    for calls in _pulled(model, env, paths, data, loss):
        for path, _, rows in calls:
            if rows.grad is not None and len(pulls := rows.grad.flatten(0, -2).double()):
                total, seen = sums.get(path, (torch.zeros(()), 0))
                sums[path] = total + pulls.T @ pulls, seen + len(pulls)
    return {path: total / seen for path, (total, seen) in sums.items() if total.trace() > 0}


def counted(model: Model, env: Env, paths: Iterable[str], data: Dataset) -> dict[str, Tensor]:
    """How often each row is looked up, float [rows] by path: in all rows of columns that tables read, else in a sample."""
    asked = tuple(paths)
    if len(data) <= BATCH * BATCHES:
        return lookups(model, env, asked)
    module, read = model.build(env.allow), _columns(model, env, asked, data)
    exact = {
        path: sum((_tally(data, c, int(module.get_submodule(path).num_embeddings)) for c in columns), torch.zeros(()))  # type: ignore[arg-type]
        for path, columns in read.items()
    }
    sampled = lookups(model, env, [path for path in asked if path not in exact])
    return {path: exact[path] if path in exact else sampled[path] for path in asked}


def _tally(data: Dataset, column: str, rows: int) -> Tensor:
    ids, found = data.column(column).reshape(-1), np.zeros(rows, np.int64)
    for at in range(0, len(ids), _CHUNK):
        found += np.bincount(ids[at : at + _CHUNK], minlength=rows)
        data.release()
    return torch.from_numpy(found).float()


def _columns(model: Model, env: Env, paths: Sequence[str], data: Dataset) -> dict[str, list[str]]:
    """The columns whose ids a table is asked for, call by call; left out where one call asks for anything else."""
    module, batch = model.build(env.allow), next(data.batches(BATCH))
    calls = _tapped(module, paths)
    with torch.no_grad():
        call(module, batch, model.spec.inputs)
    found: dict[str, list[str]] = {}
    for path, ids, _ in calls:
        found.setdefault(path, []).append(next((name for name, column in batch.items() if _same(ids, column)), ""))
    return {path: columns for path, columns in found.items() if all(columns)}


def _same(ids: Tensor, column: Tensor) -> bool:
    return ids.shape == column.shape and ids.dtype == column.dtype and torch.equal(ids, column)


_SUMMED: WeakKeyDictionary[Model, dict[tuple[str, int, str], tuple[Dataset, Sums]]] = WeakKeyDictionary()
"""Sums by table, seed and loss, with the rows they were seen in: who tries several shares asks again for each."""


def _gradients(model: Model, env: Env, paths: Sequence[str]) -> dict[str, Sums]:
    """Gradients in a sample of the data; empty where none comes through."""
    data = env.train if env.train is not None else env.calib
    loss = env.recipe.loss if env.recipe is not None else "bce"
    known = _SUMMED.setdefault(model, {})
    asked = {path: (path, env.seed, loss) for path in paths}
    missing = [path for path, key in asked.items() if key not in known or known[key][0] is not data]
    if data is not None and missing:
        known |= {asked[path]: (data, sums) for path, sums in _summed(model, env, missing, data, loss).items()}
    return {path: known[key][1] for path, key in asked.items()} if all(key in known for key in asked.values()) else {}


def _summed(model: Model, env: Env, paths: Sequence[str], data: Dataset, loss: str) -> dict[str, Sums]:
    module = model.build(env.allow)
    sizes = {path: int(module.get_submodule(path).num_embeddings) for path in paths}  # type: ignore[arg-type]
    sums = {path: (torch.zeros(size), torch.zeros(size)) for path, size in sizes.items()}
    any_ = False
    for calls in _pulled(model, env, paths, data, loss):
        any_ = True
        for path, ids, rows in calls:
            if rows.grad is not None:
                norms = _each(ids, rows.grad.flatten(0, -2).norm(dim=1))
                sums[path][0].index_add_(0, ids.reshape(-1), norms)
                sums[path][1].index_add_(0, ids.reshape(-1), torch.ones_like(norms))
    return {path: _means(*each) for path, each in sums.items()} if any_ else {}


def _pulled(model: Model, env: Env, paths: Sequence[str], data: Dataset, loss: str) -> Iterator[list[Call]]:
    """What tables were asked for and gave, with its gradient, batch by batch of a sample; nothing where none comes through."""
    module, generator = model.build(env.allow), torch.Generator().manual_seed(env.seed)
    calls = _tapped(module, paths)
    for batch in islice(data.batches(BATCH, shuffle=True, seed=env.seed), BATCHES):
        calls.clear()
        try:
            with torch.enable_grad():
                _drawn(call(module, batch, model.spec.inputs), loss, generator).backward()  # type: ignore[no-untyped-call]
        except RuntimeError:  # an operator on the way knows no gradient
            return
        yield calls
    data.release()


def _means(norms: Tensor, seen: Tensor) -> Sums:
    """Of norms and lookups [rows], which are written over: a row's mean, as if it had once more been its table's."""
    total, asked = float(norms.sum()), float(seen.sum())
    return norms.add_(total / max(asked, 1)).div_(seen.add_(1)), total, asked


Call = tuple[str, Tensor, Tensor]
"""A lookup: the table's path, the ids, and the rows, which gradients end at."""


def _tapped(module: nn.Module, paths: Iterable[str]) -> list[Call]:
    """A list that grows by what tables are asked for and give."""
    calls: list[Call] = []

    def tap(path: str) -> Any:
        def keep(table: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], rows: Tensor) -> Tensor:
            leaf = rows.detach().requires_grad_()
            calls.append((path, (*args, *kwargs.values())[0], leaf))
            return leaf.clone()  # for a model that writes into what it looked up

        return keep

    for path in paths:
        module.get_submodule(path).register_forward_hook(tap(path), with_kwargs=True)
    return calls


def _each(ids: Tensor, norms: Tensor) -> Tensor:
    """The norm for each id: its row's, or its bag's."""
    if len(norms) == ids.numel():
        return norms
    if ids.dim() == 2:
        return norms.repeat_interleave(ids.shape[1])
    return norms.mean().expand(ids.numel())  # bags of any length, by their offsets


def _drawn(output: Tensor, loss: str, generator: torch.Generator) -> Tensor:
    """The loss of answers against labels drawn from them; of answers that are no logits, each a step to a random side."""
    if loss == "cross-entropy" and output.dim() == 2:
        return F.cross_entropy(
            output, torch.multinomial(output.detach().softmax(1), 1, generator=generator)[:, 0], reduction="sum"
        )
    chance = torch.rand(output.shape, generator=generator)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(output, (chance < output.detach().sigmoid()).float(), reduction="sum")
    return (output * (chance < 0.5).float().mul(2).sub(1)).sum()
