"""A real Chromium for tests of the page, where there is one: Debian's package, driven by Playwright; and who visits."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from m2lite import Model
from tests.serve.conftest import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, LocatorAssertions, Page, Route

DESKTOP = {"width": 1280, "height": 800}
PATIENCE_MS = 120_000  # for what always comes, however busy the machine is


def executable() -> str | None:
    """CHROMIUM in the environment, or the first that is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def lacking() -> str:
    """What is to be installed before the page can be tested; nothing where all is there."""
    if find_spec("playwright") is None:
        return "Playwright is not installed: pip install -e '.[browser]'"
    return "" if executable() else "there is no Chromium: apt-get install chromium"


def is_required() -> bool:
    """Whether a test that finds no browser fails; `.ci/run` says so."""
    return os.environ.get("BROWSER_TESTS") == "required"


def expect(locator: Locator) -> LocatorAssertions:
    """Waits, as long as a busy machine may need, for what is then said of it."""
    from playwright.sync_api import expect as of_playwright

    of_playwright.set_options(timeout=PATIENCE_MS)
    return of_playwright(locator)


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=["--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """The page of a server, and what it complained of."""

    def __init__(
        self, browser: Browser, served: Served, stack: ExitStack, held: str | None = None, **options: Any
    ) -> None:
        """`held`: the answer to this path is given only once `release` is called; `options` are the browser's."""
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        stack.callback(context.close)
        self.served, self.context, self.complaints = served, context, list[str]()
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self._held: list[Route] = []
        if held is not None:
            self.page.route(served.url.rstrip("/") + held, self._hold)
        self.page.goto(served.url)

    def _hold(self, route: Route) -> None:
        self._held.append(route)

    def release(self) -> None:
        for route in self._held:
            route.continue_()

    def ask(self, text: str = "Hello") -> None:
        self.page.locator("#question").fill(text)
        self.page.keyboard.press("Enter")

    def server_metrics(self) -> dict[str, int]:
        """Answers by how they ended."""
        return self.served.server.metrics.n_requests

    def answered(self, text: str = "Hello") -> str:
        """What is said, once it is whole."""
        self.ask(text)
        footer = self.page.locator("article.answer footer")
        expect(footer.last).to_be_visible()
        return self.page.locator("article.answer .content").last.inner_text()


class Pace:
    """Lets the model make so many steps, and no more until it is told to."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self._steps, self._is_free, real = threading.Semaphore(0), False, model.loop.step

        def step(stop: Any = None) -> bool:
            while not self._is_free and not self._steps.acquire(timeout=0.05):
                pass
            real(stop)
            return True  # each is delivered

        monkeypatch.setattr(model.loop, "step", step)

    def go(self, n: int = 1) -> None:
        self._steps.release(n)

    def go_on(self) -> None:
        self._is_free = True

    def until_text(self, page: Page, selector: str) -> str:
        """Step by step, until there is some."""
        while not (text := page.locator(selector).last.inner_text()):
            self._steps.release()
        return text
