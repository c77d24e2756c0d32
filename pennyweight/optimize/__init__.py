"""The search over plans under a budget, with the proof; called, the package is ``pennyweight.api.optimize``.

Importing anything of it registers every transform, so that any stored plan can be read. Users write
``pennyweight.optimize(...)``, and importing a submodule puts the package at that very name: so the package answers calls.
"""

import importlib
import sys
import types
from typing import Any

from pennyweight.accelerate import tune  # noqa: F401
from pennyweight.compress import (  # noqa: F401
    aware,
    axes,
    bands,
    distill,
    factor,
    narrow,
    onnx,
    prune,
    quantize,
    residual,
    rotate,
    share,
    substitute,
)
from pennyweight.distribute import planner  # noqa: F401
from pennyweight.schedule import policy  # noqa: F401


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("pennyweight.api").optimize(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
