"""A placement says who holds what; every number of a table is held once a group."""

import itertools

import pytest

from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError
from pennyweight.model.placement import Piece, Placement, Shard, span

SHARDS = (
    Shard("table", (2,)),
    Shard("row", (0, 1, 2, 3)),
    Shard("column", (3, 1)),
    Shard("grid", (0, 1, 2, 3), columns=2),
    Shard("grid", (5, 4, 3, 2, 1, 0), columns=2),
)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(("rows", "dim"), [(7, 5), (1000, 16), (4, 4)])
def test_every_number_is_held_once_and_evenly(shard: Shard, rows: int, dim: int) -> None:
    pieces = shard.pieces(rows, dim)
    held = [(r, c) for p in pieces for r, c in itertools.product(range(*p.rows), range(*p.columns))]
    assert sorted(held) == list(itertools.product(range(rows), range(dim)))
    assert tuple(p.rank for p in pieces) == shard.ranks
    for axis in ("rows", "columns"):
        sizes = [getattr(p, axis)[1] - getattr(p, axis)[0] for p in pieces]
        assert max(sizes) - min(sizes) <= 1
    assert sum(p.numbers for p in pieces) == rows * dim


def test_a_grid_lists_the_rows_of_its_first_columns_first() -> None:
    assert Shard("grid", (0, 1, 2, 3), columns=2).pieces(10, 8) == (
        Piece(0, (0, 5), (0, 4)),
        Piece(1, (5, 10), (0, 4)),
        Piece(2, (0, 5), (4, 8)),
        Piece(3, (5, 10), (4, 8)),
    )
    assert [span(5, 2, k) for k in range(2)] == [(0, 2), (2, 5)]


def test_a_table_not_named_is_whole_on_every_worker_of_a_group() -> None:
    placement = Placement(8, shards={"a": Shard("row", (0, 3))}, replicas=2)
    assert placement.group == 4
    assert [p.rank for p in placement.held("a", 10, 4)] == [0, 3]
    assert list(placement.held("b", 10, 4)) == [Piece(k, (0, 10), (0, 4)) for k in range(4)]


@pytest.mark.parametrize("shard", SHARDS)
def test_it_goes_through_json(shard: Shard) -> None:
    placement = Placement(6, {"t": "cpu"}, {"t": shard}, {"mlp.0": "column"})
    assert decode(Placement, encode(placement, slim=True)) == placement
    assert encode(Placement(), slim=True) == {}


def test_what_cannot_be_is_refused() -> None:
    for wrong, says in (
        (lambda: Shard("table", (0, 1)), "has one owner"),
        (lambda: Shard("row", ()), "name one rank"),
        (lambda: Shard("row", (1, 1)), "each once"),
        (lambda: Shard("row", (-1,)), "from 0"),
        (lambda: Shard("grid", (0, 1, 2), columns=2), "divide its ranks"),
        (lambda: Shard("column", (0, 1), columns=2), "only a grid"),
        (lambda: Placement(6, replicas=4), "6 workers in 4 replicas"),
        (lambda: Placement(0), "world size of 1"),
        (
            lambda: Placement(4, shards={"t": Shard("table", (2,))}, replicas=2),
            "t: shard on rank 2, but a group has ranks 0 to 1",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            wrong()  # type: ignore[no-untyped-call]
