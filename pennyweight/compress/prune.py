"""Narrower layers: neurons that matter little are cut out, and norms are folded into their neighbours.

Whole neurons go, so that what is left is a smaller dense layer that runs faster everywhere. Zeroing single weights is the
known alternative: 90 % of them zero is neither smaller nor faster on a CPU (measured: 1.0 times). Torch-Pruning finds the
coupled layers of any graph; recommenders' dense parts are chains, for which a page is enough. Widths are rounded to a
multiple of 16, since odd ones can be slower than the layer they replace (VainF/Torch-Pruning issue 38).

Neurons are taken out one at a time, each time the one whose loss the others can best make up for: least squares on
calibration rows says what the next layer's weights become without it and what that costs (optimal brain surgeon, Hassibi &
Stork 1993, on whole neurons). On MovieLens this left .016 AUC of loss before any training at a quarter of the neurons,
where the largest activations with the same least squares left .026, and weights alone .025. It costs the cube of the width,
a tenth of a second at 256. Distillation brings most of the rest back. Without data, the size of weights must do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pennyweight.compress.rewrite import Change, chosen, finite, rewrite, sequences
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.dense import Dense, Identity, Norm
from pennyweight.model.layers import Dropout
from pennyweight.model.spec import Layer, call, replace
from pennyweight.model.transform import Env, Transform

ROWS = 4096
"""Calibration rows, and rows of a layer's input, that scores and least squares use at most."""

_BETWEEN = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Dropout, Dropout, nn.Identity),
)
"""Layers that treat each number on its own, so that neurons may go."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """One hidden layer whose neurons only the next dense layer reads, by paths."""

    first: str
    norms: tuple[str, ...]
    """Batch norms in between."""
    last: str
    width: int

    @property
    def paths(self) -> tuple[str, ...]:
        """All its layers that hold tensors."""
        return (self.first, *self.norms, self.last)


def chains(module: nn.Module) -> list[Chain]:
    """Hidden layers that can be made narrower: Linear, batch norms and activations, Linear, in one ``nn.Sequential``.

    Left alone: a last hidden layer that feeds a layer elsewhere, quantized layers, layers that stand at two places, and
    anything with a layer in between that mixes or sees all neurons (such as a layer norm).
    """
    return [chain for run in sequences(module) for chain in _chains(run)]


def _chains(run: Sequence[tuple[str, nn.Module]]) -> Iterator[Chain]:
    first, norms = "", tuple[str, ...]()
    width = 0
    for path, layer in run:
        if _linear(layer):
            if first:
                yield Chain(first, norms, path, width)
            first, norms, width = path, (), cast(nn.Linear, layer).out_features
        elif _norm(layer):
            norms = (*norms, path)
        elif type(layer) not in _BETWEEN:
            first = ""


@named("prune-neurons")
@dataclasses.dataclass(frozen=True)
class PruneNeurons(Transform):
    """Hidden layers of dense chains to fewer neurons."""

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["structure"]] = "structure"

    keep: float = 0.5
    """Share of neurons kept, above 0 and at most 1."""
    multiple: int = 16
    """Widths are rounded to a multiple of this; at least one multiple stays."""
    widths: tuple[int, ...] = ()
    """Widths of the hidden layers in order, in place of ``keep`` and ``multiple``."""
    score: Literal["activation", "weight"] = "activation"
    """``activation`` reads ``env.calib`` (or else ``env.train``); a layer no row reaches is scored by its weights."""
    only: tuple[str, ...] = ()
    """Patterns of paths of layers whose neurons may go; all if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths of layers to leave alone."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.multiple < 1 or any(w < 1 for w in self.widths):
            raise ConfigError(
                f"keep = {self.keep}, multiple = {self.multiple}, widths = {self.widths}: "
                "keep must be above 0 and at most 1, the others at least 1"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its hidden layers cut."""
        module = bundle.model.build(env.allow)
        found = [c for c in chains(module) if chosen(c.first, self.only, self.skip)]
        if not found:
            raise PlanError("no hidden layer to cut: Linear, activation, Linear in an nn.Sequential, not yet quantized")
        cuts = [(c, w) for c, w in zip(found, self._widths(found), strict=True) if w < c.width]
        if not cuts:
            have = ", ".join(f"{c.first} ({c.width})" for c in found)
            raise PlanError(f"no layer would get narrower than it is: {have}; keep fewer or round to a smaller multiple")
        for chain, _ in cuts:
            for path in (chain.first, chain.last):
                finite(path, cast(nn.Linear, module.get_submodule(path)).weight)
        rows = self._rows(env)
        before = {} if rows is None else _record(module, [c.last for c, _ in cuts], rows, bundle.model.spec.inputs)
        for chain, width in cuts:
            now = {} if rows is None else _record(module, [chain.last], rows, bundle.model.spec.inputs)
            seen = (now[chain.last][0], before[chain.last][1]) if chain.last in now else None
            _cut(module, chain, width, seen)
        return bundle.replace(model=rewrite(bundle.model, dict(_changes(module, [p for c, _ in cuts for p in c.paths]))))

    def sketch(self) -> PruneNeurons:
        """Neurons chosen by their weights: as many of them."""
        return dataclasses.replace(self, score="weight")

    def describe(self) -> str:
        """What it does."""
        if self.widths:
            return f"hidden layers cut to {', '.join(map(str, self.widths))} neurons"
        return f"hidden layers cut to {self.keep:.0%} of their neurons"

    def _widths(self, found: Sequence[Chain]) -> Sequence[int]:
        if not self.widths:
            return [min(c.width, max(1, round(self.keep * c.width / self.multiple)) * self.multiple) for c in found]
        have = ", ".join(f"{c.first} ({c.width})" for c in found)
        if len(self.widths) != len(found):
            raise PlanError(f"{len(self.widths)} widths for {len(found)} hidden layers: {have}")
        for chain, width in zip(found, self.widths, strict=True):
            if width > chain.width:
                raise PlanError(f"{chain.first} has {chain.width} neurons, {width} were asked for; layers are: {have}")
        return self.widths

    def _rows(self, env: Env) -> Dataset | None:
        if self.score == "weight":
            return None
        data = env.calib if env.calib is not None else env.train
        if data is None:
            raise PlanError("PruneNeurons scores by activation and needs env.calib; give it, or score='weight'")
        return data.head(ROWS)


def _record(module: nn.Module, paths: Sequence[str], rows: Dataset, inputs: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs [n, in] and outputs [n, out] of the dense layers at ``paths`` while the module scores rows."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(path: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = (args[0].flatten(0, -2)[:ROWS].clone(), output.flatten(0, -2)[:ROWS].clone())

        return record

    hooks = [module.get_submodule(path).register_forward_hook(recorder(path)) for path in paths]
    try:
        with torch.no_grad():
            call(module, next(iter(rows.batches(len(rows)))), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _cut(module: nn.Module, chain: Chain, width: int, seen: tuple[Tensor, Tensor] | None) -> None:
    """Cut a hidden layer of a module in place; ``seen`` is what reaches the next layer now and what that gave at first."""
    first, last = (cast(nn.Linear, module.get_submodule(p)) for p in (chain.first, chain.last))
    norms = [cast(nn.BatchNorm1d, module.get_submodule(p)) for p in chain.norms]
    if seen is None:
        kept = (_size(first, norms) * last.weight.norm(dim=0)).topk(width).indices.sort().values
        after = {n: t[:, kept] if t.dim() == 2 else t for n, t in last.state_dict().items()}
    else:
        kept, after = surgery(*seen, last.weight, cast("Tensor | None", last.bias), width)
    for path, layer in zip((chain.first, *chain.norms), (first, *norms), strict=True):
        replace(module, path, _made(layer, {n: t[kept] if t.dim() else t for n, t in layer.state_dict().items()}))
    replace(module, chain.last, _made(last, after))


def _size(first: nn.Linear, norms: Sequence[nn.BatchNorm1d]) -> Tensor:
    """How large each neuron's output is, by weights: its gain in a batch norm behind it, else the norm of its weights."""
    if norms and norms[0].affine:
        return norms[0].weight.abs()
    return cast(Tensor, first.weight.norm(dim=1))


def surgery(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Which ``width`` inputs a dense layer should keep, int64 [width], and its weights (and bias) on those.

    Finds weights that come near to giving y [n, out] for x [n, k], then takes inputs out one at a time, moving the weights
    of the others so that y changes least. With a bias only what varies counts, as the bias takes over the means. A thousandth
    of the mean variance is added to the covariance, so that weights of inputs that hardly vary stay where they were.
    """
    x, y, w = x.double(), y.double(), weight.T.double()
    nothing = torch.zeros((), dtype=torch.float64)
    middle, level = (nothing, nothing) if bias is None else (x.mean(0), y.mean(0))
    x, y = x - middle, y - level
    gram = x.T @ x
    gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
    inverse = torch.linalg.inv(gram)
    w = w + inverse @ (x.T @ (y - x @ w))
    alive = torch.ones(len(w), dtype=torch.bool)
    for _ in range(len(w) - width):
        cost = w.square().sum(1) / inverse.diagonal()
        at = int(torch.where(alive, cost, torch.inf).argmin())
        column = inverse[:, at] / inverse[at, at]
        w, inverse = w - torch.outer(column, w[at]), inverse - torch.outer(column, inverse[at])
        alive[at] = False
    kept = alive.nonzero().squeeze(1)
    after = {"weight": w[kept].T.float()}
    return kept, after if bias is None else {**after, "bias": (level - middle[kept] @ w[kept]).float()}


@named("fold-norms")
@dataclasses.dataclass(frozen=True)
class FoldNorms(Transform):
    """Batch norms that stand beside a dense layer into its weights: the same outputs with fewer operations.

    Into the layer before, or else into the one after. Comes after training, in which a norm does more than its formula, and
    before quantizing.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle without those norms."""
        module = bundle.model.build(env.allow)
        touched = [path for run in sequences(module) for path in _fold(module, run)]
        if not touched:
            raise PlanError("no batch norm stands beside a dense layer of fp32 in an nn.Sequential; fold before quantizing")
        return bundle.replace(model=rewrite(bundle.model, dict(_changes(module, touched))))

    def describe(self) -> str:
        """What it does."""
        return "batch norms folded into dense layers"


def _fold(module: nn.Module, run: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    """Fold the batch norms of a run in place, and name what changed."""
    # What does nothing in evaluation does not come between.
    paths = [path for path, layer in run if type(layer) not in (nn.Dropout, Dropout, nn.Identity)]
    for at, path in enumerate(paths):
        norm = module.get_submodule(path)
        if not _norm(norm):
            continue
        assert isinstance(norm, nn.BatchNorm1d)
        before, after = paths[at - 1] if at else "", paths[at + 1] if at + 1 < len(paths) else ""
        home = next((p for p in (before, after) if p and _linear(module.get_submodule(p))), None)
        if home is None:
            continue
        replace(module, home, _folded(cast(nn.Linear, module.get_submodule(home)), norm, home == before))
        replace(module, path, nn.Identity())
        yield from (path, home)


def _folded(linear: nn.Linear, norm: nn.BatchNorm1d, before: bool) -> nn.Module:
    """A dense layer that also does what the norm behind it (``before``), or in front of it, did."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = (variance + norm.eps).rsqrt() * (norm.weight.double() if norm.affine else 1)
    shift = (norm.bias.double() if norm.affine else 0) - mean * gain
    weight, bias = linear.weight.double(), torch.zeros(()) if linear.bias is None else linear.bias.double()
    if before:
        weight, bias = weight * gain.unsqueeze(1), bias * gain + shift
    else:
        weight, bias = weight * gain, bias + weight @ shift
    return _made(linear, {"weight": weight.float(), "bias": bias.float()})


def _made(like: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A layer like another with these tensors, whatever their sizes."""
    dense, norm = Dense.of(like), Norm.of(like)
    layer: Layer
    if dense is not None:
        outputs, inputs = state["weight"].shape
        layer = dataclasses.replace(dense, inputs=inputs, outputs=outputs, bias="bias" in state)
    else:
        assert norm is not None
        layer = dataclasses.replace(norm, features=len(state["running_mean"]))
    made = layer.build()
    made.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return made.requires_grad_(False).eval()


def _changes(module: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, Change]]:
    """What the layers at these paths are now, for the model's spec and state."""
    for path in paths:
        layer = module.get_submodule(path)
        yield path, (Dense.of(layer) or Norm.of(layer) or Identity(), layer.state_dict())


def _linear(layer: nn.Module) -> bool:
    dense = Dense.of(layer)
    return dense is not None and dense.data_type == "fp32"


def _norm(layer: nn.Module) -> bool:
    norm = Norm.of(layer)
    return norm is not None and norm.kind == "batch"
