"""Dense layers trained in bfloat16: the matrix products in it, everything between them in fp32.

A processor with bfloat16 instructions multiplies four times as fast in it, and its exponent is fp32's, so no loss needs
scaling. PyTorch's autocast is the known way. It also turns small products that should stay exact (the sums of a factorization
machine, whose squares cancel) and leaves activations in bfloat16, which PyTorch's elementwise kernels on a CPU are slower at
than at fp32. Here a layer takes fp32 and gives fp32: input, weight and gradient are rounded on their way into its three
products, the weight itself, its gradient's sum and the optimizer stay fp32. The cost is a pass over each layer's input, output
and gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 10
"""Numbers in a layer's weight from which its products are worth rounding for."""


class Product(torch.autograd.Function):
    """``x @ weight.T + bias`` of fp32 tensors, multiplied in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """fp32 [..., outputs] of fp32 [..., inputs]."""
        rows, narrow = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, narrow)
        ctx.shape, ctx.biased = x.shape, bias is not None
        y = torch.mm(rows, narrow.t()).float()
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the input, the weight and the bias."""
        (gradient,) = gradients
        rows, narrow = ctx.saved_tensors
        whole = gradient.reshape(-1, len(narrow))
        half = whole.bfloat16()
        wanted = ctx.needs_input_grad
        x = torch.mm(half, narrow).float().view(ctx.shape) if wanted[0] else None
        weight = torch.mm(half.t(), rows).float() if wanted[1] else None
        return x, weight, whole.sum(0) if ctx.biased and wanted[2] else None


class Halved:
    """A module's dense layers multiply in bfloat16 while it trains, until ``release()``."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = [m for m in module.modules() if type(m) is nn.Linear and worth(m.weight)]
        for layer in self.layers:
            layer.__dict__["forward"] = functools.partial(_forward, layer)

    def release(self) -> None:
        """Leave the module as it was found."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if not layer.training or x.dtype != torch.float32:
        return nn.Linear.forward(layer, x)
    y: Tensor = Product.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return y


def worth(weight: Tensor) -> bool:
    """Whether the products of a layer are worth rounding for."""
    return weight.dtype == torch.float32 and weight.numel() >= SMALLEST and min(weight.shape) > 1
