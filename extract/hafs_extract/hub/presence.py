"""Whether the model hub can be used, and whether it is needed; decided in seconds, before a hub library is imported.

Where the hub does not answer, the hub libraries retry for minutes. They read `HF_HUB_OFFLINE` only once, when they are
imported. So we ask here first, with one request of bounded time, and call `go_offline` before they are imported.
Standard library only.
"""

import http.client
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hafs_extract import packaged
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_jax.base.errors import UserError
from hafs_jax.base.hub import endpoint

PROBE_SECONDS = 3.5
REMEMBERED_SECONDS = 60.0  # a command asks once; a session of hours asks again

_answers: dict[str, tuple[float, str | None]] = {}


def token() -> str | None:
    """The user's token, where huggingface_hub looks for it: HF_TOKEN, else the file that `hf auth login` writes."""
    if _is_true(os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None
    found = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not found:
        try:
            found = Path(os.environ.get("HF_TOKEN_PATH") or _home() / "token").expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
    return "".join(found.split()) or None


def probed_file(config: ExtractConfig) -> str:
    """The path of a small file of what `config` takes from the hub: of its model, or else of its first dataset."""
    model, datasets = hub_needs(config)
    if model:
        return model_file(model, config.revision)
    return f"datasets/{datasets[0].path}/resolve/{datasets[0].revision or 'main'}/README.md" if datasets else ""


def model_file(name: str, revision: str | None = None) -> str:
    """The path on the hub of the config of the model `name`."""
    return f"{name}/resolve/{revision or 'main'}/config.json"


def hub_problem(path: str = "", seconds: float = PROBE_SECONDS) -> str | None:
    """Why the hub cannot be used, or None if it answers. Takes at most `seconds`, whatever DNS or a proxy does.

    It is asked for `path`, with the user's token. Whatever status it answers, it is there: what a refusal means is said
    when the files are fetched. The answer is remembered for a minute, so that a command asks once. The request runs in
    a daemon thread, since a name look-up that hangs ignores all socket timeouts.
    """
    if is_offline():
        return "HF_HUB_OFFLINE is set"
    hub = endpoint()
    if hub in _answers and time.monotonic() - _answers[hub][0] < REMEMBERED_SECONDS:
        return _answers[hub][1]
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{hub}/{urllib.parse.quote(path)}", method="HEAD")
            if (known := token()) is not None:
                request.add_unredirected_header("Authorization", f"Bearer {known}")
            with _OPENER.open(request, timeout=seconds):
                outcome.append(None)
        except urllib.error.HTTPError:
            outcome.append(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome.append(f"{hub} cannot be reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    found = outcome[0] if outcome else f"{hub} did not answer within {seconds:g} s"
    _answers[hub] = time.monotonic(), found
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer too."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def is_offline() -> bool:
    """Whether the hub is not to be asked: the user said so, or `go_offline` did."""
    return _is_true(os.environ.get("HF_HUB_OFFLINE")) or _is_true(os.environ.get("TRANSFORMERS_OFFLINE"))


def go_offline() -> None:
    """Makes the hub libraries use only their cache, whether they are already imported or not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def cached_repository(kind: str, name: str) -> Path:
    """The folder in which the hub cache keeps the model or dataset (`kind`) called `name`."""
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"


def model_is_cached(name: str) -> bool:
    """Whether the hub cache holds a config and weights of the model `name`."""
    snapshots = cached_repository("model", name) / "snapshots"
    return any(
        any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        for folder in _folders(snapshots)
        if (folder / "config.json").exists()
    )


def dataset_is_cached(source: SourceConfig) -> bool:
    """Whether the cache holds the files of a source that is on the hub, or the `datasets` library's copy of them."""
    if fetched_record("dataset", source.path, source.revision, (source.subset, source.split)).exists():
        return True
    return any(prepared_folders(source.path, source.subset))


def prepared_folders(name: str, subset: str | None) -> Iterator[Path]:
    """The folders of arrow files that the `datasets` library has made of `subset` of the hub dataset `name`."""

    def plain(text: str) -> str:  # the library puts underscores between the parts and inside capitalised words
        return text.replace("/", "").replace("_", "").lower()

    found = (folder / (subset or "") for folder in _folders(_datasets_cache()) if plain(folder.name) == plain(name))
    for folder in found:
        if folder.is_dir():
            yield from sorted({path.parent for path in folder.rglob("*.arrow")})


def fetched_record(kind: str, name: str, revision: str | None, selection: tuple[str | None, ...] = ()) -> Path:
    """The file that says which commit and files were fetched when `revision` of `name` was asked for (see `files`)."""
    parts = [revision or "main", *(part or "" for part in selection)]
    return cached_repository(kind, name) / "hafs" / f"{urllib.parse.quote('@'.join(parts), safe='@')}.json"


def missing_from_cache(config: ExtractConfig) -> list[str]:
    """What `config` needs from the hub that the hub's cache does not hold."""
    model, datasets = hub_needs(config)
    missing = [f"model {model}"] if model and not model_is_cached(model) else []
    return missing + [f"dataset {s.path}" for s in datasets if not dataset_is_cached(s)]


def hub_needs(config: ExtractConfig) -> tuple[str | None, list[SourceConfig]]:
    """The model and the sources of `config` that come from the hub; None where the model does not."""
    model = None if config.model in packaged.MODELS or Path(config.model).exists() else config.model
    return model, [s for s in config.sources if s.path not in packaged.TEXTS and not Path(s.path).exists()]


def prepare_hub(config: ExtractConfig) -> None:
    """Finds out within seconds whether everything that `config` needs from the hub can be had; `UserError` if not.

    Call it before importing a hub library: where the hub is not needed or does not answer, it turns these offline.
    """
    model, datasets = hub_needs(config)
    for what in filter(None, [model, *(source.path for source in datasets)]):
        if _looks_local(what):
            raise UserError(f"{what}: no such file or folder")
    if not model and not datasets:
        go_offline()
        return
    problem = hub_problem(probed_file(config))
    if problem is None:
        return
    go_offline()
    missing = missing_from_cache(config)
    if missing:
        raise UserError(
            f"needs {', '.join(missing)} from the hub, but {problem} and the hub's cache does not hold it;"
            " use --profile offline, or name local ones with --model and --text"
        )


_FILES = (".jsonl", ".json", ".parquet", ".txt", ".gz", ".zst", ".gguf")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(_FILES)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def hub_cache() -> Path:
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or _home() / "hub"
    return Path(found).expanduser()


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE", _home() / "datasets")).expanduser()


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}
