"""The page in a real browser: what it shows, what a like changes, keys alone, narrow and wide, light and dark."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from pennyweight.model.bundle import Bundle
from pennyweight.serve.app import App
from pennyweight.serve.service import Service

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(cascade: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app = App(Service(cascade, tmp_path_factory.mktemp("page") / "events.db"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; any error in its console, or a request that leaves this machine, fails the test."""
    contexts, faults = [], []

    def open_page(url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith("http://127.0.0.1:") else faults.append(request.url))
        page.goto(url)
        page.wait_for_selector("#list li, article")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def titles(page: Any) -> list[str]:
    page.wait_for_selector("#list:not([aria-busy])")
    found: list[str] = page.locator("#list .title").all_text_contents()
    return found


def test_liking_titles_changes_the_list(page: Callable[..., Any], url: str) -> None:
    here = page(url)
    assert here.get_by_role("heading", name="Popular, to start with").is_visible()
    assert len(titles(here)) == 10
    first = titles(here)[0]
    here.get_by_role("button", name=f"Like {first}", exact=True).click()
    here.get_by_role("heading", name="For you").wait_for()
    once = titles(here)
    assert first not in once
    here.locator("#list button").nth(2).click()
    here.locator("#taste li").nth(1).wait_for()
    twice = titles(here)
    assert once[2] not in twice and twice != once
    here.get_by_role("button", name=f"Forget {once[2]}", exact=True).click()
    here.locator("#taste li").nth(1).wait_for(state="detached")
    assert titles(here) == once


def test_a_users_like_is_stored_and_changes_the_list(page: Callable[..., Any], url: str) -> None:
    here = page(url)
    here.get_by_role("radio", name="A user").check()
    here.get_by_role("combobox", name="Search a user").fill("15")
    here.get_by_role("option", name="User 15", exact=True).click()
    here.get_by_role("heading", name="For user 15").wait_for()
    before = titles(here)
    with here.expect_response("**/events") as answer:
        here.get_by_role("button", name=f"Like {before[0]}", exact=True).click()
    assert answer.value.json() == {"stored": 1, "duplicates": 0}
    here.locator("#taste li", has_text=before[0]).wait_for()
    after = titles(here)
    assert before[0] not in after and after[:9] != before[1:]
    here.reload()
    here.get_by_role("heading", name="For user 15").wait_for()
    assert titles(here) == after


def test_keys_alone_are_enough(page: Callable[..., Any], url: str) -> None:
    here = page(url)
    search = here.get_by_role("combobox", name="Search a title")
    search.focus()
    here.keyboard.type("toy st")
    here.get_by_role("option", name="Toy Story 3").wait_for()
    assert search.get_attribute("aria-expanded") == "true"
    here.keyboard.press("ArrowDown")
    here.keyboard.press("ArrowDown")
    chosen = search.get_attribute("aria-activedescendant")
    assert "Toy Story 2" in here.locator(f"#{chosen}").text_content()
    here.keyboard.press("Enter")
    here.locator("#taste li", has_text="Toy Story 2").wait_for()
    assert search.get_attribute("aria-expanded") == "false"
    here.keyboard.type("heat")
    here.keyboard.press("Enter")  # at once: what was typed counts, not what is still shown
    here.locator("#taste li", has_text="Heat").wait_for()
    here.keyboard.press("ArrowDown")
    here.locator("#found li").first.wait_for()
    here.keyboard.press("Escape")
    assert here.locator("#found").is_hidden()
    here.keyboard.press("Tab")
    assert here.evaluate("document.activeElement.getAttribute('aria-label')") == "Forget Toy Story 2"


def test_everything_has_a_name(page: Callable[..., Any], url: str) -> None:
    here = page(url)
    here.locator("#list button").first.click()
    here.locator("#taste li").wait_for()
    nameless = here.evaluate(
        """() => [...document.querySelectorAll("button, input, a, ul, ol, section, nav, img")].filter((node) =>
          !(node.textContent.trim() || node.labels?.length || node.getAttribute("aria-label") || node.hasAttribute("alt") ||
            node.getAttribute("aria-labelledby"))).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    assert here.get_by_role("status").text_content().startswith("10 titles in ")


def test_a_failure_is_shown_in_words(page: Callable[..., Any], url: str) -> None:
    here = page(url)
    error = {"error": {"status": 429, "code": "overloaded", "message": "1000 requests wait", "remedy": "try again in 1 s"}}
    here.route("**/recommend", lambda route: route.fulfill(json=error))
    here.locator("#list button").first.click()
    here.get_by_text("1000 requests wait. try again in 1 s").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_fits_and_can_be_read(page: Callable[..., Any], url: str, path: str, width: int, scheme: str, contrasts: str) -> None:
    """Nothing sticks out sideways, and all text has the contrast WCAG asks for (4.5 to 1)."""
    here = page(f"{url}{path}", width, 844, scheme)
    if path == "/":
        here.locator("#list button").first.click()
        here.locator("#taste li").wait_for()
    assert here.evaluate("document.documentElement.scrollWidth") <= width
    texts = here.evaluate(contrasts, "h1, h2, h3, p, a, label, span, small, button:not(:hover), td, .genres")
    assert len(texts) > 30
    assert [text for contrast, text in texts if contrast < 4.5] == []
    dark = here.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 150) == (scheme == "dark")
    if path == "/" and width == 390:
        small = "(nodes) => nodes.map((n) => n.getBoundingClientRect()).filter((r) => r.height < 40).length"
        assert here.locator("#list button").evaluate_all(small) == 0
