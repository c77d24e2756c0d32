"""Gradients of dense layers, added up over workers while the rest of the backward pass is still computed.

Parameters are put into buckets in reverse order, about the order their gradients come in; a bucket is on its way as soon as its
last gradient is there. That is what ``DistributedDataParallel`` does. It was not taken, since it averages means of equal
batches, wants every parameter in it (tables are another matter here) and owns the forward pass. In fewer bits (``codec``)
buckets go one after the other, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pennyweight.distribute.wire import Wire

BUCKET = 1 << 20
"""Bytes from which a bucket is sent."""


class Buckets:
    """The sums of some parameters' gradients; gradients that did not come are left out of the parameters, not of the sums."""

    def __init__(self, params: Sequence[nn.Parameter], wire: Wire) -> None:
        self.wire = wire
        self.buckets = [_Bucket(group) for group in _groups(params)]
        self.of = {id(p): bucket for bucket in self.buckets for p in bucket.params}
        self.hooks = [p.register_post_accumulate_grad_hook(self._came) for p in params]  # type: ignore[no-untyped-call]
        self.works: list[dist.Work] = []

    def begin(self) -> None:
        """Gradients are about to come."""
        self.works = []
        for bucket in self.buckets:
            bucket.left = len(bucket.params)

    def settle(self) -> None:
        """Send what has not come in full, wait for all, and hand the sums to the parameters."""
        if self.wire.codec.kind != "fp32":
            for bucket in self.buckets:
                self.wire.compressed(bucket.fill(), bucket.left_over, "dense")
                bucket.empty()
            return
        for bucket in self.buckets[len(self.works) :]:
            self.works.append(self.wire.begin(bucket.fill(), "dense"))
        for bucket, work in zip(self.buckets, self.works, strict=True):
            self.wire.settle(work)
            bucket.empty()

    def release(self) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()

    def _came(self, param: Tensor) -> None:
        if self.wire.codec.kind != "fp32":
            return
        self.of[id(param)].left -= 1
        # In their order, so that all workers send the same bucket.
        while len(self.works) < len(self.buckets) and not self.buckets[len(self.works)].left:
            self.works.append(self.wire.begin(self.buckets[len(self.works)].fill(), "dense"))


class _Bucket:
    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params, self.left = params, len(params)
        self.flat = torch.zeros(sum(p.numel() for p in params))
        self.left_over = torch.zeros_like(self.flat)
        """What fewer bits did not carry."""

    def fill(self) -> Tensor:
        for p, place in zip(self.params, self._places(), strict=True):
            place.zero_() if p.grad is None else place.copy_(p.grad.flatten())
        return self.flat

    def empty(self) -> None:
        for p, place in zip(self.params, self._places(), strict=True):
            if p.grad is not None:
                p.grad.copy_(place.view(p.shape))

    def _places(self) -> Sequence[Tensor]:
        return torch.split(self.flat, [p.numel() for p in self.params])


def _groups(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: list[list[nn.Parameter]] = [[]]
    for p in reversed(params):
        if sum(q.numel() for q in groups[-1]) * 4 >= BUCKET:
            groups.append([])
        groups[-1].append(p)
    return [g for g in groups if g]
