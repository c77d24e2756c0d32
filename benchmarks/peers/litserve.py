"""LitServe over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.litserve``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT FRONTS``.
"""

import sys

import litserve

from benchmarks.peers.asleep import BATCH, WAIT_MS, WORKERS, work

PORT, FRONTS = (int(value) for value in sys.argv[1:3])


class Device(litserve.LitAPI):
    """Sleeps for as long as its work takes."""

    def setup(self, device):
        pass

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def unbatch(self, output):
        return output

    def predict(self, inputs):
        work(len(inputs) if isinstance(inputs, list) else 1)
        return inputs

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Device(max_batch_size=BATCH, batch_timeout=WAIT_MS / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, timeout=10)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=FRONTS, log_level="error", generate_client_file=False)
