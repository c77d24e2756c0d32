"""Start workers, watch them, start them again: a training by many from one command.

The workers are started by ``torchrun``'s own agent (``torch.distributed.launcher``), in this process; it starts all of them
again when one ends badly, and they go on from the last checkpoint. On several hosts the same command is given on each: an
*address file* names them, a line each, and the first one's port is where they meet. On a Ray cluster Ray Train takes the
agent's place (``distribute/cluster``). What neither knows is done here: progress is told, Ctrl-C stops all at one step, an
error that another try would meet again ends at once, and is said once.

Workers are forked from a server process that has imported PyTorch already, so starting four again takes a fraction of a second
and not four imports.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pennyweight.core.config import decode, dumps, loads
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PennyweightError
from pennyweight.data.dataset import How
from pennyweight.distribute import checkpoint, cluster, worker
from pennyweight.distribute.worker import Host as Host
from pennyweight.distribute.worker import Job
from pennyweight.distribute.worker import Many as Many
from pennyweight.model.spec import Model, Spec
from pennyweight.model.train import EpochLog, Fit, Progress, Recipe

RESTARTS = 1000
"""Of all workers, at most; ``worker.TRIES`` in a row without a checkpoint end it long before."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What came of a training by workers."""

    fit: Fit
    steps: Mapping[str, Any]
    """Steps since the last start, each worker's seconds in them, and the bytes that rank 0 sent by purpose."""


def train(
    spec: Spec,
    data: Path,
    parts: tuple[How, tuple[float, float, float]],
    recipe: Recipe,
    seed: int,
    folder: Path,
    many: Many,
    *,
    allow: tuple[str, ...] = (),
    watch: Callable[[Progress | EpochLog], None] = lambda _: None,
) -> tuple[Model, Told]:
    """The trained model and its record; a training that was stopped in this folder is gone on with.

    Args:
        spec: the model.
        data: a dataset folder.
        parts: how it is split, and by which fractions.
        recipe: how it is trained.
        seed: of the split, the first weights and the training.
        folder: for checkpoints and what workers tell, shared by all hosts; what is in it afterwards may be removed.
        many: by whom.
        allow: factories that may be loaded.
        watch: hears of progress.

    Raises:
        PennyweightError: as a training by one would, or as the workers agreed on.
        DeviceError: a host did not come, a port is taken, or workers end again and again.
    """
    alike = dataclasses.replace(many, workers=1, hosts=(), cluster="", least=0)  # each host has workers and a file of its own
    job = Job(spec, str(data.absolute()), *parts, recipe, seed, alike, allow)
    hosts = many.hosts
    here = place(hosts)
    folder.mkdir(parents=True, exist_ok=True)
    if here == 0:
        old = [folder / name for name in ("error.json", "stop", "progress.jsonl", "meeting.json", "starts.json", "tries.json")]
        for file in (*old, *folder.glob("rank-*.pid")):
            file.unlink(missing_ok=True)
        shutil.rmtree(folder / "fitted", ignore_errors=True)
        if not checkpoint.newest(folder / "checkpoint"):
            shutil.rmtree(folder / "best", ignore_errors=True)
    if many.cluster:
        folder = folder.absolute()
        launch: Callable[[str, str], Any] = functools.partial(cluster.run, many, RESTARTS)
    else:
        launch = elastic_launch(_config(job, many, here, folder), worker.main)
    with concurrent.futures.ThreadPoolExecutor(1) as thread, _quiet():
        running = thread.submit(launch, str(folder), dumps(job))
        _follow(running, folder, watch)
        error = running.exception()
    final = worker.told(folder)
    if final is not None:
        raise final
    if error is not None:
        raise _said(error, job, hosts)
    state, notes = checkpoint.whole(folder / "fitted")
    fitted = loads(Fit, notes["fit"], "fit")
    weights = {k.removeprefix("module."): v for k, v in state.items()}
    return Model(loads(Spec, notes["spec"], "spec"), weights), Told(fitted, json.loads(notes["steps"]))


class _Starts(DefaultLogsSpecs):
    """Sees each start of the workers here, and ends what would go on for ever: only workers that have begun count tries."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._left = folder, worker.TRIES

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called when workers are about to be started.

        Raises:
            DeviceError: they have been started before, several times, and none has begun.
        """
        if any(self._folder.glob("rank-*.pid")):
            self._left = worker.TRIES
        elif not self._left:
            raise DeviceError(
                f"{worker.TRIES} starts of the workers ended before they had begun; their own words stand above. Each imports "
                'the script that calls this: let it do so under if __name__ == "__main__"'
            )
        self._left -= 1
        return super().reify(envs)


def read_hosts(path: Path) -> tuple[Host, ...]:
    """An address file: a host a line, ``ADDRESS[:PORT] [WORKERS]``; ``#`` begins a comment.

    Raises:
        ConfigError: it cannot be read, or a line of it.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file with the address of a host on each line") from error
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        address, _, port = words[0].partition(":")
        if len(words) > 2 or not all(w.isdecimal() for w in (*words[1:], port or "0")):
            raise ConfigError(f"{path}, line {number}: {line.strip()!r} is not ADDRESS[:PORT] [WORKERS]")
        found.append(Host(address, int(port or worker.PORT), int(words[1]) if len(words) > 1 else 0))
    if len({h.address for h in found}) < len(found) or not found:
        raise ConfigError(f"{path} names {len(found)} hosts; name each once, and at least one")
    return tuple(found)


def place(hosts: Sequence[Host]) -> int:
    """Which of the hosts this one is; 0 where none are named.

    Raises:
        ConfigError: none of them.
    """
    if not hosts:
        return 0
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses} | {socket.gethostname()}
    found = [k for k, host in enumerate(hosts) if host.address in own]
    if not found:
        raise ConfigError(
            f"this machine has none of the addresses {', '.join(h.address for h in hosts)}; its own must be in the file"
        )
    return found[0]


def _config(job: Job, many: Many, here: int, folder: Path) -> LaunchConfig:
    workers, hosts = many.workers, many.hosts
    multiprocessing.set_forkserver_preload(["__main__", "pennyweight.distribute.worker"])
    shared: dict[str, Any] = {
        "max_restarts": RESTARTS, "monitor_interval": 0.1, "start_method": "forkserver", "rdzv_backend": "c10d",
        "logs_specs": _Starts(folder), "shutdown_timeout": 5,
    }  # fmt: skip
    if not hosts:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", worker.interface("127.0.0.1"))
        return LaunchConfig(
            1, 1, workers, run_id=uuid.uuid4().hex, rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", **shared
        )
    first, mine = hosts[0], hosts[here]
    if here == 0:
        _free(first)
    os.environ["GLOO_SOCKET_IFNAME"] = worker.interface(mine.address)
    configs = {"timeout": job.many.timeout_s, "join_timeout": job.many.timeout_s, "is_host": here == 0, "last_call_timeout": 5}
    return LaunchConfig(
        many.least or len(hosts), len(hosts), mine.workers or workers, run_id="pennyweight", rdzv_configs=configs,
        rdzv_endpoint=f"{first.address}:{first.port}", local_addr=mine.address, **shared,
    )  # fmt: skip


def _free(host: Host) -> None:
    """That the port is there to be taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.address, host.port))
        except OSError as error:
            raise DeviceError(
                f"{host.address}:{host.port} cannot be opened ({error.strerror}); name another port in the file's first line"
            ) from error


def _follow(running: concurrent.futures.Future[Any], folder: Path, watch: Callable[[Progress | EpochLog], None]) -> None:
    """Tell what the workers tell, until they are done; Ctrl-C asks them to stop at one step, a second one kills them."""
    place = 0

    def tell() -> int:
        with contextlib.suppress(FileNotFoundError), open(folder / "progress.jsonl", "rb") as file:
            file.seek(place)
            for line in file:
                if not line.endswith(b"\n"):
                    return file.tell() - len(line)
                found = json.loads(line)
                event = decode(EpochLog, found["epoch"]) if "epoch" in found else decode(Progress, found["progress"])
                watch(event)
            return file.tell()
        return place

    while not running.done():
        try:
            place = tell()
            time.sleep(0.05)
        except KeyboardInterrupt:
            if (folder / "stop").exists():
                _end(folder)
                raise
            (folder / "stop").touch()
    tell()


def _end(folder: Path) -> None:
    """Kill the workers here; those that are started again see that it is over."""
    worker.tell(folder, DeviceError("ended by a second Ctrl-C"))
    for file in folder.glob("rank-*.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def _said(error: BaseException, job: Job, hosts: Sequence[Host]) -> Exception:
    """What the agent's error means to who gave the command."""
    if isinstance(error, PennyweightError):
        return error
    wait = f"within {job.many.timeout_s:g} s (--timeout)"
    if isinstance(error, ChildFailedError):
        first = next(iter(error.failures.values()))
        return DeviceError(f"worker {first.local_rank} ended with status {first.exitcode}; its own words stand above")
    if isinstance(error, RendezvousError) or "imed out" in str(error) or "imeout" in str(error):
        names = ", ".join(h.address for h in hosts) or "this machine"
        return DeviceError(
            f"not all of {names} came {wait}: start the same command on each, and look whether they reach the first one"
        )
    return error if isinstance(error, Exception) else DataError(str(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The agent logs what is told here in a line."""
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.startswith(("torch.distributed", "torch.multiprocessing"))
    ]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    old = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, old)
