"""Is the demo's baseline tuned? A grid on the shipped sample, chosen on validation, beside simple models on the test rows.

The grid lies around the demo's recipe, which was picked by hand from smaller searches; the test AUC of its best is printed
once, beside that of the recipe the demo ships and of the models anybody would try first. A baseline below the grid's best by
more than the spread of seeds would make every gain over it a fiction.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight import demo
from pennyweight.data.dataset import Split
from pennyweight.data.sample import prepare
from pennyweight.job import trained
from pennyweight.model.metrics import auc
from pennyweight.model.ranking import DeepFM
from pennyweight.model.spec import spec_of
from pennyweight.model.train import Recipe, scores

GRID = tuple(itertools.product(((400, 400, 400), (256, 128)), (0.1, 0.3), (1e-3, 2e-3, 3e-3), (0.3, 0.5)))
"""Hidden widths, embedding L2, learning rate, dropout."""


@functools.cache
def parts() -> Split:
    """The sample as the demo splits it."""
    return prepare(Path(tempfile.mkdtemp()) / "data", train=demo.SPLIT[0]).split("user", demo.SPLIT, 0)


def deepfm(hidden: tuple[int, ...], dropout: float, recipe: Recipe, seed: int) -> tuple[float, float]:
    """AUC on validation and on test of one DeepFM."""
    split = parts()
    spec = spec_of(DeepFM, columns=split.train.schema.columns, dim=16, hidden=list(hidden), dropout=dropout)
    model, fitted = trained(spec, split, recipe, seed, None, lambda _: None)
    return fitted.metric, auc(split.test.column("label"), scores(model.build(), split.test))


def shipped(options: Options) -> Row:
    """The demo's recipe over seeds."""
    recipe = dataclasses.replace(demo.RANKING, epochs=1) if options.quick else demo.RANKING
    found = [deepfm((400, 400, 400), 0.3, recipe, seed) for seed in range(1 if options.quick else options.seeds)]
    tests = [test for _, test in found]
    note = "validation " + ", ".join(f"{valid:.4f}" for valid, _ in found)
    return Row("sample/deepfm", "auc", sum(tests) / len(tests), min(tests), max(tests), seeds=len(tests), note=note)


def best(options: Options) -> Row:
    """The best of the grid by validation, one seed."""
    grid = GRID[:1] if options.quick else GRID
    tried = []
    for hidden, l2, lr, dropout in grid:
        recipe = dataclasses.replace(demo.RANKING, embedding_l2=l2, lr=lr, epochs=1 if options.quick else demo.RANKING.epochs)
        tried.append((deepfm(hidden, dropout, recipe, 0), (hidden, l2, lr, dropout)))
    (valid, test), setting = max(tried)
    chosen = f"hidden {setting[0]}, embedding L2 {setting[1]}, lr {setting[2]}, dropout {setting[3]}"
    note = f"best of {len(grid)} by validation ({valid:.4f}): {chosen}"
    return Row("sample/grid", "auc", test, test, test, note=note)


def simple(which: int, options: Options) -> Row:
    """A model anybody would try first."""
    name, value = demo.simple(parts(), 0, lambda _: None)[which]
    return Row(f"sample/simple-{which + 1}", "auc", value, value, value, note=name)


ROWS = {
    "sample/deepfm": shipped,
    "sample/grid": best,
    **{f"sample/simple-{k + 1}": functools.partial(simple, k) for k in range(3)},
}

if __name__ == "__main__":
    harness.run("sample", ROWS, timed=False)
