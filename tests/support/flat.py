"""Many trainings in one process, and what the process holds."""

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np

from hafs_jax.api import load
from hafs_jax.presets import preset, with_fields
from hafs_jax.training.train import train
from tests.support.stores import planted, write_store

SMALL = {"tokens": 640, "batch_size": 64, "evaluate_every_steps": 10, "sae": {"k": 3, "n_latents": 13}}
WARM = 3
"""Trainings after which a process holds what it goes on holding."""


class Trainings:
    """Small trainings on one store, each with a seed and a rate of its own."""

    def __init__(self, folder: Path) -> None:
        acts, _ = planted(512, 11, 6, 2)
        self.folder = folder
        self.store = write_store(folder / "store" / "train", acts)
        write_store(folder / "store" / "heldout", acts, split="heldout")
        self.before: dict[str, int] = {}
        self.count = 0

    def train(self, seed: int) -> None:
        numbers = {"seed": seed, "optimizer": {"learning_rate": 1e-3 * (1 + seed)}}
        config = with_fields(with_fields(preset("baseline", "batchtopk"), SMALL), numbers)
        sae = load(train(config, self.store, self.folder / "runs").folder)
        sae.decode(sae.encode(np.zeros((2, 11), np.float32)))
        self.count += 1
        if self.count == WARM:
            self.before = used()

    def grown(self) -> dict[str, int]:
        """What the process holds more than after the first trainings."""
        return {name: now - self.before[name] for name, now in used().items()}

    def problem(self) -> str | None:
        """What has grown, if it is more than noise.

        A program that was compiled anew for each seed, rate or config took 33 maps and 9 MB a training. Metadata that
        TensorStore never freed took 1,280 objects; 92 are left.
        """
        grown, after = self.grown(), self.count - WARM
        deadline = time.monotonic() + 10
        while grown["threads"] > 2 and time.monotonic() < deadline:  # Orbax's end in their own time
            time.sleep(0.1)
            grown = self.grown()
        is_flat = grown["maps"] < 10 + 2 * after and grown["megabytes"] < 20 + after / 2
        is_flat = is_flat and grown["objects"] < 3000 + 300 * after and grown["descriptors"] <= 0
        return None if is_flat and grown["threads"] <= 2 else f"{after} trainings added {grown}"


def used() -> dict[str, int]:
    """What the process holds."""
    gc.collect()
    (resident,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    descriptors = len(os.listdir("/proc/self/fd"))
    return {
        "megabytes": int(resident.split()[1]) >> 10,
        "maps": maps,
        "descriptors": descriptors,
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }
