"""What a page may ask of the explorer: a frozen dataclass for each kind of request. Standard library only."""

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, from_dict, option

MAX_CHARACTERS = 20_000  # of a text
MAX_BODY = 1 << 17  # bytes of a request: the longest text with every character as \uXXXX
MAX_TOKENS = 512  # of a text that are read, BOS included
MAX_NEW_TOKENS = 200
MAX_RUNS = 8  # that one request may name

R = TypeVar("R")


@dataclass(frozen=True)
class Checked:
    """Raises `UserError` for a value that its `option` does not allow."""

    def __post_init__(self) -> None:
        check(self)
        runs = getattr(self, "runs", ())
        if len(runs) > MAX_RUNS or len(set(runs)) < len(runs):
            raise UserError(f"runs: expected at most {MAX_RUNS} different names, found {len(runs)}")
        if len(text := getattr(self, "text", "")) > MAX_CHARACTERS:
            raise UserError(f"the text has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}: shorten it")


@dataclass(frozen=True)
class ReadRequest(Checked):
    """The strongest latents of some runs on each token of a text."""

    text: str
    runs: tuple[str, ...]
    top: int = option(8, "latents listed for a token", least=1, most=32)


@dataclass(frozen=True)
class LatentRequest(Checked):
    """All that is known of one latent, and its activations on a text; `runs` are those to match it in."""

    run: str
    latent: int = option(0, "index", least=0)
    text: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchRequest(Checked):
    """The latents of a run that fire on a text more than elsewhere."""

    text: str
    run: str
    top: int = option(30, "latents listed", least=1, most=200)


@dataclass(frozen=True)
class CompareRequest(Checked):
    """The strongest latents of the first run on a text, each with its match in the second."""

    text: str
    runs: tuple[str, ...]
    top: int = option(30, "latents listed", least=1, most=200)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) != 2:
            raise UserError(f"runs: expected two names, found {len(self.runs)}")


@dataclass(frozen=True)
class SteerRequest(Checked):
    """The continuation of a text with one latent changed, beside the plain one."""

    text: str
    run: str
    latent: int = option(0, "index", least=0)
    mode: str = option("add", "what is done to the latent", choices=("add", "clamp"))
    strength: float = option(1.0, "multiples of the latent's maximum activation", least=-50, most=50)
    new_tokens: int = option(40, "tokens of each continuation", least=1, most=MAX_NEW_TOKENS)
    temperature: float = option(0.0, "of the sampling; 0 takes the likeliest token", least=0, most=5)
    seed: int = option(0, "of the sampling, the same for both continuations", least=0, most=2**31 - 1)


def parsed(kind: type[R], body: bytes) -> R:
    """The request of this kind in a body of JSON; `UserError` of one line where it is none."""
    try:
        values = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected a request in JSON, found something else ({str(error)[:100]})") from None
    request = from_dict(kind, _without_lone_surrogates(values), "request")
    return request


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _without_lone_surrogates(values: Any) -> Any:
    """JSON can spell halves of a character, which no tokenizer takes: each becomes U+FFFD."""
    if not isinstance(values, dict) or not isinstance(text := values.get("text"), str):
        return values
    return {**values, "text": text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")}
