"""What a language model is asked of a latent: a name for it, and which contexts the name fits. No files, no network."""

import random
import re
from collections.abc import Sequence
from typing import Any

NAMED_TOP, NAMED_SPREAD = (
    8,
    3,
)  # contexts that the name is made from: the top ones, and some over the quantiles
TESTED = 8  # contexts on which the latent fires, and as many of other latents, that the name is tested on
LONGEST = 120  # characters of a label
ACTIVE = 0.3  # of the latent's maximum, from which a token is marked

Context = dict[str, Any]

_NAMING = (
    "A latent of a sparse autoencoder is a direction in a language model's activations. You see texts on which one"
    " latent is active. Tokens on which it is strongly active stand between << and >>. Say in at most eight words what"
    " these tokens, in their contexts, have in common. Answer with those words alone, without quotation marks."
)
_DETECTION = (
    "You are given a description of what a latent of a sparse autoencoder is active on, and numbered texts. Answer with"
    " the numbers of the texts that fit the description, as a list such as [1, 4], or [] where none fits. Answer with"
    " the list alone."
)


def naming(latent: dict[str, Any]) -> list[dict[str, str]]:
    """The messages that ask for a name of `latent`, an entry of latents.json."""
    top, spread = _split(latent)[0]
    shown = [_marked(context, latent["max_activation"]) for context in [*top, *spread]]
    return _messages(_NAMING, "\n\n".join(shown))


def label_of(answer: str) -> str:
    """The name in an answer: its first line that is not empty, without quotation marks and the full stop."""
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    line = re.sub(r"^(label|answer|name)\s*:\s*", "", line, flags=re.IGNORECASE)
    return line.strip("\"'“”` ").rstrip(".")[:LONGEST]


def detection(
    label: str, latent: dict[str, Any], others: Sequence[dict[str, Any]], seed: int
) -> tuple[list[dict[str, str]], list[bool]] | None:
    """(the messages that ask which texts fit the label, whether each text is one of the latent's own).

    The own texts are those that the name was not made from. The others are top contexts of `others`, of documents in
    which the latent has none. None where there are fewer than two of either.
    """
    used, fresh = _split(latent)
    known = {context["document"] for part in (*used, *fresh) for context in part}
    own = [context for part in fresh for context in part][:TESTED]
    chance = random.Random(seed)
    rest = [context for other in others for context in other["contexts"][:3] if context["document"] not in known]
    rest = chance.sample(rest, min(len(own), len(rest)))
    if min(len(own), len(rest)) < 2:
        return None
    texts = [(context, True) for context in own] + [(context, False) for context in rest]
    chance.shuffle(texts)
    lines = [f"{number}. {_plain(context)}" for number, (context, _) in enumerate(texts, 1)]
    return _messages(_DETECTION, f"Description: {label}\n\n" + "\n\n".join(lines)), [is_own for _, is_own in texts]


def detected(answer: str, n: int) -> set[int] | None:
    """The numbers, from 1 to `n`, in the last list of an answer; None where it holds no list."""
    lists = re.findall(r"\[([\d\s,]*)\]", answer)
    return {number for number in map(int, re.findall(r"\d+", lists[-1])) if 1 <= number <= n} if lists else None


def balanced_accuracy(found: set[int], is_own: Sequence[bool]) -> float:
    """The mean of two shares: of the latent's own texts that were found, and of the others that were not."""
    rates = []
    for wanted in (True, False):
        numbers = [number for number, own in enumerate(is_own, 1) if own == wanted]
        rates.append(sum((number in found) == wanted for number in numbers) / len(numbers))
    return sum(rates) / 2


def _split(latent: dict[str, Any]) -> tuple[tuple[list[Context], list[Context]], tuple[list[Context], list[Context]]]:
    """((top contexts, contexts at quantiles) for the name, the same for its test); no document is in both."""
    top, spread = latent["contexts"], latent.get("random_contexts") or []
    named = top[::2][:NAMED_TOP], spread[::3][:NAMED_SPREAD]
    documents = {context["document"] for part in named for context in part}
    return named, (_without(top, documents)[: TESTED // 2], _without(spread, documents)[: TESTED // 2])


def _without(contexts: Sequence[Context], documents: set[int]) -> list[Context]:
    return [context for context in contexts if context["document"] not in documents]


def _marked(context: Context, maximum: float) -> str:
    parts = []
    for place, (token, value) in enumerate(zip(context["tokens"], context["values"], strict=True)):
        is_active = place == context["peak"] or value >= ACTIVE * maximum > 0
        parts.append(f"<<{token}>>" if is_active else token)
    return "".join(parts)


def _plain(context: Context) -> str:
    return "".join(context["tokens"])


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
