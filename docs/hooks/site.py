"""The hooks of mkdocs: pages from elsewhere in the repository, tutorials, generated tables, links (`make docs`)."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "extract"), str(ROOT / "evaluate")]

from docs.hooks import generated, links, tutorials  # noqa: E402

BOOSTS = {
    **dict.fromkeys(("faq.md",), 20.0),
    **dict.fromkeys(("quickstart.md", "training.md", "using.md", "interchange.md", "extending.md", "scaling.md"), 4.0),
    **dict.fromkeys(("results.md", "parity.md", "agreement.md", "sharing.md", "transfer.md", "benchmarks.md"), 0.1),
    **dict.fromkeys(("reference/measures.md", "reference/commands.md", "reference/python.md", "files.md"), 0.5),
}
"""What a page's hits of the search are multiplied by: who searches wants the guides before the laboratory's books."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for source, place in links.ELSEWHERE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for name in tutorials.NAMES:
        files.append(File.generated(config, f"tutorials/{name}.md", content=tutorials.page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    page.meta.setdefault("search", {"boost": BOOSTS.get(place, 1.0)})
    source = {site: path for path, site in links.ELSEWHERE.items()}.get(place, f"docs/{place}")
    if place.startswith("tutorials/"):
        source = source.removesuffix(".md") + ".py"
    return generated.filled(links.for_site(markdown, source))
