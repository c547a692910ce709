"""The README and docs: their code works as it stands there, links lead somewhere, and the README is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environments import importing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in _headings(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_readme_or_another_page() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert [page.name for page in DOCS.rglob("*.md") if page not in linked] == []


def test_the_readmes_python_prints_what_it_says(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (code, output) = re.findall(r"^```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)", text, flags=re.M | re.S)[0]
    assert 8 <= len(code.strip().splitlines()) <= 10
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout == "".join(f"{line.strip()}\n" for line in output.strip().splitlines()), done.stderr
    assert "LOOK" not in done.stderr


def _headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_all_that_it_adds_is_known_to_the_commands(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "extending.md").read_text(), flags=re.M | re.S)
    assert len(blocks) >= 4
    (tmp_path / "my_additions.py").write_text("\n".join(blocks))
    environment = importing(tmp_path, HAFS_PLUGINS="my_additions", COLUMNS="300")

    def help_of(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hafs_jax", *command, "--help"],
            env=environment, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = help_of("train", "--variant", "centred", "--arch", "swish")
    assert "swish" in train and "[centred]" in train
    assert "abstracts" in help_of("extract")
    evaluate = help_of("evaluate")
    assert "widest" in evaluate and "reviews: stars of a product review" in evaluate
