"""Arrays and loaders as a Dataset: what a model outside recommendation is usually trained on.

``(x, y)`` is what scikit-learn, Keras and PyTorch users hold: an array of features (or several, for a model of several
inputs) and one label a row. Here that becomes columns like any others, so that training, proof and serving have one path.
Columns are flat, so an image [28, 28] is a numeric vector of 784; the model puts it back into shape. Whole numbers that
could be ids (not negative, one or a row of them) are ids: a categorical column or a sequence. Keeping arrays beside
Dataset would be the alternative, and a second path through everything above.

A loader is read once, whole, into memory: what does not fit there belongs in files, through ``pennyweight.data.ingest``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST, Column, Schema

Array = npt.NDArray[Any]
LABEL = "label"
EXAMPLE = 4
"""Rows of an example."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Features by the name of their column, and the labels."""

    features: Mapping[str, Array]
    """[n, ...] each, in the order in which the model takes them."""
    labels: Array
    """[n]; whole numbers for classes."""

    @classmethod
    def of(cls, data: Any) -> Pairs:
        """From ``(x, y)`` or from an iterable of such batches; ``x`` is an array, a tuple of arrays, or arrays by name.

        Raises:
            DataError: it is neither, lengths differ, batches differ in shape, or labels are not one a row.
        """
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            data = _read(data)
        features = {name: _array(name, values) for name, values in _named(data[0])}
        labels = _labels(_array(LABEL, data[1]))
        for name, values in features.items():
            if not values.ndim or len(values) != len(labels):
                raise DataError(f"{name} has shape {values.shape} and there are {len(labels):,} labels; give a label a row")
        return cls(features, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def join(self, other: Pairs) -> Pairs:
        """These rows, then the other's.

        Raises:
            DataError: inputs or shapes differ.
        """
        ours, theirs = ({n: v.shape[1:] for n, v in p.features.items()} for p in (self, other))
        if ours != theirs:
            raise DataError(f"rows of {theirs} cannot be joined to rows of {ours}; give the same inputs")
        features = {n: np.concatenate([v, other.features[n]]) for n, v in self.features.items()}
        return Pairs(features, np.concatenate([self.labels, other.labels]))

    def head(self, n: int) -> Pairs:
        """The first ``n`` rows."""
        return Pairs({k: v[:n] for k, v in self.features.items()}, self.labels[:n])

    def numbers(self) -> Pairs:
        """The same rows with whole numbers as plain numbers, not ids: what a model without tables takes."""
        return Pairs({n: v.astype(np.float32) for n, v in self.features.items()}, self.labels)

    def example(self) -> tuple[Tensor, ...]:
        """The first rows of each input, as the model takes them."""
        return tuple(torch.from_numpy(_single(v).copy()) for v in self.head(EXAMPLE).features.values())

    def dataset(self, classes: int = 0) -> Dataset:
        """The rows as a Dataset; ``classes`` is the number there are, 0 for a binary label or a number.

        Raises:
            DataError: a label is outside the classes, or a number is not finite.
        """
        coded = [_column(name, values) for name, values in self.features.items()]
        columns = {column.name: values for column, values in coded}
        schema = Schema((*(column for column, _ in coded), Column(LABEL, "label", "numeric", classes)))
        return Dataset.from_arrays({**columns, LABEL: self.labels}, schema)


def _named(features: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(features, Mapping):
        yield from ((str(k), v) for k, v in features.items())
    elif isinstance(features, (tuple, list)) and features and isinstance(features[0], (np.ndarray, Tensor)):
        yield from ((f"x{k}", v) for k, v in enumerate(features, 1))
    else:
        yield "x", features


def _array(name: str, values: Any) -> Array:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise DataError(f"the rows of {name} differ in shape ({error}); pad or resize them to one shape") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype}, not numbers; turn text into ids first (see docs/howto.md)")
    return array


def _single(array: Array) -> Array:
    """Numbers as float32, ids as int64, pixels (uint8) and booleans as float32."""
    kind: Any = np.int64 if _ids(array) else np.float32
    return np.asarray(array, kind)


def _ids(array: Array) -> bool:
    return array.dtype.kind in "iu" and array.dtype.itemsize > 1


def _column(name: str, values: Array) -> tuple[Column, Array]:
    if _ids(values) and values.ndim <= 2 and values.min(initial=0) >= 0:
        size = max(int(values.max(initial=0)) + 1, FIRST + 1)
        if values.ndim == 2:
            return Column(name, "context", "sequence", size, values.shape[1]), values
        return Column(name, "context", "categorical", size), values
    flat = values.reshape(len(values), -1) if values.ndim > 1 else values
    return Column(name, "context", "numeric", 0, math.prod(values.shape[1:]) if values.ndim > 1 else 0), flat.astype(np.float32)


def _labels(labels: Array) -> Array:
    """One number a row: a column of them is flattened, one-hot rows become their class."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return np.asarray(labels[:, 0])
    if labels.ndim == 2 and np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all():
        return np.asarray(labels.argmax(1))
    if labels.ndim != 1:
        raise DataError(f"labels have shape {labels.shape}; one a row is needed, a class, a number, or one-hot")
    return labels


def _read(loader: Any) -> tuple[Any, Array]:
    """A loader's batches as one pair."""
    if not isinstance(loader, Iterable) or isinstance(loader, (np.ndarray, Tensor, str)):
        raise DataError(f"data is a {type(loader).__name__}; give a Dataset, a pair (x, y), or a loader of such pairs")
    batches = [_pair(batch, k) for k, batch in enumerate(loader, 1)]
    if not batches:
        raise DataError("the loader gave no batch; is it used up? give one that can be read from the start")
    names = list(batches[0][0])
    return {n: _stacked(n, [x[n] for x, _ in batches]) for n in names}, _stacked(LABEL, [y for _, y in batches])


def _pair(batch: Any, number: int) -> tuple[dict[str, Array], Array]:
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise DataError(f"batch {number} of the loader is a {type(batch).__name__}; each must be a pair (x, y)")
    *features, labels = batch
    given = features[0] if len(features) == 1 else features
    return {n: _array(n, v) for n, v in _named(given)}, _array(LABEL, labels)


def _stacked(name: str, parts: Sequence[Array]) -> Array:
    shapes = {p.shape[1:] for p in parts}
    if len(shapes) > 1:
        raise DataError(f"batches of {name} have rows of shapes {sorted(shapes)}; pad or resize them to one shape")
    return np.concatenate(parts)
