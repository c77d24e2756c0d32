"""A placement tried: a few steps of the real training engine, timed and counted, to hold against what was predicted.

Workers are processes of this machine, one thread each, that stay open for several placements, since starting Python takes
longer than the steps. They train on random rows: a step's time and bytes depend on how many ids there are and how often they
repeat, not on what they mean. What is timed is a step of the training loop with all its exchanges, from a barrier on; data are
made outside of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pennyweight.core.errors import DeviceError
from pennyweight.data.schema import Column
from pennyweight.distribute.crew import Crew, Wires
from pennyweight.distribute.workload import Update, columns_of, probe
from pennyweight.model import losses, team
from pennyweight.model.placement import Placement, span
from pennyweight.model.spec import Batch, Spec, seeded
from pennyweight.model.train import Learner, Recipe

TIMEOUT_S = 300.0
"""What the steps of one placement may take in all, the start of the processes included."""
LABEL = "label"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to try."""

    spec: Spec
    columns: tuple[Column, ...]
    placement: Placement
    batch: int
    update: Update = "adagrad"
    steps: int = 20
    warmup: int = 3
    seed: int = 0
    allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: Spec, placement: Placement, batch: int, columns: Sequence[Column] | None = None, **rest: Any) -> Trial:
        """With the columns of the spec's own args where none are given."""
        return cls(spec, columns_of(spec, columns), placement, batch, **rest)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of it."""

    step: float
    """Seconds, the median."""
    best: float
    """Seconds, the fastest step."""
    sent: tuple[int, ...]
    """Bytes each rank sent in a step."""
    by: Mapping[str, int]
    """Bytes all ranks sent in a step, by what for."""
    held: tuple[int, ...]
    """Bytes of weights, gradients and optimizer state on each rank."""


class Stage:
    """Workers that are open for trials, in a ``with``.

    Raises:
        DeviceError: a worker died, said an error, or did not answer in time.
    """

    def __init__(self, workers: int, timeout_s: float = TIMEOUT_S) -> None:
        self.workers, self.timeout_s = workers, timeout_s

    def __enter__(self) -> Stage:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.answers: Any = context.Queue()
        self.orders: list[Any] = [context.Queue() for _ in range(self.workers)]
        self.processes = [
            context.Process(
                target=_perform, args=(rank, self.workers, store, orders, self.answers, self.timeout_s), daemon=True
            )
            for rank, orders in enumerate(self.orders)
        ]
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for orders in self.orders:
            orders.put(None)
        for process in self.processes:
            process.join(10 if kind is None else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
        for queued in (*self.orders, self.answers):
            queued.close()
            queued.cancel_join_thread()
        self.folder.cleanup()

    def measure(self, trial: Trial) -> Measured:
        """The steps of one placement."""
        for orders in self.orders:
            orders.put(trial)
        found: dict[int, Any] = {}
        end = time.monotonic() + self.timeout_s
        while len(found) < self.workers:
            try:
                rank, answer = self.answers.get(timeout=0.5)
            except queue.Empty:
                if dead := [p.exitcode for p in self.processes if not p.is_alive()]:
                    raise DeviceError(
                        f"a worker ended with {dead[0]} while a placement was tried; is there memory enough?"
                    ) from None
                if time.monotonic() > end:
                    said = f"{self.workers} workers did not try a placement within {self.timeout_s:g} s"
                    raise DeviceError(f"{said}; is the machine busy? Try fewer steps") from None
                continue
            if isinstance(answer, str):
                raise DeviceError(f"rank {rank}: {answer}")
            found[rank] = answer
        return _joined([found[k] for k in range(self.workers)], trial.steps)


def _joined(found: Sequence[Mapping[str, Any]], steps: int) -> Measured:
    times = np.max([f["times"] for f in found], axis=0)  # a step ends with its last worker
    sent = [{what: n // steps for what, n in f["sent"].items()} for f in found]
    names = sorted({name for each in sent for name in each})
    return Measured(
        step=float(np.median(times)),
        best=float(times.min()),
        sent=tuple(sum(each.values()) for each in sent),
        by={name: sum(each.get(name, 0) for each in sent) for name in names},
        held=tuple(f["held"] for f in found),
    )


# -- in a worker -----------------------------------------------------------------------------------------------------------


def _perform(rank: int, size: int, store: str, orders: Any, answers: Any, timeout_s: float) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    wires: dict[int, Wires] = {}  # by replicas: groups have threads of their own, and hundreds of placements are tried
    try:
        while (trial := orders.get()) is not None:
            try:
                replicas = trial.placement.replicas
                if replicas not in wires:
                    wires[replicas] = Wires(replicas, wait)
                answers.put((rank, _tried(trial, rank, size, wires[replicas])))
            except Exception as error:
                traceback.print_exc()
                answers.put((rank, f"{type(error).__name__}: {error}"))
                return
    finally:
        dist.destroy_process_group()


def _tried(trial: Trial, rank: int, size: int, wires: Wires) -> dict[str, Any]:
    module = seeded(trial.spec, trial.seed, trial.allow).train()
    crew = Crew(module, trial.placement, wires)
    recipe = Recipe(batch=trial.batch, tables=trial.update)
    loss = losses.row_loss(module, "bce", LABEL, trial.spec.inputs, 0.0, 1.0)
    start, stop = span(trial.batch, size, rank)
    times = []
    with torch.random.fork_rng(devices=[]), team.working(crew), Learner(module, loss, recipe, crew) as learner:
        torch.manual_seed(trial.seed)
        for turn in range(trial.warmup + trial.steps):
            mine = {name: t[start:stop] for name, t in drawn(trial.columns, trial.batch, trial.seed + turn).items()}
            if turn == trial.warmup:
                crew.steps.bytes.clear()
            dist.barrier()
            began = time.perf_counter()
            share = learner.learn(mine, 1e-3, trial.batch)
            crew.agree(share, (False, False, False))
            times.append(time.perf_counter() - began)
        held = sum(_bytes(t) for t in (*module.state_dict().values(), *learner.state().values()))
        held += sum(_bytes(p.grad) for p in module.parameters() if p.grad is not None)
    crew.close()
    return {"times": times[trial.warmup :], "sent": dict(crew.steps.bytes), "held": held}


def drawn(columns: Sequence[Column], rows: int, seed: int) -> Batch:
    """A random batch: ids uniform over each column's vocabulary, numbers normal, labels even."""
    generator = torch.Generator().manual_seed(seed)
    size = {c.name: c.size for c in columns}
    made: dict[str, Tensor] = {
        name: torch.randint(1, size[name], t.shape, generator=generator)
        if t.dtype == torch.int64
        else torch.randn(t.shape, generator=generator)
        for name, t in probe(columns, rows).items()
    }
    return {**made, LABEL: torch.randint(0, 2, (rows,), generator=generator).float()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
