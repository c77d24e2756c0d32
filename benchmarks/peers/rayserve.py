"""Ray Serve over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.rayserve``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT ONGOING``.
"""

import asyncio
import sys
import threading
import time

import ray
from ray import serve
from starlette.responses import Response

FIXED_S, REQUEST_S = (float(value) / 1000 for value in sys.argv[1:3])
WORKERS, BATCH = (int(value) for value in sys.argv[3:5])
WAIT_S = float(sys.argv[5]) / 1000
PORT, ONGOING = (int(value) for value in sys.argv[6:8])


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 0.1})
class Device:
    """Sleeps for as long as its work takes; one batch at a time."""

    def __init__(self, fixed_s, request_s):
        self.fixed_s, self.request_s, self.lock = fixed_s, request_s, threading.Lock()

    def work(self, requests):
        with self.lock:
            seconds = self.fixed_s + self.request_s * requests
            if seconds > 0:
                time.sleep(seconds)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
    async def joined(self, inputs):
        await asyncio.to_thread(self.work, len(inputs))
        return inputs

    async def __call__(self, request):
        await self.joined(1)
        return Response(b"1")  # with its length, which the client counts on


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Device.bind(FIXED_S, REQUEST_S), route_prefix="/")
    threading.Event().wait()
