"""The documentation as a site: it builds without a warning, fetches nothing, and its search answers a newcomer."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from docs.hooks import links, tutorials

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUESTIONS = {
    "train on my own array": "how-do-i-train-on-my-own-array",
    "resume": "how-do-i-resume-a-run",
    "pick k": "how-do-i-pick-k",
    "use it in SAELens": "how-do-i-use-it-in-saelens",
    "see a latent": "how-do-i-see-a-latent",
    "steer": "how-do-i-steer-a-model",
    "compare variants": "how-do-i-compare-variants",
    "add an architecture": "how-do-i-add-an-architecture",
    "run on a cluster": "how-do-i-run-it-on-a-cluster",
    "report a bug": "how-do-i-report-a-bug",
}
"""What a newcomer asks, and the section of the questions and answers that must be found first."""


def build(target: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=150, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "site"
    done = build(target)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return target


class Fetched(HTMLParser):
    """What a page makes a browser fetch, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.anchors = list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.anchors.add(of.get("id") or "")
        if tag != "a" and of.get("rel") != "canonical":
            self.addresses += [value for name in ("src", "href") if (value := of.get(name))]


@pytest.mark.slow
def test_no_page_fetches_from_elsewhere_and_public_names_have_anchors(site: Path) -> None:
    pages = list(site.rglob("index.html"))
    assert len(pages) > 25
    for page in pages:
        found = Fetched(page.read_text())
        assert [address for address in found.addresses if re.match(r"(\w+:)?//", address)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(.?(https?:)?//", style.read_text()), style
    anchors = Fetched((site / "reference" / "python" / "index.html").read_text()).anchors
    assert {"hafs_jax.training.train.train", "hafs_jax.api.TrainedSAE.encode"} <= anchors
    assert "--sae.k" in (site / "reference" / "commands" / "index.html").read_text()


@pytest.mark.slow
def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    """So a build that passes has none."""
    own = "docs_dir: docs\nnav: [index.md]\nhooks: []\nplugins: []\nwatch: []\nextra_css: []\n"
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\n{own}")
    page = tmp_path / "docs" / "index.md"
    page.parent.mkdir()
    for text, said in (
        ("[a](#here)", None),
        ("[a](#gone)", "no such anchor"),
        ("[a](gone.md)", "not found"),
        ("", "not included in the"),
    ):
        page.write_text(f"# A page\n\n## Here\n\n{text}\n")
        if said and "included" in said:
            (page.parent / "other.md").write_text("# Not in the navigation\n")
        done = build(tmp_path / "site", tmp_path)
        assert (done.returncode == 0) == (said is None) and (said or "") in done.stderr, (text, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="the site's search needs Chromium: apt install chromium")
def test_the_first_hit_of_the_search_answers_a_newcomer(site: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="the site's search needs playwright")
    with served(site) as base, api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(base)
        wrong = {}
        for question, section in QUESTIONS.items():
            for asked in (question, f"how do I {question}"):
                expected = ["faq/", f"faq/#{section}"]
                if (found := first_hits(page, asked, expected)) != expected:
                    wrong[asked] = found
        chromium.close()
    assert wrong == {}


class served:
    """The folder on loopback, as a context; its address."""

    def __init__(self, folder: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
        )

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def first_hits(page: Any, query: str, expected: list[str]) -> list[str]:
    """Where the first results of a search lead, relative to the site; waits ten seconds for the expected ones."""
    field = page.locator("input.md-search__input")
    field.click()
    field.fill(query[:-1])
    page.keyboard.type(query[-1])  # each letter that is typed is a search
    found = """Array.from(document.querySelectorAll(".md-search-result__link")).slice(0, 2)
        .map(link => new URL(link.href)).map(url => (url.pathname + url.hash).slice(1))"""
    for _ in range(100):
        if page.evaluate(found) == expected:
            break
        page.wait_for_timeout(100)
    return page.evaluate(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", tutorials.NAMES)
def test_a_tutorial_prints_what_its_page_shows(name: str, tmp_path: Path) -> None:
    """If it should print something else: `python -m docs.hooks.tutorials`."""
    assert tutorials.differences(tutorials.run(name, tmp_path), tutorials.outputs(name)) == []


def test_a_tutorial_that_prints_something_else_is_noticed() -> None:
    shown = ["FVU 0.14, L0 4.0 of 96\n", ""]
    assert tutorials.differences(["FVU 0.15, L0 4.1 of 96\n", ""], shown) == []
    assert tutorials.differences(["FVU 0.24, L0 4.0 of 96\n", ""], shown) != []
    assert tutorials.differences(["FVU 0.14, L0 4.0 of 96\n", "more"], shown) != []
    assert tutorials.differences(["FVU 0.14, dead 4.0 of 96\n", ""], shown) != []
    assert tutorials.differences(["FVU 0.14, L0 4.0 of 96\n"], shown) != []


def test_every_tutorial_is_shown() -> None:
    assert {path.stem for path in (DOCS / "tutorials").glob("*.py")} == set(tutorials.NAMES)


@pytest.mark.parametrize(
    ("link", "source", "led"),
    [
        ("[a](docs/training.md#pick-k)", "README.md", "[a](training.md#pick-k)"),
        ("[a](../CONTRIBUTING.md)", "docs/faq.md", "[a](contributing.md)"),
        ("[a](../method.md)", "docs/tutorials/compare.py", "[a](../method.md)"),
        ("[a](tutorials/compare.py)", "docs/faq.md", "[a](tutorials/compare.md)"),
        ("[a](../benchmarks/results/x.md)", "docs/faq.md", "a"),
        ("![a](docs/demo.png)", "README.md", "![a](demo.png)"),
        ("[a](https://example.org)", "README.md", "[a](https://example.org)"),
    ],
)
def test_links_of_the_repository_lead_on_the_site(link: str, source: str, led: str) -> None:
    assert links.for_site(link, source) == led
