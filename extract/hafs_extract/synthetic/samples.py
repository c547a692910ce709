"""The command `hafs synth-world`: stores and their ground truth, sampled from a world of known features. No JAX.

An activation is a bias plus, for each feature that fires, its direction times a coefficient (see `worlds`).

    OUT/synth-<world>/store/{train,heldout}   activation stores, float32, sampled independently of each other
    OUT/synth-<world>/truth.npz               features by number, level by level:
        directions_ND  [n, D] float32, unit rows        bias_D    [D] float32
        parents_N      [n] int32, -1 for a root         levels_N  [n] int32, 0 for a root
        firing_N       [n] float64, share of the training rows in which the feature fires
        indptr [rows + 1] int64, indices int32, values float32: the held-out rows' coefficients, [rows, n] in CSR form
    OUT/synth-<world>/truth.json              config, versions, checksums, true L0; written last: without it, no truth

Row i of the held-out coefficients belongs to row i of the held-out store: x_i = coefficients_i directions + bias.
Features outside the trees count as roots. There are no tokens: all rows are token 0 of one document. A run that is
killed begins anew and writes the same bytes. The first rows of a run are those of any shorter run.
"""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hafs_extract.config import difference
from hafs_extract.synthetic.worlds import WORLDS, World, build, forest, world_record
from hafs_jax.base.errors import UserError, disk_errors, one_line_errors
from hafs_jax.base.files import read_json, sha256_of, write_atomic, write_json, write_npy, write_record, write_text
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.log import bar_options
from hafs_jax.base.options import check, option, to_dict
from hafs_jax.base.places import put_in_place, sync_folder
from hafs_jax.store.holding import replacing
from hafs_jax.store.manifest import (
    CONTEXT,
    FORMAT_VERSION,
    MANIFEST,
    ROW,
    TIMING,
    Manifest,
    ModelInfo,
    NormFilter,
    SourceInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from hafs_jax.store.shards import ShardWriter, Statistics

LOG = logging.getLogger(__name__)

DESCRIPTION = """\
Sample activations from a world whose true features are known. The stores are
OUT/synth-WORLD/store/train and OUT/synth-WORLD/store/heldout. The truth is in
OUT/synth-WORLD/truth.json and truth.npz.
"""

TRUTH_VERSION = 1
TRUTH, TRUTH_ARRAYS = "truth.json", "truth.npz"
HOOK_POINT = "synthetic"

_WORK = ".sampling"
_SPLITS = ("train", "heldout")  # the position is part of the samples' seed
_BLOCK_FLOATS = 1 << 22  # coefficients drawn at once; the stores' bytes depend on it
_MEDIAN_ROWS = 1 << 22  # rows are independent, so that the median norm of so many is as good as that of all
_SPARE_BYTES = 64 << 20  # of disk space, for what is not activations


@dataclass(frozen=True)
class SyntheticConfig:
    """What decides the bytes of a world's stores and truth."""

    world: str = option(
        "toy-0", "one of the worlds below; toy-0 is for tuning, the other toys are held out", tuple(WORLDS)
    )
    samples: int = option(1_000_000, "rows of the training store", least=1, most=2**40)
    heldout_samples: int = option(
        50_000, "rows of the held-out store, whose coefficients are kept", least=1, most=2**40
    )
    seed: int = option(0, "seed of the samples; the features come from the world's own seed", least=0, most=2**63 - 1)
    shard_rows: int = option(65_536, "rows in a shard", least=1)
    device: str = option("cpu", "torch device that draws the samples, which are others on each", ("cpu", "cuda"))

    def __post_init__(self) -> None:
        check(self)

    @property
    def profile(self) -> str:
        return f"synth-{self.world}"

    def record(self) -> dict[str, Any]:
        """The config and all fields of its world, as they are saved with the stores and the truth."""
        return {"profile": self.profile, **to_dict(self), "world": world_record(self.world)}


def is_made(config: SyntheticConfig, out: Path) -> bool:
    """Whether stores and truth are there, made with this very config; `UserError` where one was made with another."""
    folder = out / config.profile
    found = {folder / "store" / split: folder / "store" / split / MANIFEST for split in _SPLITS}
    records = {store: read_manifest(store).config for store, path in found.items() if path.exists()}
    if (folder / TRUTH).exists():
        records[folder / TRUTH] = read_json(folder / TRUTH, "a world's truth").get("config", {})
    for path, record in records.items():
        if problem := difference(record, config.record()):
            raise UserError(f"{path} was made with {problem}; pass --force to replace it, or choose another OUT")
    return len(records) == len(_SPLITS) + 1 and (folder / TRUTH_ARRAYS).exists()


def generate(config: SyntheticConfig, out: Path, force: bool = False) -> Path:
    """Writes the world's stores and truth, unless they are there already, and returns their folder, OUT/<profile>.

    `force` replaces those of another config, and makes those of this one again. Memory does not grow with `samples`.
    """
    folder = out / config.profile
    work = folder / "store" / _WORK
    if not (force or work.exists()) and is_made(config, out):
        return folder
    with replacing([folder / "store"], "a sampling of a world"):
        shutil.rmtree(work, ignore_errors=True)
        if force or not is_made(config, out):
            work.mkdir()
            _check_space(config, work)
            _make(config, work)
            (folder / TRUTH).unlink(missing_ok=True)
            for split in _SPLITS:
                put_in_place(work / split, folder / "store" / split, work / f"old-{split}")
            for name in (TRUTH_ARRAYS, TRUTH):
                (work / name).replace(folder / name)
            sync_folder(folder)
            shutil.rmtree(work)
    return folder


def blocks(config: SyntheticConfig, model: Any, split: str, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `rows` samples of a split, in blocks: (activations [B, D], coefficients [B, n]), both float32.

    Each block has a seed of its own. The last one is drawn whole and then cut, so that its rows do not depend on how
    many are wanted.
    """
    import torch

    size = max(1, _BLOCK_FLOATS // model.cfg.num_features)
    for index, start in enumerate(range(0, rows, size)):
        entropy = [model.cfg.seed, config.seed, _SPLITS.index(split), index]
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
            acts_BD, values_BN = model.sample_with_features(size)
        stop = min(size, rows - start)
        yield acts_BD[:stop].cpu().numpy(), values_BN[:stop].cpu().numpy()


def _check_space(config: SyntheticConfig, folder: Path) -> None:
    rows = config.samples + config.heldout_samples
    needed = rows * (4 * WORLDS[config.world].d_model + ROW.itemsize) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB;"
            " free some, choose another OUT, or lower --samples"
        )


def _make(config: SyntheticConfig, work: Path) -> None:
    """Writes both stores, truth.npz and truth.json into `work`."""
    started = time.monotonic()
    model = build(WORLDS[config.world], _available(config.device))
    counts = {split: np.zeros(model.cfg.num_features, np.int64) for split in _SPLITS}
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of each held-out block: row lengths, indices, values
    median = 0.0
    sizes = {"train": config.samples, "heldout": config.heldout_samples}
    fingerprints = {}
    bar = tqdm(total=sum(sizes.values()), desc="sampling", unit="row", unit_scale=True, **bar_options(LOG))
    with bar:
        for split, rows in sizes.items():
            (work / split).mkdir()
            writer = ShardWriter(work / split, model.cfg.hidden_dim, "float32", config.shard_rows, 1)
            norms: list[np.ndarray] = []
            with contextlib.closing(writer):
                for acts_BD, values_BN in blocks(config, model, split, rows):
                    writer.add(acts_BD, np.zeros(len(acts_BD), ROW))
                    fires_BN = values_BN > 0
                    counts[split] += fires_BN.sum(0)
                    if split == "heldout":
                        kept.append((fires_BN.sum(1), np.nonzero(fires_BN)[1].astype(np.int32), values_BN[fires_BN]))
                    elif writer.rows < _MEDIAN_ROWS:
                        norms.append(np.linalg.norm(acts_BD, axis=1))
                    bar.update(len(acts_BD))
                median = float(np.median(np.concatenate(norms))) if norms else median
                statistics = writer.finish()
            assert statistics is not None  # at least one row
            manifest = _manifest(config, split, writer, statistics, median, work / split)
            fingerprints[split] = manifest.fingerprint
    parents_N, levels_N = forest(model)
    lengths, indices, values = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    arrays = {
        "directions_ND": model.feature_dict.feature_vectors.cpu().numpy(),
        "bias_D": model.feature_dict.bias.cpu().numpy(),
        "parents_N": parents_N,
        "levels_N": levels_N,
        "firing_N": counts["train"] / config.samples,
        "indptr": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        "indices": indices,
        "values": values,
    }
    write_atomic(work / TRUTH_ARRAYS, lambda file: np.savez(file, allow_pickle=False, **arrays))
    seconds, rows = time.monotonic() - started, sum(sizes.values())
    timing = {"seconds": seconds, "seconds_by_stage": {"model": seconds}, "attempts": 1, "device": config.device}
    for split in _SPLITS:
        more = {"tokens": rows, "tokens_per_second": rows / max(seconds, 1e-9), "padding_share": 0.0}
        write_record(work / split / TIMING, timing | more)
    truth = {
        "format_version": TRUTH_VERSION,
        "config": config.record(),
        "versions": {name: metadata.version(name) for name in ("sae-lens", "torch")},
        "stores": fingerprints,
        "arrays_sha256": sha256_of(work / TRUTH_ARRAYS),
        "features": model.cfg.num_features,
        "features_by_level": np.bincount(levels_N).tolist(),
        "true_l0": {split: float(counts[split].sum() / sizes[split]) for split in _SPLITS},
    }
    write_record(work / TRUTH, truth)


def _available(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no CUDA device; pass --device cpu")
    return device


def _manifest(
    config: SyntheticConfig, split: str, writer: ShardWriter, statistics: Statistics, median: float, folder: Path
) -> Manifest:
    """Writes the rest of a store, the manifest last, and returns the manifest."""
    context = np.zeros(1, CONTEXT)
    context["length"] = 1
    write_npy(folder / "contexts.npy", context)
    write_npy(folder / "tokens.npy", np.zeros(1, np.int32))
    write_text(folder / "documents.jsonl", f'{{"document": 0, "source": "{config.world}", "tokens": 1}}\n')
    name, d_model = f"synthetic/{config.world}", WORLDS[config.world].d_model
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        split=split,
        profile={"requested": config.profile, "resolved": config.profile, "reason": "named on the command line"},
        model=ModelInfo(name, None, f"wheel:sae-lens=={metadata.version('sae-lens')}", "float32", 0, d_model),
        tokenizer=TokenizerInfo("none", 0, None, False),
        hook_point=HOOK_POINT,
        d_model=d_model,
        dtype="float32",
        context_length=1,
        seed=config.seed,
        sources=(SourceInfo(config.world, name, 1.0, 1, writer.rows, writer.rows),),
        norm_filter=NormFilter(None, median, None, 0),
        rows=writer.rows,
        shards=tuple(writer.shards),
        files_sha256={name: sha256_of(folder / name) for name in ("contexts.npy", "tokens.npy", "documents.jsonl")},
        mean=tuple(statistics.mean_D.tolist()),
        mean_squared_norm=statistics.mean_squared_norm,
        variance=statistics.variance,
        config=config.record(),
    )
    write_manifest(folder, manifest)
    return manifest


def _shown(world: World) -> str:
    trees = f"{world.roots} trees, {world.branching} children, {world.depth} levels"
    return f"{world.n:,} features, D={world.d_model}; {trees}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; its exit code."""
    parser = Parser(
        prog="hafs synth-world",
        description=DESCRIPTION,
        epilog="worlds (children of each feature, levels below the roots):\n"
        + "\n".join(f"  {name:18}{_shown(world)}" for name, world in WORLDS.items()),
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--force", action="store_true", help="replace what another config made, or make it again")
    add_flags(parser, SyntheticConfig())
    with one_line_errors():
        options = parser.parse_args(argv)
        config = with_flags(SyntheticConfig(), options)
        if not options.force and is_made(config, options.out):
            print("the stores and the truth are there already, from this very config", file=sys.stderr)
        with disk_errors(options.out):
            folder = generate(config, options.out, options.force)
        write_json(options.out / "auto.json", {"profile": config.profile, "reason": "the world sampled last"})
        truth = read_json(folder / TRUTH, "a world's truth")
        levels = " + ".join(map(str, truth["features_by_level"]))
        print(
            f"{folder}: {config.samples:,} training and {config.heldout_samples:,} held-out rows of"
            f" {WORLDS[config.world].d_model}; {truth['features']:,} features by level {levels};"
            f" true L0 {truth['true_l0']['heldout']:.2f}"
        )
    return 0
