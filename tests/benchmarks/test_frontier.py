"""The frontier of compression: rows of the results become points, a table and a picture, and nothing is made up."""

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from benchmarks import frontier
from benchmarks.frontier import BEGIN, END, PAGE, PICTURE, Point, chart, figures, filled, points
from benchmarks.harness import RESULTS


def rows(id: str, ratio: float, drop: float, upper: float, **more: Any) -> list[dict[str, Any]]:
    """The metrics of one id, as the harness writes them."""
    values = {"compression_ratio": ratio, "drop": drop, "drop_upper_95": upper, "seconds": 12.4}
    return [{"id": id, "metric": m, "value": v, "bar": None, "holds": True, "note": "", **more} for m, v in values.items()]


RESULT = [
    {"id": "baseline/frappe", "metric": "auc", "value": 0.98, "bar": 0.983, "holds": False, "note": ""},
    *rows("sanity-fp32/frappe", 1.0, 0.0, 0.0),
    *rows("standard/frappe", 20.46, 0.0004, 0.00081, bar=20),
    {"id": "standard/frappe", "metric": "drop_against_control", "value": 0.0006, "bar": 0.001, "holds": True, "note": ""},
    *rows("free/frappe", 4.9, -0.0001, 0.00012, bar=6, holds=False),
    *rows("free/frappe/onnxruntime-int8", 4.0, 0.0, 0.0001),
    *rows("standard/frappe/from-scratch", 22.0, 0.001, 0.0021),
    {"id": "free/frappe/pytorch-int4", "metric": "compression_ratio", "value": 1, "bar": None, "holds": True,
     "note": "failed: no `kernel` | for it"},
    *rows("retrieval/gowalla", 7.3, 0.003, 0.0049, bar=7),
]  # fmt: skip


def test_rows_become_points_by_set_and_ours_first() -> None:
    found = points(RESULT)
    assert [(p.data, p.kind, p.tool) for p in found] == [
        ("frappe", "free", frontier.OURS), ("frappe", "standard", frontier.OURS), ("frappe", "free", "onnxruntime"),
        ("frappe", "free", "pytorch"), ("frappe", "standard", "small net"), ("gowalla", "retrieval", frontier.OURS),
    ]  # fmt: skip
    assert found[1] == Point("standard", "frappe", frontier.OURS, "", 20.46, 0.0004, 0.00081, 12.4, 20, True, 0.0006)
    assert not found[0].holds and found[3].failed == "no `kernel` | for it"


def test_the_table_rounds_towards_no_claim_and_says_what_was_missed() -> None:
    said = figures(points(RESULT))
    assert "| standard, bar 20× | **20.4×** | .0004 | .0009 | .0006 | 12 |" in said
    assert "| free, bar 6×: missed | 4.9× | -.0001 | .0002 |  | 12 |" in said
    assert "| pytorch-int4 | – | | | | no 'kernel' / for it |" in said
    assert "**Gowalla** (share of NDCG@20)" in said and "baseline" not in said and "sanity" not in said
    assert {line.count("|") for line in said.splitlines() if line} == {7}


def test_the_picture_stands_alone() -> None:
    text = chart(points(RESULT))
    root = ET.fromstring(text)
    words = {"".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")}
    assert {"free", "standard", "retrieval", "onnxruntime", "small net", "Frappe: times smaller", "+0.001"} <= words
    assert "pytorch" not in words, "what failed has no point"
    assert text.count("<svg") == 3 and "var(--" not in text
    assert "http://" not in text.replace("http://www.w3.org", ""), "nothing to load"
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))


def test_the_page_is_filled_between_its_marks() -> None:
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    once = filled(page, "| a |")
    assert f"images/{PICTURE.name})\n\n| a |\n\n{END}" in once and filled(once, "| a |") == once
    assert filled(once, "") == filled(page, "")
    with pytest.raises(ValueError, match="lacks"):
        filled("# Nothing", "| a |")


def test_the_page_holds_what_was_measured() -> None:
    """If this fails, results are newer than the page: python -m benchmarks.frontier"""
    file = RESULTS / "compress.json"
    found = points(json.loads(file.read_text())["rows"]) if file.exists() else []
    page = PAGE.read_text()
    assert filled(page, figures(found)) == page
    assert PICTURE.exists() or not found
