"""What an extraction has on disk: its stores, or the journal of an unfinished one. Standard library and numpy only.

A run that was killed goes on from its journal. The journal never says more than what is already synced to disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_extract.config import ExtractConfig, difference
from hafs_extract.contexts import SPLITS
from hafs_extract.loading.files import fingerprint
from hafs_extract.text.files import text_fingerprint
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_record
from hafs_jax.base.options import from_dict, option, to_dict
from hafs_jax.store.manifest import MANIFEST, read_manifest

JOURNAL = "journal.json"
WORK = ".work"
"""The folder beside the stores in which they are made. A command that is killed while it removes it leaves some."""


def profile_names(config: ExtractConfig) -> dict[str, str]:
    """Each hook point's `--profile` for later commands: <profile> for a single one, else <profile>/<hook point>."""
    several = len(config.hook_points) > 1
    return {hook: f"{config.profile}/{hook}" if several else config.profile for hook in config.hook_points}


def store_folders(config: ExtractConfig, out: Path) -> dict[str, dict[str, Path]]:
    """Where the stores lie, by hook point and split: `out`/<profile name>/store/<split>."""
    return {
        hook: {split: out / name / "store" / split for split in SPLITS} for hook, name in profile_names(config).items()
    }


def work_root(config: ExtractConfig, out: Path) -> Path:
    """The folder that an extraction locks and works in: that of its stores; of several hook points, the profile's."""
    folder = out / config.profile
    return folder if len(config.hook_points) > 1 else folder / "store"


def is_complete(config: ExtractConfig, out: Path) -> bool:
    """Whether all stores are there, made with this very config.

    Raises `UserError` where one was made with another, or with other weights in the same local folder.
    """
    folders = [folder for splits in store_folders(config, out).values() for folder in splits.values()]
    made = [folder for folder in folders if (folder / MANIFEST).exists()]
    advice = "pass --force to replace it, or choose another OUT"
    recorded: dict[Path, str] = {}
    for folder in made:
        manifest = read_manifest(folder)
        wanted = to_dict(config)
        if config.model_dtype == "auto":
            wanted["model_dtype"] = manifest.config.get("model_dtype")
        if found := difference(manifest.config, wanted):
            raise UserError(f"{folder} was extracted with {found}; {advice}")
        if manifest.model.fingerprint:
            recorded[folder] = manifest.model.fingerprint
    if recorded and Path(config.model).exists():  # else the model has gone, and the stores are all there is
        now = fingerprint(Path(config.model))
        for folder, before in recorded.items():
            if before != now:
                raise UserError(
                    f"{folder} was extracted with another model at {config.model} (fingerprint {before[:12]}, now"
                    f" {now[:12]}): config, tokenizer or weights have changed; put them back, or {advice}"
                )
    for folder in made[-1:]:  # all are of the same text
        texts = {source.name: source.fingerprint for source in read_manifest(folder).sources}
        if changed := changed_text(texts, config):
            raise UserError(f"{folder} was extracted from other text: {changed}; put it back, or {advice}")
    return len(made) == len(folders)


def changed_text(recorded: Mapping[str, str | None], config: ExtractConfig) -> str | None:
    """Which local text is not what was `recorded`, by the sources' names, in words; None where none is.

    Text that is no longer there is not compared, and what was not recorded neither.
    """
    for source in config.sources:
        before = recorded.get(source.name)
        if before and (now := text_fingerprint(source)) not in (before, None):
            return f"{source.path} has changed since (fingerprint {before[:12]}, now {str(now)[:12]})"
    return None


def begun_config(config: ExtractConfig, out: Path, work: str) -> dict[str, Any] | None:
    """The resolved config of the extraction that was begun or finished in the places of `config`; None without one.

    `work` is the name of the folder of unfinished work.
    """
    if journal := read_journal(work_root(config, out) / work):
        return journal.config
    made = (folder for splits in store_folders(config, out).values() for folder in splits.values())
    return next((read_manifest(folder).config for folder in made if (folder / MANIFEST).exists()), None)


@dataclass(frozen=True)
class Journal:
    """Where an unfinished extraction stands. What the model has done lies beside it, in parts (`parts.files`)."""

    config: dict[str, Any]
    profile: dict[str, Any]
    notes: tuple[str, ...] | None = None  # for the user, about the mix of texts; None until the contexts are on disk
    model: dict[str, Any] | None = None
    commits: dict[str, Any] = option({}, "commit of each source that is a hub dataset, by its name")
    texts: dict[str, Any] = option({}, "fingerprint of each source of local files, by its name")
    has_parts: bool = False  # whether a part was made
    made_by: dict[str, Any] = option({}, "what made the newest part: `parts.making.made_by`")
    seconds: dict[str, Any] = option({}, "seconds by stage, over all attempts")
    attempts: int = 0
    made: bool = False  # whether all stores are whole, in the work folder or already in their places


def read_journal(folder: Path) -> Journal | None:
    """The journal in `folder`, or None where no extraction was begun."""
    path = folder / JOURNAL
    if not path.exists():
        return None
    values = read_json(path, "a journal")
    if "splits" in values:
        raise UserError(
            f"{folder} holds an extraction that an earlier version of hafs has begun; finish it with that version, or"
            f" delete {folder} to begin anew"
        )
    return from_dict(Journal, values, str(path))


def write_journal(folder: Path, journal: Journal) -> None:
    write_record(folder / JOURNAL, to_dict(journal))
