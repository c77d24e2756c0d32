import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import DeviceError
from pennyweight.optimize import search  # noqa: F401  (registers every transform)
from pennyweight.optimize.prove import explain
from pennyweight.optimize.trial import Part, Price, Result, Tuned
from pennyweight.report import render, summary, table, view
from pennyweight.report.charts import Figure, figures
from pennyweight.report.view import ms, times

RECORD = Path(__file__).with_name("result.json")
"""The record of a real run: `pennyweight optimize` on the shipped sample, with a price."""


@pytest.fixture(scope="module")
def proven() -> Result:
    return loads(Result, RECORD.read_bytes(), RECORD.name)


@pytest.fixture(scope="module")
def undecided(proven: Result) -> Result:
    """The same run, had its test rows been too few: the first plan in the sequence could not be proven."""
    first = next(t for t in proven.trials if t.proof)
    failed = dataclasses.replace(first.proof, drop_upper_95=0.0050001, margin=0.005, verdict="cannot tell", rows_needed=40_301)
    trial = dataclasses.replace(first, proof=failed)
    trials = tuple(trial if t is first else dataclasses.replace(t, proof=None, against_control=None) for t in proven.trials)
    told = {
        "chosen": None,
        "trials": trials,
        "parts_after": (),
        "savings": (),
        "verdict": "cannot tell",
        "explanation": explain(failed),
    }
    return dataclasses.replace(proven, **told)


@pytest.fixture(scope="module")
def infeasible(proven: Result) -> Result:
    """The same run, had no trial been within its budget."""
    trials = tuple(
        dataclasses.replace(t, proof=None, against_control=None, note="bytes is 1.2x the limit") for t in proven.trials
    )
    told = {"chosen": None, "control": None, "trials": trials, "parts_after": (), "savings": (), "verdict": "cannot tell"}
    return dataclasses.replace(proven, **told, explanation="no plan is within the budget")


@pytest.fixture(scope="module")
def drawn(proven: Result) -> dict[str, Figure]:
    return figures(proven)


@pytest.fixture(scope="module")
def page(proven: Result) -> str:
    return render(proven)


def plain(result: Result, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table(result))
    return captured.get()


# -- words and figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (1999, 1000, "1.9× smaller"),
        (1000, 1999, "2.0× larger"),
        (104, 100, "as large"),
        (100, 100, "as large"),
        (20_999, 100, "209.× smaller"),
        (0, 100, "as large"),
    ],
)
def test_a_gain_is_rounded_down_and_a_loss_up(before: int, after: int, told: str) -> None:
    assert times(before, after, "smaller", "larger", "as large") == told.replace(".×", "×")


def test_milliseconds_have_three_digits() -> None:
    assert [ms(v) for v in (0, 0.0042, 0.61, 5.312, 21.24, 312.4)] == [
        "0 ms",
        "0.004 ms",
        "0.610 ms",
        "5.31 ms",
        "21.2 ms",
        "312 ms",
    ]


# -- view ----------------------------------------------------------------------------------------------------------------


def test_a_proven_plan(proven: Result) -> None:
    v = view(proven)
    assert v.state == "proven" and v.headline.endswith("proven as good") and not v.missing
    assert [c.role for c in v.columns] == ["baseline", "control", "chosen"]
    assert v.columns[1].figures["p99"] == ""  # a control is compared, not deployed
    assert [s for _, s in v.steps] == [t.describe() for t in proven.chosen.plan.transforms]
    assert "compression alone costs" in v.alone
    assert "recall@100" in v.guards[0] and v.guards[0].endswith("inside its margin of .0100.")
    assert [t.number for t in v.tried] == list(range(1, len(proven.trials) + 1))
    assert [t.kind for t in v.tried].count("chosen") == 1 and all(t.fate for t in v.tried)
    assert v.money[:-1] == proven.savings and "a core-hour" in v.money[-1]


def test_a_plan_the_rows_cannot_tell_about_is_called_that(undecided: Result) -> None:
    v = view(undecided)
    assert v.state == "cannot tell" and v.headline.endswith("not proven as good")
    assert v.explanation.startswith("Not proven at .0050; proven at .0051") and "41,000 rows" in v.explanation
    assert [c.role for c in v.columns] == ["baseline", "control", "nearest"]
    assert ("rows that would decide it", "about 41,000") in v.proof
    assert any("not proven at .0050, proven at .0051" in line for line in v.missing)
    assert not v.money


def test_a_worse_plan_is_called_that(undecided: Result) -> None:
    worse = [
        dataclasses.replace(t, proof=dataclasses.replace(t.proof, verdict="worse")) if t.proof else t for t in undecided.trials
    ]
    v = view(dataclasses.replace(undecided, trials=tuple(worse)))
    assert v.state == "worse" and v.headline.endswith("but worse")


def test_a_budget_nobody_meets_shows_what_was_missing(infeasible: Result) -> None:
    v = view(infeasible)
    assert v.state == "none" and v.headline == "No plan held the budget and the quality"
    assert not v.tiles and not v.steps and not v.proof
    assert 0 < len(v.missing) <= 5 and all("1.2x the limit" in line for line in v.missing)


def test_nothing_tried_is_a_model_that_stays(infeasible: Result) -> None:
    v = view(dataclasses.replace(infeasible, trials=(), epochs=(), references=()))
    assert v.headline == "The model stays as it is" and not v.missing and not v.prediction


def test_a_limit_missed_in_the_last_timing_is_told(proven: Result) -> None:
    assert view(proven).over == ()
    late = dataclasses.replace(proven, budget="p99 <= 1 ms, bytes <= 1 GB, memory <= 1 B, cost <= 1 USD/M")
    (line,) = view(late).over
    assert line.startswith("p99 is") and line.endswith("the limit of 1 ms")
    assert summary(late)["over_budget"] == [line] and "the limit of 1 ms" in plain(late)


def test_parts_add_up(proven: Result) -> None:
    """A part that is gone after, one that is new, and more of them than are shown."""
    before = tuple(Part(f"layer.{n}", "dense fp32 8x8", 1000 + n, 0.1, 0) for n in range(30))
    after = (*before[1:], Part("new", "dense int8 8x8", 400, 0.05, 0))
    shares = view(dataclasses.replace(proven, parts_before=before, parts_after=after)).shares
    assert len(shares) == 12 and shares[-2].name == "21 smaller parts" and shares[-1].name == "all"
    assert shares[-1].bytes == ("30.4 kB", "29.8 kB") and shares[-1].ms == ("3.00 ms", "2.95 ms")
    assert all(0 <= bar <= 100 for s in shares[:-2] for bar in s.bars)
    few = view(dataclasses.replace(proven, parts_before=before[:1], parts_after=after[-1:])).shares
    assert [(s.name, s.bytes) for s in few] == [("layer.0", ("1 kB", "–")), ("new", ("–", "400 B")), ("all", ("1 kB", "400 B"))]


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        ("table fp32 900x16", {"t": "table int4 900x16"}, "fp32 → int4"),
        ("dense fp32 48x64", {"t": "dense int3 32x64"}, "48x64 → 32x64, fp32 → int3"),
        ("table fp32 900x16", {"t": "table codebook 4x256 int8 900x16"},
         "rows share 256 vectors in each of 4 parts, fp32 → int8"),
        ("table fp32 900x16", {"t": "bands", "t.band0": "table int8 90x16", "t.band1": "table int4 810x16"},
         "in 2: band0: table int8 90x16, band1: table int4 810x16, and a map of its ids"),
        ("dense fp32 64x64", {"t.0": "dense fp32 64x8", "t.1": "dense fp32 8x64"},
         "in 2: 0: dense fp32 64x8, 1: dense fp32 8x64"),
        ("table fp32 22x16", {"t.shared": "table fp32 1x16"}, "now table fp32 1x16"),
        ("norm 64", {}, "folded into the layer beside it"),
        ("table fp32 9x9", {}, "left out"),
        ("norm 64", {"t": "norm 64"}, "as it was"),
        ("other GRU", {"t": "other GRU"}, "left alone: no compression knows this kind of layer"),
    ],
)  # fmt: skip
def test_what_became_of_a_layer_is_said(proven: Result, before: str, after: dict[str, str], done: str) -> None:
    was = (Part("t", before, 4000, 1.0, 0), Part("tt", "dense fp32 8x8", 100, 0.1, 0))
    now = (*(Part(name, kind, 500, 0.5, 0) for name, kind in after.items()), was[1])
    rows = view(dataclasses.replace(proven, parts_before=was, parts_after=now)).layers
    assert [r.name for r in rows] == ["t", "tt", "all"] and rows[0].done == done and rows[1].done == "as it was"
    total = 500 * len(after) + 100
    assert rows[0].bytes[0] == "4 kB" and rows[-1].smaller == f"{math.floor(41000 / total) / 10:.1f}×"


def test_references_lie_on_their_scale(proven: Result) -> None:
    v = view(proven)
    assert len(v.references) == len(proven.references) + 3
    assert [r.value for r in v.references] == sorted(r.value for r in v.references)
    assert all(0 <= r.place <= 100 for r in v.references)


def test_predictions_are_held_against_measurements(proven: Result) -> None:
    exact = [
        dataclasses.replace(t, predicted=dataclasses.replace(t.measured, p99_ms=2 * t.measured.p99_ms))
        for t in proven.trials[:1]
    ]
    told = view(dataclasses.replace(proven, trials=tuple(exact))).prediction
    assert told.startswith("Over 1 measured trial, predicted bytes are off by 0.0% (median; 0% at worst), p99 by 100.0%")


def test_what_was_tuned_is_shown_the_fastest_first(proven: Result) -> None:
    ways = (
        Tuned("tables in int4", "eager on 1 thread", 2.0, "dropped after 4 rounds"),
        Tuned("tables in int4", "onnxruntime on 1 thread", 0.5, chosen=True),
        Tuned("tables in int4", "onnxruntime on <2> threads", None, "could not be made"),
        Tuned("tables in int8", "eager on 1 thread", 3.0, chosen=True),
    )
    tuned = dataclasses.replace(proven, tuning=ways)
    (plan, ran), (other, alone) = view(tuned).tuning
    assert (plan, other, len(alone)) == ("tables in int4", "tables in int8", 1)
    assert [(r.runtime, r.slower, r.chosen) for r in ran] == [
        ("onnxruntime on 1 thread", "1.00×", True),
        ("eager on 1 thread", "4.00×", False),
        ("onnxruntime on <2> threads", "", False),
    ]
    page = render(tuned)
    assert "Tables in int4" in page and "dropped after 4 rounds" in page and "onnxruntime on &lt;2&gt; threads" in page
    assert "How it runs fastest here" in page and "How it runs fastest here" not in render(proven)
    assert json.loads(dumps(summary(tuned)))["tuning"][1]["chosen"] is True
    assert loads(Result, dumps(tuned), "record") == tuned


# -- text ----------------------------------------------------------------------------------------------------------------


def test_the_summary_is_json_with_what_scripts_ask(proven: Result, undecided: Result) -> None:
    found = json.loads(dumps(summary(proven)))
    assert set(found["baseline"]) == set(found["chosen"]) == {"bytes", "p50_ms", "p99_ms", "auc"}
    assert found["proven"] is True and found["nearest"] is None
    assert (found["drop_upper_95"], found["margin"]) == (proven.chosen.proof.drop_upper_95, proven.chosen.proof.margin)
    assert found["plan"] == proven.chosen.plan.describe() and found["seconds"] > 0 and found["control"]["auc"] > 0.5
    assert [t["plan"] for t in found["trials"]] == [t.plan.describe() for t in proven.trials]
    assert [(e["run"], e["loss"], e["metric"]) for e in found["epochs"]] == [(e.run, e.loss, e.metric) for e in proven.epochs]
    assert sum(p["bytes"] for p in found["parts"]["after"]) < sum(p["bytes"] for p in found["parts"]["before"]) / 2
    assert found["left_alone"] == []
    failed = json.loads(dumps(summary(undecided)))
    assert failed["chosen"] is None and failed["proven"] is False and failed["nearest"]["bytes"] > 0
    assert (failed["rows_needed"], failed["drop_upper_95"]) == (40_301, 0.0050001)


def test_the_summary_of_nothing(infeasible: Result) -> None:
    found = json.loads(dumps(summary(infeasible)))
    assert found["proven"] is False and found["chosen"] is found["nearest"] is found["drop"] is found["plan"] is None


def test_the_table_says_yes_only_when_proven(proven: Result, undecided: Result, infeasible: Result) -> None:
    said = plain(proven)
    assert re.search(r"baseline +fp32 +\d.* MB +p99 .* ms +AUC \.\d{4}", said) and re.search(r"chosen +int\d", said)
    assert "with 95 % confidence: yes; proven at ." in said and "500 candidates" in said
    assert ": no, the rows cannot tell; proven at .0051" in plain(undecided, 200) and "yes" not in plain(undecided)
    assert "missing" in plain(infeasible) and "yes" not in plain(infeasible)


def test_the_table_folds_into_a_narrow_terminal(proven: Result) -> None:
    assert max(len(line) for line in plain(proven, 80).splitlines()) <= 80


# -- charts --------------------------------------------------------------------------------------------------------------


def marks(svg: str) -> list[str]:
    """The words of every mark."""
    return re.findall(r'aria-label="([^"]*)" role="graphics-symbol"', svg)


def test_every_trial_is_a_mark_with_its_words(proven: Result, drawn: dict[str, Figure]) -> None:
    assert set(drawn) == {"bytes", "p99", "predicted bytes", "predicted p99", "proof", "loss", "metric"}
    measured = [t for t in proven.trials if t.measured]
    for name in ("bytes", "p99"):
        told = marks(drawn[name].wide)
        assert len(told) == len(measured) + 2  # baseline and control
        assert sum("chosen:" in words for words in told) == 1
        assert sum(t.plan.describe() in " ".join(told) for t in measured) == len(measured)
    assert len(marks(drawn["loss"].narrow)) == len(marks(drawn["metric"].wide)) == len(proven.epochs)
    assert len(marks(drawn["proof"].wide)) == 4
    assert [s.name for s in drawn["bytes"].legend] == ["chosen", "baseline", "control", "proven", "dropped"]


def test_charts_take_their_colours_from_the_page(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        assert "var(--" in figure.wide and not re.search(r'(fill|stroke)="(#|rgb|black|white|steelblue)', figure.wide)
        assert 'width="520"' in figure.wide and 'width="350"' in figure.narrow


def test_what_the_budget_allows_is_shaded(proven: Result, drawn: dict[str, Figure]) -> None:
    shade = re.compile(r'd="M0,[\d.]+h([\d.]+)v[\d.]+h-[\d.]+Z" fill="var\(--good\)"')
    axis = 520 - 20
    bytes_, p99 = (float(shade.search(drawn[name].wide)[1]) for name in ("bytes", "p99"))
    assert bytes_ < 0.75 * axis < p99  # 600 kB of a scale to 2 MB; no limit of p99
    free = figures(dataclasses.replace(proven, epochs=(), budget="words that say nothing"))
    assert float(shade.search(free["bytes"].wide)[1]) > 0.75 * axis


def test_a_record_with_little_in_it_draws_what_it_can(infeasible: Result) -> None:
    assert figures(dataclasses.replace(infeasible, trials=(), epochs=())) == {}
    trial = dataclasses.replace(infeasible.trials[0], validation=None)
    assert set(figures(dataclasses.replace(infeasible, trials=(trial,), epochs=()))) == {"predicted bytes", "predicted p99"}


def test_without_the_packages_that_draw_the_remedy_is_named(proven: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(DeviceError, match=r"altair: pip install 'pennyweight\[report\]'"):
        render(proven)
    assert summary(proven) and plain(proven)  # these need no charts


# -- page ----------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every start tag with its attributes, and whether all that opened was closed."""

    VOID = ("meta", "link", "br")
    DRAWN = ("path", "line", "circle", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.found:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), f"{tag} loads {attributes[name]}"
    assert "@import" not in page and "url(http" not in page and "<script src" not in page
    assert len(page) < 600_000


def test_the_same_record_gives_the_same_page(proven: Result, page: str) -> None:
    assert render(proven) == page


def test_ids_are_unique(page: str) -> None:
    ids = [a["id"] for _, a in Tags(page).found if a.get("id")]
    assert len(ids) == len(set(ids)) and {"verdict", "proof", "frontier", "parts", "trials", "machine"} <= set(ids)


def test_the_page_holds_the_figures_of_the_record(proven: Result, page: str) -> None:
    v = view(proven)
    for text in (v.headline, v.explanation, *(s[1][1:] for s in v.steps), *(f for c in v.columns for f in c.figures.values())):
        assert text in page
    assert page.count('<td class="fate">') == len(proven.trials)
    assert all(version in page for version in proven.versions.values())


def test_texts_of_a_record_are_no_markup(proven: Result) -> None:
    bad = "<script>alert(1)</script>&"
    trial = dataclasses.replace(proven.trials[0], note=bad)
    epochs = tuple(dataclasses.replace(e, run=bad) for e in proven.epochs[:2])
    told = {
        "data": bad,
        "explanation": bad,
        "references": ((bad, 0.7),),
        "trials": (trial, *proven.trials[1:]),
        "epochs": epochs,
    }
    text = render(
        dataclasses.replace(proven, **told, machine={"cpu": bad}, versions={bad: bad}, savings=(bad,), price=Price(1.0))
    )
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 6
    assert not Tags(text).open


def test_without_a_chosen_plan_the_page_is_honest(undecided: Result, infeasible: Result) -> None:
    told = render(undecided)
    assert "Cannot tell" in told and "not proven as good" in told and "What came nearest" in told and "✓" not in told
    nothing = render(infeasible)
    assert "Nothing proven" in nothing and 'id="proof"' not in nothing and 'id="frontier"' in nothing and "✓" not in nothing
    assert not Tags(told).open and not Tags(nothing).open
