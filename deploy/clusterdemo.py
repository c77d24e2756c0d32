"""Two "hosts" on one machine train one model, one of their workers is killed on the way, and the model does not show it.

The hosts are network namespaces with addresses of their own, joined by a virtual cable; nothing else tells them from two
machines that share a folder. Each is given the same command. Needs Linux, root and iproute2; what it made is gone afterwards.

    python deploy/clusterdemo.py [--epochs 3] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pennyweight.job import open_run

HOSTS = {"pennyweight-a": "10.77.0.1", "pennyweight-b": "10.77.0.2"}
TRAIN = ("train", "sample", "--model", "deepfm", "--hidden", "64,32", "--batch", "1024", "--tables", "lazy-adam")
WAIT_S = 1200


def main() -> None:
    """Train by two hosts, by two undisturbed workers of one, and by one worker, and say what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a folder for the runs, left there")
    given = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("cluster-demo makes network namespaces: it needs root and the command ip (Debian: apt-get install iproute2)")
    folder = given.keep or Path(tempfile.mkdtemp())
    try:
        with hosts() as names:
            together = cluster(folder, names, given.epochs)
        command = [sys.executable, "-m", "pennyweight", *TRAIN, "--epochs", str(given.epochs), "--placement", "row"]
        for workers, name in (("2", "undisturbed"), ("1", "alone")):
            print(f"now {workers} on this machine, nobody killed", flush=True)
            subprocess.run([*command, "--workers", workers, "--out", str(folder / name)], check=True)
        apart = compare(together, folder / "undisturbed")
        # Sums in another order round otherwise, which a long training in fp32 makes visible: told, and no failure.
        compare(together, folder / "alone")
        if apart > 0:
            sys.exit("two hosts with a worker killed and two undisturbed workers did not get the same model")
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with an address each, and a cable between."""
    names = list(HOSTS)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth-a", "netns", names[0], "type", "veth", "peer", "name", "veth-b", "netns", names[1])
        for (name, address), end in zip(HOSTS.items(), ("veth-a", "veth-b"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def cluster(folder: Path, names: list[str], epochs: int) -> Path:
    """The run of two hosts with a worker each, of which the second is killed in the second epoch."""
    out, file = folder / "cluster", folder / "hosts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{address}\n" for address in HOSTS.values()))
    command = [sys.executable, "-m", "pennyweight", *TRAIN, "--epochs", str(epochs), "--out", str(out)]
    command += ["--hosts", str(file), "--every", "20", "--placement", "row"]
    running = [subprocess.Popen(["ip", "netns", "exec", name, *command]) for name in names]
    try:
        await_epoch(out / "workers" / "progress.jsonl", 2, running)
        victim = int((out / "workers" / "rank-1.pid").read_text())
        os.kill(victim, signal.SIGKILL)
        print(f"killed the worker of rank 1 (process {victim}) in the second epoch", flush=True)
        codes = [each.wait(WAIT_S) for each in running]
    finally:
        for each in running:
            if each.poll() is None:
                each.kill()
    if any(codes):
        sys.exit(f"the hosts' commands ended with {codes}")
    return out


def await_epoch(file: Path, epoch: int, running: list[subprocess.Popen[bytes]]) -> None:
    """Until a training tells of a step in this epoch."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        lines = file.read_bytes().splitlines() if file.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):
                if json.loads(line).get("progress", {}).get("epoch", 0) >= epoch:
                    return
        if any(each.poll() is not None for each in running):
            sys.exit("a host's command ended before the second epoch")
        time.sleep(0.05)
    sys.exit(f"no second epoch within {WAIT_S} s")


def compare(one: Path, other: Path) -> float:
    """Print losses, metrics and the largest difference of a weight, which is given back."""
    (a, left, *_), (b, right, *_) = open_run(one), open_run(other)
    for mine, theirs in zip(a.epochs, b.epochs, strict=True):
        print(f"epoch {mine.epoch}: loss {mine.loss:.7f} and {theirs.loss:.7f}, AUC {mine.metric:.5f} and {theirs.metric:.5f}")
    apart = max((left.model.state[k].double() - v.double()).abs().max().item() for k, v in right.model.state.items())
    worst = max(abs(m.loss - t.loss) / t.loss for m, t in zip(a.epochs, b.epochs, strict=True))
    print(f"two hosts, a worker killed, and {other.name}: losses {worst:.1e} apart, weights {apart:.1e}", flush=True)
    return apart


def ip(*words: str) -> None:
    """A command of iproute2."""
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    main()
