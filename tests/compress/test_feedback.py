"""Rounding with feedback: never farther off than plain rounding, mostly much nearer, and from moments alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress import quantize
from pennyweight.compress.feedback import Moments, fed, missed
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.catalog import Catalog
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense
from pennyweight.model.packed import nearest, scaled
from pennyweight.model.spec import call
from pennyweight.model.transform import Env

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


def scores(bundle: Bundle, env: Env, rows: Dataset) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(rows.batches(4000)), bundle.model.spec.inputs)


def moved(a: Bundle, b: Bundle, env: Env, rows: Dataset) -> float:
    """Mean difference of the scores, as a share of their spread."""
    want = scores(a, env, rows)
    return float((scores(b, env, rows) - want).abs().mean() / want.std())


def problem(inputs: int = 24, outputs: int = 10, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs that vary together and not around zero, what came of them before they were rounded, weights and bias."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=g) @ torch.randn(6, inputs, generator=g) + 0.3 * torch.randn(500, inputs, generator=g) + 1
    weight, bias = torch.randn(outputs, inputs, generator=g), torch.randn(outputs, generator=g)
    return x + noise * torch.randn(x.shape, generator=g), nn.functional.linear(x, weight, bias), weight, bias


def seen(layer: nn.Module, *calls: tuple[Tensor, Tensor]) -> Moments:
    moments = Moments(layer)
    for x, y in calls:
        moments.add(x, y)
    return moments


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("data_type", BITS)
def test_no_output_ends_farther_off_than_plainly_rounded(data_type: str, biased: bool, noise: float) -> None:
    x, y, weight, bias = problem(noise=noise)
    y, shift = (y, bias) if biased else (y - bias, None)
    rows, moved_bias, scale = fed(weight, shift, seen(nn.Linear(24, 10), (x, y)), BITS[data_type])
    layer = Dense(24, 10, biased, data_type)

    def error(state: dict[str, Tensor]) -> Tensor:
        module = layer.build()
        module.load_state_dict(state, assign=True)
        return (nn.functional.linear(x, module.weight, module.bias) - y).square().mean(0)

    plain, found = error(layer.encode(weight, shift)), error(layer.encode(rows, moved_bias, scale))
    assert (found <= plain * (1 + 1e-4)).all()
    assert found.sum() < 0.5 * plain.sum() or data_type == "int8"


@pytest.mark.parametrize("data_type", BITS)
def test_what_is_stored_is_what_was_found(data_type: str) -> None:
    x, y, weight, bias = problem()
    rows, shift, scale = fed(weight, bias, seen(nn.Linear(24, 10), (x, y)), BITS[data_type])
    module = Dense(24, 10, True, data_type).build()
    module.load_state_dict(Dense(24, 10, True, data_type).encode(rows, shift, scale), assign=True)
    torch.testing.assert_close(module.weight, rows)


def test_rows_are_added_up_in_any_batches() -> None:
    x, y, _, _ = problem()
    layer = nn.Linear(24, 10)
    whole, parts = seen(layer, (x, y)), seen(layer, *zip(x.split(77), y.split(77), strict=True))
    for a, b in zip(whole.products(True), parts.products(True), strict=True):
        torch.testing.assert_close(a, b)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(whole.products(True)[0][0], centred.T @ centred / len(x))


def test_each_group_of_a_convolution_has_its_own_moments() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    conv, x = Conv.of(layer), torch.randn(20, 8, 5, 5) + 1
    assert conv is not None
    y = layer(x).detach()
    moments = seen(layer, (conv.patches(x), y.flatten(2).transpose(1, 2).flatten(0, 1)))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    products = moments.products(centred=True)
    assert products[0].shape == (4, 18, 18)
    exact = missed(weight.double().reshape(4, 3, 18), products)
    torch.testing.assert_close(exact, torch.zeros_like(exact), atol=1e-9, rtol=0)
    rows, shift, scale = fed(weight.flatten(1), bias, moments, 3)
    whole = dataclasses.replace(conv, data_type="int3")
    module, plain = whole.build(), whole.build()
    module.load_state_dict(whole.encode(rows.reshape(weight.shape), shift, scale), assign=True)
    plain.load_state_dict(whole.encode(weight, bias), assign=True)
    assert (module(x) - y).square().mean() < 0.8 * (plain(x) - y).square().mean()


def test_inputs_that_say_nothing() -> None:
    x, _, weight, bias = problem()
    x[:, 3], x[:, 5], x[:, 7] = 0, 4, x[:, 8]
    y = nn.functional.linear(x, weight, bias)
    rows, shift, _ = fed(weight, bias, seen(nn.Linear(24, 10), (x, y)), 4)
    assert torch.isfinite(rows).all() and shift is not None
    assert (nn.functional.linear(x, rows, shift) - y).square().mean() < 0.01 * y.var()
    still = torch.ones(9, 24)
    rows, shift, _ = fed(weight, bias, seen(nn.Linear(24, 10), (still, still @ weight.T)), 4)
    torch.testing.assert_close(nn.functional.linear(still, rows, shift), still @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.0131), (3, 0.0385), (2, 0.123)])
def test_the_grid_is_near_the_best_there_is(bits: int, most: float) -> None:
    """Squared error of normal weights; the best uniform quantizers leave .0115, .0374 and .1188 (Max 1960)."""
    weight = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    whole, scale = scaled(weight, bits, (1,))
    assert (whole * scale - weight).square().mean() < most
    assert torch.equal(nearest(whole.float(), bits), whole.float())


@pytest.mark.parametrize("data_type", ["int4", "int3", "int2"])
def test_a_model_moves_less_on_rows_it_was_not_fitted_to(data_type: str, given: Bundle, env: Env, tmp_path) -> None:
    plain, bundle = (QuantizeDense(data_type, feedback=f).apply(given, env) for f in (False, True))
    assert env.valid is not None
    assert moved(given, bundle, env, env.valid) < 0.75 * moved(given, plain, env, env.valid)
    assert bundle.bytes == plain.bytes == QuantizeDense(data_type, feedback=True).sketch().apply(given, env).bytes
    back = load(save(bundle, tmp_path / "b"))
    torch.testing.assert_close(scores(back, env, env.valid), scores(bundle, env, env.valid), atol=1e-5, rtol=1e-4)


def test_a_layer_too_wide_is_rounded_plainly(given: Bundle, env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "WIDE", 48)
    plain, bundle = (QuantizeDense("int4", feedback=f).apply(given, env).model.state for f in (False, True))
    same = {p for p in ("net.0", "net.4", "net.7", "out") if torch.equal(bundle[f"{p}.packed"], plain[f"{p}.packed"])}
    assert same == {"net.4", "net.7"}


def test_what_feedback_needs_is_said(given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match=r"QuantizeDense fits to rows and needs env\.calib"):
        QuantizeDense("int4", feedback=True).apply(given, Env(allow=env.allow))
    with pytest.raises(ConfigError, match="feedback is for whole numbers, and fp16 is none; ask for int8, int4"):
        QuantizeDense("fp16", feedback=True)


def test_rows_of_another_schema_are_refused(given: Bundle, env: Env) -> None:
    assert env.calib is not None
    columns = {c.name: env.calib.column(c.name) for c in env.calib.schema.columns}
    without = Dataset.from_arrays(
        {n: v for n, v in columns.items() if n != "tags"},
        dataclasses.replace(env.calib.schema, columns=tuple(c for c in env.calib.schema.columns if c.name != "tags")),
    )
    with pytest.raises(PlanError, match=r"cannot score the calibration rows \(KeyError: 'tags'\).*user, item, label"):
        QuantizeDense("int4", feedback=True).apply(given, dataclasses.replace(env, calib=without))
    wider = tuple(dataclasses.replace(c, size=5000) if c.name == "user" else c for c in env.calib.schema.columns)
    far = {**columns, "user": np.full(len(env.calib), 4000)}
    other = dataclasses.replace(env, calib=Dataset.from_arrays(far, dataclasses.replace(env.calib.schema, columns=wider)))
    with pytest.raises(PlanError, match=r"cannot score the calibration rows \(IndexError"):
        QuantizeDense("int4", feedback=True).apply(given, other)
    known = given.replace(catalog=Catalog(env.calib.schema, {}))
    with pytest.raises(PlanError, match=r"another schema than the model: it reads .*size=300.* they hold .*size=5000"):
        QuantizeDense("int4", feedback=True).apply(known, other)
