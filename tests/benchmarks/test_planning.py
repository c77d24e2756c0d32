"""The rows about plans: models are drawn alike each time, and TorchRec's words become ours."""

from pathlib import Path

import pytest

from benchmarks import planning
from pennyweight.core.hardware import Device, Link, Rates, Topology
from pennyweight.distribute import workload
from pennyweight.distribute.cost import Setting
from pennyweight.distribute.search import Search
from pennyweight.model.placement import Shard


def test_small_models_are_the_same_each_time_and_all_their_placements_can_be_tried() -> None:
    top = Topology((Device("cpu", "cpu", 2, 2**34),), 1, 2, Link(60, 2e9), None, Rates(4e9, 4e7, 8e9, 8))
    for seed in range(4):
        model = planning.small(seed)
        assert model == planning.small(seed)
        work = workload.count(model.spec, model.batch, model.update)
        made = list(Search(Setting(work, top, 1)).placements())
        assert len(work.tables) == 3 and 20 < len(made) < 130


@pytest.mark.parametrize(
    ("type", "ranks", "ours"),
    [
        ("data_parallel", [0, 1], None),
        ("table_wise", [1], Shard("table", (1,))),
        ("row_wise", [0, 1], Shard("row", (0, 1))),
        ("table_row_wise", [0, 1], Shard("row", (0, 1))),
        ("column_wise", [1, 0], Shard("column", (1, 0))),
        ("column_wise", [1, 1], Shard("table", (1,))),
    ],
)
def test_torchrecs_words_in_ours(type: str, ranks: list[int], ours: Shard | None) -> None:
    assert planning._shard({"type": type, "ranks": ranks}) == ours


def test_a_peer_that_is_not_there_is_not_asked(tmp_path: Path) -> None:
    assert planning.asked([], None) == []
    assert planning.asked([], tmp_path) == []
