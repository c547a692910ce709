"""Peak resident memory of a training, against the arrays that it must hold, and of extractions.

Each is measured in a process of its own, which this module's command line starts:

    python -m benchmarks.memory train STORE OUT ARCHITECTURE LATENTS      prints bytes
    python -m benchmarks.memory extract MODEL OUT ROWS                    prints bytes

The model adds only its weights to the memory of an extraction, so extractions of millions of rows use a tiny model.
"""

import contextlib
import dataclasses
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, in_fresh_process

D, F, B, K, STEPS, ROWS = 576, 16_384, 2_048, 32, 6, 20_000
TRAIN_TARGET, EXTRACT_TARGET = 1.5, 0.25
_FEW = 64  # latents of a training whose own arrays are negligible
_TINY_D = 64
_WORDS, _DOCUMENT_WORDS = 5_000, 1_000


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the suite."""
    with tempfile.TemporaryDirectory(prefix="hafs-memory-") as temporary:
        store = _store(Path(temporary))
        for architecture in ("topk",) if quick else ("topk", "relu"):
            yield from _training(architecture, store, Path(temporary))
        few, many = 1_500_000, 3_000_000 if quick else 10_000_000  # 3, and 5 or 17 buckets of the shuffle
        model = _tiny_model(Path(temporary) / "model")
        peaks = [_peak("extract", str(model), str(Path(temporary) / f"rows-{rows}"), str(rows)) for rows in (few, many)]
        yield _extracting(few, many, *peaks)


def _extracting(few: int, many: int, peak_few: float, peak_many: float) -> Row:
    """The growth of the peak from `few` rows to `many`, against the bytes of the additional rows."""
    growth, added = peak_many - peak_few, (many - few) * _TINY_D * 2 / 1e6
    sizes = {"rows": many, "rows of the first": few, "peak MB": round(peak_many), "first MB": round(peak_few)}
    sizes["D"] = _TINY_D
    name = f"growth from {few:,} to {many:,} rows extracted"
    note = "peaks of two equal processes differ by some MB, so the growth may come out negative"
    return Row(name, "those rows", growth, added, "MB", growth / added, EXTRACT_TARGET, "<=", sizes, None, note)


def _training(architecture: str, store: Path, folder: Path) -> Iterator[Row]:
    """The peak above a base, against the bytes of parameters, Adam's moments and two batches, and against our budget.

    The base is the peak of the same training with 64 latents and 64 rows per step: imports, compiling, checkpoints.
    """
    from hafs_jax.store.reader import Store
    from hafs_jax.training.budget import budget
    from hafs_jax.training.loop import Stores

    base, peak = (_peak("train", str(store), str(folder / f"of-{n}"), architecture, str(n)) for n in (_FEW, F))
    needed = (3 * (2 * D * F + F + D) * 4 + 2 * B * D * 2) / 1e6
    sizes = {"F": F, "D": D, "B": B, "k": K, "steps": STEPS, "rows": ROWS, "base MB": round(base)}
    name = f"training, {architecture}"
    yield Row(name, "what it must hold", peak - base, needed, "MB", (peak - base) / needed, TRAIN_TARGET, "<=", sizes)
    said = budget(_config(architecture), Stores(Store(store))).total / 1e6
    note = "the estimate that a training prints"
    yield Row(name, "our budget", peak - base, said, "MB", (peak - base) / said, None, "<=", sizes, None, note)


def _store(folder: Path):
    import numpy as np

    from hafs_jax.store.arrays import write_array_store

    acts_ND = np.random.default_rng(0).standard_normal((ROWS, D), np.float32).astype(np.float16)
    return write_array_store(folder / "made", acts_ND, heldout_fraction=0.01)["train"]


def _config(architecture: str, latents: int = F):
    from hafs_jax.presets import preset, with_fields

    rows = min(B, latents)
    fields = {"tokens": STEPS * rows, "batch_size": rows, "steps_per_dispatch": 2}
    fields["sae"] = {"n_latents": latents, "k": min(K, latents // 2)}
    return with_fields(preset("baseline", architecture), fields)


def _peak(*arguments: str) -> float:
    """The peak memory in megabytes of a process that runs this module's command line."""
    printed, _ = in_fresh_process(["-m", "benchmarks.memory", *arguments])
    return float(printed.split()[-1]) / 1e6


def _train(store: str, out: str, architecture: str, latents: str) -> None:
    from hafs_jax.training.train import train

    train(_config(architecture, int(latents)), Path(store), Path(out))


def _tiny_model(folder: Path) -> Path:
    """A folder with a random model of Pythia's architecture, D=64, and the packaged model's tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    from hafs_extract.packaged import model_folder
    from hafs_extract.profiles import OFFLINE

    tokenizer = AutoTokenizer.from_pretrained(model_folder(OFFLINE.model), trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": _TINY_D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def _words(path: Path, words: int) -> Path:
    """A file of documents of random words, `words` words in all of them."""
    import json

    import numpy as np

    random = np.random.default_rng(0)
    known = ["".join(map(chr, random.integers(97, 123, 5))) for _ in range(_WORDS)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(-(-words // _DOCUMENT_WORDS)):
            text = " ".join(known[number] for number in random.integers(_WORDS, size=_DOCUMENT_WORDS))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _extract(model: str, out: str, rows: str) -> None:
    from hafs_extract.config import SourceConfig
    from hafs_extract.hub.presence import prepare_hub
    from hafs_extract.profiles import OFFLINE, Resolved
    from hafs_extract.run import extract

    Path(out).mkdir()
    text = _words(Path(out) / "words.jsonl", int(rows))  # each word is at least one token
    config = dataclasses.replace(
        OFFLINE,
        model=model,
        hook_point="blocks.0.hook_resid_post",
        sources=(SourceConfig("words", str(text)),),
        max_rows=int(rows),
        batch_tokens=32_768,
        compile="off",
    )
    prepare_hub(config)
    extract(config, Resolved("words", "words", "a benchmark"), Path(out))


def _most_held() -> int:
    """The peak resident memory of this process in bytes.

    Not `ru_maxrss`, which starts at the memory of the parent when it forked.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    with contextlib.redirect_stderr(io.StringIO()):
        {"train": _train, "extract": _extract}[command](*rest)
    print(_most_held())
