"""The benchmark of sharing tables: its points, its rows and its picture."""

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from benchmarks import sharing
from benchmarks.sharing import FULL_TABLES, ID, Point, Size, Task
from pennyweight.compress import substitute

LIMITS = {"planted logits": 0.87, FULL_TABLES: 0.8, "large tables of one row": 0.7}
POINTS = [
    Point("hash", 10, 1000, 0.78, 0.78, 2.0),
    Point("robe", 10, 1001, 0.79, 0.79, 3.0),
    Point("hash", 100, 100, 0.71, 0.75, 2.0),
    Point("robe", 100, 101, 0.72, 0.74, 2.0),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    size = Size(150_000, 6_000, dim=4, batch=512, methods=("hash", "narrow", "clustered"), ratios=(2, 30))
    return Task.generate(size, tmp_path_factory.mktemp("sharing") / "rows")


def test_every_method_that_reaches_a_budget_has_a_point_within_it(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substitute, "POINTS", 2)
    heard: list[Point] = []
    found = sharing.points(task, heard.append)
    assert found == heard
    assert [(p.method, p.ratio) for p in found] == [("hash", 2), ("narrow", 2), ("clustered", 2), ("hash", 30)]
    whole = sharing.table_bytes(task.given(0).model.state)
    assert all(0.4 * whole / p.ratio < p.bytes <= whole / p.ratio for p in found)
    assert all(0.0 < p.test < task.planted() for p in found)
    assert task.trained("hash", 2) == dataclasses.replace(found[0], seconds=pytest.approx(0, abs=1e9))


def test_the_best_is_chosen_on_validation(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(Task, "trained", lambda self, *how: asked.append(how) or POINTS[0])
    assert sharing.best(task, POINTS, 100, seeds=3)[0] == POINTS[3], "though its test AUC is lower"
    assert asked == [("robe", 100, 1), ("robe", 100, 2)]


def test_rows_name_the_best_and_hold_every_point() -> None:
    made = sharing.rows(POINTS, {10: [POINTS[1], POINTS[0]], 100: [POINTS[3]]}, LIMITS)
    assert [(r.id, r.metric) for r in made[:2]] == [(ID, "auc at 10x"), (ID, "auc at 100x")]
    assert (made[0].value, made[0].low, made[0].high, made[0].seeds) == (pytest.approx(0.785), 0.78, 0.79, 2)
    assert made[0].baseline == 0.8 and made[0].note.startswith("robe, 1,001 bytes; others: hash 0.7800; planted logits 0.87")
    assert {(r.id, r.metric) for r in made[2:]} == {(f"{ID}/{p.method}", f"auc at {p.ratio:g}x") for p in POINTS}


def test_the_picture_stands_alone() -> None:
    text = sharing.chart(POINTS, LIMITS)
    words = {"".join(e.itertext()) for e in ET.fromstring(text).iter() if e.tag.endswith("text")}
    assert {"hash", "robe", *LIMITS, "tables, kB"} <= words
    assert "var(--" not in text and "http://" not in text.replace("http://www.w3.org", ""), "nothing to load"


def test_every_method_has_a_mark_of_its_own() -> None:
    assert len(sharing.METHODS) == len(set(sharing.COLOURS)) == len(set(sharing.STYLE))
    assert Path(sharing.PICTURE).parent.name == "images"
