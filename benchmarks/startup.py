"""Seconds from the start of `hafs train` to its first logged step, with a filled and with an empty compilation cache.

Each start is a process of its own, with the cache in a temporary folder. The first logged step is the first line of
metrics.jsonl. The suite looks for it every `POLL_SECONDS`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, Times
from hafs_jax.store.arrays import write_array_store

D, F, B, ROWS = 576, 2_304, 1_024, 20_000
TARGET = 0.6
POLL_SECONDS = 0.02
LIMIT_SECONDS = 300.0


def measure(quick: bool) -> Iterator[Row]:
    """The row of the suite."""
    with tempfile.TemporaryDirectory(prefix="hafs-startup-") as temporary:
        folder = Path(temporary)
        acts_ND = np.random.default_rng(0).standard_normal((ROWS, D), np.float32).astype(np.float16)
        store = write_array_store(folder / "made", acts_ND, heldout_fraction=0.01)["train"]
        cold, warm = [], []
        for number in range(1 if quick else 3):
            cache = folder / f"cache-{number}"
            cold.append(_first_step_seconds(store, folder / f"cold-{number}", cache))
            warm.append(_first_step_seconds(store, folder / f"warm-{number}", cache))
        ours, theirs = Times(tuple(warm)), Times(tuple(cold))
        sizes = {"F": F, "D": D, "B": B, "architecture": "batchtopk", "rounds": len(warm)}
        yield Row(
            "start to first step, warm",
            "cold",
            ours.median,
            theirs.median,
            "s",
            ours.median / theirs.median,
            TARGET,
            "<=",
            sizes,
            (min(warm), max(warm)),
            "warm: with the compilation cache that the cold start filled; both import all modules",
        )


def _first_step_seconds(store: Path, out: Path, cache: Path) -> float:
    """The seconds until a new training writes its first line of metrics. The training is then stopped."""
    command = [sys.executable, "-m", "hafs_jax", "train", "--store", str(store), "--out", str(out)]
    command += ["--batch-size", str(B), "--sae.n-latents", str(F), "--tokens", str(ROWS), "--log-every-steps", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            while time.perf_counter() - started < LIMIT_SECONDS:
                if any(path.stat().st_size for path in out.glob("runs/*/metrics.jsonl")):
                    return time.perf_counter() - started
                if process.poll() is not None:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
        raise RuntimeError(f"no step was logged: {process.communicate()[0].decode()[-2000:]}")
