"""A Keras 3 model on the torch backend as a Model: its own configuration is the spec, its dense layers are ``nn.Linear``.

``of(keras_model)`` gives a Model whose factory is ``restore`` and whose one argument is what Keras itself would save. Dense,
Embedding, Flatten, Dropout, batch norm and the usual activations become PyTorch's own modules, so they compress and run
like any other; every other layer runs as the Keras layer it is, with its weights in the state dict. A functional model's
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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pennyweight.core.config import encode
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.model.dense import Dense
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


class Enter(nn.Module):
    """An input: cast to its type, with a last dimension of 1 where the model was given one and the column has none."""

    def __init__(self, shape: Sequence[int | None], dtype: str) -> None:
        super().__init__()
        self.dims, self.one = len(shape), shape[-1] == 1
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor as the model's first layers expect it."""
        x = x.to(self.dtype)
        return x.unsqueeze(-1) if self.one and x.dim() == self.dims - 1 else x


class Ids(nn.Module):
    """Whole numbers for a table; Keras lets them come as floats."""

    def forward(self, x: Tensor) -> Tensor:
        """int64."""
        return x.long()


class Flat(nn.Module):
    """All but the first dimension as one."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, n]."""
        return x.reshape(len(x), -1)


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


class _Conversion:
    """Layers to modules; ``bare`` is the layer whose activation is left out."""

    def __init__(self, keras: Any, bare: Any = None) -> None:
        self.keras, self.bare = keras, bare

    def model(self, model: Any) -> nn.Module:
        """A sequential model as ``nn.Sequential``, a functional one as ``Graph``."""
        if isinstance(model, self.keras.Sequential):
            entry = model.inputs[0]
            named = [(_first(entry), Enter(entry.shape, entry.dtype)), *((key(la.name), self.layer(la)) for la in model.layers)]
            return nn.Sequential(OrderedDict(named))
        config = model.get_config()
        if "input_layers" not in config:
            raise ConfigError(f"{type(model).__name__} is a subclassed Keras model; name its class as the factory instead")
        nodes = [
            _Node(key(layer["name"]), at, self.parsed(node["args"]), self.parsed(_given(node["kwargs"])))
            for layer in config["layers"]
            for at, node in enumerate(layer["inbound_nodes"] or [{"args": [], "kwargs": {}}])
        ]
        layers = {key(op.name): self.layer(op) for op in model.operations}
        return Graph(layers, _ordered(nodes), [_first(t) for t in model.inputs], _output(config))

    def layer(self, layer: Any) -> Any:
        """A layer as one module; an operation without state, such as ``keras.ops.add``, as itself."""
        layers = self.keras.layers
        if isinstance(layer, self.keras.Model):
            return self.model(layer)
        if isinstance(layer, layers.InputLayer):
            return Enter(layer.batch_shape, layer.dtype)
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
            return Flat()
        if kind is layers.Dropout and layer.noise_shape is None:
            return nn.Dropout(layer.rate)
        if kind is layers.Activation:
            return self.activation(layer) or nn.Identity()
        if kind is layers.BatchNormalization and len(layer.get_build_config()["input_shape"]) == 2:
            return None if getattr(layer, "renorm", False) else _norm(layer)
        return None

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


def _norm(layer: Any) -> nn.Module:
    norm = nn.BatchNorm1d(layer.moving_mean.shape[0], layer.epsilon, round(1 - layer.momentum, 12))
    ours, theirs = ("weight", "bias", "running_mean", "running_var"), ("gamma", "beta", "moving_mean", "moving_variance")
    found = ((n, getattr(layer, k)) for n, k in zip(ours, theirs, strict=True))
    norm.load_state_dict({n: v.value.detach().clone() for n, v in found if v is not None}, strict=False)
    return norm


def _last(keras: Any, model: Any) -> Any:
    """The layer whose softmax or sigmoid is the last thing a model does."""
    if isinstance(model, keras.Sequential):
        layer = model.layers[-1]
    else:
        layer = next(op for op in model.operations if key(op.name) == _output(model.get_config()).name)
    if isinstance(layer, keras.Model):
        return _last(keras, layer)
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
