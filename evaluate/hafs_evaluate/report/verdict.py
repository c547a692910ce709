"""What the results say, in sentences made from the figures alone. No files, no markup."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hafs_evaluate.results.arms import GROUP_ARMS, VARIANT_ORDER, compared
from hafs_evaluate.results.probing_means import mean_probing

MATCHED_L0 = 0.05  # variants whose L0 differs by more than this share are not compared on FVU without a warning
MANY_SEEDS = 3  # from so many seeds on, one sentence is about all gates of an arm
INACTIVE_LAMBDA = 0.05  # a run whose weight of the penalty ends below this is a baseline


def what_ran(results: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """One paragraph that says what was trained on what. `sources` are the manifest's."""
    runs = list(results["variants"].values())
    text = ", ".join(f"{source['name']} {source['rows']:,}" for source in sources)
    heldout = f" and {results['heldout_rows']:,} held-out rows" if results["heldout_rows"] is not None else ""
    paragraph = (
        f"Sparse autoencoders on the activations of {results['model']} at {results['hook']} "
        f"(width {results['d_model']:,}): {results['rows']:,} training rows{heldout}, one row a token"
        f"{f' (training rows by source: {text})' if text else ''}."
    )
    if not runs:
        return paragraph + " No run has finished training."
    sizes = sorted({run["n_latents"] for run in runs if run["n_latents"]})
    tokens = sorted({run["training"]["tokens"] for run in runs if run["training"]["tokens"]})
    seeds = sorted({run["seed"] for run in runs})
    return paragraph + (
        f" {_count(len(runs), 'SAE')} of {_range(sizes)} latents, trained on {_range(tokens)} tokens, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}: {_arm_list(results['arms'])}."
    )


def _arm_list(arms: dict[str, Any]) -> str:
    """The arms by name; of many arms, the variants, architectures and k that they combine."""
    if len(arms) <= GROUP_ARMS:
        return ", ".join(arms)

    def every(key: str) -> str:
        return ", ".join(
            dict.fromkeys(f"{arm[key]:g}" if key == "k" else arm[key] for arm in arms.values() if arm[key])
        )

    return f"{len(arms)} arms of {every('variant')}, on {every('architecture')}, k {every('k')}"


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict, and what it is: a cost, an effect, what is not resolved, or a note."""

    kind: str  # a key of KINDS
    text: str

    @property
    def word(self) -> str:
        return KINDS[self.kind][0]

    @property
    def icon(self) -> str:
        return KINDS[self.kind][1]

    def parts(self) -> list[tuple[bool, str]]:
        """[(whether it is bold, text)]: the figures before the first semicolon or bracket are the headline."""
        if self.kind == "note":
            return [(False, self.text)]
        head = re.split(r"[;(]", self.text, maxsplit=1)[0]
        split = [(bool(n % 2), part) for n, part in enumerate(re.split(r"(\b\d+\.\d{3}\b)", head)) if part]
        return [*split, (False, self.text[len(head) :])]


KINDS = {
    "note": ("Note", "!"),
    "finding": ("Found", "•"),
    "cost": ("Cost", "−"),
    "effect": ("Effect", "Δ"),
    "open": ("Not resolved", "?"),
}


def verdict(results: dict[str, Any]) -> list[str]:
    """The sentences of the verdict, in the order of `findings`."""
    return [finding.text for finding in findings(results)]


def findings(results: dict[str, Any]) -> list[Finding]:
    """The verdict: dead SAEs, what the penalty costs, what it does, and what is not resolved.

    The effects begin with unseen tokens, where these were measured. Where there was an experiment, its own sentences
    stand instead. Otherwise the sentences compare the arms of one architecture and k, means over seeds. A sentence
    whose figures are missing says so.
    """
    arms = _arms(results)
    if not arms:
        return [Finding("note", "No run has finished training, so there is nothing to compare.")]
    dead = [Finding("note", sentence) for sentence in _dead(results)]
    decided = (results.get("experiment") or {}).get("verdict")
    if decided:
        found = [Finding("finding", str(sentence)) for sentence in decided]
        return dead + found + [Finding("note", sentence) for sentence in _inactive(arms)]
    return [
        *dead,
        Finding("cost", _reconstruction(arms)),
        *(Finding("effect", sentence) for sentence in _transfer(arms, results)),
        Finding("effect", _coherence(arms)),
        Finding("open", _probing(arms, results)),
        *(Finding("open", sentence) for sentence in _cautions(arms)),
    ]


def _dead(results: dict[str, Any]) -> list[str]:
    """A sentence for each dead SAE, of whatever arm: how it shows, and the setting that killed it."""
    return [f"{name} is {values['dead']}." for name, values in results["variants"].items() if values.get("dead")]


def _transfer(arms: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """A sentence on transfer to unseen tokens, with the F1 that balanced accuracy does not show."""

    def means(measure: str) -> dict[str, float]:
        return _main(_means(arms, lambda _, values: (values.get("tokens") or {}).get(measure)))

    accuracy, f1 = means("transfer_top_1"), means("f1_top_1")
    if not accuracy:
        return []
    ceiling = ((results["llm"].get("tokens") or {}).get("ceiling") or {}).get("mean") or {}
    beside = (
        f" (the language model's own probe: {ceiling['transfer_top_1']:.3f})" if "transfer_top_1" in ceiling else ""
    )
    sentence = f"Transfer of the best latent to unseen tokens, balanced accuracy: {_list(accuracy)}{beside}"
    return [sentence + (f"; F1: {_list(f1)}." if f1 else ".")]


def _arms(results: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """{variant: [(run, its values) for each seed]} of the architecture and k that are compared."""
    chosen = compared(results["arms"])
    arms: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, arm in results["arms"].items():
        if (arm["architecture"], arm["k"]) == chosen:
            label = f"{arm['variant']} ({arm['tag']})" if arm["variant"] in arms else arm["variant"]
            arms[label if label not in arms else name] = [(run, results["variants"][run]) for run in arm["runs"]]
    return arms


def _means(arms: dict[str, Any], of: Callable[[str, dict[str, Any]], float | None]) -> dict[str, float]:
    found = {}
    for variant, seeds in arms.items():
        values = [of(name, values) for name, values in seeds]
        known = [value for value in values if value is not None]
        if known:
            found[variant] = sum(known) / len(known)
    return found


def _main(values: dict[str, float]) -> dict[str, float]:
    """Those of baseline, strict and adaptive that there are; all of `values` where there is none of them."""
    return {name: values[name] for name in VARIANT_ORDER if name in values} or values


def _reconstruction(arms: dict[str, Any]) -> str:
    fvu = _main(_means(arms, lambda _, values: values["fvu"]))
    if not fvu:
        return "Reconstruction was not evaluated."
    l0 = _main(_means(arms, lambda _, values: values["l0"]))
    at = f" at L0 {_range([round(value, 1) for value in l0.values()])}" if l0 else ""
    sentence = f"Held-out FVU{at}: {_list(fvu)}"
    if len(fvu) == len(VARIANT_ORDER):
        baseline, strict, adaptive = (fvu[name] for name in VARIANT_ORDER)
        if strict <= baseline:
            sentence += "; strict costs nothing here, so there is nothing for adaptive to give back"
        elif adaptive <= baseline:
            sentence += "; adaptive gives back all of what strict costs"
        elif adaptive < strict:
            sentence += f"; adaptive gives back {(strict - adaptive) / (strict - baseline):.0%} of what strict costs"
        else:
            sentence += "; adaptive costs no less than strict"
    return sentence + "."


def _coherence(arms: dict[str, Any]) -> str:
    mean = _main(_means(arms, lambda _, values: values["mean_coherence"]))
    if not mean:
        return "The dictionary's coherence was not evaluated."
    sentence = f"Mean cosine of a dictionary vector with its nearest: {_list(mean)}"
    if "baseline" in mean and len(mean) > 1:
        lower = [name for name in mean if name != "baseline" and mean[name] < mean["baseline"]]
        higher = [name for name in mean if name != "baseline" and name not in lower]
        if lower:
            sentence += f"; {_and(lower)} {'lowers' if len(lower) == 1 else 'lower'} it"
        if higher:
            sentence += f"; {_and(higher)} {'does' if len(higher) == 1 else 'do'} not lower it"
    return sentence + "."


def _probing(arms: dict[str, Any], results: dict[str, Any]) -> str:
    tasks, means = mean_probing(results)
    top_1 = _main(_means(arms, lambda name, _: means.get(name, {}).get("top_1")))
    if not top_1:
        return "Sparse probing was not evaluated."
    llm = means.get(None, {})
    beside = [f"its best single activation {llm['top_1']:.3f}"] if "top_1" in llm else []
    beside += [f"its full probe {llm['full']:.3f}"] if "full" in llm else []
    sentence = f"Top-1 probing accuracy, mean over {_count(len(tasks), 'task')}: {_list(top_1)}"
    sentence += f" (the language model: {', '.join(beside)})" if beside else ""
    wins = _task_wins(arms, tasks)
    if wins is not None:
        better, worse = wins
        sentence += f"; adaptive is ahead of baseline on {better} of {len(tasks)} and behind on {worse}"
    return sentence + "."


def _task_wins(arms: dict[str, Any], tasks: list[str]) -> tuple[int, int] | None:
    """On how many tasks adaptive's top-1 accuracy (mean over seeds) is above baseline's, and on how many below."""
    if not {"baseline", "adaptive"} <= set(arms):
        return None
    better = worse = 0
    for task in tasks:
        top_1 = _means(arms, _top_1(task))
        if not {"baseline", "adaptive"} <= set(top_1):
            return None
        better += top_1["adaptive"] > top_1["baseline"]
        worse += top_1["adaptive"] < top_1["baseline"]
    return better, worse


def _top_1(task: str) -> Callable[[str, dict[str, Any]], float | None]:
    return lambda _, values: values["probing"].get(task, {}).get("top_1")


def _inactive(arms: dict[str, Any]) -> list[str]:
    """A sentence for each gate whose error never reached its tau; one for all seeds of an arm where they are many."""
    sentences = []
    for variant, seeds in arms.items():
        unreached = [(name, values) for name, values in seeds if values["tau_reached"] is False]
        if len(unreached) < MANY_SEEDS:
            sentences += [_unreached(name, values) for name, values in unreached]
        else:
            lams = [values["training"]["final"].get("lambda") or 0.0 for _, values in unreached]
            sentences.append(
                f"{variant}: the error of {len(unreached)} of {len(seeds)} seeds never fell to tau; the soft gate left "
                f"lambda at {min(lams):.2f} to {max(lams):.2f}."
            )
    return sentences


def _cautions(arms: dict[str, Any]) -> list[str]:
    cautions = _inactive(arms)
    l0 = _means(arms, lambda _, values: values["l0"])
    if l0 and max(l0.values()) > (1 + MATCHED_L0) * min(l0.values()):
        cautions.append("L0 differs by more than 5% between variants: their FVU is not compared at equal sparsity.")
    n_seeds = min(len(seeds) for seeds in arms.values())
    if n_seeds == 1:
        cautions.append("One seed: a difference under the noise between reseeded runs is not resolved here.")
        return cautions
    spread = max(
        _deviation([values["fvu"] for _, values in seeds if values["fvu"] is not None]) for seeds in arms.values()
    )
    cautions.append(
        f"Means over {n_seeds} or more seeds; FVU varies between seeds by up to {spread:.3f} (SD), and a difference "
        "under twice that is not resolved."
    )
    return cautions


def _unreached(name: str, values: dict[str, Any]) -> str:
    """What a gate did whose error stayed above tau. A gate is a sigmoid, so its penalty may have acted all the same."""
    lam = values["training"]["final"].get("lambda") or 0.0
    if lam < INACTIVE_LAMBDA:
        consequence = "its penalty stayed off and it is a baseline"
        return f"{name} is inactive: its error never reached tau = {values['tau']:.3f}, so that {consequence}."
    return f"{name}: its error never fell to tau = {values['tau']:.3f}; the soft gate left lambda at {lam:.2f}."


def _deviation(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _list(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _range(values: list[float]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
