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
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from pennyweight.core.config import decode, encode
from pennyweight.core.errors import BundleError, ConfigError, StorageError
from pennyweight.data.catalog import Catalog
from pennyweight.model import conv, dense, hashed, residual, tables  # noqa: F401  (registers the layers a manifest may name)
from pennyweight.model.spec import Model, Spec

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which worker or device holds what."""

    world_size: int = 1
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Table path -> where it lives: ``cpu``, ``disk`` (memory-mapped) or ``cuda:0``; one not named is on ``cpu``."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How the model is executed."""

    engine: Literal["eager", "compile", "onnxruntime"] = "eager"
    threads: int = 0
    """Threads inside one forward; 0 is the engine's own default (all cores)."""
    batch: int = 0
    """Rows scored in one forward; a larger request is cut. 0 is no limit."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How requests are queued, joined and limited."""

    batch: int = 1
    """Requests joined into one forward at most."""
    wait_ms: float = 0.0
    """How long the first request of a batch waits for others."""
    queue: int = 1000
    """Requests that may wait; one more is refused with 429."""
    deadline_ms: float = 1000.0
    """A request not started by then is refused with 429."""
    candidates: int = 10_000
    """Items one request may ask to be scored; more is refused with 413."""


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


def load(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; its factory is checked when the module is built, not here.

    Raises:
        BundleError: no bundle there, a file missing, truncated or changed, or written by another format.
    """
    root = Path(path)
    manifest = _manifest(root)
    contents = {name: _checked(root, name, want) for name, want in manifest["files"].items()}
    try:
        state = safetensors.torch.load(contents.pop("weights.safetensors"))
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
