"""What a GPU brings, checked and timed: fused lookups, graphs, copies, precisions, a model in memory it does not fit.

``make gpu-check``: on a machine with a GPU it builds everything, checks every answer against a plain reference and times it, in
under eight minutes, into ``results/gpu.json``. Without one it says what it skips, checks the kernels in Triton's interpreter if
Triton is there, and writes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.accelerate import kernels
from pennyweight.accelerate.cache import HotTable
from pennyweight.core.errors import DeviceError
from pennyweight.data.schema import Column
from pennyweight.model.ranking import DeepFM
from pennyweight.model.tables import Table

LOOKUPS = Path(__file__).parents[1] / "tests" / "accelerate" / "interpreted.py"


def seconds(work: Callable[[], object], rounds: int = 50) -> list[float]:
    """Milliseconds of each call, by the GPU's own clock."""
    times = []
    for k in range(rounds + 5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if k >= 5:
            times.append(start.elapsed_time(stop))
    return times


def ratio(id: str, slow: Callable[[], object], fast: Callable[[], object], note: str, bar: float | None = None) -> Row:
    """How many times faster, in turns of 50 calls, three times."""
    turns = [(statistics.median(seconds(slow)), statistics.median(seconds(fast))) for _ in range(3)]
    ratios = [a / b for a, b in turns]
    ms = ", ".join(f"{a:.3g} and {b:.3g} ms" for a, b in turns[:1])
    return Row(id, "speedup", statistics.median(ratios), min(ratios), max(ratios), 1, bar=bar, note=f"{note}; {ms}")


def lookups(options: Options) -> list[Row]:
    """Fused lookups beside ordinary operations, and every kernel against its table first."""
    subprocess.run([sys.executable, str(LOOKUPS), "cuda"], check=True)
    out = []
    for kind in ("int8", "int4", "codebook"):
        settings = {"layout": "codebook", "parts": 8, "codes": 256} if kind == "codebook" else {"data_type": kind}
        layer = Table(1_000_000, 64, **settings)  # type: ignore[arg-type]
        table = layer.build().cuda()
        for buffer in table.buffers():
            if buffer.dtype == torch.uint8:
                buffer.random_(0, 100)
        ids = torch.randint(0, layer.rows, (100_000,), device="cuda")
        slow, fast = (lambda t=table, i=ids: t(i)), (lambda t=table, i=ids: kernels.lookup(t, i))
        out.append(ratio(f"lookup/{kind}", slow, fast, "100,000 of 1 M rows of 64, against ordinary operations"))
    return out


def graphs(options: Options) -> list[Row]:
    """A recorded forward beside a launched one."""
    columns = tuple(Column(f"c{k}", "context", "categorical", 20_000) for k in range(26))
    net = DeepFM(columns, dim=16, hidden=(400, 400, 400)).cuda().eval()
    graphed = kernels.Graphed(lambda b: net(b))
    out = []
    with torch.inference_mode():
        for rows in (1, 64, 256):
            batch = {c.name: torch.randint(2, 20_000, (rows,), device="cuda") for c in columns}
            checked(graphed(batch), net(batch), 1e-4)
            out.append(ratio(f"graph/{rows}", lambda b=batch: net(b), lambda b=batch: graphed(b), "DeepFM, 26 tables"))
    return out


def copies(options: Options) -> list[Row]:
    """Batches through pinned memory on a stream of their own beside plain copies."""
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1)).cuda()
    batches = [{"x": torch.randn(8192, 512)} for _ in range(8)]
    score = lambda b: net(b["x"])  # noqa: E731
    with torch.inference_mode():
        for got, batch in zip(kernels.streamed(score, batches), batches, strict=True):
            checked(got, net(batch["x"].cuda()), 1e-3)
        plain = lambda: [net(b["x"].cuda()) for b in batches]  # noqa: E731
        return [ratio("copies", plain, lambda: list(kernels.streamed(score, batches)), "8 batches of 8192 x 512")]


def precisions(options: Options) -> list[Row]:
    """TF32, bf16 and fp8 beside fp32, with how far logits move."""
    layer = nn.Linear(4096, 4096).cuda()
    x = torch.randn(8192, 4096, device="cuda")
    with torch.inference_mode():
        want = layer(x)

        def tf32() -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                return layer(x)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False

        def bf16() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return layer(x)

        ways: dict[str, Callable[[], Tensor]] = {"tf32": tf32, "bf16": bf16}
        try:
            eight = kernels.Float8Linear(layer)
            ways["fp8"] = lambda: eight(x)
        except DeviceError as error:
            print(f"skipped: fp8: {error}")
        out = []
        for name, way in ways.items():
            moved = ((way().float() - want).abs().mean() / want.std()).item()
            assert moved < 0.05, f"{name} moves answers by {moved:.3f} of their deviation"
            out.append(
                ratio(
                    f"precision/{name}",
                    lambda: layer(x),
                    way,
                    f"8192 x 4096 x 4096, answers move by {moved:.4f} of their deviation",
                )
            )
    return out


def cached(options: Options) -> list[Row]:
    """A table in the host's memory with a twentieth of its rows on the GPU, beside one with none there."""
    layer = Table(4_000_000, 64, data_type="int8")
    table = layer.build()
    for buffer in table.buffers():
        buffer.random_(0, 100)
    draw = torch.Generator().manual_seed(0)
    rank = (torch.rand(64, 20_000, generator=draw) ** 8 * layer.rows).long()
    asked = [(r * 7919 % layer.rows).cuda() for r in rank]
    hot, none = HotTable(table, layer.bytes() // 20, "cuda"), HotTable(table, 0, "cuda")
    for ids in asked:
        checked(hot(ids).cpu(), table(ids.cpu()), 1e-5)
    row = ratio(
        "hot_rows",
        lambda: none(asked[0]),
        lambda: hot(asked[0]),
        f"4 M rows of 64 in int8, 20,000 lookups, hit rate {hot.hit_rate:.3f}",
    )
    return [row]


def checked(got: Tensor, want: Tensor, most: float) -> None:
    far = (got.float() - want.float()).abs().max().item()
    assert far <= most, f"answers differ by {far:.3g}, {most:g} is allowed"


ROWS = {"lookup": lookups, "graph": graphs, "copies": copies, "precision": precisions, "hot_rows": cached}


def without() -> None:
    """Say what is skipped, and check what can be checked."""
    for name, work in ROWS.items():
        print(f"skipped: {name}: no CUDA device. {(work.__doc__ or '').splitlines()[0]}")
    if importlib.util.find_spec("triton") is None:
        print("skipped: kernels in Triton's interpreter: Triton is not installed (pip install triton)")
        return
    subprocess.run([sys.executable, str(LOOKUPS), "cpu"], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    print("checked: every kernel against its table, in Triton's interpreter")


def main(argv: Sequence[str] | None = None) -> None:
    """All rows on a GPU; words without one."""
    if not torch.cuda.is_available():
        without()
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    harness.run("gpu", ROWS, timed=False, seeds=1, argv=argv)


if __name__ == "__main__":
    main()
