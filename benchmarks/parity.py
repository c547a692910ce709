"""Final FVU of our trainer and of other libraries' own, on the same rows in the same order from the same weights.

    python -m benchmarks.parity [--store OUT/NAME/store/train] [--architectures relu topk] [--write FILE.md]

Without --store it makes a planted store with numpy: D=64, 128 features of Zipf-like frequency, 300,000 rows, mean L0 6.

The same on all sides:

- batches and steps, learning rate and its schedule, F;
- k, or the coefficient: an L1 or L0 weight means the same to all (see tests/contract/test_parity.py);
- initial weights, centring and scale of the rows;
- the number of rows after which a latent is dead.

Each library keeps its own loss, auxiliary loss, moments of Adam, clipping and treatment of the decoder's norm.
--clip-norm sets our clipping, on the gradient of a squared error of D, as theirs is.

Two settings of dictionary_learning are changed. Its thresholds follow like ours (decay 0.99, from the first batch), and
it does not start at the geometric median. Its JumpReLU has a target L0 and is compared with our l0_loss=target.
sae_lens's is compared with our l0_loss=step.

FVU is sum |x - x_hat|^2 / sum |x - mean|^2 over held-out rows, in float64, by each library's own inference code. Ours
runs as the SAELens folder that it exports. Dead is the fraction of latents that fire on none of these rows.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
from sae_lens import SAE

from benchmarks import peers
from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.files import write_text
from hafs_jax.base.flags import Parser
from hafs_jax.config import TrainConfig
from hafs_jax.method.matryoshka import fixed_ends
from hafs_jax.presets import preset, with_fields
from hafs_jax.saelens import export_saelens
from hafs_jax.store.arrays import write_array_store
from hafs_jax.store.manifest import to_float32
from hafs_jax.store.reader import Store
from hafs_jax.training.data import Batches, input_scale
from hafs_jax.training.loop import first_state
from hafs_jax.training.state import hyperparameters
from hafs_jax.training.train import open_stores, train

ARCHITECTURES = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
COEFFICIENTS = {"relu": 1.5, "gated": 1.5, "jumprelu": 0.6}
"""Weights of L1 or L0 for a squared error of D, which give an L0 of about 6 on the planted store."""

HELDOUT_ROWS = 20_000
_ROWS_AT_ONCE = 5_000
Recon = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows in float64 -> latents and reconstruction."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One SAE at inference, on the held-out rows."""

    fvu: float
    l0: float
    dead: float


def planted(rows: int = 300_000, d_model: int = 64, features: int = 128, active: float = 6.0) -> np.ndarray:
    """Sums of randomly firing unit directions with uniform(0.5, 1.5) coefficients, an offset, and noise of 0.02."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(features, d_model)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    frequency = 1.0 / np.arange(8, 8 + features)
    frequency = np.minimum(frequency * active / frequency.sum(), 0.5)
    offset = random.normal(0.0, 0.3, d_model).astype(np.float32)
    blocks = []
    for start in range(0, rows, 20_000):
        size = (min(20_000, rows - start), features)
        codes = (random.random(size) < frequency) * random.uniform(0.5, 1.5, size)
        noise = random.normal(0.0, 0.02, (size[0], d_model))
        blocks.append((codes @ directions + offset + noise).astype(np.float32))
    return np.concatenate(blocks)


def config_of(architecture: str, library: str, options: argparse.Namespace, seed: int, variance: float) -> TrainConfig:
    """Our config for a comparison with `library`; `variance` is that of the scaled rows."""
    l0_loss, coefficient = "step", options.coefficients.get(architecture, 1.0)
    if (architecture, library) == ("jumprelu", "dictionary_learning"):
        l0_loss, coefficient = "target", variance / options.k  # then c k (L0 / k - 1)^2 is its penalty
    fields: dict[str, dict[str, Any]] = {
        "sae": {"n_latents": options.n_latents, "k": options.k, "l0_loss": l0_loss},
        "optimizer": {"learning_rate": options.learning_rate},
        "sparsity": {"coefficient": coefficient, "match_l0": False},
    }
    if options.clip_norm is not None:
        fields["optimizer"]["clip_norm"] = options.clip_norm
    config = dataclasses.replace(
        preset("baseline", architecture),
        seed=seed,
        tokens=options.steps * options.batch_size,
        batch_size=options.batch_size,
        checkpoint_every_steps=options.steps,
    )
    return with_fields(config, fields)


def train_ours(config: TrainConfig, store: Path, runs: Path) -> Recon:
    folder = train(config, store, runs, force=True).folder
    sae = SAE.load_from_disk(export_saelens(folder)).to(torch.float64)
    return lambda rows: (latents := sae.encode(rows), sae.decode(latents))


def train_theirs(library: str, config: TrainConfig, store: Path) -> Recon:
    """The other library's SAE, trained by our config on our batches from our initial weights."""
    weights, batches = first_weights(config, store), scaled_batches(config, store)
    if library == "sae_lens":
        sae = peers.fit_sae_lens(config, weights, fixed_ends(config.sae), batches)
    else:
        variance = float(input_scale(Store(store)).variance)
        sae = peers.fit_dictionary_learning(config, weights, fixed_ends(config.sae), batches, variance)
    return lambda rows: (latents := sae.encode(rows), sae.decode(latents))


def first_weights(config: TrainConfig, store: Path) -> peers.Weights:
    stores = open_stores(store)
    state = first_state(config, stores, input_scale(stores.train), hyperparameters(config))
    return {name: np.array(value) for name, value in state.params.items()}


def scaled_batches(config: TrainConfig, store: Path) -> Iterator[torch.Tensor]:
    """Our batches in our order, centred and scaled as our SAE sees them."""
    opened = Store(store)
    scale = input_scale(opened)
    mean_D, factor = np.asarray(scale.mean_D), np.asarray(scale.scale)
    for (block,) in Batches(opened, config.batch_size, config.seed).dispatches(0, config.steps, 1):
        rows = to_float32(block[0].view(np.uint16), "bfloat16") if block.dtype.name == "bfloat16" else block[0]
        yield torch.tensor((rows.astype(np.float32) - mean_D) * factor)


@torch.no_grad()
def measure(recon: Recon, rows_ND: torch.Tensor) -> Measured:
    squares, active, fired = 0.0, 0.0, None
    for part in rows_ND.split(_ROWS_AT_ONCE):
        latents, found = recon(part)
        squares += float(((part - found) ** 2).sum())
        active += float((latents > 0).sum())
        now = (latents > 0).any(0)
        fired = now if fired is None else fired | now
    assert fired is not None
    variance = float(((rows_ND - rows_ND.mean(0)) ** 2).sum())
    return Measured(squares / variance, active / len(rows_ND), 1 - float(fired.double().mean()))


def compare(options: argparse.Namespace, store: Path, work: Path) -> list[dict[str, Any]]:
    """One row for each architecture and library, with a `Measured` of each side for each seed."""
    heldout = open_stores(store).heldout(HELDOUT_ROWS)
    if heldout is None:
        raise UserError(
            f"{store}: expected a held-out store beside it, found none; make one with `hafs extract` or `hafs import`"
        )
    raw = heldout[0]
    rows = to_float32(raw.view(np.uint16), "bfloat16") if raw.dtype.name == "bfloat16" else raw
    raw_ND = torch.tensor(rows.astype(np.float64))
    scale = input_scale(Store(store))
    scaled_ND = (raw_ND - torch.tensor(np.asarray(scale.mean_D, np.float64))) * float(scale.scale)
    table: list[dict[str, Any]] = []
    done: dict[TrainConfig, Measured] = {}
    for architecture in options.architectures:
        for library in ("sae_lens", "dictionary_learning"):
            runs = []
            for seed in options.seeds:
                config = config_of(architecture, library, options, seed, float(scale.variance))
                if config not in done:
                    done[config] = measure(train_ours(config, store, work), raw_ND)
                runs.append((done[config], measure(train_theirs(library, config, store), scaled_ND)))
                print(architecture, library, seed, *runs[-1], flush=True)
            table.append({"architecture": architecture, "peer": library, "runs": runs})
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown: means over seeds, and the ratio of FVUs for each seed."""
    head = ["architecture", "peer", "FVU ours", "theirs", "L0 ours", "theirs", "dead ours", "theirs", "FVU ratio"]
    lines = [[*head, "ratio by seed", "within 2% or better"]]
    for row in rows:
        both = [[np.array(dataclasses.astuple(side)) for side in run] for run in row["runs"]]
        ours, theirs = (np.mean([run[side] for run in both], axis=0) for side in (0, 1))
        ratio = ours[0] / theirs[0]
        cells = [row["architecture"], row["peer"], f"{ours[0]:.4f}", f"{theirs[0]:.4f}", f"{ours[1]:.2f}"]
        cells += [f"{theirs[1]:.2f}", f"{ours[2]:.1%}", f"{theirs[2]:.1%}", f"{ratio:.3f}"]
        by_seed = ", ".join(f"{run[0][0] / run[1][0]:.3f}" for run in both)
        lines.append([*cells, by_seed, "yes" if ratio <= 1.02 else "NO"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a training store with a held-out one beside it [a planted one]")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds to train [0 1]")
    parser.add_argument("--steps", type=int, default=1504, help="steps of each training [1504]")
    parser.add_argument("--batch-size", type=int, default=256, help="B, rows per step [256]")
    parser.add_argument("--n-latents", type=int, default=128, help="F, the number of latents [128]")
    parser.add_argument("--k", type=int, default=6, help="active latents per row [6]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate [0.003]")
    parser.add_argument("--clip-norm", type=float, help="our largest norm of the gradient [our default]")
    parser.add_argument("--coefficient", action="append", default=[], metavar="ARCH=VALUE", help="weight of L1 or L0")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table, as Markdown")
    options = parser.parse_args(arguments)
    options.coefficients = dict(COEFFICIENTS)
    for given in options.coefficient:
        name, _, value = given.partition("=")
        try:
            options.coefficients[name] = float(value)
        except ValueError:
            name = ""
        if name not in COEFFICIENTS:
            raise UserError(f"--coefficient {given}: expected ARCH=NUMBER with ARCH one of {', '.join(COEFFICIENTS)}")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work, store = Path(folder) / "runs", options.store
        if store is None:
            rows = planted()
            store = write_array_store(
                Path(folder) / "planted", rows, name="planted", heldout_fraction=HELDOUT_ROWS / len(rows)
            )["train"]
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            rows_found = compare(options, store, work)
    table = markdown(rows_found)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("sae-lens", "dictionary-learning", "torch"))
    command = "python -m benchmarks.parity " + " ".join(arguments)
    note = f"`{command.strip()}`: {versions}, jax {jax.__version__}; seeds {', '.join(map(str, options.seeds))}, "
    note += f"B={options.batch_size}, {options.steps} steps, F={options.n_latents}, k={options.k}, "
    note += f"learning rate {options.learning_rate:g}, coefficients {options.coefficients}; "
    note += f"{time.perf_counter() - started:.0f} s."
    print(table)
    print(note)
    if options.write:
        write_text(options.write, f"{table}\n{note}\n")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
