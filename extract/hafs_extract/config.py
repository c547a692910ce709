"""What an extraction depends on: the frozen configs, and the `--text` flag. Standard library only.

The resolved config is saved in every store's manifest, and a store is only resumed or reused under an equal one.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, did_you_mean, option
from hafs_jax.store.manifest import KEPT_AS

KINDS = ("rows", "wikitext", "multiple_choice")
MODEL_DTYPES = ("float32", "bfloat16", "float16")

TEXT_SYNTAX = "[NAME=]PATH[@WEIGHT][,KEY=VALUE ...]"


@dataclass(frozen=True)
class SourceConfig:
    """One source of text: where it lies, how its records become documents, and its share of the mix."""

    name: str = option("", "what the store calls this source")
    path: str = option("", "local .jsonl, .parquet or .txt file or folder of them, hub dataset, or packaged data")
    subset: str | None = option(None, "the hub dataset's config; of a local folder, the folder inside it")
    split: str = option("train", "the hub dataset's split; of a local folder, how its files' names begin")
    kind: str = option("rows", "how records become documents", choices=KINDS)
    template: str = option("{text}", "a document of kind rows: its columns in braces")
    keep: str | None = option(None, "only records with COLUMN=VALUE, or without it: COLUMN!=VALUE")
    weight: float = option(1.0, "share of tokens relative to the other sources", above=0)

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise UserError(f"source {self.name or self.path!r}: expected a name and a path; say --text {TEXT_SYNTAX}")
        check(self, f"source {self.name}: ")
        if self.keep is not None and not re.fullmatch(r"\w+!?=.*", self.keep):
            raise UserError(f"source {self.name}: keep={self.keep!r}: expected COLUMN=VALUE or COLUMN!=VALUE")


@dataclass(frozen=True)
class ExtractConfig:
    """Everything that decides the bytes of a store."""

    profile: str = option("", "name of the preset, and of the folder in OUT")
    model: str = option("", "hub name, local folder, or packaged model")
    revision: str | None = option(None, "hub revision of the model: branch, tag or commit")
    model_dtype: str = option("float32", "dtype that the model computes in", choices=MODEL_DTYPES)
    device: str = option("auto", "torch device; auto takes CUDA where there is one")
    hook_point: str = option(
        "", "TransformerLens name of the activations, such as blocks.3.hook_resid_post; or several, divided by commas"
    )
    context_length: int = option(128, "tokens a context, BOS included", least=2, most=65_535)  # positions take 16 bits
    sources: tuple[SourceConfig, ...] = option((), "text sources and their weights")
    max_rows: int | None = option(
        None, "training rows before the norm filter; none takes all the text", least=1, most=2**40
    )
    heldout_fraction: float = option(
        0.05, "share of the documents, by hash, kept in the held-out store", above=0, below=1
    )
    dtype: str = option("float16", "dtype of the stored activations", choices=tuple(KEPT_AS))
    norm_multiple: float | None = option(
        3.0, "rows over this multiple of the median norm are dropped; none keeps all", above=0
    )
    shard_rows: int = option(65_536, "rows a shard", least=1, most=2**31 - 1)
    batch_tokens: int = option(4_096, "tokens a forward pass, padding included", least=1, most=2**31 - 1)
    compile: str = option(
        "auto", "torch.compile of the model's blocks; auto: from a million tokens on", choices=("auto", "on", "off")
    )
    seed: int = option(0, "seed of the held-out split and of the shuffle", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check(self)
        for name in ("profile", "model", "hook_point", "sources"):
            if not getattr(self, name):
                raise UserError(f"the extraction's config lacks {name}")
        points = self.hook_points
        if not all(points) or any(point != point.strip() for point in points) or len(set(points)) < len(points):
            raise UserError(f"hook_point={self.hook_point!r}: expected different names divided by commas alone")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"sources {', '.join(names)}: two have one name; say --text NAME=PATH")

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The hook points one by one."""
        return tuple(self.hook_point.split(","))


def parse_source(
    text: str, known: tuple[SourceConfig, ...], datasets: Mapping[str, SourceConfig] | None = None
) -> SourceConfig:
    """The source that a `--text` flag describes: `[NAME=]PATH[@WEIGHT][,KEY=VALUE ...]`.

    KEY is subset, split, kind, template or keep. PATH may also be the name of one of `known`, the profile's sources,
    or of `datasets`, which then gives all other fields. A NAME among `known` keeps that source's other fields, so that
    its data can be read from another place. NAME defaults to the dataset's, or else to the path's last part.
    """
    head, *pairs = re.split(r",(?=\w+=)", text)
    named = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?:@([\d.eE+-]+))?", head)
    if named is None:
        raise UserError(f"--text {text}: expected {TEXT_SYNTAX}")
    name, path, weight = named.groups()
    base = next((source for source in known if source.name == (name or path)), None)
    if base is None:
        base = (datasets or {}).get(path)
        path = base.path if base else path
    elif name is None:
        path = base.path
    fields: dict[str, Any] = {"path": path}
    if name or base is None:
        fields["name"] = name or Path(path).stem
    if weight is not None:
        try:
            fields["weight"] = float(weight)
        except ValueError:
            raise UserError(f"--text {text}: weight {weight!r} is not a number") from None
    allowed = ("subset", "split", "kind", "template", "keep")
    for pair in pairs:
        key, value = pair.split("=", 1)
        if key not in allowed:
            raise UserError(f"--text {text}: unknown key {key!r}{did_you_mean(key, allowed)}")
        fields[key] = value.replace("\\n", "\n")
    return dataclasses.replace(base, **fields) if base else SourceConfig(**fields)


def difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first place where two configs (plain JSON values) differ, as 'seed=0, not 1'; None if they are equal."""
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            path = f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}" if where else key
            if problem := difference(found.get(key), wanted.get(key), path):
                return problem
        return None
    return None if found == wanted else f"{where}={found!r}, not {wanted!r}"
