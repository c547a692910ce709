"""Damage to one file at a time: every reader names it in one line, or reads what was written.

`run(cases, seed)` makes one of every kind of file, damages one at random, reads it, and counts how it ended:

    named      a `UserError` of one line
    harmless   the reader returned the same
    silent     the reader returned something else: a fault
    traceback  another exception: a fault

`python -m tests.torture damage --case NUMBER --seed SEED` repeats one case; `python -m tests.torture.damage CASES SEED`
prints the table.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hafs_jax.base.checksums.sealed import sealed_line
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_figures
from hafs_jax.runs import Run
from hafs_jax.saelens_files import write_saelens
from hafs_jax.saelens_format import read_saelens
from hafs_jax.store.reader import Store
from hafs_jax.training.checkpoint import Checkpoints
from tests.support.runs import COUNTS, finished_run
from tests.support.steps import D, F, batch, fresh, one_step, small
from tests.support.stores import write_store


@dataclass(frozen=True)
class Kind:
    """A kind of file: one of them, and what reads it."""

    name: str
    path: Path
    read: Callable[[], Any]


def damaged(data: bytes, chance: random.Random) -> bytes | None:
    """The data with one damage; None: the file is deleted."""
    way = chance.choice(("byte", "bit", "bit", "zero", "truncate", "extend", "empty", "delete"))
    place = chance.randrange(len(data)) if data else 0
    if way == "delete":
        return None
    if way == "empty" or not data:
        return b""
    if way == "truncate":
        return data[:place]
    if way == "extend":
        return data + chance.randbytes(chance.choice((1, 7, 300)))
    if way == "zero":
        end = min(len(data), place + chance.choice((1, 16, 512)))
        return data[:place] + bytes(end - place) + data[end:]
    flip = 1 << chance.randrange(8) if way == "bit" else chance.randrange(1, 256)
    return data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]


def make(folder: Path) -> list[Kind]:
    """One of every kind of file in `folder`."""
    store = write_store(folder / "store" / "train", np.random.default_rng(0).normal(size=(96, D)), shard_rows=64)
    kinds = [Kind("store " + name, store / name, partial(_store, store)) for name in (
        "manifest.json", "shard-00000.npy", "shard-00001.npy", "rows-00000.npy", "contexts.npy", "tokens.npy",
        "documents.jsonl",
    )]  # fmt: skip
    run = finished_run(folder / "runs" / "baseline-s0", logged_steps=9)
    run.metrics_path.write_text("".join(sealed_line({"step": step, **COUNTS}) for step in range(9)))
    for name, read in (("config.json", run.config), ("run.json", run.summary), ("metrics.jsonl", run.metrics)):
        kinds.append(Kind(f"run {name}", run.folder / name, partial(_of_run, run, read)))
    config = small()
    state, scale = fresh(config)
    with Checkpoints(run.checkpoints) as checkpoints:
        for _ in range(2):
            state = one_step(config, state, scale, batch())[0]
            checkpoints.save(state, scale)
    steps = [path for path in sorted((run.checkpoints / "2").rglob("*")) if path.is_file()]
    kinds += [Kind("checkpoint", path, partial(_checkpoint, run, state, scale)) for path in steps]
    sae, random_ = folder / "sae", np.random.default_rng(1)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: random_.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_saelens(sae, tensors, {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": {}})
    for name in ("cfg.json", "sae_weights.safetensors", "checksums.json"):
        kinds.append(Kind(f"export {name}", sae / name, partial(read_saelens, sae)))
    result = folder / "core.json"
    write_figures(result, {"fvu": 0.25, "marks": {"core": "0" * 16}, "latents": list(range(40))})
    kinds.append(Kind("result", result, partial(read_json, result, "a result")))
    return kinds


def _store(folder: Path) -> Any:
    store = Store(folder)
    batches = [(batch.acts_BD, batch.rows_B) for batch in store.batches(50)]
    contexts = store.contexts()
    return [batches, contexts.table, contexts.tokens, store.documents(), store.manifest.fingerprint, store.manifest]


def _of_run(run: Run, read: Callable[[], Any]) -> Any:
    if not run.finished():
        raise UserError(f"{run.folder} has not finished")  # which every command says of it
    return read()


def _checkpoint(run: Run, state: Any, scale: Any) -> Any:
    """The last checkpoint; a finished run has no other."""
    with Checkpoints(run.checkpoints) as checkpoints:
        found, scale = checkpoints.restore(state, scale, 2)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((found.replace(key=0), scale))]


def same(a: Any, b: Any) -> bool:
    """Whether two values that readers returned are equal."""
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


class Files:
    """The files in a folder of their own, what each reader returns of whole ones, and a case at a time."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed, self.kinds = seed, make(folder)
        self.names = sorted({kind.name for kind in self.kinds})
        self.whole = {kind.path: kind.path.read_bytes() for kind in self.kinds}
        self.expected = {kind.path: kind.read() for kind in self.kinds}

    def case(self, number: int) -> tuple[str, str, str]:
        """(the kind of file, how it ended, what was said) of one case."""
        chance = random.Random(f"damage {self.seed} {number}")
        name = chance.choice(self.names)
        kind = chance.choice([kind for kind in self.kinds if kind.name == name])
        whole = self.whole[kind.path]
        data = damaged(whole, chance)
        try:
            if data is None:
                kind.path.unlink()
            else:
                kind.path.write_bytes(data)
            found = kind.read()
        except UserError as error:
            return name, "named" if "\n" not in str(error) else "traceback", str(error)
        except Exception as error:
            return name, "traceback", f"{kind.path}: {type(error).__name__}: {error}"
        finally:
            kind.path.write_bytes(whole)
        if same(found, self.expected[kind.path]):
            return name, "harmless", ""
        return name, "silent", str(kind.path)


def run(cases: int, seed: int) -> dict[str, Counter[str]]:
    """{kind of file: how its cases ended}; a line on stderr for each fault, with the case's number."""
    found: dict[str, Counter[str]] = {}
    folder = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        files = Files(folder, seed)
        for number in range(cases):
            name, end, said = files.case(number)
            found.setdefault(name, Counter())[end] += 1
            if end in ("silent", "traceback"):
                print(f"damage: seed {seed} case {number}: {name}: {end}: {said}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return dict(sorted(found.items()))


_made: dict[int, Files] = {}


def case(made: Any, number: int, seed: int) -> str | None:
    """What went wrong in one case; None where nothing did. `made.folder` is a folder for all cases."""
    if seed not in _made:
        _made[seed] = Files(made.folder / f"damage-{seed}", seed)
    name, end, said = _made[seed].case(number)
    return f"{name}: {end}: {said}" if end in ("silent", "traceback") else None


def faults(found: dict[str, Counter[str]]) -> int:
    """How many cases were silent or ended in a traceback."""
    return sum(counts["silent"] + counts["traceback"] for counts in found.values())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    table = run(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({name: dict(counts) for name, counts in table.items()}, indent=2))
    raise SystemExit(1 if faults(table) else 0)
