"""A Keras 3 model on the torch backend as a Model: its own configuration is the spec, its dense layers are ``nn.Linear``.

``of(keras_model)`` gives a Model whose factory is ``restore`` and whose one argument is what Keras itself would save. Dense,
Embedding, convolution, pooling, Flatten, Reshape, Dropout, batch norm and the usual activations become PyTorch's own modules,
so they compress and run like any other; every other layer runs as the Keras layer it is, with its weights in the state dict.
Keras' images have their channels last and PyTorch's layers want them first: a convolution is turned on its way in and out,
which copies nothing, and between two that follow one another in a sequential model not at all. A functional model's
graph is read from its configuration, which is what Keras writes to disk, not from its private attributes. Keras' own
``quantize`` is the alternative: it saves the bytes of a table, but its dense layers hardly gain speed
(keras-team/keras#21435), and it knows no sharing or pruning.

What it costs: one output only, no masks, no subclassed models (such a model is an ``nn.Module``: name its class as the
factory). A last softmax or sigmoid stays part of the model; ``logits=True`` leaves it out, as training here wants.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pennyweight.core.config import encode
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.dense import Dense
from pennyweight.model.graph import Enter
from pennyweight.model.layers import key
from pennyweight.model.spec import Model, Spec
from pennyweight.model.tables import Table


def of(model: Any, inputs: Sequence[str] = (), *, logits: bool = False) -> Model:
    """The Model that a built ``keras.Sequential`` or functional ``keras.Model`` is, with copies of its weights.

    Args:
        model: the Keras model.
        inputs: the column that each of its inputs reads, in order; the names of its inputs if empty.
        logits: leave the last layer's softmax or sigmoid out.

    Raises:
        DeviceError: Keras is not installed.
        ConfigError: another backend than torch, or a model of a kind that cannot be taken over.
    """
    keras = _keras()
    module = _converted(keras, model, logits)
    own = tuple(_first(t) for t in model.inputs)
    if inputs and len(inputs) != len(own):
        raise ConfigError(f"Keras model {model.name!r} has {len(own)} inputs ({', '.join(own)}), not the {len(inputs)} named")
    args = {"config": encode(keras.saving.serialize_keras_object(model)), "logits": logits}
    return Model.of(module, Spec(f"{__name__}:restore", args, {}, tuple(inputs) or own))


def restore(config: Mapping[str, Any], logits: bool = False) -> nn.Module:
    """The module of a Keras configuration, its weights not loaded: the factory of the specs that ``of`` makes.

    Raises:
        DeviceError: Keras is not installed.
        ConfigError: another backend than torch, or a configuration that Keras refuses.
    """
    keras = _keras()
    try:
        model = keras.saving.deserialize_keras_object(copy.deepcopy(dict(config)))  # it takes its argument apart
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"Keras cannot restore this model: {error}") from error
    return _converted(keras, model, logits)


def read(path: str | os.PathLike[str]) -> Any:
    """The Keras model in a ``.keras`` file, read in Keras' safe mode, which runs no code out of the file.

    Raises:
        DeviceError: Keras is not installed.
        ConfigError: another backend than torch, no such file, or one that Keras cannot read or finds unsafe (a lambda layer).
    """
    keras, file = _keras(), Path(path)
    if not file.is_file():
        raise ConfigError(f"{file} is not there; give the file that model.save('name.keras') wrote")
    try:
        return keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # whatever Keras, zip or HDF5 raise for what they cannot read
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} cannot be read as a Keras model: {reason}") from error


def probabilities(model: Any) -> bool:
    """Whether the last thing a Keras model does is a softmax or a sigmoid, which ``of(..., logits=True)`` leaves out."""
    keras = _keras()
    return getattr(_final(keras, model), "activation", None) in (keras.activations.softmax, keras.activations.sigmoid)


def _keras() -> Any:
    """Keras on the torch backend; where nobody has chosen a backend yet, torch is chosen."""
    if importlib.util.find_spec("keras") is None:
        raise DeviceError("a Keras model needs Keras: pip install pennyweight[keras]")
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    chosen = sys.modules["keras"].config.backend() if "keras" in sys.modules else os.environ["KERAS_BACKEND"]
    if chosen != "torch":
        raise ConfigError(f"Keras runs on the {chosen} backend; set KERAS_BACKEND=torch before Keras is imported")
    import keras

    return keras


def _converted(keras: Any, model: Any, logits: bool) -> nn.Module:
    if not isinstance(model, keras.Model):
        raise ConfigError(f"a {type(model).__name__} is no Keras model")
    if not model.built or not getattr(model, "inputs", None):
        remedy = "give it an Input layer, or, if it is subclassed, name its class as the factory"
        raise ConfigError(f"Keras model {model.name!r} is not built: {remedy}")
    return _Conversion(keras, _last(keras, model) if logits else None).model(model)


def entries(module: nn.Module) -> list[tuple[tuple[int | None, ...], str]]:
    """Shape without the batch dimension and type of each input of a restored Keras model or graph; nothing for another."""
    first = module.inputs() if isinstance(module, Graph) else module.children()
    return [(entry.shape, str(entry.dtype)) for entry in first if isinstance(entry, Enter)]


class _Ref(NamedTuple):
    """One of the values that a layer gave when it was called for the n-th time."""

    name: str
    call: int
    at: int


@dataclasses.dataclass(frozen=True)
class _Node:
    """One call of a layer: its arguments hold a ``_Ref`` where they are another call's value."""

    name: str
    call: int
    args: Any
    kwargs: Any


class Graph(nn.Module):
    """A functional Keras model: its layers in ``layers``, called in the order of its graph."""

    def __init__(self, layers: Mapping[str, Any], nodes: Sequence[_Node], inputs: Sequence[str], output: _Ref) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: layer for n, layer in layers.items() if isinstance(layer, nn.Module)})
        self._operations = {n: op for n, op in layers.items() if not isinstance(op, nn.Module)}
        self._nodes, self._inputs, self._output = tuple(nodes), tuple(inputs), output

    def inputs(self) -> list[nn.Module]:
        """What each of forward's tensors enters by, in order."""
        return [self.layers[name] for name in self._inputs]

    def forward(self, *given: Tensor) -> Tensor:
        """The model's one output, from one tensor for each of its inputs in order."""
        values: dict[tuple[str, int], Any] = {}
        columns = dict(zip(self._inputs, given, strict=True))
        for node in self._nodes:
            operation = self._operations[node.name] if node.name in self._operations else self.layers[node.name]
            args = [columns[node.name]] if node.name in columns else _filled(node.args, values)
            values[node.name, node.call] = operation(*args, **_filled(node.kwargs, values))
        output: Tensor = _filled(self._output, values)
        return output


class Foreign(nn.Module):
    """A Keras layer run as it is, with its variables as parameters and buffers of this module."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or its own parameters would be ours a second time
        self._training = "training" in inspect.signature(layer.call).parameters
        self._counts = len(layer.trainable_variables), len(layer.non_trainable_variables)
        for at, variable in enumerate(layer.trainable_variables):
            self.register_parameter(f"trainable_{at}", nn.Parameter(variable.value.detach().clone()))
        for at, variable in enumerate(layer.non_trainable_variables):
            self.register_buffer(f"fixed_{at}", variable.value.detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the Keras layer gives."""
        if self._training:
            kwargs = {**kwargs, "training": self.training}
        weights = [self.get_parameter(f"trainable_{at}") for at in range(self._counts[0])]
        others = [self.get_buffer(f"fixed_{at}") for at in range(self._counts[1])]
        output, others = self._layer[0].stateless_call(weights, others, *args, **kwargs)
        if self.training:
            for at, value in enumerate(others):
                self.get_buffer(f"fixed_{at}").copy_(value.detach())
        return output


class Ids(nn.Module):
    """Whole numbers for a table; Keras lets them come as floats."""

    def forward(self, x: Tensor) -> Tensor:
        """int64."""
        return x.long()


class Shaped(nn.Module):
    """All but the first dimension in another shape; -1 is what is left."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *shape]."""
        return x.reshape(x.shape[0], *self.shape)


class Turned(nn.Module):
    """Dimensions in another order: channels last to channels first, or back."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, uncopied."""
        return x.permute(self.order)


_ACTIVATIONS: Mapping[str, Any] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "softmax": lambda: nn.Softmax(-1),
}
"""Keras' activation functions and the module with the same formula at their defaults."""
_POINTWISE = (*(kind for name, kind in _ACTIVATIONS.items() if name != "softmax"), nn.Dropout)
"""Layers for which it does not matter where the channels are."""
_CONVOLUTIONS: Mapping[str, Any] = {"Conv1D": nn.Conv1d, "Conv2D": nn.Conv2d}
_POOLS: Mapping[str, Any] = {
    "MaxPooling1D": nn.MaxPool1d,
    "MaxPooling2D": nn.MaxPool2d,
    "AveragePooling1D": nn.AvgPool1d,
    "AveragePooling2D": nn.AvgPool2d,
}
_GLOBAL: Mapping[str, Any] = {
    "GlobalMaxPooling1D": nn.AdaptiveMaxPool1d,
    "GlobalMaxPooling2D": nn.AdaptiveMaxPool2d,
    "GlobalAveragePooling1D": nn.AdaptiveAvgPool1d,
    "GlobalAveragePooling2D": nn.AdaptiveAvgPool2d,
}


class _Conversion:
    """Layers to modules; ``bare`` is the layer whose activation is left out."""

    def __init__(self, keras: Any, bare: Any = None) -> None:
        self.keras, self.bare = keras, bare
        self.shared: set[str] = set()
        """Layers called more than once, whose input may have a different size each time."""

    def model(self, model: Any) -> nn.Module:
        """A sequential model as ``nn.Sequential``, a functional one as ``Graph``."""
        if isinstance(model, self.keras.Sequential):
            entry = model.inputs[0]
            named = [
                (_first(entry), _enter(entry.shape, entry.dtype)),
                *((key(la.name), self.layer(la)) for la in model.layers),
            ]
            _straighten([module for _, module in named])
            return nn.Sequential(OrderedDict(named))
        config = model.get_config()
        if "input_layers" not in config:
            raise ConfigError(f"{type(model).__name__} is a subclassed Keras model; name its class as the factory instead")
        nodes = [
            _Node(key(layer["name"]), at, self.parsed(node["args"]), self.parsed(_given(node["kwargs"])))
            for layer in config["layers"]
            for at, node in enumerate(layer["inbound_nodes"] or [{"args": [], "kwargs": {}}])
        ]
        self.shared |= {key(layer["name"]) for layer in config["layers"] if len(layer["inbound_nodes"]) > 1}
        layers = {key(op.name): self.layer(op) for op in model.operations}
        return Graph(layers, _ordered(nodes), [_first(t) for t in model.inputs], _output(config))

    def layer(self, layer: Any) -> Any:
        """A layer as one module; an operation without state, such as ``keras.ops.add``, as itself."""
        layers = self.keras.layers
        if isinstance(layer, self.keras.Model):
            return self.model(layer)
        if isinstance(layer, layers.InputLayer):
            return _enter(layer.batch_shape, layer.dtype)
        if not isinstance(layer, layers.Layer):
            return layer
        if getattr(layer, "mask_zero", False) or isinstance(layer, layers.Masking):
            raise ConfigError(f"Keras layer {layer.name!r} makes a mask, and masks are not carried over; pool without one")
        known = self.known(layer)
        return Foreign(layer) if known is None else known

    def known(self, layer: Any) -> nn.Module | None:
        """The layer in PyTorch's own modules, if it has the same meaning there."""
        layers, kind = self.keras.layers, type(layer)
        if layer.dtype_policy.name != "float32" or getattr(layer, "lora_enabled", False):
            return None
        if kind is layers.Dense:
            linear = _linear(layer)
            activation = self.activation(layer)
            return linear if activation is None else nn.Sequential(OrderedDict(linear=linear, activation=activation))
        if kind is layers.Embedding:
            table = Table(layer.input_dim, layer.output_dim).build()
            table.load_state_dict({"weight": layer.embeddings.value.detach().clone()}, assign=True)
            return nn.Sequential(OrderedDict(ids=Ids(), table=table))
        if kind is layers.Flatten and layer.data_format == "channels_last":
            return Shaped((-1,))
        if kind is layers.Reshape:
            return Shaped(layer.target_shape)
        if kind is layers.Dropout and layer.noise_shape is None:
            return nn.Dropout(layer.rate)
        if kind is layers.Activation:
            return self.activation(layer) or nn.Identity()
        if kind is layers.BatchNormalization:
            return None if getattr(layer, "renorm", False) else _norm(layer)
        name = kind.__name__ if getattr(layers, kind.__name__, None) is kind else ""
        if name in _CONVOLUTIONS:
            return self.convolution(layer, _CONVOLUTIONS[name])
        if name in _POOLS:
            return self.pool(layer, _POOLS[name])
        return _global(layer, _GLOBAL[name](1)) if name in _GLOBAL else None

    def convolution(self, layer: Any, kind: Any) -> nn.Module | None:
        """A convolution, with zeros in front of it where Keras puts more of them at one end than at the other."""
        pads = self.pads(layer, layer.kernel_size, layer.dilation_rate)
        if pads is None:
            return None
        even = all(a == b for a, b in pads)
        kernel, bias = layer.kernel.value.detach(), layer.bias
        *_, inputs, outputs = kernel.shape
        sizes = {"stride": layer.strides, "dilation": layer.dilation_rate, "groups": layer.groups}
        padding = tuple(a for a, _ in pads) if even else 0
        conv = kind(inputs * layer.groups, outputs, layer.kernel_size, padding=padding, bias=bias is not None, **sizes)
        rank = kernel.dim()
        state = {"weight": kernel.permute(rank - 1, rank - 2, *range(rank - 2)).contiguous()}
        conv.load_state_dict(state if bias is None else {**state, "bias": bias.value.detach().clone()}, assign=True)
        zeros = {} if even else {"zeros": (nn.ZeroPad1d if rank == 3 else nn.ZeroPad2d)(_flat(pads))}
        activation = self.activation(layer)
        if activation is None or isinstance(activation, _POINTWISE):
            return _turned(layer, rank, {**zeros, "conv": conv, **({} if activation is None else {"activation": activation})})
        return nn.Sequential(OrderedDict(conv=_turned(layer, rank, {**zeros, "conv": conv}), activation=activation))

    def pool(self, layer: Any, kind: Any) -> nn.Module | None:
        """A pooling layer; where Keras pads one end more than the other it repeats the border, as its torch backend does."""
        pads = self.pads(layer, layer.pool_size, (1,) * len(layer.pool_size))
        if pads is None:
            return None
        even, rank = all(a == b for a, b in pads), len(pads) + 2
        counted = {} if issubclass(kind, (nn.MaxPool1d, nn.MaxPool2d)) else {"count_include_pad": False}
        pool = kind(layer.pool_size, layer.strides, tuple(a for a, _ in pads) if even else 0, **counted)
        border = {} if even else {"border": (nn.ReplicationPad1d if rank == 3 else nn.ReplicationPad2d)(_flat(pads))}
        return _turned(layer, rank, {**border, "pool": pool})

    def pads(self, layer: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]] | None:
        """How far each dimension is extended before and after; None if that depends on a size that is not fixed."""
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if layer.padding != "same":
            return [(span if layer.padding == "causal" else 0, 0) for span in spans]
        shape = layer.input.shape
        sizes = shape[1:-1] if layer.data_format == "channels_last" else shape[2:]
        totals = []
        for span, stride, size in zip(spans, layer.strides, sizes, strict=True):
            if stride > 1 and (size is None or key(layer.name) in self.shared):
                return None
            totals.append(span if stride == 1 else max(0, (-(-size // stride) - 1) * stride + span + 1 - size))
        return [(total // 2, total - total // 2) for total in totals]

    def activation(self, layer: Any) -> nn.Module | None:
        """The activation behind a layer, None for none."""
        function, ours = layer.activation, self.keras.activations
        name = getattr(function, "__name__", "")
        if layer is self.bare or function is ours.linear:
            return None
        if name in _ACTIVATIONS and getattr(ours, name) is function:
            return cast(nn.Module, _ACTIVATIONS[name]())
        return Foreign(self.keras.layers.Activation(function))

    def parsed(self, value: Any) -> Any:
        """Arguments of a call out of a configuration, with a ``_Ref`` for each tensor."""
        if isinstance(value, (list, tuple)):
            return [self.parsed(v) for v in value]
        if not isinstance(value, Mapping):
            return value
        kind, config = value.get("class_name"), value.get("config", {})
        if kind == "__keras_tensor__":
            name, call, at = config["keras_history"]
            return _Ref(key(name), call, at)
        if kind == "__tuple__":
            return tuple(self.parsed(v) for v in config["value"])
        if kind is not None:
            return self.keras.saving.deserialize_keras_object(value)
        return {k: self.parsed(v) for k, v in value.items()}


def _linear(layer: Any) -> nn.Module:
    kernel, bias = layer.kernel.value.detach(), layer.bias
    linear = Dense(kernel.shape[0], kernel.shape[1], bias is not None).build()
    state = {"weight": kernel.T.clone(memory_format=torch.contiguous_format)}
    linear.load_state_dict(state if bias is None else {**state, "bias": bias.value.detach().clone()}, assign=True)
    return linear


def _norm(layer: Any) -> nn.Module | None:
    """A batch norm over the last of two to four dimensions."""
    rank = len(layer.get_build_config()["input_shape"])
    if rank not in (2, 3, 4) or layer.axis not in (-1, rank - 1):
        return None
    kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
    norm = kind(layer.moving_mean.shape[0], layer.epsilon, round(1 - layer.momentum, 12))
    ours, theirs = ("weight", "bias", "running_mean", "running_var"), ("gamma", "beta", "moving_mean", "moving_variance")
    found = ((n, getattr(layer, k)) for n, k in zip(ours, theirs, strict=True))
    norm.load_state_dict({n: v.value.detach().clone() for n, v in found if v is not None}, strict=False)
    return norm if rank == 2 else _turned(layer, rank, {"norm": norm})


def _global(layer: Any, pool: nn.Module) -> nn.Module:
    rank = layer.input_spec.ndim
    if layer.keepdims:
        return _turned(layer, rank, {"pool": pool})
    turned = _turned(layer, rank, {"pool": pool, "flat": nn.Flatten(1)})
    if hasattr(turned, "last"):
        del turned.last
    return turned


def _flat(pads: Sequence[tuple[int, int]]) -> Any:
    """As PyTorch's padding layers take it: the last dimension first."""
    return tuple(n for pair in reversed(pads) for n in pair)


def _turned(layer: Any, rank: int, parts: Mapping[str, nn.Module]) -> nn.Sequential:
    """Parts that want channels first, for a layer that may have them last."""
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return nn.Sequential(OrderedDict(parts))
    first, last = (0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)
    return nn.Sequential(OrderedDict(first=Turned(first), **parts, last=Turned(last)))


def _straighten(modules: Sequence[nn.Module]) -> None:
    """Take out, in place, turns that the next layer would turn back."""
    before: nn.Module | None = None
    for module in modules:
        if before is not None and isinstance(getattr(module, "first", None), Turned):
            del before.last, module.first
        if isinstance(getattr(module, "last", None), Turned):
            before = module
        elif not isinstance(module, _POINTWISE):
            before = None


def _enter(shape: Sequence[int | None], dtype: str) -> Enter:
    return Enter(tuple(shape[1:]), getattr(torch, dtype))


def _final(keras: Any, model: Any) -> Any:
    """The layer whose output is the model's."""
    if isinstance(model, keras.Sequential):
        layer = model.layers[-1]
    else:
        layer = next(op for op in model.operations if key(op.name) == _output(model.get_config()).name)
    return _final(keras, layer) if isinstance(layer, keras.Model) else layer


def _last(keras: Any, model: Any) -> Any:
    """The layer whose softmax or sigmoid is the last thing a model does."""
    layer = _final(keras, model)
    if getattr(layer, "activation", None) not in (keras.activations.softmax, keras.activations.sigmoid):
        raise ConfigError(f"the last layer of {model.name!r}, {layer.name!r}, ends in no softmax or sigmoid; drop logits=True")
    return layer


def _output(config: Mapping[str, Any]) -> _Ref:
    """The one output of a functional configuration, however it is wrapped."""
    found = config["output_layers"]
    while isinstance(found, Mapping) or not isinstance(found[0], str):
        if len(found) != 1:
            raise ConfigError(f"Keras model {config['name']!r} has {len(found)} outputs; a model here has one, the score")
        (found,) = found.values() if isinstance(found, Mapping) else found
    name, call, at = found
    return _Ref(key(name), call, at)


def _first(tensor: Any) -> str:
    """The name of the input layer a Keras tensor comes from."""
    return key(tensor._keras_history[0].name)


def _ordered(nodes: Sequence[_Node]) -> list[_Node]:
    """Calls in an order in which each comes after those whose values it needs."""
    order: list[_Node] = []
    done: set[tuple[str, int]] = set()
    while waiting := [n for n in nodes if (n.name, n.call) not in done]:
        ready = [n for n in waiting if {(r.name, r.call) for r in _refs((n.args, n.kwargs))} <= done]
        if not ready:
            names = ", ".join(n.name for n in waiting)
            raise ConfigError(f"the Keras graph cannot be ordered; these calls wait for one another: {names}")
        order += ready
        done |= {(n.name, n.call) for n in ready}
    return order


def _given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without those that Keras adds at every call."""
    return {name: value for name, value in kwargs.items() if name not in ("mask", "training")}


def _refs(value: Any) -> Iterator[_Ref]:
    if isinstance(value, _Ref):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _refs(inner)


def _filled(value: Any, values: Mapping[tuple[str, int], Any]) -> Any:
    """Arguments with each ``_Ref`` replaced by what it stands for."""
    if isinstance(value, _Ref):
        found = values[value.name, value.call]
        return found[value.at] if isinstance(found, (list, tuple)) else found
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(v, values) for v in value)
    return {k: _filled(v, values) for k, v in value.items()} if isinstance(value, Mapping) else value
