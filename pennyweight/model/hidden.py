"""Hidden layers trained as one step: linear, batch norm, ReLU and dropout of all of an MLP's widths in one autograd function.

What a training step on a CPU spends beside its matrix products is passes over activations. Layer by layer, PyTorch makes 31 of
them (of 4 bytes a number and hidden layer, both ways); here they are 24 in fp32, and half as large in bfloat16, where a value
stays as its product gave it until the next product takes it. What is left out: the bias before a norm, which the norm takes
away again (its running mean gets it); dropout's scale, which goes into the norm's weights; a pass back, since the gradients of
ReLU and of dropout are both zero exactly where the output is; masks kept for the way back; new memory for what can be written
in place. Statistics of a norm are taken in fp32 from what the product gave, as PyTorch's own mixed kernels do.

Tables that are trained whole come with it: PyTorch adds the gradients of looked-up rows one number at a time, here they are
added row by row, in a third of the time for tables of a thousand rows.

``torch.compile`` is the known way to fuse; it takes a minute to build, and does not see across the random numbers. The cost of
this one is that it knows four kinds of layers only: anything else in between, a hook, a layer that somebody patched or
subclassed ends a run, and the rest is computed as it was. Workers that train one model together compute norms over the rows of
all, between two exchanges: theirs stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.model import team
from pennyweight.model.layers import Dropout
from pennyweight.model.mixed import worth

HOT = 1 << 18
"""Numbers that are worked on at a time where one pass follows another: a core's cache holds as many."""
_backward = torch.ops.aten.threshold_backward
_forward = torch.ops.aten.native_batch_norm
_normed = torch.ops.aten.native_batch_norm_backward


@dataclass(frozen=True, eq=False)
class Block:
    """One hidden layer."""

    linear: nn.Linear
    norm: nn.BatchNorm1d | None
    dropout: Dropout | None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """What is trained: four tensors a block, as the function takes them."""
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return (self.linear.weight, self.linear.bias, *norm)


class Hidden(torch.autograd.Function):
    """The output [B, width] of blocks for an input [B, inputs] of the same type, multiplied in ``kind``."""

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[Block], kind: torch.dtype, x: Tensor, *weights: Tensor | None) -> Tensor:
        """Forward of all blocks; running figures of the norms move as in ``nn.BatchNorm1d``."""
        rows = first = x.to(kind)
        held: list[Any] = []
        figures: tuple[Tensor, ...]
        for k, block in enumerate(blocks):
            weight, bias, gamma, beta = weights[4 * k : 4 * k + 4]
            assert weight is not None
            narrow = weight.to(kind)
            z = torch.mm(rows, narrow.t())
            up = 1.0 if block.dropout is None else block.dropout.up
            if block.norm is None:
                rows = z if bias is None else z.add_(bias)
                figures = ()
            else:
                norm = block.norm
                assert gamma is not None and beta is not None
                gamma, beta = (gamma, beta) if up == 1 else (gamma * up, beta * up)
                rows, mean, scale = _forward(z, gamma, beta, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps)
                assert norm.num_batches_tracked is not None and norm.running_mean is not None
                norm.num_batches_tracked.add_(1)
                if bias is not None:
                    norm.running_mean.add_(bias, alpha=norm.momentum)
                figures = (z, gamma, mean, scale)
            rows.relu_()
            if block.dropout is not None:
                _drop(rows, block.dropout, 1.0 if block.norm is not None else up)
            held.append([narrow, up, figures, rows if k + 1 < len(blocks) else None])
        ctx.save_for_backward(first, rows)
        ctx.blocks, ctx.held, ctx.kind = blocks, held, x.dtype
        return rows.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of the input and of what is trained; None of a bias that a norm takes away."""
        (gradient,), (first, rows), found = gradients, ctx.saved_tensors, []
        # Held here and not by autograd, so that each is given back as soon as it was read: what is computed next lies in its
        # memory, which the cache still has.
        held, ctx.held = ctx.held, None
        if held is None:
            raise RuntimeError("the gradient of hidden layers computed as one can be asked for once; what it takes is gone")
        g, wanted = gradient.to(rows.dtype), ctx.needs_input_grad
        fresh = g is not gradient
        for k in reversed(range(len(ctx.blocks))):
            narrow, up, figures, _ = held.pop()
            needs = wanted[3 + 4 * k : 7 + 4 * k]
            g = _backward.grad_input(g, rows, 0, grad_input=g) if fresh else _backward(g, rows, 0)
            rows = held[-1][3] if k else first
            bias = gamma = beta = None
            if not figures:
                g = g.mul_(up) if up != 1 else g
                bias = g.sum(0, dtype=ctx.kind) if needs[1] else None
            else:
                norm = ctx.blocks[k].norm
                z, factor, *taken = figures
                asked = [True, needs[2], needs[3]]
                g, gamma, beta = _normed(g, z, factor, norm.running_mean, norm.running_var, *taken, True, norm.eps, asked)
                del z, figures
                if up != 1:
                    gamma, beta = (None if t is None else t.mul_(up) for t in (gamma, beta))
            weight = torch.mm(g.t(), rows).to(ctx.kind) if needs[0] else None
            found += [beta, gamma, bias, weight]
            fresh = True
            if k or wanted[2]:
                g = torch.mm(g, narrow)
        return (None, None, g.to(ctx.kind) if wanted[2] else None, *reversed(found))


def _drop(rows: Tensor, dropout: Dropout, up: float) -> None:
    """Dropout in place, some rows at a time: their masks stay in the cache, where those of a batch would go through memory."""
    drawn = dropout.drawn(rows)
    few = max(1, HOT // rows.shape[1])
    for part, bytes_ in zip(torch.split(rows, few), torch.split(drawn, few), strict=True):
        kept = dropout.kept(bytes_, rows.dtype)
        part.mul_(kept if up == 1 else kept.mul_(up))


class Rows(torch.autograd.Function):
    """Rows [..., D] of a table [N, D] by ids [...]; the row ``pad`` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, pad: int | None) -> Tensor:
        """As ``nn.Embedding``."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.pad = weight.shape, pad
        return weight.index_select(0, ids.reshape(-1)).view(*ids.shape, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the table."""
        (gradient,), (ids,) = gradients, ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        whole.index_add_(0, ids.reshape(-1), gradient.reshape(-1, ctx.shape[1]))
        if ctx.pad is not None:
            whole[ctx.pad] = 0
        return whole, None, None


class Joined:
    """A module whose runs of hidden layers train as one step, their products in ``kind``, until ``release()``."""

    def __init__(self, module: nn.Module, kind: torch.dtype | None = None) -> None:
        self.lent: list[nn.Module] = []
        for child in module.modules():
            if isinstance(child, nn.Embedding) and _plain(child, nn.Embedding.forward):
                usual = child.max_norm is None and not child.sparse and not child.scale_grad_by_freq
                if usual and type(child.weight) is nn.Parameter and child.weight.requires_grad:
                    child.__dict__["forward"] = functools.partial(_rows, child)
                    self.lent.append(child)
            if isinstance(child, nn.Sequential) and _plain(child, nn.Sequential.forward):
                parts = _parts(list(child))
                if any(isinstance(part, tuple) for part in parts):
                    child.__dict__["forward"] = functools.partial(_run, parts, kind)
                    self.lent.append(child)

    def release(self) -> None:
        """Leave the module as it was found."""
        for child in self.lent:
            child.__dict__.pop("forward", None)


def _rows(table: nn.Embedding, input: Tensor) -> Tensor:
    if not table.training:
        return nn.Embedding.forward(table, input)
    rows: Tensor = Rows.apply(table.weight, input, table.padding_idx)  # type: ignore[no-untyped-call]
    return rows


def _run(parts: Sequence[tuple[Block, ...] | nn.Module], kind: torch.dtype | None, input: Tensor) -> Tensor:
    x = input
    for part in parts:
        x = _joined(part, kind, x) if isinstance(part, tuple) else part(x)
    return x


def _joined(blocks: tuple[Block, ...], kind: torch.dtype | None, x: Tensor) -> Tensor:
    """What the blocks answer: at once in training on a batch of rows, else one after another."""
    layers = [layer for b in blocks for layer in (b.linear, b.norm, b.dropout) if layer is not None]
    whole = x.dim() == 2 and len(x) > 1 and all(layer.training for layer in layers) and team.part() is None
    if whole and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        weights = [w for b in blocks for w in b.weights]
        narrow = kind is not None and x.dtype == torch.float32 and worth(blocks[0].linear.weight)
        y: Tensor = Hidden.apply(blocks, kind if narrow else x.dtype, x, *weights)  # type: ignore[no-untyped-call]
        return y
    for b in blocks:
        x = b.linear(x)
        x = x if b.norm is None else b.norm(x)
        x = x.relu()
        x = x if b.dropout is None else b.dropout(x)
    return x


def _parts(layers: Sequence[nn.Module]) -> list[tuple[Block, ...] | nn.Module]:
    """A sequence of layers with the runs of hidden layers in it taken together."""
    parts: list[tuple[Block, ...] | nn.Module] = []
    at = 0
    while at < len(layers):
        found = _block(layers[at : at + 4])
        if found is None:
            parts.append(layers[at])
            at += 1
            continue
        block, used = found
        at += used
        before = parts[-1] if parts else None
        if isinstance(before, tuple) and worth(before[0].linear.weight) == worth(block.linear.weight):
            parts[-1] = (*before, block)
        else:
            parts.append((block,))
    return parts


def _block(layers: Sequence[nn.Module]) -> tuple[Block, int] | None:
    """The hidden layer that layers begin with, and of how many it is made."""
    if not layers or type(layers[0]) is not nn.Linear or not _plain(layers[0], nn.Linear.forward):
        return None
    linear, norm, used = layers[0], None, 1
    if len(layers) > 1 and type(layers[1]) is nn.BatchNorm1d:
        norm, used = layers[1], 2
        whole = norm.affine and norm.track_running_stats and norm.momentum is not None
        if not whole or not _plain(norm, nn.BatchNorm1d.forward):
            return None
    if len(layers) <= used or type(layers[used]) is not nn.ReLU or not _plain(layers[used], nn.ReLU.forward):
        return None
    dropout = layers[used + 1] if len(layers) > used + 1 else None
    if type(dropout) is Dropout and _plain(dropout, Dropout.forward):
        return Block(linear, norm, dropout if dropout.cut else None), used + 2
    return Block(linear, norm, None), used + 1


def _plain(module: nn.Module, forward: Any) -> bool:
    """Whether calling a module is calling its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module).forward is forward and "forward" not in module.__dict__ and not any(hooks)
