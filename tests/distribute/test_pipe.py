"""Which blocks make a pipeline, what is left of them on each worker, and what cannot be one; training is in test_launch."""

import pytest
import torch
from torch import nn

from pennyweight.core.errors import ConfigError
from pennyweight.distribute import pipe
from pennyweight.distribute.pipe import Micro
from pennyweight.model.placement import Placement
from pennyweight.model.team import Part


class Deep(nn.Module):
    """Some blocks of one kind, and a smaller list."""

    def __init__(self, blocks: int = 3, norm: bool = False) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        layers = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.ReLU()) for _ in range(blocks)]
        self.deep = nn.ModuleList(layers)


def test_the_blocks_that_hold_most_are_found() -> None:
    assert pipe.stack(Deep()) == "deep"
    with pytest.raises(ConfigError, match="Linear has no list of blocks"):
        pipe.stack(nn.Linear(3, 3))


@pytest.mark.parametrize(("workers", "held"), [(2, [1, 2]), (3, [1, 1, 1]), (5, [1, 1, 1, 0, 0])])
def test_each_worker_holds_its_stage_and_nothing_of_others(workers: int, held: list[int]) -> None:
    for rank, blocks in enumerate(held):
        module = Deep()
        parts = pipe.cut(module, Placement(workers, pipeline="deep"), rank)
        assert set(parts) == {f"deep.{k}.0.{name}" for k in range(3) for name in ("weight", "bias")}
        assert sum(p.numel() for p in module.deep.parameters()) == blocks * 72
        for name, part in parts.items():
            assert part.parameter is module.get_parameter(name) and part.shape[0] == 8
            assert part.mine.rows == (0, len(part.parameter))
    assert pipe.cut(Deep(), Placement(2), 0) == {}


@pytest.mark.parametrize(
    ("module", "placement", "said"),
    [
        (Deep(), Placement(2, pipeline="deeper"), "no list of two blocks"),
        (Deep(1), Placement(2, pipeline="deep"), "no list of two blocks"),
        (Deep(norm=True), Placement(2, pipeline="deep"), "batch norms"),
        (Deep(), Placement(2, pipeline="deep", dense={"deep.0.0": "row"}), "in its pipeline"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(module: nn.Module, placement: Placement, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pipe.cut(module, placement, 0)
    with pytest.raises(ConfigError, match="micro-batches"):
        Placement(2, pipeline="deep", micro=0)


def test_every_micro_batch_goes_through_every_stage_and_home_once() -> None:
    micros = [Micro(home, (0, 1), home, None) for home in (0, 0, 1, 1, 2)]
    gone: dict[int, list[tuple[int, int]]] = {m: [] for m in range(len(micros))}
    for tick in range(len(micros) + 2):
        turn = list(pipe._moves(micros, [2, 0], tick))
        assert len({m for m, *_ in turn}) == len(turn), "none is in two places"
        for m, source, target, step in turn:
            assert step == len(gone[m])
            gone[m].append((source, target))
    for m, steps in gone.items():
        home = micros[m].home
        assert steps == [(home, 2), (2, 0), (0, home)]


def test_rows_of_a_part_are_cut_out_of_its_spans() -> None:
    part = Part(((2, 5), (10, 14)), 20)
    whole = torch.arange(20)
    for start in range(8):
        for stop in range(start, 8):
            assert part.cut(start, stop).of(whole).tolist() == part.of(whole)[start:stop].tolist()
