"""Placements by name, for who does not want to plan: every table alike.

    data      every table whole on every worker (data parallel)
    table     every table whole on one worker, the largest first, each to the worker that holds least
    row       every table in blocks of rows over all workers
    column    in blocks of columns
    grid      in blocks of both: as many blocks of columns as divide the workers most evenly
    pipeline  as hybrid, and the blocks of a deep model on one worker each (``pipe``)
    hybrid    by row from ``sparse.LARGE`` / 16 numbers, whole below: small tables cost more to ask for than to hold

With ``replicas`` that is inside a group of workers, and groups hold the same (2D). Dense layers are whole everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import get_args

from torch import nn

from pennyweight.core.errors import ConfigError
from pennyweight.model import sparse
from pennyweight.model.placement import Kind, Placement, Shard

WAYS = ("data", *get_args(Kind), "hybrid")
SMALL = sparse.LARGE // 16
"""Numbers below which ``hybrid`` keeps a table whole."""


def tables(module: nn.Module) -> Mapping[str, tuple[int, int]]:
    """The tables of a module that can be cut, as [rows, dim] by path."""
    paths = {id(m): path for path, m in module.named_modules()}
    return {paths[id(t)]: (t.num_embeddings, t.embedding_dim) for t in sparse.trained(module)}


def placed(way: str, tables: Mapping[str, tuple[int, int]], workers: int, replicas: int = 1) -> Placement:
    """Tables [rows, dim] by path, placed by a name of ``WAYS``.

    Raises:
        ConfigError: no such way, or a number of workers that does not divide into the replicas.
    """
    if way not in WAYS:
        raise ConfigError(f"placement {way!r} is not one of {', '.join(WAYS)}, pipeline, nor a file")
    whole = Placement(workers, replicas=replicas)
    shards = {}
    load = [0] * whole.group
    for path in sorted(tables, key=lambda p: (-math.prod(tables[p]), p)):
        made = _shard(way, tables[path], load)
        if made is not None:
            shards[path] = made
    return dataclasses.replace(whole, shards=dict(sorted(shards.items())))


def _shard(way: str, shape: tuple[int, int], load: list[int]) -> Shard | None:
    rows, dim = shape
    everyone = tuple(range(len(load)))
    if way == "data" or (way == "hybrid" and rows * dim < SMALL):
        return None
    if way == "table":
        least = load.index(min(load))
        load[least] += rows * dim
        return Shard("table", (least,))
    if way == "column":
        return Shard("column", everyone[: max(1, min(dim, len(load)))])
    if way == "grid":
        across = max(d for d in range(1, math.isqrt(len(load)) + 1) if len(load) % d == 0 and d <= dim)
        return Shard("grid", everyone, columns=len(load) if across == 1 and len(load) <= dim else across)
    return Shard("row", everyone)


def again(placement: Placement, workers: int) -> Placement:
    """The same placement for another number of workers: each table is cut alike, over all of a group.

    Replicas are kept where they divide the workers, else there is one.
    """
    replicas = placement.replicas if workers % placement.replicas == 0 else 1
    group = workers // replicas
    shards = {path: _over(shard, group) for path, shard in placement.shards.items()}
    return dataclasses.replace(placement, world_size=workers, replicas=replicas, shards=shards)


def _over(shard: Shard, group: int) -> Shard:
    if shard.kind == "table":
        return Shard("table", (shard.ranks[0] % group,))
    return Shard(shard.kind, tuple(range(group)), shard.columns if group % shard.columns == 0 else 1)
