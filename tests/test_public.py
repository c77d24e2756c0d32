"""Names others rely on: what can be imported, and what is written into plans, manifests and scripts.

A change here breaks somebody's code or somebody's stored bundle: say so in CHANGELOG.md.
"""

import importlib
import pkgutil
import subprocess
import sys

from typer.main import get_command

import pennyweight
from pennyweight.cli import app
from pennyweight.core.config import members
from pennyweight.model.spec import Layer
from pennyweight.model.transform import FIELD, STAGES, Transform

IMPORTED = """
    Budget Bundle Column Dataset Env Model Plan Recipe Result Schema Spec Transform Trial fit load optimize plan save spec_of
"""
TRANSFORMS = (
    "cache code-axes code-tables distill drop-fields drop-rows factor-dense fold-norms index narrow-tables place prune-neurons "
    "quantize-dense quantize-onnx quantize-tables queue rotate-tables run share-rows split-rows spread substitute-tables "
    "subtract-centres train-rounded"
)
LAYERS = "bands clustered conv dense hashed hot-rows identity low-rank narrow norm quotient residual robe table tensor-train"
COMMANDS = "apply bench compress demo doctor export inspect optimize plan report serve simulate train tune"


def registered(base: type) -> str:
    """The names of a family, once every module has been imported."""
    for module in pkgutil.walk_packages(pennyweight.__path__, "pennyweight."):
        importlib.import_module(module.name)
    return " ".join(sorted(name for name, cls in members(base).items() if cls.__module__.startswith("pennyweight.")))


def test_imported_names() -> None:
    assert pennyweight.__all__ == IMPORTED.split()
    for name in pennyweight.__all__:
        assert getattr(pennyweight, name).__module__.startswith("pennyweight.")
    assert set(pennyweight.__all__) <= set(dir(pennyweight))


def test_stored_names() -> None:
    assert registered(Transform) == TRANSFORMS
    assert registered(Layer) == LAYERS


def test_any_stored_plan_can_be_read() -> None:
    """Whoever can name a plan has every transform registered."""
    code = """
import pennyweight
from pennyweight.core.config import members
pennyweight.Result
print(*sorted(members(pennyweight.Transform)))"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == TRANSFORMS


def test_commands() -> None:
    assert " ".join(sorted(get_command(app).commands)) == COMMANDS  # type: ignore[attr-defined]


def test_families_and_stages() -> None:
    assert FIELD == {"compress": "model", "distribute": "placement", "accelerate": "runtime", "schedule": "policy"}
    assert STAGES == ("structure", "training", "data type", "placement", "runtime", "policy")


def test_importing_is_cheap() -> None:
    """`import pennyweight` loads no PyTorch: names are resolved when used."""
    subprocess.run([sys.executable, "-c", "import sys, pennyweight; sys.exit('torch' in sys.modules)"], check=True)
