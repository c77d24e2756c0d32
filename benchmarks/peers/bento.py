"""BentoML over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.bento``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT``. What its
batching waits for is the latency it aims at (``max_latency_ms``), so WAIT_MS is that.
"""

import os
import sys
import time

import bentoml

if __name__ == "__main__":
    names = ("FIXED_MS", "REQUEST_MS", "WORKERS", "BATCH", "WAIT_MS")
    os.environ |= dict(zip(names, sys.argv[1:6], strict=True))
FIXED_S, REQUEST_S = float(os.environ["FIXED_MS"]) / 1000, float(os.environ["REQUEST_MS"]) / 1000
WORKERS, BATCH, WAIT_MS = (int(os.environ[name]) for name in ("WORKERS", "BATCH", "WAIT_MS"))


@bentoml.service(workers=WORKERS, traffic={"timeout": 10})
class Device:
    """Sleeps for as long as its work takes."""

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=WAIT_MS)
    def predict(self, inputs: list[int]) -> list[int]:
        """What came in."""
        seconds = FIXED_S + REQUEST_S * len(inputs)
        if seconds > 0:
            time.sleep(seconds)
        return inputs


if __name__ == "__main__":
    command = ["bentoml", "serve", "benchmarks.peers.bento:Device", "--host", "127.0.0.1", "--port", sys.argv[6]]
    os.execv(sys.executable, [sys.executable, "-m", *command])
