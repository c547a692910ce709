"""The presets, and how `auto` chooses one. Standard library only: it runs before any hub library is imported."""

from dataclasses import dataclass
from pathlib import Path

from hafs_extract import packaged
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.hub import dataset_is_cached, go_offline, hub_problem, model_is_cached
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean

PYTHIA70M = ExtractConfig(
    profile="pythia70m",
    model="EleutherAI/pythia-70m-deduped",
    model_dtype="float32",
    hook_point="blocks.3.hook_resid_post",
    sources=(
        SourceConfig(
            name="wikitext",
            path="Salesforce/wikitext",
            subset="wikitext-103-raw-v1",
            kind="wikitext",
            weight=0.95,
        ),
        # all of its 1,273 questions are about 5% of two million tokens
        SourceConfig(
            name="wmdp-bio", path="cais/wmdp", subset="wmdp-bio", split="test", kind="multiple_choice", weight=0.05
        ),
    ),
    max_rows=2_000_000,
)

OFFLINE = ExtractConfig(
    profile="offline",
    model="local/SmolLM2-135M-Instruct",
    model_dtype="bfloat16",
    hook_point="blocks.8.hook_resid_post",
    sources=(
        SourceConfig(
            name="wikipedia",
            path="packaged/wikipedia-summaries",
            template="{extract}",
            keep="topic!=Biology and health sciences",
            weight=0.86,
        ),
        SourceConfig(
            name="biology",
            path="packaged/wikipedia-summaries",
            template="{extract}",
            keep="topic=Biology and health sciences",
            weight=0.14,
        ),
    ),
)

PRESETS = {preset.profile: preset for preset in (OFFLINE, PYTHIA70M)}


@dataclass(frozen=True)
class Resolved:
    """Which preset an extraction starts from, and why."""

    requested: str
    resolved: str
    reason: str


def resolve(requested: str) -> Resolved:
    """The profile to use for `requested`; `auto` is the hub's where the hub or its cache serves, else offline.

    Takes under 5 seconds. Where the hub is not to be asked, the hub libraries are told so.
    """
    if requested != "auto":
        if requested not in PRESETS:
            known = ("auto", *PRESETS)
            raise UserError(f"profile {requested!r}: expected {', '.join(known)}{did_you_mean(requested, known)}")
        return Resolved(requested, requested, "named on the command line")
    problem = hub_problem()
    if problem is None:
        return Resolved(requested, PYTHIA70M.profile, "the hub answers")
    go_offline()
    if not missing_from_cache(PYTHIA70M):
        return Resolved(requested, PYTHIA70M.profile, f"{problem}, but the hub's cache holds its model and text")
    return Resolved(requested, OFFLINE.profile, f"{problem}, and the hub's cache does not serve")


def missing_from_cache(config: ExtractConfig) -> list[str]:
    """What `config` needs of the hub and the hub's cache does not hold."""
    model, datasets = hub_needs(config)
    missing = [f"model {model}"] if model and not model_is_cached(model) else []
    return missing + [f"dataset {s.path}" for s in datasets if not dataset_is_cached(s.path, s.subset)]


def hub_needs(config: ExtractConfig) -> tuple[str | None, list[SourceConfig]]:
    """The model and the sources that come from the hub."""
    model = None if config.model in packaged.MODELS or Path(config.model).is_dir() else config.model
    return model, [s for s in config.sources if s.path not in packaged.TEXTS and not Path(s.path).exists()]


def prepare_hub(config: ExtractConfig) -> None:
    """Asks within seconds whether what `config` needs of the hub can be had; `UserError` naming it if not.

    Call it before importing a hub library: where the hub is not needed or does not answer, it turns them offline.
    """
    model, datasets = hub_needs(config)
    for what in filter(None, [model, *(source.path for source in datasets)]):
        if _looks_local(what):
            raise UserError(f"{what}: no such file or folder")
    if not model and not datasets:
        go_offline()
        return
    problem = hub_problem()
    if problem is None:
        return
    go_offline()
    missing = missing_from_cache(config)
    if missing:
        raise UserError(
            f"needs {', '.join(missing)} from the hub, but {problem} and the hub's cache does not hold it;"
            " use --profile offline, or name local ones with --model and --text"
        )


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".jsonl", ".parquet", ".txt"))
