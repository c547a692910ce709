"""The files of models and datasets on the hub: which are needed, of which commit, fetched into its cache and checked.

A repository is asked once for its commit and its files' sizes and checksums. Every file is then read in that commit.
Downloaded bytes are compared with what was stated: the size, the SHA-256 of a large file, the git hash of a small one.
What differs, such as an error page in an answer 200, is refused and does not stay in the cache. Must not import torch.
"""

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hafs_extract import packaged
from hafs_extract.config import SourceConfig
from hafs_extract.hub.presence import cached_repository, fetched_record, is_offline, prepared_folders
from hafs_extract.loading.files import refuse_adapter, refuse_quantised
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_record
from hafs_jax.base.hub import connect, endpoint, hub_errors
from hafs_jax.base.options import did_you_mean

LOG = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
_NOTED_BYTES = 50 << 20  # a download of more is told beforehand


@dataclass(frozen=True)
class HubFile:
    """A file as the hub states it. What it does not state is None."""

    path: str
    size: int | None = None  # bytes
    sha256: str | None = None  # of a large file (Git LFS)
    blob: str | None = None  # of a small file: the SHA-1 of git's object


@dataclass(frozen=True)
class Fetch:
    """Files of one commit: those needed, and those that the cache lacks."""

    kind: str  # "model" or "dataset"
    name: str
    commit: str | None  # None: unknown, since the cache does not tell it
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...] = ()
    records: tuple[Path, ...] = ()  # where to note that all are there

    @property
    def folder(self) -> Path:
        """The commit's folder in the cache."""
        return cached_repository(self.kind, self.name) / "snapshots" / str(self.commit)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / file.path for file in self.files]

    @property
    def missing_bytes(self) -> int:
        return sum(file.size or 0 for file in self.missing)

    def check_access(self) -> None:
        """Raises `UserError` where the hub refuses the missing files to this user: it is gated, say. Fetches none."""
        if not self.missing:
            return
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with hub_errors(self.kind, self.name):
            url = hf_hub_url(self.name, self.missing[0].path, repo_type=self.kind, revision=self.commit)
            get_hf_file_metadata(url)

    def run(self) -> "Fetch":
        """Fetches and checks what is missing; `UserError` where that fails. The same fetch with nothing missing."""
        if self.missing_bytes > _NOTED_BYTES:
            LOG.info(f"fetching {self.kind} {self.name} from {endpoint()}: {self.missing_bytes / 1e6:,.0f} MB")
        for file in self.missing:
            _download(self.kind, self.name, self.commit, file)
            if (self.kind, file.path) == ("model", "config.json"):  # comes before the weights
                config = read_json(self.folder / file.path, "a model's config")
                refuse_quantised(f"model {self.name}", config)
        values = {"commit": self.commit, "files": [dataclasses.asdict(file) for file in self.files]}
        for record in self.records:
            write_record(record, values)
        return dataclasses.replace(self, missing=(), records=())


def plan_model(name: str, revision: str | None) -> Fetch:
    """The files of a model of the hub: config, tokenizer and weights. Where the cache has them, no hub is asked.

    Without a `revision` the hub is asked for the newest commit, if it is there. Raises `UserError` for a model that it
    does not have, or has without weights.
    """
    return _plan("model", name, revision, (), lambda files, commit: _model_files(name, files)) or _cached_model(
        name, revision
    )


def plan_dataset(source: SourceConfig) -> Fetch:
    """The files of the split of the hub dataset that `source` reads; as `plan_split`."""
    try:
        return plan_split(source.path, source.subset, source.split, source.revision)
    except UserError as error:
        raise UserError(f"source {source.name}: {error}{did_you_mean(source.path, packaged.TEXTS)}") from error


def plan_split(name: str, subset: str | None, split: str, revision: str | None) -> Fetch:
    """The files of a split of a dataset of the hub; as `plan_model`.

    Offline, they may be known only to the `datasets` library: then there are none here.
    """

    def choose(files: dict[str, HubFile], commit: str) -> list[HubFile]:
        data = [file for path, file in files.items() if Path(path).suffix not in ("", ".md", ".py")]
        Fetch("dataset", name, commit, (), tuple(data[:1])).check_access()  # `datasets` would not name a gate
        return [files.get(path, HubFile(path)) for path in _split_files(name, subset, split, commit)]

    found = _plan("dataset", name, revision, (subset, split), choose)
    return found or Fetch("dataset", name, _prepared_commit(name, subset, revision), ())


def repository(kind: str, name: str, revision: str | None = None) -> tuple[str, dict[str, HubFile]]:
    """The commit that `revision` (the newest) of a repository is now, and its files by path, as the hub states them."""
    connect()
    from huggingface_hub import HfApi

    with hub_errors(kind, name):
        info: Any = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
        files = {found.rfilename: _stated(found) for found in info.siblings or ()}
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise UserError(f"expected a commit of 40 hex digits, found {commit[:60]!r}")
    return commit, files


def _stated(found: Any) -> HubFile:
    """What the API says of a file, or as much of that as has the right form."""
    lfs = found.lfs or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    size = found.size if isinstance(found.size, int) else None
    is_large = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
    blob = found.blob_id if isinstance(found.blob_id, str) and COMMIT.fullmatch(found.blob_id) else None
    return HubFile(found.rfilename, size, sha256 if is_large else None, None if is_large else blob)


def _plan(
    kind: str,
    name: str,
    revision: str | None,
    selection: tuple[str | None, ...],
    choose: Callable[[dict[str, HubFile], str], Sequence[HubFile]],
) -> Fetch | None:
    """What to fetch; None where the hub is not to be asked and no fetch of the same is recorded."""
    record = fetched_record(kind, name, revision, selection)
    if is_offline() or COMMIT.fullmatch(revision or ""):
        known = _recorded(kind, name, record)
        if known or is_offline():
            return known
    commit, files = repository(kind, name, revision)
    of_commit = fetched_record(kind, name, commit, selection)
    if known := _recorded(kind, name, of_commit):
        return dataclasses.replace(known, records=(record,)).run()
    chosen = tuple(choose(files, commit))
    plan = Fetch(kind, name, commit, chosen, (), (of_commit, record))
    missing = tuple(file for file in chosen if not (plan.folder / file.path).exists())
    return dataclasses.replace(plan, missing=missing)


def _recorded(kind: str, name: str, record: Path) -> Fetch | None:
    """The fetch that `record` notes, if all of its files are still there."""
    if not record.exists():
        return None
    values = read_json(record, "a note of fetched files")
    known = Fetch(kind, name, values["commit"], tuple(HubFile(**file) for file in values["files"]))
    return known if all(path.exists() for path in known.paths) else None


def _cached_model(name: str, revision: str | None) -> Fetch:
    """A model that another program has put into the cache, offline."""
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        reference = cached_repository("model", name) / "refs" / commit
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    found = Fetch("model", name, commit, ())
    if not commit or not (found.folder / "config.json").exists():
        raise UserError(
            f"model {name!r} does not load from hub: it is not asked, and its cache holds no"
            f" {'commit ' + commit if commit else revision or 'main'} of the model"
        )
    return found


def _prepared_commit(name: str, subset: str | None, revision: str | None) -> str | None:
    """The commit of what the `datasets` library has prepared of a dataset: it names folders so."""
    names = [folder.name for folder in prepared_folders(name, subset)]
    commits = [name for name in names if COMMIT.fullmatch(name)]
    if revision in commits:
        return revision
    return commits[0] if len(names) == 1 and commits else None


def _model_files(name: str, files: dict[str, HubFile]) -> list[HubFile]:
    """Those of a model's files that transformers reads: one form of the weights, and what lies beside them."""
    refuse_adapter(f"model {name}", files)
    if "config.json" not in files:
        raise UserError(f"model {name}: the hub has no config.json there; is it a model of transformers?")
    found = (
        _weights(files, "model.safetensors", "model*.safetensors")
        or _weights(files, "pytorch_model.bin", "pytorch_model*.bin")
        or sorted(path for path in files if fnmatch(path, "*.safetensors") and "/" not in path)
    )
    if not found:
        raise UserError(f"model {name}: the hub has no weights there, neither *.safetensors nor pytorch_model*.bin")
    unread = [path for path in files if path.endswith(".index.json") and path.split(".")[0] != found[0].split(".")[0]]
    beside = [
        path
        for path in files
        if "/" not in path and path not in unread and any(fnmatch(path, like) for like in _BESIDE_WEIGHTS)
    ]
    return [files[path] for path in [*sorted(beside), *found]]


def _weights(files: dict[str, HubFile], whole: str, parts: str) -> list[str]:
    """The single file `whole`, or else the `parts` that an index names."""
    if whole in files:
        return [whole]
    if f"{whole}.index.json" in files:
        return sorted(path for path in files if "/" not in path and fnmatch(path, parts) and "-of-" in path)
    return []


def _split_files(name: str, subset: str | None, split: str, commit: str) -> list[str]:
    """The paths of the files of a dataset's split, as the `datasets` library finds them."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask another host, which need not be in reach
    with hub_errors("dataset", name):
        builder = datasets.load_dataset_builder(name, subset, revision=commit)
        by_split = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    whole = re.split(r"[\[+]", split, maxsplit=1)[0]
    if whole not in by_split:
        found = ", ".join(by_split) or "none"
        raise UserError(f"dataset {name} has no split {whole!r}; found {found}; say split=NAME in --text")
    start = f"hf://datasets/{name}@{commit}/"
    return [path.removeprefix(start) for path in by_split[whole] if path.startswith(start)]


def _download(kind: str, name: str, commit: str | None, file: HubFile) -> None:
    """Fetches one file into the cache and compares it with what the hub states; `UserError` where they differ."""
    connect()
    from huggingface_hub import hf_hub_download

    with hub_errors(kind, name):
        path = Path(hf_hub_download(name, file.path, repo_type=kind, revision=commit))
    if problem := difference(path, file):
        for part in {path, Path(os.path.realpath(path))}:
            part.unlink(missing_ok=True)
        raise UserError(f"{kind} {name}: {file.path}: {problem}; it is not kept: give the same command again")


def difference(path: Path, file: HubFile) -> str | None:
    """How the file at `path` differs from what the hub states; None where it does not.

    Where the API states no checksum, the ETag does: the cache calls the content by it, and that of a large file is its
    SHA-256.
    """
    size, by_etag = path.stat().st_size, Path(os.path.realpath(path)).name
    sha256 = file.sha256 or (by_etag if file.blob is None and _SHA256.fullmatch(by_etag) else None)
    if file.size is not None and size != file.size:
        return f"expected {file.size:,} bytes, found {size:,}{_page(path)}"
    if sha256 and (found := sha256_of(path)) != sha256:
        return f"expected sha256 {sha256[:12]}, found {found[:12]}{_page(path)}"
    if file.blob and (found := _git_hash(path, size)) != file.blob:
        return f"expected git hash {file.blob[:12]}, found {found[:12]}{_page(path)}"
    return None


def _page(path: Path) -> str:
    with open(path, "rb") as start:
        head = start.read(200).lstrip().lower()
    return " (an HTML page)" if head.startswith((b"<!doctype html", b"<html")) else ""


def _git_hash(path: Path, size: int) -> str:
    """The name that git gives to a file's content."""
    found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
