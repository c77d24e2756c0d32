"""Placements by name cut every table they should, evenly, and again for another number of workers."""

import math

import pytest

from pennyweight.core.errors import ConfigError
from pennyweight.distribute import ways
from pennyweight.model.placement import Placement, Shard

TABLES = {"big": (1 << 18, 16), "wide": (5000, 64), "small": (40, 16), "thin": (90, 1)}


def held(placement: Placement, rank: int) -> int:
    """Numbers a rank holds of all tables."""
    return sum(p.numbers for path, shape in TABLES.items() for p in placement.held(path, *shape) if p.rank == rank)


def test_each_way_cuts_as_it_says() -> None:
    made = {way: ways.placed(way, TABLES, 4) for way in ways.WAYS}
    assert made["data"].shards == {}
    assert made["row"].shards == dict.fromkeys(sorted(TABLES), Shard("row", (0, 1, 2, 3)))
    assert made["hybrid"].shards == {"big": Shard("row", (0, 1, 2, 3))}
    assert made["column"].shards["thin"] == Shard("column", (0,))
    assert made["grid"].shards["big"] == Shard("grid", (0, 1, 2, 3), columns=2)
    assert {path: s.ranks for path, s in made["table"].shards.items()} == {
        "big": (0,),
        "wide": (1,),
        "small": (2,),
        "thin": (3,),
    }
    every = sum(math.prod(shape) for shape in TABLES.values())
    for way in set(ways.WAYS) - {"data", "hybrid"}:
        assert sum(held(made[way], rank) for rank in range(4)) == every, way


def test_replicas_cut_inside_a_group() -> None:
    assert ways.placed("row", TABLES, 6, replicas=2).shards["big"] == Shard("row", (0, 1, 2))


def test_again_for_fewer_or_more_workers() -> None:
    before = Placement(
        4, shards={"a": Shard("row", (0, 1, 2, 3)), "b": Shard("table", (3,)), "c": Shard("grid", (0, 1, 2, 3), 2)}
    )
    fewer = ways.again(before, 2)
    assert fewer.world_size == 2
    assert fewer.shards == {"a": Shard("row", (0, 1)), "b": Shard("table", (1,)), "c": Shard("grid", (0, 1), 2)}
    assert ways.again(before, 3).shards["c"] == Shard("grid", (0, 1, 2), 1)
    assert ways.again(Placement(4, replicas=2), 3).replicas == 1 and ways.again(Placement(4, replicas=2), 6).replicas == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="placement 'rows' is not one of data, table, row, column, grid, hybrid"):
        ways.placed("rows", TABLES, 2)
    with pytest.raises(ConfigError, match="3 workers in 2 replicas"):
        ways.placed("row", TABLES, 3, replicas=2)
