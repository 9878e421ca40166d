"""A real Chromium for tests of the page, where there is one: Debian's package, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=["--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()
