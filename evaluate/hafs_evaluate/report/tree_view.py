"""The label trees with each arm's scores, for the page's coloured tree and for Markdown. No files, no markup."""

from typing import Any

from hafs_evaluate.hierarchy.tree_means import complements, left_out, only_children
from hafs_evaluate.results.arms import estimate
from hafs_evaluate.results.probing_means import is_probe, top_k

METRICS = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
CONTRASTS = {"rest": "against all other texts", "siblings": "given the parent, against siblings"}
NODE_MEASURES = {
    "hole": "worst-child hole",
    "absorption_fraction": "absorption (fraction)",
    "absorption_full": "absorption (full)",
}
LLM_COLUMNS = {"LM full probe": ("full", "llm-full"), "LM top-k": ("top_", "llm-top-k"), "LM PCA": ("pca_", "llm-pca")}
SCALE = 1000  # the page's numbers are thousandths

Score = tuple[float, float | None]  # a value, and its uncertainty: half an interval over seeds, or the SE over folds


def tree_data(results: dict[str, Any]) -> dict[str, Any] | None:
    """Everything that the page's tree needs; None where no run has hierarchical probing.

    {"trees": {tree: [node]}, "ks": [...], "columns": [{"name", "key", "arm"}], "values": {tree: {column: {measure: a
    list with an entry for each node}}}, "over": {arm: "seeds" or "folds"}}. An entry is None, a value in thousandths,
    or [value, uncertainty] in thousandths; `over` says whether the uncertainty is over seeds or over folds. A measure
    is "<contrast>/<k>/<metric>" or one of NODE_MEASURES.
    """
    runs = {name: values["hierarchy"] for name, values in results["variants"].items() if values.get("hierarchy")}
    llm = results["llm"].get("hierarchy") or {}
    if not runs:
        return None
    arms = {
        name: [runs[run] for run in arm["runs"] if run in runs]
        for name, arm in results["arms"].items()
        if any(run in runs for run in arm["runs"])
    }
    trees = _trees([*runs.values(), llm])
    ks = sorted({k for one in runs.values() for k in _ks(one)})
    columns = [{"name": name, "key": name, "arm": True} for name in arms]
    values: dict[str, dict[str, Any]] = {}
    for tree, nodes in trees.items():
        paths = [node["path"] for node in nodes]
        values[tree] = {name: _column(seeds, tree, paths, ks, "top_") for name, seeds in arms.items()}
        for name, (prefix, _) in LLM_COLUMNS.items():
            found = _column([llm], tree, paths, ks, prefix) if llm else {}
            if found:
                values[tree][name] = found
    for name, (_, key) in LLM_COLUMNS.items():
        if any(name in by_column for by_column in values.values()):
            columns.append({"name": name, "key": key, "arm": False})
    over = {name: "seeds" if len(seeds) > 2 else "folds" for name, seeds in arms.items()}
    return {"trees": trees, "ks": ks, "columns": columns, "values": values, "over": over}


def tree_notes(results: dict[str, Any]) -> list[str]:
    """Sentences that say of each tree which of its texts and classes were left out, and which trees were, and why."""
    trees: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for values in results["variants"].values():
        found = values.get("hierarchy") or {}
        trees = (found.get("trees") or {}) | trees
        skipped |= found.get("skipped") or {}
    notes = []
    for name, tree in trees.items():
        reasons = {"in_training": "in the training documents", "ambiguous": "in two classes at once"}
        parts = [f"{tree[key]:,} texts {why}" for key, why in reasons.items() if tree.get(key)]
        if tree.get("dropped"):
            parts.append(f"classes with too few texts: {', '.join(path or 'background' for path in tree['dropped'])}")
        if parts:
            notes.append(f"Left out of {name}: {'; '.join(parts)}.")
        if same := same_figures(tree["nodes"], tree.get("texts")):
            notes.append(f"Means of {name}{_left_out(tree)}: {' '.join(same)}")
    if skipped:
        notes.append(f"Trees left out: {'; '.join(f'{tree} ({why})' for tree, why in skipped.items())}.")
    return notes


def same_figures(nodes: dict[str, dict[str, Any]], texts: int | None) -> list[str]:
    """Sentences that name the classes of a tree that repeat another's figures, and what is left out of means for it."""
    found = [
        f"{_label(nodes, parent)} has {_label(nodes, child)} as its only child, of the same texts, and is left out."
        for parent, child in only_children(nodes).items()
    ]
    for path, first in complements(nodes, texts).items():
        where = "" if nodes[path].get("parent") is None else f" in {_label(nodes, nodes[path]['parent'])}"
        found.append(
            f"{_label(nodes, first)} and {_label(nodes, path)} are complements{where}, so their probes are equal and"
            f" count once."
        )
    return found


def _left_out(tree: dict[str, Any]) -> str:
    """How many of a tree's parents its means over parents are without."""
    parents = {node.get("parent") for node in tree["nodes"].values()} - {None}
    out = left_out(tree["nodes"], tree.get("texts"))
    return f" leave out {len(out)} of {len(parents)} parents" if out else ""


def _label(nodes: dict[str, dict[str, Any]], path: str) -> str:
    return nodes[path].get("label") or path.split("/")[-1]


def tree_tables(results: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Tables for Markdown, [{tree, header, rows}]: the probe with the smallest k of each class against all other texts,
    for the arms `names`, and the language model's full probe."""
    data = tree_data(results)
    if data is None:
        return []
    tables = []
    for tree, nodes in data["trees"].items():
        by_column = data["values"][tree]
        shown = [column["name"] for column in data["columns"] if column["name"] in by_column]
        shown = [name for name in shown if name in names or name == "LM full probe"]
        k = data["ks"][0]
        rows = []
        for place, node in enumerate(nodes):
            cells = [
                _text(by_column[name].get(f"rest/{k}/balanced_accuracy", [None] * len(nodes))[place]) for name in shown
            ]
            rows.append(["\u2003" * (node["level"] - 1) + node["label"], f"{node['texts']:,}", *cells])
        tables.append({"tree": tree, "k": k, "header": ["class", "texts", *shown], "rows": rows})
    return tables


def _trees(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{tree: its nodes, parents before their children and children in a block}."""
    trees: dict[str, dict[str, dict[str, Any]]] = {}
    for one in found:
        for tree, values in (one.get("trees") or {}).items():
            for path, node in values["nodes"].items():
                trees.setdefault(tree, {}).setdefault(path, node)
    return {
        tree: [
            {
                "path": path,
                "label": nodes[path].get("label") or path.split("/")[-1],
                "level": nodes[path].get("level") or path.count("/") + 1,
                "parent": nodes[path].get("parent"),
                "texts": nodes[path].get("texts") or 0,
            }
            for path in sorted(nodes, key=lambda path: path.split("/"))
        ]
        for tree, nodes in sorted(trees.items())
    }


def _ks(hierarchy: dict[str, Any]) -> set[int]:
    return {
        top_k(column)
        for values in (hierarchy.get("trees") or {}).values()
        for node in values["nodes"].values()
        for scores in (node.get("contrasts") or {}).values()
        for column in scores or {}
        if column.startswith("top_") and is_probe(column)
    }


def _column(seeds: list[dict[str, Any]], tree: str, paths: list[str], ks: list[int], prefix: str) -> dict[str, Any]:
    """{measure: a value for each node} of one arm's seeds; measures without any value are left out."""
    nodes = [one["trees"][tree]["nodes"] for one in seeds if tree in (one.get("trees") or {})]
    measures: dict[str, list[Any]] = {}
    for contrast in CONTRASTS:
        for k in ks:
            column = prefix if prefix == "full" else f"{prefix}{k}"
            for metric in METRICS:
                measures[f"{contrast}/{k}/{metric}"] = [
                    _packed([_score(one.get(path), contrast, column, metric) for one in nodes]) for path in paths
                ]
    for measure in NODE_MEASURES:
        measures[measure] = [_packed([_of_node(one.get(path), measure) for one in nodes]) for path in paths]
    return {key: values for key, values in measures.items() if any(value is not None for value in values)}


def _score(node: dict[str, Any] | None, contrast: str, column: str, metric: str) -> Score | None:
    scores = ((node or {}).get("contrasts") or {}).get(contrast) or {}
    found = scores.get(column) or {}
    return None if found.get(metric) is None else (found[metric], found.get(f"{metric}_se"))


def _of_node(node: dict[str, Any] | None, measure: str) -> Score | None:
    node = node or {}
    if measure == "hole":
        value = node.get("hole")
    else:
        value = (node.get("absorption") or {}).get(measure.removeprefix("absorption_"))
    return None if value is None else (value, None)


def _packed(scores: list[Score | None]) -> Any:
    known = [score for score in scores if score is not None]
    if not known:
        return None
    mean = estimate([value for value, _ in known])
    spread = known[0][1] if len(known) == 1 else None
    if mean.low is not None and mean.high is not None:
        spread = (mean.high - mean.low) / 2
    value = round(SCALE * mean.mean)
    return value if spread is None else [value, round(SCALE * spread)]


def _text(packed: Any) -> str:
    if packed is None:
        return ""
    value, spread = packed if isinstance(packed, list) else (packed, None)
    return f"{value / SCALE:.3f}" + ("" if spread is None else f" ± {spread / SCALE:.3f}")
