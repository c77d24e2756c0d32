"""What a peer is given and what it hands back: files, so that no peer's packages meet ours or each other's.

    given/    model.onnx, bundle/ (a manifest and safetensors), columns.json (the order of inputs),
              calib.npz (training rows with labels), valid.npz (with labels), test.npz (without)
    out/      what the peer's runtime loads, logits.npy of the test rows, report.json

A peer is a module of functions, one a setting, run as ``python -m benchmarks.peers.NAME SETTING given out`` in an environment
of its own. It decides nothing: the logits are judged elsewhere, by the code that judges ours, and bytes are counted on disk.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8192


@dataclasses.dataclass(frozen=True)
class Job:
    """One setting of one peer on one checkpoint."""

    given: Path
    out: Path

    @property
    def columns(self) -> list[str]:
        """The model's inputs in order."""
        return list(json.loads((self.given / "columns.json").read_text()))

    def rows(self, part: str) -> dict[str, np.ndarray]:
        """Columns of ``calib``, ``valid`` or ``test``; the first two with their label."""
        with np.load(self.given / f"{part}.npz") as file:
            return dict(file)

    def batches(self, part: str, rows: int = BATCH) -> Iterator[dict[str, np.ndarray]]:
        """Inputs of a part, so many rows at a time."""
        whole = self.rows(part)
        for at in range(0, len(whole[self.columns[0]]), rows):
            yield {name: whole[name][at : at + rows] for name in self.columns}


@dataclasses.dataclass(frozen=True)
class Made:
    """What a setting came to."""

    files: tuple[str, ...]
    """In ``out``: what the runtime loads."""
    score: Callable[[Mapping[str, np.ndarray]], Any]
    """From a batch to its logits, through what was written."""
    note: str = ""


Setting = Callable[[Job], Made]


def main(packages: tuple[str, ...], settings: Mapping[str, Setting]) -> None:
    """Run the setting named on the command line and leave its files, its logits and its report."""
    name, given, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    job, began = Job(given, out), time.monotonic()
    made = settings[name](job)
    seconds = time.monotonic() - began
    logits = np.concatenate([np.asarray(made.score(batch), np.float32).reshape(-1) for batch in job.batches("test")])
    np.save(out / "logits.npy", logits)
    used = ", ".join(f"{p} {version(p)}" for p in packages)
    report = {"files": list(made.files), "seconds": seconds, "version": used, "note": made.note}
    (out / "report.json").write_text(json.dumps(report))
