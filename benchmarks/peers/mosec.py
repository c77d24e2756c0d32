"""mosec over the sleeping device, or over a real bundle; the live rows of ``serving`` are compared with it.

Run in an environment of its own as ``python -m benchmarks.peers.mosec FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS --port N``
and mosec's own options (``--capacity``, ``--timeout``): bodies in, bodies out, batched as it does. With the folder of a bundle
in ``BENCH_BUNDLE`` its workers score by what our service scores by, one thread each; what that needs is found in the
folder of packages that ``BENCH_PACKAGES`` names, behind the peer's own.
"""

import os
import sys

sys.path += filter(None, [os.environ.get("BENCH_PACKAGES")])

from mosec import Server, Worker

from benchmarks.peers.asleep import BATCH, WAIT_MS, WORKERS, work


class Raw(Worker):
    """Bodies as they come."""

    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data


class Device(Raw):
    """Sleeps for as long as its work takes."""

    def forward(self, data):
        work(len(data) if isinstance(data, list) else 1)
        return data


class Scorer(Raw):
    """A bundle's model, several requests in one forward as in our worker."""

    def __init__(self):
        import numpy as np
        import torch

        from pennyweight.model import bundle
        from pennyweight.serve import binary
        from pennyweight.serve.lookup import Lookup
        from pennyweight.serve.worker import Query
        from pennyweight.serve.worker import Worker as Scores

        torch.set_num_threads(1)
        given = bundle.load(os.environ["BENCH_BUNDLE"])
        self.worker, self.lookup = Scores(given, ["benchmarks.device"]), Lookup(given.catalog)
        self.decode, self.query, self.none = binary.decode, Query, np.empty(0, np.int64)

    def forward(self, data):
        bodies = data if isinstance(data, list) else [data]
        queries = [self.query(None, self.none, items=self.lookup.ids(self.decode(body).items)) for body in bodies]
        said = [ranked.scores.tobytes() for ranked in self.worker.answer(queries)]
        return said if isinstance(data, list) else said[0]


if __name__ == "__main__":
    server = Server()
    # One at a time is mosec's way without batches; it hands over no list then.
    server.append_worker(
        Scorer if "BENCH_BUNDLE" in os.environ else Device, num=WORKERS, max_batch_size=BATCH, max_wait_time=WAIT_MS
    )
    server.run()
