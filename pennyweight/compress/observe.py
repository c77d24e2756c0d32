"""What layers read and give, seen while a model scores calibration rows.

Everything that fits weights to data (surgery after pruning, rounding with feedback, correction of biases) asks the same: run
some rows, and look at a few layers on the way. Forward hooks see it in any module; tracing is the known alternative, and
fails where a forward decides by what it is given. It costs one forward of the rows for each look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.errors import PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.spec import Batch, call
from pennyweight.model.transform import Env, Transform

ROWS = 4096
"""Calibration rows that are scored at most, and rows of a layer's input that are kept of them."""

IMAGES = 256
"""Rows scored at a time where there are convolutions, whose activations are large."""

Calls = list[tuple[Tensor, Tensor]]
"""What a layer read [n, in] and gave [n, out], each time it was called."""


def calibration(bundle: Bundle, env: Env, by: Transform) -> Dataset:
    """The rows to look at: ``env.calib``, or else ``env.train``.

    Raises:
        PlanError: neither was given, or they are of another schema than the model's catalog.
    """
    rows = env.calib if env.calib is not None else env.train
    if rows is None or not len(rows):
        raise PlanError(f"{type(by).__name__} fits to rows and needs env.calib (or env.train), which was not given or is empty")
    if bundle.catalog is not None and (why := bundle.catalog.differs(rows.catalog)):
        raise PlanError(
            f"the calibration rows are of another schema than the model: {why}; "
            "give rows that were ingested with the model's own vocabularies"
        )
    return rows.take(np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(np.int64))  # from all over: rows have an order


def observe(module: nn.Module, paths: Iterable[str], batch: Batch, inputs: Sequence[str], most: int) -> dict[str, Calls]:
    """The calls of the layers at ``paths`` while the module scores a batch, in the order of their first.

    At most so many rows a call are kept; what a convolution reads is patches.

    Raises:
        PlanError: the batch lacks a column the model reads, or holds what it cannot.
    """
    seen: dict[str, Calls] = {}

    def hook(path: str) -> Any:
        def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            # Copied at once: an activation that works in place writes into what the layer gave.
            seen.setdefault(path, []).append(_matrices(layer, (*args, *kwargs.values())[0], output, most))

        return see

    hooks = [module.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        with torch.no_grad():
            call(module, batch, inputs)
    except (IndexError, KeyError, RuntimeError) as error:
        raise PlanError(
            f"the model cannot score the calibration rows ({type(error).__name__}: {' '.join(str(error).split())[:160]}); "
            f"their columns are {', '.join(batch)}: give rows of the schema it was trained on"
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def batches(module: nn.Module, rows: Dataset) -> Iterator[Batch]:
    """The rows as they are scored: all at once, or a few where images would fill the memory."""
    return rows.batches(IMAGES if any(Conv.of(layer) for layer in module.modules()) else max(1, len(rows)))


def divergence(before: Tensor, after: Tensor, loss: str) -> float:
    """How far answers [B] or [B, classes] moved, a mean over rows: Kullback and Leibler's divergence in nats.

    The squared difference, where the loss says that answers are no logits.
    """
    if loss == "cross-entropy" and before.dim() == 2:
        p = before.log_softmax(1)
        return float((p.exp() * (p - after.log_softmax(1))).sum(1).mean())
    if loss == "bce":
        yes, no = (F.logsigmoid(sign * before) - F.logsigmoid(sign * after) for sign in (1, -1))
        return float((before.sigmoid() * yes + (-before).sigmoid() * no).mean())
    return float((after - before).square().mean())


def _matrices(layer: nn.Module, x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What a layer read and gave as matrices of at most so many rows; a convolution's are patches from all over the images."""
    conv = Conv.of(layer)
    if conv is None:
        return x.flatten(0, -2)[:most].clone(), y.flatten(0, -2)[:most].clone()
    images = min(len(x), -(-4 * most // y[0, 0].numel()))
    at = torch.linspace(0, len(x) - 1, images).long()
    patches, given = conv.patches(x[at]), y[at].flatten(2).transpose(1, 2).flatten(0, 1)
    step = max(1, len(patches) // most)
    return patches[::step][:most].clone(), given[::step][:most].clone()
