"""Narrower layers: neurons and channels that matter little are cut out, and norms are folded into their neighbours.

Whole neurons (or channels of a convolution) go, so that what is left is a smaller layer that runs faster everywhere. Zeroing
single weights is the known alternative: 90 % of them zero is neither smaller nor faster on a CPU (measured: 1.0 times). Which
of them can only go together, ``couple`` finds by tracing the model; one that takes a whole batch by name, as recommenders do,
is not traced, and there the chains in an ``nn.Sequential`` are cut. Widths are rounded to a multiple of 16, since odd ones can
be slower than the layer they replace (VainF/Torch-Pruning issue 38).

Neurons are taken out one at a time, each time the one whose loss the others can best make up for: least squares on
calibration rows says what the next layer's weights become without it and what that costs (optimal brain surgeon, Hassibi &
Stork 1993, on whole neurons). On MovieLens this left .016 AUC of loss before any training at a quarter of the neurons,
where the largest activations with the same least squares left .026, and weights alone .025. A convolution that reads is a
dense layer over its patches, and a channel is then a block of inputs, as it is behind a flatten. At half the channels and
neurons of a small image net (mnist-5k) this left .971 of an accuracy of .972 before any training, weights alone .932; at a
quarter, .966. It costs the cube of the inputs: a tenth of a second at 256, some ten at 3,136, and above 4,096 the sizes of
weights decide, as they must without data. Distillation brings most of the rest back.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pennyweight.compress.couple import POINTWISE_LAYERS, Group, Member, groups, runs
from pennyweight.compress.observe import ROWS, batches, calibration, observe
from pennyweight.compress.rewrite import Change, chosen, finite, rewrite, sequences, there
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense, Identity, Norm
from pennyweight.model.layers import Dropout
from pennyweight.model.spec import Batch, Layer, call, replace
from pennyweight.model.transform import Env, Transform

WIDE = 4096
"""Inputs of a layer above which it is not solved anew."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """One hidden layer whose neurons only the next dense layer reads, by paths."""

    first: str
    norms: tuple[str, ...]
    """Batch norms in between."""
    last: str
    width: int

    def group(self) -> Group:
        """The same as outputs that are cut together."""
        slots = tuple(range(self.width))
        between = tuple(Member(path, slots) for path in self.norms)
        return Group((Member(self.first, slots),), between, (Member(self.last, slots),), self.width)


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
        elif type(layer) not in POINTWISE_LAYERS:
            first = ""


def hidden(module: nn.Module, inputs: Sequence[str], rows: Dataset | None) -> list[Group]:
    """Hidden layers that can be made narrower, with all that must change with them.

    A module that takes its inputs one by one is traced on two of ``rows``. Where it takes a batch by name, or cannot be
    traced, its parts are: each child that takes tensors, such as the block of a transformer, on what two rows give it.
    Without rows, its ``chains`` are what there is.
    """
    if rows is None or not len(rows):
        return [chain.group() for chain in chains(module)]
    batch = next(iter(rows.head(2).batches(2)))
    traced = groups(module, [batch[name] for name in inputs]) if inputs else None
    if traced is not None:
        return traced
    parts = dict(_parts(module, module, _given(module, batch, inputs)))
    found = [group.under(path) for path, inner in parts.items() for group in inner]
    found += [chain.group() for chain in chains(module) if not any(chain.first.startswith(f"{path}.") for path in parts)]
    order = [path for path, _ in module.named_modules()]
    return sorted(found, key=lambda group: order.index(group.name))


def _given(module: nn.Module, batch: Batch, inputs: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """The tensors that each part of a module is first called with while it scores a batch, if they are all it is given."""
    seen: dict[str, tuple[Any, ...]] = {}

    def hook(path: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not kwargs and all(isinstance(a, Tensor) for a in args):
                seen.setdefault(path, tuple(a.clone() for a in args))

        return see

    hooks = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in module.named_modules() if path]
    try:
        with torch.no_grad():
            call(module, batch, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _parts(
    root: nn.Module, module: nn.Module, given: Mapping[str, tuple[Tensor, ...]], at: str = ""
) -> Iterator[tuple[str, list[Group]]]:
    """The largest parts of a module that can be traced, with their groups; smaller ones where weights are shared."""
    for name, child in module.named_children():
        path = f"{at}.{name}" if at else name
        if not any(True for _ in child.children()):
            continue
        here, everywhere = _uses(child), _uses(root)
        alone = path in given and all(everywhere[key] == count for key, count in here.items())
        found = groups(child, given[path]) if alone else None
        if found is None:
            yield from _parts(root, child, given, path)
        else:
            yield path, found


def _uses(module: nn.Module) -> Counter[int]:
    """How often each layer and parameter of a module stands in it."""
    every = [m for _, m in module.named_modules(remove_duplicate=False)]
    return Counter(id(held) for m in every for held in (m, *m.parameters(recurse=False)))


@named("prune-neurons")
@dataclasses.dataclass(frozen=True)
class PruneNeurons(Transform):
    """Hidden layers to fewer neurons, convolutions to fewer channels."""

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
    """Patterns of paths of layers to leave alone, those that read what is cut among them."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.multiple < 1 or any(w < 1 for w in self.widths):
            raise ConfigError(
                f"keep = {self.keep}, multiple = {self.multiple}, widths = {self.widths}: "
                "keep must be above 0 and at most 1, the others at least 1"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its hidden layers cut."""
        module, inputs = bundle.model.build(env.allow), bundle.model.spec.inputs
        rows = None if self.score == "weight" else calibration(bundle, env, self)
        there(module, self.skip)
        found = [g for g in hidden(module, inputs, env.calib or env.train) if self._chosen(g)]
        if not found:
            raise PlanError(
                "no hidden layer to cut: one whose outputs only dense layers and convolutions read, through operations "
                "that treat each on its own, not yet quantized"
            )
        cuts = [(g, w) for g, w in zip(found, self._widths(found), strict=True) if w < g.width]
        if not cuts:
            have = ", ".join(f"{g.name} ({g.width})" for g in found)
            raise PlanError(f"no layer would get narrower than it is: {have}; keep fewer or round to a smaller multiple")
        touched = dict.fromkeys(p for g, _ in cuts for p in g.paths)
        readers = list(dict.fromkeys(m.path for g, _ in cuts for m in g.readers))
        for path in dict.fromkeys(m.path for g, _ in cuts for m in (*g.writers, *g.readers)):
            finite(path, cast(nn.Linear, module.get_submodule(path)).weight)
        before = {} if rows is None else _record(module, readers, rows, inputs)
        while cuts:
            (group, width), *cuts = cuts
            now = {} if rows is None else _record(module, [m.path for m in group.readers], rows, inputs)
            kept = _cut(module, group, width, {path: (now[path][0], before[path][1]) for path in now if path in before})
            cuts = [(g.without(group, kept), w) for g, w in cuts]
        return bundle.replace(model=rewrite(bundle.model, dict(_changes(module, touched))))

    def sketch(self) -> PruneNeurons:
        """Neurons chosen by their weights: as many of them."""
        return dataclasses.replace(self, score="weight")

    def describe(self) -> str:
        """What it does."""
        if self.widths:
            return f"hidden layers cut to {', '.join(map(str, self.widths))} neurons"
        return f"hidden layers cut to {self.keep:.0%} of their neurons"

    def _chosen(self, group: Group) -> bool:
        """Whether one of the layers that give its outputs is among ``only``, and none that would change among ``skip``."""
        writers = [m.path for m in group.writers]
        return any(chosen(p, self.only, ()) for p in writers) and all(chosen(p, (), self.skip) for p in group.paths)

    def _widths(self, found: Sequence[Group]) -> Sequence[int]:
        if not self.widths:
            return [min(g.width, max(1, round(self.keep * g.width / self.multiple)) * self.multiple) for g in found]
        have = ", ".join(f"{g.name} ({g.width})" for g in found)
        if len(self.widths) != len(found):
            raise PlanError(f"{len(self.widths)} widths for {len(found)} hidden layers: {have}")
        for group, width in zip(found, self.widths, strict=True):
            if width > group.width:
                raise PlanError(f"{group.name} has {group.width} neurons, {width} were asked for; layers are: {have}")
        return self.widths


def _record(module: nn.Module, paths: Sequence[str], rows: Dataset, inputs: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs [n, in] and outputs [n, out] of layers while the module scores rows; what a convolution reads is patches."""
    narrow = [path for path in paths if _rows_of(module.get_submodule(path)).shape[1] <= WIDE]
    scored = list(batches(module, rows))
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in scored:
        for path, calls in observe(module, narrow, batch, inputs, -(-ROWS // len(scored))).items():
            seen.setdefault(path, []).extend(calls)
    return {
        path: (torch.cat([x for x, _ in parts])[:ROWS], torch.cat([y for _, y in parts])[:ROWS]) for path, parts in seen.items()
    }


def _rows_of(layer: nn.Module) -> Tensor:
    """The weights of a dense layer or convolution as a matrix, a row an output."""
    return cast(Tensor, layer.weight).detach().flatten(1)


def _cut(module: nn.Module, group: Group, width: int, seen: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Cut a group of a module in place; which of its numbers were kept, int64 [width].

    ``seen`` is what reaches each layer that reads now, and what that gave at first; where one is missing, weights decide.
    """
    layers = {m.path: module.get_submodule(m.path) for m in group.readers}
    slots = {m.path: _columns(layers[m.path], m) for m in group.readers}
    if seen.keys() == layers.keys() and all(map(_even, slots.values())):
        readers = [Reader(*seen[p], _rows_of(la), cast("Tensor | None", la.bias), slots[p]) for p, la in layers.items()]
        kept = thinned(readers, group.width, width)
        after = {path: reader.state() for path, reader in zip(layers, readers, strict=True)}
    else:
        kept = (_size(module, group) * _reach(module, group)).topk(width).indices.sort().values
        left = {m.path: m.left(kept) for m in group.readers}
        after = {p: {n: t[:, left[p]] if t.dim() > 1 else t for n, t in la.state_dict().items()} for p, la in layers.items()}
    for path, state in after.items():
        weight = state["weight"]
        shape = (len(weight), -1, *cast(Tensor, layers[path].weight).shape[2:])
        replace(module, path, _made(layers[path], {**state, "weight": weight.reshape(shape)}))
    for member in (*group.writers, *group.between):
        layer, stay = module.get_submodule(member.path), member.left(kept)
        replace(module, member.path, _made(layer, {n: t[stay] if t.dim() else t for n, t in layer.state_dict().items()}))
    return kept


def _columns(layer: nn.Module, member: Member) -> Tensor:
    """The number of each column of a layer's weights as a matrix: an input of a convolution is as many as its kernel."""
    return torch.tensor(member.slots).repeat_interleave(_rows_of(layer).shape[1] // len(member.slots))


def _even(slots: Tensor) -> bool:
    """Whether every number that is there is there as often."""
    return len(set(torch.unique(slots[slots >= 0], return_counts=True)[1].tolist())) == 1


def _size(module: nn.Module, group: Group) -> Tensor:
    """How large each output is, by weights: its gain in the batch norms behind it, else the norm of its weights."""
    size = torch.zeros(group.width)
    whole = [(m, module.get_submodule(m.path)) for m in group.between if sorted(m.slots) == list(range(group.width))]
    norms = [(m, la.weight) for m, la in whole if isinstance(la, (nn.BatchNorm1d, nn.BatchNorm2d)) and la.affine]
    for member, gain in norms[: len(group.writers)]:
        size[list(member.slots)] += gain.detach().abs()
    if not norms:
        for member in group.writers:
            size[list(member.slots)] += _rows_of(module.get_submodule(member.path)).norm(dim=1)
    return size


def _reach(module: nn.Module, group: Group) -> Tensor:
    """The norm of all weights that read each output."""
    reach = torch.zeros(group.width)
    for member in group.readers:
        layer = module.get_submodule(member.path)
        slots = _columns(layer, member)
        reach.index_add_(0, slots[slots >= 0], _rows_of(layer).square().sum(0)[slots >= 0])
    return reach.sqrt()


class Reader:
    """A layer that reads what is cut, and what its weights become: block after block of its inputs is taken out.

    Finds weights that come near to giving y [n, out] for x [n, k], then with each block moves the weights of the others so
    that y changes least. With a bias only what varies counts, as the bias takes over the means. A thousandth of the mean
    variance is added to the covariance, so that weights of inputs that hardly vary stay where they were.
    """

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor) -> None:
        x, y, w = x.double(), y.double(), weight.T.double()
        nothing = torch.zeros((), dtype=torch.float64)
        self.biased = bias is not None
        self.middle, self.level = (nothing, nothing) if bias is None else (x.mean(0), y.mean(0))
        x, y = x - self.middle, y - self.level
        gram = x.T @ x
        gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
        self.inverse = torch.linalg.inv(gram)
        self.w = w + self.inverse @ (x.T @ (y - x @ w))
        self.power = y.square().sum()
        self.left = torch.ones(len(slots), dtype=torch.bool)
        self.slots = torch.unique(slots[slots >= 0])
        # Inputs in the order of their numbers, those of no number first.
        self.blocks = slots.argsort(stable=True)[int((slots < 0).sum()) :].reshape(len(self.slots), -1)

    def cost(self) -> Tensor:
        """What taking out each of ``slots`` would add to the squared error."""
        w = self.w[self.blocks]
        if self.blocks.shape[1] == 1:
            single: Tensor = w[:, 0].square().sum(1) / self.inverse.diagonal()[self.blocks[:, 0]]
            return single
        inverse = self.inverse[self.blocks[:, :, None], self.blocks[:, None, :]]
        return cast(Tensor, (w * torch.linalg.solve(inverse, w)).sum((1, 2)))

    def remove(self, slot: int) -> None:
        """Take out the inputs of a number, if there are any."""
        for block in self.blocks[self.slots == slot]:
            self._remove(block)
            self.left[block] = False
        self.slots, self.blocks = self.slots[self.slots != slot], self.blocks[self.slots != slot]

    def _remove(self, block: Tensor) -> None:
        w, inverse = self.w, self.inverse
        if len(block) == 1:
            at = int(block)
            column = inverse[:, at] / inverse[at, at]
            self.w, self.inverse = w - torch.outer(column, w[at]), inverse - torch.outer(column, inverse[at])
            return
        columns = torch.linalg.solve(inverse[block][:, block], inverse[:, block], left=False)
        self.w = w - columns @ w[block]
        self.inverse.addmm_(columns, inverse[block], alpha=-1)

    def state(self) -> dict[str, Tensor]:
        """Its weights [out, left] and bias on the inputs that are left."""
        w = self.w[self.left]
        after = {"weight": w.T.float()}
        return {**after, "bias": (self.level - self.middle[self.left] @ w).float()} if self.biased else after


def thinned(readers: Sequence[Reader], have: int, width: int) -> Tensor:
    """Take all but ``width`` of the numbers below ``have`` out of the layers that read them; those kept, int64 [width].

    Each time the one goes that costs least; between several layers, in shares of what each gives.
    """
    alive = torch.ones(have, dtype=torch.bool)
    for _ in range(have - width):
        cost = torch.where(alive, 0.0, torch.inf).double()
        for reader in readers:
            cost[reader.slots] += reader.cost() / (reader.power if len(readers) > 1 else 1)
        slot = int(cost.argmin())
        alive[slot] = False
        for reader in readers:
            reader.remove(slot)
    return alive.nonzero().squeeze(1)


def surgery(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Which ``width`` inputs a dense layer should keep, int64 [width], and its weights (and bias) on those."""
    reader = Reader(x, y, weight, bias, torch.arange(x.shape[1]))
    kept = thinned([reader], x.shape[1], width)
    return kept, reader.state()


@named("fold-norms")
@dataclasses.dataclass(frozen=True)
class FoldNorms(Transform):
    """Batch norms that stand beside a dense layer or convolution into its weights: the same outputs with fewer operations.

    Into the layer before, or else into the one after. Comes after training, in which a norm does more than its formula, and
    before quantizing.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    skip: tuple[str, ...] = ()
    """Patterns of paths of norms, and of layers beside them, to leave alone."""

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle without those norms."""
        module = bundle.model.build(env.allow)
        there(module, self.skip)
        touched = [path for run in neighbours(module, bundle.model.spec.inputs) for path in _fold(module, run, self.skip)]
        if not touched:
            raise PlanError("no batch norm stands alone beside a dense layer or convolution of fp32; fold before quantizing")
        return bundle.replace(model=rewrite(bundle.model, dict(_changes(module, touched))))

    def describe(self) -> str:
        """What it does."""
        return "batch norms folded into the layers beside them"


def neighbours(module: nn.Module, inputs: Sequence[str]) -> Iterator[list[tuple[str, nn.Module]]]:
    """Runs of layers of which each reads only the one before: traced, or else those in an ``nn.Sequential``."""
    traced = runs(module) if inputs else None
    return sequences(module) if traced is None else traced


def foldable(module: nn.Module, inputs: Sequence[str], skip: Sequence[str] = ()) -> bool:
    """Whether ``FoldNorms`` would find anything."""
    every = (_kept(run) for run in neighbours(module, inputs))
    return any(_home(module, paths, at, skip) for paths in every for at in range(len(paths)))


def _kept(run: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """The layers of a run but for what does nothing in evaluation, which does not come between."""
    return [path for path, layer in run if type(layer) not in (nn.Dropout, Dropout, nn.Identity)]


def _fold(module: nn.Module, run: Sequence[tuple[str, nn.Module]], skip: Sequence[str] = ()) -> Iterator[str]:
    """Fold the batch norms of a run in place, and name what changed."""
    paths = _kept(run)
    for at, path in enumerate(paths):
        home = _home(module, paths, at, skip)
        if not home:
            continue
        norm = cast(nn.BatchNorm1d, module.get_submodule(path))
        replace(module, home, _folded(module.get_submodule(home), norm, at > 0 and home == paths[at - 1]))
        replace(module, path, nn.Identity())
        yield from (path, home)


def _home(module: nn.Module, paths: Sequence[str], at: int, skip: Sequence[str] = ()) -> str:
    """Which neighbour the layer at a place of a run can be folded into, if it is a batch norm."""
    norm = Norm.of(module.get_submodule(paths[at]))
    if norm is None or norm.kind != "batch" or not chosen(paths[at], (), skip):
        return ""
    near = paths[at - 1] if at else "", paths[at + 1] if at + 1 < len(paths) else ""
    before, after = (path if chosen(path, (), skip) else "" for path in near)
    if before and _takes(module.get_submodule(before), norm, before=True):
        return before
    return after if after and _takes(module.get_submodule(after), norm, before=False) else ""


def _takes(layer: nn.Module, norm: Norm, before: bool) -> bool:
    """Whether a layer can do a norm's work; in front of a convolution that pads, a norm does not shift the padding."""
    dense, conv = Dense.of(layer), Conv.of(layer)
    if conv is not None and conv.data_type == "fp32" and conv.dims == norm.dims:
        return before or (conv.groups == 1 and not any(conv.padding))
    if dense is None or dense.data_type != "fp32" or norm.dims != 1:
        return False
    return norm.features == (dense.outputs if before else dense.inputs)  # or else it is over another dimension


def _folded(layer: nn.Module, norm: nn.BatchNorm1d, before: bool) -> nn.Module:
    """A layer that also does what the norm behind it (``before``), or in front of it, did."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = (variance + norm.eps).rsqrt() * (norm.weight.double() if norm.affine else 1)
    shift = (norm.bias.double() if norm.affine else 0) - mean * gain
    shape = cast(Tensor, layer.weight).shape
    # A dense layer is a convolution over one place.
    weight = cast(Tensor, layer.weight).double().reshape(*shape[:2], -1)
    bias = torch.zeros(()) if layer.bias is None else cast(Tensor, layer.bias).double()
    if before:
        weight, bias = weight * gain.reshape(-1, 1, 1), bias * gain + shift
    else:
        weight, bias = weight * gain.reshape(-1, 1), bias + weight.sum(2) @ shift
    return _made(layer, {"weight": weight.reshape(shape).float(), "bias": bias.float()})


def _made(like: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A layer like another with these tensors, whatever their sizes."""
    layer = _described(like)
    if isinstance(layer, Norm):
        layer = dataclasses.replace(layer, features=len(state["running_mean"]))
    else:
        assert isinstance(layer, (Dense, Conv))
        outputs, inputs = state["weight"].shape[:2]
        sizes: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "bias": "bias" in state}
        if isinstance(layer, Conv) and layer.groups > 1:
            parts = outputs if layer.groups == layer.outputs else layer.groups  # one for each channel, or as many as ever
            sizes |= {"groups": parts, "inputs": inputs * parts}
        layer = dataclasses.replace(layer, **sizes)
    made = layer.build()
    made.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return made.requires_grad_(False).eval()


def _described(layer: nn.Module) -> Layer:
    return Dense.of(layer) or Conv.of(layer) or Norm.of(layer) or Identity()


def _changes(module: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, Change]]:
    """What the layers at these paths are now, for the model's spec and state."""
    for path in paths:
        layer = module.get_submodule(path)
        yield path, (_described(layer), layer.state_dict())


def _linear(layer: nn.Module) -> bool:
    dense = Dense.of(layer)
    return dense is not None and dense.data_type == "fp32"


def _norm(layer: nn.Module) -> bool:
    norm = Norm.of(layer)
    return norm is not None and norm.kind == "batch" and norm.dims == 1
