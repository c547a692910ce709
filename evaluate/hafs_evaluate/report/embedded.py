"""Latents as the page holds them: a table of strings, and a compact record for each run. No files, no markup.

The page embeds the records of the latents that are shown in full; `side_files` makes scripts of the others'.

The contexts of a record are unsigned LEB128 varints in base64, latent after latent: the number of top contexts, these,
the number of random contexts, these. Texts are numbers of the table of strings. A context is the varints

- source, document, title + 1 (0: it has no title), place of the peak token, number of tokens, the tokens;
- number of active tokens, and for each of them the number of silent tokens before it and its activation, in thousandths
  of the latent's `scale`.
"""

import base64
from collections import Counter
from collections.abc import Iterable
from typing import Any

from hafs_evaluate.results.arms import DEFAULT_ARCHITECTURE, compared, is_reference

MAX_VARIANTS = 8
MAX_BYTES = 8_000_000  # of all records and strings: the page stays under 10 MB
TOP_CONTEXTS, RANDOM_CONTEXTS = 20, 10  # embedded a latent
LEVELS = 1000
PARTNERS_BY = ("phi", "pmi", "share")  # how strongly two latents fire together: the first that is given is shown
PLAIN = {"index", "density", "max_activation", "logit_effect"}  # numbers with places of their own


def chosen_runs(arms: dict[str, dict[str, Any]], have: Iterable[str]) -> dict[str, str]:
    """{arm: the run whose latents are shown}: its first seed among the variants `have`, which have latents.

    Many arms are sorted, since not all fit the page: first those of the verdict's architecture and k, and references
    after the others.
    """
    known = set(have)
    main = compared(arms)

    def order(name: str) -> tuple[Any, ...]:
        arm = arms[name]
        own = (arm["architecture"], arm["k"])
        return own != main, arm["architecture"] != DEFAULT_ARCHITECTURE, is_reference(arm)

    first = {name: next((run for run in arms[name]["runs"] if run in known), None) for name in arms}
    names = list(arms) if len(arms) <= MAX_VARIANTS else sorted(arms, key=order)
    return {name: run for name in names if (run := first[name]) is not None}


def embed(latents: dict[str, dict[str, Any]], run_names: dict[str, str]) -> tuple[list[str], list[dict[str, Any]]]:
    """(the table of strings, a record for each arm) from {arm: what latents.json holds}.

    Records that do not fit the page are left out. `run_names` is {arm: its run}: `matches` names other arms by their
    runs. The most frequent strings come first, so that their numbers are short.
    """
    strings, number = table_of_strings(latent for values in latents.values() for latent in values["latents"])
    room = MAX_BYTES - sum(len(text.encode()) + 3 for text in strings)
    arm_of = arms_by_run(run_names)
    records: list[dict[str, Any]] = []
    for name, values in latents.items():
        record = record_of(name, values["latents"], number, arm_of)
        record["random_effect"] = values.get("random_logit_effect")
        size = len(record["bytes"]) + 150 * len(values["latents"])
        if records and (len(records) == MAX_VARIANTS or size > room):
            break
        room -= size
        records.append(record)
    return strings, records


def arms_by_run(run_names: dict[str, str]) -> dict[str, str]:
    """{run, or arm: the arm} from {arm: its run}."""
    return {run: name for name, run in run_names.items()} | {name: name for name in run_names}


def table_of_strings(latents: Iterable[dict[str, Any]]) -> tuple[list[str], dict[str, int]]:
    """(every string of the latents, most frequent first, {string: its number})."""
    counts = Counter(text for latent in latents for text in _strings(latent))
    strings = sorted(counts, key=lambda text: (-counts[text], text))
    return strings, {text: place for place, text in enumerate(strings)}


def record_of(
    name: str, latents: list[dict[str, Any]], number: dict[str, int], arm_of: dict[str, str]
) -> dict[str, Any]:
    """A compact record of the latents of one arm; `number` is that of each string."""
    parts = [_packed(latent, number) for latent in latents]
    partners_by = _partners_by(latents)
    pairs: dict[str, list[Any]] = {
        "partners": [
            [[other["index"], other.get(partners_by)] for other in latent.get("partners") or []] for latent in latents
        ],
        "shares_with": [
            [[other["index"], other.get("cosine"), other.get("kind", "")] for other in latent.get("shares_with") or []]
            for latent in latents
        ],
        "neighbours": [
            [[other["index"], other["cosine"]] for other in latent.get("neighbours") or [latent["nearest"]]]
            for latent in latents
        ],
        "promoted_logits": [latent.get("promoted_logits") or [] for latent in latents],
        "suppressed_logits": [latent.get("suppressed_logits") or [] for latent in latents],
        "histogram": [latent.get("histogram") for latent in latents],
        "effect": [latent.get("logit_effect") for latent in latents],
        "selective_for": [_selective_for(latent) for latent in latents],
        "matches": [
            {
                arm_of[run]: [match["index"], match.get("cosine")]
                for run, match in (latent.get("matches") or {}).items()
                if run in arm_of and arm_of[run] != name
            }
            for latent in latents
        ],
    }
    return {
        "name": name,
        "columns": _columns(latents),
        "top": [[[number[token], share] for token, share in latent["top_tokens"]] for latent in latents],
        "promoted": [[number[token] for token in latent["promoted"]] for latent in latents],
        "suppressed": [[number[token] for token in latent["suppressed"]] for latent in latents],
        "partners_by": partners_by,
        **{key: values for key, values in pairs.items() if any(values)},
        "scale": [_scale(latent) for latent in latents],
        "lengths": [len(part) for part in parts],
        "bytes": base64.b64encode(b"".join(parts)).decode(),
    }


def _columns(latents: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The numbers by which the list can be sorted: the usual ones, and any others that the entries hold."""
    columns: dict[str, list[float | None]] = {
        "index": [latent["index"] for latent in latents],
        "density": [latent["density"] for latent in latents],
        "max_activation": [latent["max_activation"] for latent in latents],
        "cosine": [latent["nearest"]["cosine"] for latent in latents],
    }
    others = dict.fromkeys(
        key for latent in latents for key, value in latent.items() if key not in PLAIN and _is_number(value)
    )
    for key in others:
        columns[key] = [latent[key] if _is_number(latent.get(key)) else None for latent in latents]
    selective = [_selectivity(latent) for latent in latents]
    if any(value is not None for value in selective):
        columns["selectivity"] = selective
    return columns


def _selectivity(latent: dict[str, Any]) -> float | None:
    """How well the latent tells the value of a label from all others: the entry's number, or its AUROC."""
    found = latent.get("selectivity")
    value = found.get("auroc") if isinstance(found, dict) else found
    return value if _is_number(value) else None


def _selective_for(latent: dict[str, Any]) -> list[Any] | None:
    """[label, value, share of the active rows that have it, share of all rows], where the entry says so."""
    found = latent.get("selectivity")
    if not isinstance(found, dict):
        return None
    return [str(found.get("label", "")), str(found.get("value", "")), found.get("share"), found.get("base")]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _partners_by(latents: list[dict[str, Any]]) -> str:
    first: dict[str, Any] = next((other for latent in latents for other in latent.get("partners") or []), {})
    return next((key for key in PARTNERS_BY if key in first), "")


def _contexts(latent: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return latent["contexts"][:TOP_CONTEXTS], (latent.get("random_contexts") or [])[:RANDOM_CONTEXTS]


def _strings(latent: dict[str, Any]) -> Iterable[str]:
    yield from (token for token, _ in latent["top_tokens"])
    yield from latent["promoted"]
    yield from latent["suppressed"]
    for contexts in _contexts(latent):
        for context in contexts:
            yield from context["tokens"]
            yield context["source"]
            if context["title"]:
                yield context["title"]


def _scale(latent: dict[str, Any]) -> float:
    """The largest activation in the latent's contexts, to five digits."""
    values = [value for contexts in _contexts(latent) for context in contexts for value in context["values"]]
    return float(f"{max([latent['max_activation'], *values]):.5g}")


def _packed(latent: dict[str, Any], number: dict[str, int]) -> bytes:
    scale = _scale(latent) or 1.0
    out = bytearray()
    for contexts in _contexts(latent):
        _varint(out, len(contexts))
        for context in contexts:
            title = number[context["title"]] + 1 if context["title"] else 0
            tokens = [number[token] for token in context["tokens"]]
            for value in (number[context["source"]], context["document"], title, context["peak"], len(tokens), *tokens):
                _varint(out, value)
            active = [place for place, value in enumerate(context["values"]) if value > 0]
            _varint(out, len(active))
            last = -1
            for place in active:
                _varint(out, place - last - 1)
                _varint(out, max(1, round(LEVELS * context["values"][place] / scale)))
                last = place
    return bytes(out)


def _varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
