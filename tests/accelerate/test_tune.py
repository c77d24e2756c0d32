"""The fastest runtime is found by the rules, inside the time, and the trace says what became of every candidate."""

import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate.compile import eager
from pennyweight.accelerate.tune import CHOSEN, MAKES_S, SetRuntime, Timing, tune
from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError, DeviceError, PlanError
from pennyweight.core.measure import Call, Latency
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Runtime
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Batch, Model, build, spec_of
from pennyweight.model.transform import Env, Transform

module = sys.modules["pennyweight.accelerate.tune"]
COLUMNS = (Column("user", "user", "categorical", 20), Column("item", "item", "categorical", 50))
BATCHES = [{"user": torch.full((9,), 2 + k), "item": torch.arange(2, 11)} for k in range(3)]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    spec = spec_of(DNN, columns=COLUMNS, dim=4, hidden=(8,))
    return Bundle(Model.of(build(spec), spec))


class Bench:
    """Stands in for the clock: each runtime takes the milliseconds it is given, and the seconds asked for are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: Callable[[Runtime], float]) -> None:
        self.now, self.rungs, self.runtimes = 0.0, list[list[Runtime]](), dict[int, Runtime]()
        self.ms, self.broken = ms, dict[str, str]()
        monkeypatch.setattr(module, "interleaved", self.interleaved)
        monkeypatch.setattr(module, "over", self.over)
        monkeypatch.setattr(module, "make", self.make)
        monkeypatch.setattr(module, "export", lambda *_: pytest.fail("no export was expected"))
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def over(self, score: Callable[[Batch], object], batches: Sequence[Batch]) -> Call:
        return score  # type: ignore[return-value]

    def make(self, net: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Callable[[Batch], Tensor]:
        if runtime.engine in self.broken:
            raise DeviceError(self.broken[runtime.engine])
        self.now += MAKES_S[runtime.engine]
        return eager(net)

    def interleaved(self, calls: Sequence[Call], *, rounds: int, warmup: int, seconds: float | None) -> list[Latency]:
        live = [call.__self__.runtime for call in calls]  # type: ignore[attr-defined]
        self.rungs.append(live)
        self.now += seconds or 0
        times = [self.ms(r) for r in live]
        return [Latency(t, t, t, t, rounds, best_ms=t) for t in times]


def chosen(trace: Sequence[Timing]) -> list[Runtime]:
    return [t.runtime for t in trace if t.note == CHOSEN]


def test_the_fastest_is_found_by_halving(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, lambda r: 10.0 - r.threads * 0.9 + (r.batch == 0))
    best, trace = tune(bundle, BATCHES, seconds=60, engines=["eager"], threads=(8, 4, 1, 2), cuts=(64, 0))
    assert best == SetRuntime("eager", 8, 64) and chosen(trace) == [Runtime("eager", 8, 64)]
    assert [len(rung) for rung in bench.rungs] == [8, 8, 4, 2], "a screen, then halves"
    assert [t.runtime for t in trace] == [Runtime("eager", n, c) for n in (1, 2, 4, 8) for c in (0, 64)]
    assert all(t.latency and (t.note or t.runtime in bench.rungs[-1]) for t in trace)


def test_the_time_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, lambda r: 1.0)
    tune(bundle, BATCHES, seconds=100, engines=["eager", "compile"], threads=(1,), cuts=(0, 8, 16))
    assert bench.now == pytest.approx(100)


@pytest.mark.parametrize(("second", "wanted"), [(0.96, 1), (0.94, 2)])
def test_a_tie_goes_to_the_simpler(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, second: float, wanted: int) -> None:
    Bench(monkeypatch, lambda r: second if r.threads == 2 else 1.0)
    best, _ = tune(bundle, BATCHES, engines=["eager"], threads=(2, 1))
    assert best.threads == wanted


def test_among_engines_eager_is_the_simpler(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, lambda r: 1.0)
    best, trace = tune(bundle, BATCHES, seconds=1000, engines=["compile", "eager"], threads=(1,))
    assert best.engine == "eager" and [t.runtime.engine for t in trace] == ["eager", "compile"]


def test_the_hopeless_get_three_calls(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two threads on two busy cores: 100 times slower, which would eat the time of all others."""
    bench = Bench(monkeypatch, lambda r: 100.0 if r.threads == 2 else 1.0)
    _, trace = tune(bundle, BATCHES, engines=["eager"], threads=(1, 2), cuts=(0, 4))
    assert [r.threads for r in bench.rungs[0]] == [1, 1, 2, 2]
    assert all(r.threads == 1 for rung in bench.rungs[1:] for r in rung)
    assert [t.note for t in trace if t.runtime.threads == 2] == ["dropped after three calls, all slower than 4 ms"] * 2


def test_an_engine_that_cannot_be_had_is_in_the_trace(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, lambda r: 1.0)
    bench.broken["compile"] = "no C++ compiler"
    best, trace = tune(bundle, BATCHES, seconds=70, engines=["eager", "compile"], threads=(1, 2))
    assert best.engine == "eager"
    assert [(t.latency, t.note) for t in trace if t.runtime.engine == "compile"] == [(None, "no C++ compiler")] * 2
    bench.broken["eager"] = "no way"
    with pytest.raises(PlanError, match=r"no engine runs this model: no C\+\+ compiler; no way"):
        tune(bundle, BATCHES, seconds=70, engines=["eager", "compile"], threads=(1, 2))


def test_an_engine_that_takes_too_long_to_make_is_not_tried(bundle: Bundle) -> None:
    best, trace = tune(bundle, BATCHES, seconds=0.2, threads=(1,))
    assert best == SetRuntime("eager", 1, 0)
    assert trace[0].latency and trace[0].latency.n >= 3 and trace[0].note == CHOSEN
    assert [t.note for t in trace[1:]] == [
        f"not tried: making it may take {s} s and 0 s were left" for s in (2, 10, 10, 60, 60)
    ]


def test_one_export_serves_every_number_of_threads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, lambda r: 1.0 / r.threads)
    made: list[str] = []

    class Graph:
        def __init__(self, net: nn.Module) -> None:
            self.net = net
            made.append("export")

        def scorer(self, threads: int) -> Callable[[Batch], Tensor]:
            made.append(f"{threads} threads")
            return eager(self.net)

    monkeypatch.setattr(module, "export", lambda net, probe, inputs: Graph(net))
    best, _ = tune(bundle, BATCHES, seconds=60, engines=["onnxruntime"], threads=(1, 2))
    assert made == ["export", "1 threads", "2 threads"]
    assert best == SetRuntime("onnxruntime", 2, 0)


def test_no_requests_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match=r"Trace\.sample"):
        tune(bundle, [])


def test_the_result_is_a_transform(bundle: Bundle) -> None:
    choice = SetRuntime("onnxruntime", 1, 256)
    assert choice.apply(bundle, Env()).runtime == Runtime("onnxruntime", 1, 256)
    assert decode(Transform, encode(choice)) == choice
    assert choice.describe() == "run with onnxruntime on 1 thread, 256 rows at a time"
    assert SetRuntime("eager", 0).describe() == "run with eager on as many threads as the engine likes"
    with pytest.raises(PlanError, match="change nothing"):
        choice.apply(choice.apply(bundle, Env()), Env())


@pytest.mark.parametrize("wrong", [{"engine": "tensorrt"}, {"threads": -1}, {"batch": -5}])
def test_a_runtime_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        SetRuntime(**wrong)  # type: ignore[arg-type]
