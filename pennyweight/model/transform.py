"""A transform is one optimization as a value: printed, compared, stored, applied.

A plan is a tuple of them, and applying it is one ``reduce``. Each family writes exactly one field of a bundle, which is
what keeps techniques independent: compress -> model, distribute -> placement, accelerate -> runtime, schedule -> policy.
The base class holds that, and refuses a transform that changed nothing. A plan is kept in one canonical order (structure,
training, data type, placement, runtime, policy): quantizing before pruning, say, is refused rather than reordered in
silence.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, final

import torch

from pennyweight.core.config import encode, family
from pennyweight.core.errors import PlanError
from pennyweight.core.hardware import Topology
from pennyweight.data.dataset import Dataset
from pennyweight.data.requests import Trace
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Model
from pennyweight.model.train import EpochLog, Progress, Recipe

FIELD = {"compress": "model", "distribute": "placement", "accelerate": "runtime", "schedule": "policy"}
STAGES = ("structure", "training", "data type", "placement", "runtime", "policy")
Stage = Literal["structure", "training", "data type", "placement", "runtime", "policy"]


@dataclasses.dataclass(frozen=True)
class Env:
    """What a transform may use. A transform says what it lacks by raising PlanError."""

    train: Dataset | None = None
    """Rows to train on (recovery)."""
    valid: Dataset | None = None
    """Rows to stop early on and to choose on; never the rows of the final proof."""
    calib: Dataset | None = None
    """A few rows for ranges and sensitivities; no labels needed."""
    requests: Trace | None = None
    """A trace of requests to measure with."""
    topology: Topology | None = None
    """The devices there are."""
    teachers: tuple[Model, ...] = ()
    """What distillation learns from, averaged: the model as it was given first, then others of its kind."""
    recipe: Recipe | None = None
    """How that model was trained: recovery carries the user's optimizer, regularizers and stopping rule."""
    seed: int = 0
    allow: tuple[str, ...] = ()
    """Import paths of factories the user allowed."""
    watch: Callable[[Progress | EpochLog], None] | None = None
    """Hears the progress of training a transform does; it decides nothing."""
    deadline_s: float | None = None
    """Seconds a transform may train at most: it ends with the best so far. With it, law 4 holds only if it is not hit."""

    def need(self, name: str, by: Transform) -> object:
        """The field ``name``, or a PlanError that says which transform lacks it."""
        value = getattr(self, name)
        if value is None or value == ():
            raise PlanError(f"{type(by).__name__} needs env.{name}, which was not given")
        return value


@family("transform")
class Transform(abc.ABC):
    """One optimization: a frozen dataclass whose ``apply`` gives a new bundle and leaves the old one alone."""

    family: ClassVar[Literal["compress", "distribute", "accelerate", "schedule"]]
    stage: ClassVar[Stage]

    @final
    def apply(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle after this optimization.

        Raises:
            PlanError: it cannot be applied here, or would change nothing.
        """
        done = [s["transform"] for s in bundle.plan]
        changed = self.change(bundle, env)
        field = FIELD[self.family]
        for other in set(FIELD.values()) - {field}:
            assert getattr(changed, other) is getattr(bundle, other), f"{self} wrote {other}, which is not its field"
        if _same(getattr(bundle, field), getattr(changed, field)):
            raise PlanError(f"{self} would change nothing (already applied: {', '.join(map(str, done)) or 'nothing'})")
        return dataclasses.replace(changed, plan=(*bundle.plan, encode(self)))

    @abc.abstractmethod
    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """What ``apply`` does, before its checks: return a new bundle with this family's one field replaced."""

    def sketch(self) -> Transform:
        """A transform that leaves the same shapes at less effort, to predict costs with; itself where it is quick."""
        return self

    @abc.abstractmethod
    def describe(self) -> str:
        """One plain sentence for a person, no longer than a line."""


def _same(before: object, after: object) -> bool:
    if isinstance(before, Model) and isinstance(after, Model):
        return (
            before.spec == after.spec
            and before.state.keys() == after.state.keys()
            and all(before.state[k] is after.state[k] or torch.equal(before.state[k], after.state[k]) for k in before.state)
        )
    return before == after


@dataclasses.dataclass(frozen=True)
class Plan:
    """Transforms in canonical order."""

    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        ranks = [STAGES.index(t.stage) for t in self.transforms]
        for before, after, t in zip(ranks, ranks[1:], self.transforms[1:], strict=False):
            if after < before:
                raise PlanError(
                    f"{type(t).__name__} ({t.stage}) comes after {STAGES[before]}; the order is {', '.join(STAGES)}"
                )

    def apply(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle after all of them."""
        return functools.reduce(lambda b, t: t.apply(b, env), self.transforms, bundle)

    def describe(self) -> str:
        """The plan as a line of text."""
        return "; ".join(t.describe() for t in self.transforms) or "as given"

    def __len__(self) -> int:
        return len(self.transforms)


def plan(*transforms: Transform | Sequence[Transform]) -> Plan:
    """A plan from transforms in any order, put in the canonical one (stable inside a stage)."""
    flat = [t for item in transforms for t in ([item] if isinstance(item, Transform) else item)]
    return Plan(tuple(sorted(flat, key=lambda t: STAGES.index(t.stage))))
