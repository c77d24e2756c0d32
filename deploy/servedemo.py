"""A bundle served by two replicas under Ray Serve, our rule between them; then one is killed.

Ray runs on this machine alone; nothing else tells its two replicas from two machines. Requests go in a closed loop of eight
askers. A request inside a replica that dies is lost there, which this counts.

    python deploy/servedemo.py BUNDLE [--seconds 10]
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import signal
import sys
import time
import urllib.error
import urllib.request

import psutil
from ray import serve

from pennyweight.core.cluster import connected
from pennyweight.serve import replicas

PORT = 8123
ASKERS = 8


def main() -> None:
    """Ask for some seconds, kill a replica, ask on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    with connected("local", 3):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(replicas.application(given.bundle, 2), route_prefix="/")
        print(f"two replicas answer on http://127.0.0.1:{PORT}", flush=True)
        before = asked(given.seconds)
        print(f"{before[200] / given.seconds:.0f} answers a second; by status {dict(before)}", flush=True)
        victim = pids()[0]
        print(f"killing the replica of process {victim}", flush=True)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(asked, given.seconds)
            time.sleep(given.seconds / 4)
            os.kill(victim, signal.SIGKILL)
            during = running.result()
        print(f"{during[200]} answered while a replica was lost and started again; by status {dict(during)}", flush=True)
        after = asked(2.0)
        print(f"afterwards by status {dict(after)}", flush=True)
        serve.shutdown()
    if not before[200] or set(after) != {200}:
        sys.exit("the replicas did not answer")


def asked(seconds: float) -> collections.Counter[int]:
    """What a closed loop of askers gets, by status; 0 is no answer at all."""
    end = time.monotonic() + seconds

    def ask(number: int) -> collections.Counter[int]:
        found: collections.Counter[int] = collections.Counter()
        while time.monotonic() < end:
            url = f"http://127.0.0.1:{PORT}/recommend?user={1 + number}&k=5"
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    found[answer.status] += 1
            except urllib.error.HTTPError as error:
                found[error.code] += 1
            except OSError:
                found[0] += 1
        return found

    with concurrent.futures.ThreadPoolExecutor(ASKERS) as pool:
        return sum(pool.map(ask, range(ASKERS)), collections.Counter())


def pids() -> list[int]:
    """The processes of the replicas."""
    names = ("ServeReplica", "pennyweight")
    return [p.pid for p in psutil.process_iter(["cmdline"]) if all(n in " ".join(p.info["cmdline"] or []) for n in names)]


if __name__ == "__main__":
    main()
