"""The one call: any model and any data end in a proven bundle, and what does not fit is said before any work."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import pennyweight  # noqa: E402
from pennyweight import api  # noqa: E402
from pennyweight.accelerate.compile import export  # noqa: E402
from pennyweight.accelerate.runner import Runner  # noqa: E402
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PennyweightError  # noqa: E402
from pennyweight.data.arrays import Pairs  # noqa: E402
from pennyweight.model.bundle import load  # noqa: E402
from pennyweight.model.train import Recipe, fit  # noqa: E402

QUICK: dict[str, Any] = {"seconds": 20.0, "tries": 0, "watch": lambda step: None, "rows": 20}
X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
TRAIN, TEST = (X[:1200], Y[:1200]), (X[1200:], Y[1200:])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A dense network over 8 x 8 pictures of digits, trained."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = Pairs.of(TRAIN).dataset(10)
    recipe = Recipe("cross-entropy", lr=3e-3, batch=64, epochs=8, patience=8, metric="accuracy")
    fit(made, data.take(slice(100, None)), data.head(100), recipe, inputs=["x"])
    return made


def test_a_live_module_and_arrays(net: nn.Module, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    outcome = pennyweight.optimize(net, TRAIN, "bytes <= 15kB, accuracy drop <= 0.02", test=TEST, out=tmp_path, **QUICK)  # type: ignore[operator]
    result, chosen = outcome.result, outcome.result.chosen
    assert chosen is not None and chosen.proof is not None and chosen.proof.rows == len(TEST[1])
    assert result.verdict == "proven" and chosen.proof.metric == "accuracy" and chosen.proof.drop_upper_95 <= 0.02
    assert chosen.measured is not None and chosen.measured.bytes <= 15_000
    assert result.data.startswith("multi-class; 1,080 / 120 / 597 rows") and result.request == "20 rows"
    with Runner(load(tmp_path / "best")) as runner:
        right = runner.score({"x": torch.from_numpy(TEST[0])}).argmax(1) == TEST[1]
    assert right.mean() == pytest.approx(chosen.proof.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert "20 rows" in (tmp_path / "report.html").read_text() and (tmp_path / "summary.json").exists()


def test_a_loader_of_torch_tensors_and_no_test_rows(net: nn.Module) -> None:
    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=100)
    result = pennyweight.optimize(net, loader, "accuracy drop <= 0.05", force=True, **QUICK).result  # type: ignore[operator]
    assert result.verdict == "proven" and result.data.startswith("multi-class; 1,438 / 180 / 179 rows")


def test_a_keras_model_and_its_file(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10, "softmax")])
    model.compile("adam", loss="sparse_categorical_crossentropy")
    model.fit(*TRAIN, epochs=8, verbose=0)
    model.save(tmp_path / "digits.keras")
    for given in (model, tmp_path / "digits.keras"):
        result = pennyweight.optimize(given, TRAIN, "accuracy drop <= 0.03", test=TEST, force=True, **QUICK).result  # type: ignore[operator]
        assert result.verdict == "proven" and result.chosen is not None
        assert result.baseline.proof is not None and result.baseline.proof.baseline > 0.8
        assert result.baseline.plan.transforms == ()


def test_an_onnx_file_keeps_its_graph(net: nn.Module, tmp_path: Path) -> None:
    graph = export(net, {"pixels": torch.from_numpy(TEST[0][:4])}, ["pixels"]).graph
    (tmp_path / "digits.onnx").write_bytes(graph)
    found = pennyweight.optimize(tmp_path / "digits.onnx", TRAIN, "accuracy drop <= 0.02", test=TEST, force=True, **QUICK)  # type: ignore[operator]
    assert found.result.verdict == "proven" and found.result.chosen is not None
    assert {t.__class__.__name__ for t in found.result.chosen.plan.transforms} <= {"QuantizeOnnx", "SetRuntime"}
    assert found.bundle.model.spec.factory.startswith("pennyweight.model.onnx:")


def test_tasks_are_inferred() -> None:
    one, ten = torch.zeros(4), torch.zeros(4, 10)
    assert api._task([0, 1, 1], one, None) == "binary"
    assert api._task([0.5, 3.0], one, None) == "regression"
    assert api._task([0, 9], ten, None) == "multi-class"
    assert api._task([0, 1], one, "regression") == "regression"
    with pytest.raises(DataError, match=r"label 10 is outside the model's 10 classes, 0 to 9 \(1 such rows\)"):
        api._task([0, 10], ten, None)
    with pytest.raises(DataError, match="label -1 is outside"):
        api._task([0, -1], ten, None)
    with pytest.raises(DataError, match="label 2 is outside 0 and 1"):
        api._task([0, 2], one, "binary")
    with pytest.raises(ConfigError, match="fits 'multi-class'"):
        api._task([0, 1], ten, "binary")


def test_a_regression_is_proven_by_its_squared_error() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 8)).astype(np.float32)
    y = (x @ np.arange(8) + rng.normal(size=2000)).astype(np.float32)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    data = Pairs.of((x[:1500], y[:1500])).dataset()
    fit(
        model,
        data.take(slice(150, None)),
        data.head(150),
        Recipe("mse", lr=1e-2, batch=64, epochs=10, metric="mse"),
        inputs=["x"],
    )
    outcome = pennyweight.optimize(  # type: ignore[operator]
        model, (x[:1500], y[:1500]), "quality drop <= 20%", test=(x[1500:], y[1500:]), force=True, **QUICK
    )
    proof = outcome.result.chosen.proof
    assert proof.metric == "mse" and outcome.result.verdict == "proven" and proof.baseline > 0.5


def test_ids_go_to_tables_and_whole_numbers_to_dense_layers() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.table(x).mean(1))
            return out

    ids, labels = np.random.default_rng(0).integers(0, 50, (100, 5)), np.arange(100) % 2
    _, data, _ = api._taken(Words(), Pairs.of((ids, labels)), None, (), ())
    assert data.dataset().schema["x"].kind == "sequence"
    _, data, _ = api._taken(nn.Linear(5, 1), Pairs.of((ids, labels)), None, (), ())
    assert data.dataset().schema["x"].kind == "numeric"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"nodes": 2}, DeviceError, "2 machines were asked for"),
        ({"gpus": 99}, DeviceError, "99 GPUs were asked for"),
        ({"model": "nowhere.keras"}, ConfigError, "does not exist"),
        ({"model": "."}, ConfigError, "no model that is known"),
        ({"model": 7}, ConfigError, "a int is no model"),
        ({"data": (X[:, :5], Y)}, ConfigError, "cannot be"),
        ({"data": (X, Y + 3)}, DataError, "outside the model's 10 classes"),
        ({"metric": "auc"}, ConfigError, "cannot be proven of a multi-class model; use accuracy"),
        ({"task": "regression"}, ConfigError, "fits 'multi-class'"),
        ({"budget": "bytes < nonsense"}, PennyweightError, "nonsense"),
    ],
)
def test_what_does_not_fit_is_said(net: nn.Module, change: dict[str, Any], kind: type[Exception], said: str) -> None:
    given = {"model": net, "data": (X, Y), **change}
    with pytest.raises(kind, match=said):
        pennyweight.optimize(**given, **QUICK)  # type: ignore[operator]


def test_a_module_that_ends_in_probabilities_is_taken_by_its_logits(net: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self, last: Any) -> None:
            super().__init__()
            self.net, self.last = net, last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.net(x))
            return out

    x = torch.from_numpy(TEST[0])
    for model in (
        nn.Sequential(net, nn.Softmax(1)),
        Wrapped(nn.Softmax(1)),
        Wrapped(lambda z: z.softmax(1)),
        Wrapped(torch.sigmoid),
    ):
        taken, *_ = api._taken(model, Pairs.of(TRAIN), None, (), ())
        with torch.inference_mode():
            assert torch.allclose(taken.build()(x), net.eval()(x), atol=1e-5)
    inner, *_ = api._taken(Wrapped(nn.Identity()), Pairs.of(TRAIN), None, (), ())
    with torch.inference_mode():
        assert torch.allclose(inner.build()(x), net.eval()(x), atol=1e-5)
