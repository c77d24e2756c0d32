"""Numbers as they travel: fp32 as they are, or in fewer bits on request.

    fp16, bf16   each number rounded, 2 times fewer bytes
    int8         blocks of 64 numbers with the largest of each as its scale, 3.8 times fewer

Sums of dense gradients keep what rounding took and add it to the next step's (error feedback, Seide et al. 2014), at the sender
and at who adds up, so that nothing is lost but time. Rows and their gradients are other rows in each step, and what was left
over of one would wait until it comes again, in memory as large as the table; there int8 rounds up or down by chance instead,
which is right in the mean (Alistarh et al. 2017), from a generator that the step seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["fp32", "fp16", "bf16", "int8"]
BLOCK = 64
"""Numbers that share a scale."""
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Codec:
    """One way to write fp32 numbers [n] as bytes [k, width]."""

    kind: Kind = "fp32"

    def size(self, n: int) -> int:
        """``k`` for ``n`` numbers."""
        return -(-n // BLOCK) if self.kind == "int8" else n

    def pack(self, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [k, width]; with a generator int8 is rounded by chance."""
        if self.kind == "fp32":
            return numbers.view(torch.uint8).view(-1, 4)
        if self.kind != "int8":
            half = _HALF[self.kind]
            top = torch.finfo(half).max
            return numbers.clamp(-top, top).to(half).view(torch.uint8).view(-1, 2)
        if not len(numbers):
            return torch.empty(0, BLOCK + 4, dtype=torch.uint8)
        blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        ratio = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)
        whole = ratio.round() if generator is None else (ratio + torch.rand(ratio.shape, generator=generator)).floor()
        return torch.cat([whole.clamp_(-127, 127).to(torch.int8).view(torch.uint8), scale.view(torch.uint8)], 1)

    def unpack(self, packed: Tensor, n: int) -> Tensor:
        """The ``n`` numbers again, as far as they are kept."""
        if not n:
            return torch.empty(0)
        if self.kind == "fp32":
            return packed.reshape(-1).view(torch.float32)
        if self.kind != "int8":
            return packed.reshape(-1).view(_HALF[self.kind]).float()
        whole = packed[:, :BLOCK].contiguous().view(torch.int8)
        scale = packed[:, BLOCK:].contiguous().view(torch.float32)
        return (whole * scale).reshape(-1)[:n]
