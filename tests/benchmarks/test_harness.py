"""The benchmarks' harness: bars are judged as written, a missed one stays, and rows of several runs share a file."""

import json
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Options, Row
from pennyweight.core import measure
from pennyweight.core.errors import ConfigError


def row(id: str, value: float, **more: object) -> Row:
    return Row(id, "auc", value, value - 0.1, value + 0.1, **more)  # type: ignore[arg-type]


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {r["id"]: r for r in json.loads((folder / "made.json").read_text())["rows"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_a_bar_is_met_or_missed() -> None:
    assert row("a", 0.9, bar=0.9).holds and not row("a", 0.8, bar=0.9).holds
    assert row("a", 0.9, bar=0.9, at_most=True).holds and not row("a", 0.91, bar=0.9, at_most=True).holds
    assert row("a", 0.0).holds


def test_rows_of_several_runs_share_the_file_and_a_missed_bar_stays(folder: Path) -> None:
    seen: list[Options] = []

    def b(options: Options) -> Row:
        seen.append(options)
        return row("b", 0.5, bar=0.6, seeds=options.seeds)

    rows = {"a": lambda options: row("a", 0.7, bar=0.6), "b": b}
    harness.run("made", rows, timed=False, argv=["--only", "b", "--data", "here"])
    harness.run("made", rows, timed=False, argv=["--only", "a"])
    kept = results(folder)
    assert list(kept) == ["a", "b"] and kept["a"]["holds"] is True and kept["b"]["holds"] is False
    assert seen == [Options(False, Path("here"), 3)] and kept["b"]["seeds"] == 3
    assert {"commit", "date", "seconds", "foreign_cpu"} <= kept["b"].keys()
    assert {"commit", "date", "machine", "versions", "rows"} <= json.loads((folder / "made.json").read_text()).keys()


def test_quick_writes_nothing_and_judges_no_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.run("made", {"a": lambda options: row("a", 0.1, bar=0.6, seeds=options.seeds)}, timed=False, argv=["--quick"])
    printed = capsys.readouterr().out
    assert "quick" in printed and "NO" not in printed and not list(folder.iterdir())


def test_a_timed_row_is_refused_on_a_busy_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "quiet", lambda: 0.0)
    monkeypatch.setattr(measure.Foreign, "__exit__", lambda self, *_: setattr(self, "share", 0.4))
    with pytest.raises(ConfigError, match="a: others used 40% of the processor"):
        harness.run("made", {"a": lambda options: row("a", 1.0)}, timed=True, argv=[])
    assert not list(folder.iterdir())
