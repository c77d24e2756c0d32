"""What this machine does, measured in a few seconds: dense arithmetic, lookups, and what it takes to pass bytes on.

Three questions, each a straight line through a few medians. Arithmetic: a layer forward and backward. Lookups: rows of a table
too large for the caches, narrow and wide, so that finding a row and moving its bytes come apart. The network: two processes
exchange messages of growing size over gloo, as training does, which gives alpha (what an exchange takes however small it is)
and beta (bytes a second). And one question of the model itself: a step of it at two sizes, tables folded to a thousand rows,
since what lies between layers (activations, norms, Python) is in no rate.

Constants of some processor are the known alternative (TorchRec's planner has those of a GPU of 2018). A rate is of the machine
as it is now: on a busy one everything is slower, and the plan says so too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import multiprocessing
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import DeviceError
from pennyweight.core.hardware import Link, Rates, Topology, detect
from pennyweight.core.measure import latency
from pennyweight.data.schema import Column
from pennyweight.distribute.workload import Timed, Update, columns_of, probe
from pennyweight.model.spec import Batch, Spec, build, call, leaves, replace
from pennyweight.model.train import Learner, Recipe

BYTES = (64, 16_384, 262_144, 2_097_152)
"""Messages that two processes exchange."""
ROUNDS = 60
"""Exchanges of each."""
PIECE = 3
"""Small layers' ways there and back between two exchanges: some tenths of a millisecond."""
TURNS = 3
"""Times that a step of a model is timed, and pairs of processes that exchange: each pair has its own luck with cores."""
TIMEOUT_S = 240.0
"""What two processes may take in all; on a busy machine most of it is the start of Python."""
TABLE = 1 << 25
"""Numbers in the table that lookups are timed in: 128 MiB, more than caches hold."""
ASKED = 1 << 14
"""Rows looked up at a time."""
FOLDED = 1000
"""Rows that tables of a model are cut to where its dense layers are timed."""


def measured(hosts: int = 1, workers: int = 1, seconds: float = 2.0) -> Topology:
    """This machine, measured, as one of so many hosts of so many workers.

    The link between hosts is the one inside, which is the fastest it can be; a file with the real one is better.
    """
    inside = link()
    return Topology(devices=(detect().cpu,), hosts=hosts, workers=workers, inside=inside, between=inside, rates=rates(seconds))


def resized(topology: Topology, hosts: int, workers: int, memory_bytes: int = 0) -> Topology:
    """So many hosts with so many workers each; ``memory_bytes`` is a worker's, where its share of the host is not meant."""
    cpu = topology.cpu
    if memory_bytes:
        cpu = dataclasses.replace(cpu, memory_bytes=memory_bytes * workers)
    gpus = (
        topology.gpus if not memory_bytes else tuple(dataclasses.replace(g, memory_bytes=memory_bytes) for g in topology.gpus)
    )
    return dataclasses.replace(
        topology, devices=(cpu, *gpus), hosts=hosts, workers=workers, between=topology.between or topology.inside
    )


def rates(seconds: float = 2.0) -> Rates:
    """What one thread does on this machine."""
    with _one_thread():
        each = seconds / 5
        generator = torch.Generator().manual_seed(0)
        small = nn.Linear(8, 8)
        x = torch.randn(1, 8)
        wide, given = nn.Linear(400, 400), torch.randn(512, 400, generator=generator, requires_grad=True)
        flops = 3 * 2 * 512 * 400 * 400
        with torch.inference_mode():
            nothing = _time(lambda: small(x), each / 4)
        dense = _time(lambda: torch.autograd.grad(wide(given).sum(), [given, *wide.parameters()]), each)
        narrow, broad = (_lookup(dim, each, generator) for dim in (4, 64))
        moved = 4 * ASKED * (64 - 4) * 2  # read from the table and written to the result
        byte = max(broad - narrow, 1e-9) / moved
        row = max(narrow - 4 * ASKED * 4 * 2 * byte, narrow / 4) / ASKED
        many = torch.randint(0, TABLE // 64, (ASKED,), generator=generator)
        distinct = _time(lambda: torch.unique(many, return_inverse=True), each)
        return Rates(flops / max(dense - 3 * nothing, 1e-9), 1 / row, 1 / byte, nothing * 1e6, ASKED / distinct)


def _lookup(dim: int, seconds: float, generator: torch.Generator) -> float:
    table = torch.zeros(TABLE // 64, dim)
    ids = [torch.randint(0, len(table), (ASKED,), generator=generator) for _ in range(8)]
    turn = iter(range(1 << 60))
    return _time(lambda: F.embedding(ids[next(turn) % 8], table), seconds)


def _time(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call, the median of those that fit."""
    return latency(work, warmup=3, seconds=seconds).p50_ms / 1e3


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the model's own dense layers ------------------------------------------------------------------------------------------


def timed(
    spec: Spec,
    rows: tuple[int, int],
    update: Update = "adagrad",
    allow: Sequence[str] = (),
    *,
    columns: Sequence[Column] | None = None,
    seconds: float = 2.0,
) -> Timed:
    """A step of a model on one thread, timed at two numbers of rows with its tables folded to a thousand rows each.

    So a model that fits nowhere can be timed here; what its tables cost when they are large is predicted.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _folded(spec, allow)

        def loss(batch: Batch) -> Tensor:
            out = call(module, batch, spec.inputs)
            return F.binary_cross_entropy_with_logits(out, torch.zeros_like(out))

        read = columns_of(spec, columns)
        batches = [_filled(read, max(2, r)) for r in rows]
        with Learner(module, loss, Recipe(tables=update), joined=False) as learner:
            # In turns, and the least of the medians: what disturbs a turn makes it longer, never shorter.
            turns = [
                [_time(functools.partial(learner.learn, batch, 1e-6), seconds / 2 / TURNS) for batch in batches]
                for _ in range(TURNS)
            ]
            few, many = (min(times) for times in zip(*turns, strict=True))
    low, high = (max(2, r) for r in rows)
    slope = max(0.0, (many - few) / (high - low)) if high > low else 0.0
    return Timed(max(0.0, many - slope * high), slope)


def _folded(spec: Spec, allow: Sequence[str]) -> nn.Module:
    with torch.device("meta"):
        module = build(spec, allow)
        for path, child in list(leaves(module)):
            if isinstance(child, nn.Embedding) and child.num_embeddings > FOLDED:
                replace(module, path, nn.Embedding(FOLDED, child.embedding_dim, padding_idx=child.padding_idx))
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.normal_(0, 0.05) if tensor.is_floating_point() else tensor.data.zero_()
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.data.fill_(1.0)
    return module.train()


def _filled(columns: Sequence[Column], rows: int) -> Batch:
    """Random ids of the folded tables, and random numbers."""
    most = {c.name: min(FOLDED, c.size) for c in columns}
    return {
        name: torch.randint(1, most[name], t.shape) if t.dtype == torch.int64 else torch.randn(t.shape)
        for name, t in probe(columns, rows).items()
    }


# -- the network -----------------------------------------------------------------------------------------------------------


def link(timeout_s: float = TIMEOUT_S) -> Link:
    """Alpha and beta between two processes of this machine, over gloo.

    Raises:
        DeviceError: the two did not meet in time, or one died.
    """
    return fitted(BYTES, np.mean([_pair(timeout_s) for _ in range(TURNS)], 0).tolist())


def _pair(timeout_s: float) -> list[float]:
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pair = [context.Process(target=_ping, args=(rank, store, found, timeout_s), daemon=True) for rank in range(2)]
        for process in pair:
            process.start()
        try:
            times = _awaited(found, pair, timeout_s)
        finally:
            for process in pair:
                process.join(5)
                if process.is_alive():
                    process.kill()
    return times


def _awaited(found: Any, pair: Sequence[Any], timeout_s: float) -> list[float]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            times: list[float] = found.get(timeout=0.2)
            return times
        except queue.Empty:
            if dead := [p.exitcode for p in pair if p.exitcode not in (None, 0)]:
                raise DeviceError(
                    f"measuring the network: a process ended with {dead[0]}; see what it wrote above, or give --topology FILE"
                ) from None
    raise DeviceError(
        f"measuring the network: two processes did not finish within {timeout_s:g} s; is the machine busy? "
        "Try again, or give the topology in a file (--topology)"
    )


def fitted(bytes: Sequence[int], times: Sequence[float]) -> Link:
    """The line through messages and their times: the smallest says what any costs, the others what a byte costs.

    Errors count by their size relative to the time, so that a message of a kilobyte weighs as much as one of a megabyte.
    """
    x, y = np.asarray(bytes, float), np.asarray(times, float)
    weights = 1 / y
    slope, fixed = np.polyfit(x, y, 1, w=weights)
    fixed = max(float(fixed), float(y.min()) / 2)
    slope = max(float(slope), 1e-13)
    return Link(fixed * 1e6, 1 / slope)


def _ping(rank: int, store: str, found: Any, timeout_s: float) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    try:
        times = [_exchange(size) for size in BYTES]
        if rank == 0:
            found.put(times)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _exchange(size: int) -> float:
    """Seconds in which each of two processes sends the other so many bytes, between pieces of work as in a step.

    Who waits asleep for a message that comes at once is woken soon; between pieces of work a message takes several times as
    long, since threads have gone and cores are taken. The mean counts, for a step has many.
    """
    send = torch.zeros(2 * size // 4)
    into = torch.empty_like(send)
    layer, rows = nn.Linear(64, 64), torch.ones(512, 64)
    times = []
    for turn in range(ROUNDS + 3):
        for _ in range(PIECE):
            layer(rows).relu().sum().backward()
        start = time.perf_counter()
        dist.all_to_all_single(into, send)
        if turn >= 3:
            times.append(time.perf_counter() - start)
    return float(np.mean(times))
