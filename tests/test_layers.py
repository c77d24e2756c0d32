"""Imports point down only, and the four families never import one another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pennyweight"
FAMILIES = ("compress", "distribute", "accelerate", "schedule")
BELOW = {"core": set(), "data": {"core"}, "model": {"core", "data"}}
BELOW |= {family: {"core", "data", "model"} for family in FAMILIES}
BELOW["optimize"] = {"core", "data", "model", *FAMILIES}
BELOW["serve"] = BELOW["optimize"]  # answering requests needs no optimizer
BELOW["report"] = {*BELOW["optimize"], "optimize"}
BELOW["progress"] = {*BELOW["optimize"], "optimize"}
BELOW["export"] = BELOW["optimize"]
BELOW["job"] = {*BELOW["report"], "report"}
BELOW["api"] = {*BELOW["job"], "job", "progress"}
BELOW["demo"] = {*BELOW["job"], "job", "serve"}
BELOW["cli"] = {*BELOW["demo"], "demo", "api", "export", "progress"}
BELOW["__main__"] = {"cli"}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """The parts of Pennyweight a file imports, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
        assert node.level == 0, f"{path}: write imports from the top (from pennyweight.…)"
        names += [f"{node.module}.{a.name}" if node.module == "pennyweight" else str(node.module) for a in node.names]
    return {name.split(".")[1] for name in names if name.startswith("pennyweight.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    wrong = imported(path) - BELOW[part] - {part, "__version__"}
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}, which {part} may not"
