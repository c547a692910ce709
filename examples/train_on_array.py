"""Trains two SAEs on an array of activations and compares them: a baseline, and the adaptive variant. Takes a minute.

    python examples/train_on_array.py [ACTS.npy]

The adaptive variant penalises dictionary vectors that share a direction: more and more during training, and less while
the reconstruction suffers. Without an argument, each activation is a sum of a few out of 64 random directions in 32
dimensions. These directions are what an SAE should find.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from hafs_jax import load, preset, train


def planted(rows: int = 60_000, d_model: int = 32, features: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Activations [rows, d_model] and the directions [features, d_model] that they are sums of.

    Each direction is present in a row with probability 1/16, with a coefficient from 1 to 2.
    """
    random = np.random.default_rng(0)
    directions = random.normal(size=(features, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    present = random.random((rows, features)) < 1 / 16
    return (present * random.uniform(1, 2, (rows, features)) @ directions).astype(np.float32), directions


def main() -> None:
    directions = None
    if len(sys.argv) > 1:
        acts = np.load(sys.argv[1], mmap_mode="r")
    else:
        acts, directions = planted()
    folder = Path(tempfile.mkdtemp())

    # A preset is a whole config, for a variant and an architecture. Every field of it can be replaced.
    size = {"tokens": 400_000, "batch_size": 256, "sae": {"n_latents": 2 * acts.shape[-1], "k": 4}}
    baseline = train(preset("baseline", "batchtopk", **size), acts, folder)  # shuffled, with a held-out part
    adaptive = train(preset("adaptive", "batchtopk", **size), acts, folder)

    for run in (baseline, adaptive):
        sae = load(run.folder)
        latents = sae.encode(acts[:1000])
        error = ((np.asarray(sae.decode(latents)) - acts[:1000]) ** 2).sum() / (
            (acts[:1000] - acts[:1000].mean(0)) ** 2
        ).sum()
        final = run.result()["final"]
        print(f"{run.folder.name}: FVU {error:.3f}, L0 {float((latents > 0).sum(1).mean()):.1f}", end="")
        print(f", nearest dictionary vectors' cosine {final['coherence_mean']:.2f}", end="")
        if directions is not None:
            found = (directions @ np.asarray(sae.W_dec).T).max(1)
            print(f", {np.mean(found > 0.9):.0%} of the true directions found", end="")
        print(f" -> {run.folder}")


if __name__ == "__main__":
    main()
