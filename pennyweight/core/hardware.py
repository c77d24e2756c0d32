"""What this machine has, and what that rules in and out.

Asked of the operating system, never assumed: cores and memory are the smallest of what is installed, what the process may
use (affinity) and what its control groups allow, since a container on a 64-core host with a quota of two cores is a 2-core
machine. A quota of 1.5 cores counts as one: a second thread would be stopped by the kernel for half of every period. The
alternative, ``os.cpu_count()``, is what makes libraries start 64 threads in such a container.

Cost: the answer is a snapshot; a quota changed later is not seen.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from pennyweight.core.errors import ConfigError

FEATURES = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
}  # fmt: skip
"""Instruction sets that change a decision here: the kernel's name -> ours."""

INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")
BF16 = ("avx512_bf16", "amx_bf16", "bf16")


@dataclasses.dataclass(frozen=True)
class Device:
    """One place that computes and holds memory."""

    name: str
    """``cpu`` or ``cuda:0``, as PyTorch calls it."""
    kind: Literal["cpu", "cuda"]
    cores: int
    """Cores this process may use; streaming multiprocessors of a GPU."""
    memory_bytes: int
    """Memory this process may use (all of it, not what is free just now)."""
    features: tuple[str, ...] = ()
    """Instruction sets, or ``sm_90`` and the like, that change a decision."""
    model: str = ""
    """The product's name."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A network as two numbers, alpha and beta (Hockney 1994): a fixed time for a message, and a rate for its bytes."""

    latency_us: float
    """A collective operation's fixed cost for each step it takes, in microseconds."""
    bytes_per_s: float
    """What one worker sends while it receives as much and its neighbours do the same."""

    def __post_init__(self) -> None:
        if not (
            math.isfinite(self.latency_us) and self.latency_us >= 0 and math.isfinite(self.bytes_per_s) and self.bytes_per_s > 0
        ):
            raise ConfigError(
                f"a link of {self.latency_us:g} us and {self.bytes_per_s:g} bytes/s: give 0 or more, and a rate above 0"
            )

    def seconds(self, bytes: float, steps: float = 1.0) -> float:
        """Time of a transfer of so many bytes in so many steps."""
        return steps * self.latency_us / 1e6 + bytes / self.bytes_per_s


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one worker does in a second; see ``distribute.calibrate`` for how it is measured."""

    flops: float
    """Dense fp32 operations (a multiply and an add are two)."""
    rows: float
    """Rows of a table found, without their bytes: what a lookup of a narrow row costs."""
    bytes: float
    """Bytes of rows or of weights that are read or written."""
    call_us: float = 0.0
    """One operation called on next to nothing, in microseconds."""
    ids: float = 1e7
    """Ids sorted and made distinct."""

    def __post_init__(self) -> None:
        if (
            not all(math.isfinite(v) and v > 0 for v in (self.flops, self.rows, self.bytes, self.ids))
            or not 0 <= self.call_us < math.inf
        ):
            raise ConfigError(f"rates are finite and above 0, got {self}")


@dataclasses.dataclass(frozen=True)
class Price:
    """What hardware costs; all 0 is no price."""

    host_hour: float = 0.0
    """A host for an hour, whatever it holds."""
    gb_hour: float = 0.0
    """A GB of memory held for an hour."""
    currency: str = "USD"

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v >= 0 for v in (self.host_hour, self.gb_hour)):
            raise ConfigError(
                f"prices are finite and not negative, got {self.host_hour:g} an hour, {self.gb_hour:g} a GB and hour"
            )


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a host, the CPU first, and how many hosts there are, all alike."""

    devices: tuple[Device, ...]
    hosts: int = 1
    workers: int = 1
    """Of each host. They share its CPU's cores and memory; where there are as many GPUs, each has one of its own."""
    inside: Link | None = None
    """Between workers of one host; None where it was not measured."""
    between: Link | None = None
    """From a worker to those of other hosts while all of its host do the same."""
    rates: Rates | None = None
    """What one worker does when it has a core (or a GPU) to itself."""
    price: Price = Price()

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.workers < 1:
            raise ConfigError(f"{self.hosts} hosts of {self.workers} workers: give 1 or more of each")

    @property
    def world(self) -> int:
        """Workers on all hosts."""
        return self.hosts * self.workers

    @property
    def worker_bytes(self) -> int:
        """Memory one worker may use: its GPU's, or its share of the host's."""
        if self.gpus and self.workers <= len(self.gpus):
            return min(g.memory_bytes for g in self.gpus)
        return self.cpu.memory_bytes // self.workers

    @property
    def crowding(self) -> float:
        """Workers for each core (or GPU) of a host, at least 1: how much longer each takes than one with a core to itself."""
        places = len(self.gpus) or self.cpu.cores
        return max(1.0, self.workers / places)

    @property
    def cpu(self) -> Device:
        """The host's processor; every topology has one."""
        return next(d for d in self.devices if d.kind == "cpu")

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The CUDA devices, in PyTorch's order; often none."""
        return tuple(d for d in self.devices if d.kind == "cuda")


@dataclasses.dataclass(frozen=True)
class Extra:
    """An optional part: what it would bring, and how to get it."""

    name: str
    brings: str
    installed: str
    """The version found, or empty."""
    remedy: str
    """The command that installs it, or what is wrong with the version found; empty when all is well."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing this machine allows or rules out."""

    allowed: bool
    text: str


def detect() -> Topology:
    """The devices this process may use: one CPU, and every CUDA device PyTorch sees."""
    cores, memory = limits()
    name, features = processor()
    cpu = Device("cpu", "cpu", cores, memory, features, name)
    return Topology((cpu, *(_gpu(i) for i in range(torch.cuda.device_count()))))


def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    capability = (f"sm_{found.major}{found.minor}",)
    return Device(f"cuda:{index}", "cuda", found.multi_processor_count, found.total_memory, capability, found.name)


def limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Cores and bytes of memory this process may use; the arguments say where its control groups are read."""
    cores, memory = _affinity(), psutil.virtual_memory().total
    for folder in _groups(groups, own):
        quota, period, limit = _quota(folder)
        if quota > 0 and period > 0:
            cores = min(cores, max(1, quota // period))
        if limit > 0:
            memory = min(memory, limit)
    return cores, memory


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The folders of our control groups up to the root: a limit of a parent binds as well. Version 2, then version 1."""
    names = [line.split(":", 2)[1:] for line in _text(own).splitlines() if line.count(":") >= 2]
    for controllers, path in names:
        for top in [root] if not controllers else [root / c for c in (controllers, *controllers.split(","))]:
            inner = top / path.strip("/")
            yield from (p for p in (inner, *inner.parents) if p == top or top in p.parents)


def _quota(folder: Path) -> tuple[int, int, int]:
    """CPU quota, its period, and the memory limit of a control group; 0 where there is none."""
    quota, period = (_text(folder / "cpu.max").split() or ["0", "0"])[:2]
    return (
        _number(quota) or _number(_text(folder / "cpu.cfs_quota_us")),
        _number(period) or _number(_text(folder / "cpu.cfs_period_us")),
        _number(_text(folder / "memory.max")) or _number(_text(folder / "memory.limit_in_bytes")),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """The CPU's name and those of its instruction sets that change a decision here."""
    fields: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), tuple(
        ours for theirs, ours in FEATURES.items() if theirs in flags
    )


def machine() -> dict[str, Any]:
    """What a result keeps about the machine: ``cpu``, ``cores``, ``memory`` (bytes), ``gpu`` (a name or None)."""
    topology = detect()
    gpus = [g.model for g in topology.gpus]
    return {
        "cpu": topology.cpu.model,
        "cores": topology.cpu.cores,
        "memory": topology.cpu.memory_bytes,
        "gpu": ", ".join(gpus) or None,
    }


def fingerprint() -> str:
    """What a measured choice of engines holds for: the processor, its cores, the GPUs, and PyTorch's version."""
    found = machine()
    return ", ".join(
        [found["cpu"], f"{found['cores']} cores", *([found["gpu"]] if found["gpu"] else []), f"torch {torch.__version__}"]
    )


def versions() -> dict[str, str]:
    """Versions that can change a result, of those packages that are installed."""
    names = ("pennyweight", "torch", "numpy", "polars", "pyarrow", "safetensors", "onnxruntime", "onnx", "keras", "torchrec")
    installed = {n: v for n in names if (v := _version(n))}
    # PyTorch's own word: its wheels' metadata may leave out which build it is (2.13.0 for 2.13.0+cu130).
    return {"python": platform.python_version(), **installed, "torch": torch.__version__}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


OPTIONAL: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("onnxruntime", ("onnxruntime", "onnx", "onnxscript"), "the onnxruntime engine, often 2x faster for one request",
     "pip install onnxruntime onnx onnxscript"),
    ("torchrec", ("torchrec", "fbgemm-gpu-cpu"), "tables sharded over many workers",
     "pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"),
    ("ray", ("ray",), "placing and restarting workers on a cluster", "pip install 'ray[train]'"),
    ("keras", ("keras",), "Keras 3 models on the torch backend", "pip install keras"),
    ("tensorflow", ("tf2onnx",), "TensorFlow SavedModels, read through ONNX", "pip install tensorflow-cpu tf2onnx"),
    ("faiss", ("faiss-cpu",), "candidates out of millions of items, 10x faster than exactly", "pip install faiss-cpu"),
    ("torchao", ("torchao",), "quantized dense layers on a GPU", "pip install torchao"),
    ("openvino", ("openvino",), "the openvino engine, often the fastest for int8 layers, and exports", "pip install openvino"),
    ("triton", ("triton",), "packed tables looked up by one kernel on a GPU", "comes with PyTorch's CUDA builds"),
    ("valkey", ("valkey",), "events shared by several services, in Valkey or Redis", "pip install valkey"),
)  # fmt: skip

TRIED = {"fbgemm-gpu-cpu": ("1.8.0", "2.13"), "torchrec": ("1.8.0", "2.13")}
"""Packages bound to one version of torch: the version that loads beside it (others fail with an undefined symbol)."""


def extras() -> list[Extra]:
    """Every optional part, found by its metadata (nothing is imported, so a broken one cannot break this)."""
    return [_extra(*row) for row in OPTIONAL]


def _extra(name: str, packages: Sequence[str], brings: str, install: str) -> Extra:
    found = {p: _version(p) for p in packages}
    missing = [p for p, v in found.items() if not v]
    if missing:
        partly = f"{', '.join(missing)} missing: " if len(missing) < len(found) else ""
        return Extra(name, brings, "", partly + install)
    wrong = [p for p, v in found.items() if p in TRIED and torch.__version__.startswith(TRIED[p][1]) and v != TRIED[p][0]]
    unfit = f"{wrong[0]} {found[wrong[0]]} does not load beside torch {torch.__version__}: {install}" if wrong else ""
    return Extra(name, brings, found[packages[0]], unfit)


def findings(topology: Topology) -> list[Finding]:
    """What the machine rules in and out, in sentences for a person."""
    cpu, gpus = topology.cpu, topology.gpus
    has = set(cpu.features)
    cxx = compiler()
    return [
        _either(bool(gpus), f"GPU: {', '.join(g.model for g in gpus)}", "no GPU: tables, training and serving stay on the CPU"),
        _either(
            bool(has & set(INT8)),
            f"int8 dense layers run on {', '.join(sorted(has & set(INT8)))}",
            "no int8 dot-product instructions (VNNI, AMX, dotprod): int8 dense layers save bytes, but may be slower than fp32",
        ),
        _either(
            bool(has & set(BF16)),
            f"bf16 arithmetic runs on {', '.join(sorted(has & set(BF16)))}",
            "no bf16 instructions: bf16 saves bytes, not time",
        ),
        _either(bool(cxx), f"torch.compile builds kernels with {cxx}", "no C++ compiler: no torch.compile; apt install g++"),
        _either(
            cpu.cores > 1,
            f"{cpu.cores} cores: measure the threads of one request, more is often slower on a busy machine",
            "one core: one thread a request, and training competes with serving",
        ),
    ]


def compiler() -> str:
    """The C++ compiler torch.compile would use for the CPU, or an empty text."""
    return next((c for c in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if c and shutil.which(c)), "")


def _either(allowed: bool, yes: str, no: str) -> Finding:
    return Finding(allowed, yes if allowed else no)
