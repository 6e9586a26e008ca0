"""A browser for tests: the system's Chromium, driven by playwright, on a page whose server is tests/fake_model.py."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_model import FakeModel

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


Open = Callable[..., tuple[FakeModel, Page]]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """opened(answer, **context) -> a server and a page on it. Errors, dialogs and offences against the policy fail."""
    models, contexts, wrong = [], [], []

    def open_page(answer: Callable[..., Any] = lambda messages: ["Hello ", "there."], **options: Any) -> Any:
        cuts = options.pop("cuts", 0)
        model = FakeModel(answer, cuts)
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 800}), **options)
        models.append(model)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"
        )
        page.on("console", lambda message: wrong.append(message.text) if "olicy" in message.text else None)
        page.goto(model.url)
        return model, page

    yield open_page
    for context in contexts:
        context.close()
    for model in models:
        model.close()
    assert not wrong


def ask(page: Page, words: str) -> None:
    page.fill("#words", words)
    page.press("#words", "Enter")


def done(page: Page) -> None:
    page.wait_for_selector("#send:not(.stop)")


def said(page: Page) -> list[str]:
    """What every message shows."""
    return page.locator("article :is(.body, .content)").evaluate_all(
        "all => all.filter(one => !one.parentElement.closest('.content')).map(one => one.innerText.trim())"
    )


class Gated:
    """An answer whose pieces come when the test lets them."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces, self.gate = pieces, threading.Semaphore(0)

    def __call__(self, messages: list[dict[str, Any]]) -> Iterator[Any]:
        for piece in self.pieces:
            assert self.gate.acquire(timeout=20)
            yield piece
