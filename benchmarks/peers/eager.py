"""Plain PyTorch, as the model is written, in a process of its own: columns are those of a service, one tensor each."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.exchange import Job, Made
from pennyweight.model.bundle import load
from pennyweight.model.spec import call


def plain(job: Job) -> Made:
    """The bundle's module on one thread."""
    torch.set_num_threads(1)
    model = load(job.given / "bundle").model
    module, ready = model.build(), {}

    def score(batch: Any) -> Any:
        if id(batch) not in ready:
            ready[id(batch)] = {n: torch.from_numpy(v) for n, v in batch.items()}
        with torch.inference_mode():
            return call(module, ready[id(batch)], model.spec.inputs).numpy()

    return Made((), score)
