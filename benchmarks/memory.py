"""Does memory grow with the data? Peak resident memory of ingesting, reading and training at 1x and 10x rows.

Each is run in a process of its own, on rows of 92 bytes that are drawn and written as a stream. What counts is the ratio of
the two peaks, which is 10 for whatever keeps the set in memory. The window of the shuffle is set small beside the set, as
the default of 256 MiB is beside one that does not fit.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.core.measure import peak_memory
from pennyweight.data.dataset import Dataset
from pennyweight.data.ingest import ColumnSpec, read_csv
from pennyweight.data.synthetic import Clicks
from pennyweight.model.ranking import DNN
from pennyweight.model.train import Recipe, fit

CLICKS = Clicks(sizes=(20_000, 10_000, 1_000, 100), numbers=16)
ROWS, QUICK = 2_000_000, 50_000
WINDOW, QUICK_WINDOW = 64 << 20, 2 << 20
CHUNK = 65_536


def epoch(folder: Path, window: int) -> None:
    """Read all rows once, shuffled."""
    for _ in _opened(folder, window).batches(8192, shuffle=True):
        pass


def train(folder: Path, window: int) -> None:
    """Train a small DNN on all rows once."""
    data = _opened(folder, window)
    module = DNN(data.schema.columns, dim=4, hidden=(32,))
    fit(module, data, data.head(10_000), Recipe(epochs=1, batch=8192))


def ingest(folder: Path, window: int) -> None:
    """Read the rows from a CSV file into a dataset."""
    coded = [ColumnSpec(c.name, c.role, c.kind) for c in CLICKS.catalog.schema.columns if c.kind == "categorical"]
    numbers = ColumnSpec("numbers", "context", "numeric", source=tuple(f"n{k}" for k in range(CLICKS.numbers)))
    rest = [ColumnSpec("label", "label", "numeric"), ColumnSpec("time", "time", "time")]
    read_csv(folder / "rows.csv", [*coded, numbers, *rest], folder / "ingested")


def _opened(folder: Path, window: int) -> Dataset:
    return dataclasses.replace(Dataset.open(folder / "rows"), window=window)


def measured(id: str, work: Callable[[Path, int], None], options: Options) -> Row:
    """The ratio of the peaks at 10x and 1x rows."""
    rows, window = (QUICK, QUICK_WINDOW) if options.quick else (ROWS, WINDOW)
    peaks = [peak(work, rows * times, window) for times in (1, 10)]
    ratio = peaks[1] / peaks[0]
    size = 92 * rows / 2**20
    note = (
        f"peak {peaks[0] / 2**20:.0f} MiB with {rows:,} rows ({size:.0f} MiB), {peaks[1] / 2**20:.0f} MiB with {rows * 10:,} "
        f"({size * 10:.0f} MiB); window {window >> 20} MiB, all of the process counted, its libraries too"
    )
    return Row(id, "peak_memory_ratio", ratio, ratio, ratio, 1, bar=1.5, baseline=10.0, note=note, at_most=True)


def peak(work: Callable[[Path, int], None], rows: int, window: int) -> int:
    """Bytes resident at most while ``work`` runs on that many rows."""
    folder = Path(tempfile.mkdtemp(prefix="pennyweight-memory-"))
    try:
        data = CLICKS.write(rows, folder / "rows")
        if work is ingest:
            _as_csv(data, folder / "rows.csv")
        return peak_memory(work, folder, window).peak
    finally:
        shutil.rmtree(folder)


def _as_csv(data: Dataset, path: Path) -> None:
    with path.open("wb") as file:
        for at in range(0, len(data), CHUNK):
            part = data.take(slice(at, at + CHUNK))
            vector = {f"n{k}": part.column("numbers")[:, k] for k in range(CLICKS.numbers)}
            plain = {n: part.column(n) for n in data.columns if n != "numbers"}
            pl.DataFrame({**plain, **vector}).write_csv(file, include_header=at == 0, float_precision=4)


WORK = {"memory/ingest": ingest, "memory/epoch": epoch, "memory/train": train}

if __name__ == "__main__":
    harness.run("memory", {id: lambda o, id=id: measured(id, WORK[id], o) for id in WORK}, timed=False, seeds=1)  # type: ignore[misc]
