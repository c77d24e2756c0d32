"""Pruning and folding: which layers are found, what is cut, and that outputs stay what they should."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress import prune
from pennyweight.compress.prune import Chain, FoldNorms, PruneNeurons, chains, hidden
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.dense import Dense, Identity, Norm
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import Model, build, call, spec_of
from pennyweight.model.transform import Env


def scores(bundle: Bundle, env: Env) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(env.calib.batches(1000)), bundle.model.spec.inputs)


def moved(a: Bundle, b: Bundle, env: Env) -> float:
    want = scores(a, env)
    return float((scores(b, env) - want).abs().mean() / want.std())


def linear(i: int = 8, o: int = 8, **kw: bool) -> nn.Linear:
    return nn.Linear(i, o, **kw)


def test_chains_are_found_through_norms_activations_and_inner_sequentials(given: Bundle, env: Env) -> None:
    found = chains(given.model.build(env.allow))
    assert found == [Chain("net.0", ("net.1",), "net.4", 96), Chain("net.4", ("net.6",), "net.7", 96)]
    inner = nn.Sequential(nn.Flatten(), nn.Sequential(linear(), nn.Sequential(nn.GELU())), nn.Dropout(), linear())
    assert chains(inner) == [Chain("1.0", (), "3", 8)]


@pytest.mark.parametrize(
    "layers",
    [
        (linear(), nn.ReLU()),
        (linear(), nn.LayerNorm(8), linear()),
        (linear(), nn.Softmax(1), linear()),
        (linear(), nn.PReLU(8), linear()),
        (linear(), nn.Conv1d(8, 8, 1), linear()),
        (linear(), nn.BatchNorm1d(8, track_running_stats=False), linear()),
        (linear(), nn.BatchNorm2d(8), linear()),
        (Dense(8, 8, data_type="int8").build(), nn.ReLU(), linear()),
        (linear(), nn.ReLU(), Dense(8, 8, data_type="int8").build()),
        (nn.Linear(8, 8, dtype=torch.float64), nn.ReLU(), linear()),
    ],
    ids=lambda layers: "-".join(type(la).__name__ for la in layers),
)
def test_what_cannot_be_cut_is_left_alone(layers: tuple[nn.Module, ...]) -> None:
    assert chains(nn.Sequential(*layers)) == []


def test_a_layer_that_stands_at_two_places_is_left_alone() -> None:
    tied = linear()
    module = nn.Sequential(linear(), nn.ReLU(), tied, nn.ReLU(), tied, nn.ReLU(), linear(), nn.ReLU(), linear())
    assert chains(module) == [Chain("6", (), "8", 8)]

    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    assert chains(Odd(linear(), nn.ReLU(), linear())) == []


@pytest.mark.parametrize("score", ["activation", "weight"])
def test_layers_get_narrower_and_are_recorded(score: str, given: Bundle, env: Env, tmp_path) -> None:
    bundle = PruneNeurons(keep=0.5, score=score).apply(given, env)
    assert bundle.model.spec.layers == {
        "net.0": Dense(48, 48),
        "net.1": Norm(48),
        "net.4": Dense(48, 48, bias=False),
        "net.6": Norm(48),
        "net.7": Dense(48, 16),
        "out": Dense(16, 1),
    }
    assert bundle.model.state["item.weight"] is given.model.state["item.weight"]
    back = load(save(bundle, tmp_path / "b"))
    assert back.model.spec == bundle.model.spec
    torch.testing.assert_close(scores(back, env), scores(bundle, env), atol=1e-5, rtol=1e-4)


def test_neurons_that_do_nothing_go_first_and_nothing_is_lost(given: Bundle, env: Env) -> None:
    for score in ("activation", "weight"):
        state = {n: t.clone() for n, t in given.model.state.items()}
        for dead, norm, last in ((slice(0, 50), "net.1", "net.4"), (slice(40, 96), "net.6", "net.7")):
            state[f"{last}.weight"][:, dead] = 0
            state[f"{norm}.weight"][dead] *= 100  # loud, but nobody listens
        sparse = given.replace(model=Model(given.model.spec, state))
        bundle = PruneNeurons(widths=(46, 40, 32), score=score).apply(sparse, env)
        torch.testing.assert_close(scores(bundle, env), scores(sparse, env), atol=2e-3, rtol=2e-3)


def test_constant_neurons_go_into_the_next_bias(given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["net.6.weight"][:60] = 0
    state["net.6.bias"][:60] = 5
    constant = given.replace(model=Model(given.model.spec, state))
    bundle = PruneNeurons(widths=(36,), only=("net.4",)).apply(constant, env)
    torch.testing.assert_close(scores(bundle, env), scores(constant, env), atol=5e-3, rtol=5e-3)


def test_solving_the_next_layer_anew_is_worth_it(given: Bundle, env: Env) -> None:
    solved = PruneNeurons(keep=0.5, score="activation").apply(given, env)
    plain = PruneNeurons(keep=0.5, score="weight").apply(given, env)
    assert moved(given, solved, env) < 0.5 * moved(given, plain, env)
    fresh = dataclasses.replace(env, calib=env.valid)  # rows that were not solved on
    assert moved(given, solved, fresh) < 0.5 * moved(given, plain, fresh)


def test_widths_are_rounded_and_at_least_one_multiple_stays(given: Bundle, env: Env) -> None:
    def widths(**fields: float) -> list[int]:
        layers = PruneNeurons(score="weight", **fields).apply(given, env).model.spec.layers
        return [layers["net.0"].outputs, layers["net.4"].outputs]

    assert widths(keep=0.3) == [32, 32]
    assert widths(keep=0.01) == [16, 16]
    assert widths(keep=0.3, multiple=1) == [29, 29]


def test_patterns_and_widths_choose(given: Bundle, env: Env) -> None:
    only = PruneNeurons(only=("net.4",), score="weight").apply(given, env).model.spec.layers
    assert "net.0" not in only and only["net.4"] == Dense(96, 48, bias=False)
    mixed = PruneNeurons(widths=(96, 20, 32), score="weight").apply(given, env).model.spec.layers
    assert "net.0" not in mixed and mixed["net.7"] == Dense(20, 32) and "out" not in mixed


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"keep": 1.0}, r"no layer would get narrower.*net\.0 \(96\), net\.4 \(96\), net\.7 \(32\)"),
        ({"widths": (10,)}, "1 widths for 3 hidden layers"),
        ({"widths": (97, 10, 8)}, r"net\.0 has 96 neurons, 97 were asked for"),
        ({"skip": ("net.*",)}, "no hidden layer to cut"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, object], reason: str, given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match=reason):
        PruneNeurons(**fields).apply(given, env)


def test_quantized_layers_are_not_cut_or_folded(given: Bundle, env: Env) -> None:
    quantized = QuantizeDense().apply(given, env)
    with pytest.raises(PlanError, match="not yet quantized"):
        PruneNeurons().apply(quantized, env)
    with pytest.raises(PlanError, match="fold before quantizing"):
        FoldNorms().apply(quantized, env)


def test_scores_by_activation_need_rows(given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match=r"needs env\.calib"):
        PruneNeurons().apply(given, Env(allow=env.allow))
    PruneNeurons(score="weight").apply(given, Env(allow=env.allow))
    assert PruneNeurons().apply(given, Env(train=env.train, allow=env.allow)).model.bytes < given.model.bytes


def test_layers_that_no_row_reaches_are_scored_by_weights(given: Bundle, env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_record", lambda *args: {})
    blind = PruneNeurons(score="activation").apply(given, env).model.state
    weight = PruneNeurons(score="weight").apply(given, env).model.state
    assert all(torch.equal(blind[n], weight[n]) for n in weight)


@pytest.fixture(scope="module")
def histories() -> Dataset:
    rng = np.random.default_rng(0)
    schema = Schema(
        (
            Column("user", "user", "categorical", 60),
            Column("item", "item", "categorical", 90),
            Column("seen", "user", "sequence", 90, 8, shares="item"),
            Column("label", "label", "numeric"),
        )
    )
    rows = {"user": rng.integers(2, 60, 200), "item": rng.integers(2, 90, 200), "seen": rng.integers(0, 90, (200, 8))}
    return Dataset.from_arrays({**rows, "label": rng.integers(0, 2, 200).astype(np.float32)}, schema)


def test_the_blocks_of_a_transformer_are_cut_though_the_model_cannot_be_traced(histories: Dataset) -> None:
    spec = spec_of(SASRec, columns=histories.schema.columns, dim=32, heads=2)
    torch.manual_seed(0)
    module = build(spec).eval()
    found = [(g.name, g.width, [m.path for m in g.readers]) for g in hidden(module, (), histories)]
    assert found == [("blocks.0.wide", 32, ["blocks.0.narrow"]), ("blocks.1.wide", 32, ["blocks.1.narrow"])]
    for block in module.blocks:
        with torch.no_grad():
            block.wide.bias[:16] = -100  # never active: nothing is lost without them
    given = Bundle(Model.of(module, spec))
    cut = PruneNeurons(keep=0.5).apply(given, Env(calib=histories))
    assert cut.model.spec.layers == {
        f"blocks.{k}.{n}": d for k in (0, 1) for n, d in (("wide", Dense(32, 16)), ("narrow", Dense(16, 32)))
    }
    assert cut.bytes < given.bytes
    torch.testing.assert_close(scores(cut, Env(calib=histories)), scores(given, Env(calib=histories)), atol=1e-3, rtol=1e-3)
    module.blocks[1].wide = module.blocks[0].wide
    assert [g.name for g in hidden(module, (), histories)] == [], "one layer in two blocks"


def test_broken_weights_are_named(given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["net.7.weight"][1, 1] = float("nan")
    with pytest.raises(PlanError, match=r"layer net\.7 holds 1 NaN"):
        PruneNeurons().apply(given.replace(model=Model(given.model.spec, state)), env)


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"keep": 1.1}, {"multiple": 0}, {"widths": (0,)}])
def test_impossible_settings_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="keep must be above 0"):
        PruneNeurons(**fields)


def test_folding_changes_no_output(given: Bundle, env: Env) -> None:
    bundle = FoldNorms().apply(given, env)
    # The first norm goes into the layer before it; the second, behind an activation, into the one after.
    assert bundle.model.spec.layers == {
        "net.0": Dense(48, 96),
        "net.1": Identity(),
        "net.6": Identity(),
        "net.7": Dense(96, 32),
    }
    torch.testing.assert_close(scores(bundle, env), scores(given, env), atol=1e-4, rtol=1e-4)
    assert bundle.model.bytes < given.model.bytes
    with pytest.raises(PlanError, match="no batch norm"):
        FoldNorms().apply(bundle, env)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_every_kind_of_norm_folds(affine: bool, bias: bool, order: str) -> None:
    def norm() -> nn.BatchNorm1d:
        made = nn.BatchNorm1d(8, affine=affine, eps=1e-3)
        for tensor in made.state_dict().values():
            if tensor.dtype == torch.float32:
                tensor.uniform_(0.5, 2.0)
        return made

    torch.manual_seed(0)
    before = [norm(), nn.Dropout()] if order != "after" else []
    after = [nn.Dropout(), norm()] if order != "before" else []
    module = nn.Sequential(*before, linear(bias=bias), *after, nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(5, 8)
    want = module(x)
    home = str(len(before))
    changed = list(prune._fold(module, list(module.named_children())))
    assert changed.count(home) == (2 if order == "both" else 1)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in module)
    torch.testing.assert_close(module(x), want, atol=1e-5, rtol=1e-5)


def test_after_pruning_norms_still_fold(given: Bundle, env: Env) -> None:
    pruned = PruneNeurons(score="weight").apply(given, env)
    folded = FoldNorms().apply(pruned, env)
    torch.testing.assert_close(scores(folded, env), scores(pruned, env), atol=1e-4, rtol=1e-4)
    assert folded.model.spec.layers["net.0"] == Dense(48, 48)


@pytest.mark.parametrize("bias", [True, False])
def test_surgery_finds_what_trying_every_way_finds(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g) @ torch.randn(3, 6, generator=g) + 0.3 * torch.randn(400, 6, generator=g) + 2
    weight, shift = torch.randn(4, 6, generator=g), torch.randn(4, generator=g) if bias else None
    y = nn.functional.linear(x, weight, shift)

    def best(kept: list[int]) -> float:
        columns = torch.cat([x[:, kept], torch.ones(400, 1)], 1) if bias else x[:, kept]
        return float((columns @ torch.linalg.lstsq(columns, y).solution - y).square().sum())

    kept, after = prune.surgery(x, y, weight, shift, 5)
    without = [best([i for i in range(6) if i != out]) for out in range(6)]
    assert sorted(set(range(6)) - set(kept.tolist())) == [min(range(6), key=without.__getitem__)]
    left = float((nn.functional.linear(x[:, kept], after["weight"], after.get("bias")) - y).square().sum())
    assert left == pytest.approx(min(without), rel=0.02)
    kept, after = prune.surgery(x, y, weight, shift, 3)
    left = float((nn.functional.linear(x[:, kept], after["weight"], after.get("bias")) - y).square().sum())
    assert len(kept) == 3 and left == pytest.approx(best(kept.tolist()), rel=0.05)
