"""The search for a batch size: it grows while it pays, never runs out of memory, and leaves the module as it was."""

import dataclasses
import time

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import DeviceError
from pennyweight.model import pace
from pennyweight.model.pace import Point, search
from pennyweight.model.ranking import DNN
from pennyweight.model.train import Recipe
from tests.model.test_train import COLUMNS, rows


class Greedy(nn.Module):
    """Takes 4 MB a row, so that a batch's memory is seen, and a while a step, so that larger batches pay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.held: list[Tensor] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        time.sleep(0.05)
        self.held = [torch.ones(len(batch["label"]) << 20)]
        return batch["hour"] * self.weight


@pytest.mark.parametrize("tables", ["dense", "adagrad", "lazy-adam"])
def test_a_setting_is_found_and_the_module_is_as_it_was(tables: str) -> None:
    torch.manual_seed(0)
    module, data = DNN(COLUMNS, dim=4, hidden=(16,), dropout=0.2), rows(n=40_000)
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    heard: list[Point] = []
    found = search(module, data, Recipe(tables=tables, embedding_l2=0.1, weight_decay=0.1), hear=heard.append)  # type: ignore[arg-type]
    assert found.best in found.points and tuple(heard) == found.points
    assert found.best.rows_per_s >= pace.CLOSE * max(p.rows_per_s for p in found.points if p.threads == found.best.threads)
    assert {p.batch for p in found.points} <= {256, 512}, "an epoch keeps 64 steps"
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not any(p.grad is not None for p in module.parameters())
    assert "forward" not in module.embeddings.__dict__ and not module.embeddings.tables["user"].sparse


def test_a_batch_that_does_not_fit_is_marked_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SMALLEST", 8)
    monkeypatch.setattr(pace, "TRIES", 3)
    # What other tests of this process have freed and not given back can be used beside the room.
    found = search(Greedy(), rows(n=40_000), Recipe(), room=150 << 20)
    assert 8 <= found.best.batch <= 256 and found.best.rows_per_s
    stopped = [p for p in found.points if not p.rows_per_s]
    assert stopped and all(p.note.startswith(("out of memory", "not tried")) for p in stopped)
    assert max(p.batch for p in stopped) > found.best.batch
    assert torch.ones(1 << 26).sum() == 1 << 26, "the guard is lifted"


def test_a_batch_that_would_not_fit_is_not_tried() -> None:
    ran = [Point(256, 2, 1.0, 100), Point(512, 2, 1.0, 200)]
    assert pace._foretold(ran, 1024, 2, 400) is None
    said = pace._foretold(ran, 1024, 2, 399)
    assert said is not None and not said.rows_per_s and "400 bytes, 399 may" in said.note


def test_no_room_for_the_smallest_batch_is_an_error() -> None:
    with pytest.raises(DeviceError, match="no memory to train on 256 rows at once"):
        search(Greedy(), rows(), Recipe(), room=64 << 20)


def test_sizes_grow_while_they_pay_and_the_smallest_close_one_is_taken() -> None:
    paces = {256: 10.0, 512: 19.0, 1024: 30.0, 2048: 30.5, 4096: 29.0, 8192: 31.0}
    asked: list[int] = []

    def tried(batch: int) -> Point:
        asked.append(batch)
        return Point(batch, 1, paces[batch])

    assert pace._grown(tried, 8192 * pace.STEPS).batch == 1024
    assert asked == [256, 512, 1024, 2048, 4096, 8192][: len(asked)] and len(asked) >= 4


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        search(Wrong(), rows(), dataclasses.replace(Recipe(), batch=1))
