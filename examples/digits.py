"""The classic: a Keras ``Flatten, Dense(128), Dense(10)`` on handwritten digits, trained faster and made smaller.

python examples/digits.py --data FOLDER/mnist-5k --out runs/digits
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras

import pennyweight
from pennyweight.data.dataset import Split
from pennyweight.data.loaders import mnist
from pennyweight.model.keras import of
from pennyweight.model.spec import Model
from pennyweight.model.train import Fit, Recipe

RECIPE = Recipe(
    loss="cross-entropy", optimizer="adam", lr=1e-3, batch=64, epochs=10, patience=10, lr_decay=1.0, metric="accuracy"
)
BUDGET = "bytes <= 0.1x, p50 <= 0.33x, accuracy drop <= 0.003"


def network(seed: int = 0) -> keras.Model:
    """The network, as every introduction to Keras has it."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    flat = [keras.Input((784,), name="x"), layers.Flatten()]
    model = keras.Sequential([*flat, layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")])
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def trained(data: Split, seed: int = 0, recipe: Recipe = RECIPE) -> tuple[Model, Fit]:
    """The same network trained by ``pennyweight.fit``."""
    model = of(network(seed), logits=True)
    module = model.build(copy=True)
    fit = pennyweight.fit(module, data.train, data.valid, recipe, inputs=model.spec.inputs, seed=seed)
    return Model.of(module, model.spec), fit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist_5k.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder to write (default: %(default)s)")
    given = parser.parse_args()
    parts = mnist(given.data, given.out / "data")
    began = time.perf_counter()
    network().fit(parts.train.column("x"), parts.train.column("label"), batch_size=64, epochs=10, verbose=0)
    middle = time.perf_counter()
    model, fit = trained(parts)
    print(f"keras.fit {middle - began:.1f} s, pennyweight.fit {time.perf_counter() - middle:.1f} s")
    outcome = pennyweight.optimize(model, parts, BUDGET, recipe=RECIPE, trained=fit, out=given.out)
    print(outcome.result.explanation, f"see {given.out}/report.html", sep="\n")
