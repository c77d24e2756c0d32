"""BentoML over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.bento``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT``. What its
batching waits for is the latency it aims at (``max_latency_ms``), so WAIT_MS is that.
"""

import os
import sys

import bentoml

from benchmarks.peers.asleep import BATCH, WAIT_MS, WORKERS, work


@bentoml.service(workers=WORKERS, traffic={"timeout": 10})
class Device:
    """Sleeps for as long as its work takes."""

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=WAIT_MS)
    def predict(self, inputs: list[int]) -> list[int]:
        """What came in."""
        work(len(inputs))
        return inputs


if __name__ == "__main__":
    command = ["bentoml", "serve", "benchmarks.peers.bento:Device", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.execv(sys.executable, [sys.executable, "-m", *command])
