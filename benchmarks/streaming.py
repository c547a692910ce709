"""Rows per second from text to a trained SAE without a whole store, against sae_lens's own streaming trainer.

Both sides are one process each (ours with its extraction as a child), timed from start to end: loading, compiling and
checkpoints are in it. Model, text, hook point, batch, F and k are the same, activations are float16, the SAE is TopK in
float32. Ours shuffles each window as a whole and keeps a held-out store and a checkpoint; sae_lens mixes in a buffer.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.extraction import BATCH, LAYER, LENGTH
from benchmarks.harness import Row
from hafs_extract.hub.presence import prepare_hub
from hafs_extract.models import load_model, pick_dtype
from hafs_extract.packaged import model_folder
from hafs_extract.profiles import OFFLINE

TARGET = 1.0
K, TRAIN_BATCH = 32, 2_048
HELDOUT = 0.02
_ROW_BYTES = 1_200  # of float16 rows of D = 576, with their descriptions


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the suite."""
    rows = (30 if quick else 100) * TRAIN_BATCH
    prepare_hub(OFFLINE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory(prefix="hafs-streaming-") as temporary:
        seconds = {
            name: _seconds([sys.executable, *command], environment, Path(temporary))
            for name, command in {
                "ours": _ours(rows, Path(temporary) / "ours"),
                "sae_lens": ["-m", "benchmarks.streaming", str(rows)],
            }.items()
        }
    ours, theirs = rows / seconds["ours"], rows / seconds["sae_lens"]
    sizes = {"rows": rows, "model": OFFLINE.model, "layers": LAYER + 1, "L": LENGTH, "F": 2_304, "k": K}
    sizes |= {"B": TRAIN_BATCH, "dtype": pick_dtype("auto")}
    note = f"ours {seconds['ours']:.0f} s with {HELDOUT:.0%} held-out rows more, sae_lens {seconds['sae_lens']:.0f} s"
    yield Row(
        "text to SAE, streamed", "sae_lens", ours, theirs, "rows/s", ours / theirs, TARGET, ">=", sizes, None, note
    )


def _seconds(command: list[str], environment: dict[str, str], log: Path) -> float:
    """The wall time of a command; `RuntimeError` where it fails."""
    began = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr[-2_000:]}")
    return time.perf_counter() - began


def _ours(rows: int, out: Path) -> list[str]:
    """Our command: windows of a tenth of the rows."""
    window_gb = 5.2 * rows / 10 * _ROW_BYTES / 1e9
    flags = f"--max-rows {rows} --window-gb {window_gb:g} --heldout-fraction {HELDOUT} --norm-multiple none"
    sae = ["--arch", "topk", "--sae.k", str(K), "--sae.expansion", "4", "--batch-size", str(TRAIN_BATCH)]
    place = ["--out", str(out), "--profile", "offline", "--tokens", str(rows)]
    return ["-m", "hafs_jax", "train", *sae, *place, "--stream", flags]


def _sae_lens(rows: int) -> None:
    """sae_lens's training of `rows` rows; runs in a process of its own."""
    import torch
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    from benchmarks.extraction import texts

    model = load_model(OFFLINE.model, pick_dtype("auto"))
    documents = Dataset.from_dict({"text": [text for text, _ in texts(model, 2 * rows)]})
    width = model.info.d_model
    del model
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=width, d_sae=4 * width, k=K),
        dataset_path="",
        is_dataset_tokenized=False,
        streaming=False,
        model_name=str(model_folder(OFFLINE.model)),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": getattr(torch, pick_dtype("auto"))},
        hook_name=f"model.layers.{LAYER}",
        context_size=LENGTH,
        training_tokens=rows,
        train_batch_size_tokens=TRAIN_BATCH,
        store_batch_size_prompts=BATCH,
        n_batches_in_buffer=rows // 10 // LENGTH,
        dtype="float32",
        device="cpu",
        n_eval_batches=0,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    LanguageModelSAETrainingRunner(config, override_dataset=documents).run()


if __name__ == "__main__":
    _sae_lens(int(sys.argv[1]))
