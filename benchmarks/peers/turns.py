"""A peer that stays open and times batches when asked, in turn with others: ``python -m benchmarks.peers.turns PEER``.

It reads a JSON object a line and answers with one. ``{"make": SETTING, "given": DIR, "out": DIR}`` opens a model, known by its
``out``. ``{"time": OUT, "batch": FILE, "calls": N}`` calls it N times after one that is not counted: the seconds of each.
Inputs are arrays that are ready. ``{"score": OUT, "batch": FILE, "to": FILE}`` writes what it answers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.exchange import Job, Made


def answer(asked: dict[str, Any], peer: Any, open_: dict[str, Made], batches: dict[str, dict[str, np.ndarray]]) -> Any:
    """What one line asks for."""
    if "make" in asked:
        out = Path(asked["out"])
        out.mkdir(parents=True, exist_ok=True)
        open_[asked["out"]] = getattr(peer, asked["make"])(Job(Path(asked["given"]), out))
        return {"bytes": sum((out / name).stat().st_size for name in open_[asked["out"]].files)}
    if asked["batch"] not in batches:
        with np.load(asked["batch"]) as file:
            batches[asked["batch"]] = dict(file)
    made, batch = open_[asked.get("time") or asked["score"]], batches[asked["batch"]]
    if "score" in asked:
        np.save(asked["to"], np.asarray(made.score(batch), np.float32).reshape(-1))
        return {}
    made.score(batch)
    took = []
    for _ in range(asked["calls"]):
        began = time.perf_counter()
        made.score(batch)
        took.append(time.perf_counter() - began)
    return {"seconds": took}


def main() -> None:
    """Answer lines until there are no more; what a peer prints goes to standard error."""
    talk, peer = sys.stdout, importlib.import_module(f"benchmarks.peers.{sys.argv[1]}")
    open_: dict[str, Made] = {}
    batches: dict[str, dict[str, np.ndarray]] = {}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                found = answer(json.loads(line), peer, open_, batches)
            except Exception as error:  # whatever a peer raises
                found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=talk, flush=True)


if __name__ == "__main__":
    main()
