"""What a dense layer or a norm has become.

int8 weights are symmetric, one fp32 scale an output; activations are quantized as they come, over the range of the batch,
and FBGEMM or oneDNN multiply in int8 through the operator PyTorch carries. On one core and a 400 x 400 layer it ran at 1.0,
3.4 and 3.6 times the speed of fp32 for batches of 1, 500 and 4096. The alternatives were slower: ``qlinear_pointwise`` with
the range taken in Python 0.2, 1.9 and 1.9 times, a range for each row with ``_int_mm`` 2.0 and 1.3 times in the larger two,
and torchao's eager int8 0.1 times at batch 1 (on another net). The price is that a row's score moves, in its third decimal,
with the rows it is batched with.

A layer of fewer than 16,384 weights is stored small but multiplied in fp32: there the operator's own cost (about 11
microseconds a call) is more than it saves. int4, int3 and int2 take fewer bytes and run as int8; fp16 and bf16 are
stored so and run in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.model.compact import Linear
from pennyweight.model.packed import PackedRows, blank, encoded, row_bytes
from pennyweight.model.spec import Layer

WORTH = 16_384
"""Weights from which multiplying in int8 is faster than in fp32."""
_BATCH: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


@named("dense")
@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """A dense layer, drop-in for ``nn.Linear``."""

    inputs: int
    outputs: int
    bias: bool = True
    data_type: Literal["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"] = "fp32"

    def build(self) -> nn.Module:
        """``nn.Linear`` for fp32, else a ``PackedLinear``."""
        return blank(nn.Linear, self.inputs, self.outputs, self.bias) if self.data_type == "fp32" else PackedLinear(self)

    def bytes(self) -> int:
        """Bytes of weights, scales and bias (always fp32)."""
        return self.outputs * (row_bytes(self.inputs, self.data_type) + 4 * self.bias)

    def flops(self) -> int:
        """Multiplies and adds for one row."""
        return self.outputs * (2 * self.inputs + self.bias)

    def encode(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The layer's state from fp32 weights [outputs, inputs] and bias [outputs]; whole numbers at a ``scale`` [outputs]."""
        weight = weight.contiguous()
        if self.data_type == "fp32":
            return {"weight": weight.clone(), **({} if bias is None else {"bias": bias.clone()})}
        return encoded(weight, bias, self.data_type, scale)

    @classmethod
    def of(cls, module: nn.Module) -> Dense | None:
        """What dense layer a module is; None for anything else, and for layers trained in another precision than fp32."""
        if isinstance(module, PackedLinear):
            return module.layer
        # Not a subclass: attention keeps one whose weight it multiplies itself.
        if isinstance(module, nn.Linear) and type(module) is nn.Linear and module.weight.dtype == torch.float32:
            return cls(module.in_features, module.out_features, module.bias is not None)
        return None


@named("low-rank")
@dataclasses.dataclass(frozen=True)
class LowRank(Layer):
    """A dense layer as two, ``rank`` numbers wide between them: dense layers of their own at ``0`` and ``1`` under its path."""

    inputs: int
    rank: int
    outputs: int

    def parts(self) -> tuple[Dense, Dense]:
        """The two layers."""
        return Dense(self.inputs, self.rank, bias=False), Dense(self.rank, self.outputs)

    def build(self) -> nn.Module:
        """Two ``nn.Linear`` in a row."""
        return nn.Sequential(*(part.build() for part in self.parts()))

    def bytes(self) -> int:
        """Bytes of both as fp32."""
        return sum(part.bytes() for part in self.parts())

    def flops(self) -> int:
        """Multiplies and adds for one row."""
        return sum(part.flops() for part in self.parts())


class PackedLinear(PackedRows):
    """A dense layer whose weights are stored in 16 bits or fewer; inference only, gradients pass through it."""

    def __init__(self, layer: Dense) -> None:
        super().__init__(layer.outputs, layer.inputs, layer.data_type, layer.bias)
        self.layer = layer
        self.in_features, self.out_features = layer.inputs, layer.outputs

    @property
    def weight(self) -> Tensor:
        """Dequantized fp32 weights [outputs, inputs], made at each call."""
        return self.levels() * self.scale.unsqueeze(1) if self.whole else self.packed.float()

    def prepare(self) -> Any:
        """FBGEMM's packed weights, or dequantized fp32 weights where those are faster or all there is."""
        large = self.layer.inputs * self.layer.outputs >= WORTH
        if self.whole and large and self.packed.device.type == "cpu" and operators():
            return _prepack(self.levels(), self.scale, self.bias)
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """[..., outputs] fp32 from [..., inputs]."""
        if input.requires_grad and torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)  # the operator would cut the gradient off without a word
        ready, x = self.ready(), input.float()
        if not isinstance(ready, Tensor):
            output: Tensor = torch.ops.quantized.linear_dynamic(x, ready, narrow())
            return output
        if self.whole and self.layer.inputs * self.layer.outputs >= WORTH:
            x = _rounded(x)
        return F.linear(x, ready, self.bias)

    def plain(self) -> nn.Module:
        """The same layer as ``nn.Linear`` with dequantized weights (activations are not rounded there)."""
        module = blank(nn.Linear, self.layer.inputs, self.layer.outputs, self.layer.bias)
        rest = {} if self.bias is None else {"bias": self.bias}
        module.load_state_dict({"weight": self.weight, **rest}, assign=True)
        return module.requires_grad_(False).eval()

    def small(self) -> nn.Module:
        """The same layer with its packed weights, dequantized at each call (activations are not rounded there)."""
        return Linear(self.stored(), self.bias).eval()

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)


@named("norm")
@dataclasses.dataclass(frozen=True)
class Norm(Layer):
    """A batch or layer norm over ``features`` numbers."""

    features: int
    kind: Literal["batch", "layer"] = "batch"
    eps: float = 1e-5
    momentum: float | None = 0.1
    """Batch norm only: how fast its statistics move in training."""
    affine: bool = True
    dims: Literal[1, 2] = 1
    """Batch norm only: 2 for images [B, features, height, width]."""

    def build(self) -> nn.Module:
        """``nn.BatchNorm1d``, ``nn.BatchNorm2d`` or ``nn.LayerNorm``."""
        if self.kind == "layer":
            return nn.LayerNorm(self.features, self.eps, self.affine)
        return _BATCH[self.dims](self.features, self.eps, self.momentum, self.affine)

    def bytes(self) -> int:
        """Bytes of gain, shift and, for a batch norm, the statistics and their counter."""
        return 8 * self.features * self.affine + (8 * self.features + 8) * (self.kind == "batch")

    def flops(self) -> int:
        """Operations for one row or position: a multiply and an add a number, and for a layer norm its statistics."""
        return self.features * (2 if self.kind == "batch" else 6)

    @classmethod
    def of(cls, module: nn.Module) -> Norm | None:
        """What norm a module is; None for anything else."""
        if (
            isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
            and type(module) in _BATCH.values()
            and module.track_running_stats
        ):
            dims: Literal[1, 2] = 2 if isinstance(module, nn.BatchNorm2d) else 1
            return cls(module.num_features, "batch", module.eps, module.momentum, module.affine, dims)
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            whole = (module.weight is None) == (module.bias is None)
            return cls(module.normalized_shape[0], "layer", module.eps, None, module.elementwise_affine) if whole else None
        return None


@named("identity")
@dataclasses.dataclass(frozen=True)
class Identity(Layer):
    """A layer that is gone, such as a norm folded into its neighbour."""

    def build(self) -> nn.Module:
        """``nn.Identity``."""
        return nn.Identity()

    def bytes(self) -> int:
        """None."""
        return 0

    def flops(self) -> int:
        """None."""
        return 0


def operators() -> bool:
    """Whether this PyTorch multiplies in int8 on this CPU."""
    engine = torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")
    return engine and hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_dynamic")


@functools.cache
def narrow() -> bool:
    """Whether activations must keep to 7 bits: without VNNI two products of 8 bits overflow the 16 they are added in."""
    return not torch.cpu._is_vnni_supported()


def _prepack(levels: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    with warnings.catch_warnings():
        # The qint8 tensor type is deprecated (pytorch/pytorch#184982) and still the only thing the packing takes.
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(levels, scale.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, bias)


def _rounded(x: Tensor) -> Tensor:
    """Activations at the 256 levels the operator would give them: its range is the whole batch's and holds zero."""
    if x.numel() == 0:
        return x
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 127 if narrow() else 255
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, top).sub(zero) * scale
