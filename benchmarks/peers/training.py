"""How a peer is asked to train: a process that lives through the whole comparison and takes its turns.

    given/    task.json (the model and its recipe), train.npz, valid.npz (columns of ids and ``label``), test.npz (without)
    out/      logits.npy of the test rows, as of the best epoch on validation

A line of JSON comes in, one goes out. ``{"do": "open", "given": DIR, "out": DIR}`` builds the model, ``{"do": "rest"}`` forgets
it; ``{"do": "turn", "steps": 9}`` trains so many steps and answers rows a second; ``{"do": "fit"}`` trains from start to end. A
peer runs its own model and its own training loop. It is handed ready batches, indexed out of tensors in memory, which is
faster than the loaders of those that make a batch row by row.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Batch = tuple[dict[str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data's shape and its recipe."""

    model: str
    """``deepfm`` or ``dcnv2`` (parallel, full matrices)."""
    fields: dict[str, int]
    """Ids of each categorical column; the first two are the user's and the item's."""
    dim: int
    hidden: list[int]
    dropout: float
    cross: int
    batch: int
    lr: float
    optimizer: str
    """``adam`` or ``adagrad``."""
    l2: float
    """(l2 / 2) * squares of all tables in the loss, where the peer can."""
    epochs: int
    patience: int
    threads: int
    memory: int = 0
    """Bytes of data the process may hold; 0 for any."""
    precision: str = "fp32"
    """Ours, and a peer's that has it."""
    tables: str = "dense"
    """Ours."""


class Trainer(Protocol):
    """A peer's model and loop."""

    packages: tuple[str, ...]
    optimizer: Any

    def epoch(self, batches: Batches) -> None:
        """The peer's own pass over batches."""

    def score(self, ids: Mapping[str, Tensor]) -> Tensor:
        """Probabilities or logits of rows."""


class Batches:
    """Some batches of the rows in a new order: what a peer's loop goes through."""

    def __init__(self, rows: Rows, size: int, steps: int, seed: int) -> None:
        self.rows, self.size = rows, size
        self.steps = min(steps, len(rows.label) // size) or 1
        self.order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows.label))[: self.steps * size])

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for at in range(0, len(self.order), self.size):
            part = self.order[at : at + self.size]
            yield {n: c[part] for n, c in self.rows.ids.items()}, self.rows.label[part]


class Rows:
    """Columns in memory."""

    def __init__(self, path: Path, fields: Mapping[str, int]) -> None:
        with np.load(path) as file:
            self.ids = {n: torch.from_numpy(file[n].astype(np.int64)) for n in fields}
            known = file["label"] if "label" in file else np.zeros(len(file[next(iter(fields))]))
            self.label = torch.from_numpy(known.astype(np.float32))

    def cut(self, size: int = 8192) -> Iterator[dict[str, Tensor]]:
        """In order."""
        for at in range(0, len(self.label), size):
            yield {n: c[at : at + size] for n, c in self.ids.items()}


class Loop:
    """Turns and a whole training by a peer's loop."""

    def __init__(self, given: Path, out: Path, make: Any) -> None:
        self.given, self.out, self.make = given, out, make
        out.mkdir(parents=True, exist_ok=True)
        self.task = Task(**json.loads((given / "task.json").read_text()))
        if self.task.memory:
            resource.setrlimit(resource.RLIMIT_DATA, (self.task.memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        torch.set_num_threads(self.task.threads)
        self.rows = Rows(given / "train.npz", self.task.fields)
        self.trainer: Trainer = make(self.task)
        self.turns = 0

    def turn(self, steps: int) -> dict[str, Any]:
        """Rows a second over so many steps."""
        self.turns += 1
        batches = Batches(self.rows, self.task.batch, steps, self.turns)
        began = time.perf_counter()
        self.trainer.epoch(batches)
        return {"rows_per_s": len(batches) * self.task.batch / (time.perf_counter() - began)}

    def fit(self) -> dict[str, Any]:
        """Epochs until validation is no better; the rate falls to a tenth each time it is not, as in our loop."""
        torch.manual_seed(0)
        self.trainer = self.make(self.task)
        valid, test = (Rows(self.given / f"{p}.npz", self.task.fields) for p in ("valid", "test"))
        best, waited, epoch = -1.0, 0, 0
        for epoch in range(1, self.task.epochs + 1):
            self.trainer.epoch(Batches(self.rows, self.task.batch, 1 << 40, epoch))
            found = auc(valid.label.numpy(), self._scored(valid))
            if found > best:
                best, waited = found, 0
                np.save(self.out / "logits.npy", self._scored(test))
                continue
            waited += 1
            if waited >= self.task.patience:
                break
            for group in self.trainer.optimizer.param_groups:
                group["lr"] *= 0.1
        return {"valid": best, "epochs": epoch}

    def _scored(self, rows: Rows) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return torch.cat([self.trainer.score(ids).reshape(-1) for ids in rows.cut()]).numpy().astype(np.float64)


def auc(label: np.ndarray[Any, Any], score: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve, ties counted half."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    good = label > 0
    n = int(good.sum())
    return float((rank[good].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))


def main(make: Any, packages: tuple[str, ...], loop: Any = Loop) -> None:
    """Answer lines on standard input until it ends; what a peer prints goes nowhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    work: Any = None

    def answer(do: str, **asked: Any) -> Any:
        nonlocal work
        if do in ("open", "rest"):
            work = None
            gc.collect()
        if do == "rest":
            return {}
        if do == "open":
            work = loop(Path(asked["given"]), Path(asked["out"]), make)
            return {"version": ", ".join(f"{p} {version(p)}" for p in packages)}
        return getattr(work, do)(**asked)

    for line in sys.stdin:
        try:
            said = answer(**json.loads(line))
        except (MemoryError, RuntimeError) as error:
            said = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        answers.write(json.dumps(said) + "\n")
        answers.flush()
