"""The sleeping device that peers' servers stand in front of, as a peer's command line says: what each script has in common.

``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS`` come first and are taken off the line, which some servers read too. They go on in
the environment, since servers import a peer's script again in processes of their own.
"""

import os
import sys
import time

if "BENCH_DEVICE" not in os.environ:
    os.environ["BENCH_DEVICE"] = " ".join(sys.argv[1:6])
    del sys.argv[1:6]
_told = os.environ["BENCH_DEVICE"].split()
FIXED_S, REQUEST_S = (float(value) / 1000 for value in _told[:2])
WORKERS, BATCH, WAIT_MS = map(int, _told[2:])


def work(requests: int) -> None:
    """Sleep for as long as so many requests together take."""
    seconds = FIXED_S + REQUEST_S * requests
    if seconds > 0:
        time.sleep(seconds)
