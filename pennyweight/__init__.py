"""Recommenders that cost less: a model, data and a budget in; the cheapest deployment that is as good out, with the proof.

The seven nouns, and what makes and keeps them, can be imported from here. They are loaded when first used, so that
``pennyweight --help`` need not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.api import optimize
    from pennyweight.core.budget import Budget
    from pennyweight.data.dataset import Dataset
    from pennyweight.data.schema import Column, Schema
    from pennyweight.model.bundle import Bundle, load, save
    from pennyweight.model.spec import Model, Spec, spec_of
    from pennyweight.model.train import Recipe, fit
    from pennyweight.model.transform import Env, Plan, Transform, plan
    from pennyweight.optimize.trial import Result, Trial

_HOMES = {
    "core.budget": ("Budget",),
    "data.dataset": ("Dataset",),
    "data.schema": ("Column", "Schema"),
    "model.bundle": ("Bundle", "load", "save"),
    "model.spec": ("Model", "Spec", "spec_of"),
    "model.train": ("Recipe", "fit"),
    "model.transform": ("Env", "Plan", "Transform", "plan"),
    "optimize.trial": ("Result", "Trial"),
}
_HOME = {name: f"pennyweight.{home}" for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Bundle",
    "Column",
    "Dataset",
    "Env",
    "Model",
    "Plan",
    "Recipe",
    "Result",
    "Schema",
    "Spec",
    "Transform",
    "Trial",
    "fit",
    "load",
    "optimize",
    "plan",
    "save",
    "spec_of",
]


def __getattr__(name: str) -> Any:
    if name == "optimize":
        return importlib.import_module("pennyweight.optimize")  # the package, which answers calls
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
