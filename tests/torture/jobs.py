"""The commands that are tortured, each in a fork of this process, and what of their results must be equal."""

import faulthandler
import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.torture import layer

TRAIN = ["--tokens", "1280", "--batch-size", "64", "--steps-per-dispatch", "2", "--checkpoint-every-steps", "4"]
TRAIN += ["--log-every-steps", "2", "--sae.n-latents", "16", "--k", "3", "--evaluate-every-steps", "6"]
PLACE = ["--out", "OUT", "--profile", "p"]
MODEL = ["--out", "OUT", "--profile", "offline"]  # of the jobs with a language model
TEXTS = ["--model", "MODEL", "--text", "TEXTS", "--hook-point", "blocks.1.hook_resid_post", "--heldout-fraction", "0.3"]
TEXTS += ["--context-length", "32", "--batch-tokens", "256", "--shard-rows", "200", "--device", "cpu"]
STAGES = ["--skip", "splice", "probing", "hierarchy", "tokens", "latents", "--device", "cpu"]
COMMANDS: dict[str, list[list[str]]] = {
    "import": [["import", "ACTS", *PLACE, "--shard-rows", "200"]],
    "replace": [["import", "ACTS", *PLACE, "--shard-rows", "150", "--force"]],
    "train": [["train", *PLACE, *TRAIN]],
    "retrain": [["train", *PLACE, *TRAIN, "--force"]],
    "sweep": [["sweep", *PLACE, *TRAIN, "--grid", "seed=1..2"]],
    "export": [["export", "baseline-s0", *PLACE]],
    "extract": [["extract", *MODEL, *TEXTS]],
    "evaluate": [["evaluate", *MODEL, *STAGES]],
    "report": [["report", *MODEL]],
    "sample": [["synth-world", "--out", "OUT", "--world", "toy-1", "--samples", "3000"]],
}
"""Each job by name. It starts from what the jobs before it have left; `replace` and `retrain` from all of them."""
OF_MODELS = {"extract", "evaluate", "report", "sample"}
"""Jobs that import torch."""
UNDISTURBED = {
    "fit": [["sweep", *MODEL, *TRAIN, "--grid", "seed=1..2"]],
    "extract anew": [["extract", *MODEL, *TEXTS, "--force"]],
    "fit anew": [["sweep", *MODEL, *TRAIN, "--grid", "seed=1..2", "--force"]],
}
"""Jobs that are not tortured alone: others start from them, or `loop` has them in turn."""
START = {"import": "", "replace": "export", "train": "import", "retrain": "export", "sweep": "train", "export": "train"}
START |= {"extract": "", "fit": "extract", "evaluate": "fit", "report": "evaluate", "sample": ""}
VOLATILE = {"seconds", "tokens_per_second", "checksum", "sha256_of_above", "crc32", "of", "trained_together", "across"}
_SKIPPED = (".lock", ".locks", "checkpoints", "best", "auto.json", "timing.json", "seconds.json")
LIMIT_SECONDS = 60
_NUMBERS = itertools.count()


@dataclass
class Torture:
    """A folder with the results of `jobs` undisturbed, from which cases start."""

    folder: Path
    jobs: list[str]

    def __post_init__(self) -> None:
        acts = np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32)
        np.save(self.folder / "acts.npy", acts)
        if OF_MODELS & set(self.jobs):
            self.make_texts()
        self.words = {"ACTS": "acts.npy", "MODEL": "model", "TEXTS": "texts.jsonl"}
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.essences: dict[str, dict[str, str]] = {}
        for job in self.jobs:
            self.prepare(job)

    def make_texts(self) -> None:
        """Writes the tiny model and the texts that it reads."""
        from tests.support.tiny_models import save_jsonl, save_model, sentence

        save_model(self.folder / "model")
        save_jsonl(self.folder / "texts.jsonl", [{"text": sentence(n, 30)} for n in range(60)])

    def filled(self, command: list[str], out: Path) -> list[str]:
        """The words of a command, with paths in the place of OUT, ACTS, MODEL and TEXTS."""
        words = {"OUT": str(out)} | {word: str(self.folder / name) for word, name in self.words.items()}
        return [words.get(word, word) for word in command]

    def prepare(self, job: str) -> None:
        """Runs the job undisturbed, after those that it starts from."""
        if job in self.events:
            return
        if START[job]:
            self.prepare(START[job])
        out, started = self.fresh(job, f"of-{job}"), time.monotonic()
        code, said = self.run(job, out, after=lambda: (self.folder / "count").write_text(str(layer.events())))
        assert code == 0, f"{job} fails undisturbed: {said}"
        self.seconds[job] = time.monotonic() - started
        self.events[job] = int((self.folder / "count").read_text())
        self.essences[job] = essence(out)

    def job(self, number: int) -> str:
        """The job of the case `number`: all in turn."""
        return self.jobs[number % len(self.jobs)]

    def fresh(self, job: str, name: str = "case") -> Path:
        """A new OUT as the job finds it."""
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        if START[job]:
            shutil.copytree(self.folder / f"of-{START[job]}", out, symlinks=True)
        out.mkdir(exist_ok=True)
        return out

    def run(
        self,
        job: str,
        out: Path,
        at: int = 0,
        action: int = 0,
        log: Path | None = None,
        after: Callable[[], Any] | None = None,
        meanwhile: Callable[[int], Any] | None = None,
    ) -> tuple[int, str]:
        """Runs the job's commands in a fork: its exit code (minus a signal that ended it), and what it said on stderr.

        `after` is called in the fork at the end, `meanwhile(pid)` here.
        """
        said = self.folder / f"stderr-{next(_NUMBERS)}"
        said.touch()  # the fork may be killed before it has made it
        pid = os.fork()
        if pid == 0:
            os._exit(self._child(job, out, at, action, log, after, said))
        if meanwhile is not None:
            meanwhile(pid)
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return 124, f"hangs: {said.read_text(errors='replace')}"
            time.sleep(0.02)
        text = said.read_text(errors="replace")
        said.unlink()
        return os.waitstatus_to_exitcode(done[1]), text

    def _child(self, job: str, out: Path, at: int, action: int, log: Path | None, after: Any, said: Path) -> int:
        import sys
        import traceback

        from tqdm import tqdm

        from hafs_jax import cli

        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that was killed may have it
        err, null = open(said, "w"), open(os.devnull, "w")  # noqa: SIM115 (of this process until it ends)
        os.dup2(err.fileno(), 2)
        os.dup2(null.fileno(), 1)
        sys.stderr, sys.stdout = open(2, "w", closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        faulthandler.dump_traceback_later(LIMIT_SECONDS - 5, file=err)
        layer.arm(out, at, action, log)
        code = 0
        try:
            for command in (COMMANDS | UNDISTURBED)[job]:
                sys.argv = ["hafs", *self.filled(command, out)]
                code = cli.main() or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        if after is not None:
            after()
        sys.stderr.flush()
        return code

    def problem(self, job: str, out: Path) -> str | None:
        """What is wrong after the same command was given again, undisturbed; None where all is as it should be."""
        code, said = self.run(job, out)
        if code:
            return f"the same command again ends with {code}: {said.strip()[-4000:]}"
        return self.difference(job, out)

    def difference(self, job: str, out: Path) -> str | None:
        """What differs from what the undisturbed job leaves; None where nothing does."""
        found, expected = essence(out), self.essences[job]
        if found == expected:
            return None
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return f"another result: {', '.join(differing[:5])}"


def one_line(said: str) -> bool:
    """Whether an error was said in one line, after what is said of the work."""
    return (
        "Traceback" not in said and said.strip().splitlines()[-1:][0].startswith("error: ") if said.strip() else False
    )


def essence(out: Path) -> dict[str, str]:
    """{file: hash of what does not differ from run to run}."""
    found = {}
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out)
        if path.is_dir() or any(_is_skipped(part) for part in relative.parts):
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl") and path.name != "manifest.json":
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            data = "\n".join(json.dumps(_plain(json.loads(line)), sort_keys=True) for line in lines).encode()
        found[str(relative)] = hashlib.sha256(data).hexdigest()[:16]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in VOLATILE}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _is_skipped(name: str) -> bool:
    """A checkpoint that a power loss has damaged is kept, under another name."""
    return name in _SKIPPED or name.startswith("checkpoints.damaged-")
