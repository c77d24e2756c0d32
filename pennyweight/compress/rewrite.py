"""Find layers by path and put others in their place: the two steps that every compression of a layer shares.

Layers are found by what they are, not by what they are called, so a user's module is treated as ours; one of an unknown
kind is left alone. A pattern that matches nothing is refused, because it is a typing error; one that is to be left alone may
name a layer of any kind, so that one list of them serves every transform.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pennyweight.core.errors import PlanError
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense, Norm
from pennyweight.model.spec import Layer, Model, leaves
from pennyweight.model.tables import Table

FEW = 3
"""Layers that are named in a sentence."""
L = TypeVar("L", bound=Layer)
Change = tuple[Layer, Mapping[str, Tensor]]
"""What a layer becomes, and its tensors by their names inside the layer."""


def targets(
    module: nn.Module, of: Callable[[nn.Module], L | None], only: Sequence[str], skip: Sequence[str]
) -> dict[str, tuple[nn.Module, L]]:
    """Layers of one kind by path: those that a pattern of ``only`` matches (all, if there is none) and none of ``skip``.

    Raises:
        PlanError: a pattern of ``only`` matches no layer of this kind, or one of ``skip`` no layer at all.
    """
    every = {path: (child, layer) for path, child in leaves(module) if (layer := of(child)) is not None}
    for pattern in only:
        if not fnmatch.filter(every, pattern):
            raise PlanError(f"no layer matches {pattern!r}; there are: {', '.join(every) or 'none of this kind'}")
    there(module, skip)
    return {path: found for path, found in every.items() if chosen(path, only, skip)}


def there(module: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse patterns that match nothing.

    Raises:
        PlanError: one matches no layer of any kind.
    """
    names = [path for path, _ in module.named_modules() if path] if patterns else []
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise PlanError(f"no layer matches {pattern!r}; there are: {', '.join(path for path, _ in leaves(module))}")


@dataclasses.dataclass(frozen=True)
class Untouched:
    """A layer that holds weights and that no compression knows."""

    path: str
    kind: str
    """The name of its class."""
    bytes: int


def untouched(module: nn.Module) -> list[Untouched]:
    """Layers that stay as they are because their kind is unknown, the largest first, for whoever compresses to be told."""
    known = [path for path, child in module.named_modules() if _known(child)]
    found = []
    for path, child in module.named_modules():
        own = sum(t.nbytes for name, t in child.state_dict().items() if "." not in name)
        if own and not any(path == k or path.startswith(f"{k}.") for k in known):
            found.append(Untouched(path, type(child).__name__, own))
    return sorted(found, key=lambda u: (-u.bytes, u.path))


def _known(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer", None), Layer) or any(of(module) for of in (Table.of, Dense.of, Conv.of, Norm.of))


def chosen(path: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a path is among ``only`` (or that is empty) and not among ``skip``; both hold patterns such as ``*.tables.*``."""
    return (not only or any(fnmatch.fnmatchcase(path, p) for p in only)) and not any(fnmatch.fnmatchcase(path, p) for p in skip)


def which(only: Sequence[str]) -> str:
    """The layers a transform is for, behind their kind in a sentence: nothing for all, and no more names than a line takes."""
    few = ", ".join(only[:FEW]) + (f" and {len(only) - FEW} more" if len(only) > FEW else "")
    return f" ({few})" if only else ""


def rewrite(model: Model, changes: Mapping[str, Change]) -> Model:
    """The model with these layers in place; all other tensors are the same objects."""
    state = {name: tensor for name, tensor in model.state.items() if name.rpartition(".")[0] not in changes}
    for path, (_, tensors) in changes.items():
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    return Model(model.spec.with_layers({path: layer for path, (layer, _) in changes.items()}), state)


def finite(path: str, weight: Tensor, data_type: str = "fp32") -> Tensor:
    """The weight, if every number of it can be written.

    Raises:
        PlanError: some are NaN or infinite, or too large for a format that rests on fp16.
    """
    low, high = map(float, torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)  # neither copies a table, and NaN is both
    if not (math.isfinite(low) and math.isfinite(high)):
        wrong = int((~torch.isfinite(weight)).sum())
        raise PlanError(f"layer {path} holds {wrong} NaN or infinite weights of {weight.numel()}; train the model again")
    most, largest = torch.finfo(torch.float16).max, max(-low, high)
    if data_type in ("fp16", "int4", "int2") and largest > most:
        raise PlanError(f"layer {path} holds {largest:.3g}, and {data_type} ends at {most:.0f}; use int8 or skip={path!r}")
    return weight


def sequences(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Layers that run one after the other, with their paths: each outermost ``nn.Sequential``, inner ones opened up.

    A layer that stands at two places is left out of all of it by ending the run there: cutting it at one place cuts both.
    """
    uses: dict[int, int] = {}
    for _, child in module.named_modules(remove_duplicate=False):
        uses[id(child)] = uses.get(id(child), 0) + 1
    for path, child in module.named_modules():
        if _plain(child) and not (path and _plain(module.get_submodule(path.rpartition(".")[0]))):
            run: list[tuple[str, nn.Module]] = []
            for inner, layer in _opened(path, child):
                if uses[id(layer)] > 1 and len(layer.state_dict()):
                    yield run
                    run = []
                else:
                    run.append((inner, layer))
            yield run


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _opened(path: str, sequential: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequential._modules.items():
        inner = f"{path}.{name}" if path else name
        if child is not None:
            yield from _opened(inner, child) if _plain(child) else [(inner, child)]
