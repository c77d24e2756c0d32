"""Keras models: the same outputs, and through quantize, save, load and score like any other."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

from pennyweight.compress.prune import FoldNorms, PruneNeurons  # noqa: E402
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables  # noqa: E402
from pennyweight.core.config import decode, encode  # noqa: E402
from pennyweight.core.errors import ConfigError, DeviceError  # noqa: E402
from pennyweight.model import keras as bridge  # noqa: E402
from pennyweight.model.bundle import Bundle, load, save  # noqa: E402
from pennyweight.model.dense import Dense, Norm  # noqa: E402
from pennyweight.model.spec import Model, Spec, call  # noqa: E402
from pennyweight.model.tables import Table  # noqa: E402
from pennyweight.model.transform import Env  # noqa: E402

layers = keras.layers


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(0)


def image() -> tuple[Any, dict[str, torch.Tensor]]:
    model = keras.Sequential([layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")])
    batch = {"pixels": torch.rand(32, 28, 28)}
    model(batch["pixels"])
    return model, batch


def recommender() -> tuple[Any, dict[str, torch.Tensor]]:
    """Two inputs, a table called twice, a Keras layer with weights and one without, operators, a nested model."""
    item, history = keras.Input((1,), name="item", dtype="int64"), keras.Input((5,), name="history", dtype="int64")
    hour = keras.Input((1,), name="hour")
    table = layers.Embedding(300, 16, name="items")
    past = layers.GRU(8, name="gru")(table(history))
    inner = [keras.Input((16,)), layers.Dense(64, activation="gelu"), layers.BatchNormalization(), layers.Dense(8)]
    tower = keras.Sequential(inner, name="tower")
    joined = layers.Concatenate()([layers.Flatten()(table(item)), past, layers.LayerNormalization()(past), hour])
    wide = layers.Dense(200, activation="relu", name="wide")(joined)
    deep = layers.Dense(100, activation=keras.activations.hard_sigmoid, use_bias=False)(layers.Dropout(0.5)(wide))
    score = layers.Dense(1)(deep) * 2.0 + keras.ops.sum(tower(layers.Flatten()(table(item))), axis=-1, keepdims=True)
    model = keras.Model({"item": item, "history": history, "hour": hour}, layers.Activation("sigmoid", name="chance")(score))
    g = np.random.default_rng(0)
    for weight in model.weights:  # batch norm statistics that are not those of a new layer
        if "float" in weight.dtype:
            weight.assign(weight + g.uniform(0, 0.05, weight.shape).astype("float32"))
    ids = torch.Generator().manual_seed(0)
    batch = {
        "item": torch.randint(0, 300, (32,), generator=ids),
        "history": torch.randint(0, 300, (32, 5), generator=ids),
        "hour": torch.randn(32, generator=ids),
    }
    return model, batch


def score(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return call(model.build(), batch, model.spec.inputs)


def own(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        given = next(iter(batch.values())) if len(batch) == 1 else {n: t.reshape(32, -1) for n, t in batch.items()}
        return model(given, training=False).squeeze(-1)


def weights(model: Any) -> list[Any]:
    return [w.value.detach().numpy().copy() for w in model.weights]


both = pytest.mark.parametrize(("made", "columns"), [(image, ("pixels",)), (recommender, ())], ids=["sequential", "functional"])


@both
def test_gives_the_outputs_of_the_keras_model(made: Any, columns: tuple[str, ...]) -> None:
    model, batch = made()
    ours = bridge.of(model, columns)
    torch.testing.assert_close(score(ours, batch), own(model, batch), atol=1e-6, rtol=1e-5)


@both
def test_quantized_saved_loaded_and_scored(made: Any, columns: tuple[str, ...], tmp_path: Path) -> None:
    model, batch = made()
    given = Bundle(bridge.of(model, columns))
    bundle = QuantizeDense("int8").apply(given, Env())
    if "history" in batch:
        bundle = QuantizeTables("int4").apply(bundle, Env())
        assert any(isinstance(la, Table) for la in bundle.model.spec.layers.values())
    assert any(isinstance(la, Dense) and la.data_type == "int8" for la in bundle.model.spec.layers.values())
    back = load(save(bundle, tmp_path / "bundle"))
    assert back.model.spec == bundle.model.spec and back.bytes < 0.45 * given.bytes
    got, want = score(back.model, batch), own(model, batch)
    torch.testing.assert_close(got, score(bundle.model, batch), atol=1e-6, rtol=1e-5)
    assert (got - want).abs().mean() < 0.1 * want.std()
    assert made is recommender or (got.argmax(1) == want.argmax(1)).float().mean() > 0.9


def test_its_chains_prune_and_its_norms_fold() -> None:
    model, batch = recommender()
    given = Bundle(bridge.of(model))
    pruned = PruneNeurons(widths=(32,), score="weight").apply(given, Env())
    changed = pruned.model.spec.layers
    assert {path.split(".")[1] for path in changed} == {"tower"} and Norm(32, eps=1e-3, momentum=0.01) in changed.values()
    folded = FoldNorms().apply(pruned, Env())
    assert folded.model.bytes < pruned.model.bytes < given.model.bytes
    torch.testing.assert_close(score(folded.model, batch), score(pruned.model, batch), atol=1e-5, rtol=1e-4)


def test_the_last_activation_can_be_left_out() -> None:
    model, batch = image()
    logits = score(bridge.of(model, ("pixels",), logits=True), batch)
    torch.testing.assert_close(logits.softmax(1), own(model, batch), atol=1e-6, rtol=1e-5)
    model, batch = recommender()
    ours = bridge.of(model, logits=True)
    torch.testing.assert_close(score(ours, batch).sigmoid(), own(model, batch), atol=1e-6, rtol=1e-5)
    assert decode(Spec, encode(ours.spec)) == ours.spec


def test_a_copy_trains_and_keras_keeps_its_weights() -> None:
    model, batch = recommender()
    before = weights(model)
    ours = bridge.of(model, logits=True)
    module = ours.build(copy=True).train()
    torch.manual_seed(0)
    call(module, batch, ours.spec.inputs).square().mean().backward()
    missing = [n for n, p in module.named_parameters() if p.grad is None]
    assert not missing
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "no Keras model"),
        (lambda: keras.Sequential([layers.Dense(2)]), "not built"),
        (lambda: keras.Sequential([keras.Input((3,)), layers.Embedding(5, 2, mask_zero=True)]), "mask"),
        (lambda: keras.Model(i := keras.Input((3,)), [layers.Dense(1)(i), layers.Dense(2)(i)]), "2 outputs"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(made: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        bridge.of(made())


def test_wrong_columns_logits_and_configurations_are_refused() -> None:
    model, _ = image()
    with pytest.raises(ConfigError, match="has 1 inputs"):
        bridge.of(model, ("a", "b"))
    linear = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(ConfigError, match="no softmax or sigmoid"):
        bridge.of(linear, logits=True)
    with pytest.raises(ConfigError, match="cannot restore"):
        bridge.restore({"module": "nowhere", "class_name": "Nothing", "config": {}, "registered_name": None})


IMAGE, LINE = (9, 8, 6), (11, 6)
SPATIAL = [
    (IMAGE, lambda: layers.Conv2D(8, 3, activation="relu")),
    (IMAGE, lambda: layers.Conv2D(8, (3, 2), padding="same", use_bias=False)),
    (IMAGE, lambda: layers.Conv2D(8, 3, strides=2, padding="same", activation="softmax")),
    (IMAGE, lambda: layers.Conv2D(8, 4, strides=(2, 3), padding="same")),
    (IMAGE, lambda: layers.Conv2D(8, 3, dilation_rate=2, groups=2, activation=keras.activations.hard_sigmoid)),
    (IMAGE, lambda: layers.Conv2D(8, 3, data_format="channels_first")),
    (LINE, lambda: layers.Conv1D(8, 3, activation="gelu")),
    (LINE, lambda: layers.Conv1D(8, 2, padding="same")),
    (LINE, lambda: layers.Conv1D(8, 3, strides=2, padding="same")),
    (LINE, lambda: layers.Conv1D(8, 3, padding="causal", dilation_rate=2)),
    ((None, 6), lambda: layers.Conv1D(8, 3, padding="same")),
    (IMAGE, lambda: layers.MaxPooling2D()),
    (IMAGE, lambda: layers.MaxPooling2D(3, strides=2, padding="same")),
    (IMAGE, lambda: layers.MaxPooling2D((2, 3), padding="same", data_format="channels_first")),
    (IMAGE, lambda: layers.AveragePooling2D(3, strides=1, padding="same")),
    (IMAGE, lambda: layers.AveragePooling2D(2, padding="same")),
    (LINE, lambda: layers.MaxPooling1D(3, padding="same")),
    (LINE, lambda: layers.AveragePooling1D(2)),
    (LINE, lambda: layers.AveragePooling1D(2, padding="same")),
    (IMAGE, lambda: layers.GlobalMaxPooling2D()),
    (IMAGE, lambda: layers.GlobalAveragePooling2D(keepdims=True)),
    (IMAGE, lambda: layers.GlobalAveragePooling2D(data_format="channels_first")),
    (LINE, lambda: layers.GlobalMaxPooling1D()),
    (LINE, lambda: layers.GlobalAveragePooling1D()),
    (IMAGE, lambda: layers.BatchNormalization()),
    (LINE, lambda: layers.BatchNormalization()),
    (IMAGE, lambda: layers.Reshape((-1, 6))),
]


@pytest.mark.parametrize(("shape", "made"), SPATIAL)
def test_layers_over_images_and_sequences_become_pytorchs_own(shape: tuple[int | None, ...], made: Any) -> None:
    entry = keras.Input(shape)
    model = keras.Model(entry, made()(entry))
    stirred(model)
    batch = {"x": torch.rand(32, *(n or 10 for n in shape), generator=torch.Generator().manual_seed(0))}
    ours = bridge.of(model, ["x"])
    got = ours.build()(batch["x"])
    with torch.no_grad():
        torch.testing.assert_close(got, model(batch["x"], training=False), atol=1e-5, rtol=1e-5)
    foreign = [m for m in ours.build().modules() if isinstance(m, bridge.Foreign)]
    assert all(m._layer[0].name.startswith("activation") for m in foreign)


def stirred(model: Any) -> None:
    """Weights and batch norm statistics that are not those of a new layer."""
    g = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(weight + g.uniform(0, 0.1, weight.shape).astype("float32"))


def pictures() -> tuple[Any, torch.Tensor]:
    inner = [
        layers.Conv2D(16, 3, padding="same", name="second"),
        layers.BatchNormalization(),
        layers.Activation("relu"),
        layers.Dropout(0.1),
    ]
    front = [keras.Input((12, 12, 1)), layers.Conv2D(8, 3, activation="relu", name="front"), layers.MaxPooling2D()]
    back = [layers.MaxPooling2D(), layers.Flatten(), layers.Dense(32, activation="relu"), layers.Dense(10)]
    return keras.Sequential([*front, *inner, *back]), torch.rand(32, 12, 12)


def words() -> tuple[Any, torch.Tensor]:
    head = [layers.GlobalMaxPooling1D(), layers.Dense(16, activation="relu"), layers.Dense(1)]
    body = [keras.Input((20,), dtype="int32"), layers.Embedding(200, 16), layers.Conv1D(24, 3, activation="relu", name="conv")]
    return keras.Sequential([*body, *head]), torch.randint(0, 200, (32, 20))


@pytest.mark.parametrize("made", [pictures, words])
def test_small_nets_of_convolutions(made: Any, tmp_path: Path) -> None:
    model, x = made()
    stirred(model)
    ours = bridge.of(model, ["x"])
    with torch.no_grad():
        want = model(x.unsqueeze(-1) if made is pictures else x, training=False).squeeze(-1)
    torch.testing.assert_close(score(ours, {"x": x.flatten(1)}), want, atol=1e-5, rtol=1e-5)
    module = ours.build()
    kinds = [type(m).__name__ for m in module.modules()]
    turns = kinds.count("Turned")
    convolutions = [p for p, m in module.named_modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d))]
    if made is pictures:
        assert turns == 2 and convolutions == ["front.conv", "second.conv"] and "BatchNorm2d" in kinds
    else:
        assert turns == 1 and convolutions == ["conv.conv"]
        quantized = QuantizeTables("int8").apply(Bundle(ours), Env())
        back = load(save(quantized, tmp_path / "bundle"))
        torch.testing.assert_close(score(back.model, {"x": x}), want, atol=0.05, rtol=0.05)


saves = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # Keras' own


def test_a_convolution_called_at_two_sizes_runs() -> None:
    small, large = keras.Input((6, 6, 2)), keras.Input((9, 9, 2))
    even, odd = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(4, 3, strides=2, padding="same")
    pooled = [layers.GlobalAveragePooling2D()(odd(even(x))) for x in (small, large)]
    model = keras.Model([small, large], layers.Add()(pooled))
    ours, given = bridge.of(model, ["small", "large"]), [torch.rand(4, 6, 6, 2), torch.rand(4, 9, 9, 2)]
    with torch.no_grad():
        torch.testing.assert_close(ours.build()(*given), model(given), atol=1e-6, rtol=1e-5)
    kinds = [type(m) for m in ours.build().modules()]
    assert kinds.count(torch.nn.Conv2d) == 1, "only the one whose padding is the same at any size"


@saves
def test_a_file_is_read(tmp_path: Path) -> None:
    model, x = pictures()
    model.save(tmp_path / "net.keras")
    again = bridge.read(tmp_path / "net.keras")
    batch = {"x": x.flatten(1)}
    assert torch.equal(score(bridge.of(again, ["x"]), batch), score(bridge.of(model, ["x"]), batch))


@saves
def test_files_that_are_not_there_not_keras_or_not_safe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.keras is not there"):
        bridge.read(tmp_path / "none.keras")
    (tmp_path / "text.keras").write_text("no archive")
    with pytest.raises(ConfigError, match=r"text\.keras cannot be read as a Keras model: "):
        bridge.read(tmp_path / "text.keras")
    lambdas = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x + 1)])
    lambdas.save(tmp_path / "lambda.keras")
    with pytest.raises(ConfigError, match=r"lambda\.keras cannot be read as a Keras model: .*lambda"):
        bridge.read(tmp_path / "lambda.keras")


def test_no_keras_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install pennyweight\[keras\]"):
        bridge.restore({})


def test_another_backend_is_said() -> None:
    script = "from pennyweight.model.keras import restore; restore({})"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True, timeout=120
    )
    assert "ConfigError: Keras runs on the jax backend; set KERAS_BACKEND=torch" in done.stderr
