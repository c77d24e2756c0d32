"""Requests as they come: what latency is measured with.

A request is one user with a history and a few hundred candidates. Measuring with random users and uniform items flatters
a model, since real candidates are the popular ones and share their rows of the tables; so users are drawn from rows as
they occur, and candidates by how often an item occurs. A trace is kept as JSON lines, so it can be looked at, cut with
``head``, or written by somebody else's log.

*When* requests come is a second trace, ``Arrivals``, drawn from a ``Load``: moments, sizes, classes and tenants, for the
simulator and for a live load alike. It is apart because the first needs a catalogue and the second does not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from pennyweight.core.config import decode, encode, write
from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data.catalog import Catalog, Value
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import FIRST


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: score these items for this user."""

    user: str | int | None
    """The user as named outside, not an id; None for somebody unknown."""
    history: tuple[int, ...]
    """Ids of items the user liked, oldest first."""
    items: tuple[int, ...]
    """Ids of the candidates."""
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of user and context columns, as before encoding."""
    time: int | None = None
    """When, in seconds since 1970; None where it is not known."""

    def batch(self, catalog: Catalog) -> dict[str, Tensor]:
        """What the model is asked: one row a candidate."""
        return catalog.request(self.user, self.history, np.asarray(self.items, np.int64), self.context)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in the order they came."""

    requests: tuple[Request, ...]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @classmethod
    def sample(cls, source: Dataset | Catalog, n: int, candidates: int, seed: int = 0) -> Trace:
        """``n`` requests with ``candidates`` distinct items each (all items where there are fewer).

        From a dataset, each takes the user, history, context and time of a random row, in time order; from a catalog
        alone, users are drawn evenly and histories by popularity.

        Raises:
            DataError: the source has no items.
        """
        if n < 1 or candidates < 1:
            raise ConfigError(f"a trace of {n} requests with {candidates} candidates: both must be at least 1")
        rng = np.random.default_rng(seed)
        catalog = source if isinstance(source, Catalog) else source.catalog
        askers = _rows(source, n, rng) if isinstance(source, Dataset) else _users(source, n, rng)
        drawn = (tuple(_draw(catalog, candidates, rng).tolist()) for _ in askers)
        return cls(tuple(dataclasses.replace(a, items=items) for a, items in zip(askers, drawn, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line."""
        write(path, "".join(json.dumps(encode(r), sort_keys=True, ensure_ascii=False) + "\n" for r in self.requests))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace.

        Raises:
            DataError: the file is missing, empty, or a line is not a request.
        """
        try:
            lines = Path(path).read_text("utf-8").splitlines()
            return cls(tuple(decode(Request, json.loads(line), f"{path}:{k}") for k, line in enumerate(lines, 1)))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; make a trace with Trace.sample(...).save(path)"
            ) from error
        except (ConfigError, ValueError) as error:
            raise DataError(f"{path} is not a trace: {error}") from error

    def batches(self, catalog: Catalog) -> list[dict[str, Tensor]]:
        """A batch a request."""
        return [r.batch(catalog) for r in self.requests]


def _draw(catalog: Catalog, k: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Distinct items with odds by popularity: the smallest of exponential clocks (Efraimidis and Spirakis 2006)."""
    ids = catalog.item_ids
    if k >= len(ids):
        return rng.permutation(ids)
    clocks = rng.exponential(size=len(ids)) / (catalog.popularity[ids] + 1)
    return ids[np.argpartition(clocks, k)[:k]]


def _rows(data: Dataset, n: int, rng: np.random.Generator) -> list[Request]:
    rows = np.sort(rng.integers(0, len(data), n))
    columns = {c.name: data.take(rows).column(c.name) for c in data.schema.columns}
    time = next((c.name for c in data.schema.role("time")), None)
    order = np.argsort(columns[time], kind="stable") if time else np.arange(n)
    return [_asker(data.catalog, {k: v[i] for k, v in columns.items()}, time) for i in order]


def _asker(catalog: Catalog, row: Mapping[str, Any], time: str | None) -> Request:
    schema, history, user = catalog.schema, catalog.schema.history, _named_user(catalog)
    given = [c for c in schema.role("user", "context") if c.name != user and c != history]
    return Request(
        user=catalog.vocabulary(user).decode(row[user][None])[0] if user else None,
        history=tuple(row[history.name][row[history.name] > 0].tolist()) if history else (),
        items=(),
        context={c.name: _value(catalog, c.name, row[c.name]) for c in given},
        time=int(row[time]) if time else None,
    )


def _named_user(catalog: Catalog) -> str | None:
    """The column that names users, if there is one."""
    return next((c.name for c in catalog.schema.role("user") if c.kind == "categorical"), None)


def _value(catalog: Catalog, name: str, stored: Any) -> Any:
    column = catalog.schema[name]
    if column.kind == "numeric":
        return stored.tolist()
    values = catalog.vocabulary(name).decode(np.atleast_1d(stored))
    return [v for v in values if v is not None] if column.kind == "sequence" else values[0]


def _users(catalog: Catalog, n: int, rng: np.random.Generator) -> list[Request]:
    user = _named_user(catalog)
    names: list[Value | None] = [None] * n
    if user:
        names = catalog.vocabulary(user).decode(rng.integers(FIRST, catalog.schema[user].size, n))
    length = catalog.schema.history.length if catalog.schema.history else 0
    lengths = rng.integers(0, length + 1, n).tolist()
    return [Request(u, tuple(_draw(catalog, k, rng).tolist()) if k else (), ()) for u, k in zip(names, lengths, strict=True)]


# -- when they come ------------------------------------------------------------------------------------------------------

Kind = Literal["poisson", "gamma", "bursts", "diurnal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Sizes = Literal["heavy", "narrow", "fixed"]
Times = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Load:
    """How requests come in, as a recipe: when, how large, by whom and about what.

    A generator that draws gaps from a Poisson distribution, as DeepRecSys' does, has gaps far more even than a Poisson process
    and flatters every scheduler. So each trace says how bursty it came out (``Arrivals.describe``).
    """

    kind: Kind = "poisson"
    """Independent arrivals; gaps of a chosen variation; calm and bursts in turns (a Markov-modulated Poisson process); or a
    day squeezed into the trace."""
    rate: float = 100.0
    """Requests a second, on average."""
    seconds: float = 10.0
    variation: float = 4.0
    """Gamma: standard deviation of the gaps over their mean; 1 is Poisson."""
    calm: float = 0.5
    """Bursts: rate between bursts, over the average."""
    burst: float = 3.0
    """Bursts: rate within them, over the average."""
    dwell_s: float = 0.3
    """Bursts: how long a calm lasts on average."""
    swing: float = 3.0
    """Diurnal: rate at the day's peak over that at its trough."""
    pulse: float = 1.0
    """Any kind: factor on the rate during a pulse in the middle."""
    pulse_s: float = 5.0
    sizes: Sizes = "heavy"
    """Items a request: lognormal with a tail like production recommenders', lognormal and narrow as DeepRecSys', all alike."""
    items: int = 144
    """Their mean number of items, about."""
    most: int = 1024
    """The largest number of items."""
    users: int = 10_000
    catalog: int = 100_000
    """Different users and items to draw from; some come up again and again: see ``Arrivals.candidates``."""
    classes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name of each class of requests and its share of them."""
    tenants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name of each tenant and its share of requests."""
    seed: int = 0

    def __post_init__(self) -> None:
        above = ("rate", "seconds", "variation", "dwell_s", "pulse", "pulse_s", "swing", "items", "most", "users", "catalog")
        for name, value in ((name, getattr(self, name)) for name in above):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"load.{name} is {value:g}; give a number above 0")
        if not 0 <= self.calm < 1 < self.burst:
            raise ConfigError(f"load.calm {self.calm:g} and load.burst {self.burst:g}: give calm below 1 and burst above 1")
        for name, shares in (("classes", self.classes), ("tenants", self.tenants)):
            if shares and not (min(shares.values()) >= 0 and sum(shares.values()) > 0):
                raise ConfigError(f"load.{name} has shares {dict(shares)}; give numbers of 0 or more, one above")

    def draw(self) -> Arrivals:
        """The trace: the same for the same recipe."""
        rng = np.random.default_rng(self.seed)
        at = self._times(rng)
        n = len(at)
        size = self._sizes(n, rng)
        user = _zipf(self.users, n, rng)
        priorities, priority = _shared(self.classes, n, rng)
        tenants, tenant = _shared(self.tenants, n, rng)
        return Arrivals(at, size, user, priority, tenant, priorities, tenants, self)

    def _times(self, rng: np.random.Generator) -> Times:
        if self.kind == "gamma":
            shape = 1 / self.variation**2
            clock = _until(self.seconds, lambda n: rng.gamma(shape, 1 / (shape * self.rate), n), self.rate)
            return self._pulsed(clock, rng)
        return self._pulsed(_thinned(self.seconds, *self._phases(rng), rng), rng)

    def _phases(self, rng: np.random.Generator) -> tuple[Times, Times]:
        """Moments at which the rate changes, and the rate from each on."""
        if self.kind == "poisson":
            return np.zeros(1), np.array([self.rate])
        if self.kind == "bursts":
            # the share of time in bursts that makes the average what was asked for
            share = (1 - self.calm) / (self.burst - self.calm)
            short = self.dwell_s * share / (1 - share)
            pairs = int(3 * self.seconds / (self.dwell_s + short)) + 50
            ends = np.cumsum(np.stack([rng.exponential(self.dwell_s, pairs), rng.exponential(short, pairs)], 1).ravel())
            while ends[-1] < self.seconds:  # rare: many short ones
                ends = np.concatenate([ends, ends[-1] + ends])
            starts = np.concatenate([[0.0], ends[:-1]])
            return starts, self.rate * np.where(np.arange(len(starts)) % 2, self.burst, self.calm)
        steps = np.linspace(0, self.seconds, 289)[:-1]  # five minutes of a day each
        angle = 2 * np.pi * steps / self.seconds
        wave = -np.cos(angle) - 0.35 * np.cos(2 * angle + 0.8)  # a trough at night, a dip after noon
        wave = (wave - wave.min()) / np.ptp(wave)
        rates = 1 + (self.swing - 1) * wave
        return steps, self.rate * rates / rates.mean()

    def _pulsed(self, at: Times, rng: np.random.Generator) -> Times:
        """The arrivals with those of the pulse added (or some taken out, below 1)."""
        start = (self.seconds - self.pulse_s) / 2
        within = (at >= start) & (at < start + self.pulse_s)
        if self.pulse < 1:
            return at[~within | (rng.random(len(at)) < self.pulse)]
        more = rng.uniform(max(0.0, start), start + self.pulse_s, rng.poisson(within.sum() * (self.pulse - 1)))
        return np.sort(np.concatenate([at, more]))

    def _sizes(self, n: int, rng: np.random.Generator) -> Ints:
        if self.sizes == "fixed":
            return np.full(n, self.items)
        sigma = 1.0 if self.sizes == "heavy" else 0.2
        drawn = rng.lognormal(math.log(self.items) - sigma**2 / 2, sigma, n)
        return np.clip(np.rint(drawn), 1, self.most).astype(np.int64)


def _shared(shares: Mapping[str, float], n: int, rng: np.random.Generator) -> tuple[tuple[str, ...], Ints]:
    """Names, and the place of each request's name among them."""
    if not shares:
        return ("",), np.zeros(n, np.int64)
    odds = np.array(list(shares.values()))
    return tuple(shares), rng.choice(len(odds), n, p=odds / odds.sum())


def _until(seconds: float, gaps: Callable[[int], Times], rate: float) -> Times:
    """Moments from gaps, as far as ``seconds``."""
    clock = np.zeros(0)
    while not len(clock) or clock[-1] < seconds:
        clock = np.concatenate([clock, (clock[-1] if len(clock) else 0.0) + np.cumsum(gaps(int(rate * seconds) + 100))])
    return clock[clock < seconds]


def _thinned(seconds: float, starts: Times, rates: Times, rng: np.random.Generator) -> Times:
    """A Poisson process whose rate changes: drawn at the highest rate, kept by the rate of the moment (Lewis and Shedler)."""
    top = float(rates.max())
    at = _until(seconds, lambda n: rng.exponential(1 / top, n), top)
    now = rates[np.searchsorted(starts, at, side="right") - 1]
    kept: Times = at[rng.random(len(at)) * top < now]
    return kept


def _zipf(values: int, n: int, rng: np.random.Generator, skew: float = 1.0) -> Ints:
    """Ranks from 0, rank k with odds of 1 over k + 1 to the power of ``skew``."""
    odds = _odds(values, skew)
    found: Ints = np.searchsorted(odds, rng.random(n) * odds[-1])
    return found


@functools.lru_cache(8)
def _odds(values: int, skew: float) -> Times:
    """Odds added up: each request of a trace asks for the same."""
    odds: Times = np.cumsum(1 / np.arange(1.0, values + 1) ** skew)
    return odds


@dataclasses.dataclass(frozen=True, eq=False)
class Arrivals:
    """A trace to replay: columns of equal length, in the order of arrival.

    The simulator and a live load read the same file. What a request asks about is not written out, a thousand items each, but
    follows from the recipe's seed and the request's place.
    """

    at: Times
    """Seconds from the start at which each is due; latency counts from here, whenever it was sent."""
    items: Ints
    """Items it asks to be scored."""
    user: Ints
    """Rank of its user by how often they come, 0 the most frequent."""
    priority: Ints
    """Place of its class in ``priorities``."""
    tenant: Ints
    """Place of its tenant in ``tenants``."""
    priorities: tuple[str, ...] = ("",)
    tenants: tuple[str, ...] = ("",)
    load: Load = dataclasses.field(default_factory=Load)

    COLUMNS: ClassVar[tuple[str, ...]] = ("at", "items", "user", "priority", "tenant")

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.COLUMNS}
        if not self.at.size or len(set(lengths.values())) > 1:
            raise DataError(f"a trace needs requests, each with {', '.join(self.COLUMNS)}; its columns hold {lengths}")
        if (np.diff(self.at) < 0).any() or not np.isfinite(self.at).all() or self.at[0] < 0 or self.items.min() < 1:
            raise DataError("a trace's requests come in order, from second 0, with at least 1 item each")
        for name, known in (("priority", self.priorities), ("tenant", self.tenants)):
            places = getattr(self, name)
            if places.min() < 0 or places.max() >= len(known):
                raise DataError(f"a trace's {name} is a place among {', '.join(map(repr, known))}, not {places.max()}")

    def __len__(self) -> int:
        return len(self.at)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return max(self.load.seconds, float(self.at[-1]))

    def candidates(self, place: int) -> Ints:
        """Ranks of the distinct items that a request asks about, 0 the most popular of the catalogue.

        A few items are asked about all the time and many hardly ever: over 10 look-ups an item of the catalogue, .4 % of the
        ids get half of them, where Meta's published embedding traces (dlrm_datasets, 2022) have .4 % with 39 %.
        """
        rng = np.random.default_rng((self.load.seed, place))
        n, size = int(self.items[place]), self.load.catalog
        if n >= size:
            return rng.permutation(size)[:n]
        found = np.unique(_zipf(size, 2 * n, rng))
        while len(found) < n:
            found = np.union1d(found, _zipf(size, 2 * n, rng))
        return rng.permutation(found)[:n]

    def scaled(self, factor: float) -> Arrivals:
        """The same requests, ``factor`` times as fast."""
        load = dataclasses.replace(self.load, rate=self.load.rate * factor, seconds=self.load.seconds / factor)
        return dataclasses.replace(self, at=self.at / factor, load=load)

    def burstiness(self) -> dict[str, float]:
        """How uneven the arrivals are.

        ``variation``: standard deviation of the gaps over their mean, 1 for Poisson. ``dispersion_10ms`` and ``dispersion_1s``:
        variance over mean of the counts in such windows, 1 for Poisson. ``peak``: the busiest second over the average one.
        """
        gaps = np.diff(self.at)
        found = {"variation": float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 0.0}
        for name, window in (("dispersion_10ms", 0.01), ("dispersion_1s", 1.0)):
            counts = np.bincount((self.at / window).astype(np.int64), minlength=max(1, int(self.seconds / window)))
            found[name] = float(counts.var() / counts.mean())
        found["peak"] = float(counts.max() / counts.mean())
        return found

    def describe(self) -> str:
        """The trace in two lines: how many, how large, how bursty."""
        b, p50, p95 = self.burstiness(), *np.percentile(self.items, [50, 95])
        top = np.sort(self.items)[-max(1, len(self) // 4) :].sum() / self.items.sum()
        rate = len(self) / self.seconds
        return (
            f"{len(self):,} requests in {self.seconds:g} s ({rate:.4g} a second), {self.load.kind}; items: mean "
            f"{self.items.mean():.4g}, p50 {p50:.0f}, p95 {p95:.0f}, the largest quarter has {top:.0%}\n"
            f"gaps vary by {b['variation']:.2f} (Poisson 1.00); counts by {b['dispersion_10ms']:.2f} in 10 ms and "
            f"{b['dispersion_1s']:.2f} in 1 s (Poisson 1.00); the busiest second has {b['peak']:.2f} times the average"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an Arrow file, or JSON lines where the name ends in ``.jsonl``.

        Raises:
            StorageError: it could not be written.
        """
        head = {"load": encode(self.load), "priorities": list(self.priorities), "tenants": list(self.tenants)}
        if str(path).endswith(".jsonl"):
            columns = [getattr(self, name).tolist() for name in self.COLUMNS]
            rows = (json.dumps(dict(zip(self.COLUMNS, row, strict=True))) for row in zip(*columns, strict=True))
            write(path, "\n".join([json.dumps(head), *rows]) + "\n")
            return
        table = pa.table({name: getattr(self, name) for name in self.COLUMNS}).replace_schema_metadata(
            {"trace": json.dumps(head)}
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        write(path, sink.getvalue().to_pybytes())

    @classmethod
    def load_from(cls, path: str | os.PathLike[str]) -> Arrivals:
        """Read a trace.

        Raises:
            DataError: the file is missing, or is no such trace.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; make a trace with Load(...).draw().save(path)"
            ) from error
        try:
            head, columns = _lines(data) if str(path).endswith(".jsonl") else _arrow(data)
            names = [tuple(decode(list[str], head[k], k)) for k in ("priorities", "tenants")]
            typed: Any = {k: np.asarray(columns[k], np.float64 if k == "at" else np.int64) for k in cls.COLUMNS}
            return cls(**typed, priorities=names[0], tenants=names[1], load=decode(Load, head["load"], "load"))
        except (ConfigError, DataError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a trace of arrivals: {error}; make one with Load(...).draw().save(path)") from error


def _lines(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    head, *rows = (json.loads(line) for line in data.decode().splitlines())
    return head, {name: [row[name] for row in rows] for name in Arrivals.COLUMNS}


def _arrow(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return json.loads((table.schema.metadata or {})[b"trace"]), {n: table.column(n).to_numpy() for n in Arrivals.COLUMNS}
