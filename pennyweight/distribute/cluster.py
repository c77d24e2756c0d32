"""Workers on a Ray cluster: Ray Train places them, starts them again, and goes on with fewer where that is allowed.

What a worker does is what it does under ``torchrun`` (``distribute/worker``), in a process of its own: Ray Train calls its
function in a thread of an actor, where no signal can be caught and where a limit on memory would be the actor's. The process
ends with the actor, whatever ends that, since it reads a pipe that the actor holds. Meetings, checkpoints, progress and errors
go through the folder of the training, as on several hosts; the cluster's machines and the one that gives the command see it
under one path, and have this package installed.

The driver runs inside the cluster, as a task without a processor, so that a client far away and a machine of the cluster are
the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.core.cluster import connected
from pennyweight.core.errors import DeviceError
from pennyweight.distribute import worker
from pennyweight.distribute.worker import Many


def run(many: Many, restarts: int, folder: str, job: str) -> None:
    """Let workers train until they are done or a final error lies in the folder.

    Raises:
        ConfigError: Ray is missing.
        DeviceError: the cluster is not reached, has too few processors, or workers end again and again.
    """
    with connected(many.cluster, many.workers) as ray:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < (many.least or many.workers):
            raise DeviceError(
                f"the Ray cluster has {there} CPUs, and {many.least or many.workers} workers want one each; add nodes, or give "
                "--workers fewer"
            )
        (Path(folder) / "job.json").write_text(job)
        drive = ray.remote(num_cpus=0, max_retries=0)(_drive)
        try:
            ray.get(drive.remote(many.workers, many.least, restarts, folder))
        except ray.exceptions.RayError as error:
            raise DeviceError(f"Ray ended the training: {_line(error)}") from error


def _drive(workers: int, least: int, restarts: int, folder: str) -> None:
    """Inside the cluster: a run of Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    count: Any = (least, workers) if least and least < workers else workers
    trainer = DataParallelTrainer(
        _worker,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=count, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="ray", storage_path=folder, failure_config=FailureConfig(max_failures=restarts)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if worker.told(Path(folder)) is None:
            raise RuntimeError(_line(error)) from None


def _worker(config: Mapping[str, Any]) -> None:
    """One of Ray Train's workers: a process as ``torchrun`` would start it."""
    import ray

    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), Path(config["folder"])
    own = {
        "RANK": rank, "WORLD_SIZE": context.get_world_size(), "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GLOO_SOCKET_IFNAME": worker.interface(ray.util.get_node_ip_address()), "OMP_NUM_THREADS": "",
    }  # fmt: skip
    env = {k: v for k, v in (os.environ | {k: str(v) for k, v in own.items()}).items() if v}
    command = [sys.executable, "-m", "pennyweight.distribute.worker", str(folder), str(folder / "job.json")]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE)  # its end closes with this actor
    status = process.wait()
    if status and worker.told(folder) is None:
        raise RuntimeError(f"worker {rank} ended with status {status}")


def _line(error: BaseException) -> str:
    """The last line of what Ray says of an error: its first ones are where it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
