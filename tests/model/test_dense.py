"""Dense layers and norms: every data type against plain weights, with the int8 operator and without."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import dumps, loads
from pennyweight.model import dense
from pennyweight.model.dense import Dense, Identity, Norm
from pennyweight.model.spec import Layer

TYPES = ["fp32", "fp16", "bf16", "int8", "int4", "int3", "int2"]
ERROR = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 4e-3, "int8": 0.015, "int4": 0.12, "int3": 0.2, "int2": 0.36}
"""Mean error as a share of the mean output, for normal weights and inputs."""
SHAPES = [(200, 96), (201, 100), (7, 3)]
"""Two that are multiplied in int8, one of an odd width; and one too small for it."""


def weights(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(inputs)
    return torch.randn(outputs, inputs, generator=g) / inputs**0.5, torch.randn(outputs, generator=g)


def layer(data_type: str, inputs: int, outputs: int, bias: bool = True) -> tuple[Dense, nn.Module]:
    made = Dense(inputs, outputs, bias, data_type)
    weight, shift = weights(inputs, outputs)
    return made, loaded(made, made.encode(weight, shift if bias else None))


def loaded(made: Dense, state: dict[str, Tensor]) -> nn.Module:
    module = made.build()
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


every = [pytest.param(t, *s, id=f"{t}-{s[0]}x{s[1]}") for t, s in itertools.product(TYPES, SHAPES)]


@pytest.mark.parametrize(("data_type", "inputs", "outputs"), every)
def test_answers_like_the_linear_layer(data_type: str, inputs: int, outputs: int) -> None:
    _, module = layer(data_type, inputs, outputs)
    weight, bias = weights(inputs, outputs)
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))
    want = F.linear(x, weight, bias)
    with torch.inference_mode():
        got = module(x)
        assert module(x.reshape(4, 16, inputs)).shape == (4, 16, outputs)
        assert module(x[:0]).shape == (0, outputs)
        torch.testing.assert_close(module(x.half() if data_type != "fp32" else x), got, atol=0.02, rtol=0.02)
    assert got.dtype == torch.float32 and (got - want).abs().mean() <= ERROR[data_type] * want.abs().mean()
    assert (module.in_features, module.out_features) == (inputs, outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("data_type", "inputs", "outputs"), every)
def test_bytes_are_the_bytes_of_its_state(data_type: str, inputs: int, outputs: int, bias: bool) -> None:
    made, module = layer(data_type, inputs, outputs, bias)
    assert made.bytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert loads(Layer, dumps(made)) == made == Dense.of(module)
    assert made.flops() == 2 * inputs * outputs + bias * outputs


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("data_type", "inputs", "outputs"), [p for p in every if "int" in p.id])
def test_without_the_operator_the_numbers_are_the_same(
    data_type: str, inputs: int, outputs: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "narrow", lambda: narrow)
    made, module = layer(data_type, inputs, outputs)
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))
    want = module(x)
    monkeypatch.setattr(dense, "operators", lambda: False)
    without = loaded(made, module.state_dict())
    # One activation in thousands lies on the edge between two levels and is rounded to the other.
    torch.testing.assert_close(without(x), want, atol=0.02, rtol=0)
    assert (without(x) - want).abs().mean() < 1e-3
    assert without(x[:0]).shape == (0, outputs)


def test_large_layers_do_run_in_int8() -> None:
    _, large = layer("int8", 200, 96)
    _, small = layer("int8", 7, 3)
    if dense.operators():
        assert not isinstance(large.ready(), Tensor)
    assert isinstance(small.ready(), Tensor)


@pytest.mark.parametrize(("data_type", "inputs", "outputs"), every)
def test_plain_is_the_same_layer(data_type: str, inputs: int, outputs: int) -> None:
    _, module = layer(data_type, inputs, outputs)
    plain = module.plain() if hasattr(module, "plain") else module
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    assert type(plain) is nn.Linear and plain.weight.dtype == torch.float32
    torch.testing.assert_close(plain(x), F.linear(x, module.weight, module.bias))
    torch.testing.assert_close(plain(x), module(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("data_type", "inputs", "outputs"), every)
def test_new_weights_are_seen_at_once(data_type: str, inputs: int, outputs: int, assign: bool) -> None:
    made, module = layer(data_type, inputs, outputs)
    x = torch.randn(5, inputs)
    before = module(x)
    weight, bias = weights(inputs, outputs)
    twin = copy.deepcopy(module)
    module.load_state_dict(made.encode(-weight, -bias), assign=assign)
    torch.testing.assert_close(module(x), -before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twin(x), before, atol=0, rtol=0)


@pytest.mark.parametrize("data_type", TYPES[1:])
def test_gradients_pass_through(data_type: str) -> None:
    _, module = layer(data_type, 200, 96)
    x = torch.randn(5, 200, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(5, -1))
    assert not list(module.parameters())


def test_a_row_of_zeros_and_an_outlier() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = torch.tensor([8.0, *[0.5] * 7])
    for data_type in ("int8", "int4"):
        made = Dense(8, 3, False, data_type)
        got = loaded(made, made.encode(weight, None)).weight
        assert not got[0].any()
        torch.testing.assert_close(got, weight, atol=0.6 if data_type == "int4" else 0.04, rtol=0)


def test_int4_clips_what_is_worth_clipping() -> None:
    weight, _ = weights(400, 64)
    whole = weight.abs().amax(1, keepdim=True) / 7
    naive = (weight / whole).round() * whole
    made = Dense(400, 64, False, "int4")
    got = loaded(made, made.encode(weight, None)).weight
    assert (got - weight).norm() < 0.85 * (naive - weight).norm()


@pytest.mark.parametrize(
    "norm",
    [
        Norm(6),
        Norm(6, affine=False),
        Norm(6, "layer"),
        Norm(6, "layer", affine=False),
        Norm(6, eps=1e-3, momentum=None),
        Norm(6, dims=2),
    ],
)
def test_norms(norm: Norm) -> None:
    module = norm.build()
    assert norm.bytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert loads(Layer, dumps(norm)) == norm
    if norm.kind == "batch":
        assert Norm.of(module) == norm
    shape = (4, 6, 5, 5) if norm.dims == 2 else (4, 6)
    assert module(torch.randn(shape)).shape == shape


def test_what_is_no_plain_layer_is_not_taken_for_one() -> None:
    attention = nn.MultiheadAttention(4, 2)
    for module in (attention.out_proj, nn.Linear(3, 2, dtype=torch.float64), nn.Embedding(3, 2), nn.Bilinear(2, 2, 2)):
        assert Dense.of(module) is None
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    for module in (nn.LayerNorm((2, 3)), nn.LayerNorm(3, bias=False), untracked, nn.BatchNorm3d(3)):
        assert Norm.of(module) is None


def test_identity() -> None:
    assert type(Identity().build()) is nn.Identity
    assert (Identity().bytes(), Identity().flops()) == (0, 0)
