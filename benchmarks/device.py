"""A device that is asleep for as long as work on it takes: what schedulers and servers are compared on without one.

``T = fixed_ms + row_ms * rows`` of a forward; the score of an item is its id. Sleeping leaves the processor to the front and to
the client, as a GPU would; what two models on the same cores do to each other is what the rows with a real model are for.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class Device(nn.Module):
    def __init__(self, fixed_ms: float, row_ms: float) -> None:
        super().__init__()
        self.fixed_s, self.row_s = fixed_ms / 1000, row_ms / 1000
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, item: Tensor) -> Tensor:
        seconds = self.fixed_s + self.row_s * len(item)
        if seconds > 0:
            time.sleep(seconds)
        return item * self.weight
