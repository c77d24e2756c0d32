"""Keras' own ``quantize`` on the checkpoint rebuilt in Keras, its weights copied."""

from __future__ import annotations

import json
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import safetensors.numpy

from benchmarks.peers.exchange import Job, Made, main

EPSILON = 1e-5
"""Of PyTorch's batch norm."""


@keras.saving.register_keras_serializable("peers")
class FM(keras.layers.Layer):
    """A factorization machine over fields [B, F, D], a row's first number its weight."""

    def call(self, fields: keras.KerasTensor) -> keras.KerasTensor:
        """[B, 1]."""
        total, factors = keras.ops.sum(fields, 1), fields[:, :, 1:]
        pairs = keras.ops.sum(total[:, 1:] ** 2, 1) - keras.ops.sum(factors**2, (1, 2))
        return (total[:, 0] + 0.5 * pairs)[:, None]


@keras.saving.register_keras_serializable("peers")
class Pooled(keras.layers.Layer):
    """The mean of the rows [B, L, D] whose ids [B, L] are not padding."""

    def call(self, rows: keras.KerasTensor, ids: keras.KerasTensor) -> keras.KerasTensor:
        """[B, D]."""
        count = keras.ops.sum(keras.ops.cast(ids != 0, "float32"), 1, keepdims=True)
        return keras.ops.sum(rows, 1) / keras.ops.maximum(count, 1.0)


def rebuilt(job: Job) -> keras.Model:
    """A DNN or DeepFM as a functional model, exactly as it was trained."""
    state = safetensors.numpy.load_file(job.given / "bundle" / "weights.safetensors")
    factory = json.loads((job.given / "bundle" / "manifest.json").read_text())["spec"]["factory"]
    shapes = {name: rows.shape[1:] for name, rows in job.rows("calib").items()}
    inputs = {name: keras.Input(shapes[name], dtype="int64", name=name) for name in job.columns}
    tables = {name: state[f"embeddings.tables.{name}.weight"] for name in job.columns}
    found = {n: keras.layers.Embedding(*t.shape, name=f"table_{n}")(inputs[n]) for n, t in tables.items()}
    rows = [Pooled()(r, inputs[n]) if shapes[n] else r for n, r in found.items()]
    values = {f"table_{n}": [t] for n, t in tables.items()}
    x = keras.layers.Concatenate()(rows)
    for at in sorted({int(name.split(".")[1]) for name in state if name.startswith("mlp.")}):
        part = {n.split(".")[2]: state[n] for n in state if n.startswith(f"mlp.{at}.")}
        if "running_mean" in part:
            x = keras.layers.BatchNormalization(epsilon=EPSILON, name=f"norm_{at}")(x)
            values[f"norm_{at}"] = [part[n] for n in ("weight", "bias", "running_mean", "running_var")]
            x = keras.layers.ReLU()(x)
        else:
            x = keras.layers.Dense(len(part["bias"]), name=f"dense_{at}")(x)
            values[f"dense_{at}"] = [part["weight"].T, part["bias"]]
    if factory.endswith(":DeepFM"):
        x = keras.layers.Add()([x, FM()(keras.layers.Concatenate(axis=1)([keras.ops.expand_dims(r, 1) for r in rows]))])
    model = keras.Model(inputs, x)
    for name, weights in values.items():
        model.get_layer(name).set_weights(weights)
    return model


def fp32(job: Job) -> Made:
    return kept(job, rebuilt(job), "rebuilt in Keras, not quantized")


def int8(job: Job) -> Made:
    model = rebuilt(job)
    model.quantize("int8")
    return kept(job, model, 'model.quantize("int8"): dense layers and tables')


def int4(job: Job) -> Made:
    model = rebuilt(job)
    model.quantize("int4")
    return kept(job, model, 'model.quantize("int4"): dense layers and tables')


def kept(job: Job, model: keras.Model, note: str) -> Made:
    """The model written and opened again."""
    model.save(job.out / "model.keras")
    again = keras.saving.load_model(job.out / "model.keras")
    return Made(("model.keras",), lambda batch: np.asarray(again.predict(dict(batch), batch_size=8192, verbose=0)), note)


if __name__ == "__main__":
    main(("keras", "torch"), {"fp32": fp32, "int8": int8, "int4": int4})
