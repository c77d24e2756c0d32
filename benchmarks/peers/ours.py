"""Ours, asked the way the peers are: the public ``fit`` over a ``Dataset``."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers.training import Loop, Rows, Task, main
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.ranking import DCNv2, DeepFM
from pennyweight.model.train import EpochLog, Progress, Recipe, fit, scores

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rate(rows: int, outputs: int, inputs: int, kind: torch.dtype, times: int = 12) -> float:
    """Operations a second in the three products of a training step of one dense layer, the median of some."""
    x, w, g = (torch.randn(shape).to(kind) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    took = []
    for _ in range(times):
        began = time.perf_counter()
        x @ w.T, g @ w, g.T @ x
        took.append(time.perf_counter() - began)
    return 6 * rows * outputs * inputs / statistics.median(took[2:])


def onednn(rows: int, outputs: int, inputs: int, times: int = 12) -> float:
    """Operations a second of one fp32 product by oneDNN, which PyTorch leaves to MKL."""
    x, w, took = torch.randn(rows, inputs), torch.randn(outputs, inputs), []
    for _ in range(times):
        began = time.perf_counter()
        torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        took.append(time.perf_counter() - began)
    return 2 * rows * outputs * inputs / statistics.median(took[2:])


def module(task: Task, columns: tuple[Column, ...]) -> nn.Module:
    """The model of a task."""
    if task.model == "deepfm":
        return DeepFM(columns, task.dim, task.hidden, task.dropout)
    return DCNv2(columns, task.dim, task.cross, task.hidden, dropout=task.dropout)


class Ours(Loop):
    """Turns and trainings by ``fit``; a turn's pace is that of its training steps, as its progress reports it."""

    def __init__(self, given: Path, out: Path, make: Any) -> None:
        super().__init__(given, out, lambda task: None)
        roles = ("user", "item", *("context" for _ in self.task.fields))
        kinds = zip(self.task.fields.items(), roles, strict=False)
        coded = tuple(Column(n, role, "categorical", size, hashed=True) for (n, size), role in kinds)  # type: ignore[arg-type]
        self.columns = (*coded, Column("label", "label", "numeric"))
        self.train, self.module = self._dataset(self.rows), module(self.task, self.columns)
        del self.rows
        task = self.task
        kind: Any = task.optimizer
        self.recipe = Recipe(
            optimizer=kind, lr=task.lr, embedding_l2=task.l2, batch=task.batch, epochs=task.epochs, patience=task.patience,
            tables=task.tables, precision=task.precision,  # type: ignore[arg-type]
        )  # fmt: skip

    def _dataset(self, rows: Rows) -> Dataset:
        columns = {**{n: c.numpy() for n, c in rows.ids.items()}, "label": rows.label.numpy()}
        return Dataset.from_arrays(columns, Schema(self.columns))

    def turn(self, steps: int) -> dict[str, Any]:
        """Rows a second over so many steps of one epoch."""
        self.turns += 1
        n = min(steps, len(self.train) // self.task.batch) * self.task.batch
        part = self.train.take(np.random.default_rng(self.turns).permutation(len(self.train))[:n])
        heard: list[float] = []

        def hear(where: Progress | EpochLog) -> None:
            if isinstance(where, Progress):
                heard.append(where.rows_per_s)

        recipe = dataclasses.replace(self.recipe, epochs=1)
        fit(self.module, part, self.train.head(4096), recipe, seed=self.turns, progress=hear)
        return {"rows_per_s": heard[-1]}

    def limit(self) -> dict[str, Any]:
        """Rows a second if a step were its layers' matrix products alone, at the rate measured now on the largest layer."""
        layers = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        wide = max(layers, key=lambda m: m.weight.numel())
        rates = {name: rate(self.task.batch, *wide.weight.shape, kind) for name, kind in KINDS.items()}
        each = sum(6 * m.weight.numel() for m in layers)
        rates["onednn"] = onednn(self.task.batch, *wide.weight.shape)
        return {"flops": each, **rates, "rows_per_s": rates[self.task.precision] / each}

    def fit(self) -> dict[str, Any]:
        """A training from its start to its end."""
        torch.manual_seed(0)
        made = module(self.task, self.columns)
        valid, test = (self._dataset(Rows(self.given / f"{p}.npz", self.task.fields)) for p in ("valid", "test"))
        done = fit(made, self.train, valid, self.recipe)
        np.save(self.out / "logits.npy", scores(made, test))
        return {"valid": done.metric, "epochs": len(done.history)}


if __name__ == "__main__":
    main(None, ("torch",), Ours)
