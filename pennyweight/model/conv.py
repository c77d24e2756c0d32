"""What a convolution has become.

int8 weights are symmetric with one fp32 scale an output channel; activations are quantized as they come, over the range of
the batch, and oneDNN multiplies in int8 through the operator PyTorch carries for compiled graphs (``qconv_pointwise``), called
here from Python. On one core, for 100 and 500 rows at a time, it ran at 2.5 and 3.9 times the speed of fp32 for a small image
net's second layer (3 x 3, 32 to 64 channels, 14 x 14), at 1.7 and 2.1 times for half its channels, and at 3.7 and 3.1 times
over words (width 3, 100 to 100 channels, 50 words). The alternatives: PyTorch's ``conv2d_dynamic`` is as fast and wrong (it
gives the output the input's range, so all that is negative behind a ReLU is lost); unfolding into a matrix for the dense
layers' operator ran at 0.2 to 1.7 times. The price is the dense layers': a row's score moves with the rows beside it.

What int8 saves grows with the work of a call: below 2,048 weights, or 4 million multiply-adds a call, layers run in fp32,
for which dequantized weights are kept as well. int4, int3 and int2 take fewer bytes and run as int8; fp16 and bf16 run in fp32.

The operator writes channels last, in which the pooling that follows is three times faster than in PyTorch's usual order. It is
the same tensor but for ``view``, which refuses it; so that order is kept only where ``memory`` says that nothing minds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model import compact
from pennyweight.model.dense import narrow
from pennyweight.model.packed import PackedRows, blank, encoded, row_bytes
from pennyweight.model.spec import Layer

WEIGHTS, WORK = 2_048, 4_000_000
"""Weights of a layer, and multiply-adds of a call, from which int8 is faster than fp32."""
_KINDS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


@named("conv")
@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """A convolution over one or two dimensions, drop-in for ``nn.Conv1d`` and ``nn.Conv2d`` with zeros as padding."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    """Its width, or height and width; the next three are as long."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros put at both ends."""
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    data_type: Literal["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"] = "fp32"
    memory: Literal["contiguous", "channels_last"] = "contiguous"
    """How the output of a packed layer may lie in memory; ``channels_last`` is faster, and ``view`` may refuse it."""

    def __post_init__(self) -> None:
        if len(self.kernel) not in _KINDS or {len(self.stride), len(self.padding), len(self.dilation)} != {len(self.kernel)}:
            raise ConfigError(f"{self}: kernel, stride, padding and dilation need one number a dimension, and 1 or 2 of them")
        if self.groups < 1 or self.inputs % self.groups or self.outputs % self.groups:
            raise ConfigError(f"{self}: {self.groups} groups do not divide both {self.inputs} and {self.outputs} channels")

    @property
    def dims(self) -> int:
        """1 or 2."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """Weights of one output channel."""
        return self.inputs // self.groups * math.prod(self.kernel)

    @property
    def sizes(self) -> compact.Sizes:
        """Stride, padding, dilation and groups, as PyTorch's functions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its weights."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    def build(self) -> nn.Module:
        """``nn.Conv1d`` or ``nn.Conv2d`` for fp32, else a ``PackedConv``."""
        return self._plain() if self.data_type == "fp32" else PackedConv(self)

    def bytes(self) -> int:
        """Bytes of weights, scales and bias (always fp32)."""
        return self.outputs * (row_bytes(self.taps, self.data_type) + 4 * self.bias)

    def flops(self) -> int:
        """Multiplies and adds for one output position; how many of those a row has depends on its size."""
        return self.outputs * (2 * self.taps + self.bias)

    def encode(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The layer's state from weights [outputs, inputs / groups, *kernel] and bias; whole numbers at a ``scale``."""
        if self.data_type == "fp32":
            rest = {} if bias is None else {"bias": bias.clone()}
            return {"weight": weight.clone(memory_format=torch.contiguous_format), **rest}
        return encoded(weight.flatten(1), bias, self.data_type, scale)

    def patches(self, x: Tensor) -> Tensor:
        """What each output position reads, [B * positions, inputs * kernel], from images or sequences [B, inputs, ...]."""
        one = self.dims == 1
        sizes = [
            (*(fill,) * one, *size)
            for fill, size in ((1, self.kernel), (1, self.dilation), (0, self.padding), (1, self.stride))
        ]
        return F.unfold(x.unsqueeze(2) if one else x, *sizes).transpose(1, 2).flatten(0, 1)

    @classmethod
    def of(cls, module: nn.Module) -> Conv | None:
        """What convolution a module is; None for anything else, and for what is neither fp32 nor padded evenly with zeros."""
        if isinstance(module, PackedConv):
            return module.layer
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or type(module) not in _KINDS.values():
            return None
        padding = _padding(module)
        if padding is None or module.weight.dtype != torch.float32 or module.padding_mode != "zeros":
            return None
        kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
        channels = (module.in_channels, module.out_channels)
        return cls(*channels, kernel, stride, padding, dilation, module.groups, module.bias is not None)

    def _plain(self) -> nn.Module:
        return blank(_KINDS[self.dims], self.inputs, self.outputs, self.kernel, *self.sizes, self.bias)


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros at both ends; None where one end gets more ("same" with a kernel of even width)."""
    if isinstance(module.padding, tuple):
        return module.padding
    both = [d * (k - 1) * (module.padding == "same") for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(b % 2 for b in both) else tuple(b // 2 for b in both)


class PackedConv(PackedRows):
    """A convolution whose weights are stored in 16 bits or fewer; inference only, gradients pass through it."""

    def __init__(self, layer: Conv) -> None:
        super().__init__(layer.outputs, layer.taps, layer.data_type, layer.bias)
        self.layer = layer
        self.in_channels, self.out_channels = layer.inputs, layer.outputs

    def levels(self) -> Tensor:
        """The whole numbers the weights are stored as, int8 of the weights' shape."""
        return super().levels().reshape(self.layer.shape)

    @property
    def weight(self) -> Tensor:
        """Dequantized fp32 weights [outputs, inputs / groups, *kernel], made at each call."""
        if not self.whole:
            return self.packed.float().reshape(self.layer.shape)
        return self.levels() * self.scale.reshape(-1, *[1] * (1 + self.layer.dims))

    def prepare(self) -> tuple[Tensor, Any]:
        """Dequantized fp32 weights, and oneDNN's packed ones where calls may be large enough for them."""
        weight = self.weight
        if self.layer.memory == "channels_last" and self.layer.dims == 2:
            weight = weight.contiguous(memory_format=torch.channels_last)
        large = self.whole and weight.numel() >= WEIGHTS and self.packed.device.type == "cpu" and operators()
        if not large:
            return weight, None
        return weight, torch.ops.onednn.qconv_prepack(self.levels(), self.scale, 1.0, 0, *self.layer.sizes)

    def forward(self, input: Tensor) -> Tensor:
        """[B, outputs, ...] fp32 from [B, inputs, ...] (or both without the batch)."""
        if input.requires_grad and torch.is_grad_enabled():
            return self._floats(input, self.weight)
        (weight, packed), x = self.ready(), input.float()
        if not self._worth(x):
            return self._floats(x, weight)
        low, high = (float(v) for v in torch.aminmax(laid(x)))
        if not math.isfinite(high - low):
            return self._floats(x, weight)
        levels, scale, zero = rounded(x, low, high)
        if packed is None:
            return self._floats(levels.sub_(zero).mul_(scale), weight)
        output = self._whole(levels, scale, zero, packed)
        return output if self.layer.memory == "channels_last" else output.contiguous()

    def _worth(self, x: Tensor) -> bool:
        """Whether a call is large enough for int8; positions of the output are about the input's over the stride's."""
        if not self.whole or x.dim() != self.layer.dims + 2:
            return False
        weights = math.prod(self.layer.shape)
        positions = len(x) * math.prod(x.shape[2:]) // math.prod(self.layer.stride)
        return weights >= WEIGHTS and weights * positions >= WORK

    def _whole(self, levels: Tensor, scale: float, zero: int, packed: Any) -> Tensor:
        zeros = torch.zeros(self.layer.outputs, dtype=torch.int32)
        given = (levels.to(torch.uint8), scale, zero, packed, self.scale, zeros, self.bias)
        output: Tensor = torch.ops.onednn.qconv_pointwise(*given, *self.layer.sizes, 1.0, 0, torch.float32, "none", [], "")
        return output

    def _floats(self, x: Tensor, weight: Tensor) -> Tensor:
        return compact.convolve(x, weight, self.bias, self.layer.sizes)

    def plain(self) -> nn.Module:
        """The same layer as ``nn.Conv1d`` or ``nn.Conv2d`` with dequantized weights (activations are not rounded there)."""
        module = dataclasses.replace(self.layer, data_type="fp32").build()
        rest = {} if self.bias is None else {"bias": self.bias}
        module.load_state_dict({"weight": self.weight, **rest}, assign=True)
        return module.requires_grad_(False).eval()

    def small(self) -> nn.Module:
        """The same layer with its packed weights, dequantized at each call (activations are not rounded there)."""
        return compact.Conv(self.stored(), self.bias, self.layer.shape, self.layer.sizes).eval()

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)


def operators() -> bool:
    """Whether this PyTorch convolves in int8 on this CPU."""
    there = all(hasattr(torch.ops.onednn, name) for name in ("qconv_prepack", "qconv_pointwise"))
    return there and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def laid(x: Tensor) -> Tensor:
    """The same numbers in the order they lie in memory; of words turned to channels the range takes a third of the time."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def rounded(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    """Numbers at 256 levels (128 where products would overflow): fp32 levels, their scale, and the level that is zero."""
    low, high, top = min(low, 0.0), max(high, 0.0), 127 if narrow() else 255
    scale = max((high - low) / top, torch.finfo(torch.float32).tiny)
    zero = round(-low / scale)
    return (x / scale).round_().add_(zero).clamp_(0, top), scale, zero
