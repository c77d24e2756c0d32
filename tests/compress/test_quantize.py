"""Quantizing: what it stores, how far the outputs move, and what it refuses."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pennyweight.compress.distill import Distill
from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.rewrite import Untouched, untouched
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import PlanError
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.dense import Dense
from pennyweight.model.spec import Model, call
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, plan


def scores(bundle: Bundle, env: Env) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(env.calib.batches(1000)), bundle.model.spec.inputs)


def moved(a: Bundle, b: Bundle, env: Env) -> float:
    """Mean difference of the scores, as a share of their spread."""
    want = scores(a, env)
    return float((scores(b, env) - want).abs().mean() / want.std())


def kinds(bundle: Bundle) -> dict[str, str]:
    return {path: layer.data_type for path, layer in bundle.model.spec.layers.items()}


@pytest.mark.parametrize(("data_type", "most"), [("fp16", 1e-3), ("int8", 0.01), ("int4", 0.12), ("int2", 0.6)])
def test_tables_move_the_scores_as_little_as_their_bits_allow(data_type: str, most: float, given: Bundle, env: Env) -> None:
    bundle = QuantizeTables(data_type).apply(given, env)
    assert 0 < moved(given, bundle, env) < most
    # One number a row cannot carry a scale of its own, nor can 8 at int8: as fp16 they weigh the same.
    assert kinds(bundle) == {
        "user": data_type,
        "item": data_type,
        "tags": "fp16" if data_type == "int8" else data_type,
        "bias": "fp16",
    }
    spec, state = bundle.model.spec, bundle.model.state
    for path, layer in spec.layers.items():
        assert layer.bytes() == sum(t.numel() * t.element_size() for n, t in state.items() if n.startswith(f"{path}."))
    assert not rows_of(bundle.model.build(env.allow).item)[0].any()


@pytest.mark.parametrize(
    ("data_type", "most"), [("fp16", 1e-3), ("bf16", 0.01), ("int8", 0.03), ("int4", 0.25), ("int3", 0.5), ("int2", 1.0)]
)
def test_dense_layers_too(data_type: str, most: float, given: Bundle, env: Env) -> None:
    bundle = QuantizeDense(data_type).apply(given, env)
    assert 0 < moved(given, bundle, env) < most
    assert kinds(bundle) == dict.fromkeys(("net.0", "net.4", "net.7", "out"), data_type)


def test_both_are_saved_loaded_and_rebuilt_without_a_transform(given: Bundle, env: Env, tmp_path) -> None:
    bundle = QuantizeDense("int4").apply(QuantizeTables("int4").apply(given, env), env)
    back = load(save(bundle, tmp_path / "b"))
    assert back.model.spec == bundle.model.spec and back.model.bytes == bundle.model.bytes < given.model.bytes / 4
    torch.testing.assert_close(scores(back, env), scores(bundle, env), atol=1e-5, rtol=1e-5)


def test_the_same_again_and_wider_are_refused(given: Bundle, env: Env) -> None:
    tables, dense = QuantizeTables("int4").apply(given, env), QuantizeDense("int4").apply(given, env)
    for again in (QuantizeTables("int4"), QuantizeTables("int8"), QuantizeTables("fp16")):
        with pytest.raises(PlanError, match="no table would get smaller"):
            again.apply(tables, env)
    for again in (QuantizeDense("int4"), QuantizeDense("int8")):
        with pytest.raises(PlanError, match=r"no dense layer would get smaller.*net\.0 \(int4, 48 x 96\)"):
            again.apply(dense, env)


def test_narrower_again_is_allowed(given: Bundle, env: Env) -> None:
    twice = QuantizeTables("int4").apply(QuantizeTables("int8").apply(given, env), env)
    assert kinds(twice)["item"] == "int4"
    assert kinds(QuantizeDense("int4").apply(QuantizeDense("int8").apply(given, env), env))["out"] == "int4"


@pytest.mark.parametrize(("data_type", "kind"), [("fp16", "fp16"), ("int8", "int8"), ("int4", "int4"), ("int2", "int4")])
def test_a_shared_table_has_its_codebooks_quantized(data_type: str, kind: str, given: Bundle, env: Env) -> None:
    shared = ShareRows(parts=4, codes=64, only=("item",)).apply(given, env)
    bundle = QuantizeTables(data_type, only=("item",)).apply(shared, env)
    layer = bundle.model.spec.layers["item"]
    assert (layer.layout, layer.data_type, layer.parts) == ("codebook", kind, 4)
    assert bundle.model.bytes < shared.model.bytes
    assert torch.equal(bundle.model.state["item.codes"], shared.model.state["item.codes"])
    assert moved(shared, bundle, env) < {"fp16": 1e-3, "int8": 0.02, "int4": 0.2}[kind]
    assert not rows_of(bundle.model.build(env.allow).item)[0].any()
    with pytest.raises(PlanError, match="smaller"):
        QuantizeTables(data_type, only=("item",)).apply(bundle, env)


def test_patterns_choose_and_a_pattern_for_nothing_is_a_slip(given: Bundle, env: Env) -> None:
    assert set(kinds(QuantizeTables(only=("u*", "tags")).apply(given, env))) == {"user", "tags"}
    assert set(kinds(QuantizeTables(skip=("item",), min_rows=300).apply(given, env))) == {"user", "bias"}
    assert set(kinds(QuantizeDense(skip=("out",)).apply(given, env))) == {"net.0", "net.4", "net.7"}
    with pytest.raises(PlanError, match="no layer matches 'itme'; there are: user, item, bias, tags"):
        QuantizeTables(only=("itme",)).apply(given, env)
    with pytest.raises(PlanError, match="no layer matches 'user'"):
        QuantizeDense(only=("user",)).apply(given, env)


def test_what_is_to_be_left_alone_may_be_of_any_kind_but_must_be_there(given: Bundle, env: Env) -> None:
    """One list of layers nobody may touch serves every transform."""
    skip = ("user", "out", "net.1")
    assert set(kinds(QuantizeDense(skip=skip).apply(given, env))) == {"net.0", "net.4", "net.7"}
    assert set(kinds(QuantizeTables(skip=skip).apply(given, env))) == {"item", "bias", "tags"}
    for transform in (QuantizeDense, QuantizeTables, PruneNeurons, FoldNorms, Distill):
        with pytest.raises(PlanError, match=r"no layer matches 'usre'; there are: user, item, bias, tags, mix, net\.0"):
            transform(skip=("usre",)).apply(given, env)


@pytest.mark.parametrize("skip", ["user", "net.0", "net.1", "net.4", "out"])
def test_a_layer_left_alone_keeps_every_number(skip: str, given: Bundle, env: Env) -> None:
    """Whatever is done around it: neurons cut, norms folded, rows shared, weights trained and rounded."""
    steps = (PruneNeurons(0.5), ShareRows(parts=4, codes=64), Distill(1), FoldNorms(), QuantizeTables(), QuantizeDense("int4"))
    made = plan([dataclasses.replace(step, skip=(skip,)) for step in steps]).apply(given, env)
    assert made.bytes < given.bytes / 2 and skip not in made.model.spec.layers
    assert all(torch.equal(made.model.state[n], t) for n, t in given.model.state.items() if n.startswith(f"{skip}."))


@pytest.mark.parametrize(
    ("value", "data_type", "reason"), [(float("nan"), "int8", "1 NaN or infinite"), (1e5, "int4", "ends at 65504")]
)
def test_weights_that_cannot_be_written_are_named(value: float, data_type: str, reason: str, given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["item.weight"][3, 3] = state["net.4.weight"][2, 2] = value
    broken = given.replace(model=Model(given.model.spec, state))
    with pytest.raises(PlanError, match=f"layer item holds.*{reason}"):
        QuantizeTables(data_type).apply(broken, env)
    with pytest.raises(PlanError, match=r"layer net\.4 holds"):
        QuantizeDense("fp16").apply(broken, env)


def test_the_input_keeps_its_tensors_and_unknown_layers_are_shared(given: Bundle, env: Env) -> None:
    before = {n: t.clone() for n, t in given.model.state.items()}
    bundle = QuantizeDense().apply(QuantizeTables().apply(given, env), env)
    assert all(torch.equal(before[n], t) for n, t in given.model.state.items())
    assert bundle.model.state["mix.weight"] is given.model.state["mix.weight"]


def test_layers_know_what_they_cost(given: Bundle, env: Env) -> None:
    bundle = QuantizeDense("int8").apply(given, env)
    want = 2 * (48 * 96 + 96 * 96 + 96 * 32 + 32) + 96 + 32 + 1
    assert sum(layer.flops() for layer in bundle.model.spec.layers.values()) == want
    assert all(isinstance(layer, Dense) for layer in bundle.model.spec.layers.values())
    table = QuantizeTables("int8").apply(given, env).model.spec.layers["item"]
    assert isinstance(table, Table) and dataclasses.replace(table, data_type="fp32").bytes() == 900 * 16 * 4


def test_layers_of_an_unknown_kind_are_named_with_their_bytes(given: Bundle, env: Env) -> None:
    module = given.model.build(env.allow)
    assert untouched(module) == [Untouched("mix", "Bilinear", 4 * (16 * 16 * 8 + 8))]
    module.register_buffer("prior", torch.zeros(3))
    assert untouched(module)[1:] == [Untouched("", "Shop", 12)]
    assert untouched(QuantizeDense().apply(QuantizeTables().apply(given, env), env).model.build(env.allow))[0].path == "mix"


def test_a_sentence_names_no_more_layers_than_a_line_takes() -> None:
    assert QuantizeDense("int4").describe() == "dense layers and convolutions stored as int4"
    assert QuantizeDense("int4", only=("a", "b")).describe() == "dense layers and convolutions (a, b) stored as int4"
    many = tuple(f"t.{n}" for n in range(26))
    assert QuantizeTables("int8", only=many).describe() == "embedding tables (t.0, t.1, t.2 and 23 more) stored as int8"
