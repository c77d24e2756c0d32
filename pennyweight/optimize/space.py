"""Which plans there are: a grid of structures, and for each a few data types.

A plan is a *structure* (neurons pruned, rows shared), the *recovery* it needs, and *data types* that need none. Each axis of
the grid goes from mild to strong, and a structure that is stronger on every axis is cheaper and no better: one trained
structure decides about many others. Data types are tried on every structure that was trained, since they cost a second.
Random or Bayesian sampling was left out: with a handful of trainings affordable it has nothing to learn from.

A new technique is one more entry here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pennyweight.compress.bands import DropRows
from pennyweight.compress.distill import Distill
from pennyweight.compress.factor import FactorDense, stiff
from pennyweight.compress.narrow import NarrowTables
from pennyweight.compress.onnx import nodes
from pennyweight.compress.prune import FoldNorms, PruneNeurons, hidden
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.rewrite import chosen
from pennyweight.compress.share import CodeTables, ShareRows
from pennyweight.core.errors import ConfigError
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense
from pennyweight.model.spec import Layer, leaves
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform

Structure = tuple[Transform, ...]
Levels = tuple[int, ...]
"""How strong a structure is on each axis; 0 leaves that axis as given."""

KEEP = (0.5, 0.25, 0.125)
"""Shares of neurons and channels kept; each halving about quarters the work."""

RETRIEVAL = ("retrieval.*",)
"""The stage of a cascade that the ranking metric does not see; it is never compressed beyond what is free."""

MIXUP = 0.1
"""Rows are blended by shares of Beta(.1, .1), nearly all very near one of the two. Chosen on validation rows alone: digits, a
net cut to half, five folds of 500 such rows, labels and a teacher at .3; the given nets' log loss is .277. Unblended .251, at
.1 .227, at .2 .237, at .4 .252, at 1 .269 (accuracy .928, .940, .936, .934, .931)."""

GENTLE, SLOW = 10, 0.3
"""Epochs at most of a gentle recovery, and its share of the recipe's rate."""

NARROW = (0.5, 0.375, 0.25)
"""Shares of a row's numbers kept, where bytes alone are made small: levels of 4 bits then spend half a byte on each."""

LARGE, DROPPED = 100_000, (0.25, 0.1, 0.05)
"""Rows of a table from which most are seen so seldom that one can stand for them, and shares that are kept."""

CODED = 64
"""Rows from which a table has levels of its own, at 4 bits, in place of a scale a row."""

WIDTHS = (2, 4, 8)
"""Numbers of a row that share one code: 8x, 16x and 32x smaller than fp32, codebooks aside."""


def structures(
    bundle: Bundle, layers: Mapping[str, Layer], env: Env, skip: Sequence[str] = (), narrow: bool = False
) -> dict[Levels, Structure]:
    """Structures worth a try by their levels (neurons, rows), layers of ``skip`` left alone; (0, 0) is the model as given.

    Rows share codes. With ``narrow``, where bytes alone count, the least used rows of large tables are dropped instead, and
    those of smaller ones have fewer numbers, each half a byte once coded after training (on ML-1M, untrained: half the numbers
    lost .0003 AUC; 8 codes a row, which are as large, .0008).
    """
    prunes: list[Structure] = [()]
    module, given = bundle.model.build(env.allow), (bundle.model.spec.inputs, env.calib or env.train)
    layers = {path: layer for path, layer in layers.items() if chosen(path, (), skip)}
    # A factored layer has two matrices: half the rank leaves about the share of weights that pruning its width would.
    factor = [path for path in stiff(module, *given) if path in layers]
    if any(all(chosen(path, (), skip) for path in group.paths) for group in hidden(module, *given)):
        prunes += [(PruneNeurons(keep=keep), *([FactorDense(keep / 2)] if factor else [])) for keep in KEEP]
    dims = [layer.dim for layer in layers.values() if isinstance(layer, Table) and layer.layout == "full" and layer.rows > 512]
    shares: list[Structure] = [()]
    apart = RETRIEVAL if staged(layers) else ()
    if dims:
        usual = max(set(dims), key=dims.count)
        if narrow:
            large = tuple(
                p for p, la in layers.items() if isinstance(la, Table) and la.rows > 512 and not (apart and _retrieves(p))
            )
            if max(la.rows for la in layers.values() if isinstance(la, Table)) >= LARGE:
                shares += [(DropRows(keep, skip=apart),) for keep in DROPPED]
            else:
                shares += [(NarrowTables(keep, only=large),) for keep in NARROW if usual >= 4]
        else:
            shares += [(ShareRows(parts=-(-usual // width), skip=apart),) for width in WIDTHS if usual > width]
    every = product(enumerate(prunes), enumerate(shares))
    return {(i, k): spared((*prune, *share), skip) for (i, prune), (k, share) in every}


def _retrieves(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in RETRIEVAL)


def staged(layers: Mapping[str, Layer]) -> bool:
    """Whether these are the layers of a cascade, with a retrieval stage."""
    return any(map(_retrieves, layers))


def forbidden(bundle: Bundle, patterns: Sequence[str], allow: Sequence[str]) -> tuple[str, ...]:
    """Patterns of layers that nothing may touch, as transforms take them: one that names a block becomes all that is in it.

    Raises:
        ConfigError: a pattern names no layer; the message lists those there are.
    """
    if not patterns:
        return ()
    module, graph = bundle.model.build(allow), nodes(bundle.model)
    every = graph or [path for path, _ in module.named_modules() if path]
    blocks = set() if graph else {path.rpartition(".")[0] for path in every}
    found = []
    for pattern in patterns:
        named = fnmatch.filter(every, pattern)
        if not named:
            have = ", ".join(graph or [path for path, _ in leaves(module)])
            raise ConfigError(f"no layer matches {pattern!r}, which was to be left alone; there are: {have}")
        found += [pattern, *(f"{pattern}.*" for _ in [0] if blocks & set(named))]
    return tuple(found)


def spared(structure: Structure, skip: Sequence[str]) -> Structure:
    """The structure with these layers left alone by every transform in it."""
    return tuple(_spared(t, skip) for t in structure)


def _spared(transform: Transform, skip: Sequence[str]) -> Transform:
    inner = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}  # type: ignore[arg-type]
    changed: dict[str, Any] = {n: _spared(v, skip) for n, v in inner.items() if isinstance(v, Transform)}
    if "skip" in inner:
        changed["skip"] = tuple(dict.fromkeys((*inner["skip"], *skip)))
    return dataclasses.replace(transform, **changed)  # type: ignore[type-var]


def stronger(a: Levels, b: Levels) -> bool:
    """Whether ``a`` is at least as strong as ``b`` on every axis."""
    return all(x >= y for x, y in zip(a, b, strict=True))


def recoveries(structure: Structure, env: Env, epochs: int, skip: Sequence[str] = (), gentle: bool = False) -> list[Structure]:
    """Ways to train what a structure left, the cheapest first; none without teachers, their recipe and rows to train on.

    One carries the user's whole recipe and learns from labels and teachers alike. Another learns most from the teachers, also
    about pairs nobody rated where pairs can be dealt anew; then regularizers are in the way. Neither wins everywhere: on the
    MovieLens sample, a net cut to a quarter ended .0044 AUC above the model it came from by the second and .0008 below it by
    the first; on Frappe, cut to a third, .0002 and .0012 above it. What follows the teachers also stays nearer to the given
    model: on credit risk (two seeds, validation) the drop's deviation was .0009 by the second, .0014 by the first.

    Where the recipe took many epochs and regularizes hard, a full rate undoes in the first what the last must bring back. With
    ``gentle`` a share of it comes first, for fewer epochs: on ML-1M, cut to half, 8 epochs at a tenth ended .0001 AUC above the
    given model, and 30 at twice the rate .0003 below it; but 15 at three tenths lose .0004 less than at a tenth once rows are
    rounded to 4 bits, so it is that. On Frappe the full rate gains .0010 that no gentle one does.

    Classifiers that read numbers only learn from blends of rows instead, of which there are as many as one likes; see MIXUP.
    Numbers to predict do not blend so well: a small regression on forty rows ended twice as far from its teacher with blends.

    All fall by a cosine from twice a plateau's rate, which has that rate on average. A plateau was tried: what surgery left
    is better than the first epochs at a full rate make it, so it gave up after two on Frappe, and on digits ended behind
    (refined log loss of validation rows .2453 against .2435, three seeds). The softer and heavier teacher that is usual for
    classes did not help: a convolutional net for digits, cut to an eighth, came from a log loss of .127 to .115 on 1,000 test
    rows, and with alpha .9 at temperature 4 to .123; their accuracies could not be told apart.
    """
    if not structure or not env.teachers or env.recipe is None or env.train is None or env.valid is None:
        return []
    lr = env.recipe.lr * (1 if env.recipe.schedule == "cosine" else 2)
    pairs = bool(env.train.schema.role("item") and env.train.schema.role("user"))
    classes = env.recipe.loss in ("bce", "cross-entropy")
    numbers = classes and all(c.kind == "numeric" for c in env.train.schema.features)
    asked = Distill(epochs, alpha=0.9, lr=lr, dealt=1.0 * pairs, regularize=0.1, schedule="cosine")
    blended = Distill(epochs, alpha=0.3, lr=lr, mixup=MIXUP, schedule="cosine")
    ways: list[Structure] = [(Distill(epochs, lr=lr, schedule="cosine"),), (blended if numbers else asked,)]
    if gentle:
        ways.insert(0, (Distill(min(epochs, GENTLE), lr=SLOW * env.recipe.lr, schedule="cosine"),))
    return [spared(way, skip) for way in ways]


def types(layers: Mapping[str, Layer], norms: bool, rows: bool = True, skip: Sequence[str] = ()) -> list[Structure]:
    """Data types to try on a structure, mild first; retrieval's tables keep 8 bits, where its recall costs nothing.

    With ``rows`` to calibrate on, dense layers below 8 bits are rounded with feedback. Layers of ``skip`` are left alone.
    """
    layers = {path: layer for path, layer in layers.items() if chosen(path, (), skip)}
    held = {path: layer for path, layer in layers.items() if isinstance(layer, Table)}
    shared = any(layer.layout == "codebook" for layer in held.values())
    wide: Structure = (QuantizeTables("int8", only=RETRIEVAL),) if staged(held) else ()
    mild, strong = ("fp16", "int8") if shared else ("int8", "int4")
    stored: dict[str, Structure] = {
        t: (*wide, QuantizeTables(t, skip=RETRIEVAL if wide else ())) for t in ("fp16", "int8", "int4")
    }
    whole = {p: la for p, la in held.items() if (la.layout, la.data_type) == ("full", "fp32") and not (wide and _retrieves(p))}
    coded = tuple(path for path, layer in whole.items() if layer.rows >= CODED)
    rest = tuple(path for path in held if path not in coded and not (wide and _retrieves(path)))
    stored["coded"] = (*wide, CodeTables(only=coded), *([QuantizeTables("int4", only=rest)] if rest else []))
    fold: Structure = (FoldNorms(),) if norms else ()
    dense = any(isinstance(layer, (Dense, Conv)) for layer in layers.values())
    choices: list[tuple[str, Structure]] = [
        (mild, (QuantizeDense("int8"),)),
        (strong, (QuantizeDense("int8"),)),
        (strong, (QuantizeDense("int4", feedback=rows),)),
        *([(strong, (QuantizeDense("int3", feedback=True),))] if rows else []),
        *([("coded", (QuantizeDense("int3", feedback=True),))] if rows and coded else []),
    ]
    # Without tables, or without dense layers, some are the same.
    made = dict.fromkeys((*fold, *(stored[t] if held else ()), *(d if dense else ())) for t, d in choices)
    return [spared(suffix, skip) for suffix in made if suffix]
