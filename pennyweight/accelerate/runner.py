"""A bundle, ready to score: built once, then called for every request.

The runner holds what a forward needs and nothing else: the module (or the engine made from it), the number of threads, and
where a request is cut. The measured path and the served path are this one class, so a time or a quality that was measured
is the one that is served.

Threads are a setting of the whole process in PyTorch. The runner sets its own for the length of a call and puts the former
number back (0.4 µs in all), so two runners measured in turns, or a training loop beside them, do not disturb each other.
It serves one caller at a time: a service with several workers opens a runner in each. All it adds to a forward is 8 µs.

Tables placed on ``disk`` are copied once to a file without a name and mapped from there, so that the kernel keeps only the
rows in use in memory. They leave memory when the bundle they came from does: the runner keeps no reference to it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pennyweight.accelerate.compile import Maker, Scorer, eager, make
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.bundle import Bundle, Placement
from pennyweight.model.spec import Batch, Model, replace

log = logging.getLogger(__name__)

T = TypeVar("T")
Floats = npt.NDArray[np.float32]


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
        self.runtime = bundle.runtime
        self.note = ""
        """Why eager runs instead of the engine that was asked for; empty when all is well."""
        self.home = _home(bundle.placement)
        """The device of the dense layers."""
        self.module = _placed(bundle.model, bundle.placement, self.home, allow)
        self._inputs = bundle.model.spec.inputs
        self._fallback, self._maker = fallback, maker
        self._score: Scorer | None = None
        if self.runtime.engine == "eager" or probe is not None:
            self._within(lambda: self._make(probe or {}))

    @property
    def engine(self) -> str:
        """The engine that runs."""
        return self.runtime.engine if not self.note else "eager"

    def score(self, batch: Batch) -> Floats:
        """Logits [B] (or [B, classes]) of a batch, computed in cuts of at most ``runtime.batch`` rows."""
        return self._within(lambda: _array(self._cut(batch)))

    def user_vectors(self, batch: Batch) -> Floats:
        """Vectors [B, D] of a batch of users, for retrieval; always eager."""
        return self._vectors("user_vectors", batch)

    def item_vectors(self, batch: Batch) -> Floats:
        """Vectors [N, D] of a batch of items, for retrieval; always eager."""
        return self._vectors("item_vectors", batch)

    def close(self) -> None:
        """Let go of the weights, the mapped tables and the engine's threads now; it cannot score after that."""
        self.module, self._score = nn.Identity(), _closed

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _within(self, work: Callable[[], T]) -> T:
        """Do some work with this runner's number of threads and without gradients."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.runtime.threads or before)
        try:
            with torch.inference_mode():
                return work()
        finally:
            torch.set_num_threads(before)

    def _cut(self, batch: Batch) -> Tensor:
        score, size = self._score or self._make(batch), self.runtime.batch
        if not size or (rows := len(next(iter(batch.values())))) <= size:
            return score(batch)
        return torch.cat([score({n: t[i : i + size] for n, t in batch.items()}) for i in range(0, rows, size)])

    def _vectors(self, method: str, batch: Batch) -> Floats:
        vectors: Callable[[Batch], Tensor] | None = getattr(self.module, method, None)
        if vectors is None:
            name = type(self.module).__name__
            raise ConfigError(f"{name} has no {method}: it ranks but does not retrieve; use a retrieval model or a cascade")
        return self._within(lambda: _array(vectors(self._here(batch))))

    def _here(self, batch: Batch) -> Batch:
        return batch if self.home == "cpu" else {n: t.to(self.home) for n, t in batch.items()}

    def _make(self, probe: Batch) -> Scorer:
        try:
            with torch.inference_mode(False), torch.no_grad():  # exporters cannot take tensors made for inference
                score = self._maker(self.module, self.runtime, self._here(probe), self._inputs)
        except DeviceError as error:
            if not self._fallback:
                raise
            self.note = f"{error}; eager runs instead"
            log.warning(self.note)
            score = eager(self.module, self._inputs)
        self._score = score if self.home == "cpu" else lambda batch: score(self._here(batch))
        return self._score


def _closed(batch: Batch) -> Tensor:
    raise DeviceError("this runner was closed; open another one")


def _array(output: Tensor) -> Floats:
    array: Floats = output.float().cpu().numpy()
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
    return module if home == "cpu" else _spread(module, placement.tables, home)


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
    """The same values in memory mapped from a file without a name, which goes when the tensor does."""
    with tempfile.NamedTemporaryFile(prefix="pennyweight-") as file:
        tensor.detach().cpu().contiguous().numpy().tofile(file)
        file.flush()
        return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
