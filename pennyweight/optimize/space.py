"""Which plans there are: a ladder of structures, and for each a few data types.

A plan is a *structure* (neurons pruned, rows shared), the *recovery* it needs, and *data types* that need none. Structures
are ordered from mild to cheap by their predicted cost, so the search can go up and down a ladder instead of over a
grid; data types are tried on every structure that was trained, since they cost a second. Random or Bayesian sampling was
left out: with a dozen trials affordable and a cost that is known in advance to be monotone, it has nothing to learn from.

A new technique is one more entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from pennyweight.compress.distill import Distill
from pennyweight.compress.prune import FoldNorms, PruneNeurons, chains
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Layer
from pennyweight.model.tables import Table
from pennyweight.model.transform import Env, Transform

Structure = tuple[Transform, ...]

KEEP = (0.5, 0.25, 0.125)
"""Shares of neurons kept; each halving about quarters the dense work."""

WIDTHS = (4, 8)
"""Numbers of a row that share one code: 16x and 32x smaller than fp32, codebooks aside."""


def structures(bundle: Bundle, layers: Mapping[str, Layer], env: Env) -> list[Structure]:
    """Structures worth a try, as given first; the caller sorts them by predicted cost."""
    prunes: list[Structure] = [()]
    if chains(bundle.model.build(env.allow)):
        prunes += [(PruneNeurons(keep=keep),) for keep in KEEP]
    dims = [layer.dim for layer in layers.values() if isinstance(layer, Table) and layer.layout == "full" and layer.rows > 512]
    shares: list[Structure] = [()]
    if dims:
        usual = max(set(dims), key=dims.count)
        shares += [(ShareRows(parts=usual // width),) for width in WIDTHS if usual % width == 0 and usual > width]
    return [(*prune, *share) for prune, share in product(prunes, shares)]


def recovery(structure: Structure, env: Env, epochs: int) -> Structure:
    """The training a structure needs; none for the model as given or without a teacher, its recipe and rows to train on."""
    if not structure or env.teacher is None or env.recipe is None or env.train is None or env.valid is None:
        return ()
    return (Distill(epochs=epochs),)


def types(layers: Mapping[str, Layer], norms: bool) -> list[Structure]:
    """Data types to try on a structure, mild first."""
    shared = any(isinstance(layer, Table) and layer.layout == "codebook" for layer in layers.values())
    tables = any(isinstance(layer, Table) for layer in layers.values())
    dense = any(not isinstance(layer, Table) for layer in layers.values())
    fold: Structure = (FoldNorms(),) if norms else ()
    mild, strong = ("fp16", "int8") if shared else ("int8", "int4")
    choices = [(mild, "int8"), (strong, "int8"), (strong, "int4")]
    return [
        (*fold, *((QuantizeTables(data_type=t),) if tables else ()), *((QuantizeDense(data_type=d),) if dense else ()))
        for t, d in choices
    ]
