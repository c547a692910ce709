"""Many trainings in one process: its memory, maps, descriptors and threads stay as they are."""

import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hafs_jax.api import load
from hafs_jax.presets import preset, with_fields
from hafs_jax.training.train import train
from tests.support.stores import planted, write_store

SMALL = {"tokens": 640, "batch_size": 64, "evaluate_every_steps": 10, "sae": {"k": 3, "n_latents": 13}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_trainings_leave_the_process_as_one_does(tmp_path: Path) -> None:
    acts, _ = planted(512, 11, 6, 2)
    store = write_store(tmp_path / "store" / "train", acts)
    write_store(tmp_path / "store" / "heldout", acts, split="heldout")

    def cycle(seed: int) -> None:
        numbers = {"seed": seed, "optimizer": {"learning_rate": 1e-3 * (1 + seed)}}
        config = with_fields(with_fields(preset("baseline", "batchtopk"), SMALL), numbers)
        sae = load(train(config, store, tmp_path / "runs").folder)
        sae.decode(sae.encode(np.zeros((2, 11), np.float32)))

    for seed in range(3):
        cycle(seed)
    before = used()
    for seed in range(3, 10):
        cycle(seed)
    grown = {name: now - before[name] for name, now in used().items()}
    # A program that was compiled anew for each seed, rate or config grew this by 33 maps and 9 MB a training.
    assert grown["maps"] < 7 * 5 and grown["megabytes"] < 7 * 5 and grown["files"] <= 0 and grown["threads"] <= 2, grown


def used() -> dict[str, int]:
    """What the process holds."""
    gc.collect()
    (resident,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    files = len(os.listdir("/proc/self/fd"))
    return {
        "megabytes": int(resident.split()[1]) >> 10,
        "maps": maps,
        "files": files,
        "threads": threading.active_count(),
    }
