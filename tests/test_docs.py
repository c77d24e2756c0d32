"""What README and docs claim is so: blocks run, commands parse, the tree is the tree, targets and links exist."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import pennyweight
from pennyweight.cli import app
from pennyweight.core.config import encode, members
from pennyweight.model.transform import Transform
from pennyweight.optimize import search  # noqa: F401  (registers every transform)
from pennyweight.serve.app import ROUTES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def commands() -> list[tuple[str, list[str]]]:
    """Every `pennyweight ...` line of the pages' shell blocks: page and words."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["pennyweight"]:
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run in order in one namespace; one that starts with `# name.py` is that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, object] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python"), 1):
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block)
        else:
            exec(compile(block, f"{page.name}, block {number}", "exec"), space)


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_parse(page: str, words: list[str]) -> None:
    """The command, its options and the number of its arguments are those of the command line."""
    group = get_command(app)
    context = group.make_context("pennyweight", list(words) or ["--help"], resilient_parsing=True)
    if words and not words[0].startswith("-"):
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        parser = command.make_parser(command.context_class(command, info_name=name, parent=context))
        values, left, _ = parser.parse_args(list(rest))
        assert not left, f"{page}: {name} takes no {left}"
        missing = [p.name for p in command.params if p.required and values.get(p.name) in (None, ())]
        assert not missing or "--help" in rest, f"{page}: {name} needs {missing}"


def test_readme_shows_every_command() -> None:
    shown = {words[0] for _, words in commands() if words}
    assert set(get_command(app).commands) <= shown  # type: ignore[attr-defined]


def test_readme_tree_is_the_tree() -> None:
    """Every module has its line, and no line is for a file that is not there."""
    block = next(b for b in blocks(ROOT / "README.md", "text", "") if b.startswith("pennyweight/\n"))
    shown, folder = set(), ""
    for line in block.splitlines()[1:]:
        depth, name, what = len(line) - len(line.lstrip()), line.split()[0], line.split()[1:]
        folder = name if name.endswith("/") and depth == 2 else "" if depth == 2 else folder
        if name.endswith(".py"):
            shown.add(folder + name)
            assert what, f"{folder}{name} has no description"
    package = ROOT / "pennyweight"
    there = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.name != "__init__.py"}
    assert shown == there


def test_reference_has_every_command_and_option() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        row = re.search(rf"^\| `{name}` \|.*$", REFERENCE, re.MULTILINE)
        assert row, f"no row for {name}"
        given = {option for p in command.params for option in p.opts if option.startswith("--")} - {"--help"}
        assert set(re.findall(r"`(--[a-z0-9-]+)`", row[0])) == given, name


def test_reference_has_every_transform_and_field() -> None:
    sections = dict(re.findall(r"^### `([a-z-]+)`\n(.*?)(?=^##)", REFERENCE, re.MULTILINE | re.DOTALL))
    ours = {name: cls for name, cls in members(Transform).items() if cls.__module__.startswith("pennyweight.")}
    assert sections.keys() == ours.keys()
    for name, cls in ours.items():
        shown = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", sections[name], re.MULTILINE))
        assert shown == {f.name: json.dumps(encode(f.default)) for f in dataclasses.fields(cls)}, name


def test_reference_has_every_route() -> None:
    shown = set(re.findall(r"`((?:GET|POST) /\w+)`", REFERENCE))
    assert shown == {f"{r.method} {r.path}" for r in ROUTES if r.path != "/openapi.json"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(p.read_text() for p in PAGES)
    for name in set(re.findall(r"\bmake ([a-z][a-z-]*\b)(?![A-Z%-])", "\n".join(re.findall(r"`[^`\n]+`", text)))):
        bench = name.removeprefix("bench-")
        there = (ROOT / "benchmarks" / f"{bench}.py").exists() if name.startswith("bench-") else name in targets
        assert there, f"make {name} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_changelog_has_the_version() -> None:
    assert f"## {pennyweight.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_examples_are_a_page_each() -> None:
    """At most 60 lines, and the first ones say how to run it."""
    made = sorted((ROOT / "examples").glob("*.py"))
    assert {"credit.py", "digits.py", "images.py", "recommend.py", "text.py"} <= {p.name for p in made}
    for path in made:
        text = path.read_text()
        assert len(text.splitlines()) <= 60, path.name
        assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or ""), path.name


def test_every_module_argues() -> None:
    """A module without a docstring has not said why it is there."""
    silent = [p for p in (ROOT / "pennyweight").rglob("*.py") if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent
