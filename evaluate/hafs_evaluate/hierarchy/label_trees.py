"""Label trees: data files that say which texts carry which label, and the labelled texts that they give.

A tree is a JSON file, one of those in the folder trees/ beside this module or a user's own:

    {"about": "...", "cap": 100, "seed": 0,
     "sources": {NAME: {"kind": "packaged", "name": "packaged/wikipedia-summaries", "text": FIELD, "group": FIELD}
                     | {"kind": "sae_probes"}
                     | {"kind": "jsonl", "path": FILE}},
     "leaves": [{"path": "people/arts/actor", "source": NAME, "where": {FIELD: REGEX, ...}, "cap": N},
                {"path": "films/positive", "source": NAME, "task": TASK, "label": 0 or 1}]}

A path names a text's labels from the root down, and its parts are nodes of the tree. The empty path is the background:
texts of no node, from which the nodes are told. `cap` is the most texts that a leaf keeps. Each kind of source gives
its leaves their texts in its own way:

- packaged: a record goes to the first leaf all of whose regular expressions match, anywhere in the field and in any
  case; `where: {}` takes every record that is left.
- sae_probes: a leaf takes the texts of a task that have the label.
- jsonl: the lines are {"text", "label": PATH, "group": optional} and need no leaves. FILE is relative to the tree's
  file.

A group is the document that a text comes from, or the text itself where the source names none. Cross-validation keeps
all texts of a group on one side.

Imports no torch.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafs_evaluate.results.shapes import ANY, TEXT, WHOLE, check_shape
from hafs_extract import packaged
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import jsonl_records, read_json, sha256_of
from hafs_jax.base.options import did_you_mean

FOLDER = Path(__file__).parent / "trees"
MIN_TEXTS = 20  # fewest texts of a leaf: in five folds these are four each, of which one is a quarter of the recall

_TREE_KEYS = {"about", "cap", "seed", "sources", "leaves"}
_SOURCE_KEYS = {
    "packaged": {"kind", "name", "text", "group"},
    "sae_probes": {"kind"},
    "jsonl": {"kind", "path"},
}
_SHAPE = {
    "about": TEXT, "cap": WHOLE, "seed": WHOLE,
    "sources": {str: {"kind!": TEXT, "name": TEXT, "text": TEXT, "group": TEXT, "path": TEXT}},
    "leaves": [{"path!": TEXT, "source!": TEXT, "where": {str: TEXT}, "cap": WHOLE, "task": TEXT, "label": ANY}],
}  # fmt: skip
_LEAF_KEYS = {"packaged": {"path", "source", "where", "cap"}, "sae_probes": {"path", "source", "task", "label", "cap"}}


@dataclass(frozen=True)
class LabelledText:
    """A text of a tree."""

    text: str
    path: str  # its labels, from the root down; empty: the background
    group: str  # the document that it comes from


@dataclass(frozen=True)
class Source:
    """Where a tree's texts come from."""

    kind: str  # packaged, sae_probes or jsonl
    name: str = ""  # packaged: of the packaged texts
    text: str = ""  # packaged: the field that holds the text
    group: str | None = None  # packaged: the field that names the document
    path: str = ""  # jsonl: the file


@dataclass(frozen=True)
class Leaf:
    """Which texts of a source have the labels of a path."""

    path: str
    source: str
    where: dict[str, str] = field(default_factory=dict)  # packaged: a regular expression for each field
    task: str = ""  # sae_probes
    label: int | None = None  # sae_probes: of the task's texts that are taken
    cap: int | None = None  # most texts; None: the tree's


@dataclass(frozen=True)
class Tree:
    """A tree's file, after its checks."""

    name: str
    file: Path
    about: str
    cap: int  # most texts of a leaf that has no cap of its own
    seed: int
    sources: dict[str, Source]
    leaves: tuple[Leaf, ...]

    def cap_of(self, path: str) -> int:
        """The most texts that the leaf `path` keeps."""
        return next((leaf.cap for leaf in self.leaves if leaf.path == path and leaf.cap is not None), self.cap)


@dataclass(frozen=True)
class LabelledTexts:
    """A tree's texts, of each leaf at most its cap, and what was left out on the way."""

    tree: str
    items: tuple[LabelledText, ...]
    in_training: int = 0  # texts left out since the SAEs were trained on them
    ambiguous: int = 0  # texts left out since the sources give them two different paths
    dropped: dict[str, int] = field(default_factory=dict)  # {leaf: its texts} of leaves left with too few

    @property
    def leaves(self) -> list[str]:
        """The paths that have texts, sorted; the background's is one of them."""
        return sorted({item.path for item in self.items})


def find_trees(names: Sequence[str] = ()) -> list[Tree]:
    """The trees called `names` (default: all bundled ones), each the name of a bundled tree or the path of a file."""
    bundled = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
    found = []
    for name in dict.fromkeys(names) or bundled:
        if name not in bundled and not name.endswith(".json"):
            near = did_you_mean(name, bundled)
            raise UserError(f"tree {name!r}: expected {', '.join(bundled)}, or the path of a .json file{near}")
        found.append(read_tree(bundled.get(name, Path(name))))
    stems = Counter(tree.name for tree in found)
    if twice := [name for name, count in stems.items() if count > 1]:
        raise UserError(f"trees: two are called {twice[0]!r}; rename one of the files")
    return found


def read_tree(path: Path) -> Tree:
    """The tree in the file `path`; `UserError` naming what is wrong in it."""
    values = read_json(path, "a label tree")
    check_shape(values, _SHAPE, str(path), "correct it")
    _check_keys(values, _TREE_KEYS, str(path))
    sources, leaves = values.get("sources") or {}, values.get("leaves") or []
    for name, source in sources.items():
        _check_source(name, source, path)
    for leaf in leaves:
        _check_leaf(leaf, sources, path)
    cap, seed = values.get("cap", 100), values.get("seed", 0)
    if not isinstance(cap, int) or cap < MIN_TEXTS:
        raise UserError(f"{path}: cap={cap!r}: expected at least {MIN_TEXTS} texts a leaf")
    return Tree(
        name=path.stem,
        file=path,
        about=values.get("about", ""),
        cap=cap,
        seed=seed,
        sources={name: Source(**source) for name, source in sources.items()},
        leaves=tuple(Leaf(**leaf) for leaf in leaves),
    )


def tree_sha256(tree: Tree) -> list[str]:
    """Hashes of the tree's file and of the jsonl files that it reads. Its texts change only where one of these does."""
    own = [tree.file.parent / source.path for source in tree.sources.values() if source.kind == "jsonl"]
    return [sha256_of(path) if path.exists() else "none" for path in (tree.file, *own)]


def labelled_texts(tree: Tree, training_sha256: Collection[str] = ()) -> LabelledTexts:
    """The tree's texts, without those whose SHA-256 is in `training_sha256`, as documents.jsonl has it.

    A text given several times counts once; one given two different paths is left out as ambiguous. Where a leaf has
    more texts than its cap, those with the smallest hash of seed and text are kept, so that the choice of a text does
    not depend on what else is in the leaf. Raises `UserError` for a leaf to which the sources give fewer than MIN_TEXTS
    texts. A leaf left with fewer than that outside `training_sha256` is dropped.
    """
    by_text: dict[str, LabelledText] = {}
    ambiguous: set[str] = set()
    for item in _items(tree):
        known = by_text.setdefault(item.text, item)
        if known.path != item.path:
            ambiguous.add(item.text)
    offered = Counter(item.path for text, item in by_text.items() if text not in ambiguous)
    for path in dict.fromkeys([*(leaf.path for leaf in tree.leaves), *offered]):
        if offered[path] < MIN_TEXTS:
            raise UserError(
                f"{tree.file}: leaf {path!r}: expected at least {MIN_TEXTS} texts, found {offered[path]};"
                " widen its rule or take the leaf out"
            )
    kept: dict[str, list[LabelledText]] = {path: [] for path in offered}
    in_training = 0
    for text, item in by_text.items():
        if text in ambiguous:
            continue
        if text_sha256(text) in training_sha256:
            in_training += 1
        else:
            kept[item.path].append(item)
    dropped = {path: len(items) for path, items in sorted(kept.items()) if len(items) < MIN_TEXTS}
    drawn: list[LabelledText] = []
    for path in sorted(kept.keys() - dropped.keys()):
        drawn += sorted(kept[path], key=lambda item: text_sha256(f"{tree.seed}\0{item.text}"))[: tree.cap_of(path)]
    return LabelledTexts(tree.name, tuple(drawn), in_training, len(ambiguous), dropped)


def text_sha256(text: str) -> str:
    """The SHA-256 of a text, as documents.jsonl has it."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _items(tree: Tree) -> Iterator[LabelledText]:
    for name, source in tree.sources.items():
        leaves = [leaf for leaf in tree.leaves if leaf.source == name]
        if source.kind == "jsonl":
            yield from _jsonl_items(tree.file.parent / source.path)
        elif source.kind == "packaged":
            yield from _packaged_items(tree, source, leaves)
        else:
            for leaf in leaves:
                yield from _task_items(leaf)


def _packaged_items(tree: Tree, source: Source, leaves: Sequence[Leaf]) -> Iterator[LabelledText]:
    rules = [(leaf.path, {name: re.compile(found, re.I) for name, found in leaf.where.items()}) for leaf in leaves]
    for record in packaged.read_records(packaged.TEXTS[source.name]):
        for name in (source.text, source.group, *(name for _, where in rules for name in where)):
            if name is not None and name not in record:
                raise UserError(f"{tree.file}: {source.name} has no field {name!r}; it has {', '.join(record)}")
        for path, where in rules:
            if all(rule.search(record[name] or "") for name, rule in where.items()):
                text = record[source.text]
                if text and text.strip():
                    yield LabelledText(text, path, text if source.group is None else str(record[source.group]))
                break


def _task_items(leaf: Leaf) -> Iterator[LabelledText]:
    import pandas

    from hafs_evaluate.saebench.task_activations import task_path

    table = pandas.read_csv(task_path(leaf.task), compression="zstd")
    for text in table["prompt"][table["target"] == leaf.label]:
        if isinstance(text, str) and text.strip():
            yield LabelledText(text, leaf.path, text)


def _jsonl_items(path: Path) -> Iterator[LabelledText]:
    if not path.exists():
        raise UserError(f"expected labelled texts at {path}, found no such file")
    for number, record in jsonl_records(path):
        text, label = record.get("text"), record.get("label")
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str) or not _is_path(label):
            raise UserError(f'{path}, line {number}: expected {{"text": "...", "label": "parent/child"}}')
        yield LabelledText(text, label, str(record.get("group") or text))


def _check_source(name: str, source: dict[str, Any], path: Path) -> None:
    where = f"{path}: source {name!r}"
    if source.get("kind") not in _SOURCE_KEYS:
        raise UserError(f"{where}: expected kind packaged, sae_probes or jsonl, found {source.get('kind')!r}")
    _check_keys(source, _SOURCE_KEYS[source["kind"]], where)
    if source["kind"] == "packaged" and source.get("name") not in packaged.TEXTS:
        near = did_you_mean(source.get("name"), packaged.TEXTS)
        raise UserError(f"{where}: expected a packaged text, found {source.get('name')!r}{near}")
    if source["kind"] == "packaged" and "text" not in source:
        raise UserError(f"{where}: expected text, the field that holds the text")
    if source["kind"] == "jsonl" and "path" not in source:
        raise UserError(f"{where}: expected path, the file of the labelled texts")


def _check_leaf(leaf: dict[str, Any], sources: dict[str, dict[str, Any]], path: Path) -> None:
    where = f"{path}: leaf {leaf.get('path')!r}"
    if not isinstance(leaf.get("path"), str) or not _is_path(leaf["path"]):
        raise UserError(f"{where}: expected a path like people/arts/actor, without empty parts")
    if leaf.get("source") not in sources:
        near = did_you_mean(leaf.get("source"), sources)
        raise UserError(
            f"{where}: expected one of the sources {', '.join(sources)}, found {leaf.get('source')!r}{near}"
        )
    kind = sources[leaf["source"]]["kind"]
    if kind == "jsonl":
        raise UserError(f"{where}: a jsonl source's lines name their own labels; take the leaf out")
    _check_keys(leaf, _LEAF_KEYS[kind], where)
    if kind == "sae_probes" and not {"task", "label"} <= leaf.keys():
        raise UserError(f"{where}: expected a task of sae-probes and the label whose texts are taken")
    if kind == "packaged":
        for name, expression in leaf.get("where", {"": None}).items():
            try:
                re.compile(expression)
            except (re.error, TypeError) as error:
                raise UserError(f"{where}: expected where: {{field: regular expression}}, {name!r}: {error}") from None


def _check_keys(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r}, expected {', '.join(sorted(known))}{did_you_mean(key, known)}"
            )


def _is_path(path: str) -> bool:
    return path == "" or all(part.strip() == part and part for part in path.split("/"))
