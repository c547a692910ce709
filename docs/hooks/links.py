"""Links between pages, as they stand in the repository and as they stand on the site."""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages of the repository that lie outside docs/, and what they are called on the site."""

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]\n]*(?:\n[^\]\n]+)?)\]\((?P<to>[^)\s]+)\)")


def on_site(path: str) -> str | None:
    """The place on the site of a file of the repository; None for one that is not on it."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    place = PurePosixPath(path)
    if place.parts[:1] != ("docs",) or not (ROOT / path).is_file():
        return None
    inner = place.relative_to("docs")
    if inner.parts[0] == "tutorials" and inner.suffix == ".py":
        return str(inner.with_suffix(".md"))
    return str(inner) if inner.suffix in (".md", ".png", ".svg") else None


def for_site(markdown: str, source: str) -> str:
    """The page `source` of the repository with its links led to pages of the site.

    A link to a file that is not on the site, such as a module, becomes its text.
    """
    here = on_site(source)
    assert here is not None, source

    def led(match: re.Match[str]) -> str:
        target, hash_, anchor = match["to"].partition("#")
        if not target or re.match(r"\w+:", target):
            return match[0]
        there = on_site(os.path.normpath(os.path.join(os.path.dirname(source), target)))
        if there is None:
            return match["text"]
        place = os.path.relpath(there, os.path.dirname(here) or ".")
        return f"{match['image']}[{match['text']}]({place}{hash_}{anchor})"

    return _LINK.sub(led, markdown)
