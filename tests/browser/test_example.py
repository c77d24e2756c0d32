"""The example page in a real browser, cut off from every other host: what it answers is what Python answers."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from examples.browser import build
from pennyweight.accelerate.runner import Runner
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.errors import ConfigError, DeviceError, StorageError
from pennyweight.data.dataset import Dataset
from pennyweight.model import graph
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.ranking import DNN
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import Model, Spec, spec_of
from pennyweight.model.spec import build as built
from pennyweight.model.transform import Env, plan
from pennyweight.serve.worker import Query, Worker

in_browser = pytest.mark.browser
Stroke = Sequence[tuple[float, float]]

UPPER, LOWER = [(0.3, 0.25), (0.45, 0.17), (0.64, 0.22), (0.66, 0.36)], [(0.66, 0.56), (0.68, 0.75), (0.48, 0.83), (0.28, 0.75)]
THREE: list[Stroke] = [[*UPPER, (0.48, 0.47), *LOWER]]
SEVEN: list[Stroke] = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.8)], [(0.4, 0.5), (0.65, 0.5)]]


class Quiet(SimpleHTTPRequestHandler):
    """A web server that only hands files out: the example needs no more."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def runtime() -> Path:
    try:
        return build.runtime()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def digit() -> Bundle:
    return build.digits()[0]


@pytest.fixture(scope="module")
def ranker(movies: Dataset) -> Bundle:
    """A model that only ranks: every film is its candidate."""
    return untrained(spec_of(DNN, columns=movies.schema.columns, dim=4, hidden=(16,), norm=False), movies)


@pytest.fixture(scope="module")
def sequential(movies: Dataset) -> Bundle:
    """A model to which the order of what is liked matters, and where the padding is."""
    return untrained(spec_of(SASRec, columns=movies.schema.columns, dim=8, blocks=1), movies)


def untrained(spec: Spec, movies: Dataset) -> Bundle:
    torch.manual_seed(1)
    return Bundle(Model.of(built(spec).eval(), spec), catalog=movies.catalog)


@pytest.fixture(scope="module")
def films(request: pytest.FixtureRequest) -> Bundle:
    """A recommender with all its weights packed, a cascade unless a test asks for another."""
    bundle: Bundle = request.getfixturevalue(getattr(request, "param", "cascade"))
    return plan(QuantizeTables("int8"), QuantizeDense("int8")).apply(bundle, Env())


@pytest.fixture(scope="module")
def url(digit: Bundle, films: Bundle, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("example") / "site"
    build.site(folder, digit, films, runtime)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; a request to any other host is cut and fails the test, as does an error in its console.

    A test that breaks something hands in ``broken``, which is given the page before it is opened.
    """
    contexts, faults = [], []

    def leave(route: Any) -> None:
        faults.append(route.request.url)
        route.abort()

    def open_page(width: int = 1280, scheme: str = "light", broken: Callable[[Any], object] | None = None) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        context.route(lambda asked: not asked.startswith(url), leave)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        if broken:
            broken(page)
        else:
            page.on("console", lambda message: faults.append(message.text))
        page.goto(url)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def draw(page: Any, strokes: Sequence[Stroke], scale: float = 1.0, shift: float = 0.0) -> None:
    """With the mouse, in shares of the field."""
    box = page.locator("#field").bounding_box()
    for stroke in strokes:
        shares = [(x * scale + shift, y * scale + shift) for x, y in stroke]
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in shares]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=4)
        page.mouse.up()


def drawn(page: Any, strokes: Sequence[Stroke], **how: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels and probabilities of a new drawing, once the page is at rest."""
    if page.locator("#wipe").is_enabled():
        page.locator("#wipe").click()
    draw(page, strokes, **how)
    page.wait_for_selector("#field:not([data-busy])")
    answer = page.evaluate("[Array.from(pennyweight.pixels), pennyweight.probabilities]")
    return np.array(answer[0], np.float32), np.array(answer[1])


def pick(page: Any, *titles: str) -> tuple[list[int], list[int], list[float]]:
    """Ids of what is liked, and ids and scores of the top, after these titles were searched and taken."""
    for title in titles:
        search = page.get_by_role("combobox", name="Search a title")
        search.fill(title)
        search.press("Enter")
        page.wait_for_selector("#list:not([aria-busy])")
    liked, top = page.evaluate("[pennyweight.liked, pennyweight.top]")
    return liked, [film for film, _ in top], [score for _, score in top]


@in_browser
def test_a_drawn_digit_is_read_as_python_reads_it(page: Callable[..., Any], digit: Bundle) -> None:
    here = page()
    assert here.get_by_role("heading", name="Nothing drawn yet").is_visible()
    with Runner(digit) as runner:
        for number, strokes in ((3, THREE), (7, SEVEN)):
            pixels, probabilities = drawn(here, strokes)
            assert pixels.sum() > 5 and pixels.min() >= 0 and pixels.max() <= 1
            ours = softmax(runner.score({"x": torch.from_numpy(pixels[None])})[0])
            np.testing.assert_allclose(probabilities, ours, atol=1e-3)
            assert here.get_by_role("heading", name=f"This looks like a {number}").is_visible()
            shown = here.locator("#bars output").all_text_contents()
            assert shown == [f"{np.floor(100 * p + 0.5):.0f} %" for p in probabilities]
    here.locator("#wipe").click()
    here.get_by_role("heading", name="Nothing drawn yet").wait_for()
    assert here.evaluate("pennyweight.probabilities") is None


@in_browser
def test_neither_size_nor_place_of_a_drawing_matters(page: Callable[..., Any]) -> None:
    here = page()
    (large, _), (small, _) = drawn(here, THREE), drawn(here, THREE, scale=0.4, shift=0.55)
    assert np.abs(large - small).mean() < 0.02
    assert large.sum() == pytest.approx(19.5, abs=0.5)  # the ink of the pictures it learned from


@in_browser
def test_a_digit_can_be_drawn_with_keys_alone(page: Callable[..., Any]) -> None:
    here = page()
    here.locator("#field").focus()
    for key in ("Space", *["ArrowDown"] * 15, "Space"):
        here.keyboard.press(key)
    here.get_by_role("heading", name="This looks like a 1").wait_for()
    here.keyboard.press("Backspace")
    here.get_by_role("heading", name="Nothing drawn yet").wait_for()


@in_browser
@pytest.mark.parametrize("films", ["cascade", "ranker", "sequential"], indirect=True)
def test_picked_films_give_what_python_gives(page: Callable[..., Any], films: Bundle) -> None:
    here = page()
    popular = here.locator("#list .title").all_text_contents()
    assert here.get_by_role("heading", name="Popular, to start with").is_visible() and len(popular) == 10
    liked, top, scores = pick(here, "toy story", "matrix", "heat")
    catalog = films.catalog
    assert catalog is not None and catalog.items is not None
    names = dict(catalog.items.select("item", "title").iter_rows())
    assert [names[i] for i in liked] == here.locator("#taste span").all_text_contents()
    history = np.array(liked)
    ours = Worker(films).answer([Query(None, history, hidden=history)])[0].top(10)
    assert top == ours.items.tolist() and not set(top) & set(liked)
    with Runner(films) as runner:
        np.testing.assert_allclose(scores, runner.score(catalog.request(None, liked, np.array(top))), atol=1e-3)
    assert here.locator("#list .title").all_text_contents() == [names[i] for i in top]
    assert here.locator("#list .score").first.text_content() == f"score {scores[0]:.3f}"
    assert " films ranked in " in here.locator("#films-status").text_content()
    here.get_by_role("button", name="Start again").click()
    here.get_by_role("heading", name="Popular, to start with").wait_for()
    assert here.locator("#list .title").all_text_contents() == popular


@in_browser
def test_a_like_in_the_list_counts_and_can_be_taken_back(page: Callable[..., Any]) -> None:
    here = page()
    first = here.locator("#list .title").first.text_content()
    here.get_by_role("button", name=f"Like {first}", exact=True).click()
    here.get_by_role("heading", name="For you").wait_for()
    assert first not in here.locator("#list .title").all_text_contents()
    here.get_by_role("button", name=f"Forget {first}", exact=True).click()
    here.get_by_role("heading", name="Popular, to start with").wait_for()


@in_browser
def test_a_file_that_is_missing_is_named_and_the_other_half_works(page: Callable[..., Any]) -> None:
    here = page(broken=lambda page: page.route("**/films-model.onnx", lambda route: route.fulfill(status=404)))
    assert "films-model.onnx is not there (404)" in here.get_by_role("alert").text_content()
    assert here.locator("#films").is_hidden()
    assert drawn(here, SEVEN)[1].argmax() == 7


@in_browser
def test_a_browser_without_webassembly_is_told(page: Callable[..., Any]) -> None:
    here = page(broken=lambda page: page.add_init_script("delete globalThis.WebAssembly"))
    assert "no WebAssembly" in here.get_by_role("alert").text_content()
    assert here.locator("#starting").is_hidden() and here.locator("#digit").is_hidden()


@in_browser
def test_the_foot_says_what_each_part_weighs_and_took(page: Callable[..., Any]) -> None:
    here = page()
    draw(here, SEVEN)
    pick(here, "heat")
    rows = [row.locator("th, td").all_text_contents() for row in here.locator("#parts tr").all()]
    assert [row[0] for row in rows][1:] == ["Digit classifier", "Films: ranking", "Films: candidates"]
    assert all(row[1].endswith("B") for row in rows) and all(row[2].endswith("ms") for row in rows[1:])


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_fits_and_can_be_read(page: Callable[..., Any], width: int, scheme: str, contrasts: str) -> None:
    """Nothing sticks out sideways, all text has the contrast WCAG asks for, and everything has a name."""
    here = page(width, scheme)
    draw(here, THREE)
    pick(here, "heat")
    assert here.evaluate("document.documentElement.scrollWidth") <= width
    words = "h1, h2, h3, p, a, label, span, b, small, output, summary, figcaption, button, th, td, .genres"
    texts = here.evaluate(contrasts, words)
    assert len(texts) > 60
    assert [text for ratio, text in texts if ratio < 4.5] == []
    nameless = here.evaluate(
        """() => [...document.querySelectorAll("button, input, a, ul, ol, section, nav, canvas")].filter((node) =>
          !(node.textContent.trim() || node.labels?.length || node.getAttribute("aria-label") ||
            node.getAttribute("aria-labelledby"))).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    if width == 390:
        small = "(nodes) => nodes.map((n) => n.getBoundingClientRect()).filter((r) => r.height < 40).length"
        assert here.locator("#list button, .tools button").evaluate_all(small) == 0


def test_bundles_of_another_kind_are_refused(cascade: Bundle, movies: Dataset, tmp_path: Path) -> None:
    assert cascade.catalog is not None
    none = cascade.replace(catalog=cascade.catalog.replace(items=None))
    with pytest.raises(ConfigError, match="no catalogue of items to choose from"):
        build.site(tmp_path / "site", none, none, tmp_path)
    columns = tuple(c for c in movies.schema.columns if c.name != "history")
    unread = cascade.replace(catalog=cascade.catalog.replace(schema=type(movies.schema)(columns)))
    with pytest.raises(ConfigError, match="reads no history"):
        build.site(tmp_path / "site", none, unread, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_other_pixels_is_refused(cascade: Bundle, tmp_path: Path) -> None:
    wide = Bundle(graph.of(torch.nn.Sequential(torch.nn.Linear(100, 10)).eval(), [torch.zeros(2, 100)], ["x"]))
    with pytest.raises(ConfigError, match=r"takes x \[rows, 100\]; one input of 8 x 8 or 28 x 28"):
        build.site(tmp_path / "site", wide, cascade, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(cascade: Bundle, tmp_path: Path) -> None:
    save(cascade, tmp_path / "site")
    with pytest.raises(StorageError, match="is not a site"):
        build.site(tmp_path / "site", cascade, cascade, tmp_path)


def test_without_npm_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package.json").write_text((build.HERE / "package.json").read_text())
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"npm is missing.*apt-get install npm"):
        build.runtime()
