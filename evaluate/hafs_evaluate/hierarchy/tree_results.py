"""The hierarchy stage: label trees probed on SAEs and on the language model's activations, and absorption. Torch.

eval/llm/hierarchy.json         probes on the activations: all D (full), k of them (top_k), k components (pca_k)
eval/llm/hierarchy_answers.npz  what the full probe says of each text, out of fold, of nodes with children
eval/<run>/hierarchy.json       probes on k latents (top_k), absorption and holes

A text is represented by the mean over its tokens of its latents, or of its activations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.core.encode import TorchSAE, to_numpy
from hafs_evaluate.hierarchy import absorption
from hafs_evaluate.hierarchy.label_trees import LabelledTexts, find_trees, labelled_texts, tree_sha256
from hafs_evaluate.hierarchy.probes import (
    FULL_GRID,
    GRID,
    FoldScores,
    Scores,
    TreeData,
    full_scores,
    macro,
    mean_over_trees,
    parent_of,
    principal_components,
    sparse_scores,
    tree_data,
)
from hafs_evaluate.hierarchy.text_activations import LabelledActs, cache_key, fill
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_jsonl, write_atomic, write_json
from hafs_jax.store.reader import Store

FORMAT = 1  # raise it when results of the same inputs would differ


@dataclass
class HierarchyStage:
    """The trees of one workspace, their texts and activations. Reading them is put off until a result is missing."""

    config: EvalConfig
    train: Store
    root: Path  # of the activations' cache
    model: Callable[[], Any]
    say: Callable[[str], None]

    @cached_property
    def settings(self) -> list[Any]:
        """What the results depend on besides the SAE."""
        config, manifest = self.config, self.train.manifest
        trees = [[tree.name, *tree_sha256(tree)] for tree in find_trees(config.trees)]
        options = [list(config.hierarchy_ks), config.hierarchy_folds, config.hierarchy_seed]
        key = cache_key(manifest, config.hierarchy_tokens)
        return [
            FORMAT,
            trees,
            options,
            key,
            manifest.files_sha256["documents.jsonl"],
            absorption.SETTINGS,
            list(GRID + FULL_GRID),
        ]

    @cached_property
    def texts(self) -> list[LabelledTexts]:
        """The trees' texts without the training documents; a tree left with under two leaves is skipped."""
        trained_on = {record.get("sha256", "") for record in read_jsonl(self.train.folder / "documents.jsonl")}
        kept = []
        for tree in find_trees(self.config.trees):
            texts = labelled_texts(tree, trained_on)
            if texts.dropped:
                few = f"{len(texts.dropped)} leaves have too few texts outside the training documents"
                self.say(f"tree {tree.name}: {few}: {', '.join(path or 'background' for path in texts.dropped)}")
            if len(texts.leaves) < 2:
                self.say(
                    f"tree {tree.name}: skipped, under two leaves are left; extract with a larger heldout_fraction"
                )
            else:
                kept.append(texts)
        if not kept:
            raise UserError("no label tree has two leaves outside the training documents; --skip hierarchy")
        return kept

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Why each tree that is not in the results is not."""
        known = {texts.tree for texts in self.texts}
        names = [tree.name for tree in find_trees(self.config.trees)]
        return {name: "under two leaves outside the training documents" for name in names if name not in known}

    @cached_property
    def data(self) -> list[TreeData]:
        """The trees with their folds."""
        return [tree_data(texts, self.config.hierarchy_folds, self.config.hierarchy_seed) for texts in self.texts]

    @cached_property
    def every_text(self) -> list[str]:
        """The texts of all trees, each once."""
        return list(dict.fromkeys(item.text for texts in self.texts for item in texts.items))

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """Where each tree's texts lie in `every_text`."""
        number = {text: index for index, text in enumerate(self.every_text)}
        return [np.array([number[item.text] for item in texts.items]) for texts in self.texts]

    @cached_property
    def acts(self) -> LabelledActs:
        """The activations of all tokens of all texts."""
        return fill(self.every_text, self.train.manifest, self.root, self.model, self.config.hierarchy_tokens)

    @cached_property
    def pooled_acts(self) -> np.ndarray:
        """The mean activation of each text, [N, D]."""
        return self.acts.pooled(self.every_text)

    def language_model(self, path: Path, answers_path: Path) -> None:
        """Probes the activations themselves; writes both files."""
        ks, trees = self.config.hierarchy_ks, {}
        answers: dict[str, np.ndarray] = {}
        with threadpool_limits(1, user_api="blas"):  # small products: threads cost more than they give
            for texts, data, rows in zip(self.texts, self.data, self.rows, strict=True):
                acts_ND = self.pooled_acts[rows]
                full, found = full_scores(acts_ND, data)
                top = sparse_scores(acts_ND, data, ks)
                pca = sparse_scores(partial(principal_components, acts_ND, max(ks)), data, ks, ranked=False)
                scores = {
                    key: {
                        "full": full[key],
                        **top[key],
                        **{f"pca_{name[4:]}": value for name, value in pca[key].items()},
                    }
                    for key in full
                }
                trees[data.name] = self._tree(texts, data, scores, {})
                answers |= {f"{data.name}|{node}": found[node] for node in data.nodes if data.children(node)}
        write_atomic(answers_path, lambda file: np.savez_compressed(file, allow_pickle=False, **answers))
        manifest = self.train.manifest
        identity = {"model": manifest.model.name, "hook_point": manifest.hook_point, "grid": list(GRID)}
        write_json(path, {**identity, **self._result(trees)})

    def sae(self, sae: TorchSAE, answers_path: Path) -> dict[str, Any]:
        """The result of one SAE: {"trees", "macro", "skipped", "seconds"}."""
        started = time.monotonic()
        W_dec_FD, b_dec_D = to_numpy(sae.W_dec), to_numpy(sae.b_dec)
        latents = self.acts.pooled(self.every_text, sae)
        encoded = time.monotonic()
        trees = {}
        with np.load(answers_path, allow_pickle=False) as answers, threadpool_limits(1, user_api="blas"):
            for texts, data, rows in zip(self.texts, self.data, self.rows, strict=True):
                latents_NF, acts_ND = latents[rows], self.pooled_acts[rows]
                scores = sparse_scores(latents_NF, data, self.config.hierarchy_ks)
                absorbed = {
                    node: absorption.measure(
                        latents_NF,
                        acts_ND,
                        W_dec_FD,
                        b_dec_D,
                        data.nodes[node],
                        answers[f"{data.name}|{node}"],
                        [data.nodes[child] for child in data.children(node)],
                        data.half_N,
                        pooled=True,
                    )
                    for node in data.nodes
                    if (node, "rest") in scores and data.children(node)
                }
                trees[data.name] = self._tree(texts, data, scores, absorbed)
        seconds = {"encode": round(encoded - started, 2), "probe": round(time.monotonic() - encoded, 2)}
        return {**self._result(trees), "seconds": seconds}

    def _result(self, trees: dict[str, Any]) -> dict[str, Any]:
        means = mean_over_trees([tree["macro"] for tree in trees.values()])
        return {"trees": trees, "macro": means, "skipped": self.skipped}

    def _tree(
        self, texts: LabelledTexts, data: TreeData, scores: Scores, absorbed: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        nodes = {}
        for node, is_positive_N in data.nodes.items():
            found = dict(absorbed.get(node, {}))
            hole = found.pop("hole", None)
            nodes[node] = {
                "level": node.count("/") + 1,
                "parent": parent_of(node),
                "label": node.rpartition("/")[2],
                "texts": int(is_positive_N.sum()),
                "contrasts": {kind: _as_json(scores.get((node, kind))) for kind in ("rest", "siblings")},
                "absorption": found or None,
                "hole": hole,
            }
        return {
            "texts": len(data.paths),
            "levels": max(node["level"] for node in nodes.values()),
            "in_training": texts.in_training,
            "ambiguous": texts.ambiguous,
            "dropped": texts.dropped,
            "nodes": nodes,
            "macro": macro(nodes),
        }


def _as_json(scores: dict[str, FoldScores] | None) -> dict[str, Any] | None:
    return {name: values.as_json() for name, values in scores.items()} if scores else None
