"""What an extraction depends on: its config, and the `--text` flag. Standard library and numpy only.

The config is saved in every store's manifest. A store is resumed or reused only where the config is equal.
"""

import dataclasses
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, did_you_mean, option
from hafs_jax.store.manifest import DISK_DTYPES

KINDS = ("rows", "wikitext", "multiple_choice")
MODEL_DTYPES = ("float32", "bfloat16", "float16", "auto")

TEXT_SYNTAX = "[NAME=]PATH[@WEIGHT][,KEY=VALUE ...]"


@dataclass(frozen=True)
class SourceConfig:
    """One source of text: where it lies, how its records become documents, and its share of the mix."""

    name: str = option("", "what the store calls this source")
    path: str = option(
        "", "a .jsonl, .json, .txt or .parquet file, a folder of them, a dataset of the hub, or packaged data"
    )
    subset: str | None = option(None, "configuration of a hub dataset; the folder inside a local folder")
    revision: str | None = option(None, "revision of a hub dataset: branch, tag or commit; none: the newest")
    split: str = option("train", "split of a hub dataset; in a local folder, how the names of its files begin")
    kind: str = option("rows", "how records become documents", choices=KINDS)
    template: str = option("{text}", "text of a document of kind rows, with columns in braces")
    chat: str | None = option(None, "column of chat messages, made into text by the tokenizer's chat template")
    keep: str | None = option(None, "which records to read: COLUMN=VALUE, or COLUMN!=VALUE")
    weight: float = option(1.0, "share of the tokens, relative to the other sources", above=0)

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise UserError(f"source {self.name or self.path!r}: expected a name and a path; say --text {TEXT_SYNTAX}")
        check(self, f"source {self.name}: ")
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise UserError(f"source {self.name}: template {self.template!r} cannot be filled in ({error})") from None
        if not names:
            raise UserError(
                f"source {self.name}: template={self.template!r}: expected a column in braces; say template={{COLUMN}}"
            )
        if self.chat is not None and (self.kind != "rows" or self.template != "{text}"):
            raise UserError(f"source {self.name}: chat={self.chat}: expected no template and kind rows beside it")
        if self.keep is not None and not re.fullmatch(r"\w+!?=.*", self.keep):
            raise UserError(f"source {self.name}: keep={self.keep!r}: expected COLUMN=VALUE or COLUMN!=VALUE")


@dataclass(frozen=True)
class ExtractConfig:
    """Everything that decides the bytes of a store."""

    profile: str = option("", "name of the profile, and of the folder in OUT")
    model: str = option("", "name on the hub, local folder or .gguf file, or packaged model")
    revision: str | None = option(None, "revision of the model on the hub: branch, tag or commit")
    model_dtype: str = option(
        "float32",
        "dtype that the model computes in; auto: bfloat16 where the device multiplies it natively, else float32",
        choices=MODEL_DTYPES,
    )
    device: str = option("auto", "torch device; auto: CUDA where there is one")
    hook_point: str = option(
        "", "where activations are read, by its TransformerLens name; several are divided by commas"
    )
    context_length: int = option(128, "tokens in a context, BOS included", least=2, most=65_535)  # 16 bits a position
    sources: tuple[SourceConfig, ...] = option((), "text sources and their weights")
    max_rows: int | None = option(None, "training rows before the norm filter; none: all the text", least=1, most=2**40)
    heldout_fraction: float = option(
        0.05, "share of the documents in the held-out store, chosen by hash", above=0, below=1
    )
    dtype: str = option("float16", "dtype of the stored activations", choices=tuple(DISK_DTYPES))
    norm_multiple: float | None = option(
        3.0, "rows whose norm is above this multiple of the median are dropped; none: no row", above=0
    )
    shard_rows: int = option(65_536, "rows in a shard", least=1, most=2**31 - 1)
    window_gb: float | None = option(
        None,
        "GB of disk for the training rows; if they need more, they are made in windows ahead of a training, which "
        "removes them; none: all are stored",
        above=0,
    )
    batch_tokens: int = option(4_096, "tokens in a forward pass, padding included", least=1, most=2**31 - 1)
    compile: str = option(
        "auto", "torch.compile for the model's blocks; auto: from a million tokens on", choices=("auto", "on", "off")
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
        if self.window_gb is not None and len(points) > 1:
            raise UserError(f"window_gb={self.window_gb:g}: expected one hook point beside it, found {len(points)}")
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

    KEY is subset, revision, split, kind, template, chat or keep. PATH may be the name of one of `known` (the profile's
    sources) or of `datasets`, which then gives all other fields; a local folder of that name is `./NAME`. With a NAME
    among `known`, that source keeps its other fields, so that its data can be read from another place. NAME defaults to
    the dataset's, or else to the last part of the path.
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
    allowed = ("subset", "revision", "split", "kind", "template", "chat", "keep")
    for pair in pairs:
        key, value = pair.split("=", 1)
        if key not in allowed:
            raise UserError(f"--text {text}: unknown key {key!r}{did_you_mean(key, allowed)}")
        fields[key] = value.replace("\\n", "\n")
    return dataclasses.replace(base, **fields) if base else SourceConfig(**fields)


def difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first difference between two configs (plain JSON values), such as 'seed=0, not 1'; None if they are equal."""
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            path = f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}" if where else key
            if problem := difference(found.get(key), wanted.get(key), path):
                return problem
        return None
    return None if found == wanted else f"{where}={found!r}, not {wanted!r}"
