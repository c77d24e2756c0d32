"""The report in a real browser: drawn, readable, in both colour schemes, narrow and wide, and silent on the network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pennyweight.core.config import loads
from pennyweight.optimize import search  # noqa: F401  (registers every transform)
from pennyweight.optimize.trial import Result
from pennyweight.report import render, view

pytestmark = pytest.mark.browser

RECORD = Path(__file__).parents[1] / "result.json"
CONTRAST = """(element) => {
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = (node, what) => {
    const [r, g, b] = getComputedStyle(node)[what].match(/[\\d.]+/g).map((c) => linear(Number(c)));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ratio = light(element, "color") / light(document.body, "backgroundColor");
  return Math.max(ratio, 1 / ratio);
}"""
"""WCAG's contrast of an element's words with the page."""


@pytest.fixture(scope="module")
def result() -> Result:
    return loads(Result, RECORD.read_bytes(), RECORD.name)


@pytest.fixture(scope="module")
def file(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(result), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report; anything said in the console, and any request but for the file, fails the test."""
    contexts, faults = [], []

    def open_file(width: int = 1280, scheme: str = "light", scripts: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: request.url.startswith((file.as_uri(), "data:")) or faults.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_fits_and_is_drawn(opened: Callable[..., Any], result: Result, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#verdict").is_visible() and page.locator("h1").inner_text() == view(result).headline
    charts = page.locator("figure svg.marks:visible")
    assert charts.count() == 7
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["width"] >= 300 and box["height"] >= 80 and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert chart.locator("[role='graphics-symbol']").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_marks_stand_out_in_both_schemes(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(scheme=scheme)
    for selector in ("h1", "#verdict", "p.soft", "tbody th", "td.n", ".tile span", "footer"):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    painted = page.locator("#chart-bytes .wide [role='graphics-symbol'][aria-label^='chosen']")
    assert (
        painted.evaluate("(mark) => getComputedStyle(mark).fill")
        == {"light": "rgb(0, 104, 173)", "dark": "rgb(86, 180, 233)"}[scheme]
    )


def test_wide_tables_scroll_inside_themselves(opened: Callable[..., Any]) -> None:
    page = opened(390)
    table = page.locator("#trials .scroll")
    assert table.evaluate("(box) => box.scrollWidth > box.clientWidth + 100")
    table.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # the page's policy forbids the strings that wait_for_function evaluates
        if table.evaluate("(box) => box.scrollLeft") > 0:
            return
        page.wait_for_timeout(20)
    pytest.fail("the arrow key does not scroll the table")


def test_a_mark_says_what_it_is(opened: Callable[..., Any], result: Result) -> None:
    page = opened()
    mark = page.locator("#chart-bytes .wide [role='graphics-symbol'][aria-label^='chosen']")
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert result.chosen is not None
    assert result.chosen.plan.describe() in page.locator("#tip").inner_text()
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_it_reads_without_scripts(opened: Callable[..., Any]) -> None:
    page = opened(scripts=False)
    assert page.locator("figure svg.marks:visible").count() == 7 and page.locator("#verdict").is_visible()


def test_axis_labels_lie_inside_their_charts(opened: Callable[..., Any]) -> None:
    """The fonts that the SVG was measured with are not those it is shown in."""
    page = opened(390)
    outside = """(charts) => charts.flatMap((chart) => {
      const box = chart.getBoundingClientRect();
      return [...chart.querySelectorAll("text")].filter((text) => {
        const t = text.getBoundingClientRect();
        return t.width && (t.left < box.left - 1 || t.right > box.right + 1);
      }).map((text) => text.textContent);
    })"""
    assert page.locator("figure svg.marks:visible").evaluate_all(outside) == []
