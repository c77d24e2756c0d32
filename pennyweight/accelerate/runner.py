"""A bundle, ready to score: built once, then called for every request.

The runner holds what a forward needs and nothing else: the module (or the engine made from it), the number of threads, and
where a request is cut. The measured path and the served path are this one class, so a time or a quality that was measured
is the one that is served.

A runtime may name another engine for each size of batch, and may say that requests share work: then a batch whose user columns
are one row repeated (stride 0) is scored in the parts of ``accelerate.factor``, and where the catalogue's items were
``kept``, by their ids alone. A runtime measured on another machine is not trusted: eager runs, and ``note`` says so.

Threads are a setting of the whole process in PyTorch. The runner sets its own for the length of a call and puts the former
number back (0.4 µs in all), so two runners measured in turns, or a training loop beside them, do not disturb each other.
It serves one caller at a time: a service with several workers opens a runner in each. All it adds to a forward is 8 µs.

Tables placed on ``disk`` are copied once to a file without a name and mapped from there, so that the kernel keeps only the
rows in use in memory. They leave memory when the bundle they came from does: the runner keeps no reference to it.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pennyweight.accelerate.cache import keep_hot
from pennyweight.accelerate.compile import Maker, Scorer, eager, make
from pennyweight.accelerate.factor import Shared, factor, repeated
from pennyweight.core import hardware, memory
from pennyweight.core.config import decode
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Runtime
from pennyweight.model.layers import height
from pennyweight.model.placement import Placement
from pennyweight.model.spec import Batch, Model, replace

log = logging.getLogger(__name__)

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
ROOM = 0.25
"""Share of the memory that what is kept of items may take."""


class Runner:
    """Scores batches with a bundle as its runtime and placement say.

    An engine other than eager is made at construction when there is a ``probe`` batch, else by the first call. With
    ``fallback`` an engine that cannot be had is replaced by eager: ``engine`` says what runs and ``note`` why. ``maker``
    stands in for ``compile.make`` where several runners share an export.

    Raises:
        ConfigError: the bundle's factory is not allowed or not there.
        DeviceError: a device or an engine is not there, or the engine cannot run this model.
    """

    def __init__(
        self,
        bundle: Bundle,
        allow: Sequence[str] = (),
        *,
        probe: Batch | None = None,
        fallback: bool = False,
        maker: Maker = make,
    ) -> None:
        self._memory = contextlib.ExitStack()
        self._memory.enter_context(memory.kept())  # or each large batch is faulted in anew, page by page
        self.note = ""
        """Why eager runs instead of the engine that was asked for; empty when all is well."""
        self.runtime = self._trusted(bundle.runtime)
        self.home = _home(bundle.placement)
        """The device of the dense layers."""
        self.module = _placed(bundle.model, bundle.placement, self.home, allow)
        self.hot = keep_hot(self.module, bundle.placement.tables, self.home, self.runtime.hot_bytes)
        """Tables with a part of their rows near the compute, by path; ``cache.hit_rate`` says how often that was enough."""
        self._inputs = bundle.model.spec.inputs
        self._fallback, self._maker = fallback, maker
        self._scorers: dict[tuple[str, int], Scorer] = {}
        self._roles, self._item = _roles(bundle)
        self.shared: Shared | None = None
        """The model in parts, once a runtime that shares work has seen a request."""
        self._kept: Shared | None = None
        self._unshared = not self.runtime.shared or self.home != "cpu"
        self._ends = [b.rows for b in self.runtime.buckets]
        self._fits = [self.runtime.at(rows) for rows in (*self._ends, 1 + max(self._ends, default=0))]  # made once, not a call
        settings = {(r.engine, r.threads): r for r in self._fits}
        for runtime in settings.values():
            if runtime.engine == "eager" or probe is not None:
                self._within(runtime.threads, lambda runtime=runtime: self._make(runtime, probe or {}))  # type: ignore[misc]
        if probe is not None and not self._unshared:
            self._within(self.runtime.threads, lambda: self._factored(probe))

    @property
    def engine(self) -> str:
        """The engine that runs."""
        return self.runtime.engine if not self.note else "eager"

    def _trusted(self, runtime: Runtime) -> Runtime:
        """The runtime, or a safe one in place of what was measured on another machine."""
        here = hardware.fingerprint() if runtime.machine else ""
        if runtime.machine == here:
            return runtime
        self.note = f"its engines were chosen on {runtime.machine!r} and this is {here!r}; eager runs until it is tuned here"
        log.warning(self.note)
        return Runtime("eager", 1, shared=runtime.shared)

    def score(self, batch: Batch) -> Floats:
        """Logits [B] (or [B, classes]) of a batch, computed in cuts of at most ``runtime.batch`` rows."""
        runtime = self._fits[bisect.bisect_left(self._ends, height(batch))]
        return self._within(runtime.threads, lambda: _array(self._cut(runtime, batch)))

    def keep(self, probe: Batch, batch: Batch, ids: Ids, size: int) -> bool:
        """Compute the items' part of a model that shares work now, for ``ranked``; False where there is none or no room for it.

        Args:
            probe: a request, two candidates or more.
            batch: the item columns of the catalogue's items.
            ids: their ids, each below ``size``.
            size: of the item column.
        """
        if self._unshared or self._kept is not None:
            return self._kept is not None
        try:
            with torch.inference_mode(False), torch.no_grad():
                made = factor(self.module, probe, self._roles, self._item, self._inputs, items=True)
        except DeviceError as error:
            log.warning("%s; every candidate is computed whole", error)
            return False
        assert made.item is not None
        with torch.inference_mode():
            width = sum(t[0].nbytes for t in made.item({n: t[:1] for n, t in batch.items()}))
        if not width or width * len(ids) > ROOM * hardware.limits()[1]:
            return False
        self._within(self.runtime.threads, lambda: made.keep(batch, torch.as_tensor(ids), size))
        self._kept = made
        return True

    def ranked(self, askers: Sequence[Batch], items: Sequence[Ids]) -> list[Floats]:
        """Logits [N] of kept items, by id [N], for each of several askers: the user columns of each as one row."""
        kept = self._kept
        if kept is None:
            raise ConfigError("no items were kept; call keep first, or score a batch")

        def work() -> list[Floats]:
            once = kept.each_once(askers)
            return [_array(kept.ranked(user, torch.as_tensor(chosen))) for user, chosen in zip(once, items, strict=True)]

        return self._within(self.runtime.threads, work)

    def user_vectors(self, batch: Batch) -> Floats:
        """Vectors [B, D] of a batch of users, for retrieval; always eager."""
        return self._vectors("user_vectors", batch)

    def item_vectors(self, batch: Batch) -> Floats:
        """Vectors [N, D] of a batch of items, for retrieval; always eager."""
        return self._vectors("item_vectors", batch)

    def close(self) -> None:
        """Let go of the weights, the mapped tables and the engine's threads now; it cannot score after that."""
        self.module, self.shared, self._kept, self._unshared = nn.Identity(), None, None, True
        self._scorers = dict.fromkeys(self._scorers or [(self.runtime.engine, self.runtime.threads)], _closed)
        self._memory.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _within(self, threads: int, work: Callable[[], T]) -> T:
        """Do some work with so many threads and without gradients."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.inference_mode():
                if self.runtime.precision == "fp32":
                    return work()
                with torch.autocast("cpu" if self.home == "cpu" else "cuda", torch.bfloat16):
                    return work()
        finally:
            torch.set_num_threads(before)

    def _cut(self, runtime: Runtime, batch: Batch) -> Tensor:
        if not self._unshared and (shared := self._factored(batch)) is not None and repeated(batch, shared):
            return shared(batch)  # type: ignore[no-any-return]
        score, size = self._scorers.get((runtime.engine, runtime.threads)) or self._make(runtime, batch), runtime.batch
        if not size or (rows := height(batch)) <= size:
            return score(batch)
        return torch.cat([score({n: t[i : i + size] for n, t in batch.items()}) for i in range(0, rows, size)])

    def _factored(self, probe: Batch) -> Shared | None:
        """The model in parts, made from the first batch of two rows or more; None where nothing can be shared, said once."""
        if self.shared is not None or height(probe) < 2:
            return self.shared
        try:
            if not self._item:
                raise DeviceError("nothing says which columns are the user's and which the item's")
            with torch.inference_mode(False), torch.no_grad():
                made = factor(self.module, probe, self._roles, self._item, self._inputs)
        except DeviceError as error:
            self._unshared = True
            log.warning("%s; every candidate is computed whole", error)
            return None
        self.shared = made
        return made

    def _vectors(self, method: str, batch: Batch) -> Floats:
        vectors: Callable[[Batch], Tensor] | None = getattr(self.module, method, None)
        if vectors is None:
            name = type(self.module).__name__
            raise ConfigError(f"{name} has no {method}: it ranks but does not retrieve; use a retrieval model or a cascade")
        return self._within(self.runtime.threads, lambda: _array(vectors(self._here(batch))))

    def _here(self, batch: Batch) -> Batch:
        return batch if self.home == "cpu" else kernels().moved(batch, self.home)

    def _make(self, runtime: Runtime, probe: Batch) -> Scorer:
        try:
            with torch.inference_mode(False), torch.no_grad():  # exporters cannot take tensors made for inference
                score = self._maker(self.module, runtime, self._here(probe), self._inputs)
        except DeviceError as error:
            if not self._fallback:
                raise
            self.note = f"{error}; eager runs instead"
            log.warning(self.note)
            score = eager(self.module, self._inputs)
        apart = bool(self.hot) or any(m._forward_pre_hooks for m in self.module.modules())  # a table that is elsewhere waits
        if self.home != "cpu" and runtime.engine == "eager" and not apart:
            score = kernels().Graphed(score)
        made = score if self.home == "cpu" else lambda batch: score(self._here(batch))
        self._scorers[runtime.engine, runtime.threads] = made
        return made


def _roles(bundle: Bundle) -> tuple[dict[str, str], str]:
    """Roles of columns, and the item's column: from the catalogue, or from the columns the model was built with."""
    schema = bundle.catalog.schema if bundle.catalog is not None else None
    found = schema.columns if schema is not None else decode(tuple[Column, ...], _columns(bundle.model.spec.args), "columns")
    items = [c.name for c in found if c.role == "item" and c.kind == "categorical"]
    return {c.name: c.role for c in found}, items[0] if items else ""


def _columns(args: Any) -> Any:
    """The argument ``columns``, wherever in the arguments; none where there is none."""
    if not isinstance(args, Mapping):
        return []
    return args["columns"] if "columns" in args else next((c for v in args.values() if (c := _columns(v))), [])


def kernels() -> Any:
    """What only a GPU needs; Triton takes a second to import."""
    return importlib.import_module("pennyweight.accelerate.kernels")


def _closed(batch: Batch) -> Tensor:
    raise DeviceError("this runner was closed; open another one")


def _array(output: Tensor) -> Floats:
    ready = output.dtype is torch.float32 and output.device.type == "cpu"
    array: Floats = output.numpy() if ready else output.float().cpu().numpy()
    return array


def _home(placement: Placement) -> str:
    """Where the dense layers run: on the first GPU that holds a table, else on the CPU."""
    return min((where for where in placement.tables.values() if where.startswith("cuda")), default="cpu")


def _placed(model: Model, placement: Placement, home: str, allow: Sequence[str]) -> nn.Module:
    """The module with its tables where the placement says, and all else at home."""
    if home != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"the bundle places tables on {home} and PyTorch sees no GPU here; place it again on this machine")
    unknown = [path for path in placement.tables if not any(k.startswith(f"{path}.") for k in model.state)]
    if unknown:
        raise ConfigError(f"the placement names {', '.join(unknown)}, which this model does not have; place it again")
    mapped = [path for path, where in placement.tables.items() if where == "disk"]
    state = {k: _mapped(t) if any(k.startswith(f"{path}.") for path in mapped) else t for k, t in model.state.items()}
    module = Model(model.spec, state).build(allow)
    for path in mapped:
        module.get_submodule(path).apart = True  # type: ignore[assignment]  # not to be joined with tables in memory
    if home == "cpu":
        return module
    spread = _spread(module, placement.tables, home)
    kernels().fuse_tables(spread)
    return spread


def _spread(module: nn.Module, tables: Mapping[str, str], home: str) -> nn.Module:
    """Move a module to a GPU except for the tables that live elsewhere: their ids go there, their rows come back."""
    away = {path: "cpu" if where == "disk" else where for path, where in tables.items() if where != home}
    held = {path: module.get_submodule(path) for path in away}
    for path in away:
        replace(module, path, nn.Identity())
    module.to(home)
    for path, table in held.items():
        table.to(away[path])
        table.register_forward_pre_hook(_ids_to(away[path]))
        table.register_forward_hook(lambda _module, _ids, rows: rows.to(home))
        replace(module, path, table)
    return module


def _ids_to(where: str) -> Callable[[nn.Module, tuple[object, ...]], tuple[object, ...]]:
    return lambda _, args: tuple(a.to(where) if isinstance(a, Tensor) else a for a in args)


def _mapped(tensor: Tensor) -> Tensor:
    """The same values in memory mapped from a file without a name, which goes when the tensor does; or as they are mapped."""
    if getattr(tensor, "mapped", False):
        return tensor
    with tempfile.NamedTemporaryFile(prefix="pennyweight-") as file:
        tensor.detach().cpu().contiguous().numpy().tofile(file)
        file.flush()
        return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
