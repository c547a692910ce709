"""Whether the model hub can be used, and whether it is needed; decided in seconds, before a hub library is imported.

Where the hub does not answer, the hub libraries retry for minutes. They read `HF_HUB_OFFLINE` only once, when they are
imported. So we ask here first, with one request of bounded time, and call `go_offline` before they are imported.
"""

import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from hafs_extract import packaged
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_jax.base.errors import UserError

PROBE_SECONDS = 3.5
PROBED_FILE = "EleutherAI/pythia-70m-deduped/resolve/main/config.json"


def hub_problem(seconds: float = PROBE_SECONDS) -> str | None:
    """Why the hub cannot be used, or None if it answers. Takes at most `seconds`, whatever DNS or a proxy does.

    The request runs in a daemon thread, since a name look-up that hangs ignores all socket timeouts.
    """
    if _is_true(os.environ.get("HF_HUB_OFFLINE")) or _is_true(os.environ.get("TRANSFORMERS_OFFLINE")):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    outcome: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(f"{endpoint}/{PROBED_FILE}", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                outcome.append(None)
        except urllib.error.HTTPError as error:
            outcome.append(f"{endpoint} answers {error.code}")
        except (OSError, ValueError) as error:
            outcome.append(f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"{endpoint} did not answer within {seconds:g} s"


def go_offline() -> None:
    """Makes the hub libraries use only their cache, whether they are already imported or not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def model_is_cached(name: str) -> bool:
    """Whether the hub cache holds a config and weights of the model `name`."""
    snapshots = _hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(
        any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        for folder in _folders(snapshots)
        if (folder / "config.json").exists()
    )


def dataset_is_cached(name: str, subset: str | None) -> bool:
    """Whether the cache of the `datasets` library holds `subset` of the hub dataset `name`, ready to be read."""

    def plain(text: str) -> str:  # the library puts underscores between the parts and inside capitalised words
        return text.replace("/", "").replace("_", "").lower()

    found = (folder / (subset or "") for folder in _folders(_datasets_cache()) if plain(folder.name) == plain(name))
    return any(any(folder.rglob("*.arrow")) for folder in found if folder.is_dir())


def missing_from_cache(config: ExtractConfig) -> list[str]:
    """What `config` needs from the hub that the hub's cache does not hold."""
    model, datasets = hub_needs(config)
    missing = [f"model {model}"] if model and not model_is_cached(model) else []
    return missing + [f"dataset {s.path}" for s in datasets if not dataset_is_cached(s.path, s.subset)]


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


_FILES = (".jsonl", ".json", ".parquet", ".txt", ".gz", ".zst", ".gguf")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(_FILES)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE", _home() / "hub")).expanduser()


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE", _home() / "datasets")).expanduser()


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}
