"""Seeded data with a known answer, of any size.

Real click logs cannot be shipped, and uniform noise teaches nothing: its values are equally frequent and there is nothing
to learn. These rows have what matters for the work here, as in Criteo's: values with a Zipf frequency, so a few rows of a
table serve most look-ups, and labels drawn from a planted factorization machine (Rendle 2010), whose ``logits`` give the
best AUC any model can reach. Rows come in chunks that depend on the seed and their place alone, so a set larger than
memory is written as it is drawn, and the first rows of a long set are those of a short one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from pennyweight.core.errors import ConfigError
from pennyweight.data.catalog import Catalog, Vocabulary
from pennyweight.data.dataset import Array, Dataset, writing
from pennyweight.data.schema import FIRST, Column, Schema

CHUNK = 65_536
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Clicks:
    """Click logs: columns ``user``, ``item``, ``c2`` ... (context), ``numbers``, ``label``, ``time``."""

    sizes: tuple[int, ...] = (2_000, 1_000, 50, 10)
    """Distinct values of user, item and each context field."""
    numbers: int = 0
    """Length of the vector of numbers; 0 for none."""
    dim: int = 4
    """Dimensions of the planted factors."""
    skew: float = 1.05
    """Exponent of the Zipf law: the value of rank k is drawn with odds of k to the power of minus this."""
    strength: float = 1.0
    """Standard deviation of a field's planted weight; 0 makes labels a coin toss."""
    crossed: float = 1.0
    """Factor on what the pairs of fields add to a logit: there are as many as their number squared."""
    bias: float = 0.0
    """What every logit starts from: -1 makes clicks rarer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ConfigError(f"sizes {self.sizes}: give at least a user's and an item's, each at least 1")

    @property
    def names(self) -> tuple[str, ...]:
        """Categorical columns, in the order of ``sizes``."""
        return ("user", "item", *(f"c{k}" for k in range(2, len(self.sizes))))

    @functools.cached_property
    def catalog(self) -> Catalog:
        """Schema and vocabularies: value ``k`` is the k-th most frequent."""
        roles = ["user", "item", *["context"] * (len(self.sizes) - 2)]
        coded = [Column(n, r, "categorical", s + FIRST) for n, r, s in zip(self.names, roles, self.sizes, strict=True)]  # type: ignore[arg-type]
        vector = [Column("numbers", "context", "numeric", 0, self.numbers)] if self.numbers else []
        rest = [Column("label", "label", "numeric"), Column("time", "time", "time")]
        words = {n: Vocabulary.of(np.arange(s)) for n, s in zip(self.names, self.sizes, strict=True)}
        return Catalog(Schema((*coded, *vector, *rest)), words)

    def dataset(self, rows: int) -> Dataset:
        """That many rows in memory."""
        parts = list(self._chunks(rows))
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return Dataset.from_arrays(columns, self.catalog.schema, self.catalog.vocabularies)

    def write(self, rows: int, out: str | os.PathLike[str]) -> Dataset:
        """That many rows in a folder, a chunk in memory at a time."""
        with writing(out, self.catalog, rows) as store:
            for k, chunk in enumerate(self._chunks(rows)):
                store.put(k * CHUNK, chunk)
        return Dataset.open(out)

    def logits(self, columns: Mapping[str, Array]) -> Floats:
        """The planted logit of rows of encoded columns, float64 [n]."""
        weights, factors = self._planted
        ids = [np.asarray(columns[n]) - FIRST for n in self.names]
        linear = sum((w[i] for w, i in zip(weights, ids, strict=True)), np.zeros(len(ids[0])))
        vectors = np.stack([f[i] for f, i in zip(factors, ids, strict=True)])
        crossed = ((vectors.sum(0) ** 2 - (vectors**2).sum(0)) / 2).sum(1)
        number = columns["numbers"] @ self._slopes if self.numbers else 0.0
        logits: Floats = self.bias + linear + self.crossed * crossed + number
        return logits

    @functools.cached_property
    def _planted(self) -> tuple[list[Floats], list[Floats]]:
        rng = np.random.default_rng((self.seed, 1))
        weights = [rng.normal(0, self.strength, s) for s in self.sizes]
        factors = [rng.normal(0, np.sqrt(self.strength) / self.dim**0.25, (s, self.dim)) for s in self.sizes]
        return weights, factors

    @functools.cached_property
    def usual(self) -> float:
        """The mean of all rows' planted logits, without the numbers (whose mean is 0) and the bias."""
        weights, factors = self._planted
        chances = [np.diff(odds, prepend=0.0) for odds in self._odds]
        means = np.stack([p @ f for p, f in zip(chances, factors, strict=True)])
        crossed = float(((means.sum(0) ** 2 - (means**2).sum(0)) / 2).sum())
        return sum(float(p @ w) for p, w in zip(chances, weights, strict=True)) + self.crossed * crossed

    @functools.cached_property
    def _slopes(self) -> Floats:
        rng = np.random.default_rng((self.seed, 2))
        return rng.normal(0, self.strength / max(1, self.numbers) ** 0.5, self.numbers)

    @functools.cached_property
    def _odds(self) -> list[Floats]:
        """Cumulated Zipf frequencies of each field."""
        raw = [np.arange(1, s + 1, dtype=np.float64) ** -self.skew for s in self.sizes]
        return [np.cumsum(r) / r.sum() for r in raw]

    def _chunks(self, rows: int) -> Iterator[dict[str, Array]]:
        for at in range(0, rows, CHUNK):
            yield {name: column[: rows - at] for name, column in self._chunk(at).items()}

    def _chunk(self, at: int) -> dict[str, Array]:
        rng = np.random.default_rng((self.seed, 3, at))
        columns: dict[str, Array] = {n: _ranks(rng, odds) + FIRST for n, odds in zip(self.names, self._odds, strict=True)}
        if self.numbers:
            columns["numbers"] = rng.normal(size=(CHUNK, self.numbers)).astype(np.float32)
        chance = 1 / (1 + np.exp(-self.logits(columns)))
        columns["label"] = (rng.random(CHUNK) < chance).astype(np.float32)
        columns["time"] = np.arange(at, at + CHUNK)
        return columns


def _ranks(rng: np.random.Generator, odds: Floats) -> Array:
    """Ranks drawn from cumulated frequencies, whose last may be a little under 1."""
    return np.minimum(np.searchsorted(odds, rng.random(CHUNK)), len(odds) - 1)


CRITEO = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27),
    *(14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
"""Distinct values of the 26 fields of the Criteo display advertising challenge (Kaggle 2014)."""


def criteo_like(ids: int = 6_000_000, seed: int = 0) -> Clicks:
    """Click logs shaped like Criteo's: 26 fields whose sizes span six powers of ten, 13 numbers, a quarter of clicks.

    The sizes are Criteo's, those of 10,000 values and more scaled so that all together there are about ``ids``. Each field
    weighs alike in the planted logit, so what a method loses in the tail of the large ones is seen in its AUC; ids seen a few
    times cannot be learned by anybody, and the best AUC is that of ``logits``.

    Raises:
        ConfigError: fewer ids than leave the large fields 10,000 values each.
    """
    large = [n for n in CRITEO if n >= 10_000]
    room = ids - (sum(CRITEO) - sum(large))
    if room < 10_000 * len(large):
        raise ConfigError(f"{ids} ids are too few for Criteo's shape; give at least {ids - room + 10_000 * len(large)}")
    sizes = tuple(n if n < 10_000 else max(10_000, n * room // sum(large)) for n in CRITEO)
    clicks = Clicks(sizes, numbers=13, dim=2, strength=0.35, crossed=0.1, seed=seed)
    # What few hot values happen to weigh would else decide how rare clicks are.
    return dataclasses.replace(clicks, bias=-1.6 - clicks.usual)


def walks(users: int, items: int, length: int, *, history: int = 20, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Sequences that can be foretold: after item ``k`` comes ``k + 1`` (around a ring), except for a share of ``noise``.

    Columns ``user``, ``item``, ``history``, ``label`` (1), ``time`` (the place in the sequence); a row for each of
    ``length`` events of each user, each with the history before it. A model that uses order reaches a hit rate at 1 of about
    ``1 - noise``; one that does not, of about ``1 / items``.
    """
    rng = np.random.default_rng(seed)
    jumps = np.where(rng.random((users, length)) < noise, rng.integers(0, items, (users, length)), 1)
    jumps[:, 0] = rng.integers(0, items, users)
    columns = {
        "user": np.repeat(np.arange(users), length) + FIRST,
        "item": (np.cumsum(jumps, axis=1) % items).ravel() + FIRST,
        "label": np.ones(users * length, np.float32),
        "time": np.tile(np.arange(length), users),
    }
    schema = Schema(
        (
            Column("user", "user", "categorical", users + FIRST),
            Column("item", "item", "categorical", items + FIRST),
            Column("label", "label", "numeric"),
            Column("time", "time", "time"),
        )
    )
    return Dataset.from_arrays(columns, schema).with_history(history)
