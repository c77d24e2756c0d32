"""The operations of any module's forward, recorded by calling it once with stand-ins for tensors.

``torch.fx`` records one node an operation and one a layer of ``torch.nn``, so layers stay whole, at their own paths, with
their own weights: what a table, a dense layer or a convolution becomes later is put in its place. ``torch.export`` was the
alternative. It sees through more Python, but takes layers apart into operators on flat weights, fixes training or evaluation
for good, and what it gives cannot be compressed by path.

Plain ``fx`` knows no value while it records, so ``b, n = x.shape``, ``range(x.size(1))`` or ``if x.dim() == 3`` stop it. Here
every stand-in also carries what it is for one row and for many. A size that is the same in both is a plain number at once,
and Python may do with it what it likes; one that differs depends on the batch and stays in the graph. Only what Python would
decide by the numbers in a tensor, or by how many rows there are, cannot be recorded. It costs two forward passes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import ConfigError
from pennyweight.model import codec
from pennyweight.model.codec import layer_of

_READS = {"item", "tolist", "equal", "allclose", "is_nonzero"}
"""Operations whose plain result comes from the numbers in a tensor, not from its shape."""
_SIZED = ("zeros", "ones", "empty", "rand", "randn")
"""Functions of ``torch`` that take sizes one by one; they do not see a stand-in among them by themselves."""


class Value(fx.Proxy):
    """A stand-in for a tensor, or for a number that depends on the batch; ``seen`` is what it is for one row and for many."""

    seen: tuple[Any, Any]
    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` asks after the real type; fx itself would take the stand-in of a tensor for a tensor."""
        return type(self.seen[0]) if "seen" in self.__dict__ and type(self.seen[0]) in (tuple, list) else Value

    def __getattr__(self, name: str) -> Any:
        if name == "seen" or callable(getattr(self.seen[0], name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        one, many = (len(v) for v in self.seen)
        if one != many:
            raise TypeError("len() would fix the number of rows; write x.shape[0]")
        return one

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class Tracer(fx.Tracer):
    """Records a module called with ``many`` rows, looking at what ``one`` row gives beside."""

    proxy_buffer_attributes = True

    def __init__(self, one: Sequence[Tensor], many: Sequence[Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.given, self.names = list(zip(one, many, strict=True)), names
        self.running = False
        self.inside = [""]
        self.failed = ""
        """The innermost module that raised, as " in its path (its class)"."""
        self.called: set[str] = {""}
        self.apart: set[str] = set()
        """Modules one of whose children somebody else called."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch.nn stay whole."""
        return layer_of(m) is not None

    def path_of_module(self, mod: nn.Module) -> str:
        """Where a module is; one made inside forward, or kept in a plain list, gets a path now."""
        try:
            return super().path_of_module(mod)
        except NameError:
            path = f"made_{len(list(self.root.children()))}"
            self.root.add_module(path, mod)
            if self.submodule_paths is not None:
                self.submodule_paths[mod] = path
            return path

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a layer's call, or go into the module."""
        if self.running:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        parent = path.rpartition(".")[0]
        if self.inside[-1] != parent:
            self.apart.add(parent)
        self.called.add(path)
        self.inside.append(path)
        try:
            _recordable(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or f" in {path!r} ({type(m).__name__})"
            raise
        finally:
            self.inside.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers as stand-ins, but as themselves while values are computed."""
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The inputs by position; other parameters of forward keep their defaults."""
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in self.names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A stand-in of ours."""
        return Value(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """Record an operation; a number that does not depend on the batch is given as it is."""
        _allowed(kind, target, args)
        values = self._values(kind, target, args, kwargs)
        if kind in ("call_function", "call_method") and _fixed(values) and not _variable(target, args):
            return values[0]
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        proxy.seen = values  # type: ignore[attr-defined]
        proxy.node.meta["seen"] = values
        proxy.node.meta["tensor"] = not isinstance(values[0], (int, float, tuple, torch.device))
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Nothing can be decided by a stand-in."""
        assert isinstance(obj, Value)
        how = "the numbers in a tensor" if isinstance(obj.seen[0], Tensor) else "a number that depends on the batch"
        raise TypeError(f"Python decides by {how}, which a graph cannot hold; write it with torch.where")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tuple, or of a tensor whose first dimension is not the batch."""
        assert isinstance(obj, Value)
        return iter([self.create_proxy("call_function", operator.getitem, (obj, at), {}) for at in range(len(obj))])

    def _values(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if kind == "placeholder":
            return self.given[self.names.index(target)]
        self.running = True
        try:
            with torch.no_grad():
                return self._value(0, kind, target, args, kwargs), self._value(1, kind, target, args, kwargs)
        finally:
            self.running = False

    def _value(self, at: int, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return tensor_at(self.root, target)
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda v: v.seen[at] if isinstance(v, Value) else v)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)


def trace(
    module: nn.Module, one: Sequence[Tensor], many: Sequence[Tensor], names: Sequence[str], kind: type[Tracer] | None = None
) -> Tracer:
    """The tracer of a module, with its graph in ``graph``; the module may be changed by it, so hand over a copy.

    ``kind`` is another tracer than the one here, such as one that leaves more layers whole.

    Raises:
        ConfigError: its forward cannot be recorded, with the line of the code that is in the way.
    """
    tracer = (kind or Tracer)([t.clone() for t in one], [t.clone() for t in many], names)
    try:
        with torch.random.fork_rng(devices=[]), _sizes(tracer):
            torch.manual_seed(1)
            tracer.trace(module)
    except Exception as error:  # whatever the code of somebody else raises
        place = f"{tracer.failed}{where(error.__traceback__)}"
        raise ConfigError(f"{type(module).__name__} cannot be traced{place}: {error}") from error
    for node in reversed(tracer.graph.nodes):
        if not node.users and (node.op == "get_attr" or not node.meta.get("tensor", True)):
            tracer.graph.erase_node(node)
    return tracer


def names_of(module: nn.Module, count: int) -> list[str]:
    """The names of the first ``count`` inputs of a module's forward.

    Raises:
        ConfigError: it takes fewer, or needs more.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    listed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in listed)
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if count < needed or (count > len(listed) and not spread):
        takes = ", ".join(p.name for p in listed) or "none"
        raise ConfigError(
            f"{type(module).__name__} takes the inputs {takes}; the example has {count}, give one tensor for each"
        )
    return [p.name for p in listed[:count]] + [f"input_{at}" for at in range(len(listed), count)]


def tensor_at(module: nn.Module, path: str) -> Any:
    """The parameter, buffer or attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), module)


_OURS = tuple(os.path.join(os.path.dirname(__file__), f"{name}.py") for name in ("trace", "codec", "graph"))


def where(trail: TracebackType | None) -> str:
    """The innermost line that is neither PyTorch's nor of this recording, as " at file:line (code)"; else nothing."""
    for frame in reversed(traceback.extract_tb(trail)):
        if not frame.filename.startswith((os.path.dirname(torch.__file__), "<", *_OURS)):
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


@contextlib.contextmanager
def _sizes(tracer: Tracer) -> Iterator[None]:
    """Let ``torch.zeros(x.shape[0], 3)`` and its like be recorded."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = not tracer.running and any(isinstance(a, Value) for a in (*args, *kwargs.values()))
            return tracer.create_proxy("call_function", function, args, kwargs) if found else function(*args, **kwargs)

        return call

    kept = {name: getattr(torch, name) for name in _SIZED}
    try:
        for name, function in kept.items():
            setattr(torch, name, recorded(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(torch, name, function)


def _fixed(values: tuple[Any, Any]) -> bool:
    """Whether a result is plain and the same for any batch."""
    one, many = values
    return isinstance(one, (int, float, str, torch.dtype, torch.layout, torch.Size)) and type(one) is type(many) and one == many


def _variable(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a plain result comes from numbers of a tensor, or from a number that itself depends on the batch."""
    name = target if isinstance(target, str) else target.__name__
    return name in _READS or any(isinstance(a, Value) and isinstance(a.seen[0], (int, float)) for a in args)


def _recordable(module: nn.Module) -> None:
    """Refuse modules of which a graph would lose a part."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("a scripted module has no Python to record; give the module it was scripted from")
    if layer_of(module) is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise TypeError("its hooks cannot be held by a graph; remove them first")


def _allowed(kind: str, target: Any, args: tuple[Any, ...]) -> None:
    """Refuse, where it is called, what a stored graph could not call."""
    if kind == "call_method":
        codec.method(target)
    elif target is getattr:
        codec.attribute(args[1])
    elif kind == "call_function":
        codec.function_name(target)
