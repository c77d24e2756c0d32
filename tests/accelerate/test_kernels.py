"""Triton's kernels give what the tables give, in its interpreter where there is no GPU; graphs, copies and fp8 on one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pennyweight.accelerate.kernels import Float8Linear, Graphed, fuse_tables, lookup, moved, streamed
from pennyweight.core.errors import DeviceError
from pennyweight.model.tables import Table

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing: pip install triton")
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: whether kernels are interpreted is settled when they are defined."""
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py"), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["29", "alike"]


def test_a_table_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from pennyweight.accelerate import kernels

    monkeypatch.setattr(kernels, "FOUND", False)
    with pytest.raises(DeviceError, match="need Triton"):
        lookup(Table(10, 4, data_type="int8").build(), torch.tensor([1]))  # type: ignore[arg-type]


def test_without_a_gpu_nothing_moves() -> None:
    batch = {"x": torch.arange(3)}
    assert moved(batch, "cpu")["x"] is batch["x"]
    assert [o.tolist() for o in streamed(lambda b: b["x"] * 2, [batch, batch], "cpu")] == [[0, 2, 4]] * 2
    net = nn.Sequential(Table(10, 4, data_type="int8").build())
    assert fuse_tables(net) == 0


def test_fp8_needs_its_gpu() -> None:
    with pytest.raises(DeviceError, match=r"8\.9; use bf16"):
        Float8Linear(nn.Linear(16, 16))


def test_a_forward_that_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no CUDA at all: the graph fails, the answer comes, and the reason is kept."""
    if torch.cuda.is_available():
        pytest.skip("a GPU would record it")
    graphed = Graphed(lambda b: b["x"] * 2)
    assert graphed({"x": torch.arange(3)}).tolist() == [0, 2, 4]
    assert graphed.note.startswith("no CUDA graph: ")


@pytest.mark.gpu
@gpu
def test_kernels_on_the_gpu() -> None:
    done = subprocess.run([sys.executable, str(HERE / "interpreted.py"), "cuda"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@gpu
def test_graphs_and_streams_answer_as_the_module_does() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).cuda().eval()
    score = lambda b: net(b["x"]).squeeze(1)  # noqa: E731
    graphed = Graphed(score)
    with torch.inference_mode():
        batches = [{"x": torch.randn(n, 8)} for n in (1, 5, 64, 200, 5000)]
        for batch, out in zip(batches, streamed(graphed, batches), strict=True):
            assert torch.allclose(out, score(moved(batch, "cuda")), atol=1e-5)
    assert not graphed.note
