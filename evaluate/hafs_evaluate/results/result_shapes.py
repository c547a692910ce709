"""What the files in eval/ must look like for what reads them: see `shapes`. No torch, no jax, no files.

A key that nothing indexes without asking may be missing: files of earlier versions lack some.
"""

from pathlib import Path
from typing import Any

from hafs_evaluate.results.measures import CORE, DOMAINS, FIRST_LETTER, HIERARCHY, PROBING, TOKENS
from hafs_evaluate.results.shapes import ANY, FLAG, NUMBER, NUMERAL, TEXT, WHOLE, check_shape
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import finite

MEND = "measure again, or restore the file"

_SCORES = {str: NUMBER}
_CONTEXT = {
    "source!": TEXT, "document!": WHOLE, "title": TEXT, "peak!": WHOLE, "tokens!": [TEXT], "values!": [NUMBER],
}  # fmt: skip
_OTHER = {"index!": WHOLE, "cosine": NUMBER, "phi": NUMBER, "pmi": NUMBER, "share": NUMBER, "kind": TEXT}
_NEAREST = {**_OTHER, "cosine!": NUMBER}
_LATENT = {
    "index!": WHOLE, "density!": NUMBER, "max_activation!": NUMBER, "nearest!": _NEAREST,
    "top_tokens!": [(TEXT, NUMBER)],
    "promoted!": [TEXT], "suppressed!": [TEXT], "promoted_logits": [NUMBER], "suppressed_logits": [NUMBER],
    "contexts!": [_CONTEXT], "random_contexts": [_CONTEXT], "partners": [_OTHER], "shares_with": [_OTHER],
    "neighbours": [_NEAREST], "matches": {str: _OTHER}, "logit_effect": NUMBER, "histogram": ANY, "selectivity": ANY,
}  # fmt: skip
LATENTS_SHAPE = {
    "latents!": [_LATENT], "rows_scanned": WHOLE, "density": [NUMBER], "max_activation": [NUMBER],
    "nearest_cosine": [NUMBER], "token": ANY, "random_logit_effect": NUMBER, "marks": ANY,
}  # fmt: skip
_PROBES = {str: {str: NUMBER}}
_NODE = {
    "level": WHOLE, "parent": TEXT, "label": TEXT, "texts": WHOLE, "contrasts": {"rest": _PROBES, "siblings": _PROBES},
    "absorption": {"fraction": NUMBER, "full": NUMBER}, "hole": NUMBER,
}  # fmt: skip
_F1 = {"f1!": NUMBER}
_SOURCE = {
    "documents!": WHOLE, "documents_outside!": WHOLE, "always_f1!": NUMBER, "detectors!": WHOLE,
    "best_auroc!": {"auroc!": NUMBER}, "best_1!": _F1, "best_5!": _F1, "best_1_threshold!": _F1,
    "latents": [{"index!": WHOLE, "f1!": NUMBER}],
}  # fmt: skip
_TOKENS = {"mean": _SCORES, "properties": {str: {"top_1": _SCORES}}}
SHAPES: dict[str, Any] = {
    CORE: {
        "sae_sha256": TEXT, "reconstruction": _SCORES, "sparsity": _SCORES, "geometry": _SCORES, "model": _SCORES,
        "by_source": {str: {"fvu": NUMBER}},
    },
    "latents.json": LATENTS_SHAPE,
    "latents_others.json": LATENTS_SHAPE,
    PROBING: {
        "eval_result_details": [{"dataset_name!": TEXT, "sae_metrics_by_k": {NUMERAL: _SCORES}}],
        "eval_result_unstructured": {"sae_sha256": TEXT}, "tasks": {str: _PROBES},
    },
    HIERARCHY: {
        "trees": {str: {
            "nodes!": {str: _NODE}, "texts": WHOLE, "in_training": WHOLE, "ambiguous": WHOLE, "dropped": {str: ANY},
        }},
        "macro": {str: ANY}, "skipped": {str: TEXT},
    },
    DOMAINS: {"sources": {str: _SOURCE}},
    TOKENS: {
        **_TOKENS, "ceiling": _TOKENS, "neurons": _TOKENS, "pca": _TOKENS, "rows": WHOLE, "probe_f1": _SCORES,
        "left_out": {str: ANY},
    },
    FIRST_LETTER: {
        "valid": FLAG, "reason": TEXT,
        "result": {
            "eval_result_metrics!": {"mean!": _SCORES}, "eval_result_details": [{"first_letter!": TEXT}],
        },
    },
    "stability.json": {"runs": {str: {str: ANY}}},
    "seconds.json": _SCORES,
    "timing.json": {"seconds": NUMBER},
    "summary.json": {
        "config": {"name": TEXT}, "arms": ANY, "verdict": [TEXT],
        "comparisons": [{
            "architecture!": TEXT, "k": WHOLE, "measure!": TEXT, "a!": TEXT, "b!": TEXT, "difference": NUMBER,
            "low": NUMBER, "high": NUMBER, "p": NUMBER, "p_holm": NUMBER, "reseed_sd": NUMBER, "verdict!": TEXT,
        }],
        "falsifiers": [{"name": TEXT, "architecture": TEXT, "claim": TEXT, "outcome": TEXT, "why": TEXT}],
    },
}  # fmt: skip
"""{the file's name: its shape}. What a file holds beside that is shown as it is, or not at all."""


def check_result(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of the file at `path`; `UserError` where they have not the shape of a file of its name.

    Numbers that are not finite, which older files hold, become null, as they are in newer ones.
    """
    values = finite(values)[0]
    check_shape(values, SHAPES.get(path.name, {}), str(path), MEND)
    for name, tree in ((values.get("trees") or {}) if path.name == HIERARCHY else {}).items():
        parents = {node.get("parent") for node in tree["nodes"].values()} - {None}
        if strange := sorted(parents - tree["nodes"].keys()):
            raise UserError(f"{path}: {name}: expected a parent among the nodes, found {strange[0][:80]!r}; {MEND}")
    return values


def check_latents(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Those of a latents.json, whose contexts each have a value for each token, and a peak among them."""
    check_shape(values, SHAPES.get(path.name, {}), str(path), MEND)
    for latent in values["latents"]:
        for context in (*latent["contexts"], *(latent.get("random_contexts") or [])):
            tokens, peak = context["tokens"], context["peak"]
            if len(context["values"]) != len(tokens) or not 0 <= peak < max(1, len(tokens)):
                raise UserError(
                    f"{path}: latent {latent['index']}: expected a value for each of a context's {len(tokens)} tokens "
                    f"and a peak among them, found {len(context['values'])} and peak {peak}; {MEND}"
                )
    return values
