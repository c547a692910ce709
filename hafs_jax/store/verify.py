"""Checks a whole activation store, down to each row. Standard library and numpy only."""

from pathlib import Path

import numpy as np

from hafs_jax.base.checksums.checked import sha256_once
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import MANIFEST, read_manifest, rows_name, shard_name
from hafs_jax.store.reader import Store

STATISTICS_TOLERANCE = 1e-9
"""Relative. The writer also sums in float64, but in another order."""

_ROWS_AT_ONCE = 4096
_MOST_LINES = 50


def verify(folder: Path | str) -> list[str]:
    """Every problem of the store at `folder`, one line each; empty where there is none.

    Files, shapes and checksums are checked first. Where they are right, so are the contents and the statistics.
    """
    try:
        manifest = read_manifest(Path(folder))
    except UserError as error:
        return [str(error)]
    store = object.__new__(Store)  # Store() raises at the first problem, and all are wanted here
    store.folder, store.manifest = Path(folder), manifest
    problems = store.shape_problems() or _checksum_problems(store)
    problems = problems or _context_problems(store) or _row_problems(store)
    more = len(problems) - _MOST_LINES
    return problems if more <= 0 else [*problems[:_MOST_LINES], f"and {more:,} more"]


def _checksum_problems(store: Store) -> list[str]:
    if strangers := set(store.manifest.files_sha256) - {"contexts.npy", "tokens.npy", "documents.jsonl"}:
        return [f"{store.folder / MANIFEST}: files_sha256 names {sorted(strangers)[0]!r}, which is no file of a store"]
    named = dict(store.manifest.files_sha256)
    for index, shard in enumerate(store.manifest.shards):
        named |= {shard_name(index): shard.sha256, rows_name(index): shard.rows_sha256}
    problems = []
    for name, digest in named.items():
        path = store.folder / name
        if not path.exists():
            problems.append(f"{path}: missing")
        elif (found := sha256_once(path)) != digest:
            problems.append(f"{path}: sha256 is {found[:12]}..., the manifest says {digest[:12]}...")
    return problems


def _context_problems(store: Store) -> list[str]:
    path, contexts, problems = store.folder / "contexts.npy", store.contexts(), []
    table, manifest = contexts.table, store.manifest
    ends = np.cumsum(table["length"], dtype=np.int64)
    follow_on = (table["length"] > 0).all() and (table["start"] == ends - table["length"]).all()
    if not follow_on or len(contexts.tokens) != ends[-1:].sum():
        problems.append(f"{path}: contexts do not tile tokens.npy")
    if (table["length"] > manifest.context_length).any():
        problems.append(f"{path}: a context is longer than context_length={manifest.context_length}")
    if (table["source"] >= len(manifest.sources)).any():
        problems.append(f"{path}: a source that the manifest does not list")
    documents = len(store.documents())
    if ((table["document"] < 0) | (table["document"] >= documents)).any():
        problems.append(f"{path}: a document that is not among documents.jsonl's {documents}")
    return problems


def _row_problems(store: Store) -> list[str]:
    manifest, contexts, problems = store.manifest, store.contexts(), []
    first_position = int(manifest.tokenizer.prepend_bos)
    by_source = np.zeros(len(manifest.sources), np.int64)
    total_D, squared = np.zeros(manifest.d_model), 0.0
    for index in range(len(manifest.shards)):
        rows, path = np.asarray(store.rows(index)), store.folder / rows_name(index)
        finite = True
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            values = store.read(index, start, start + _ROWS_AT_ONCE).astype(np.float64)
            finite = finite and bool(np.isfinite(values).all())
            total_D += values.sum(0)
            squared += float(np.square(values).sum())
        if not finite:
            problems.append(f"{store.folder / shard_name(index)}: holds values that are not finite")
        if ((rows["context"] < 0) | (rows["context"] >= len(contexts))).any():
            problems.append(f"{path}: a context that is not there")
            continue
        table = contexts.table[rows["context"]]
        if (rows["position"] >= table["length"]).any():
            problems.append(f"{path}: a position lies past its context's end")
            continue
        if (rows["position"] < first_position).any():
            problems.append(f"{path}: a row of a BOS token")
        if (contexts.tokens[table["start"] + rows["position"]] != rows["token"]).any():
            problems.append(f"{path}: a token differs from its context's")
        if (rows["document"] != table["document"]).any() or (rows["source"] != table["source"]).any():
            problems.append(f"{path}: a document or source differs from its context's")
        else:
            by_source += np.bincount(rows["source"], minlength=len(by_source))
    return problems or _statistics_problems(store, by_source, total_D, squared)


def _statistics_problems(store: Store, by_source: np.ndarray, total_D: np.ndarray, squared: float) -> list[str]:
    manifest, path, problems = store.manifest, store.folder / MANIFEST, []
    if by_source.tolist() != [source.rows for source in manifest.sources]:
        problems.append(f"{path}: the sources' rows are {by_source.tolist()}")
    if not manifest.rows:
        return problems
    mean_D, square = total_D / manifest.rows, squared / manifest.rows
    allowed = STATISTICS_TOLERANCE * square
    if abs(square - manifest.mean_squared_norm) > allowed:
        problems.append(f"{path}: mean_squared_norm={manifest.mean_squared_norm}, the rows' is {square}")
    off = STATISTICS_TOLERANCE * np.sqrt(square)
    if len(manifest.mean) != len(mean_D) or (np.abs(mean_D - np.asarray(manifest.mean)) > off).any():
        problems.append(f"{path}: mean differs from the rows'")
    if abs(square - float(mean_D @ mean_D) - manifest.variance) > allowed:
        problems.append(f"{path}: variance={manifest.variance}, the rows' is {square - float(mean_D @ mean_D)}")
    return problems
