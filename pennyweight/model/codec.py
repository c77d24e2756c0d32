"""A recorded graph's operations, constants and layers as JSON, and back only from what is on a list.

A stored graph is data from a file, and restoring it calls what it names. So nothing is looked up by the name that stands
there: the operations that may be called are collected first (PyTorch's own on tensors, and Python's arithmetic), and a name
that is not among them is refused. Left out of PyTorch's are those that open files, read memory they are pointed to, or call
what they are handed. Layers are those of ``torch.nn`` by class and constructor arguments. Forbidding known evils, the usual
way, must be right about every release to come.

A layer does not keep the arguments it was made from; they are read back from its attributes, made into a second layer, and
compared by the shapes of their tensors.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pennyweight.core.errors import ConfigError

_SPACES: Mapping[str, Any] = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "operator": operator,
    "math": math,
}
_UNSAFE = {"from_file", "from_numpy", "frombuffer", "attrgetter", "itemgetter", "methodcaller", "call"}
_UNSAFE_KINDS = ("fbgemm_", "cudnn_", "miopen_", "mkldnn_", "quantized_", "sparse_", "sym_", "has_torch_function")
_UNSAFE_METHODS = {
    *("numpy", "data_ptr", "const_data_ptr", "storage", "untyped_storage", "storage_type", "share_memory_", "set_"),
    *("pin_memory", "record_stream", "as_subclass", "new", "apply_", "map_", "map2_", "module_load", "reinforce"),
    *("backward", "register_hook", "register_post_accumulate_grad_hook"),
}
_ATTRIBUTES = {
    *("shape", "dtype", "device", "layout", "ndim", "T", "mT", "H", "mH", "real", "imag", "data"),
    *("values", "indices", "U", "S", "V", "Vh", "Q", "R", "L", "LU", "eigenvalues", "eigenvectors"),
}
"""What may be read of a tensor, or of the named tuple of tensors that some operations give."""
_WRITTEN = {
    *("__init__", "__module__", "__doc__", "__annotations__", "__qualname__", "__static_attributes__", "__firstlineno__"),
    *("reset_parameters", "extra_repr"),
}
"""What a subclass may define and still be the layer it inherits from."""
_BARE = (
    *(nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Container),
    nn.DataParallel,
)
_SHOWN = ("dtype", "layout", "memory_format")


def layer_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of ``torch.nn`` a module behaves as; None where its forward is written by somebody else."""
    for at, cls in enumerate(type(module).__mro__):
        if getattr(nn, cls.__name__, None) is cls:
            above = type(module).__mro__[:at]
            own = {n for c in above for n, v in vars(c).items() if hasattr(cls, n) or isinstance(v, property)}
            return cls if cls not in _BARE and own <= _WRITTEN else None
    return None


def _callable(path: str, function: Any) -> bool:
    space, _, name = path.rpartition(".")
    if name.startswith(("_", *_UNSAFE_KINDS)) or name in _UNSAFE:
        return False
    if space in ("operator", "math"):
        return isinstance(function, types.BuiltinFunctionType)
    if isinstance(function, types.BuiltinFunctionType):
        return space != "torch" or function.__self__ is None  # the others of that space are PyTorch's settings
    return getattr(function, "__module__", "") in ("torch.functional", "torch.nn.functional") and not isinstance(function, type)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    path: found
    for space, module in _SPACES.items()
    for name in dir(module)
    if _callable(path := f"{space}.{name}", found := getattr(module, name))
}
"""What a graph may call, by name."""
_NAMES: Mapping[int, str] = {id(f): name for name, f in reversed(list(FUNCTIONS.items()))}


@functools.cache
def _methods() -> frozenset[str]:
    public = {n for n in dir(torch.Tensor) if not n.startswith("_") and callable(getattr(torch.Tensor, n))}
    signs = {n.strip("_") for n in (*fx.graph.magic_methods, *fx.graph.inplace_methods, "getitem")}
    dunder = {f"__{side}{n}__" for n in signs for side in ("", "r")} & set(dir(torch.Tensor))
    return frozenset((public | dunder) - _UNSAFE_METHODS)


def function_name(function: Any) -> str:
    """The name a function is stored by.

    Raises:
        ConfigError: it is not one that a graph may call.
    """
    if id(function) in _NAMES:
        return _NAMES[id(function)]
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', function)}"
    raise ConfigError(
        f"{name} is not an operation of torch that a stored graph may call; write it with those, or make it a layer"
    )


def function(name: Any) -> Callable[..., Any]:
    """The function of a stored name; ConfigError if it is not on the list."""
    if not isinstance(name, str) or name not in FUNCTIONS:
        raise ConfigError(f"the stored graph calls {name!r}, which is not on the list of operations a graph may call")
    return FUNCTIONS[name]


def method(name: str) -> str:
    """The name of a tensor's method, if a graph may call it; ConfigError if not."""
    if name not in _methods():
        raise ConfigError(f"{name!r} is not a method of a tensor that a stored graph may call")
    return name


def attribute(name: str) -> str:
    """The name of a tensor's attribute, if a graph may read it; ConfigError if not."""
    if name not in _ATTRIBUTES:
        raise ConfigError(f"{name!r} is not an attribute of a tensor that a stored graph may read")
    return name


def encode(value: Any, node: Callable[[fx.Node], Any]) -> Any:
    """A constant (or arguments) of a graph as JSON: an object of one key wherever JSON has no such kind.

    Raises:
        ConfigError: a kind that cannot be stored.
    """
    if isinstance(value, fx.Node):
        return {"node": node(value)}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [encode(v, node) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v, node) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v, node) for k, v in value.items()}}
    if isinstance(value, (slice, range)):
        return {type(value).__name__: [encode(v, node) for v in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": None}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, nn.Module):
        kind = layer_of(value)
        return {"layer": [kind.__name__, encode(arguments(value, kind), node)["dict"]]} if kind else _no(value)
    return {"function": function_name(value)} if callable(value) else _no(value)


def _no(value: Any) -> Any:
    raise ConfigError(f"a constant of type {type(value).__name__} cannot be stored in a graph: {value!r}")


def decode(value: Any, node: Callable[[Any], Any]) -> Any:
    """The constant (or arguments) that ``encode`` wrote; ``node`` gives what stands for a reference.

    Raises:
        ConfigError: nothing that ``encode`` writes.
    """
    if isinstance(value, (list, tuple)):
        return [decode(v, node) for v in value]
    if not isinstance(value, Mapping):
        return value
    try:
        ((kind, inner),) = value.items()
        return _decoded(kind, inner, node)
    except ConfigError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"the stored graph holds {dict(value)!r}, which is no constant of a graph: {error}") from error


def _decoded(kind: str, inner: Any, node: Callable[[Any], Any]) -> Any:
    if kind in ("node", "mode", "function", "layer"):
        return node({kind: inner})
    if kind == "float":
        return float(inner)
    if kind == "ellipsis":
        return ...
    if kind == "device":
        return torch.device(inner)
    if kind in _SHOWN:
        found = getattr(torch, inner)
        if type(found) is not getattr(torch, kind):
            raise TypeError(f"{inner} is no {kind}")
        return found
    if kind == "dict":
        return {k: decode(v, node) for k, v in inner.items()}
    if kind not in _PARTS:
        raise ValueError(f"unknown kind {kind!r}")
    return _PARTS[kind](decode(v, node) for v in inner)


_PARTS: Mapping[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "slice": lambda v: slice(*v),
    "range": lambda v: range(*v),
}


def layer(kind: str, args: Mapping[str, Any]) -> nn.Module:
    """The layer of ``torch.nn`` of this class and these stored arguments, its weights not loaded.

    Raises:
        ConfigError: no such layer, or it refuses the arguments.
    """
    cls = getattr(nn, kind) if isinstance(kind, str) and kind in dir(nn) else None
    if not inspect.isclass(cls) or not issubclass(cls, nn.Module) or cls in _BARE:
        raise ConfigError(f"the stored graph names the layer {kind!r}, which is none of torch.nn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about nested tensors, which the first construction gave already
            return cls(**{name: decode(value, constant) for name, value in args.items()})
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"torch.nn.{kind} does not take the stored arguments {dict(args)}: {error}") from error


def constant(reference: Mapping[str, Any]) -> Any:
    """What stands among a layer's arguments besides plain constants: another layer, or a function such as ``F.relu``."""
    ((kind, inner),) = reference.items()
    if kind == "layer":
        return layer(inner[0], inner[1])
    if kind == "function":
        return function(inner)
    raise ConfigError(f"a layer's arguments cannot refer to the graph: {reference}")


def arguments(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The constructor arguments of a layer of ``torch.nn``, read back from what it has become.

    Raises:
        ConfigError: one of them is nowhere to be found.
    """
    found = {name: value for cls, read in _ELSEWHERE.items() if issubclass(kind, cls) for name, value in read(module).items()}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in ("self", "device", "dtype", *found) or name.startswith("_"):
            continue
        if hasattr(module, name):
            value = getattr(module, name)
            found[name] = value if name != "bias" or isinstance(value, bool) else value is not None
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise ConfigError(f"the argument {name!r} that nn.{kind.__name__} was made with cannot be read back from it")
    return found


def _recurrent(module: Any) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    return {name: getattr(module, name) for name in names}


def _block(module: Any) -> dict[str, Any]:
    dims = {"d_model": module.self_attn.embed_dim, "nhead": module.self_attn.num_heads}
    dims |= {"dim_feedforward": module.linear1.out_features, "bias": module.linear1.bias is not None}
    return {
        **dims,
        "dropout": module.dropout.p,
        "layer_norm_eps": module.norm1.eps,
        "batch_first": module.self_attn.batch_first,
    }


_ELSEWHERE: Mapping[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.MultiheadAttention: lambda m: {"bias": m.in_proj_bias is not None, "add_bias_kv": m.bias_k is not None},
    nn.TransformerEncoderLayer: _block,
    nn.TransformerDecoderLayer: _block,
    nn.TransformerEncoder: lambda m: {"encoder_layer": m.layers[0]},
    nn.TransformerDecoder: lambda m: {"decoder_layer": m.layers[0]},
    nn.Transformer: lambda m: {"custom_encoder": m.encoder, "custom_decoder": m.decoder},
    nn.RNNBase: _recurrent,
    nn.LSTM: lambda m: {"proj_size": m.proj_size},
    nn.RNN: lambda m: {"nonlinearity": m.mode.removeprefix("RNN_").lower()},
    nn.PairwiseDistance: lambda m: {"p": m.norm},
}
"""Arguments that stand under another name in the layer, or deeper in it."""
