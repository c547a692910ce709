"""The report as Markdown, for a terminal and for pull requests, from the report's view. No files."""

import re
from typing import Any

from hafs_evaluate.latents.token_text import visible

LATENTS, CONTEXTS = 6, 3  # shown a variant; the page has all of them
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$!])")


def markdown(view: dict[str, Any], drawn: dict[str, str]) -> str:
    """report.md: the summary, the tables, the figures and some top contexts. `drawn` is {figure: its relative path}."""
    parts = [f"# {escape(view['title'])}", escape(view["what_ran"])]
    if view["measured_on"]:
        parts.append(f"Measured on {escape(view['measured_on'])}; written by `{view['command']}`.")
    parts += [f"**{finding.word}:** {escape(finding.text)}" for finding in view["verdict"]]
    if view["unfinished"]:
        parts.append(f"Not in this report, since training has not finished: {escape(', '.join(view['unfinished']))}.")
    parts += _arms(view)
    parts += _figure(drawn, "overview", "FVU and coherence over training, probing accuracy over k")
    parts += _comparisons(view)
    if "frontiers" in drawn:
        parts.append("## Frontiers")
        parts += _figure(drawn, "frontiers", "FVU against absorption and against L0, a point an arm")
    if len(view["groups"]) > 1:
        parts.append(
            f"The figures and tables below are of {escape(view['main']['title'])}. index.html has those of all groups."
        )
    parts.append("## Training")
    parts += _figure(drawn, "training", "metrics over training tokens") or ["No metrics were logged."]
    parts.append("## Sparse probing")
    parts += _figure(drawn, "probing", "probing accuracy over k") or ["Sparse probing was not evaluated."]
    tasks = view["main"]["task_table"] if view["main"] else {"rows": []}
    if tasks["rows"]:
        parts.append("Top-1 test accuracy:")
        parts.append(table(["task", *tasks["names"]], [[row["task"], *row["cells"]] for row in tasks["rows"]]))
    parts += _trees(view)
    parts += _tokens(view)
    parts += _domains(view)
    parts += _first_letter(view)
    parts.append("## Dictionary")
    parts += _figure(drawn, "dictionary", "histograms of latent density and nearest cosine") or [
        "Densities and nearest vectors were not evaluated."
    ]
    parts.append("## Latents")
    if view["latents"]:
        parts.append(
            "These are a few of those in index.html. The peak token is bold; the number is the activation on it."
        )
    else:
        parts.append("Single latents were not evaluated.")
    for name, found in view["latents"].items():
        parts += _latents(name, found["latents"])
    parts.append("## Provenance")
    header = ["what", "from", "licence", "documents", "training rows"]
    rows = [[row["what"], row["origin"], row["licence"], row["documents"], row["rows"]] for row in view["sources"]]
    parts += [table(header, rows), escape(view["store_note"])]
    if view["by_source"]:
        rows = [[row["name"], *row["cells"]] for row in view["by_source"]["rows"]]
        parts += ["FVU by source:", table(["arm", *view["by_source"]["sources"]], rows)]
    parts.append(table(["stage", "seconds"], [list(row) for row in view["seconds"]]))
    parts.append("\n".join(f"- {escape(name)}: {escape(meaning)}" for name, meaning in view["definitions"].items()))
    parts.append(escape(view["versions"]))
    return "\n\n".join(parts) + "\n"


def _arms(view: dict[str, Any]) -> list[str]:
    if not view["rows"]:
        return ["## Arms", "No run has finished training."]
    seeds = ["seeds"] if view["many_seeds"] else []
    header = ["arm", *seeds] + [_with_arrow(column) for column in view["columns"]]
    rows = []
    for row in view["rows"]:
        own = ["" if row["seeds"] is None else str(row["seeds"])] if seeds else []
        rows.append([row["name"], *own] + [_cell(cell) for cell in row["cells"]])
    note = "In brackets is the difference from the baseline of the same architecture and k"
    if view["has_intervals"]:
        note += ", or, with ±, half of the 95% confidence interval of the mean over seeds"
    return ["## Arms", table(header, rows), f"{note}."]


def _comparisons(view: dict[str, Any]) -> list[str]:
    """The falsifiers, and the experiment's differences: a table for each architecture and k."""
    if not view["comparisons"] and not view["falsifiers"]:
        return []
    parts = ["## Comparisons"]
    if view["falsifiers"]:
        lines = [
            f"- **{one['mark']} {escape(one['outcome'])}** {escape(one['name'])}: {escape(one['claim'])} "
            f"{escape(one['why'])}".rstrip()
            for one in view["falsifiers"]
        ]
        parts.append("\n".join(lines))
    parts += [escape(sentence) for sentence in view["experiment_notes"]]
    for block in view["comparisons"]:
        rows = [
            [measure["name"], row["pair"], row["text"], row["interval"], row["p"], f"{row['mark']} {row['verdict']}"]
            for measure in block["measures"]
            for row in measure["rows"]
        ]
        header = ["measure", "arms", "difference", "95% CI", "p (Holm)", "verdict"]
        parts += [f"### {escape(block['title'])}", table(header, rows)]
    return parts


def _trees(view: dict[str, Any]) -> list[str]:
    parts = ["## Hierarchy"]
    if not view["tree_tables"]:
        return [*parts, "Hierarchical probing was not evaluated."]
    for one in view["tree_tables"]:
        latents = "1 latent" if one["k"] == 1 else f"{one['k']} latents"
        parts.append(f"{escape(one['tree'])}: balanced accuracy of {latents}, each class against all other texts.")
        parts.append(table(one["header"], one["rows"]))
    return parts + [escape(sentence) for sentence in view["tree_notes"]]


def _tokens(view: dict[str, Any]) -> list[str]:
    """Transfer to unseen tokens, of all arms."""
    found = view["tokens"]
    if not found:
        return []
    parts = [
        "## Tokens",
        "Properties that a token's id decides: balanced accuracy of latents on words that they were not chosen on.",
        table(["arm", *found["header"]], [[row["name"], *row["cells"]] for row in found["rows"]]),
    ]
    return [*parts, escape(found["note"])] if found["note"] else parts


def _domains(view: dict[str, Any]) -> list[str]:
    """How well latents detect each source of text: the arms of the group that the page opens with."""
    if not view["has_domains"]:
        return []
    parts = [
        "## Domains",
        "How well latents tell one source of text from the others. The best latents are the first seed's, by F1.",
    ]
    for one in view["main"]["domains"] if view["main"] else []:
        rows = [
            [row["name"], *row["cells"], ", ".join(f"#{latent['index']} {latent['f1']}" for latent in row["latents"])]
            for row in one["rows"]
        ]
        parts += [f"### {escape(one['source'])}", escape(one["note"])]
        parts.append(table(["arm", *one["header"], "best latents"], rows))
    return parts


def _first_letter(view: dict[str, Any]) -> list[str]:
    found = view["first_letter"]
    if not found:
        return []
    rows = [[row["name"], *row["cells"], row["validity"]] for row in found["rows"]]
    return ["## First-letter absorption", table(["arm", *found["header"], "validity"], rows)]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with every cell escaped: the first column is aligned left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    shown = [cells if index == 1 else [escape(cell) for cell in cells] for index, cells in enumerate(lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in shown)


def escape(text: str) -> str:
    """`text` as Markdown that shows it literally, on one line."""
    text = _SPECIAL.sub(r"\\\1", visible(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: Any) -> str:
    """`text` as a code span, in which Markdown shows everything but backticks literally; these become apostrophes."""
    return f"`{visible(str(text)).replace('`', chr(39))}`"


def context_line(context: dict[str, Any]) -> str:
    """One context with its peak token in bold. The spaces of that token stay outside of the asterisks."""
    tokens, peak = context["tokens"], context["peak"]
    token = tokens[peak]
    bare = token.strip()
    before, after = "".join(tokens[:peak]), "".join(tokens[peak + 1 :])
    if not bare:
        return escape(before) + f"**`{escape(token) or ' '}`**" + escape(after)
    start = token.index(bare)
    return escape(before + token[:start]) + f"**{escape(bare)}**" + escape(token[start + len(bare) :] + after)


def _latents(name: str, latents: list[dict[str, Any]]) -> list[str]:
    parts = [f"### {escape(name)}"]
    by_density = sorted(latents, key=lambda latent: (-latent["density"], latent["index"]))
    step = max(1, len(by_density) // LATENTS)
    for latent in by_density[step // 2 :: step][:LATENTS]:
        promoted = ", ".join(escape(token.strip() or token) for token in latent["promoted"][:6])
        parts.append(
            f"**\\#{latent['index']}**, active on {100 * latent['density']:.2g}% of tokens, nearest "
            f"\\#{latent['nearest']['index']} (cosine {latent['nearest']['cosine']:.2f})"
            + (f"; promotes {promoted}" if promoted else "")
        )
        shown = latent["contexts"][:CONTEXTS]
        lines = [f"- {context['values'][context['peak']]:.3g}: {context_line(context)}" for context in shown]
        parts.append("\n".join(lines) if lines else "No context.")
    return parts


def _with_arrow(column: dict[str, Any]) -> str:
    return column["label"] + {"lower": " ↓", "higher": " ↑", "": ""}[column["better"]]


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['text']} ({cell['change']})" if cell["change"] else cell["text"]


def _figure(drawn: dict[str, str], name: str, caption: str) -> list[str]:
    return [f"![{caption}]({drawn[name]})"] if name in drawn else []
