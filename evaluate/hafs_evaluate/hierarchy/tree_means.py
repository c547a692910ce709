"""Means over the classes of label trees, each figure once: classes that repeat another's figures are left out.

A tree's nodes are here as hierarchy.json has them: {path: {"parent", "texts", "contrasts", ...}}. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Nodes = Mapping[str, Mapping[str, Any]]


def only_children(nodes: Nodes) -> dict[str, str]:
    """{class: its only child} of the classes that have a single child of as many texts: they are that child."""
    return {
        parent: own[0]
        for parent, own in _children(nodes).items()
        if parent is not None and len(own) == 1 and nodes[parent].get("texts") == nodes[own[0]].get("texts", 0)
    }


def complements(nodes: Nodes, texts: int | None) -> dict[str, str]:
    """{class: its sibling} where two siblings share out all texts of their parent, or the tree's `texts`.

    To tell the one from the other's texts is to tell the other: the two have the same probe. The first of them counts;
    that is the one that is not its only child, and of two such ones the first by path.
    """
    single, found = only_children(nodes), {}
    for parent, own in _children(nodes).items():
        whole = texts if parent is None else nodes[parent].get("texts")
        if len(own) == 2 and sum(nodes[path].get("texts") or 0 for path in own) == whole:
            first, second = sorted(own, key=lambda path: (path in single, path))
            found[second] = first
    return found


def counted(nodes: Nodes, texts: int | None) -> dict[str, dict[str, Any]]:
    """The nodes without the figures that a mean would count twice; `texts` is the tree's number of texts.

    A class with an only child loses all its figures. The second of two complements loses its probes: against the rest
    of the tree on the first level, and against its siblings below it. Its absorption and hole stay, since they are
    about its own latents.
    """
    single, second = only_children(nodes), complements(nodes, texts)
    found = {}
    for path, node in nodes.items():
        contrasts = dict(node.get("contrasts") or {})
        if path in second:
            contrasts["rest" if node.get("parent") is None else "siblings"] = None
        if path in single:
            found[path] = {**node, "contrasts": dict.fromkeys(contrasts), "absorption": None, "hole": None}
        else:
            found[path] = {**node, "contrasts": contrasts}
    return found


def left_out(nodes: Nodes, texts: int | None) -> list[str]:
    """The parents that are left out of means over parents of probes against the rest of the tree, by path."""
    above = {path: node.get("parent") for path, node in nodes.items()}
    parents = set(above.values()) - {None}
    twice = only_children(nodes).keys() | {path for path in complements(nodes, texts) if above[path] is None}
    return sorted(path for path in twice if path in parents)


def macro(nodes: Nodes, texts: int | None) -> dict[str, Any]:
    """Means over the `counted` nodes of a tree's result, each with the same weight; None where none has the figure.

    - level_1, level_2, ...: scores of each probe against the rest of the tree, over the nodes of that level;
    - siblings_2, ...: scores of each probe against the siblings, given the parent, over the nodes of that level;
    - parents_top_1: balanced accuracy of top_1 against the rest, over the nodes that have children;
    - hole, absorption_fraction, absorption_full: over the nodes that have them.
    """
    nodes = counted(nodes, texts)
    values: dict[str, Any] = {}
    for kind, prefix in (("rest", "level"), ("siblings", "siblings")):
        for level in sorted({_level(path) for path in nodes}):
            of_level = [node["contrasts"].get(kind) for path, node in nodes.items() if _level(path) == level]
            if known := [scores for scores in of_level if scores]:
                values[f"{prefix}_{level}"] = {
                    probe: {
                        name: _mean([scores.get(probe, {}).get(name) for scores in known])
                        for name in ("balanced_accuracy", "auroc")
                    }
                    for probe in known[0]
                }
    parents = sorted({parent for node in nodes.values() if (parent := node.get("parent")) is not None})
    top_1 = [(nodes[parent]["contrasts"].get("rest") or {}).get("top_1") for parent in parents]
    values["parents_top_1"] = _mean([scores.get("balanced_accuracy") for scores in top_1 if scores])
    values["hole"] = _mean([node.get("hole") for node in nodes.values()])
    for name in ("fraction", "full"):
        values[f"absorption_{name}"] = _mean([(node.get("absorption") or {}).get(name) for node in nodes.values()])
    return values


def with_means(values: Mapping[str, Any]) -> dict[str, Any]:
    """A hierarchy.json with its means: each tree's `macro` and `left_out`, and the trees' mean `macro`.

    Means come from the nodes, so that results that were written with other means need not be measured again.
    """
    trees = {
        name: {
            **tree,
            "left_out": left_out(tree["nodes"], tree.get("texts")),
            "macro": macro(tree["nodes"], tree.get("texts")),
        }
        for name, tree in (values.get("trees") or {}).items()
    }
    return {**values, "trees": trees, "macro": mean_over_trees([tree["macro"] for tree in trees.values()])}


def mean_over_trees(macros: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The trees' `macro`s, averaged key by key over the trees that have the figure."""
    keys = dict.fromkeys(key for values in macros for key in values)
    found: dict[str, Any] = {}
    for key in keys:
        known = [values[key] for values in macros if values.get(key) is not None]
        found[key] = mean_over_trees(known) if known and isinstance(known[0], dict) else _mean(known)
    return found


def _children(nodes: Nodes) -> dict[str | None, list[str]]:
    """{class: its children}; None has the first level."""
    children: dict[str | None, list[str]] = {}
    for path, node in nodes.items():
        children.setdefault(node.get("parent"), []).append(path)
    return children


def _level(path: str) -> int:
    return path.count("/") + 1


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
