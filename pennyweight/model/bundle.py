"""What is deployed: a model and three small frozen values, in a folder that is written whole or not at all.

    bundle/
      manifest.json          spec, placement, runtime, policy, the plan that made it, sizes and SHA-256 of every file
      weights.safetensors    the tensors, nothing else
      catalog/…              schema, vocabularies and the item catalogue (only for a recommender that serves)

Loading reads tensors and JSON; nothing is unpickled, no transform is replayed. Every file is checked against its
SHA-256 first, so a truncated or edited bundle gives one clear error instead of wrong answers. The same bundle saved
twice gives the same bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pennyweight.core.config import decode, encode
from pennyweight.core.curve import Curve
from pennyweight.core.errors import BundleError, ConfigError, StorageError
from pennyweight.data.catalog import Catalog
from pennyweight.model import conv, dense, hashed, residual, tables  # noqa: F401  (registers the layers a manifest may name)
from pennyweight.model.placement import Placement
from pennyweight.model.spec import Model, Spec

FORMAT = 1
WEIGHTS = "weights.safetensors"


Engine = Literal["eager", "fused", "onnxruntime", "openvino", "compile", "aot"]
"""Ways to run a module, the simplest first."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """How batches of up to ``rows`` rows are executed."""

    rows: int
    engine: Engine = "eager"
    threads: int = 0
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class Index:
    """How candidates are found among the items (``accelerate.index``)."""

    kind: Literal["exact", "ivf"] = "exact"
    """Every item scored, or inverted lists."""
    data_type: Literal["fp32", "fp16", "int8"] = "fp32"
    """How the items' vectors are held."""
    metric: Literal["inner product", "cosine"] = "inner product"
    lists: int = 0
    """Inverted lists; 0 is about four times the root of the items."""
    probes: int = 0
    """Lists looked into for each user; 0 is 32."""
    recall: float = 1.0
    """The share of the exact answers that was found where this was measured."""
    k: int = 0
    """The number of answers that was measured for; 0 where it was not."""

    def __post_init__(self) -> None:
        if min(self.lists, self.probes, self.k) < 0 or not 0 <= self.recall <= 1:
            raise ConfigError(f"an index has lists, probes and k from 0 and a recall of 0 to 1, got {self}")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How the model is executed."""

    engine: Engine = "eager"
    threads: int = 0
    """Threads inside one forward; 0 is the engine's own default (all cores)."""
    batch: int = 0
    """Rows scored in one forward; a larger request is cut. 0 is no limit."""
    shared: bool = False
    """Compute what depends on the user alone once a request, not once a candidate (``accelerate.factor``)."""
    buckets: tuple[Bucket, ...] = ()
    """Other settings for smaller batches, by rows ascending; a batch takes the first it fits in, else the fields above."""
    index: Index = Index()
    """How candidates are found."""
    hot_bytes: int = 0
    """Fast memory for the hot rows of tables that live on a slower level (``accelerate.cache``); 0 keeps none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What dense arithmetic is done in; bf16 by PyTorch's autocast, so only where PyTorch runs the model."""
    machine: str = ""
    """Where this was measured (``core.hardware.fingerprint``); empty where it was not. Elsewhere it is measured again."""

    def __post_init__(self) -> None:
        sizes = [b.rows for b in self.buckets]
        if sizes != sorted(set(sizes)) or any(rows < 1 for rows in sizes):
            raise ConfigError(f"buckets end at {', '.join(map(str, sizes))} rows; give sizes from 1, each larger than the last")

    def at(self, rows: int) -> Runtime:
        """The settings for a batch of so many rows, without buckets."""
        found = next((b for b in self.buckets if rows <= b.rows), None)
        chosen = (self.engine, self.threads, self.batch) if found is None else (found.engine, found.threads, found.batch)
        return dataclasses.replace(self, engine=chosen[0], threads=chosen[1], batch=chosen[2], buckets=())


@dataclasses.dataclass(frozen=True)
class Priority:
    """A class of requests; a policy lists its classes from the most important one."""

    name: str
    deadline_ms: float = 0.0
    """Its requests are answered within this time or refused; 0 is the policy's."""
    share: float = 0.8
    """One is admitted if all ahead of it will be done within this share of its time: the smaller, the earlier it is shed."""
    degrade: bool = False
    """Whether variants that are not proven within the margin may answer it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.deadline_ms) and self.deadline_ms >= 0 and 0 < self.share <= 1):
            raise ConfigError(
                f"class {self.name!r}: deadline_ms {self.deadline_ms:g} and share {self.share:g}; give 0 or more milliseconds, "
                "and a share above 0 and at most 1"
            )


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Somebody who asks, and how much of the devices is theirs; the name ``*`` stands for each who has no line."""

    name: str
    quota: float
    """Milliseconds of device time a second: 1000 is one device, always."""
    burst_s: float = 1.0
    """Seconds of quota that may be saved up and spent at once."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in (self.quota, self.burst_s)):
            raise ConfigError(
                f"tenant {self.name!r}: quota {self.quota:g} and burst_s {self.burst_s:g}; both must be finite and above 0"
            )


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that can answer; a policy lists its variants from the best to the cheapest."""

    name: str
    folder: str = ""
    """Its bundle, seen from the folder of this one; empty is this bundle itself."""
    gap: float = 0.0
    """What it loses against the best in the policy's metric: the upper 95 % bound of the proof, not the estimate."""
    within: bool = True
    """Whether that is proven to lie within the margin; one that is not serves only those who allow it."""
    batch: int = 0
    """Requests joined into one forward at most, by its profile; 0 is the policy's."""
    costs: Mapping[str, Curve] = dataclasses.field(default_factory=dict, hash=False)
    """What its work takes on each device, as profiled; where nothing is known it is learned from the first answers."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How requests are queued, joined and limited, and by which models they may be answered."""

    batch: int = 1
    """Requests joined into one forward at most."""
    wait_ms: float = 0.0
    """How long the first request of a batch waits for others."""
    queue: int = 1000
    """Requests that may wait; one more is refused with 429."""
    deadline_ms: float = 1000.0
    """A request is answered within this time or refused with 429."""
    candidates: int = 10_000
    """Items one request may ask to be scored; more is refused with 413."""
    classes: tuple[Priority, ...] = ()
    """Classes of requests, the most important first; empty is one class for all."""
    tenants: tuple[Tenant, ...] = ()
    """Who may use how much; empty is no quota for anybody."""
    variants: tuple[Variant, ...] = ()
    """Models that may answer, the best first; empty is this bundle alone."""
    metric: str = ""
    """What the variants' gaps are measured in."""
    margin: float = 0.0
    """The gap that was allowed."""
    age_ms: float = 0.0
    """A class counts as due this much later than the one above it, so that it is overtaken no longer; 0 is its deadline."""
    hedge: float = 0.0
    """Share of the work that may be done twice, where a worker is much later than predicted; 0 is never."""

    def __post_init__(self) -> None:
        for what in ("classes", "tenants", "variants"):
            names = [entry.name for entry in getattr(self, what)]
            if len(set(names)) < len(names):
                raise ConfigError(f"{what} {', '.join(names)}: each name may stand once")
        if self.variants and not self.variants[0].within:
            raise ConfigError(
                f"the best variant, {self.variants[0].name!r}, is not within the margin; put first what is proven"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A model and how it is placed, run and queued; ``plan`` is the record of what made it."""

    model: Model
    catalog: Catalog | None = None
    placement: Placement = dataclasses.field(default_factory=Placement)
    runtime: Runtime = dataclasses.field(default_factory=Runtime)
    policy: Policy = dataclasses.field(default_factory=Policy)
    plan: tuple[Mapping[str, Any], ...] = ()

    def replace(self, **changes: Any) -> Bundle:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    @property
    def bytes(self) -> int:
        """Bytes of the weights file as ``save`` would write it: what must be shipped and loaded to score."""
        return len(safetensors.torch.save(_contiguous(self.model.state)))


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors fit for the file: on the CPU, dense, none sharing memory with another."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in sorted(state.items())}


def save(bundle: Bundle, path: str | os.PathLike[str]) -> Path:
    """Write a bundle to a folder, replacing an older one in one step.

    Raises:
        StorageError: the folder could not be written; an older bundle is untouched and nothing half-written stays.
    """
    target = Path(path)
    files = {"weights.safetensors": safetensors.torch.save(_contiguous(bundle.model.state))}
    if bundle.catalog is not None:
        files.update({f"catalog/{name}": data for name, data in bundle.catalog.files().items()})
    manifest = {
        "format": FORMAT,
        "spec": encode(bundle.model.spec, slim=True),
        "placement": encode(bundle.placement, slim=True),
        "runtime": encode(bundle.runtime, slim=True),
        "policy": encode(bundle.policy, slim=True),
        "plan": encode(bundle.plan),
        "files": {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in sorted(files.items())},
    }
    if target.exists() and not (target / "manifest.json").is_file():
        raise StorageError(f"{target} exists and is not a bundle; name another folder or remove it first")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for name, data in {**files, "manifest.json": _compact(manifest)}.items():
            _put(temporary / name, data)
        temporary.chmod(0o755)
        swap(temporary, target)
    except OSError as error:
        raise StorageError(
            f"could not write the bundle {target}: {error.strerror}; free some room or name another folder"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _compact(manifest: Mapping[str, Any]) -> bytes:
    """JSON without a space: it is loaded to score, and of a small model it is a part worth counting."""
    return json.dumps(manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def swap(new: Path, target: Path) -> None:
    """Put ``new`` at ``target``; where one stands already the two change places in one step of the file system."""
    if not target.exists():
        os.rename(new, target)
        return
    exchange, here = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of linux/fs.h and fcntl.h
    try:
        done = ctypes.CDLL(None, use_errno=True).renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0
    except AttributeError:  # no renameat2 outside Linux: two renames, the older bundle put back if the second fails
        done = False
    if not done:
        aside = new.with_name(new.name + ".old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def load(path: str | os.PathLike[str], *, mapped: bool | None = None) -> Bundle:
    """Read a bundle; its factory is checked when the module is built, not here.

    With ``mapped`` the weights stay on disk and are mapped: what is used comes into memory, so a model larger than it serves.
    Where nothing is said, they are mapped if the placement keeps a table on disk.

    Raises:
        BundleError: no bundle there, a file missing, truncated or changed, or written by another format.
    """
    root = Path(path)
    manifest = _manifest(root)
    mapped = "disk" in str(manifest.get("placement")) if mapped is None else mapped
    whole = {name: want for name, want in manifest["files"].items() if not (mapped and name == WEIGHTS)}
    contents = {name: _checked(root, name, want) for name, want in whole.items()}
    try:
        state = _mapped(root, manifest["files"][WEIGHTS]) if mapped else safetensors.torch.load(contents.pop(WEIGHTS))
    except (KeyError, safetensors.SafetensorError) as error:
        raise BundleError(f"{root}/weights.safetensors cannot be read: {error}") from error
    catalog = {name.removeprefix("catalog/"): data for name, data in contents.items() if name.startswith("catalog/")}
    try:
        return Bundle(
            model=Model(decode(Spec, manifest["spec"], "spec"), state),
            catalog=Catalog.parse(catalog) if catalog else None,
            placement=decode(Placement, manifest["placement"], "placement"),
            runtime=decode(Runtime, manifest["runtime"], "runtime"),
            policy=decode(Policy, manifest["policy"], "policy"),
            plan=tuple(manifest["plan"]),
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise BundleError(f"{root}/manifest.json: {error}") from error


def _manifest(root: Path) -> dict[str, Any]:
    file = root / "manifest.json"
    if not file.is_file():
        raise BundleError(f"{root} holds no bundle (no manifest.json); train one with: pennyweight train")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise BundleError(f"{file} is not JSON ({error}); the bundle is damaged, save it again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "format" not in manifest:
        raise BundleError(f"{file} is not a manifest of Pennyweight's")
    if manifest["format"] != FORMAT:
        raise BundleError(f"{root} has format {manifest['format']}; this version reads format {FORMAT}")
    return manifest


def _mapped(root: Path, want: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the weights file in memory mapped from it, the file checked a block at a time."""
    file = root / WEIGHTS
    try:
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
            size = opened.tell()
            opened.seek(0)
            start = 8 + int.from_bytes(opened.read(8), "little")
            header = opened.read(start - 8) if found == want.get("sha256") else b""
    except OSError as error:
        raise BundleError(
            f"{file} cannot be read: {error.strerror}; the bundle is incomplete, copy or save it again"
        ) from error
    if not header:
        raise BundleError(f"{file} does not match its SHA-256: truncated, damaged or changed, copy it again")
    every = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    told = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
    return {name: _tensor(every[start:], about) for name, about in told.items()}


def _tensor(data: Tensor, about: Mapping[str, Any]) -> Tensor:
    (begin, end), kind = about["data_offsets"], safetensors.torch._getdtype(about["dtype"])
    part = data[begin:end]
    if part.storage_offset() % kind.itemsize or begin == end:  # no number may begin there, and a view of nothing has no type
        return part.clone().view(kind).reshape(about["shape"])
    tensor = part.view(kind).reshape(about["shape"])
    tensor.mapped = True  # type: ignore[attr-defined]  # what is on disk already need not be put there
    return tensor


def _checked(root: Path, name: str, want: Mapping[str, Any]) -> bytes:
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise BundleError(f"{root}/manifest.json names a file outside the bundle: {name}")
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{root}/{name} cannot be read: {error.strerror}; the bundle is incomplete, copy or save it again"
        ) from error
    if len(data) != want.get("bytes"):
        raise BundleError(
            f"{root}/{name} has {len(data)} bytes, the manifest says {want.get('bytes')}: truncated or changed, copy it again"
        )
    if hashlib.sha256(data).hexdigest() != want.get("sha256"):
        raise BundleError(f"{root}/{name} does not match its SHA-256: damaged or changed, copy it again")
    return data
