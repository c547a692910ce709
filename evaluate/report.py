"""The report: results.json, report.md with PNG figures, and index.html, one page that loads nothing. No torch, no jax.

Everything comes from the files that the stages left in the workspace; what is missing is said to be "not evaluated".
Equal workspaces give equal bytes, under equal versions of the libraries.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluate import figures, panels
from evaluate.markdown import markdown
from evaluate.provenance import configs, sources, store_note, versions
from evaluate.results import build_results, mean_probing, training_lines
from evaluate.verdict import DEFINITIONS, verdict, what_ran
from extract.format.files import read_json, write_json, write_text
from extract.format.store import Manifest, read_manifest

TEMPLATES = Path(__file__).parent / "report_template"
NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Column:
    """A column of the variants' table."""

    name: str
    key: str  # of the variant's values, or "top_<k>" of the probing means
    digits: int
    meaning: str
    better: str = ""  # "lower", "higher", or neither


COLUMNS = (
    Column("FVU", "fvu", 3, DEFINITIONS["FVU"], "lower"),
    Column("L0", "l0", 1, DEFINITIONS["L0"]),
    Column("dead", "dead_fraction", 3, DEFINITIONS["dead"], "lower"),
    Column("CE score", "ce_score", 3, DEFINITIONS["CE score"], "higher"),
    Column("KL score", "kl_score", 3, DEFINITIONS["KL score"], "higher"),
    Column("mean coherence", "mean_coherence", 3, DEFINITIONS["mean coherence"], "lower"),
    Column("max coherence", "max_coherence", 3, DEFINITIONS["max coherence"], "lower"),
    Column("top-1 probing", "top_1", 3, DEFINITIONS["top-k probing"], "higher"),
    Column("top-5 probing", "top_5", 3, DEFINITIONS["top-k probing"], "higher"),
)
TAU = {"name": "tau", "meaning": DEFINITIONS["tau"], "better": ""}


def write_report(workspace_folder: Path) -> None:
    """Writes report/results.json, report/report.md with report/figures/*.png, and report/index.html."""
    folder = Path(workspace_folder)
    report = folder / "report"
    results = build_results(folder)
    manifest = read_manifest(folder / "store" / "train")
    view = _view(folder, results, manifest)
    write_json(report / "results.json", results)
    styles = view["styles"]
    drawn = {}
    for name, (shown, columns) in _pngs(view).items():
        figures.write_png(report / "figures" / f"{name}.png", shown, styles, columns)
        drawn[name] = f"figures/{name}.png"
    write_text(report / "report.md", markdown(view, drawn))
    write_text(report / "index.html", _html(view))


def _view(folder: Path, results: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Everything that the page and the Markdown show, as plain values and panels."""
    names = list(results["variants"])
    runs = {name: values["run"] for name, values in results["variants"].items()}
    lines = {name: training_lines(folder / "runs" / run) for name, run in runs.items()}
    latents = {}
    for name, run in runs.items():
        path = folder / "eval" / run / "latents.json"
        if path.exists():
            latents[name] = read_json(path, "an SAE's latents")
    mean_panel, task_panels = panels.probing_panels(results)
    tasks, means = mean_probing(results)
    return {
        "title": f"{_short_name(results['model'])}, {results['hook']}",
        "what_ran": what_ran(results, [vars(source) for source in manifest.sources]),
        "verdict": verdict(results),
        "unfinished": results["unfinished_runs"],
        "names": names,
        "styles": figures.styles_of(names),
        "columns": [*(vars(column) for column in COLUMNS[:-2]), TAU, *(vars(column) for column in COLUMNS[-2:])],
        "rows": _variant_rows(results, means),
        "n_tasks": len(tasks),
        "training": panels.training_panels(lines, results),
        "probing_mean": mean_panel,
        "probing_tasks": task_panels,
        "probing_names": [name for name in names if name in means],
        "task_table": _task_table(results, tasks),
        "latents": latents,
        "latent_names": list(latents),
        "dictionary": panels.latent_panels(latents),
        "definitions": DEFINITIONS,
        "sources": sources(manifest),
        "store_note": store_note(manifest),
        "by_source": _by_source(results),
        "seconds": [(stage, f"{taken:,.1f}") for stage, taken in results["seconds"].items() if taken is not None],
        "versions": versions(),
        "configs": configs(folder, runs, manifest),
    }


def _variant_rows(results: dict[str, Any], means: dict[str | None, dict[str, float]]) -> list[dict[str, Any]]:
    figures_of = {
        name: {column.key: values.get(column.key, means.get(name, {}).get(column.key)) for column in COLUMNS}
        for name, values in results["variants"].items()
    }
    baselines = {
        (values["architecture"], values["seed"]): name
        for name, values in results["variants"].items()
        if values["variant"] == "baseline"
    }
    rows = []
    for name, values in results["variants"].items():
        baseline = baselines.get((values["architecture"], values["seed"]))
        cells = []
        for column in COLUMNS:
            own = figures_of[name][column.key]
            other = figures_of[baseline][column.key] if baseline not in (None, name) else None
            change = "" if own is None or other is None else _signed(own - other, column.digits)
            text = NOT_EVALUATED if own is None else f"{own:.{column.digits}f}"
            cells.append({"text": text, "change": change, "missing": own is None})
        cells.insert(-2, {"text": _tau(values), "change": "", "missing": values["tau_reached"] is None})
        rows.append({"name": name, "key": name, "cells": cells})
    llm = means.get(None, {})
    empty = [{"text": "", "change": "", "missing": False}] * (len(COLUMNS) - 1)
    if "top_1" in llm:
        shown = [f"{llm[key]:.3f}" if key in llm else "" for key in ("top_1", "top_5")]
        cells = empty + [{"text": text, "change": "", "missing": False} for text in shown]
        rows.append({"name": "LM, top-k activations", "key": "llm-top-k", "cells": cells})
    if "full" in llm:
        cells = empty + [{"text": f"{llm['full']:.3f}", "change": "", "missing": False}] * 2
        rows.append({"name": "LM, full probe", "key": "llm-full", "cells": cells})
    return rows


def _signed(change: float, digits: int) -> str:
    text = f"{change:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{digits}f}"


def _tau(values: dict[str, Any]) -> str:
    if values["tau_reached"] is None or values["tau"] is None:
        return "no gate"
    return f"{values['tau']:.3f} {'reached' if values['tau_reached'] else 'never reached'}"


def _task_table(results: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    llm = results["llm"]["probing"]
    probed = {name: values["probing"] for name, values in results["variants"].items() if values["probing"]}
    columns = [(name, by_task, "top_1") for name, by_task in probed.items()]
    if llm:
        columns += [("LM top-1", llm, "top_1"), ("LM full", llm, "full")]
    rows = []
    for task in tasks:
        values = [by_task.get(task, {}).get(column) for _, by_task, column in columns]
        rows.append({"task": task, "cells": [NOT_EVALUATED if value is None else f"{value:.3f}" for value in values]})
    return {"names": [name for name, _, _ in columns], "rows": rows}


def _by_source(results: dict[str, Any]) -> dict[str, Any] | None:
    found = {name: values["core"].get("by_source") or {} for name, values in results["variants"].items()}
    sources = sorted({source for by_source in found.values() for source in by_source})
    if not sources:
        return None
    rows = []
    for name, by_source in found.items():
        values = [by_source.get(source, {}).get("fvu") for source in sources]
        rows.append({"name": name, "cells": [NOT_EVALUATED if value is None else f"{value:.3f}" for value in values]})
    return {"sources": sources, "rows": rows}


def _pngs(view: dict[str, Any]) -> dict[str, tuple[list[figures.Panel], int]]:
    """The figures beside report.md: {name: (panels, columns)}."""
    by_key = {panel.key: panel for panel in view["training"]}
    overview = [by_key[key] for key in ("fvu_ema", "coherence_mean") if key in by_key] + view["probing_mean"]
    shown = {
        "overview": (overview, 3),
        "training": (view["training"], 3),
        "probing": (view["probing_mean"] + view["probing_tasks"], 3),
        "dictionary": (view["dictionary"], 2),
    }
    return {name: (some, min(columns, len(some))) for name, (some, columns) in shown.items() if some}


def _html(view: dict[str, Any]) -> str:
    styles = view["styles"]
    hovers: dict[str, Any] = {}

    def drawn(some: list[figures.Panel]) -> list[dict[str, Any]]:
        shown = []
        for panel in some:
            text, hovers[panel.key] = figures.svg(panel, styles)
            shown.append({**vars(panel), "svg": Markup(text)})
        return shown

    values = dict(view)
    for key in ("training", "probing_mean", "probing_tasks", "dictionary"):
        values[key] = drawn(view[key])
    data = {"figures": hovers, "latents": {name: found["latents"] for name, found in view["latents"].items()}}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    return environment.get_template("page.html").render(
        **values,
        css_name=figures.css_name,
        style_variables=Markup(_style_variables(styles)),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        data=Markup(script_json(data)),
    )


def _style_variables(styles: dict[str, figures.Style]) -> str:
    def block(light: bool) -> str:
        return "".join(
            f"{figures.css_name(key)}:{style.colour if light else style.dark};" for key, style in styles.items()
        )

    return f":root{{{block(True)}}}\n@media (prefers-color-scheme:dark){{:root{{{block(False)}}}}}"


def script_json(value: Any) -> str:
    """`value` as JSON that is safe inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _short_name(model: str) -> str:
    return model.split("/")[-1]
