"""Triton, through PyTriton, over the sleeping device; the live rows of ``serving`` are compared with it.

Run in an environment of its own, made with Debian's Python, as ``python -m benchmarks.peers.triton``
``FIXED_MS REQUEST_MS WORKERS BATCH WAIT_MS PORT REJECT_MS``: what waited longer than REJECT_MS is refused; with 0 nothing is,
which is its default.
"""

import functools
import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor, TimeoutAction
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.asleep import BATCH, WAIT_MS, WORKERS, work

PORT, REJECT_MS = (int(value) for value in sys.argv[1:3])


@batch
def device(x):
    """Sleeps for as long as its work takes."""
    work(len(x))
    return {"y": x}


def policy():
    """What becomes of requests that wait."""
    if not REJECT_MS:
        return None
    return QueuePolicy(timeout_action=TimeoutAction.REJECT, default_timeout_microseconds=1000 * REJECT_MS)


if __name__ == "__main__":
    config = TritonConfig(http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as server:
        server.bind(
            model_name="device",
            infer_func=[functools.partial(device) for _ in range(WORKERS)],
            inputs=[Tensor(name="x", dtype=np.int32, shape=(1,))],
            outputs=[Tensor(name="y", dtype=np.int32, shape=(1,))],
            config=ModelConfig(
                max_batch_size=BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * WAIT_MS, default_queue_policy=policy()),
            ),
        )
        server.serve()
