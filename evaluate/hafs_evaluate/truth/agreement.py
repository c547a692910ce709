"""`hafs agreement`: do the measures that need no truth rank SAEs as the truth does? Imports torch, not jax.

On a synthetic world, root features with children can serve as labels: a row is positive where the feature fires, and
the label's children are the features right below it. From these labels the hole, absorption and top-1 probing of
parents are computed as on real text (`hafs_evaluate.hierarchy`), and transfer to unseen children as on tokens
(`hafs_evaluate.tokens`): the roots are the properties, and the children take the place of token ids. Their ranks over
the world's SAEs are compared with the ranks of the true absorption of the edges whose parent is a root (`truth.scores`,
in eval/<run>/synthetic.json).

OUT/<profile>/eval/agreement.json   each SAE's figures and the rank correlations
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from hafs_evaluate.core.encode import TorchSAE, encode_rows, to_numpy
from hafs_evaluate.core.loading import load_sae
from hafs_evaluate.hierarchy import absorption
from hafs_evaluate.hierarchy.probes import Contrast, TreeData, sparse_scores
from hafs_evaluate.tokens.transfer import transfer
from hafs_evaluate.tokens.trials import Plan, plan
from hafs_evaluate.truth.ground_truth import Truth, load_truth
from hafs_evaluate.truth.synth_score import RESULT as SYNTHETIC
from hafs_evaluate.workspace import Workspace, finished_runs, hashed_export, read_result
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_figures
from hafs_jax.base.log import bar_options

LOG = logging.getLogger(__name__)

RESULT = "agreement.json"
ROWS, PROBE_ROWS = 6_000, 2_000  # held-out rows on which absorption is measured, and those that are probed
FOLDS = 5
TRANSFER = ("transfer_top_1", "transfer_top_2", "transfer_top_5", "recall_top_1", "child_recall")
MEASURES = ("hole", "full", "fraction", "hole_grown", "full_grown", "fraction_grown", "top_1", *TRANSFER)
"""See `absorption.measure`; those with `_grown` are of the grown set of main latents, the others of the main latent.
TRANSFER: see `tokens.transfer.transfer`."""

REFERENCES = ("random_init", "frozen_decoder")
"""Variants that never learnt a parent that could be absorbed. Correlations are given with and without them."""


@dataclass(frozen=True)
class Labels:
    """The R root features that have children, as labels of a world's first N held-out rows."""

    acts_ND: Float[np.ndarray, "N D"]
    fires_RN: Bool[np.ndarray, "R N"]
    children: tuple[Bool[np.ndarray, "_ N"], ...]  # of each root, on which rows each of its children fires
    found_RN: Bool[np.ndarray, "R N"]  # what a probe on the activations says, fitted on the other half of the rows
    half_N: Int[np.ndarray, "N"]  # 0 or 1
    trials: tuple[Plan, ...] = ()  # of transfer to unseen children, of each root that has rows enough


def root_labels(truth: Truth, rows: int = ROWS) -> Labels:
    """The labels of the first `rows` rows. The probe is scikit-learn's balanced logistic regression."""
    from sklearn.linear_model import LogisticRegression

    rows = min(rows, truth.rows)
    fires_NF = (truth.coefficients[:rows] > 0).toarray()
    acts_ND, half_N = truth.acts(0, rows), np.arange(rows) % 2
    roots = [root for root in np.flatnonzero(truth.levels_N == 0) if (truth.parents_N == root).any()]
    if not roots:
        raise UserError("the world has no feature with children, so there is no absorption to agree on")
    found_RN = np.zeros((len(roots), rows), bool)
    for index, root in enumerate(roots):
        for half in (0, 1):
            probe = LogisticRegression(C=1.0, class_weight="balanced", max_iter=300)
            probe.fit(acts_ND[half_N == half], fires_NF[half_N == half, root])
            found_RN[index, half_N != half] = probe.predict(acts_ND[half_N != half])
    children = tuple(fires_NF[:, truth.parents_N == root].T for root in roots)
    trials = tuple(root_trials(truth, int(root), fires_NF) for root in roots)
    known = tuple(each for each in trials if each.properties)
    return Labels(acts_ND, fires_NF[:, roots].T, children, found_RN, half_N, known)


def root_trials(truth: Truth, root: int, fires_NF: Bool[np.ndarray, "N n"]) -> Plan:
    """The trials of one root as a property, with rows for documents.

    A row on which the root fires has as its token id the first of the root's children that fires there, or the root
    itself where none does. Any other row has the feature that fires with the largest coefficient, or none (id n). Of a
    root with three children, say, each half has two of four ids; one is the least that a half must have.
    """
    largest_N = truth.coefficients[: len(fires_NF)].toarray().argmax(1)
    id_N = np.where(fires_NF.any(1), largest_N, truth.n)
    children = np.flatnonzero(truth.parents_N == root)
    first_N = children[fires_NF[:, children].argmax(1)]
    of_child_N = np.where(fires_NF[:, children].any(1), first_N, root)
    # ids of rows with and without the root differ, so that the id decides: those with it lie above n
    token_N = np.where(fires_NF[:, root], truth.n + 1 + of_child_N, id_N)
    is_root_V = np.arange(2 * truth.n + 1) > truth.n
    return plan(token_N, np.arange(len(token_N)), {str(root): is_root_V}, least_children=1)


def proxies(sae: TorchSAE, labels: Labels) -> dict[str, float | None]:
    """MEASURES of one SAE, and `mains`, the size of the grown set; each is the mean over the roots that have it."""
    latents_NF, W_dec_FD, b_dec_D = encode_rows(sae, labels.acts_ND), to_numpy(sae.W_dec), to_numpy(sae.b_dec)
    values: dict[str, float | None] = {}
    for suffix in ("", "_grown"):
        found = [
            absorption.measure(
                latents_NF,
                labels.acts_ND,
                W_dec_FD,
                b_dec_D,
                fires_N,
                found_N,
                list(children_CN),
                labels.half_N,
                grown=bool(suffix),
            )
            for fires_N, found_N, children_CN in zip(labels.fires_RN, labels.found_RN, labels.children, strict=True)
        ]
        for name in ("hole", "full", "fraction"):
            values[f"{name}{suffix}"] = _mean([getattr(one, name) for one in found])
    values["mains"] = _mean([one.mains for one in found])
    rows = min(PROBE_ROWS, len(latents_NF))
    data = TreeData("world", ("",) * rows, np.arange(rows) % FOLDS, labels.half_N[:rows])
    every_N = np.ones(rows, bool)
    contrasts = [Contrast(str(root), "rest", every_N, fires_N[:rows]) for root, fires_N in enumerate(labels.fires_RN)]
    scores = sparse_scores(latents_NF[:rows], data, (1,), contrasts=contrasts)
    values["top_1"] = _mean([by_name["top_1"].as_json()["balanced_accuracy"] for by_name in scores.values()])
    latents = csr_array(np.where(latents_NF > 0, latents_NF, 0))
    means = [transfer(latents, trials)["mean"] for trials in labels.trials]
    return values | {name: _mean([mean[name] for mean in means]) for name in TRANSFER}


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{measure: {"rho", "saes"}}: Spearman's rank correlation with `true_absorption`, over the SAEs that have both.

    rho is None where one of the two is the same for all SAEs.
    """
    found = {}
    for name in MEASURES:
        pairs = [(row.get(name), row["true_absorption"]) for row in rows]
        pairs = [pair for pair in pairs if None not in pair]
        left, right = (set(values) for values in zip(*pairs, strict=True)) if pairs else (set(), set())
        rho = float(spearmanr(*zip(*pairs, strict=True)).statistic) if min(len(left), len(right)) > 1 else None
        found[name] = {"rho": rho, "saes": len(pairs)}
    return found


def evaluate_agreement(workspace: Workspace, names: Sequence[str] = ()) -> dict[str, Any]:
    """Writes agreement.json and returns it, over the runs `names` (default: all finished) that have been scored."""
    truth = load_truth(workspace.folder)
    scored = []
    for run in finished_runs(workspace, names):
        result = read_result(workspace.result(run.name, SYNTHETIC))
        if result.get("truth_sha256") == truth.sha256 and (run.folder / "sae").is_dir():
            scored.append((run, result))
    if len(scored) < 3:
        raise UserError(
            f"{workspace.folder}: expected at least 3 runs scored against the truth, found {len(scored)};"
            " run `hafs synth-score` first"
        )
    labels = root_labels(truth)
    rows = []
    with threadpool_limits(1, user_api="blas"):
        for run, result in tqdm(scored, desc="agreement", unit="run", **bar_options(LOG)):
            sae = load_sae(hashed_export(run.name, run.folder / "sae"), workspace.heldout.manifest)
            facts = {name: result[name] for name in ("run", "variant", "architecture", "seed", "k")}
            true = result["metrics"]["by_level"][0]["absorption"]
            rows.append({**facts, "true_absorption": true, **proxies(sae, labels)})
    trained = [row for row in rows if row["variant"] not in REFERENCES]
    by_architecture = {
        name: correlations([row for row in trained if row["architecture"] == name])
        for name in sorted({str(row["architecture"]) for row in trained})
    }
    values = {
        "profile": workspace.profile,
        "truth_sha256": truth.sha256,
        "settings": {"rows": ROWS, "probe_rows": PROBE_ROWS, "folds": FOLDS, **absorption.SETTINGS},
        "spearman": {"all": correlations(rows), "trained": correlations(trained), **by_architecture},
        "runs": rows,
    }
    write_figures(workspace.eval / RESULT, values)
    return values


def table(values: dict[str, Any]) -> str:
    """The correlations as a Markdown table with a row for each set of SAEs."""
    lines = [
        f"| {values['profile']} | SAEs | {' | '.join(MEASURES)} |",
        "|" + "---|" * (len(MEASURES) + 2),
    ]
    for name, found in values["spearman"].items():
        cells = ["-" if found[each]["rho"] is None else f"{found[each]['rho']:+.2f}" for each in MEASURES]
        lines.append(f"| {name} | {found['top_1']['saes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def result_path(workspace: Workspace) -> Path:
    """Where agreement.json lies."""
    return workspace.eval / RESULT


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
