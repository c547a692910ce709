"""A real headless Chromium for the tests of pages.

Needs the `playwright` package and a Chromium of the system's (`apt install chromium`); a test module that imports this
is skipped without the first, and with `pytestmark = NEEDS_CHROMIUM` without the second.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="the browser's tests need Chromium: apt install chromium")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE = {"width": 390, "height": 844}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextmanager
def launched() -> Iterator[Any]:
    """The browser."""
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@contextmanager
def visiting(browser: Any, viewport: dict[str, int], is_own: Callable[[str, str], bool]) -> Iterator[Any]:
    """`visit(url, **context)` opens a page in a context of its own.

    At the end no page may have complained, opened a dialog, or asked for anything of which `is_own(url, request's
    url)` is False. A page that is to complain is opened with `complains=True`.
    """
    complaints: list[str] = []
    contexts = []

    def open_page(url: str, complains: bool = False, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": viewport, "reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        said = [] if complains else complaints
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: is_own(url, request.url) or complaints.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
