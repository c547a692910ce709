"""Made-up workspaces of the right schemas, for the report's tests: few runs, arms over seeds, many latents."""

import base64
import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from hafs_evaluate.report.embedded import LEVELS
from hafs_evaluate.report.report import write_report
from hafs_jax.base.files import write_json
from tests.support.runs import COUNTS, config_of, finished_run
from tests.support.stores import write_store

RUNS = ("baseline-relu-s0", "adaptive-s0", "strict-s0", "gate_only-s0", "baseline-s0")
ORDER = ["baseline", "strict", "adaptive", "gate_only", "baseline-relu"]
FVU = {"baseline": 0.20, "strict": 0.30, "adaptive": 0.23, "gate_only": 0.24, "baseline-relu": 0.26}
TASKS = ("task_a", "task_b")
NASTY = ["</script><b>", "<!--", "\"'&", "\u202e\u2028", "|`*_$x$"]


def write_run(folder: Path, run: str, seed: int = 0, k: int = 4, tag: str = "", **summary: Any) -> None:
    variant, architecture = run.split("-")[0], "relu" if "relu" in run else "batchtopk"
    lines = [
        {
            **COUNTS, "step": step, "tokens": 64 * (step + 1), "loss": 1.2 / (step + 1), "fvu": 0.9,
            "fvu_ema": 1 / (step + 1), "l0": 4.0, "alpha": 0.5, "lambda": 0.1 * step, "penalty": 0.2,
            "coherence_mean": 0.3, "coherence_max": 0.8,
        }
        for step in range(5)
    ]  # fmt: skip
    config = config_of(variant, architecture, seed=seed, tag=tag, sae={"k": k, "n_latents": 64})
    gate = {"tau": 0.25, "tau_reached": True} if variant == "adaptive" else {"tau": None, "tau_reached": None}
    known = {"steps": 5, "tokens": 320, "final": lines[-1], **gate}
    made = finished_run(folder / "runs" / run, config, **{**known, **summary})
    made.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_core(folder: Path, run: str, fvu: float, l0: float = 4.0, **model: float | None) -> None:
    values = {
        "run": run, "sae_sha256": "0", "rows": 40,
        "reconstruction": {"fvu": fvu, "explained_variance": 1 - fvu},
        "sparsity": {"l0": l0, "dead_fraction": 0.0, "n_latents": 13},
        "geometry": {"max_coherence": 0.9, "mean_coherence": fvu / 2, "frobenius_excess": 0.1},
        "by_source": {"text": {"fvu": fvu, "l0": l0, "rows": 40}},
        "model": {"ce_score": 0.9, "kl_score": 0.95, **model},
    }  # fmt: skip
    path = folder / "eval" / run / "core.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))  # as a careless writer might: NaN included


def accuracies(start: float) -> dict[str, dict[str, float]]:
    return {
        str(k): {"test_accuracy": start + 0.01 * k, "test_auc": start + 0.02 * k, "test_f1": 0.5} for k in (1, 2, 5, 10)
    }


def write_probing(folder: Path, run: str, start: float, tasks: tuple[str, ...] = TASKS) -> None:
    details = [{"dataset_name": task, "sae_metrics_by_k": accuracies(start + 0.1 * n)} for n, task in enumerate(tasks)]
    write_json(folder / "eval" / run / "probing.json", {"eval_result_details": details[::-1]})


def write_llm_probing(folder: Path, tasks: tuple[str, ...] = TASKS) -> None:
    probes = {f"top_{k}": values for k, values in accuracies(0.5).items()}
    full = {"test_accuracy": 0.9, "test_auc": 0.97, "test_f1": 0.9}
    values = {"model": "m", "hook_point": "h", "tasks": {task: {**probes, "full": full} for task in tasks}}
    write_json(folder / "eval" / "llm" / "probing.json", values)


def write_latents(folder: Path, run: str, tokens: list[str] | None = None) -> None:
    tokens = tokens or [" the", " quick", " fox", "↵"]
    context = {
        "source": "text", "document": 1, "title": "A title", "peak": 1, "tokens": tokens,
        "values": [0.0, 2.5] + [0.5] * (len(tokens) - 2),
    }  # fmt: skip
    latent = {
        "density": 0.01, "max_activation": 2.5, "nearest": {"index": 5, "cosine": 0.3},
        "top_tokens": [[tokens[1], 1.0]], "promoted": tokens[:2], "suppressed": [], "contexts": [context],
    }  # fmt: skip
    density = (np.arange(13) / 100).tolist()
    values = {
        "run": run, "rows_scanned": 40, "density": density, "max_activation": density, "nearest_cosine": density,
        "latents": [{"index": index, **latent} for index in (3, 8)],
    }  # fmt: skip
    write_json(folder / "eval" / run / "latents.json", values)


def make_workspace(folder: Path, runs: tuple[str, ...] = RUNS) -> Path:
    acts = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    write_store(folder / "store" / "train", acts)
    write_store(folder / "store" / "heldout", acts[:40], split="heldout")
    write_json(folder / "store" / "train" / "timing.json", {"seconds": 12.5})
    for number, run in enumerate(runs):
        write_run(folder, run)
        write_core(folder, run, FVU[run.removesuffix("-s0")])
        write_probing(folder, run, 0.6 + 0.01 * number)
        write_latents(folder, run)
    write_llm_probing(folder)
    write_json(folder / "eval" / "seconds.json", {"probing": 3.0, "core/adaptive-s0": 2.0})
    return folder


class Page(HTMLParser):
    """What a page holds: its text, its elements' attributes, the JSON in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._data: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        name = dict(attrs).get("id") or ""
        self._data = name if tag == "script" and name.startswith("data-") else None

    def handle_endtag(self, tag):
        self._data = None

    def handle_data(self, data):
        if self._data is not None:
            self.scripts[self._data] = self.scripts.get(self._data, "") + data
        else:
            self.texts.append(data)

    def json(self, name: str) -> Any:
        return json.loads(self.scripts[name])


def page_of(folder: Path) -> Page:
    return Page((folder / "report" / "index.html").read_text())


def page_of_written(folder: Path) -> Page:
    write_report(folder)
    return page_of(folder)


def unpacked(page: Page, number: int = 0) -> list[dict[str, list[dict[str, Any]]]]:
    """The contexts of an embedded record, latent by latent, read back from its bytes."""
    record, strings = page.json(f"data-latents-{number}"), page.json("data-strings")
    data = iter(base64.b64decode(record["bytes"]))

    def varint() -> int:
        value, shift = 0, 0
        for byte in data:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        return value

    def context(scale: float) -> dict[str, Any]:
        source, document, title, peak = varint(), varint(), varint(), varint()
        tokens = [strings[varint()] for _ in range(varint())]
        values, place = [0.0] * len(tokens), -1
        for _ in range(varint()):
            place += varint() + 1
            values[place] = varint() * scale / LEVELS
        title_text = strings[title - 1] if title else None
        return {
            "source": strings[source], "document": document, "title": title_text, "peak": peak, "tokens": tokens,
            "values": values,
        }  # fmt: skip

    kinds = ("contexts", "random_contexts")
    found = [{kind: [context(scale) for _ in range(varint())] for kind in kinds} for scale in record["scale"]]
    assert next(data, None) is None
    return found


NODE_TEXTS = {"people": 1000, "people/arts": 600, "people/arts/actor": 400, "people/sport": 300}
NODES = {"people": None, "people/arts": "people", "people/arts/actor": "people/arts", "people/sport": "people"}


def write_hierarchy(folder: Path, run: str, accuracy: float, columns: tuple[str, ...] = ("top_1", "top_5")) -> None:
    """eval/<run>/hierarchy.json of one tree of four classes, each accuracy `accuracy` plus .1 a k."""
    nodes = {}
    for path, parent in NODES.items():
        scores = {
            column: {
                "balanced_accuracy": accuracy + 0.1 * n,
                "balanced_accuracy_se": 0.01,
                "auroc": 0.9,
                "auroc_se": 0.02,
            }
            for n, column in enumerate(columns)
        }
        is_parent = path in NODES.values()
        nodes[path] = {
            "level": path.count("/") + 1, "parent": parent, "label": path.split("/")[-1],
            "texts": NODE_TEXTS[path],
            "contrasts": {"rest": scores, "siblings": scores if parent else None},
            "absorption": {"fraction": 1 - accuracy, "full": 0.1, "mains": 2, "dead_fraction": 0.0, "texts": 100},
            "hole": 0.3 if is_parent else None,
        }  # fmt: skip
    macro = {
        "level_1": {"top_1": {"balanced_accuracy": accuracy, "auroc": 0.9}}, "parents_top_1": accuracy, "hole": 0.3,
        "absorption_fraction": 1 - accuracy, "absorption_full": 0.1,
    }  # fmt: skip
    tree = {"texts": 1200, "levels": 3, "nodes": nodes, "macro": macro}
    write_json(folder / "eval" / run / "hierarchy.json", {"run": run, "trees": {"professions": tree}, "macro": macro})


def write_domains(folder: Path, run: str, f1: float, sources: tuple[str, ...] = ("biology", "text")) -> None:
    """eval/<run>/domains.json: detectors of each source whose best single latent has F1 `f1`."""
    values = {}
    for number, source in enumerate(sources):
        latents = [{"index": 3 + 2 * n, "f1": f1 - 0.1 * n, "precision": 0.9, "recall": 0.5} for n in range(5)]
        values[source] = {
            "documents": 120, "documents_outside": 1280, "prevalence": 0.3, "always_f1": 0.462, "detectors": 4 + number,
            "best_auroc": {"latent": 3, "auroc": f1 + 0.05}, "best_1": {"f1": f1}, "best_5": {"f1": f1 + 0.1},
            "best_1_threshold": {"f1": f1}, "latents": latents,
        }  # fmt: skip
    write_json(folder / "eval" / run / "domains.json", {"run": run, "config": {}, "sources": values})


def write_tokens(folder: Path, run: str, accuracy: float) -> None:
    """eval/<run>/tokens.json and eval/llm/tokens.json: transfer to unseen tokens of two properties."""
    mean = {"transfer_top_1": accuracy, "transfer_top_2": accuracy + 0.01, "transfer_top_5": accuracy + 0.02}
    mean |= {
        "f1_top_1": 0.432,
        "recall": 0.6,
        "child_recall": 0.5,
        "child_spread": 0.25,
        "seen_top_1": 0.91,
        "enough_share": 0.4,
    }
    tops = {f"top_{k}": {"balanced_accuracy": accuracy, "f1": 0.5, "recall": 0.6} for k in (1, 2, 5)}
    properties = {name: {**tops, "child_recall": 0.5, "absorbed": 0.3} for name in ("months", "digits")}
    write_json(
        folder / "eval" / run / "tokens.json",
        {"run": run, "mean": {**mean, "absorbed": 0.333}, "properties": properties, "left_out": {}},
    )
    ceiling = {"mean": {"transfer_top_1": 0.987, "recall": 0.98}, "properties": {"months": {}, "digits": {}}}
    floors = {name: {"mean": {**mean, "transfer_top_1": 0.654}, "properties": {}} for name in ("neurons", "pca")}
    facts = {"rows": 12345, "probe_f1": {"months": 0.9, "digits": 1.0, "war": 0.4}, "left_out": {"war": "0.40"}}
    write_json(folder / "eval" / "llm" / "tokens.json", {**facts, "ceiling": ceiling, **floors})


def write_first_letter(folder: Path, run: str, absorption: float | None, reason: str = "") -> None:
    """eval/<run>/first_letter.json, valid unless there is a `reason`; without a figure where `absorption` is None."""
    means = {"mean_absorption_fraction_score": absorption, "mean_full_absorption_score": 0.2}
    means["mean_num_split_features"] = 1.5
    details = [{"first_letter": "a", "mean_absorption_fraction": absorption, "full_absorption_rate": 0.2}]
    result = {"eval_result_metrics": {"mean": means}, "eval_result_details": details}
    values = {"valid": not reason, "reason": reason or "large", "result": None if absorption is None else result}
    write_json(folder / "eval" / run / "first_letter.json", {"run": run, **values})


def write_summary(folder: Path) -> None:
    """experiment/summary.json with comparisons of every verdict, falsifiers and three sentences."""
    verdicts = ("better", "worse", "not resolved", "non-inferior")
    comparisons = [
        {
            "architecture": architecture, "k": k, "measure": measure, "a": a, "b": "baseline", "difference": difference,
            "low": difference - 0.02, "high": difference + 0.02, "p": 0.01, "p_holm": 0.04, "reseed_sd": 0.011,
            "verdict": said,
        }
        for architecture, k in itertools.product(("batchtopk", "relu"), (16, 64))
        for measure in ("fvu", "hierarchy_parent_top_1", "hole", "stability")
        for (a, difference), said in zip(
            (("adaptive", 0.05), ("strict", -0.031), ("ramp_only", 0.001), ("ortsae", 0.0125)), verdicts, strict=True
        )
    ]  # fmt: skip
    write_json(
        folder / "experiment" / "summary.json",
        {
            "config": {}, "arms": [], "comparisons": comparisons,
            "falsifiers": [
                {"name": "error-adaptive", "architecture": "relu", "claim": "gate adds to ramp", "outcome": "triggered",
                 "why": "CI holds 0"},
                {"name": "frozen", "claim": "gains are not the encoder's alone", "outcome": "pass", "why": ""},
                {"name": "hierarchy", "claim": "parent beats global", "outcome": "not decided", "why": "not run"},
            ],
            "verdict": ["Adaptive lowers the hole by 0.031.", "It costs 0.05 of FVU.", "One of three claims fell."],
        },
    )  # fmt: skip


ARM_VARIANTS = (
    "baseline",
    "strict",
    "adaptive",
    "yielding",
    "ramp_only",
    "gate_only",
    "ortsae",
    "frob",
    "random_init",
    "frozen_decoder",
)


def make_experiment(folder: Path, seeds: int = 3, variants: tuple[str, ...] = ARM_VARIANTS) -> Path:
    """Arms x seeds: two architectures, two ks, with hierarchies, latents of some, and the experiment's summary."""
    make_workspace(folder, ())
    numbers = itertools.product(("batchtopk", "relu"), (16, 64), enumerate(variants), range(seeds))
    for architecture, k, (place, variant), seed in numbers:
        run = f"{variant}{'' if architecture == 'batchtopk' else '-relu'}-s{seed}-k={k}"
        noise = 0.004 * math.sin(7 * seed + place) + 0.01 * place
        write_run(folder, run, seed, k, f"k={k}")
        write_core(folder, run, 3 / (k + 10) + noise, l0=k + noise)
        write_probing(folder, run, 0.6 + noise)
        write_hierarchy(folder, run, 0.6 + noise + 0.02 * (k == 16))
        write_latents(folder, run)
    write_hierarchy(folder, "llm", 0.7, ("full", "top_1", "pca_1"))
    similar = {f"adaptive-s{seed}-k=16": {"mean_max_cosine": 0.6 + 0.01 * seed} for seed in range(seeds)}
    write_json(folder / "eval" / "stability.json", {"runs": similar})
    write_summary(folder)
    return folder


def write_many_latents(
    folder: Path, run: str, latents: int, contexts: int, seed: int = 0, others: bool = False
) -> None:
    """latents.json as large as asked for, with every optional part; words are drawn as languages draw them.

    Its latents have even numbers. With `others`, latents_others.json has the odd ones.
    """
    random = np.random.default_rng(seed)
    words = [f" w{n:x}" if n > 200 else f" {chr(97 + n % 26)}{n}" for n in range(8000)]
    draws = np.minimum(random.zipf(1.3, size=(latents * contexts, 37)) - 1, 7999)
    shares = {"share": 0.5, "base": 0.1}
    found = []
    for index in range(latents):
        shown = []
        for n in range(contexts):
            tokens = [words[token] for token in draws[index * contexts + n]]
            values = np.round(np.where(random.random(37) < 0.12, random.random(37) * 5, 0), 3)
            values[24] = 5 + random.random()
            document = int(random.integers(5000))
            shown.append(
                {
                    "source": "text", "document": document, "title": f"Title {document}", "peak": 24, "tokens": tokens,
                    "values": values.tolist(),
                }
            )  # fmt: skip
        other = (index + 1) % latents
        found.append(
            {
                "index": 2 * index, "density": float(f"{10 ** random.uniform(-4, -1):.5g}"),
                "max_activation": float(max(shown[0]["values"])),
                "nearest": {"index": 2 * other, "cosine": round(random.random(), 4)},
                "top_tokens": [[shown[0]["tokens"][24], 1.0]], "promoted": words[index % 50 : index % 50 + 10],
                "suppressed": words[100:110], "contexts": shown, "random_contexts": shown[:5],
                "selectivity": {"label": "topic", "value": "Arts", "auroc": round(random.random(), 4), **shares},
                "partners": [{"index": 2 * other, "pmi": 2.5, "rows": 7}], "purity": round(random.random(), 4),
                "shares_with": [
                    {"index": 2 * other, "cosine": 0.4, "kind": "child"}, {"index": 1, "cosine": 0.3, "kind": "peer"},
                ],
                "matches": {"strict-s0": {"index": 2 * other, "cosine": 0.91}} if run != "strict-s0" else {},
                "neighbours": [{"index": 2 * ((other + n) % latents), "cosine": 0.5 - 0.05 * n} for n in range(6)],
                "promoted_logits": [round(3 - 0.1 * n, 2) for n in range(10)], "logit_effect": 4.0 + index % 3,
                "suppressed_logits": [round(0.1 * n - 3, 2) for n in range(10)],
                "histogram": [int(1000 * 0.6**n) for n in range(24)],
            }
        )  # fmt: skip
    density = [latent["density"] for latent in found]
    values = {
        "run": run, "rows_scanned": 100_000, "density": density, "max_activation": density, "nearest_cosine": density,
        "latents": found, "random_logit_effect": 4.6,
    }  # fmt: skip
    path = folder / "eval" / run / "latents.json"
    path.write_text(json.dumps(values))
    if others:
        odd = [{**latent, "index": latent["index"] + 1, "contexts": latent["contexts"][:2]} for latent in found]
        path.with_name("latents_others.json").write_text(json.dumps({"run": run, "latents": odd}))
