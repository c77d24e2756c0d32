"""The best items for a user, out of millions: exact by one blocked product, or approximate by inverted lists.

*Exact* is a matrix product in blocks that stay in a core's cache, and a selection that looks at few numbers: the best k items
lie in the k groups with the highest maxima, so a block of 4096 scores costs one pass for maxima and a sort of what beats the
k-th best so far. For a batch of users it is several times faster than FAISS' flat index, and it is what approximate search
is compared with here. It needs nothing but PyTorch and always works.

*Inverted lists* (``ivf``, FAISS; Jegou et al. 2011) put items into lists around centroids and look into a few lists a user.
What is asked for is the largest inner product, and FAISS ranks lists by their centroids', which misses the long vector in a
list of short ones. Here items are assigned by distance and lists are ranked by the centroid's direction times the *longest*
vector in the list, the most an item there could score along it: on generated vectors as clustered as Gowalla's,
.994 of the best 100 lie in the first 32 of 4096 lists so, .979 by centroids. HNSW was the alternative: as fast, but hours to
build for ten million items, and twice the memory.

Items somebody has seen are left out inside the search, so that k are found whenever k are left. Vectors are fp32, fp16 or
int8, a scale a row (exact) or a range a dimension (FAISS); what that and the lists lose is one number, recall against exact
on the user's own vectors, which ``choose`` measures and the bundle keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PlanError
from pennyweight.core.measure import interleaved
from pennyweight.model.bundle import Bundle, Index
from pennyweight.model.transform import Env, Transform

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
NONE: Ids = np.empty(0, np.int64)

BLOCK = 4096
"""Items scored at once: with 64 users the scores are 1 MB, a core's cache."""
GROUP = 32
"""Items whose maximum is looked at first."""
SMALL = 1 << 16
"""Items up to which all scores of a user are written down and sorted; of equals, the first wins."""
TRAIN = 64
"""Vectors a centroid is trained on."""
PAYS = 20_000
"""Items below which a search of lists is not tried: exact takes a fraction of a millisecond."""
FASTER = 1.5
"""What an approximate index must be faster by, to be worth what it loses."""


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Places of items in the vectors that were given, best first, and their scores; fewer than k where fewer are left."""

    places: Ids
    scores: Floats


class Searcher(Protocol):
    """What every index answers."""

    @property
    def bytes(self) -> int:
        """Bytes of vectors, codes, ids and centroids."""

    def search(self, queries: Floats, k: int, hidden: Sequence[Ids] = ()) -> list[Found]:
        """The best k items of each query [Q, D]; ``hidden`` holds for each query the places to leave out."""


def build(vectors: Floats, index: Index = Index(), *, threads: int = 0, seed: int = 0) -> Searcher:  # noqa: B008
    """A searcher over item vectors [N, D].

    Raises:
        DataError: vectors are not finite, or not a matrix.
        DeviceError: the index needs FAISS and it is not installed.
    """
    if vectors.ndim != 2 or not vectors.size:
        raise DataError(f"item vectors are a matrix [items, dim], got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise DataError(f"{np.sum(~np.isfinite(vectors)):,} of {vectors.size:,} numbers of items' vectors are not finite")
    given = np.ascontiguousarray(_unit(vectors) if index.metric == "cosine" else vectors, np.float32)
    if index.kind == "exact":
        return Exact(given, index, threads)
    return Lists(given, index, threads, seed)


def opened(vectors: Floats, index: Index, *, threads: int = 0, seed: int = 0) -> tuple[Searcher, str]:
    """A searcher, exact where the index cannot be had, and the reason in that case."""
    try:
        return build(vectors, index, threads=threads, seed=seed), ""
    except DeviceError as error:
        note = f"{error}; retrieval is exact instead"
        log.warning(note)
        return build(vectors, Index(metric=index.metric), threads=threads), note


class Exact:
    """Every item is scored; vectors fp32, fp16 or int8 with a scale a row."""

    def __init__(self, vectors: Floats, index: Index, threads: int = 0) -> None:
        self.index, self.threads = index, threads
        self._vectors, self._scale = _stored(torch.from_numpy(vectors), index.data_type)

    @property
    def bytes(self) -> int:
        """Bytes of vectors and scales."""
        return self._vectors.nbytes + (0 if self._scale is None else self._scale.nbytes)

    def search(self, queries: Floats, k: int, hidden: Sequence[Ids] = ()) -> list[Found]:
        """The best k items of each query [Q, D], in the order of their scores."""
        asked = torch.from_numpy(_asked(queries, self._vectors.shape[1], self.index))
        with _threads(self.threads), torch.inference_mode():
            if len(self._vectors) <= SMALL:
                scores = (asked @ self._block(0, len(self._vectors)).T).numpy()
                return [best(row, k, out) for row, out in zip(scores, _each(hidden, len(asked)), strict=True)]
            values, places = self._blocked(asked, min(k, len(self._vectors)), hidden)
        return [_kept(p, v) for p, v in zip(places.numpy(), values.numpy(), strict=True)]

    def _block(self, start: int, stop: int) -> Tensor:
        part = self._vectors[start:stop]
        return part if self._scale is None and part.dtype == torch.float32 else _floats(part, self._scale, start, stop)

    def _blocked(self, asked: Tensor, k: int, hidden: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        rows, columns = _flat(hidden)
        values = torch.full((len(asked), k), -torch.inf)
        places = torch.zeros((len(asked), k), dtype=torch.int64)
        steps = torch.arange(GROUP)[:, None]
        for start in range(0, len(self._vectors), BLOCK):
            stop = min(start + BLOCK, len(self._vectors))
            scores = torch.full((len(asked), BLOCK), -torch.inf) if stop - start < BLOCK else torch.empty(len(asked), BLOCK)
            torch.mm(asked, self._block(start, stop).T, out=scores[:, : stop - start])
            low, high = np.searchsorted(columns, (start, stop))
            if high > low:
                scores[rows[low:high], columns[low:high] - start] = -torch.inf
            highest = scores.view(len(asked), GROUP, -1).amax(1)  # a group is every 128th: columns are summed up side by side
            live = int((highest > values[:, -1:]).sum(1).max())
            if not live:
                continue
            groups = highest.topk(min(k, live), 1, sorted=False).indices
            at = (groups[:, None, :] + steps * highest.shape[1]).flatten(1)
            values, order = torch.cat([values, scores.gather(1, at)], 1).topk(k, 1)
            places = torch.cat([places, at + start], 1).gather(1, order)
        return values, places


class Lists:
    """Inverted lists over FAISS' scalar quantizer, ranked by the most an item in them could score.

    Raises:
        DeviceError: FAISS is not installed.
    """

    def __init__(self, vectors: Floats, index: Index, threads: int = 0, seed: int = 0) -> None:
        if importlib.util.find_spec("faiss") is None:
            raise DeviceError("an index of kind 'ivf' needs FAISS: pip install faiss-cpu, or use an index of kind 'exact'")
        faiss: Any = importlib.import_module("faiss")
        self._faiss, self.index, self.threads = faiss, index, threads
        started, lists = time.perf_counter(), min(index.lists or usual(len(vectors)), len(vectors))
        centroids = _centroids(faiss, vectors, lists, seed)
        flat = faiss.IndexFlatL2(vectors.shape[1])
        flat.add(centroids)
        kinds = faiss.ScalarQuantizer
        kind = {"int8": kinds.QT_8bit, "fp16": kinds.QT_fp16}.get(index.data_type)
        self._ivf = (
            faiss.IndexIVFFlat(flat, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
            if kind is None
            else faiss.IndexIVFScalarQuantizer(flat, vectors.shape[1], lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        )
        self._ivf.train(_sample(vectors, SMALL, seed))
        assigned = self._filled(vectors, flat)
        sums, longest = _statistics(vectors, assigned, lists)
        self._routes = torch.from_numpy(_unit(sums) * longest[:, None])
        ranked = faiss.IndexFlatIP(vectors.shape[1])
        ranked.add(self._routes.numpy())
        self._ivf.quantizer, self._held = ranked, ranked  # FAISS keeps no reference
        self.build_s = time.perf_counter() - started
        """Seconds the lists took to build."""

    @property
    def bytes(self) -> int:
        """Bytes of codes, ids, centroids and routes."""
        return len(self) * (int(self._ivf.code_size) + 8) + 2 * self._routes.nbytes

    def __len__(self) -> int:
        return int(self._ivf.ntotal)

    def search(self, queries: Floats, k: int, hidden: Sequence[Ids] = ()) -> list[Found]:
        """The best k items of each query [Q, D] in the lists looked into; more lists where too few are found."""
        asked = _asked(queries, self._ivf.d, self.index)
        probes = min(self.index.probes or 32, len(self._routes))
        left = _each(hidden, len(asked))
        with _threads(self.threads), self._omp(), torch.inference_mode():
            found = self._probed(asked, k, left, probes)
            while probes < len(self._routes):
                wanted = [min(k, len(self) - len(np.unique(out))) for out in left]
                short = [n for n, f in enumerate(found) if len(f.places) < wanted[n]]
                if not short:
                    break
                probes = min(4 * probes, len(self._routes))
                again = self._probed(asked[short], k, [left[n] for n in short], probes)
                for n, f in zip(short, again, strict=True):
                    found[n] = f
        return found

    def _probed(self, asked: Floats, k: int, hidden: Sequence[Ids], probes: int) -> list[Found]:
        lists = (torch.from_numpy(asked) @ self._routes.T).topk(probes, 1, sorted=False).indices.numpy()
        none = np.zeros(lists.shape, np.float32)  # no residuals: the distance to a centroid is not a part of the score
        self._ivf.nprobe = probes
        if not any(len(out) for out in hidden):
            scores, places = self._ivf.search_preassigned(asked, k, lists, none)
            return [_kept(p, s) for p, s in zip(places, scores, strict=True)]
        return [self._one(asked[n : n + 1], k, hidden[n], probes) for n in range(len(asked))]

    def _one(self, asked: Floats, k: int, hidden: Ids, probes: int) -> Found:
        faiss = self._faiss
        out = faiss.IDSelectorBatch(hidden)
        scores, places = self._ivf.search(
            asked, k, params=faiss.SearchParametersIVF(sel=faiss.IDSelectorNot(out), nprobe=probes)
        )
        return _kept(places[0], scores[0])

    def _filled(self, vectors: Floats, flat: Any) -> Ids:
        assigned = np.empty(len(vectors), np.int64)
        for start in range(0, len(vectors), SMALL):
            part = vectors[start : start + SMALL]
            near = np.ascontiguousarray(flat.search(part, 1)[1][:, 0])
            self._ivf.add_core(len(part), self._faiss.swig_ptr(part), None, self._faiss.swig_ptr(near))
            assigned[start : start + len(part)] = near
        return assigned

    def _omp(self) -> _Setting:
        """FAISS' threads, which are OpenMP's and so of the whole process."""
        return _Setting(self._faiss.omp_get_max_threads, self._faiss.omp_set_num_threads, self.threads)


def usual(items: int) -> int:
    """Lists for so many items: about four times their root, as many as can be built in a few minutes."""
    return max(1, min(8192, 1 << round(float(np.log2(4 * items**0.5)))))


def best(scores: Floats, k: int, hidden: Ids = NONE) -> Found:
    """The k best finite scores but those at ``hidden``, whose scores are overwritten; of equals the first."""
    scores[hidden] = -np.inf
    count = min(k, int(np.isfinite(scores).sum()))
    places = np.argpartition(-scores, count - 1)[:count] if count else NONE
    places = places[np.argsort(-scores[places], kind="stable")]
    return Found(places, scores[places])


def recall(found: Sequence[Found], exact: Sequence[Found]) -> float:
    """The share of the exact answers that were found."""
    pairs = zip(found, exact, strict=True)
    hits = sum(len(np.intersect1d(f.places, e.places, assume_unique=True)) for f, e in pairs)
    return hits / max(1, sum(len(e.places) for e in exact))


# -- which index, measured ------------------------------------------------------------------------------------------------


@named("index")
@dataclasses.dataclass(frozen=True)
class SetIndex(Transform):
    """Find candidates by this index."""

    index: Index = Index()  # noqa: RUF009

    family: ClassVar[Literal["accelerate"]] = "accelerate"
    stage: ClassVar[Literal["runtime"]] = "runtime"

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with this index in its runtime; whether FAISS is installed is found on the machine that serves."""
        return bundle.replace(runtime=dataclasses.replace(bundle.runtime, index=self.index))

    def describe(self) -> str:
        """One plain sentence."""
        i = self.index
        if i.kind == "exact":
            return f"find candidates exactly, item vectors in {i.data_type}"
        lost = f", recall {i.recall:.4f} of exact" if i.recall < 1 else ""
        return f"find candidates in {i.probes or 'some'} of {i.lists or 'some'} lists, item vectors in {i.data_type}{lost}"


@dataclasses.dataclass(frozen=True)
class Tried:
    """One index that ``choose`` measured."""

    index: Index
    """With the recall that was measured."""
    ms: float
    """Milliseconds a query, the best of the turns."""
    bytes_item: float
    """Bytes an item."""
    build_s: float = 0.0
    note: str = ""


def choose(
    vectors: Floats,
    queries: Floats,
    *,
    k: int = 100,
    drop: float = 0.01,
    metric: Literal["inner product", "cosine"] = "inner product",
    batch: int = 1,
    seconds: float = 300.0,
    threads: int = 0,
    seed: int = 0,
) -> tuple[SetIndex, tuple[Tried, ...]]:
    """The fastest index whose recall@k against exact drops by at most ``drop`` on ``queries`` [Q, D], and all that was tried.

    For each data type the lists are built once and ever more of them looked into until the recall is reached. Half the
    queries choose and the other half judge: the recall in the result is that of queries it was not chosen on.

    Args:
        vectors: of the items [N, D].
        queries: of users as they will come, 64 or more.
        k: items found for each.
        drop: recall that may be lost, a share.
        metric: how vectors are compared.
        batch: queries searched at once.
        seconds: after which no further index is built.
        threads: of a search; 0 is every core.
        seed: of the centroids.

    Raises:
        PlanError: there are fewer than 2 queries.
    """
    if len(queries) < 2:
        raise PlanError(f"choosing an index needs queries to measure recall with, got {len(queries)}; give 64 or more")
    end = time.monotonic() + seconds
    plain = build(vectors, Index(metric=metric), threads=threads)
    answers = plain.search(queries, k)
    half = len(queries) // 2
    base = Tried(Index(metric=metric), _ms([plain], queries[:batch], k)[0], plain.bytes / len(vectors))
    tried, best = [base], base
    if len(vectors) >= PAYS:
        for data_type in ("int8", "fp16"):
            if time.monotonic() > end:
                tried.append(Tried(Index("ivf", data_type, metric=metric), 0.0, 0.0, note="not tried: the time was over"))
                continue
            try:
                lists = build(vectors, Index("ivf", data_type, metric, usual(len(vectors))), threads=threads, seed=seed)
            except DeviceError as error:
                tried.append(Tried(Index("ivf", data_type, metric=metric), 0.0, 0.0, note=str(error)))
                break
            assert isinstance(lists, Lists)
            for made in _widened(lists, plain, queries, answers, half, k, drop, batch):
                tried.append(made)
                if not made.note and made.ms * FASTER < base.ms and (best is base or made.ms < best.ms):
                    best = made
    return SetIndex(best.index), tuple(dataclasses.replace(t, note=t.note or ("chosen" if t is best else "")) for t in tried)


def _widened(
    lists: Lists, plain: Searcher, queries: Floats, answers: Sequence[Found], half: int, k: int, drop: float, batch: int
) -> Iterator[Tried]:
    """Ever more lists until recall is kept on the first half of the queries; the last is judged by the second half."""
    count = len(lists._routes)
    steps = [p for base in (4, 6) for e in range(12) if (p := base << e) <= count] or [count]
    for probes in sorted(steps):
        lists.index = dataclasses.replace(lists.index, probes=probes, lists=count)
        chosen_on = recall(lists.search(queries[:half], k), answers[:half])
        if chosen_on < 1 - drop and probes < max(steps):
            continue
        judged = recall(lists.search(queries[half:], k), answers[half:])
        _, ms = _ms([plain, lists], queries[:batch], k)
        note = "" if judged >= 1 - drop else f"recall {judged:.4f}, below the {1 - drop:.4f} asked for"
        index = dataclasses.replace(lists.index, recall=round(judged, 5), k=k)
        yield Tried(index, ms, lists.bytes / len(lists), lists.build_s, note)
        if not note:
            return


def _ms(searchers: Sequence[Searcher], queries: Floats, k: int) -> list[float]:
    calls = [functools.partial(s.search, queries, k) for s in searchers]
    return [t.p50_ms / len(queries) for t in interleaved(calls, rounds=200, warmup=1, seconds=2.0)]


# -- parts ---------------------------------------------------------------------------------------------------------------


def _stored(vectors: Tensor, data_type: str) -> tuple[Tensor, Tensor | None]:
    if data_type == "fp32":
        return vectors, None
    if data_type == "fp16":
        return vectors.half(), None
    scale = vectors.abs().amax(1).clamp_min(1e-12) / 127
    return torch.cat([(v / s[:, None]).round().to(torch.int8) for v, s in _pairs(vectors, scale)]), scale


def _pairs(vectors: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(
        torch.split(vectors, SMALL), torch.split(scale, SMALL), strict=True
    )  # in parts, or all is in memory once more as fp32


def _floats(part: Tensor, scale: Tensor | None, start: int, stop: int) -> Tensor:
    return part.float() if scale is None else part * scale[start:stop, None]


def _asked(queries: Floats, dim: int, index: Index) -> Floats:
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise DataError(f"queries are a matrix [queries, {dim}], got shape {queries.shape}")
    return np.ascontiguousarray(_unit(queries) if index.metric == "cosine" else queries, np.float32)


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _each(hidden: Sequence[Ids], count: int) -> Sequence[Ids]:
    if hidden and len(hidden) != count:
        raise ConfigError(f"{len(hidden)} lists of hidden items for {count} queries; give one a query, or none")
    return hidden or [NONE] * count


def _flat(hidden: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Queries and the places hidden from them, by place."""
    rows = np.repeat(np.arange(len(hidden)), [len(out) for out in hidden])
    columns = np.concatenate([*hidden, NONE])
    order = np.argsort(columns, kind="stable")
    return rows[order], columns[order]


def _kept(places: Ids, scores: Floats) -> Found:
    live = (places >= 0) & np.isfinite(scores)
    return Found(places[live], scores[live])


def _sample(vectors: Floats, count: int, seed: int) -> Floats:
    if count >= len(vectors):
        return vectors
    return vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), count, replace=False))]


def _centroids(faiss: Any, vectors: Floats, lists: int, seed: int) -> Floats:
    options = {"niter": 8, "seed": seed, "min_points_per_centroid": 1, "max_points_per_centroid": TRAIN}
    means = faiss.Kmeans(vectors.shape[1], lists, **options)
    means.train(_sample(vectors, lists * TRAIN, seed))
    centroids: Floats = means.centroids
    return centroids


def _statistics(vectors: Floats, assigned: Ids, lists: int) -> tuple[Floats, Floats]:
    """The sum [lists, D] of each list's vectors and the length [lists] of its longest."""
    sums, longest = torch.zeros(lists, vectors.shape[1]), torch.zeros(lists)
    for start in range(0, len(vectors), SMALL):
        part = torch.from_numpy(vectors[start : start + SMALL])
        at = torch.from_numpy(assigned[start : start + SMALL])
        sums.index_add_(0, at, part)
        longest.scatter_reduce_(0, at, part.norm(dim=1), "amax")
    return sums.numpy(), longest.numpy()


class _Setting:
    """In a ``with``: a number of the whole process set to another value; 0 leaves it as it is."""

    def __init__(self, read: Any, write: Any, value: int) -> None:
        self.read, self.write, self.value = read, write, value

    def __enter__(self) -> None:
        self.before = self.read()
        if self.value and self.value != self.before:
            self.write(self.value)

    def __exit__(self, *_: object) -> None:
        if self.value and self.value != self.before:
            self.write(self.before)


def _threads(count: int) -> _Setting:
    return _Setting(torch.get_num_threads, torch.set_num_threads, count)
