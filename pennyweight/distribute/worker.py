"""One worker of a training: what ``torchrun``'s agent starts, and starts again when a worker was lost.

It takes the job, joins the others, makes sure that all have the same one, and runs the loop that one worker alone would run.
What goes wrong is told in a file of the job's folder, by one worker: an error that another try would meet again is final, and
workers that are started again see it and end at once; a lost peer is none, and they go on from the last checkpoint.

    folder/
      checkpoint/       where the training is (distribute/checkpoint)
      progress.jsonl    what rank 0 has to tell
      stop              somebody wants it to stop
      error.json        why it cannot go on
      meeting.json      where the workers of this start meet
      starts.json       starts since all workers met
      tries.json        the last checkpoint that each start found in which they met
      rank-0.pid …      the processes
      best/             the best weights so far, where memory is limited
      fitted/           the trained model and its record, as blocks
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import Store, TCPStore

from pennyweight.core import cluster, errors, hardware, memory
from pennyweight.core.config import dumps, encode, loads, write
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PennyweightError, StorageError
from pennyweight.data.dataset import Dataset, How
from pennyweight.distribute import checkpoint, pipe, ways
from pennyweight.distribute.blocks import apart, built
from pennyweight.distribute.codec import Kind
from pennyweight.distribute.crew import Crew, Wires
from pennyweight.distribute.wire import Lost, between
from pennyweight.model import bundle, sparse, train  # noqa: F401  (bundle registers the layers a spec may name)
from pennyweight.model.placement import Placement
from pennyweight.model.spec import Spec
from pennyweight.model.train import EpochLog, Progress, Recipe

PORT = 29400
"""Where hosts meet, if the address file does not say."""
TRIES = 4
"""Starts in a row, of those in which all workers met, that may find no newer checkpoint than the one before."""
STARTS = 20
"""Starts in a row in which they may not meet."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A line of an address file: ``ADDRESS[:PORT] [WORKERS]``."""

    address: str
    port: int = PORT
    workers: int = 0
    """0 is as many as the command says."""


@dataclasses.dataclass(frozen=True)
class Many:
    """How many workers train, and how they are looked after."""

    workers: int = 1
    """On this host."""
    placement: str | Placement = "hybrid"
    """How tables are cut (``ways``), or which worker holds what."""
    replicas: int = 1
    """Groups of workers that each hold everything."""
    hosts: tuple[Host, ...] = ()
    """All hosts, this one too; empty is this machine alone."""
    cluster: str = ""
    """A Ray cluster whose machines they are on, ``workers`` in all (``distribute/cluster``); empty is none."""
    least: int = 0
    """Hosts (on a Ray cluster: workers) that are enough to begin, and to go on when others are lost; 0 is all of them."""
    every: int = 0
    """Steps between two checkpoints inside an epoch; 0 is a minute."""
    timeout_s: float = 60.0
    """How long a worker or a host that does not answer is waited for."""
    memory_bytes: int = 0
    """Memory that each worker may take for its data, which the system enforces; 0 is no limit."""
    balance: bool = False
    """Whether slow workers get fewer rows."""
    traffic: Kind = "fp32"
    """How rows and gradients are written on the way (``codec``)."""
    tick_s: float = 0.5
    """Seconds between two reports of progress."""

    def __post_init__(self) -> None:
        if self.cluster:
            cluster.check(self.cluster)
        if self.cluster and self.hosts:
            raise ConfigError("--cluster and --hosts are two ways to say where workers are; give one")
        if self.cluster and self.least > self.workers:
            raise ConfigError(f"{self.least} workers are to be enough, of {self.workers}; give --workers more")
        if not self.cluster and self.least > len(self.hosts):
            raise ConfigError(
                f"{self.least} hosts are to be enough, and {len(self.hosts)} are named; give --hosts FILE with more"
            )
        if self.workers < 1 or self.every < 0 or self.timeout_s <= 0 or self.memory_bytes < 0:
            raise ConfigError(
                f"{self.workers} workers, a checkpoint every {self.every} steps, time-out {self.timeout_s:g} s, "
                f"{self.memory_bytes} bytes: give at least 1 worker, and a time-out above 0"
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """A training for workers, as JSON from each host's launcher."""

    spec: Spec
    data: str
    """A dataset folder, the same on all hosts."""
    split: How
    fractions: tuple[float, float, float]
    recipe: Recipe
    seed: int
    many: Many = Many()
    """How they train together; who starts how many of them on which host is left out."""
    allow: tuple[str, ...] = ()


def main(folder: str, job: str) -> None:
    """Train as the worker that the environment says, or say why not and end with status 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which asks all to stop at one step
    threading.stack_size(1 << 20)  # of a watcher and a writer; the usual 8 MiB would count as memory taken
    home = Path(folder)
    if (home / "error.json").exists():
        return
    try:
        _work(home, loads(Job, job, "job"))
    except Exception as error:
        final = _final(error)
        if final is not None:
            tell(home, final)
        os._exit(1)  # not by the usual way, on which others would be waited for


def _final(error: Exception) -> PennyweightError | None:
    """What to tell of an error that another try would meet again; None of one that it would not."""
    if isinstance(error, PennyweightError):
        return None if isinstance(error, Lost) else error
    if between(error):
        return None
    who, said = f"worker {os.environ.get('RANK', '?')}", (str(error).splitlines() or [""])[0][:200]
    if memory.short(error):
        return DeviceError(f"{who} has no memory left ({said}); take more workers, a smaller batch, or compress tables")
    traceback.print_exception(error)
    return DeviceError(f"{who} ended with {type(error).__name__}: {said}; this is a fault of ours or of the model's code")


def _work(home: Path, job: Job) -> None:
    wait = datetime.timedelta(seconds=job.many.timeout_s)
    torch.set_num_threads(max(1, hardware.limits()[0] // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    rank = int(os.environ["RANK"])
    write(home / f"rank-{rank}.pid", str(os.getpid()))
    if rank == 0:
        _started(home)
    try:
        world = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=_meeting(home, rank, world, wait), rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, dist.DistError) as error:
        raise Lost(f"the other workers were not met within {job.many.timeout_s:g} s (--timeout): {error}") from error
    data = Dataset.open(job.data)
    parts = data.split(job.split, job.fractions, job.seed)
    _same(job, data)
    if rank == 0:
        _tried(home)
    replicas = _replicas(job)
    wires = Wires(replicas, wait)
    guard = contextlib.ExitStack()
    if job.many.memory_bytes:
        _load(job.recipe)
        if not apart(job.spec):  # a model that is built whole is to be built within the limit
            guard.enter_context(memory.guarded(job.many.memory_bytes))
    module, fills = built(job.spec, job.seed, job.allow)
    if job.many.memory_bytes and apart(job.spec):
        guard.enter_context(memory.guarded(job.many.memory_bytes))
    crew = Crew(
        module, _placed(job, module, replicas), wires, every=job.many.every, balance=job.many.balance,
        traffic=job.many.traffic, fills=fills, lean=job.many.memory_bytes > 0, int8=job.recipe.rows == "int8",
    )  # fmt: skip
    train.TICK_S = job.many.tick_s
    with _stopping(home), open(home / "progress.jsonl", "a", buffering=1) as told:

        def hear(event: Progress | EpochLog) -> None:
            if crew.rank == 0:
                kind = "epoch" if isinstance(event, EpochLog) else "progress"
                told.write(json.dumps({kind: encode(event), "bytes": dict(crew.steps.bytes), "steps": crew.steps.done}) + "\n")

        fitted = train.fit(
            module, parts.train, parts.valid, job.recipe, inputs=job.spec.inputs, seed=job.seed,
            checkpoint=home / "checkpoint", progress=hear, workers=crew,
        )  # fmt: skip
    crew.close()
    shelf = checkpoint.Folder(home / "fitted", crew.names, crew.side, lean=True)
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    made = {path: layer for path, layer in sparse.layers(module).items() if path not in job.spec.layers}
    spec = dumps(job.spec.with_layers(made))
    shelf.save(state, {"fit": dumps(fitted), "steps": dumps(_counted(crew)), "spec": spec})
    if not checkpoint.newest(home / "fitted"):
        raise StorageError(f"the trained model could not be written to {home}; free some room and start again")
    dist.barrier()
    dist.destroy_process_group()


def interface(address: str) -> str:
    """The network interface that has an address."""
    return next((n for n, found in psutil.net_if_addrs().items() if any(a.address == address for a in found)), "lo")


def _load(recipe: Recipe) -> None:
    """Let PyTorch load what it needs to train, which is no part of a limit: Python, PyTorch, threads."""
    layer = nn.Linear(2, 1)
    optimizer = train.optimizer(layer, recipe)
    layer(torch.ones(1, 2)).sum().backward()
    if optimizer is not None:
        optimizer.step()


def _replicas(job: Job) -> int:
    """Groups of workers, for the workers there are.

    Raises:
        ConfigError: they cannot be divided so.
    """
    size = dist.get_world_size()
    if isinstance(job.many.placement, Placement):
        return ways.again(job.many.placement, size).replicas
    return Placement(size, replicas=job.many.replicas).replicas


def _placed(job: Job, module: nn.Module, replicas: int) -> Placement:
    """Who holds what, for the workers there are."""
    size = dist.get_world_size()
    if isinstance(job.many.placement, Placement):
        return job.many.placement if job.many.placement.world_size == size else ways.again(job.many.placement, size)
    if job.many.placement == "pipeline":
        placed = ways.placed("hybrid", ways.tables(module), size, replicas)
        return dataclasses.replace(placed, pipeline=pipe.stack(module))
    return ways.placed(job.many.placement, ways.tables(module), size, replicas)


def _counted(crew: Crew) -> dict[str, object]:
    """What this worker counted: rank 0 tells."""
    steps = crew.steps
    return {"steps": steps.done, "seconds": steps.seconds.tolist(), "bytes": dict(steps.bytes), "workers": crew.size}


def _same(job: Job, data: Dataset) -> None:
    """That all workers have the same job, data and versions.

    Raises:
        ConfigError: they have not; on all workers alike.
    """
    given = {"data": data.fingerprint, "versions": dumps(hardware.versions()), "job": dumps(dataclasses.replace(job, data=""))}
    for name, mine in given.items():
        code = torch.frombuffer(bytearray(hashlib.sha256(mine.encode()).digest()), dtype=torch.uint8)
        codes = [torch.empty_like(code) for _ in range(dist.get_world_size())]
        dist.all_gather(codes, code)
        other = next((rank for rank, c in enumerate(codes) if not torch.equal(c, codes[0])), None)
        if other is not None:
            said = " and ".join(f"{bytes(codes[r].tolist()).hex()[:12]} on rank {r}" for r in (0, other))
            rest = {
                "data": f"rank {other} has other data than rank 0 ({said}); give all hosts the same dataset folder",
                "versions": f"rank {other} has other versions than rank 0; install the same packages on all hosts",
                "job": f"rank {other} was given another command than rank 0; run the same one on all hosts",
            }
            raise ConfigError(rest[name])


def _meeting(home: Path, rank: int, world: int, wait: datetime.timedelta) -> Store:
    """Where the workers of this start meet: a store of the first one, told in a file of the folder.

    The agents' own store is one for all starts, and tells them apart by how often each host has restarted. Hosts that do so out
    of step then find addresses of workers that are gone, fail at once, and stay out of step for ever. Here the others wait
    for a first one that is there, and has not seen their rank yet.

    Raises:
        RuntimeError: it did not come in time.
    """
    file, end = home / "meeting.json", time.monotonic() + wait.total_seconds()
    if rank == 0:
        name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        own = psutil.net_if_addrs().get(name, [])
        address = next((a.address for a in own if a.family == socket.AF_INET), "127.0.0.1")
        store = TCPStore(address, 0, is_master=True, timeout=wait, wait_for_workers=False)
        nonce = uuid.uuid4().hex
        store.set("nonce", nonce)
        write(file, json.dumps({"address": address, "port": store.port, "world": world, "nonce": nonce}))
        return store
    soon = datetime.timedelta(seconds=min(5.0, wait.total_seconds()))
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError, dist.DistError):
            told = json.loads(file.read_bytes())
            if told["world"] == world:
                with socket.create_connection((told["address"], told["port"]), soon.total_seconds()):
                    pass  # a store that is gone is known at once so, and not after the store's own tries
                store = TCPStore(told["address"], told["port"], is_master=False, timeout=soon)
                if store.get("nonce").decode() == told["nonce"] and store.add(f"rank-{rank}", 1) == 1:
                    store.set_timeout(wait)
                    return store
        time.sleep(0.05)
    raise RuntimeError(f"the first worker was not there within {wait.total_seconds():g} s: timed out")


def _started(home: Path) -> None:
    """Count this start, and give up where workers did not meet again and again.

    Where hosts start theirs anew out of step, and slowly, some starts are over before all are there: those are no sign that
    the training ends its workers.

    Raises:
        DeviceError: they did not.
    """
    file = home / "starts.json"
    count = 1 + (json.loads(file.read_text()) if file.exists() else 0)
    write(file, json.dumps(count))
    if count > STARTS:
        raise DeviceError(
            f"workers were started {STARTS} times in a row and did not meet; look for what ends them before they have begun, "
            "or give them more time (--timeout)"
        )


def _tried(home: Path) -> None:
    """Count a start in which all workers met, and give up where such starts in a row came no further.

    Raises:
        DeviceError: they did not.
    """
    (home / "starts.json").unlink(missing_ok=True)
    file = home / "tries.json"
    found: list[int] = json.loads(file.read_text()) if file.exists() else []
    found.append(checkpoint.newest(home / "checkpoint"))
    write(file, json.dumps(found[-TRIES - 1 :]))
    if len(found) > TRIES and len(set(found[-TRIES - 1 :])) == 1:
        raise DeviceError(
            f"workers were lost {TRIES} times in a row with no checkpoint between; look for what ends them (memory, time "
            "limits), or save more often (--every)"
        )


@contextlib.contextmanager
def _stopping(home: Path) -> Iterator[None]:
    """As long as this lasts, a file ``stop`` is as good as Ctrl-C."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if (home / "stop").exists():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tell(home: Path, error: PennyweightError) -> None:
    """Leave a final error for the launcher, if nobody has."""
    told = {"error": type(error).__name__, "message": str(error), "time": time.time()}
    part = home / f"error.{os.getpid()}"
    part.write_text(json.dumps(told))
    try:
        os.link(part, home / "error.json")  # fails where another was first
    except FileExistsError:
        pass
    finally:
        part.unlink()


def told(home: Path) -> PennyweightError | None:
    """The final error that a worker left."""
    file = home / "error.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    kind = getattr(errors, found["error"], DataError)
    error: PennyweightError = kind(found["message"])
    return error


def _leashed() -> None:
    """End when whoever started this process has ended: the other end of standard input closes."""
    while os.read(0, 1):  # not by sys.stdin, which is closed at the end of an interpreter and waited for
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leashed, daemon=True).start()
    main(sys.argv[1], Path(sys.argv[2]).read_text())
