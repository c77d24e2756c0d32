"""Convolutions through every compression: a small image model from its recorded graph, pruned, folded and quantized."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress import prune
from pennyweight.compress.prune import FoldNorms, PruneNeurons, foldable, hidden
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.errors import PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model import graph
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense, Identity, Norm
from pennyweight.model.spec import Model, call
from pennyweight.model.transform import Env
from pennyweight.optimize.cost import described, operations, uses
from pennyweight.optimize.space import structures, types

SIDE = 10


class Pictures(nn.Module):
    """Two convolutions with norms, a third that goes around one of them, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Conv2d(24, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.around = nn.Conv2d(24, 32, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(288, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.view(-1, 1, SIDE, SIDE))
        return self.head(torch.relu(self.norm(self.second(x))) + self.around(x)[:, :, 1:-1, 1:-1])


@pytest.fixture(scope="module")
def env() -> Env:
    """Blobs of light, a class by where they are."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 400)
    x = rng.normal(size=(400, SIDE, SIDE)).astype(np.float32) * 0.3
    for k, at in enumerate(label):
        x[k, 5 * (at // 2) : 5 * (at // 2) + 5, 5 * (at % 2) : 5 * (at % 2) + 5] += rng.random((5, 5))
    schema = Schema((Column("x", "context", "numeric", 0, SIDE * SIDE), Column("label", "label", "numeric", 4)))
    data = Dataset.from_arrays({"x": x.reshape(400, -1), "label": label}, schema)
    return Env(train=data, calib=data)


@pytest.fixture(scope="module")
def given(env: Env) -> Bundle:
    """The model after a few steps of training, so that norms have something to say."""
    torch.manual_seed(0)
    module = Pictures()
    batch = next(iter(env.train.batches(400)))
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch["x"]), batch["label"].long()).backward()
        optimizer.step()
    return Bundle(graph.of(module.eval(), [batch["x"][:3]], ["x"]))


def scores(bundle: Bundle, env: Env) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(), next(iter(env.calib.batches(400))), bundle.model.spec.inputs)


def moved(a: Bundle, b: Bundle, env: Env) -> float:
    want = scores(a, env)
    return float((scores(b, env) - want).abs().mean() / want.std())


def test_channels_go_with_all_that_reads_them(given: Bundle, env: Env, tmp_path) -> None:
    bundle = PruneNeurons(keep=0.5, multiple=4).apply(given, env)
    layers = bundle.model.spec.layers
    sizes = {p: (la.inputs, la.outputs) for p, la in layers.items() if isinstance(la, (Conv, Dense))}
    assert sizes == {
        "first.0": (1, 12),
        "second": (12, 16),
        "around": (12, 16),
        "head.1": (144, 20),
        "head.4": (20, 4),
    }
    assert layers["first.1"] == Norm(12, dims=2) and layers["norm"] == Norm(16, dims=2)
    back = load(save(bundle, tmp_path / "b"))
    torch.testing.assert_close(scores(back, env), scores(bundle, env), atol=1e-5, rtol=1e-4)
    assert (scores(bundle, env).argmax(1) == scores(given, env).argmax(1)).float().mean() > 0.9


def test_solving_what_reads_anew_is_worth_it(given: Bundle, env: Env) -> None:
    solved = PruneNeurons(keep=0.5, multiple=4).apply(given, env)
    plain = PruneNeurons(keep=0.5, multiple=4, score="weight").apply(given, env)
    assert moved(given, solved, env) < 0.5 * moved(given, plain, env)


def test_channels_that_do_nothing_go_first(given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["second.weight"][:, 4:16] = 0
    state["around.weight"][:, 4:16] = 0
    sparse = given.replace(model=Model(given.model.spec, state))
    for score in ("activation", "weight"):
        bundle = PruneNeurons(widths=(12,), only=("first.*",), score=score).apply(sparse, env)
        torch.testing.assert_close(scores(bundle, env), scores(sparse, env), atol=0.02, rtol=0.02)


def test_layers_too_wide_to_solve_are_cut_by_weights(given: Bundle, env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    by_weight = PruneNeurons(only=("second",), multiple=4, score="weight").apply(given, env).model.state
    monkeypatch.setattr(prune, "WIDE", 200)
    wide = PruneNeurons(only=("second",), multiple=4).apply(given, env).model.state
    assert all(torch.equal(wide[n], by_weight[n]) for n in by_weight)


def test_without_rows_only_chains_are_seen(given: Bundle, env: Env) -> None:
    module = given.model.build()
    assert [g.name for g in hidden(module, ("x",), env.train)] == ["first.0", "second", "head.1"]
    assert [g.name for g in hidden(module, ("x",), None)] == ["head.1"]


def test_norms_fold_into_convolutions(given: Bundle, env: Env) -> None:
    bundle = FoldNorms().apply(given, env)
    assert {p for p, la in bundle.model.spec.layers.items() if la == Identity()} == {"first.1", "norm"}
    assert bundle.model.spec.layers["first.0"] == dataclasses.replace(Conv.of(given.model.build().first[0]), bias=True)
    torch.testing.assert_close(scores(bundle, env), scores(given, env), atol=1e-4, rtol=1e-4)
    assert foldable(given.model.build(), ("x",)) and not foldable(bundle.model.build(), ("x",))
    with pytest.raises(PlanError, match="no batch norm"):
        FoldNorms().apply(bundle, env)


def scrambled(features: int, dims: int) -> nn.Module:
    norm = nn.BatchNorm2d(features) if dims == 2 else nn.BatchNorm1d(features)
    for tensor in norm.state_dict().values():
        if tensor.dtype == torch.float32:
            tensor.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize(
    ("layers", "home"),
    [
        (lambda: (nn.Conv1d(4, 6, 3, padding=1), nn.Dropout(), scrambled(6, 1)), "0"),
        (lambda: (scrambled(4, 1), nn.Conv1d(4, 6, 3)), "1"),
        (lambda: (nn.Conv1d(4, 8, 3, groups=4, bias=False), scrambled(8, 1)), "0"),
        (lambda: (nn.Conv1d(4, 4, 3, groups=4), scrambled(4, 1)), "0"),
        (lambda: (scrambled(4, 1), nn.Conv1d(4, 6, 3, padding=1)), None),
        (lambda: (scrambled(4, 1), nn.Conv1d(4, 6, 3, groups=2)), None),
        (lambda: (nn.Conv1d(4, 6, 3), nn.ReLU(), scrambled(6, 1)), None),
        (lambda: (scrambled(4, 1), nn.Linear(12, 5)), None),
        (lambda: (nn.Linear(12, 5), scrambled(4, 1)), None),
    ],
)
def test_a_norm_folds_where_the_sums_allow_it(layers, home: str | None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*layers()).eval().requires_grad_(False)
    x = torch.randn(5, 4, 12)
    want = module(x)
    changed = list(prune._fold(module, list(module.named_children())))
    assert (home in changed) if home else not changed
    torch.testing.assert_close(module(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("data_type", "most"), [("fp16", 2e-3), ("bf16", 0.02), ("int8", 0.03), ("int4", 0.3), ("int3", 0.6), ("int2", 1.0)]
)
def test_convolutions_are_quantized(data_type: str, most: float, given: Bundle, env: Env) -> None:
    bundle = QuantizeDense(data_type).apply(given, env)
    layers = bundle.model.spec.layers
    assert {p: la.data_type for p, la in layers.items()} == dict.fromkeys(
        ("first.0", "second", "around", "head.1", "head.4"), data_type
    )
    assert 0 < moved(given, bundle, env) < most
    for path, layer in layers.items():
        held = (t for n, t in bundle.model.state.items() if n.rpartition(".")[0] == path)
        assert layer.bytes() == sum(t.numel() * t.element_size() for t in held)
    assert layers["second"].memory == "channels_last", "a view of the pixels is no reason not to"
    with pytest.raises(PlanError, match=r"no dense layer would get smaller.*second \("):
        QuantizeDense(data_type).apply(bundle, env)


def test_all_of_it_together(given: Bundle, env: Env, tmp_path) -> None:
    pruned = PruneNeurons(keep=0.5, multiple=4).apply(given, env)
    bundle = QuantizeDense("int4").apply(FoldNorms().apply(pruned, env), env)
    back = load(save(bundle, tmp_path / "b"))
    assert back.model.spec == bundle.model.spec and back.bytes < given.bytes / 10
    torch.testing.assert_close(scores(back, env), scores(bundle, env), atol=1e-5, rtol=1e-4)
    assert moved(pruned, bundle, env) < 0.3


def test_operations_count_every_position(given: Bundle, env: Env) -> None:
    layers = described(given)
    often = uses(given, next(iter(env.train.batches(7))))
    assert often == {"first.0": 100, "first.1": 100, "second": 9, "norm": 9, "around": 25, "head.1": 1, "head.4": 1}
    convolved = 2 * (24 * 9 * 100 + 24 * 32 * 9 * 9 + 24 * 32 * 25) + 32 * (9 + 25)
    assert operations(layers, often) == convolved + 2 * (24 * 100 + 32 * 9) + 2 * (288 * 40 + 40 * 4) + 44


def test_plans_for_images(given: Bundle, env: Env) -> None:
    layers = described(given)
    assert list(structures(given, layers, env)) == [(k, 0) for k in range(4)]
    assert types(layers, norms=True, rows=False) == [(FoldNorms(), QuantizeDense(t)) for t in ("int8", "int4")]
