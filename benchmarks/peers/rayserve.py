"""Ray Serve over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.rayserve``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT ONGOING``.
"""

import asyncio
import sys
import threading

import ray
from ray import serve
from starlette.responses import Response

from benchmarks.peers.asleep import BATCH, WAIT_MS, WORKERS, work

PORT, ONGOING = (int(value) for value in sys.argv[1:3])


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 0.1})
class Device:
    """Sleeps for as long as its work takes; one batch at a time."""

    def __init__(self):
        self.lock = threading.Lock()

    def work(self, requests):
        with self.lock:
            work(requests)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_MS / 1000)
    async def joined(self, inputs):
        await asyncio.to_thread(self.work, len(inputs))
        return inputs

    async def __call__(self, request):
        await self.joined(1)
        return Response(b"1")  # with its length, which the client counts on


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Device.bind(), route_prefix="/")
    threading.Event().wait()
