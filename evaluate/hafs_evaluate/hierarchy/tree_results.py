"""The results of all label trees, of the language model and of an SAE: probes of nodes, absorption, holes.

A text is represented by the mean over its tokens of its activations, or of an SAE's latents. `TreeProbing` gives

- eval/llm/hierarchy.json: probes on the activations, on all D of them (full), on k of them (top_k) and on their first k
  principal components (pca_k);
- eval/llm/hierarchy_answers.npz: what the full probe says of each text when its document was held out, for the nodes
  that have children;
- eval/<run>/hierarchy.json: probes on k latents (top_k), absorption and holes.

Imports torch, not jax.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.core.encode import TorchSAE, to_numpy
from hafs_evaluate.hierarchy import absorption
from hafs_evaluate.hierarchy.absorption import Absorption
from hafs_evaluate.hierarchy.label_trees import LabelledTexts, Tree, find_trees, labelled_texts, tree_sha256
from hafs_evaluate.hierarchy.probes import (
    FULL_GRID,
    GRID,
    Scores,
    TreeData,
    full_scores,
    parent_of,
    principal_components,
    sparse_scores,
    tree_data,
)
from hafs_evaluate.hierarchy.text_activations import TextActivations, cache_key, fill_text_cache
from hafs_evaluate.hierarchy.tree_means import with_means
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store

FORMAT = 1  # raise it when results of the same inputs would differ

Answers = Mapping[str, Bool[np.ndarray, "N"]]
"""What the full probe says of each text of a tree, by `answer_key`."""


@dataclass
class TreeProbing:
    """The label trees of one workspace. Their texts and activations are read when they are first needed."""

    config: EvalConfig
    train: Store  # its documents are left out of the trees
    cache: Path  # folder of the texts' activations
    model: Callable[[], Any]  # gives the `LanguageModel`
    say: Callable[[str], None]  # tells the user

    def language_model(self) -> tuple[dict[str, Any], dict[str, Bool[np.ndarray, "N"]]]:
        """(eval/llm/hierarchy.json, eval/llm/hierarchy_answers.npz)."""
        ks, trees = self.config.hierarchy_ks, {}
        answers: dict[str, np.ndarray] = {}
        with threadpool_limits(1, user_api="blas"):  # the products are small: threads cost more than they give
            for texts, data, rows in zip(self.texts, self.data, self.rows, strict=True):
                acts_ND = self.pooled_acts[rows]
                full, found = full_scores(acts_ND, data)
                top = sparse_scores(acts_ND, data, ks)
                pca = sparse_scores(partial(principal_components, acts_ND, max(ks)), data, ks, ranked=False)
                scores = {
                    key: {
                        "full": full[key],
                        **top[key],
                        **{name.replace("top_", "pca_"): value for name, value in pca[key].items()},
                    }
                    for key in full
                }
                trees[data.name] = _tree(texts, data, scores, {})
                answers |= {answer_key(data.name, node): found[node] for node in data.nodes if data.children(node)}
        manifest = self.train.manifest
        identity = {"model": manifest.model.name, "hook_point": manifest.hook_point, "grid": list(GRID)}
        return {**identity, **self._result(trees)}, answers

    def sae(self, sae: TorchSAE, answers: Answers) -> dict[str, Any]:
        """eval/<run>/hierarchy.json of one SAE; `answers` are those that `language_model` gave."""
        W_dec_FD, b_dec_D = to_numpy(sae.W_dec), to_numpy(sae.b_dec)
        pooled_latents = self.acts.pooled(self.every_text, sae)
        trees = {}
        with threadpool_limits(1, user_api="blas"):
            for texts, data, rows in zip(self.texts, self.data, self.rows, strict=True):
                latents_NF, acts_ND = pooled_latents[rows], self.pooled_acts[rows]
                scores = sparse_scores(latents_NF, data, self.config.hierarchy_ks)
                absorbed = {
                    node: absorption.measure(
                        latents_NF,
                        acts_ND,
                        W_dec_FD,
                        b_dec_D,
                        data.nodes[node],
                        answers[answer_key(data.name, node)],
                        [data.nodes[child] for child in data.children(node)],
                        data.half_N,
                        pooled=True,
                    )
                    for node in data.nodes
                    if (node, "rest") in scores and data.children(node)
                }
                trees[data.name] = _tree(texts, data, scores, absorbed)
        return self._result(trees)

    @cached_property
    def settings(self) -> list[Any]:
        """What the results depend on besides the SAE, as JSON values."""
        config, manifest = self.config, self.train.manifest
        return [
            FORMAT,
            [[tree.name, *tree_sha256(tree)] for tree in self.trees],
            [list(config.hierarchy_ks), config.hierarchy_folds, config.hierarchy_seed],
            cache_key(manifest, config.hierarchy_tokens),
            manifest.files_sha256["documents.jsonl"],
            absorption.SETTINGS,
            list(GRID + FULL_GRID),
        ]

    @cached_property
    def trees(self) -> list[Tree]:
        """The trees that the config names."""
        return find_trees(self.config.trees)

    @cached_property
    def texts(self) -> list[LabelledTexts]:
        """The texts of each tree, without the training documents. A tree left with under two leaves is not there."""
        trained_on = {record.get("sha256", "") for record in self.train.documents()}
        kept, skipped = [], []
        for tree in self.trees:
            texts = labelled_texts(tree, trained_on)
            left, all_leaves = len(texts.leaves), len(texts.leaves) + len(texts.dropped)
            if left < 2:
                skipped.append(f"{tree.name} ({left} of {all_leaves})")
                continue
            if texts.dropped:  # the result names the leaves
                self.say(f"tree {tree.name}: {left} of {all_leaves} leaves have enough texts that were not trained on")
            kept.append(texts)
        if skipped:
            self.say(
                f"trees left out, too few of whose leaves have texts that were not trained on: {', '.join(skipped)}"
            )
        if not kept:
            raise UserError("no label tree has two leaves outside the training documents; --skip hierarchy")
        return kept

    @cached_property
    def data(self) -> list[TreeData]:
        """The nodes and folds of each tree in `texts`."""
        return [tree_data(texts, self.config.hierarchy_folds, self.config.hierarchy_seed) for texts in self.texts]

    @cached_property
    def every_text(self) -> list[str]:
        """The texts of all trees, each once."""
        return list(dict.fromkeys(item.text for texts in self.texts for item in texts.items))

    @cached_property
    def rows(self) -> list[Int[np.ndarray, "N"]]:
        """Where each tree's texts lie in `every_text`."""
        number = {text: index for index, text in enumerate(self.every_text)}
        return [np.array([number[item.text] for item in texts.items]) for texts in self.texts]

    @cached_property
    def acts(self) -> TextActivations:
        """The activations of all tokens of all texts."""
        return fill_text_cache(
            self.every_text, self.train.manifest, self.cache, self.model, self.config.hierarchy_tokens
        )

    @cached_property
    def pooled_acts(self) -> Float[np.ndarray, "N D"]:
        """The mean activation of each text in `every_text`."""
        return self.acts.pooled(self.every_text)

    def _result(self, trees: dict[str, Any]) -> dict[str, Any]:
        known = {texts.tree for texts in self.texts}
        reason = "under two leaves outside the training documents"
        skipped = {tree.name: reason for tree in self.trees if tree.name not in known}
        return with_means({"trees": trees, "skipped": skipped})


def answer_key(tree: str, node: str) -> str:
    """The name of a node's array in hierarchy_answers.npz."""
    return f"{tree}|{node}"


def _tree(texts: LabelledTexts, data: TreeData, scores: Scores, absorbed: Mapping[str, Absorption]) -> dict[str, Any]:
    """A tree's entry in hierarchy.json; `absorbed` has the absorption and hole of the nodes that have children."""
    nodes = {}
    for node, is_positive_N in data.nodes.items():
        own = asdict(absorbed[node]) if node in absorbed else {}
        hole = own.pop("hole", None)
        nodes[node] = {
            "level": node.count("/") + 1,
            "parent": parent_of(node),
            "label": node.rpartition("/")[2],
            "texts": int(is_positive_N.sum()),
            "contrasts": {
                kind: {name: values.as_json() for name, values in scores.get((node, kind), {}).items()} or None
                for kind in ("rest", "siblings")
            },
            "absorption": own or None,
            "hole": hole,
        }
    return {
        "texts": len(data.paths),
        "levels": max(node["level"] for node in nodes.values()),
        "in_training": texts.in_training,
        "ambiguous": texts.ambiguous,
        "dropped": texts.dropped,
        "nodes": nodes,
    }
