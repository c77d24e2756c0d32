"""What goes between workers: a few collectives of ``torch.distributed``, every byte of them counted.

Counted is what a worker sends to others, by what it is for: of an exchange what is addressed to another rank, of a sum over w
workers the 2 (w - 1) / w of its numbers that a ring sends. Counts of rows and the like are counted too. Gloo's own framing and
TCP's are not.

A worker that dies closes its connections and the others see that at once; one that stands still is waited for as long as the
group's time-out. Both end as ``Lost``.
"""

from __future__ import annotations

import collections
import datetime
import time
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pennyweight.core.errors import DeviceError
from pennyweight.distribute.codec import Codec


class Lost(DeviceError):
    """Another worker does not answer: what those that are left do is end, to be started again."""


class Wire:
    """Collectives of one group of ranks.

    Args:
        group: of ``torch.distributed``; None for all ranks, ``alone`` for this one by itself, which sends nothing.
        sent: bytes by purpose, to count into; several wires may share one.
        timeout: of the group, for messages.
    """

    codec = Codec()
    """How rows and gradients are written."""
    generator: torch.Generator | None = None
    """Rounds them by chance."""

    def __init__(
        self,
        group: dist.ProcessGroup | Literal["alone"] | None,
        sent: collections.Counter[str],
        timeout: datetime.timedelta,
    ) -> None:
        self.group = None if isinstance(group, str) else group
        self.sent, self.timeout = sent, timeout
        self.rank, self.size = (0, 1) if isinstance(group, str) else (dist.get_rank(group), dist.get_world_size(group))
        self.waited = 0.0
        """Seconds."""

    def exchange(self, send: Tensor, out: Sequence[int], into: Sequence[int], what: str) -> Tensor:
        """Rows [sum of ``into``, ...] from all, where ``send`` [sum of ``out``, ...] holds those for each rank, in order."""
        received = send.new_empty((sum(into), *send.shape[1:]))
        self._count(what, (sum(out) - out[self.rank]) * _row(send))
        self._wait(dist.all_to_all_single(received, send.contiguous(), list(into), list(out), self.group, async_op=True))
        return received

    def numbers(self, send: Tensor, out: Sequence[int], into: Sequence[int], what: str) -> Tensor:
        """``exchange`` of fp32 numbers, as the wire's codec writes them."""
        codec = self.codec
        if codec.kind == "fp32":
            return self.exchange(send, out, into, what)
        packed = torch.cat([codec.pack(part, self.generator) for part in torch.split(send, list(out))])
        sizes = [codec.size(n) for n in into]
        got = torch.split(self.exchange(packed, [codec.size(n) for n in out], sizes, what), sizes)
        return torch.cat([codec.unpack(part, n) for part, n in zip(got, into, strict=True)])

    def compressed(self, tensor: Tensor, left: Tensor, what: str) -> None:
        """``sum`` of numbers [n] as the codec writes them; what it does not keep stays in ``left`` [n], which is added first.

        Each rank adds up a part and sends the sums to all.
        """
        tensor += left
        cuts = [len(tensor) * (k + 1) // self.size - len(tensor) * k // self.size for k in range(self.size)]
        packed = [self.codec.pack(part) for part in torch.split(tensor, cuts)]
        kept = torch.cat([self.codec.unpack(part, n) for part, n in zip(packed, cuts, strict=True)])
        left.copy_(tensor - kept)
        sizes = [self.codec.size(n) for n in cuts]
        mine = [sizes[self.rank]] * self.size
        parts = torch.split(self.exchange(torch.cat(packed), sizes, mine, what), mine)
        total = torch.stack([self.codec.unpack(part, cuts[self.rank]) for part in parts]).sum(0)
        told = self.codec.pack(total)
        own = torch.split(left, cuts)[self.rank]
        own += total - self.codec.unpack(told, len(total))
        every = torch.split(self.exchange(told.repeat(self.size, 1), mine, sizes, what), sizes)
        torch.cat([self.codec.unpack(part, n) for part, n in zip(every, cuts, strict=True)], out=tensor)

    def counts(self, mine: Tensor) -> Tensor:
        """From whole numbers for each rank [size, ...] to those of each rank for this one [size, ...]."""
        got = torch.empty_like(mine)
        self._count("counts", (self.size - 1) * _row(mine))
        self._wait(dist.all_to_all_single(got, mine.contiguous(), group=self.group, async_op=True))
        return got

    def all(self, mine: Tensor, what: str) -> Tensor:
        """One tensor of a shape from each rank, [size, ...]."""
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._count(what, (self.size - 1) * mine.numel() * mine.element_size())
        self._wait(dist.all_gather(found, mine.contiguous(), group=self.group, async_op=True))
        return torch.stack(found)

    def rows(self, mine: Tensor, what: str) -> Tensor:
        """The rows of all ranks, in order."""
        sizes = self.all(torch.tensor(len(mine)), "counts").tolist()
        copies = [len(mine) * (k != self.rank) for k in range(self.size)]
        send = torch.cat([mine] * (self.size - 1)) if self.size > 1 else mine[:0]
        got = self.exchange(send, copies, [n * (k != self.rank) for k, n in enumerate(sizes)], what)
        parts = list(torch.split(got, [n * (k != self.rank) for k, n in enumerate(sizes)]))
        parts[self.rank] = mine
        return torch.cat(parts)

    def sum(self, tensor: Tensor, what: str) -> None:
        """Add a tensor up over all ranks, in place."""
        self.settle(self.begin(tensor, what))

    def begin(self, tensor: Tensor, what: str) -> dist.Work:
        """The same without waiting for it."""
        self._count(what, 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size)
        try:
            work: dist.Work = dist.all_reduce(tensor, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        return work

    def settle(self, work: dist.Work) -> None:
        """Wait for what was begun."""
        self._wait(work)

    def _wait(self, work: dist.Work | None) -> None:
        began = time.perf_counter()
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        self.waited += time.perf_counter() - began

    def _count(self, what: str, bytes: int) -> None:
        self.sent[what] += bytes

    def _lost(self, error: RuntimeError) -> Lost:
        return lost(error, self.timeout.total_seconds())


def lost(error: RuntimeError, wait_s: float) -> Lost:
    """What an error of a collective means."""
    said = str(error).splitlines()[0][:200]
    if "imed out" in said or "imeout" in said:
        return Lost(f"no answer from another worker within {wait_s:g} s (--timeout): it stands still or is lost ({said})")
    return Lost(f"another worker is gone ({said})")


def between(error: BaseException) -> bool:
    """Whether an error is one of what goes between workers, and not of what one of them does."""
    words = ("gloo", "onnection", "imed out", "imeout", "roken pipe", "ocket", "TCPStore")
    return isinstance(error, (dist.DistError, RuntimeError)) and any(word in str(error) for word in words)


def _row(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size() if len(tensor) else 0
