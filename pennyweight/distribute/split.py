"""What a module needs to compute its part of a batch as if it had all of it: norms over all rows, dropout of all rows.

Batch norm takes its mean and variance over the rows of all workers: each worker's own are combined as Chan et al. (1979) do, in
one exchange forward and one sum backward. ``nn.SyncBatchNorm`` is the known alternative; it runs on GPUs only. Dropout that
PyTorch draws (also inside its attention) is caught at the operator, so that it works for modules nobody here knows: the mask of
the whole batch is drawn, and this worker's rows are taken of it. That draws w times what a worker needs, a tenth of a
microsecond a thousand numbers, and is what makes the mask of a row the same whoever computes it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from pennyweight.distribute.wire import Wire
from pennyweight.model import layers, team


class _Synced(torch.autograd.Function):
    """Batch norm in training over the rows of all workers; gives the output [n, C], the mean, the variance and the count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wire: Wire) -> Any:
        n, width = x.shape
        mine = x.new_zeros(1 + 2 * width)
        if n:
            mean = x.mean(0)
            mine = torch.cat([x.new_tensor([n]), mean, (x - mean).square_().sum(0)])
        every = wire.all(mine, "norms")
        counts, means, squares = every[:, :1], every[:, 1 : 1 + width], every[:, 1 + width :]
        total = float(counts.sum())
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        scale = (variance + eps).rsqrt()
        plain = (x - mean) * scale
        ctx.save_for_backward(plain, weight, scale)
        ctx.total, ctx.wire, ctx.biased = total, wire, bias is not None
        y = plain if weight is None else plain * weight
        ctx.mark_non_differentiable(mean, variance)
        return (y if bias is None else y + bias), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        plain, weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        sums = torch.stack([gradient.sum(0), (gradient * plain).sum(0)])
        own = sums.clone()
        ctx.wire.sum(sums, "norms")
        x = gradient - (sums[0] + plain * sums[1]) / ctx.total
        x = x * (scale if weight is None else scale * weight)
        return x, None if weight is None else own[1], own[0] if ctx.biased else None, None, None


def _norm(module: _BatchNorm, wire: Wire, x: Tensor) -> Tensor:
    """What a batch norm answers, over the rows of all workers where they are parted."""
    part = team.part()
    if not module.training or part is None:
        answer: Tensor = type(module).forward(module, x)
        return answer
    flat = x.movedim(1, -1)
    y, mean, variance = _Synced.apply(  # type: ignore[no-untyped-call]
        flat.reshape(-1, flat.shape[-1]), module.weight, module.bias, module.eps, wire
    )
    if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        rate = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        rows = part.total * (flat[0].numel() // flat.shape[-1] if len(flat) else 1)
        with torch.no_grad():
            module.running_mean.lerp_(mean, rate)
            module.running_var.lerp_(variance * (rows / (rows - 1)), rate)
    normed: Tensor = y.view(flat.shape).movedim(-1, 1)
    return normed


class Drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws the dropout mask of the whole batch where one of this worker's rows is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator; all but dropout's draw pass through."""
        part = team.part()
        if func is torch.ops.aten.bernoulli_.float and part is not None and args[0].dim() and len(args[0]) == part.rows:
            mask, chance = args[0], args[1] if len(args) > 1 else 0.5
            whole = mask.new_empty((part.total, *mask.shape[1:])).bernoulli_(chance)
            return mask.copy_(part.of(whole))
        return func(*args, **(kwargs or {}))


class Split:
    """A module whose norms and dropout are those of the whole batch, until ``release()``."""

    def __init__(self, module: nn.Module, wire: Wire) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        for norm in self.norms:
            norm.__dict__["forward"] = functools.partial(_norm, norm, wire)
        self.drawing = any(_draws(m) for m in module.modules())

    @contextlib.contextmanager
    def part(self, rows: int) -> Iterator[None]:
        """Inside, this worker's part of ``rows`` rows is computed."""
        with team.computing(team.Part((team.share(rows),), rows)), Drawn() if self.drawing else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            yield

    def release(self) -> None:
        """Leave the module as it was found."""
        for norm in self.norms:
            norm.__dict__.pop("forward", None)


def _draws(module: nn.Module) -> bool:
    """Whether a module may draw dropout by PyTorch's operators: its own layers do, and what is not known may."""
    if isinstance(module, _DropoutNd):
        return type(module) is not layers.Dropout and module.p > 0
    return not type(module).__module__.startswith(("torch.", "pennyweight."))
