"""mosec over the sleeping device: bodies in, bodies out, batched as it does; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.mosec FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS --port N``
and mosec's own options (``--capacity``, ``--timeout``).
"""

import sys
import time

from mosec import Server, Worker

FIXED_S, REQUEST_S = (float(value) / 1000 for value in sys.argv[1:3])
WORKERS, BATCH = (int(value) for value in sys.argv[3:5])
WAIT_MS = int(sys.argv[5])


class Device(Worker):
    """Sleeps for as long as its work takes."""

    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data

    def forward(self, data):
        bodies = data if isinstance(data, list) else [data]
        seconds = FIXED_S + REQUEST_S * len(bodies)
        if seconds > 0:
            time.sleep(seconds)
        return data


if __name__ == "__main__":
    del sys.argv[1:6]
    server = Server()
    server.append_worker(Device, num=WORKERS, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
