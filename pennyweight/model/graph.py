"""Any ``nn.Module`` as a Model that needs none of its code: the recorded graph is the spec.

``of(module, example)`` records what forward does (``trace``), and the Model it gives has ``restore`` as its factory and that
graph, as JSON, as its arguments: a bundle of it loads where the module's class is unknown, nothing is unpickled, and only
operations on a list are called (``codec``). Layers of ``torch.nn`` stay at their own paths under their own names in the state,
so they compress like those of our own models; ``nn.Sequential`` stays one, so what needs chains finds them. Restored, it is
``fx``'s generated code. What forward never reads is left out.

The alternatives: naming the class as a factory needs its code wherever the bundle goes, and a pickle runs what it is given;
``torch.export`` takes layers apart (see ``trace``). The class is the fallback here, for a module that cannot be recorded.

What it costs: control flow is recorded as it went for the example's shapes, so each input keeps its shape behind the batch
dimension, and a graph is checked on one row, on the example and on twice its rows before it is given out. The module is
recorded in evaluation; recorded once more in training, arguments that differ (``F.dropout(x, training=self.training)``) follow
the mode. Code that only training runs is left out. Two layers that share one weight each get a copy.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import keyword
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx, nn

from pennyweight.core.config import decode
from pennyweight.core.config import encode as plain
from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.model import codec
from pennyweight.model.codec import layer_of
from pennyweight.model.spec import Model, Spec, build
from pennyweight.model.trace import Tracer, names_of, tensor_at, trace, where

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""How far a restored graph may be from its module: sums in another order."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of forward, and what a flat column is made into at ``path``."""

    name: str
    path: str
    shape: tuple[int, ...]
    """Without the batch dimension."""
    dtype: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A layer of ``torch.nn`` at its path."""

    path: str
    kind: str
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """An ``nn.Sequential`` that was called as a whole, and the names of what it runs."""

    path: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """A parameter or buffer that forward reads itself."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spread: tuple[float, float] | None = None
    """Of a parameter, mean and standard deviation: what it starts from where the graph is trained anew."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation: a layer, a function or a method called, an attribute or a held tensor read."""

    op: Literal["layer", "function", "method", "attribute", "tensor"]
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A recorded forward. Operations refer to inputs and to earlier ones by number, inputs first."""

    inputs: tuple[Input, ...]
    parts: tuple[Part, ...]
    runs: tuple[Run, ...]
    """Outer ones before inner ones; one at the path "" is the whole module, and then there are no nodes."""
    held: tuple[Held, ...]
    nodes: tuple[Node, ...]
    output: int


def of(module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str] = ()) -> Model:
    """The Model that a live module is, with copies of its weights; the module is left as it was.

    Args:
        module: any module whose forward takes tensors by position and gives one tensor, [B] or [B, ...].
        example: a tensor for each input, all with the same number of rows (one or more) first.
        inputs: the dataset's column that each input reads; the names of forward's parameters if empty.

    Raises:
        ConfigError: the example does not fit, or the module can neither be recorded nor rebuilt from its class.
            A Model rebuilt from its class has that class as its factory, which whoever builds it must allow.
    """
    given = _example(module, example, inputs)
    try:
        return _recorded(module, given, tuple(inputs))
    except ConfigError as error:
        try:
            return Model.of(module, factory(module, example, inputs))
        except ConfigError as second:
            remedy = "put its class into an importable module and pass a Spec that names it, with its arguments"
            raise ConfigError(f"{error}. Nor can it be rebuilt from its class: {second}. Remedy: {remedy}") from error


def factory(module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str] = ()) -> Spec:
    """A spec that names a module's own class, with the arguments read back from attributes of the same names.

    Raises:
        ConfigError: the class cannot be imported, an argument is not to be found, or what it makes differs from the module.
    """
    given, cls = _example(module, example, inputs), type(module)
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ConfigError(f"the class {cls.__module__}.{cls.__qualname__} cannot be imported by that name")
    columns = tuple(inputs) or tuple(names_of(module, len(given)))
    spec = Spec(f"{cls.__module__}:{cls.__qualname__}", _arguments(module), {}, columns)
    try:
        _compare(module, Model.of(module, spec).build((spec.factory,)), given)
    except BundleError as error:
        raise ConfigError(str(error)) from error
    return spec


def restore(graph: Graph) -> nn.Module:
    """The module of a recorded graph, its weights not loaded: the factory of the specs that ``of`` makes.

    Raises:
        ConfigError: the graph names anything that is not on the list, or does not hold together.
    """
    try:
        root = _skeleton(graph)
        if isinstance(root, nn.Sequential):
            return root
        made = fx.GraphModule(root, _drawn(graph, root), "Graph")
        for name, child in root.named_children():
            made.add_module(name, child)  # fx makes bare containers of its own
    except (AssertionError, AttributeError, KeyError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(f"the stored graph cannot be restored: {error}") from error
    return made


def logits(model: Model) -> Model:
    """The model without the softmax or sigmoid it ends in, as losses, metrics and proofs here want; others as they are."""
    if model.spec.factory != f"{__name__}:restore":
        return model
    bare = _bare(decode(Graph, model.spec.args["graph"], "args.graph"))
    return model if bare is None else Model(dataclasses.replace(model.spec, args={"graph": plain(bare)}), model.state)


def _bare(graph: Graph) -> Graph | None:
    """The graph without its last operation, if that is a softmax or a sigmoid."""
    kinds = {p.path: p.kind for p in graph.parts}
    whole = next((r for r in graph.runs if not r.path), None)
    if whole is not None:
        if kinds.get(whole.names[-1]) not in ("Softmax", "Sigmoid") or len(whole.names) < 2:
            return None
        shorter = dataclasses.replace(whole, names=whole.names[:-1])
        runs = tuple(shorter if r is whole else r for r in graph.runs)
        return dataclasses.replace(graph, runs=runs, parts=tuple(p for p in graph.parts if p.path != whole.names[-1]))
    at = graph.output - len(graph.inputs)
    if at < 0 or at != len(graph.nodes) - 1:
        return None
    node = graph.nodes[at]
    name = kinds.get(node.target, "") if node.op == "layer" else node.target.rpartition(".")[2]
    if name.lower() not in ("softmax", "sigmoid") or not node.args or set(node.args[0]) != {"node"}:
        return None
    parts = tuple(p for p in graph.parts if node.op != "layer" or p.path != node.target)
    return dataclasses.replace(graph, nodes=graph.nodes[:at], output=node.args[0]["node"], parts=parts)


class Enter(nn.Module):
    """An input: a flat column given the type and the shape behind the rows that the module was made for."""

    def __init__(self, shape: Sequence[int | None], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(shape), dtype
        flat = len(self.shape) < 2 and self.shape != (1,)  # as columns come
        self.sizes = None if flat or self.shape.count(None) > 1 else [-1 if n is None else n for n in self.shape]

    def forward(self, x: Tensor) -> Tensor:
        """[B, *shape] from any layout of as many numbers a row; None in a shape is any length."""
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        return x if self.sizes is None else x.reshape(x.shape[0], *self.sizes)

    def extra_repr(self) -> str:
        """What it makes, as ``print(module)`` shows it."""
        return f"{list(self.shape)}, {self.dtype}"


def _example(module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str]) -> list[Tensor]:
    """The example on the CPU, once it and what the module makes of it are found to be of the right kind."""
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise ConfigError(f"a {name} is no torch.nn.Module")
    if not example or not all(isinstance(t, Tensor) for t in example):
        raise ConfigError(f"{name} needs an example: a sequence of tensors, one for each of its inputs")
    shapes = ", ".join(str(list(t.shape)) for t in example)
    if any(t.dim() == 0 for t in example) or len({len(t) for t in example}) > 1 or len(example[0]) == 0:
        raise ConfigError(
            f"inputs of {name} have the shapes {shapes}; each needs the same rows, one or more, as its first dimension"
        )
    if inputs and len(inputs) != len(example):
        raise ConfigError(f"{len(inputs)} columns ({', '.join(inputs)}) for the {len(example)} inputs of the example of {name}")
    names_of(module, len(example))
    given = [t.detach().cpu().clone() for t in example]
    for rows in (given, [t[:1] for t in given]):
        _judged(name, _answer(_copy(module), rows), len(rows[0]))
    return given


def _judged(name: str, output: Any, rows: int) -> None:
    if not isinstance(output, Tensor):
        parts = f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else ""
        raise ConfigError(
            f"{name} gives a {type(output).__name__}{parts}; a model here gives one tensor: return the score alone"
        )
    if output.dim() == 0 or len(output) != rows:
        raise ConfigError(
            f"{name} gives {list(output.shape)} for {rows} rows; the first dimension of its output must be the rows"
        )


def _copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation on the CPU, so that nothing that happens to it is seen."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(module).cpu().eval()
    except Exception as error:  # whatever the code of somebody else raises
        raise ConfigError(f"{type(module).__name__} cannot be copied: {error}") from error


def _answer(module: nn.Module, rows: Sequence[Tensor], seed: int = 0) -> Any:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            return module(*(t.clone() for t in rows))
    except Exception as error:  # whatever the code of somebody else raises
        at = where(error.__traceback__)
        raise ConfigError(f"{type(module).__name__} itself fails on {len(rows[0])} rows of the example{at}: {error}") from error


def _compare(module: nn.Module, made: nn.Module, example: Sequence[Tensor]) -> None:
    """Whether two modules give the same for one row, for the example, and for twice its rows."""
    own = _copy(module)
    for rows in _sizes(example):
        want, got = _answer(own, rows), _answer(made, [t.flatten(1) if t.dim() > 1 else t for t in rows], 1)
        same = isinstance(got, Tensor) and got.shape == want.shape
        if not same or not torch.allclose(got.float(), want.float(), **TOLERANCE, equal_nan=True):
            off = f"by up to {(got - want).abs().max():.3g}" if same else f"in shape, {list(got.shape)} for {list(want.shape)}"
            reason = "its forward draws random numbers, or keeps something between calls"
            raise ConfigError(f"{type(module).__name__} rebuilt differs on {len(rows[0])} rows {off}: {reason}")


def _sizes(example: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One row, the example, twice the example."""
    return [t[:1] for t in example], list(example), [torch.cat([t, t]) for t in example]


def _recorded(module: nn.Module, example: Sequence[Tensor], inputs: tuple[str, ...]) -> Model:
    names = names_of(module, len(example))
    one, _, many = _sizes(example)
    tracer = trace(_copy(module), one, many, names)
    graph = _written(tracer, example)
    if graph.nodes:
        graph = _with_modes(graph, module, (one, many), names)
    spec = Spec(f"{__name__}:restore", {"graph": plain(graph)}, {}, inputs or tuple(names))
    state = {path: tensor_at(tracer.root, path).detach().clone() for path in build(spec).state_dict()}
    model = Model(spec, state)
    _compare(module, model.build(), example)
    return model


def _written(tracer: Tracer, example: Sequence[Tensor]) -> Graph:
    """The graph of a tracer as a value."""
    root, every = tracer.root, list(tracer.graph.nodes)
    for name in root._modules:
        if hasattr(fx.GraphModule, name):
            raise ConfigError(f"{type(root).__name__} has a layer named {name!r}, which a graph keeps for itself; rename it")
    output = every[-1].args[0]
    if not isinstance(output, fx.Node):
        raise ConfigError(f"{type(root).__name__} gives the same for every input")
    numbers = {node: at for at, node in enumerate(every[:-1])}
    called = dict.fromkeys(str(n.target) for n in every if n.op == "call_module")
    read = dict.fromkeys(str(n.target) for n in every if n.op == "get_attr")
    apart = tracer.apart | {_above(_above(t)) for t in read if _above(t) in called}
    runs = _runs(root, tracer.called - apart, called)
    whole = bool(runs) and not runs[0].path
    return Graph(
        inputs=tuple(_input(root, name, t) for name, t in zip(tracer.names, example, strict=True)),
        parts=tuple(_part(root, path) for path in called),
        runs=runs,
        held=tuple(_held(root, path) for path in read if _above(path) not in called),
        nodes=() if whole else tuple(_node(n, numbers) for n in every[len(example) : -1]),
        output=0 if whole else numbers[output],
    )


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _runs(root: nn.Module, called: set[str], layers: Mapping[str, None]) -> tuple[Run, ...]:
    """Each ``nn.Sequential`` that only its own forward uses; the whole module only if there is nothing else in it."""
    found = {
        path: Run(path, tuple(module._modules))
        for path, module in root.named_modules()
        if path in called and isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    }
    inside = {f"{run.path}.{name}".removeprefix(".") for run in found.values() for name in run.names}
    if not inside <= {*layers, *found} or not called <= {*layers, *found}:
        found.pop("", None)
    return tuple(found.values())


def _input(root: nn.Module, name: str, tensor: Tensor) -> Input:
    path = f"enter_{name}"
    while hasattr(root, path):
        path += "_"
    return Input(name, path, tuple(tensor.shape[1:]), _dtype(tensor))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _part(root: nn.Module, path: str) -> Part:
    module = root.get_submodule(path)
    try:
        _, (kind, args) = next(iter(codec.encode(module, _no_node).items()))
        made = codec.layer(kind, args)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (module, made)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"made again it holds {_listed(shapes[1])}, not {_listed(shapes[0])}")
    except ConfigError as error:
        raise ConfigError(f"the layer {path!r}, a {type(module).__name__}, cannot be stored: {error}") from error
    return Part(path, kind, args)


def _no_node(node: fx.Node) -> NoReturn:
    raise AssertionError(f"{node} among a layer's arguments")


def _listed(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"


def _held(root: nn.Module, path: str) -> Held:
    tensor = tensor_at(root, path)
    spread = None
    if isinstance(tensor, nn.Parameter):
        whole = tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0)
        spread = (float(whole.mean()), float(whole.std(correction=0)))
    return Held(path, tuple(tensor.shape), _dtype(tensor), spread)


def _node(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Node:
    """An operation of fx's as one of ours."""
    target = str(node.target)
    args, kwargs = (codec.encode(v, numbers.__getitem__) for v in (node.args, node.kwargs))
    args, kwargs = tuple(args["tuple"]), kwargs["dict"]
    if node.op == "get_attr":
        return Node("tensor", target)
    if node.target is getattr:
        return Node("attribute", args[1], args[:1])
    if node.op == "call_function":
        return Node("function", codec.function_name(node.target), args, kwargs)
    return Node("layer" if node.op == "call_module" else "method", target, args, kwargs)


def _with_modes(graph: Graph, module: nn.Module, sizes: tuple[list[Tensor], list[Tensor]], names: Sequence[str]) -> Graph:
    """The graph with arguments that differ in training as a pair; as it is, where training runs other operations."""
    twin = _copy(module)
    for child in twin.modules():
        child.training = layer_of(child) is None  # layers keep their statistics to themselves
    try:
        other = _written(trace(twin, *sizes, names), sizes[0])
        nodes = (
            dataclasses.replace(a, args=_mode(a.args, b.args), kwargs=_mode(a.kwargs, b.kwargs))
            for a, b in zip(graph.nodes, other.nodes, strict=True)
            if (a.op, a.target) == (b.op, b.target) or _differ()
        )
        return dataclasses.replace(graph, nodes=tuple(nodes))
    except (ConfigError, ValueError):
        return graph


def _differ() -> NoReturn:
    raise ValueError("other operations in training than in evaluation")


def _mode(a: Any, b: Any) -> Any:
    """A value in evaluation and in training: itself if both are the same, else a pair."""
    if type(a) is type(b) and a == b:
        return a
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return type(a)(_mode(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys() or "node" in a:
            _differ()
        return {k: _mode(a[k], b[k]) for k in a}
    return {"mode": [a, b]}


def _arguments(module: nn.Module) -> dict[str, Any]:
    """A module's constructor arguments, from attributes of the same names."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        with contextlib.suppress(ConfigError, AttributeError):
            found[name] = plain(getattr(module, name))
        if name not in found and parameter.default is parameter.empty:
            raise ConfigError(f"{type(module).__name__} keeps no attribute {name!r} to read that argument back from")
    return found


def _skeleton(graph: Graph) -> nn.Module:
    """All layers and tensors of a graph at their paths, without its operations."""
    root = nn.Module() if graph.nodes else nn.Sequential()
    for given in graph.inputs:
        _put(root, given.path, Enter(given.shape, codec.decode({"dtype": given.dtype}, _reference)))
    for run in graph.runs:
        home = nn.Sequential() if run.path else root
        for name in run.names:
            home.add_module(_atom(name), nn.Module())
        if run.path:
            _put(root, run.path, home)
    for part in graph.parts:
        _put(root, part.path, codec.layer(part.kind, part.args))
    for held in graph.held:
        tensor = torch.zeros(held.shape, dtype=codec.decode({"dtype": held.dtype}, _reference))
        if held.spread is not None and tensor.is_floating_point():
            tensor = nn.Parameter(tensor.normal_(*held.spread))
        _put(root, held.path, tensor)
    return root


def _put(root: nn.Module, path: str, thing: nn.Module | Tensor) -> None:
    """Put a layer or a tensor at a path, with bare modules on the way there."""
    *way, last = [_atom(atom) for atom in path.split(".")]
    for atom in way:
        if atom not in root._modules:
            root.add_module(atom, nn.Module())
        root = root.get_submodule(atom)
    if isinstance(thing, nn.Module):
        root.add_module(last, thing)
    elif isinstance(thing, nn.Parameter):
        root.register_parameter(last, thing)
    else:
        root.register_buffer(last, thing)


def _atom(name: str) -> str:
    """One name of a path; it will stand in generated code, so it may hold no quote."""
    if not name or not name.isprintable() or set(name) & set("\"'\\."):
        raise ConfigError(f"the stored graph names {name!r}, which can be no name of a layer")
    return name


def _identifier(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"the stored graph names {name!r}, which can be no argument")
    return name


def _drawn(graph: Graph, root: nn.Module) -> fx.Graph:
    """The operations as a graph of fx's."""
    drawn = fx.Graph()
    entered = [drawn.placeholder(_identifier(given.name)) for given in graph.inputs]
    values = [drawn.call_module(given.path, (x,)) for given, x in zip(graph.inputs, entered, strict=True)]

    def resolved(reference: Mapping[str, Any]) -> fx.Node:
        if "node" in reference:
            return _at(values, reference["node"])
        if "mode" not in reference:
            _reference(reference)
        training = drawn.create_node("get_attr", "training")
        pair = [codec.decode(v, _reference) for v in reference["mode"]]
        return training if pair == [False, True] else drawn.call_function(operator.getitem, (pair, training))

    for at, node in enumerate(graph.nodes):
        try:
            args = tuple(codec.decode(v, resolved) for v in node.args)
            kwargs = {_identifier(k): codec.decode(v, resolved) for k, v in node.kwargs.items()}
            values.append(_called(drawn, root, node, args, kwargs))
        except ConfigError as error:
            raise ConfigError(f"graph.nodes[{at}]: {error}") from error
    drawn.output(_at(values, graph.output))
    return drawn


def _called(drawn: fx.Graph, root: nn.Module, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if node.op == "function":
        return drawn.call_function(codec.function(node.target), args, kwargs)
    if node.op == "method":
        return drawn.call_method(codec.method(node.target), args, kwargs)
    if node.op == "attribute":
        return drawn.call_function(getattr, (*args, codec.attribute(node.target)))
    for atom in node.target.split("."):
        _atom(atom)
    if node.op == "layer":
        root.get_submodule(node.target)
        return drawn.call_module(node.target, args, kwargs)
    if not isinstance(tensor_at(root, node.target), Tensor):
        raise ConfigError(f"{node.target!r} is no tensor of the stored graph")
    return drawn.create_node("get_attr", node.target)


def _at(values: Sequence[fx.Node], number: Any) -> fx.Node:
    if type(number) is not int or not 0 <= number < len(values):
        raise ConfigError(f"the stored graph refers to value {number!r} of {len(values)}")
    return values[number]


def _reference(reference: Any) -> NoReturn:
    raise ConfigError(f"{reference} stands where only a plain constant may")
