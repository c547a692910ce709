"""The explorer's page in a real headless Chromium, with a tiny model behind it."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.ports import HOST, listening_socket
from hafs_evaluate.explore.reading import latents_of
from hafs_evaluate.explore.requests import ReadRequest
from tests.evaluate.explore.conftest import RUNS
from tests.support.browser import NEEDS_CHROMIUM, OVERFLOW, PHONE, visiting

uvicorn = pytest.importorskip("uvicorn", reason="the explorer's tests need its extra: pip install 'hafs-jax[explore]'")
pytestmark = NEEDS_CHROMIUM

DESKTOP = {"width": 1440, "height": 900}
TEXT = "rivers carried salt and iron"
NASTY = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> & \u202e שלום 😀 <|endoftext|>"


class Running:
    """A server in a thread of its own, whose answers can be held back."""

    def __init__(self, explorer: Explorer, port: int | None = None) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self._socket = listening_socket(port)
        self.port = self._socket.getsockname()[1]
        from hafs_evaluate.explore.app import make_app

        app = make_app(Held(explorer, self.gate), explorer.workspace.report, self.port, "hafs explore --out here")
        config = uvicorn.Config(app, lifespan="off", log_level="warning", ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/"

    def stop(self) -> None:
        self.gate.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self._socket.close()


class Held:
    """The explorer, whose answers wait for `gate`."""

    def __init__(self, explorer: Explorer, gate: threading.Event) -> None:
        self._explorer, self._gate = explorer, gate

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._explorer, name)

        def held(*arguments: Any) -> Any:
            assert self._gate.wait(20)
            return method(*arguments)

        return method if name == "state" else held


@pytest.fixture(scope="module")
def server(explorer: Explorer) -> Iterator[Running]:
    for name in RUNS:
        explorer.read(ReadRequest(TEXT, (name,)))
    running = Running(explorer)
    yield running
    running.stop()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """See `visiting`; the page asks its own server alone."""

    def is_own(url: str, asked: str) -> bool:
        return asked.startswith((url.partition("#")[0], "data:"))

    with visiting(browser, DESKTOP, is_own) as open_page:

        def open_explorer(url: str, complains: bool = False, **options: Any) -> Any:
            page = open_page(url, complains, **options)
            page.locator("#shown input").first.wait_for(state="attached")
            return page

        yield open_explorer


def read(page: Any, text: str = TEXT) -> None:
    page.fill("#text", text)
    page.click("#read")
    page.wait_for_function("text => readText === text", arg=text)


def tokens(page: Any) -> list[str]:
    return page.locator("#strip span").all_inner_texts()


def open_first(page: Any) -> tuple[str, int]:
    """Opens the first latent that is listed: (run, index)."""
    hit = page.locator("#columns-of-runs .hit").first
    run, index = hit.get_attribute("data-run"), int(hit.get_attribute("data-index"))
    hit.click()
    page.wait_for_function("index => opened.live && opened.index === index", arg=index)
    return run, index


def test_a_text_is_read_and_a_token_shows_its_latents_beside_each_other(visit, server, explorer) -> None:
    page = visit(server.address)
    read(page)
    reading = explorer._reading(TEXT)
    assert [text.strip() for text in tokens(page)] == [explorer.text(i).strip() for i in reading.ids_L.tolist()]
    page.locator("#strip span").nth(2).click()
    assert page.locator("#strip span").nth(2).get_attribute("aria-selected") == "true"
    page.mouse.move(5, 5)
    for place, run in enumerate(RUNS):
        column = page.locator("#columns-of-runs > div").nth(place)
        values = latents_of(explorer._run(run).sae, reading)[2]
        assert column.locator("h3").inner_text() == run
        first = column.locator(".hit").first
        assert int(first.get_attribute("data-index")) == int(values.argmax())
        assert float(first.locator("span").last.inner_text()) == pytest.approx(float(values.max()), rel=1e-3)
        assert column.locator(".l0").inner_text() == f"{int((values > 0).sum())} latents fire"
    page.locator("#strip span").nth(3).hover()
    assert tokens(page)[3] in page.locator("#columns-title").inner_text()
    page.locator("#strip span").first.click()
    assert page.locator("#columns-of-runs .l0").all_inner_texts() == ["left out", "left out"]


def test_a_latent_colours_the_text_and_its_neighbours_open(visit, server, explorer) -> None:
    page = visit(server.address)
    read(page)
    run, index = open_first(page)
    assert page.locator("#latent-result h2").inner_text() == f"#{index} of {run}"
    values = latents_of(explorer._run(run).sae, explorer._reading(TEXT))[:, index]
    coloured = page.locator("#strip span").evaluate_all("spans => spans.map(span => span.style.background !== '')")
    assert coloured == (values > 0).tolist()
    assert page.evaluate("location.hash") == f"#run={run}&latent={index}"
    page.locator("#latent-result .hit").first.click()
    page.wait_for_function("index => opened.index !== index && opened.live", arg=index)
    page.go_back()
    page.wait_for_function("index => opened.index === index && opened.live", arg=index)
    other = visit(f"{server.address}#run={RUNS[1]}&latent=7", complains=True)
    other.locator("#latent-result h2").wait_for()
    assert other.locator("#latent-result h2").inner_text() == f"#7 of {RUNS[1]}"
    other.fill("#latent-index", "9999")
    other.click("#latent-open")
    other.locator("#latent-error:not(:empty)").wait_for()
    assert "expected an index from 0 to" in other.locator("#latent-error").inner_text()


def test_search_finds_a_latent_and_opens_it(visit, server) -> None:
    page = visit(server.address, complains=True)  # a refused request is noted in the console
    page.click("#tab-search")
    page.click("#search-go")
    page.locator("#search-error:not(:empty)").wait_for()
    assert "the text is empty" in page.locator("#search-error").inner_text()
    page.fill("#text", TEXT)
    page.click("#search-go")
    found = page.locator("#search-result [data-found]").first
    found.wait_for()
    assert page.locator("#search-error").inner_text() == ""
    index = int(found.get_attribute("data-found"))
    found.click()
    page.wait_for_function("index => opened.live && opened.index === index", arg=index)
    assert page.locator("#latent").is_visible() and page.locator("#search").is_hidden()


def test_steering_shows_both_continuations_and_can_be_stopped(visit, server) -> None:
    page = visit(server.address)
    read(page)
    _, index = open_first(page)
    page.click("#tab-steer")
    assert page.input_value("#steer-latent") == str(index)
    for strength, words in (("0", "The two are the same."), ("30", "They differ from token")):
        page.fill("#steer-strength", strength)
        page.fill("#steer-tokens", "6")
        page.click("#steer-go")
        page.wait_for_function(
            "words => document.getElementById('steer-said').textContent.startsWith(words)", arg=words
        )
    page.evaluate("drawContinued('on', {plain: ' the sea', steered: ' the shore'})")
    assert (
        page.locator("#steer-steered mark").inner_text() == "hore"
        and not page.locator("#steer-plain mark").inner_text()
    )
    server.gate.clear()
    page.click("#steer-go")
    page.wait_for_function("() => document.getElementById('busy').textContent.includes('the model is at work')")
    server.gate.set()
    page.wait_for_function("() => document.getElementById('busy').textContent === ''")
    server.gate.clear()  # a short continuation could be done before it is stopped
    page.click("#steer-go")
    page.wait_for_function("() => document.getElementById('busy').textContent.includes('the model is at work')")
    page.evaluate("steering.abort()")
    page.wait_for_function("() => document.getElementById('steer-said').textContent === 'Stopped.'")
    server.gate.set()
    page.wait_for_function("() => document.getElementById('busy').textContent === ''")


def test_runs_are_compared(visit, server) -> None:
    page = visit(server.address)
    read(page)
    page.click("#tab-compare")
    page.click("#compare-go")
    page.locator("#compare-result tbody tr").nth(1).click()
    assert page.locator("#compare-result .strip").count() == 2
    assert all(" of " in text for text in page.locator("#compare-result h3").all_inner_texts())


def test_two_tabs_at_once_are_both_answered(visit, server) -> None:
    first, second = visit(server.address), visit(server.address)
    server.gate.clear()
    for page, text in ((first, TEXT), (second, "glass under seas")):
        page.fill("#text", text)
        page.click("#read")
    second.wait_for_function(
        "() => document.getElementById('busy').textContent.includes('the model answers 2 requests')"
    )
    server.gate.set()
    for page, text in ((first, TEXT), (second, "glass under seas")):
        page.wait_for_function("text => readText === text", arg=text)
    assert tokens(first) != tokens(second)


def test_scripts_in_texts_are_text(visit, server, explorer) -> None:
    page = visit(server.address)
    read(page, NASTY)
    assert "".join(tokens(page)).replace("\n", "").startswith("<|endoftext|></script><script>")
    assert page.locator("script:not([src])").count() == page.locator("#strip img").count() == 0
    values = explorer._run(RUNS[0]).values
    before = list(values["token"])
    values["token"][:] = [f"<b>{n}</b></script>" for n in range(len(before))]
    try:
        read(page, NASTY + "!")
        assert page.locator("#columns-of-runs .token").first.inner_text().startswith("<b>")
        assert page.locator("#columns-of-runs b b").count() == 0
        open_first(page)
        page.fill("#text", NASTY[:30])
        page.click("#tab-steer")
        page.fill("#steer-tokens", "3")
        page.click("#steer-go")
        page.wait_for_function("() => document.getElementById('steer-said').textContent.startsWith('The')")
        assert page.locator("#steer-plain .prompt").inner_text() == NASTY[:30]
    finally:
        values["token"][:] = before


def test_a_long_text_says_what_was_cut_and_right_to_left_is_kept(visit, server) -> None:
    page = visit(server.address, complains=True)
    read(page, "a" * 100)
    assert "its last 37 tokens were not read" in page.locator("#strip-note").inner_text()
    page.fill("#text", "a" * 20_001)
    page.click("#read")
    page.locator("#read-error:not(:empty)").wait_for()
    assert "the text has 20,001 characters; expected at most 20,000" in page.locator("#read-error").inner_text()
    read(page, "שלום עולם")
    assert page.locator("#strip").get_attribute("dir") == "rtl"


def test_a_stopped_server_is_said_and_a_started_one_goes_on(visit, explorer) -> None:
    running = Running(explorer)
    page = visit(running.address, complains=True)
    read(page)
    running.stop()
    page.fill("#text", "glass")
    page.click("#read")
    page.locator("#stopped").wait_for()
    assert "The server no longer answers." in page.locator("#stopped").inner_text()
    assert page.locator("#command").inner_text() == "hafs explore --out here"
    assert page.input_value("#text") == "glass"
    again = Running(explorer, running.port)
    page.locator("#stopped").wait_for(state="hidden")
    read(page, "glass")
    again.stop()


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_window(visit, server, viewport) -> None:
    page = visit(server.address, viewport=viewport)
    read(page, TEXT + " " + "w" * 20)
    open_first(page)
    for tab in ("search", "compare", "steer", "latent"):
        page.click(f"#tab-{tab}")
        if tab in ("search", "compare"):
            page.click(f"#{tab}-go")
            page.locator(f"#{tab}-result td").first.wait_for()
        assert page.evaluate(OVERFLOW) <= 0, tab
