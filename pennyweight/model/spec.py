"""A model is a spec and weights, nothing else.

A spec is a *factory* (the import path of an ``nn.Module`` class or of a function that returns a module), its JSON
*args*, and *layers*: what the module at each path has become since (an int4 table, a codebook table, a narrower dense
layer). ``build(spec)`` calls the factory, puts each such layer in place, and loading a state dict gives the same outputs
always; no optimization is ever replayed. A user's own module is a model as soon as its factory can be imported.

The known alternatives are pickling the module (executes what it is given) and exporting a graph (cannot be trained or
compressed further). This costs one thing: a factory must give the same structure for the same args.

Factories inside Pennyweight are always allowed; any other import path must be allowed by the caller, since importing runs
code.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.core.config import decode, encode, family
from pennyweight.core.errors import BundleError, ConfigError

Batch = Mapping[str, Tensor]
"""Columns by name: categorical int64 [B], sequence int64 [B, L], numeric float32 [B] or [B, N], label float32 [B]."""


@family("layer")
class Layer(abc.ABC):
    """What one table, dense layer or norm has become: a frozen dataclass that builds the module and knows its cost."""

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """An uninitialized module of this shape; its weights come from the state dict."""

    @abc.abstractmethod
    def bytes(self) -> int:
        """Bytes of its tensors in the weights file."""

    @abc.abstractmethod
    def flops(self) -> int:
        """Floating point operations each time it is used (a multiply and an add are two): a row, a lookup, a position."""


LARGE = 1 << 20
"""Numbers from which a tensor's random start is worth leaving out where it is not used."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that training writes."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to build a module: ``factory(**args)``, then each of ``layers`` put at its path."""

    factory: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    """Columns handed to ``forward`` one by one; empty for a module that takes the whole batch as one mapping."""

    def with_layers(self, layers: Mapping[str, Layer]) -> Spec:
        """The same spec with some layers replaced."""
        return dataclasses.replace(self, layers={**self.layers, **layers})


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A spec and its weights. Nobody writes into ``state``: whoever trains asks for a copy."""

    spec: Spec
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, spec: Spec) -> Model:
        """The model a module is, with copies of its weights."""
        return cls(spec, {k: v.detach().clone() for k, v in module.state_dict().items()})

    def build(self, allow: Sequence[str] = (), *, copy: bool = False) -> nn.Module:
        """The module in evaluation mode; ``copy`` gives it weights of its own, to train."""
        with _Undrawn():
            module = build(self.spec, allow)
        state = {k: v.clone() for k, v in self.state.items()} if copy else dict(self.state)
        try:
            module.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise BundleError(f"the weights do not fit {self.spec.factory}: {error}") from error
        for parameter in module.parameters():
            parameter.requires_grad_(copy and parameter.is_floating_point())
        return module.eval()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.state.values())


class _Undrawn(TorchFunctionMode):
    """Large tensors keep no random numbers: memory that is loaded over, or replaced by a layer, is then never touched.

    Without it a model of large tables is in memory twice for as long as it takes to build.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_):
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.numel() >= LARGE:
                return tensor
        return func(*args, **kwargs)


def seeded(spec: Spec, seed: int, allow: Sequence[str] = (), buffers: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The module a spec describes with the initial weights of a seed; the caller's random state is left alone.

    ``buffers`` is the state of a model of this spec, to take constants from that nobody trains; norms start afresh.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(spec, allow)
    for name, tensor in module.named_buffers():
        if name in (buffers or {}) and name.rpartition(".")[2] not in STATISTICS:
            tensor.copy_((buffers or {})[name])
    return module


def untrained(spec: Spec, seed: int, allow: Sequence[str] = ()) -> Model:
    """The model of a seed before any training, its large tensors as zeros that take no memory.

    For a structure that replaces them: where a table cannot be held whole, this is what its substitute is put into.
    """
    with _Undrawn():
        state = seeded(spec, seed, allow).state_dict()
    return Model(spec, {k: v.new_zeros(()).expand(v.shape) if v.numel() >= LARGE else v for k, v in state.items()})


def build(spec: Spec, allow: Sequence[str] = ()) -> nn.Module:
    """The module a spec describes, weights not loaded.

    Raises:
        ConfigError: the factory is not allowed, cannot be found, refuses its args, or a layer's path is not there.
    """
    module = _call(spec.factory, spec.args, allow)
    for path, layer in spec.layers.items():
        replace(module, path, layer.build())
    return module


def call(module: nn.Module, batch: Batch, inputs: Sequence[str] = ()) -> Tensor:
    """The module's output for a batch: logits [B], or [B, classes]."""
    output: Tensor = module(*(batch[name] for name in inputs)) if inputs else module(batch)
    return output.squeeze(-1) if output.dim() == 2 and output.shape[1] == 1 else output


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` at a dotted path of a module, in place."""
    parent, _, name = path.rpartition(".")
    try:
        module.get_submodule(path)
        setattr(module.get_submodule(parent), name, new)
    except AttributeError as error:
        raise ConfigError(f"no layer {path!r} in {type(module).__name__}") from error


def leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children that hold tensors, by path."""
    for path, child in module.named_modules():
        if path and not any(True for _ in child.children()) and (len(child.state_dict()) > 0):
            yield path, child


def _call(factory: str, args: Mapping[str, Any], allow: Sequence[str]) -> nn.Module:
    target = resolve(factory, allow)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
        hints.pop("return", None)
        given = {k: decode(hints[k], v, f"args.{k}") if _structured(hints.get(k)) else v for k, v in args.items()}
        with torch.random.fork_rng(devices=[]):
            module = target(**given)
    except TypeError as error:
        raise ConfigError(f"{factory} does not take these args: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{factory} gave a {type(module).__name__}; a factory must return a torch.nn.Module")
    return module


def _structured(hint: Any) -> bool:
    """Whether a parameter's annotation is one of our dataclasses (or a tuple of them), to be decoded from JSON."""
    inner = next(iter(typing.get_args(hint)), hint)
    return dataclasses.is_dataclass(inner) and isinstance(inner, type)


def resolve(factory: str, allow: Sequence[str] = ()) -> Any:
    """The class or function an import path ``package.module:name`` names, if it is allowed.

    Raises:
        ConfigError: the path is malformed, not allowed, or nothing is there.
    """
    package, _, name = factory.partition(":")
    if not package or not name:
        raise ConfigError(f"factory {factory!r} is not of the form package.module:name")
    ours = package.startswith("pennyweight.model.")
    if not ours and not any(factory == a or package == a or package.startswith(a + ".") for a in allow):
        raise ConfigError(
            f"factory {factory!r} is not allowed, and importing it runs its code; allow it with --allow {package}"
        )
    try:
        target = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"factory {factory!r} cannot be imported: {error}") from error
    if ours and not getattr(target, "__module__", "").startswith("pennyweight.model."):
        raise ConfigError(f"factory {factory!r} is not one of Pennyweight's models")
    return target


def spec_of(factory: type | Any, inputs: Sequence[str] = (), **args: Any) -> Spec:
    """A spec for a class or function and its (JSON or dataclass) arguments."""
    return Spec(
        f"{factory.__module__}:{factory.__qualname__}", {k: encode(v, slim=True) for k, v in args.items()}, {}, tuple(inputs)
    )
