"""The language model's activations on sae-probes' labelled texts, computed once for all SAEs. Torch; no jax.

sae-probes reads `<folder>/model_activations_<model>/<task>_<hook>.pt`, [texts, D], and runs a model only where that
file is missing. This module makes the file with the model that made the store, so with the same weights, dtype,
tokenizer and BOS. Of each text, cut on the left to `max_tokens`, it keeps the activation of the last token, as
sae-probes' `_process_activations` does.

    <root>/tasks/<key>.pt                    one task's activations; the key is a hash of all that they depend on
    <root>/tasks/<key>.json                  their SHA-256; what is damaged is computed again
    <root>/<hash of all tasks' keys>/...     what sae-probes is given: links to those files, under the names it reads
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from hafs_evaluate.core.texts import text_batches
from hafs_evaluate.saebench.datasets import PROBING_DATASETS
from hafs_evaluate.saebench.harness import model_short_name
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.checksums.checked import check_file, sha256_once
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_atomic, write_record
from hafs_jax.base.log import bar_options
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.manifest import Manifest

LOG = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would hold other numbers


@dataclass(frozen=True)
class Task:
    """A labelled task: one of the sae-probes wheel, or a registered dataset."""

    name: str
    sha256: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ActivationCache:
    """A folder of activations as sae-probes reads it."""

    folder: Path  # its `model_cache_path`
    model_name: str  # the model's name in the names of its files
    key: str  # a hash of its contents
    tokens: int  # run through the model to fill it this time; 0 where everything was there


def task_path(name: str) -> Path:
    """The data file of the task `name`; where there is none, `UserError` with the nearest name."""
    folder = _data_folder() / "cleaned_data"
    path = folder / f"{name}.csv.zst"
    if not path.exists():
        known = [other.name.removesuffix(".csv.zst") for other in folder.glob("*.csv.zst")] + list(PROBING_DATASETS)
        raise UserError(f"task {name!r}: sae-probes carries no such task{did_you_mean(name, known)}")
    return path


def read_task(name: str) -> Task:
    """The task `name`, its texts in the order of the file; `UserError` where it is no binary task."""
    import pandas

    if name in PROBING_DATASETS:
        dataset = PROBING_DATASETS[name]
        return Task(name, dataset.sha, tuple(text for text, _ in dataset.balanced()))
    path = task_path(name)
    table = pandas.read_csv(path, compression="zstd")
    if "prompt" not in table or table["target"].nunique() != 2:
        raise UserError(f"task {name}: expected a column of texts and two labels in {path}; leave the task out")
    texts = tuple(table["prompt"])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"task {name}: row {row} of {path} has no text, so no activation; leave the task out")
    return Task(name, sha256_of(path), texts)


def task_key(task: Task, manifest: Manifest, max_tokens: int) -> str:
    """A hash of all that a task's activations depend on."""
    return fingerprint(
        {
            "format": FORMAT,
            "model": asdict(manifest.model),
            "tokenizer": asdict(manifest.tokenizer),
            "hook_point": manifest.hook_point,
            "task": task.name,
            "task_sha256": task.sha256,
            "rows": len(task.texts),
            "max_tokens": max_tokens,
        }
    )


def fill_cache(
    tasks: Sequence[str],
    manifest: Manifest,
    root: Path,
    model: Callable[[], Any],
    max_tokens: int = 1024,
    batch_tokens: int = 4096,
) -> ActivationCache:
    """The activations of all `tasks` at the manifest's hook point; what is missing is computed with `model()`.

    A text that several tasks share is run once. Each task's file is written, atomically, as soon as it is done.
    """
    read = [read_task(name) for name in tasks]
    keys = [task_key(task, manifest, max_tokens) for task in read]
    files = [root / "tasks" / f"{key}.pt" for key in keys]
    pairs = list(zip(read, files, strict=True))
    for _, file in pairs:
        _drop_damaged(file)
    missing = [pair for pair in pairs if not pair[1].exists()]
    tokens = 0
    if missing:
        known: dict[str, Tensor] = {}
        for task, file in pairs:
            if file.exists():
                known.update(zip(task.texts, torch.load(file, weights_only=True), strict=True))
        tokens = _compute(missing, known, manifest, model(), max_tokens, batch_tokens)
    name = model_short_name(manifest)
    view = root / fingerprint(sorted(keys))
    (view / f"model_activations_{name}").mkdir(parents=True, exist_ok=True)
    for task, file in pairs:
        _link(file, view / f"model_activations_{name}" / f"{task.name}_{manifest.hook_point}.pt")
    return ActivationCache(view, name, view.name, tokens)


def _drop_damaged(file: Path) -> None:
    """Removes a task's file that is not what was written, and says so."""
    noted = file.with_suffix(".json")
    if not (file.exists() and noted.exists()):  # of the versions before there is no note
        return
    again = "the task's activations are computed again"
    try:
        check_file(file, str(read_json(noted, "a note").get("sha256")), "a task's activations", again)
    except UserError as error:
        LOG.warning(f"{error}; {again}")
        file.unlink()
        noted.unlink()


def _compute(
    missing: list[tuple[Task, Path]],
    known: dict[str, Tensor],
    manifest: Manifest,
    model: Any,
    max_tokens: int,
    batch_tokens: int,
) -> int:
    """Writes the files of the `missing` tasks and returns the number of tokens run. `known` has activations by text."""
    new_texts, seen = [], set(known)
    for task, _ in missing:
        new_texts.append([text for text in dict.fromkeys(task.texts) if text not in seen])
        seen.update(new_texts[-1])
    ids = [
        _encode(model, manifest, task, texts, max_tokens) for (task, _), texts in zip(missing, new_texts, strict=True)
    ]
    total = sum(len(each) for of_task in ids for each in of_task)
    with tqdm(total=total, desc="probing texts", unit="tok", unit_scale=True, **bar_options(LOG)) as bar:
        for (task, file), texts, of_task in zip(missing, new_texts, ids, strict=True):
            acts_ND = last_activations(model, of_task, manifest.hook_point, batch_tokens, bar.update)
            known.update(zip(texts, acts_ND, strict=True))
            of_all_ND = torch.stack([known[text] for text in task.texts])
            write_atomic(file, partial(torch.save, of_all_ND))
            write_record(file.with_suffix(".json"), {"sha256": sha256_of(file)})
    return total


def last_activations(
    model: Any,
    ids: Sequence[Int[np.ndarray, "_"]],
    hook_point: str,
    batch_tokens: int,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> Float[Tensor, "N D"]:
    """The activation at the last token of each of `ids`, float32, in the order given."""
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for batch, acts_BLD in text_batches(model, ids, hook_point, batch_tokens, progress):
        for row, index in enumerate(batch):
            found[index] = acts_BLD[row, len(ids[index]) - 1].float().cpu()
    return torch.stack(found) if found else torch.empty(0, 0)


def _encode(model: Any, manifest: Manifest, task: Task, texts: list[str], max_tokens: int) -> list[np.ndarray]:
    """The texts' token ids, with BOS in front where the store's contexts have it, cut on the left to `max_tokens`."""
    if not texts:
        return []
    bos = [manifest.tokenizer.bos_token_id] if manifest.tokenizer.prepend_bos else []
    room = max_tokens - len(bos)
    encoded = [np.concatenate([bos, ids[-room:]]).astype(np.int32) for ids in model.tokenize(texts)]
    for text, ids in zip(texts, encoded, strict=True):
        if not len(ids):
            raise UserError(
                f"task {task.name}: the text {text!r} has no token, so it has no activation; leave the task"
            )
    return encoded


def _link(file: Path, name: Path) -> None:
    """Makes `name` a link to `file`, or a copy of it where the file system has no links."""
    if name.exists():
        if name.samefile(file) or sha256_once(name) == sha256_once(file):
            return
        name.unlink()  # of an earlier file, or a damaged copy
    try:
        os.link(file, name)
    except OSError:
        with open(file, "rb") as source:
            write_atomic(name, lambda handle: shutil.copyfileobj(source, handle))


def _data_folder() -> Path:
    """Where sae-probes keeps its data. It is not imported, since that reads all 113 tasks."""
    from importlib.util import find_spec

    spec = find_spec("sae_probes")
    if spec is None or spec.origin is None:
        raise UserError("sae-probes is not installed; run `make setup`, or pip install --no-deps sae-bench sae-probes")
    return Path(spec.origin).parent / "data"
