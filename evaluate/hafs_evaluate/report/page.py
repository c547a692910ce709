"""index.html from the report's view: figures are inline SVG, data is JSON that the page parses when it needs it.

It reads no files but its own templates.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hafs_evaluate.report.figures import draw
from hafs_evaluate.report.figures.shapes import Panel
from hafs_evaluate.report.figures.styles import LLM_LABELS, SYMBOLS, css_name, style_variables
from hafs_evaluate.report.tree_view import CONTRASTS, METRICS, NODE_MEASURES

TEMPLATES = Path(__file__).parent / "template"
SCRIPTS = (
    "base.js", "tables.js", "figures.js", "tree.js", "latents.js", "detail.js", "compare.js", "explorer.js", "keys.js",
    "print.js",
)  # fmt: skip
DRAWN = ("training", "probing_mean", "probing_tasks", "dictionary")


def page(view: dict[str, Any]) -> str:
    """The whole page, as one text."""
    styles = view["styles"]
    hovers: dict[str, Any] = {}

    def drawn(some: list[Panel]) -> list[dict[str, Any]]:
        shown = []
        for panel in some:
            text, hovers[panel.key] = draw.svg(panel, styles)
            shown.append({**vars(panel), "svg": Markup(text)})
        return shown

    values = dict(view)
    values["frontiers"] = drawn(view["frontiers"])
    values["groups"] = [{**group, **{key: drawn(group[key]) for key in DRAWN}} for group in view["groups"]]
    tree = view["tree"] and {
        **view["tree"],
        "groups": {group["key"]: group["names"] for group in view["groups"]},
        "colours": {column["name"]: css_name(column["key"]) for column in view["tree"]["columns"]},
        "metrics": METRICS,
        "contrasts": CONTRASTS,
        "node_measures": NODE_MEASURES,
    }
    return (
        _environment()
        .get_template("page.html")
        .render(
            **values,
            css_name=css_name,
            llm_labels=LLM_LABELS,
            symbols=SYMBOLS,
            style_variables=Markup(style_variables(styles)),
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            script=Markup("\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)),
            hovers=Markup(script_json(hovers)),
            tree_json=Markup(script_json(tree)),
            side_json=Markup(script_json(view["side"])),
            labels_json=Markup(script_json(view["labels"])),
            layer_json=Markup(script_json(view["layer"])),
            strings_json=Markup(script_json(view["strings"])),
            record_jsons=[Markup(script_json(record)) for record in view["records"]],
        )
    )


def script_json(value: Any) -> str:
    """`value` as JSON that is safe inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        auto_reload=False,
    )
