"""The way out: each target is written, opened again, asked what the bundle was asked, and kept only if it answers alike.

Two differences are measured on every probe. Against the packed layers' own arithmetic in eager PyTorch a target may differ by
``EXACT``, what sums in another order do. Against the bundle as it is served it may differ by more where that rounds the
inputs of int8 layers to 8 bits, which no target does: then ``ROUNDING`` of the mean score, on average, is allowed. A
target that fails is left out and says why in a line; the others stay. Files appear together in one step or not at all.

Comparing only one way was the alternative, and would either let an exporter's fault pass for rounding or call rounding a
fault. It costs a forward more.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pennyweight.accelerate.compile import EXACT, ROUNDING
from pennyweight.accelerate.runner import Runner
from pennyweight.core import hardware
from pennyweight.core.config import dumps, encode
from pennyweight.core.errors import ConfigError, DeviceError, PennyweightError, StorageError
from pennyweight.core.measure import interleaved
from pennyweight.data.catalog import Catalog
from pennyweight.export.graph import Answer, Graph, Input, graphs, reason
from pennyweight.export.probe import Batch
from pennyweight.export.targets import TARGETS, Arrived
from pennyweight.model.bundle import Bundle, swap
from pennyweight.model.placement import Placement

FORMAT = 1
CATALOG = 20_000_000
"""Bytes of vocabularies and items up to which they are written as JSON too."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was written."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Written:
    """A graph in a target, checked."""

    target: str
    graph: str
    files: tuple[File, ...]
    p50_ms: float
    """The largest probe, on one thread."""
    difference: float
    """Largest, over all probes and outputs, from what the bundle answers."""
    exact: float
    """Largest from the packed layers' own arithmetic in eager PyTorch."""
    runtime: str
    opset: str
    note: str

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(f.bytes for f in self.files)


@dataclasses.dataclass(frozen=True)
class Failed:
    """A graph that a target could not take, and why."""

    target: str
    graph: str
    reason: str

    def __str__(self) -> str:
        return f"{self.target}: not exported ({self.graph}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A graph that left: what it takes and gives, and what the bundle's own takes of time."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    rows: int
    """Of the probe that was timed."""
    p50_ms: float


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export wrote and what it could not, as ``export.json`` holds it."""

    factory: str
    bytes: int
    """Of the bundle's weights."""
    engine: str
    parts: tuple[Part, ...]
    written: tuple[Written, ...]
    failed: tuple[Failed, ...]
    tolerance: float = EXACT
    """Absolute and relative, for ``exact``."""
    rounding: float = ROUNDING
    """Share of the mean score that the mean difference from the bundle may be."""

    def allowed(self) -> str:
        """What the differences may be, in a sentence."""
        return (
            f"checked on batches of several sizes: within {self.tolerance:g} (absolute and relative) of the packed weights' "
            f"own arithmetic, and on average within {self.rounding:.0%} of the mean score of the bundle's answers, which round "
            "the inputs of large int8 layers"
        )


def export(
    bundle: Bundle,
    out: Path,
    targets: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
    data: Batch | None = None,
    seed: int = 0,
    seconds: float = 1.0,
) -> Export:
    """Write a bundle for other runtimes into a folder, replacing an older export there in one step.

    Args:
        bundle: what is to leave.
        out: the folder; ``export.json`` in it says what was written and measured.
        targets: names of ``TARGETS``; all that are installed if empty.
        allow: factories outside Pennyweight that may be imported.
        data: rows to check with; by default requests to the catalogue, or rows made up from the schema.
        seed: of the rows.
        seconds: of timing, for all targets together.

    Raises:
        ConfigError: a target is unknown.
        DeviceError: no target could be written; the message says why for each.
        DataError: nothing says what a batch looks like.
        StorageError: the folder could not be written; what was there is untouched.
    """
    names = _names(targets)
    if out.exists() and not (out / "export.json").is_file():
        raise StorageError(f"{out} exists and is not an export; name another folder or remove it first")
    here = bundle.replace(runtime=dataclasses.replace(bundle.runtime, threads=1), placement=Placement())
    with Runner(here, allow, fallback=True) as runner:
        leaving = graphs(bundle, runner, data, seed)
        with _folder(out) as folder:
            made = _made(bundle, runner, leaving, names, folder, seconds)
            if not made.written:
                raise DeviceError("nothing was exported: " + "; ".join(f"{f.target}: {f.reason}" for f in made.failed))
            _kept(folder, made, bundle)
            swap(folder, out)
    return made


def _names(targets: Sequence[str]) -> tuple[str, ...]:
    for name in targets:
        if name not in TARGETS:
            raise ConfigError(f"unknown target {name!r}; there are: {', '.join(TARGETS)}")
    return tuple(dict.fromkeys(targets)) or tuple(name for name, target in TARGETS.items() if not target.missing())


def _made(
    bundle: Bundle, runner: Runner, leaving: Sequence[Graph], names: Sequence[str], folder: Path, seconds: float
) -> Export:
    parts, written, failed = list[Part](), list[Written](), list[Failed]()
    for graph in leaving:
        there = list[tuple[Written, Arrived]]()
        for name in names:
            if not any(f.target == name for f in failed):
                found = _target(name, graph, folder)
                failed.append(found) if isinstance(found, Failed) else there.append(found)
        times = _timed(graph, [arrived for _, arrived in there], seconds / len(leaving))
        parts.append(Part(graph.name, graph.inputs, graph.outputs, len(graph.probes[-1][-1]), times[0]))
        written += [dataclasses.replace(w, p50_ms=ms) for (w, _), ms in zip(there, times[1:], strict=True)]
    return Export(bundle.model.spec.factory, bundle.bytes, runner.engine, tuple(parts), tuple(written), tuple(failed))


def _target(name: str, graph: Graph, folder: Path) -> tuple[Written, Arrived] | Failed:
    """A graph written for a target and checked, or why not, with nothing left behind."""
    before = set(folder.iterdir())
    try:
        if missing := TARGETS[name].missing():
            raise DeviceError(missing)
        arrived = TARGETS[name].write(graph, folder)
        difference, exact = _compared(graph, arrived)
    except Exception as error:  # whatever an exporter or a runtime raises
        for file in set(folder.iterdir()) - before:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"could not write {folder.parent}: {error.strerror}; free some room") from error
        return Failed(name, graph.name, str(error) if isinstance(error, PennyweightError) else reason(error))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    files = tuple(_file(f) for f in sorted(set(folder.iterdir()) - before))
    return Written(name, graph.name, files, 0.0, difference, exact, arrived.runtime, arrived.opset, arrived.note), arrived


def _file(path: Path) -> File:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _compared(graph: Graph, arrived: Arrived) -> tuple[float, float]:
    """Largest differences on all probes from what the bundle serves, and from its arithmetic without rounded inputs.

    Raises:
        DeviceError: they are larger than allowed, or the number of rows was frozen.
    """
    apart = exact = 0.0
    for at, probe in enumerate(graph.probes):
        answered, served = arrived.call(*probe), graph.served(at)
        for name, got, want, ours in zip(graph.outputs, answered, graph.answer(at), served, strict=True):
            if got.numel() != want.numel():
                raise DeviceError(f"it gives {name} of {_shape(got)} for {len(probe[0])} rows, where {_shape(want)} is right")
            got = got.reshape(want.shape)
            gap = (got - want).abs()
            if not bool((gap <= EXACT + EXACT * want.abs()).all()):
                raise DeviceError(f"its {name} differ by up to {gap.max():.3g}, where {EXACT:g} is allowed")
            served_gap = (got - ours).abs()
            if not float(served_gap.mean()) <= ROUNDING * float(ours.abs().mean()) + EXACT:
                raise DeviceError(
                    f"its {name} differ from the bundle's by {served_gap.mean():.3g} on average, where {ROUNDING:.0%} of their "
                    f"mean size, {ours.abs().mean():.3g}, is allowed"
                )
            apart, exact = max(apart, float(served_gap.max())), max(exact, float(gap.max()))
    return apart, exact


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _timed(graph: Graph, there: Sequence[Arrived], seconds: float) -> list[float]:
    """Median milliseconds of the largest probe, of the bundle first, called in turns on one thread."""
    last = len(graph.probes) - 1

    def asked(arrived: Arrived) -> Callable[[], Answer]:
        return lambda: arrived.call(*graph.probes[last])

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = [lambda: graph.served(last), *(asked(a) for a in there)]
        return [t.p50_ms for t in interleaved(calls, rounds=300, warmup=3, seconds=seconds)]
    finally:
        torch.set_num_threads(before)


class _folder:
    """A folder beside another, to be put in its place when all is there; gone in the end if it was not."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        except OSError as error:
            raise StorageError(f"could not write {self.out}: {error.strerror}; name another folder") from error
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _kept(folder: Path, made: Export, bundle: Bundle) -> None:
    """Put what belongs to the export as a whole into its folder."""
    try:
        said = {"format": FORMAT, "versions": hardware.versions(), "plan": list(bundle.plan), **encode(made)}
        (folder / "export.json").write_text(dumps(said))
        if bundle.catalog is not None and _size(bundle.catalog) <= CATALOG:
            (folder / "catalog.json").write_text(dumps(catalog(bundle.catalog)))
        folder.chmod(0o755)
    except OSError as error:
        raise StorageError(f"could not write {folder}: {error.strerror}; free some room or name another folder") from error


def _size(held: Catalog) -> int:
    values = sum(v.values.nbytes for v in held.vocabularies.values())
    return int(values + (0 if held.items is None else held.items.estimated_size()))


def catalog(held: Catalog) -> dict[str, Any]:
    """What a foreign runtime needs to make inputs of values: columns, vocabularies, and items with their features.

    The value at position ``i`` of a vocabulary has id ``i + 2``; 0 is padding, 1 an unknown value. A hashed vocabulary has
    ``buckets`` in place of values: an id is ``2 + xxh3_64(text) % (buckets - 2)``. ``items`` holds a list a column, all in
    the order of item ids.
    """
    items = {} if held.items is None else {name: held.items[name].to_list() for name in held.items.columns}
    return {
        "columns": [encode(c) for c in held.schema.columns],
        "vocabularies": {n: {"values": v.values.to_pylist(), "buckets": v.buckets} for n, v in held.vocabularies.items()},
        "items": items,
    }
