"""Where a captured graph can go, and how to call it from there: ONNX, OpenVINO, torch.export, plain PyTorch.

Each target is a function that writes its files and gives back a call over the files it wrote, opened as a stranger would
open them: what is checked is what was written. Weights stay packed in each. Optimizers of graphs fold constants and would
write int8 weights as fp32, so folding is limited to what is smaller than ``FOLD``; OpenVINO keeps bytes but not half bytes,
and so gets bytes.

*torch* is Python: one class over PyTorch's own operations, and its weights as safetensors. TorchScript was the usual way and
is deprecated; a program of ``torch.export`` is there as *pt2*; a package compiled by AOTInductor runs on one kind of processor
with one version of PyTorch. The page of code can be read, changed and run by anybody, and unpickles nothing. A module with
control flow, which nobody can capture, still leaves this way, as its own class with its layers as they have become.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pennyweight import __version__
from pennyweight.accelerate.compile import plain
from pennyweight.core.errors import DeviceError
from pennyweight.export.graph import Answer, Graph, quiet
from pennyweight.model.onnx import session
from pennyweight.model.spec import Spec

FOLD = 256
"""Bytes of a constant up to which an optimizer may compute with it ahead of time."""
LARGE = 1_900_000_000
"""Bytes of weights from which ONNX keeps them in a file beside the graph: a protobuf ends at 2 GB."""

Call = Callable[..., Answer]
Numbers = Callable[[Sequence[Tensor]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Arrived:
    """A graph in another runtime, opened from its files; ``call`` takes a tensor for each input."""

    call: Call
    runtime: str
    """What runs it, with its version."""
    opset: str = ""
    """The version of its operations, where they have one."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """A place to export to: what must be installed, and what writes it."""

    write: Callable[[Graph, Path], Arrived]
    needs: tuple[str, ...]
    remedy: str

    def missing(self) -> str:
        """What is not installed and how to get it; empty when all is there."""
        lacking = [p for p in self.needs if importlib.util.find_spec(p) is None]
        return f"needs {', '.join(lacking)}: {self.remedy}" if lacking else ""


def to_onnx(graph: Graph, folder: Path) -> Arrived:
    """``model.onnx``: what ONNX Runtime loads on a server, a phone or in a browser."""
    file = folder / f"{graph.name}.onnx"
    opset = _onnx(graph, file, wide=False)
    running = session(str(file), 1)

    def call(*given: Tensor) -> Answer:
        return _tensors(running.run(None, {i.name: t.numpy() for i, t in zip(graph.inputs, given, strict=True)}))

    return Arrived(call, f"onnxruntime {_version('onnxruntime')}", opset)


def _onnx(graph: Graph, file: Path, wide: bool) -> str:
    """Write the graph as ONNX, and say its opset."""
    if graph.onnx is not None:
        proto = graph.onnx.proto()
        file.write_bytes(graph.onnx.file())
        return ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in proto.opset_import)
    optimizer: Any = importlib.import_module("onnxscript.optimizer")
    with quiet():
        program: Any = torch.onnx.export(
            graph.capture(wide).program,
            input_names=[i.name for i in graph.inputs],
            output_names=list(graph.outputs),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        optimizer.optimize_ir(program.model, input_size_limit=FOLD)
    _clean(program.model, graph)
    program.save(str(file), external_data=sum(t.nbytes for t in graph.compact.state_dict().values()) > LARGE)
    return ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in program.model.opset_imports.items())


def _clean(model: Any, graph: Graph) -> None:
    """Leave out the exporter's notes, which hold paths of this machine; put in where the graph comes from."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "pennyweight", __version__
    model.metadata_props.update(
        factory=graph.bundle.model.spec.factory,
        plan=json.dumps(list(graph.bundle.plan), sort_keys=True),
        inputs=json.dumps([dataclasses.asdict(i) for i in graph.inputs]),
        torch=torch.__version__,
    )


def to_openvino(graph: Graph, folder: Path) -> Arrived:
    """``model.xml`` and ``model.bin``, made of the ONNX graph."""
    openvino: Any = importlib.import_module("openvino")
    source, file = folder / f".{graph.name}.onnx", folder / f"{graph.name}.xml"
    opset = _onnx(graph, source, wide=True)
    openvino.save_model(openvino.convert_model(str(source)), str(file), compress_to_fp16=False)
    for left in folder.glob(f".{graph.name}.onnx*"):
        left.unlink()
    # In fp32, or a processor with AMX would round to bf16 unasked and the check would be of that.
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)

    def call(*given: Tensor) -> Answer:
        answered = compiled({i.name: t.numpy() for i, t in zip(graph.inputs, given, strict=True)})
        return _tensors([answered[name] for name in graph.outputs])

    return Arrived(call, f"openvino {_version('openvino')}", opset)


def to_pt2(graph: Graph, folder: Path) -> Arrived:
    """``model.pt2``: a program for ``torch.export.load``, to run, compile or lower further."""
    file, program = folder / f"{graph.name}.pt2", graph.capture().program
    for node in program.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(note, None)  # half of the file, and paths of this machine
    program.example_inputs = None
    torch.export.save(program, file)
    module = torch.export.load(file).module()
    with zipfile.ZipFile(file) as archive:
        described = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("models/model.json"))))
    opset = ", ".join(f"{domain} {version}" for domain, version in described["opset_version"].items())
    return Arrived(_call(module), f"torch {torch.__version__}", opset)


def to_torch(graph: Graph, folder: Path) -> Arrived:
    """``model.py`` and ``model.safetensors``: an ``nn.Module`` that needs PyTorch and safetensors, nothing else."""
    try:
        flat = graph.capture().flat
    except DeviceError as error:
        return _own(graph, folder, str(error))
    file = folder / f"{graph.name}.py"
    for node in flat.graph.nodes:
        if (node.op == "get_attr" and not isinstance(_at(flat, node.target), Tensor)) or node.op == "call_module":
            raise DeviceError(f"it calls {node.target}, a graph inside the graph, which has no form as a page of Python")
    _save(folder, graph.name, {n.target: _at(flat, n.target) for n in flat.graph.nodes if n.op == "get_attr"})
    code = flat.graph.python_code("self").src.strip()
    file.write_text(_PAGE.format(**_words(graph), forward=textwrap.indent(code, "    ")))
    return Arrived(_call(_loaded(file)), f"torch {torch.__version__}")


def _own(graph: Graph, folder: Path, why: str) -> Arrived:
    """The module's own class, for one that cannot be captured; ours all can, so this is somebody's whose class they have."""
    spec: Spec = graph.bundle.model.spec
    package, _, name = spec.factory.partition(":")
    if package.startswith("pennyweight.") or graph.name != "model":
        raise DeviceError(why)
    module = plain(graph.module.get_submodule("module"))
    _save(folder, graph.name, module.state_dict())
    changed = {path: module.get_submodule(path) for path in spec.layers}
    lines = [f"    put(module, {path!r}, nn.{_constructed(layer)})" for path, layer in changed.items()]
    words = _words(graph) | {"package": package, "factory": name, "args": dict(spec.args), "layers": "\n".join(lines)}
    file = folder / f"{graph.name}.py"
    file.write_text(_OWN.format(**words).replace("\n\n\n    module.load", "\n    module.load"))
    made = _loaded(file)
    columns = {i.column: at for at, i in enumerate(graph.inputs)}

    def call(*given: Tensor) -> Answer:
        with torch.inference_mode():
            out = made(*given) if spec.inputs else made({name: given[at] for name, at in columns.items()})
        return (out.squeeze(-1) if out.dim() == 2 and out.shape[1] == 1 else out,)

    return Arrived(call, f"torch {torch.__version__}", note=f"as its own class, since {why}")


def _constructed(layer: nn.Module) -> str:
    """The call that makes a layer: PyTorch prints its layers so."""
    if getattr(nn, type(layer).__name__, None) is not type(layer) or "\n" in repr(layer):
        raise DeviceError(f"a {type(layer).__name__} is no single layer of torch.nn, and cannot be written down")
    return repr(layer)


def _save(folder: Path, name: str, state: dict[str, Tensor]) -> None:
    whole = {k: t.detach().contiguous().clone() for k, t in sorted(state.items())}
    (folder / f"{name}.safetensors").write_bytes(safetensors.torch.save(whole))


def _at(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _words(graph: Graph) -> dict[str, Any]:
    inputs = [f"    {i.name}: {i.dtype} [{', '.join(map(str, i.shape))}]" for i in graph.inputs]
    return {
        "name": graph.name,
        "made": f"written by Pennyweight {__version__} with PyTorch {torch.__version__}",
        "inputs": "\n".join(inputs),
        "outputs": ", ".join(graph.outputs),
    }


def _loaded(file: Path) -> nn.Module:
    """What a page of Python just written gives to whoever imports it."""
    found = importlib.util.spec_from_file_location(f"pennyweight_export_{file.stem}", file)
    assert found is not None and found.loader is not None
    page = importlib.util.module_from_spec(found)
    found.loader.exec_module(page)
    module: nn.Module = page.load()
    return module


def _call(module: nn.Module) -> Call:
    def call(*given: Tensor) -> Answer:
        with torch.inference_mode():
            output = module(*given)
        return tuple(output) if isinstance(output, (tuple, list)) else (output,)

    return call


def _tensors(arrays: Sequence[Any]) -> Answer:
    return tuple(torch.from_numpy(a) for a in arrays)


def _version(package: str) -> str:
    return str(importlib.import_module("importlib.metadata").version(package))


_PAGE = '''\
"""A model in PyTorch's own operations, {made}.

    from {name} import load

    {outputs} = load()(...)

Its weights lie beside it in {name}.safetensors. Inputs, in order:

{inputs}
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import device, inf, nan, nn  # noqa: F401


class Model(nn.Module):
    def __init__(self, state):
        super().__init__()
        for path, tensor in state.items():
            *parents, name = path.split(".")
            owner = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner._modules[parent]
            owner.register_buffer(name, tensor)

{forward}


def load(file=Path(__file__).with_suffix(".safetensors")):
    return Model(load_file(file)).eval()
'''

_OWN = '''\
"""{factory} of {package} with its layers as they have become, {made}.

    from {name} import load

    {outputs} = load()(...)

Its weights lie beside it in {name}.safetensors; {package} must be importable. Inputs, in order:

{inputs}
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn  # noqa: F401

from {package} import {factory}


def put(module, path, layer):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def load(file=Path(__file__).with_suffix(".safetensors")):
    module = {factory}(**{args!r})
{layers}
    module.load_state_dict(load_file(file))
    return module.eval()
'''

TARGETS: dict[str, Target] = {
    "onnx": Target(to_onnx, ("onnx", "onnxscript", "onnxruntime"), "pip install pennyweight[onnx]"),
    "openvino": Target(to_openvino, ("onnx", "onnxscript", "openvino"), "pip install pennyweight[openvino]"),
    "pt2": Target(to_pt2, (), ""),
    "torch": Target(to_torch, (), ""),
}
"""Where a bundle can go, by name."""
