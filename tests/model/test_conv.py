"""Convolutions: every data type against plain weights, in int8 by the operator and without it."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import ConfigError
from pennyweight.model import conv
from pennyweight.model.conv import Conv, PackedConv
from pennyweight.model.spec import Layer

TYPES = ["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]
ERROR = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 4e-3, "int8": 0.02, "int4": 0.12, "int3": 0.2, "int2": 0.36}
"""Mean error as a share of the mean output, for normal weights and inputs."""
SHAPES = {
    "image": (Conv(16, 24, (3, 3), (1, 1), (1, 1), (1, 1)), (16, 9, 8)),
    "strided": (Conv(16, 24, (3, 5), (2, 1), (1, 2), (1, 1)), (16, 9, 11)),
    "grouped": (Conv(64, 32, (3, 3), (1, 1), (2, 2), (2, 2), groups=4), (64, 8, 8)),
    "words": (Conv(32, 40, (3,), (1,), (0,), (1,)), (32, 20)),
    "dilated": (Conv(32, 40, (3,), (2,), (2,), (2,)), (32, 31)),
    "small": (Conv(1, 3, (3, 3), (1, 1), (1, 1), (1, 1)), (1, 9, 8)),
}
"""All but the last are large enough for int8 at 64 rows."""
every = [pytest.param(t, s, id=f"{t}-{s}") for t, s in itertools.product(TYPES, SHAPES)]


def weights(layer: Conv) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(layer.taps)
    return torch.randn(layer.shape, generator=g) / layer.taps**0.5, torch.randn(layer.outputs, generator=g)


def made(data_type: str, shape: str, **fields: Any) -> tuple[Conv, nn.Module]:
    layer = Conv(**{**vars(SHAPES[shape][0]), "data_type": data_type, **fields})
    weight, bias = weights(layer)
    return layer, loaded(layer, layer.encode(weight, bias if layer.bias else None))


def loaded(layer: Conv, state: dict[str, Tensor]) -> nn.Module:
    module = layer.build()
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def rows(shape: str, n: int = 64) -> Tensor:
    return torch.randn(n, *SHAPES[shape][1], generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "WORK", 1)


@pytest.mark.parametrize(("data_type", "shape"), every)
def test_answers_like_the_convolution(data_type: str, shape: str) -> None:
    layer, module = made(data_type, shape)
    weight, bias = weights(layer)
    x = rows(shape)
    function = F.conv1d if layer.dims == 1 else F.conv2d
    want = function(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    with torch.inference_mode():
        got = module(x)
        assert module(x[:0]).shape == want[:0].shape
        torch.testing.assert_close(module(x[0]), got[0], atol=0.1, rtol=0.1)
    assert got.dtype == torch.float32 and got.shape == want.shape and got.is_contiguous()
    assert (got - want).abs().mean() <= ERROR[data_type] * want.abs().mean()
    assert (module.in_channels, module.out_channels) == (layer.inputs, layer.outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("data_type", "shape"), every)
def test_bytes_are_the_bytes_of_its_state(data_type: str, shape: str, bias: bool) -> None:
    layer, module = made(data_type, shape, bias=bias)
    assert layer.bytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert loads(Layer, dumps(layer)) == layer == Conv.of(module)
    assert layer.flops() == 2 * weights(layer)[0].numel() + bias * layer.outputs


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data_type", ["int8", "int4", "int3", "int2"])
def test_without_the_operator_the_numbers_are_the_same(
    data_type: str, shape: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "narrow", lambda: narrow)
    layer, module = made(data_type, shape)
    want = module(rows(shape))
    monkeypatch.setattr(conv, "operators", lambda: False)
    without = loaded(layer, module.state_dict())
    torch.testing.assert_close(without(rows(shape)), want, atol=1e-4, rtol=1e-4)


def test_large_calls_run_in_int8_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "WORK", 4_000_000)
    ran = []
    whole = PackedConv._whole
    monkeypatch.setattr(PackedConv, "_whole", lambda *args: ran.append(len(args[1])) or whole(*args))
    _, large = made("int8", "image")
    large(rows("image", 64)), large(rows("image", 1)), made("int8", "small")[1](rows("small"))
    if conv.operators():
        assert ran == [64]


@pytest.mark.parametrize(("data_type", "shape"), every)
def test_plain_and_small_are_the_same_layer(data_type: str, shape: str) -> None:
    layer, module = made(data_type, shape)
    if data_type == "fp32":
        return
    plain, small = module.plain(), module.small()
    assert type(plain) is (nn.Conv1d if layer.dims == 1 else nn.Conv2d) and not plain.weight.requires_grad
    x = rows(shape, 3)
    torch.testing.assert_close(small(x), plain(x))
    torch.testing.assert_close(plain(x), module(x), atol=0.1, rtol=0.1)
    held = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert held == layer.bytes()


@pytest.mark.parametrize("data_type", TYPES[1:])
def test_gradients_pass_through(data_type: str) -> None:
    layer, module = made(data_type, "image")
    x = rows("image", 2).requires_grad_()
    module(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    F.conv2d(y, module.weight, module.bias, layer.stride, layer.padding).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("assign", [False, True])
def test_new_weights_are_seen_at_once(assign: bool) -> None:
    layer, module = made("int8", "image")
    x = rows("image", 5)
    before, twin = module(x), copy.deepcopy(module)
    weight, bias = weights(layer)
    module.load_state_dict(layer.encode(-weight, -bias), assign=assign)
    torch.testing.assert_close(module(x), -before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twin(x), before, atol=0, rtol=0)


@pytest.mark.parametrize("shape", ["image", "words", "small"])
def test_channels_last_gives_the_same_numbers(shape: str) -> None:
    _, usual = made("int8", shape)
    _, last = made("int8", shape, memory="channels_last")
    got = last(rows(shape))
    torch.testing.assert_close(got, usual(rows(shape)), atol=1e-5, rtol=1e-5)
    if shape == "image" and conv.operators():
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", ["image", "words"])
def test_how_the_input_lies_in_memory_changes_nothing(shape: str) -> None:
    _, module = made("int8", shape)
    x = rows(shape)
    turned = x.transpose(1, -1).contiguous().transpose(1, -1)
    assert turned.stride() != x.stride() and conv.laid(turned).is_contiguous()
    assert torch.equal(module(turned), module(x))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    _, module = made("int8", "image")
    x = rows("image")
    x[3, 0, 4, 4] = wrong
    got = module(x)
    assert not torch.isfinite(got[3]).all() and torch.isfinite(got[4]).all()
    assert torch.isfinite(module(torch.zeros_like(x))).all()


@pytest.mark.parametrize(
    ("module", "padding"),
    [
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2)), (1, 4)),
        (nn.Conv1d(4, 6, 3, padding="valid"), (0,)),
        (nn.Conv1d(4, 6, 3, 2, 1), (1,)),
    ],
)
def test_padding_in_words_is_padding_in_numbers(module: nn.Module, padding: tuple[int, ...]) -> None:
    layer = Conv.of(module)
    assert layer is not None and layer.padding == padding
    x = torch.randn(2, 4, 12, 14) if layer.dims == 2 else torch.randn(2, 4, 12)
    torch.testing.assert_close(loaded(layer, module.state_dict())(x), module(x))


def test_what_is_no_plain_convolution_is_not_taken_for_one() -> None:
    class Own(nn.Conv2d):
        pass

    for module in (
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(2, 2, 4, padding="same"),
        nn.Conv2d(2, 2, 3, dtype=torch.float64),
        nn.Conv3d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        Own(2, 2, 3),
        nn.Linear(2, 2),
    ):
        assert Conv.of(module) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"stride": (1,)}, "one number a dimension"), ({"kernel": (3, 3, 3)}, "one number"), ({"groups": 3}, "3 groups do not")],
)
def test_layers_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Conv(**{**vars(SHAPES["image"][0]), **fields})
