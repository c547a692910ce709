"""SAE-Bench run inside this process: its prints, type checks, file names and output files. Imports torch, not jax."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import Manifest


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Sends SAE-Bench's prints and progress bars to a log file, and hides its libraries' warnings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_type_checks() -> Iterator[None]:
    """Turns jaxtyping's checks off, which one of SAE-Bench's functions fails. Enter it before sae_bench is imported."""
    import jaxtyping

    disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", disabled)


def read_output(folder: Path, unique_name: str) -> dict[str, Any]:
    """SAE-Bench's output file for `unique_name`, with its version in the place of the commit hash that it wrote.

    That hash is of whatever repository the working directory lies in.
    """
    (path,) = folder.glob(f"{unique_name}_*_eval_results.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    return {**values, "sae_bench_commit_hash": f"sae-bench=={version('sae-bench')}"}


def model_short_name(manifest: Manifest) -> str:
    """The last part of the model's name, which SAE-Bench puts into file names, where a slash would make a folder."""
    return manifest.model.name.rstrip("/").split("/")[-1]


def check_hook_point(hook_point: str) -> int:
    """The layer of a hook point; `UserError` for a name that SAE-Bench cannot read."""
    parts = hook_point.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise UserError(
            f"hook point {hook_point}: SAE-Bench's probing reads only blocks.<layer>.<name>; --skip probing"
        )
    return int(parts[1])
