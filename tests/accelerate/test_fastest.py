"""Few points are measured, failures are marked, and what another machine found is not used."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate.compile import eager
from pennyweight.accelerate.tune import CHOSEN, SetRuntime, Tuning, fastest, folder
from pennyweight.core import hardware
from pennyweight.core.errors import DeviceError, PlanError
from pennyweight.core.measure import Call, Latency
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Index, Runtime
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Batch, Model, build, spec_of
from pennyweight.model.transform import Env

module = sys.modules["pennyweight.accelerate.tune"]
COLUMNS = (Column("user", "user", "categorical", 20), Column("item", "item", "categorical", 50))
BATCHES = [{"user": torch.full((300,), 2 + k), "item": torch.arange(300) % 48 + 2} for k in range(2)]
ENGINES = ("eager", "onnxruntime", "compile")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    spec = spec_of(DNN, columns=COLUMNS, dim=4, hidden=(8,))
    return Bundle(Model.of(build(spec), spec))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """Times are given: ONNX Runtime is twice as fast, a second thread costs, a cut of 64 helps. What was timed is kept."""
    timed: list[Runtime] = []

    def ms(r: Runtime) -> float:
        return (
            {"eager": 4.0, "onnxruntime": 2.0, "compile": 3.0}[r.engine]
            * (1 + 0.3 * (r.threads - 1))
            * (1 - 0.2 * (r.batch == 64))
        )

    def interleaved(calls: Sequence[Call], **_: object) -> list[Latency]:
        live = [call.__self__.runtime for call in calls]  # type: ignore[attr-defined]
        timed.append(live[-1])
        first = ms(live[0])
        return [Latency(ms(r), ms(r), 0, 0, 9, best_ms=ms(r), ratio=ms(r) / first) for r in live]

    monkeypatch.setattr(module, "interleaved", interleaved)
    monkeypatch.setattr(module, "over", lambda score, batches: score)
    return timed


def plain(net: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Callable[[Batch], Tensor]:
    return eager(net)


def tuned(bundle: Bundle, maker: object = plain, **settings: object) -> Tuning:
    given = {"seconds": 1000, "engines": ENGINES, "threads": (1, 2, 4), "cuts": (0, 32, 64, 128), "maker": maker} | settings
    return fastest(bundle, BATCHES, **given)  # type: ignore[arg-type]


def test_the_best_in_a_share_of_the_trials(bundle: Bundle, clock: list[Runtime]) -> None:
    found = tuned(bundle, share=0.4)
    assert (found.chosen.engine, found.chosen.threads, found.chosen.batch) == ("onnxruntime", 1, 64)
    assert found.points == 36 and len(found.trace) <= 0.4 * 36
    assert [t.note for t in found.trace].count(CHOSEN) == 1
    assert found.chosen.machine == hardware.fingerprint()


def test_cuts_no_smaller_than_a_request_are_left_out(bundle: Bundle, clock: list[Runtime]) -> None:
    assert tuned(bundle, cuts=(0, 64, 300, 5000)).points == 3 * 3 * 2


def test_out_of_memory_is_a_marked_point(bundle: Bundle, clock: list[Runtime]) -> None:
    """All rows at once and cuts of 128 do not fit in ONNX Runtime; smaller cuts do, and win."""

    def maker(net: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Callable[[Batch], Tensor]:
        if runtime.engine != "onnxruntime":
            return eager(net)

        def score(batch: Batch) -> Tensor:
            if len(batch["user"]) > 100:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
                )
            return eager(net)(batch)

        return score

    found = tuned(bundle, maker, cuts=(64, 0, 128), share=0.5)
    assert (found.chosen.engine, found.chosen.batch) == ("onnxruntime", 64)
    notes = [t.note for t in found.trace if t.latency is None]
    assert "out of memory in cuts of all rows" in notes and all("memory" in n for n in notes)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_errors_of_every_kind(bundle: Bundle, clock: list[Runtime], error: Exception) -> None:
    def maker(net: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Callable[[Batch], Tensor]:
        def score(batch: Batch) -> Tensor:
            raise error

        return eager(net) if runtime.engine == "eager" else score

    found = tuned(bundle, maker)
    assert found.chosen.engine == "eager" and any(t.note.startswith("out of memory") for t in found.trace)


def test_an_engine_that_fails_is_said_and_not_chosen(bundle: Bundle, clock: list[Runtime]) -> None:
    """No compiler when it is made, and an operator that is lacking when it runs."""

    def maker(net: nn.Module, runtime: Runtime, probe: Batch, inputs: Sequence[str]) -> Callable[[Batch], Tensor]:
        if runtime.engine == "compile":
            raise DeviceError("engine 'compile' needs a C++ compiler and none was found; apt install g++")
        if runtime.engine == "eager":
            return eager(net)

        def score(batch: Batch) -> Tensor:
            raise NotImplementedError("no kernel for EmbeddingBag")

        return score

    found = tuned(bundle, maker)
    notes = {t.runtime.engine: t.note for t in found.trace if t.latency is None}
    assert found.chosen.engine == "eager" and "apt install g++" in notes["compile"]
    assert notes["onnxruntime"] == "engine 'onnxruntime' failed while it ran: NotImplementedError: no kernel for EmbeddingBag"


def test_nothing_runs(bundle: Bundle) -> None:
    def maker(*_: object) -> Callable[[Batch], Tensor]:
        raise DeviceError("no engine here")

    with pytest.raises(PlanError, match="no engine here"):
        tuned(bundle, maker)
    with pytest.raises(PlanError, match=r"Trace\.sample"):
        fastest(bundle, [])


def test_bf16_where_logits_stay(bundle: Bundle, clock: list[Runtime]) -> None:
    found = tuned(bundle, engines=("eager",), threads=(1,), cuts=(0,), precisions=("fp32", "bf16"), share=1.0)
    assert found.points == 2 and len(found.trace) == 2
    shifted = lambda net, runtime, probe, inputs: (  # noqa: E731
        eager(net) if runtime.precision == "fp32" else lambda batch: eager(net)(batch) + 1.0
    )
    found = tuned(bundle, shifted, engines=("eager",), threads=(1,), cuts=(0,), precisions=("fp32", "bf16"), share=1.0)
    assert found.chosen.precision == "fp32" and "bf16 moves logits" in found.trace[1].note
    assert SetRuntime(precision="bf16").apply(bundle, Env()).runtime.precision == "bf16"


def test_it_is_remembered_by_machine_and_shape(
    bundle: Bundle, clock: list[Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuned(bundle, memory=tmp_path)
    done = len(clock)
    again = tuned(bundle, memory=tmp_path)
    assert again.chosen == first.chosen and len(clock) == done and "remembered from" in again.note
    other = spec_of(DNN, columns=COLUMNS, dim=4, hidden=(16,))
    assert not tuned(Bundle(Model.of(build(other), other)), memory=tmp_path).note, "another shape is measured"
    monkeypatch.setattr(hardware, "fingerprint", lambda: "a GPU, 99 cores")
    moved = tuned(bundle, memory=tmp_path)
    assert "and this is 'a GPU, 99 cores'; measured again" in moved.note and len(clock) > done
    assert moved.chosen.machine == "a GPU, 99 cores"


@pytest.mark.parametrize("content", ["", "{", json.dumps({"machine": "x"})])
def test_a_damaged_memory_is_measured_again(bundle: Bundle, clock: list[Runtime], tmp_path: Path, content: str) -> None:
    tuned(bundle, memory=tmp_path)
    for file in tmp_path.iterdir():
        file.write_text(content)
    found = tuned(bundle, memory=tmp_path)
    assert "cannot be read and is measured again" in found.note and found.trace


def test_a_folder_that_cannot_be_written_is_no_error(bundle: Bundle, clock: list[Runtime], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert tuned(bundle, memory=tmp_path / "file" / "below").chosen.engine == "onnxruntime"


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path))
    assert folder() == tmp_path
    monkeypatch.delenv("PENNYWEIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "pennyweight"


def test_the_index_is_kept(bundle: Bundle) -> None:
    index = Index("ivf", "int8")
    given = bundle.replace(runtime=Runtime("compile", index=index))
    assert SetRuntime("eager", 1).apply(given, Env()).runtime == Runtime("eager", 1, index=index)


def test_real_engines_on_the_real_clock(bundle: Bundle) -> None:
    found = fastest(bundle, BATCHES, seconds=0.5, engines=("eager",), threads=(1,), cuts=(0, 64, 128), share=1.0)
    assert found.chosen.engine == "eager" and found.points == 3 and all(t.latency for t in found.trace[:1])
