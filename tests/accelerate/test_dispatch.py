"""Work goes where it ends first, in parts where that is sooner, and around a device that disappears."""

import threading

import numpy as np
import pytest
import torch

from pennyweight.accelerate.dispatch import Board, Dispatcher, Floats, cores
from pennyweight.accelerate.runner import Runner
from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError, DeviceError, RequestError
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Batch, Model, build, spec_of

CPU, GPU = Curve(0.2, 0.0, 0.01), Curve(3.0, 0.0, 0.001)
"""A GPU costs 3 ms before it does anything, and then a tenth an item."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def board(**lanes: Curve) -> tuple[Board, Clock]:
    clock = Clock()
    return Board(lanes, clock), clock


def test_small_work_to_the_cpu_and_large_to_the_gpu() -> None:
    made, _ = board(cpu=CPU, gpu=GPU)
    assert made.place(1, 100).lane == "cpu" and made.place(1, 1000).lane == "gpu"


def test_outstanding_milliseconds_decide() -> None:
    """Three pieces of 1 ms wait for the CPU, so even small work is done sooner by the GPU."""
    made, clock = board(cpu=CPU, gpu=GPU)
    for _ in range(3):
        made.give(made.place(1, 80))
    assert made.lanes["cpu"].free_ms == pytest.approx(3.0) and made.place(1, 80).lane == "gpu"
    clock.now = 2.5
    assert made.place(1, 80).lane == "cpu", "as time passes they are worked off"


def test_a_slow_piece_is_learned_and_counted() -> None:
    made, clock = board(cpu=CPU, gpu=GPU)
    for _ in range(60):
        part = made.place(1, 100, ("gpu",))
        made.give(part)
        clock.now += 12.0
        made.done(part, 1, 12.0)
        assert made.lanes["cpu"].free_ms == clock.now, "idle again, whatever was predicted"
    assert made.place(1, 100).lane == "gpu", "the CPU turned out ten times slower than its profile"


def test_a_large_request_is_split_so_that_all_end_at_once() -> None:
    made, _ = board(a=CPU, b=CPU)
    parts = made.split(1, 2000)
    assert [(p.start, p.stop) for p in parts] == [(0, 1000), (1000, 2000)] and {p.lane for p in parts} == {"a", "b"}
    assert len(made.split(1, 20)) == 1, "too small to pay another fixed cost"
    mixed, _ = board(cpu=CPU, gpu=Curve(1.0, 0.0, 0.004))
    first, second = mixed.split(1, 4000)
    ends = [mixed.lanes[p.lane].learned.ms(1, p.stop - p.start) for p in (first, second)]
    assert ends[0] == pytest.approx(ends[1], rel=0.01) and first.stop == second.start and second.stop == 4000


def test_a_busy_lane_gets_less_or_nothing() -> None:
    made, _ = board(a=CPU, b=CPU)
    made.give(made.place(1, 480))  # a is busy for 5 ms
    parts = made.split(1, 2000)
    size = {p.lane: p.stop - p.start for p in parts}
    assert size["b"] - size["a"] == pytest.approx(500, abs=2)
    for _ in range(4):
        made.give(made.place(1, 10_000, ("b",)))
    assert [p.lane for p in made.split(1, 2000)] == ["b"]


def test_a_lane_that_failed_rests_longer_each_time() -> None:
    made, clock = board(a=CPU, b=GPU)
    rests = []
    for _ in range(3):
        part = made.place(1, 10, ("b",))
        made.give(part)
        made.failed(part, device=True)
        assert made.place(1, 10).lane == "b"
        rests.append(made.lanes["a"].down_until_ms - clock.now)
        clock.now = made.lanes["a"].down_until_ms
        assert made.place(1, 10).lane == "a", "after its rest it is tried again"
    assert rests == [1000.0, 2000.0, 4000.0]
    made.done(made.place(1, 10), 1, 0.3)
    assert made.lanes["a"].failures == 0


def numbers(batch: Batch) -> Floats:
    return batch["x"].numpy().astype(np.float32) * 2


def batch(n: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(n)}


def test_parts_are_joined_in_order() -> None:
    used: set[str] = set()

    def lane(given: Batch) -> Floats:
        used.add(threading.current_thread().name.split("_")[0])
        return numbers(given)

    with Dispatcher({"a": lane, "b": lane, "c": lane}, dict.fromkeys("abc", CPU)) as dispatcher:
        assert dispatcher.score(batch(5001)).tolist() == (2 * np.arange(5001)).tolist()
    assert used == {"lane-a", "lane-b", "lane-c"}


@pytest.mark.parametrize("lost", [DeviceError("the GPU is gone"), RuntimeError("CUDA error: device-side assert")])
def test_a_device_that_disappears_is_routed_around(lost: Exception) -> None:
    calls = []

    def gone(given: Batch) -> Floats:
        calls.append(len(given["x"]))
        raise lost

    with Dispatcher({"gpu": gone, "cpu": numbers}, {"gpu": CPU, "cpu": GPU}) as dispatcher:
        for _ in range(5):
            assert dispatcher.score(batch(100)).tolist() == (2 * np.arange(100)).tolist()
        assert len(calls) == 1, "asked once, then left alone"
        assert dispatcher.board.lanes["gpu"].down_until_ms > dispatcher.board.clock()


def test_no_device_left() -> None:
    def gone(given: Batch) -> Floats:
        raise DeviceError("lost")

    with Dispatcher({"a": gone, "b": gone}) as dispatcher, pytest.raises(DeviceError, match="no device is left to run this"):
        dispatcher.score(batch(10))
    with pytest.raises(ConfigError, match="at least one lane"):
        Dispatcher({})


def test_a_wrong_input_is_nobodys_fault() -> None:
    def strict(given: Batch) -> Floats:
        raise RequestError("item 7 is not known")

    with Dispatcher({"a": strict, "b": strict}) as dispatcher:
        with pytest.raises(RequestError, match="item 7"):
            dispatcher.score(batch(10))
        assert not any(lane.failures for lane in dispatcher.board.lanes.values())

    def broken(given: Batch) -> Floats:
        raise KeyError("x")

    with Dispatcher({"a": broken, "b": broken}) as dispatcher:
        with pytest.raises(KeyError):
            dispatcher.score(batch(10))
        assert not any(lane.failures for lane in dispatcher.board.lanes.values()), "it failed everywhere"


def test_it_learns_while_it_serves_from_many_threads() -> None:
    with Dispatcher({"a": numbers, "b": numbers}) as dispatcher:
        threads = [threading.Thread(target=lambda: [dispatcher.score(batch(500)) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lanes = dispatcher.board.lanes.values()
        assert sum(lane.learned.count for lane in lanes) >= 80
        assert all(lane.waiting_ms == pytest.approx(0.0, abs=1e-6) for lane in lanes)


def test_cores_score_as_one_runner_does() -> None:
    columns = (Column("user", "user", "categorical", 20), Column("item", "item", "categorical", 50))
    spec = spec_of(DNN, columns=columns, dim=4, hidden=(8,), norm=False)
    bundle = Bundle(Model.of(build(spec), spec))
    rows = {"user": torch.full((4000,), 3), "item": torch.arange(4000) % 48 + 2}
    with Dispatcher(cores(bundle, 2), {"core0": CPU, "core1": CPU}) as dispatcher, Runner(bundle) as runner:
        assert len(dispatcher.board.split(1, 4000)) == 2
        assert dispatcher.score(rows) == pytest.approx(runner.score(rows), abs=1e-6)
