"""The state of a training by many workers, on disk: each writes its part while the training goes on, any number reads it.

    checkpoint/
      step-7/                  one folder a checkpoint, under this name only when it is whole
        shard-….safetensors    by ``torch.distributed.checkpoint``: blocks of tables with their offsets, the rest once
        state.json             where the training is, and whose it is

A save copies this worker's tensors and returns; a thread writes the copy, over a process group of its own. Only when all have
written is the folder renamed, by rank 0, and the one before removed. So a worker killed, or a disk that fills up, in the middle
of a save leaves the checkpoint before; the training goes on and tries again at the next one.

Where memory is short (``lean``) nothing is copied: what is written goes from the tensors to the file while the training waits,
and what is read goes into them a few megabytes at a time.

What is stored knows no workers: tables are whole tables, of which each block says where it lies. Reading asks for the blocks of
the placement there is then. The files are safetensors (the checkpoint package's other format is a pickle).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY, _gen_file_name, _HFStorageInfo
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as write_checkpoint
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pennyweight.core.config import write
from pennyweight.core.errors import ConfigError, StorageError
from pennyweight.distribute.shard import Held
from pennyweight.distribute.wide import Part

STATE = "state.json"
PIECE = 8 << 20
"""Bytes read at once."""
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAMED = {name: data_type for data_type, name in _TYPES.items()}
Stored = tuple[torch.dtype, npt.NDArray[Any]]
"""A tensor in a file: its type, and its numbers as whole numbers of as many bytes."""
_KINDS = ("module.", "best.", "optimizer.", "tables.")


class Block(Tensor):
    """A block of a larger tensor, as ``torch.distributed.checkpoint`` asks for one."""

    local: Tensor
    offsets: tuple[int, ...]

    @staticmethod
    def __new__(cls, local: Tensor, size: Sequence[int], offsets: Sequence[int]) -> Block:
        """The block ``local`` at these offsets of a tensor of this size."""
        made: Block = torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=local.dtype)
        made.local, made.offsets = local, tuple(offsets)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """No operator takes a block for the whole."""
        raise NotImplementedError(f"{func} of a block of a tensor")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """The block, if it holds anything."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, None, TensorWriteData(chunk, properties, self.size())
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Where it lies."""
        if not self.local.numel():
            return []
        return [ChunkStorageMetadata(torch.Size(self.offsets), self.local.size())]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Its numbers."""
        return self.local


class _Writer(HuggingFaceStorageWriter):
    """Writes tensors from where they lie; the package's own makes a file in memory first."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One safetensors file with this worker's tensors."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        name = _gen_file_name(1, 1, plan.storage_data["shard_index"])
        tensors = [planner.resolve_data(item).detach().contiguous() for item in plan.items]  # type: ignore[union-attr]
        ends = [*itertools.accumulate(t.numel() * t.element_size() for t in tensors)]
        head: dict[str, Any] = {}
        offsets = {}
        for item, tensor, end in zip(plan.items, tensors, ends, strict=True):
            place = [end - tensor.numel() * tensor.element_size(), end]
            head[item.index.fqn] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.index.offset or [0] * tensor.dim())}
        head["__metadata__"] = {CUSTOM_METADATA_KEY: json.dumps(offsets)}
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with open(Path(self.path) / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        starts = [8 + len(text) + head[i.index.fqn]["data_offsets"][0] for i in plan.items]
        sizes = [t.numel() * t.element_size() for t in tensors]
        done.set_result(
            [WriteResult(i.index, n, _StorageInfo(name, at, n)) for i, n, at in zip(plan.items, sizes, starts, strict=True)]
        )
        return done


class _Reader(HuggingFaceStorageReader):
    """Reads some rows at a time; the package's own maps a file so that it counts as memory taken, and reads all of it."""

    def read_metadata(self) -> Metadata:
        """What lies where, from the heads of all files."""
        tensors: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, _HFStorageInfo] = {}
        for path in sorted(Path(self.path).glob("*.safetensors")):
            head, _ = _head(path)
            blocks = json.loads(head.pop("__metadata__")[CUSTOM_METADATA_KEY])
            for name, entry in head.items():
                data_type, shape = _NAMED[entry["dtype"]], torch.Size(entry["shape"])
                block = ChunkStorageMetadata(torch.Size(blocks[name][SAVED_OFFSETS_KEY]), shape)
                one = tensors.setdefault(name, TensorStorageMetadata(TensorProperties(data_type), shape, []))
                one.chunks.append(block)
                one.size = torch.Size(max(n, o + m) for n, o, m in zip(one.size, block.offsets, shape, strict=True))
                places[MetadataIndex(name, block.offsets)] = _HFStorageInfo(str(path), shape, data_type)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))  # type: ignore[arg-type]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """The blocks that were planned, file by file."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for path, items in files.items():
            stored = _mapped(Path(path))
            for item in items:
                self._process_read_request(stored, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _process_read_request(self, f: Mapping[str, Stored], req: ReadItem, planner: LoadPlanner) -> None:
        data_type, stored = f[req.storage_index.fqn]
        target = planner.resolve_tensor(req).detach()
        (first, *rest), (count, *sizes) = req.storage_offsets, req.lengths
        inner = tuple(slice(o, o + n) for o, n in zip(rest, sizes, strict=True))
        step = max(1, PIECE // max(1, math.prod(sizes) * target.element_size()))
        for at in range(0, count, step):
            stop = min(at + step, count)
            rows = np.array(stored[(slice(first + at, first + stop), *inner)])
            target[at:stop] = torch.from_numpy(rows).view(data_type)
        planner.commit_tensor(req, target)


def _mapped(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, as whole numbers of their size, mapped to be read only."""
    head, begin = _head(path)
    found: dict[str, Stored] = {}
    for name, entry in head.items():
        if name != "__metadata__":
            data_type, (start, stop) = _NAMED[entry["dtype"]], entry["data_offsets"]
            whole = np.dtype(f"<i{data_type.itemsize}")
            if stop - start != math.prod(entry["shape"]) * whole.itemsize:
                raise ValueError(f"{path}: {name} is not as long as its shape says")
            shape = tuple(entry["shape"])
            empty = not math.prod(shape)
            found[name] = (data_type, np.empty(shape, whole) if empty else np.memmap(path, whole, "r", begin + start, shape))
    return found


def _head(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's own description of its tensors, and where their numbers begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head: dict[str, Any] = json.loads(file.read(size))
    return head, 8 + size


class Folder:
    """Where workers keep the state of a training.

    Args:
        path: the folder, the same on all workers (on several hosts: a shared one).
        held: tables and cut layers by the names of their parameters in the module's state.
        group: of all ranks, used for nothing else.
        lean: nothing is copied, and a save is done when it returns.
    """

    def __init__(self, path: Path, held: Mapping[str, Held | Part], group: dist.ProcessGroup, lean: bool = False) -> None:
        self.path, self.held, self.group, self.lean = path, held, group, lean
        self.rank = dist.get_rank(group)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.pending: concurrent.futures.Future[None] | None = None
        self.number = newest(path)

    def __str__(self) -> str:
        return str(self.path)

    def save(self, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        """Copy this worker's tensors (lean: not), and write them while the training goes on, after those of the save before."""
        self.wait()
        scalars = [k for k, t in tensors.items() if not t.dim()]
        given = {k: t.detach().reshape(t.shape or (1,)).contiguous() for k, t in tensors.items()}
        if not self.lean:
            given = {k: t.clone() if t.data_ptr() == tensors[k].data_ptr() else t for k, t in given.items()}
        state = {k: self._block(k, t) for k, t in given.items()}
        self.number += 1
        told = {**notes, "scalars": json.dumps(scalars), "workers": str(dist.get_world_size(self.group))}
        self.pending = self.thread.submit(self._write, self.number, state, told)
        if self.lean:
            self.wait()

    def wait(self) -> StorageError | None:
        """Until the last save is on disk, or has failed, which is said and is no reason to stop."""
        pending, self.pending = self.pending, None
        failed = None if pending is None else pending.exception()
        if failed is None:
            return None
        said = str(failed).strip().splitlines()[-1][:300]
        error = StorageError(
            f"{self.path}/step-{self.number} was not written, the checkpoint before stays ({said}); free some room"
        )
        if self.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return error

    def load(self, into: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
        """This worker's part of the last whole checkpoint, if there is one; in ``into`` as far as tensors are there.

        Raises:
            ConfigError: it is damaged, or of tables of other shapes.
        """
        if self.path.is_file():
            raise ConfigError(f"checkpoint {self.path} is of a training by one worker; go on with --workers 1, or remove it")
        whole = _whole(self.path)
        if not whole:
            return None
        folder = whole[-1][1]
        try:
            notes: dict[str, str] = json.loads((folder / STATE).read_bytes())
            with _quiet():
                reader = _Reader(str(folder))
                found = reader.read_metadata().state_dict_metadata
                ready = {k: t.detach() for k, t in (into or {}).items() if t.dim()}
                local = {k: self._into(ready.get(k), k, m.size, m.properties.dtype) for k, m in found.items()}  # type: ignore[union-attr]
                read_checkpoint(
                    {k: self._block(k, t) for k, t in local.items()}, storage_reader=reader, process_group=self.group
                )
            scalars = json.loads(notes["scalars"])
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, CheckpointException, safetensors.SafetensorError) as error:
            said = str(error).strip().splitlines()[-1][:300]
            raise ConfigError(f"checkpoint {folder} cannot be read ({said}); remove it to go on from the one before") from error
        return {k: t.reshape(()) if k in scalars else t for k, t in local.items()}, notes

    def _write(self, number: int, state: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        part = self.path / f"step-{number}.part"
        if self.rank == 0:
            with contextlib.suppress(OSError):  # if it cannot be made, writing to it says so
                for old in self.path.glob("step-*.part"):
                    shutil.rmtree(old, ignore_errors=True)
                part.mkdir(parents=True, exist_ok=True)
        dist.barrier(group=self.group)  # or another worker's folder would be taken for an old one
        with _quiet():
            write_checkpoint(dict(state), storage_writer=_Writer(str(part), save_distributed=True), process_group=self.group)
        done = torch.zeros(1)
        if self.rank == 0:
            with contextlib.suppress(OSError):
                write(part / STATE, json.dumps(notes))
                os.rename(part, self.path / f"step-{number}")
                done += 1
        dist.broadcast(done, 0, group=self.group)
        if not done:
            raise OSError("the folder could not be finished")
        if self.rank == 0:
            for _, old in _whole(self.path)[:-1]:
                shutil.rmtree(old, ignore_errors=True)

    def _cut(self, key: str) -> Held | Part | None:
        """The cut table that a tensor of the state goes with."""
        kind = next((k for k in _KINDS if key.startswith(k)), None)
        if kind is None:
            return None
        name = key.removeprefix(kind)
        name = name if kind in ("module.", "best.") else name.rpartition(".")[0]
        each = self.held.get(name)
        return each if each is not None and each.shard is not None else None

    def _block(self, key: str, local: Tensor) -> Tensor:
        each = self._cut(key)
        if each is None or local.shape[0] != each.mine.rows[1] - each.mine.rows[0] or key.endswith(".step"):
            return local
        (r0, _), (c0, _) = each.mine.rows, each.mine.columns
        if local.dim() == 1:
            return Block(local, each.shape[:1], (r0,))
        return Block(local, each.shape, (r0, c0))

    def _into(self, ready: Tensor | None, key: str, size: Sequence[int], data_type: torch.dtype) -> Tensor:
        """Where a tensor of the checkpoint, or this worker's block of it, is read to."""
        each = self._cut(key)
        if each is None or key.endswith(".step"):
            fits = ready is not None and ready.shape == torch.Size(size)
            return ready if ready is not None and fits else torch.empty(tuple(size), dtype=data_type)
        if tuple(size) != each.shape[: len(size)]:
            raise ConfigError(f"{key} is {tuple(size)} in the checkpoint and {each.shape} in the model; it is of another model")
        (r0, r1), (c0, c1) = each.mine.rows, each.mine.columns
        return torch.empty((r1 - r0, c1 - c0)[: len(size)], dtype=data_type) if ready is None else ready


def _whole(path: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, oldest first."""
    names = [p for p in path.glob("step-*") if p.suffix != ".part" and (p / STATE).is_file()]
    return sorted((int(p.name.removeprefix("step-")), p) for p in names)


def newest(path: Path) -> int:
    """The number of the last whole checkpoint in a folder; 0 where there is none."""
    return max((n for n, _ in _whole(path)), default=0)


def whole(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors of the last whole checkpoint in a folder, and its notes, for a process by itself."""
    folder = _whole(path)[-1][1]
    notes: dict[str, str] = json.loads((folder / STATE).read_bytes())
    with _quiet():
        reader = _Reader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in found.items()}  # type: ignore[union-attr]
        read_checkpoint(state, storage_reader=reader, no_dist=True)
    scalars = json.loads(notes["scalars"])
    return {k: t.reshape(()) if k in scalars else t for k, t in state.items()}, notes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package warns of what is done on purpose, and logs at length."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
