"""The JSON, TOML, CSV and text files that are read: mutations of whole ones, and what is no such file at all."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hafs_evaluate.hierarchy.label_trees import find_trees, labelled_texts
from hafs_evaluate.labels.labels_file import LABELS, read_labels
from hafs_evaluate.tokens.properties import read_lexicon
from hafs_jax.base.checksums.sealed import KEY, LINE_KEY
from tests.torture.fuzz.commands import OUT
from tests.torture.fuzz.place import PROFILE, RUNS, TRAINED, Ended, Place, problem
from tests.torture.fuzz.values import damaged, json_texts, toml_texts

O = Path("out") / PROFILE  # noqa: E741
SAE = f"out/{PROFILE}/runs/{TRAINED}/sae"
RUN, EVAL = O / "runs" / TRAINED, O / "eval" / RUNS[0]
REPORT = ["report", *OUT]
INSPECT, EXPORT = ["inspect", TRAINED, *OUT], ["export", TRAINED, *OUT]
SAVED = ["neuronpedia", str(O / "runs" / RUNS[0]), "--out", "new"]
LABEL = ["label", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", *OUT, "--runs", RUNS[0]]
UPLOAD = ["upload", TRAINED, *OUT, "--repo-id", "a/b", "--dry-run", "new"]
TRAIN = ["train", *OUT, "--tokens", "64", "--batch-size", "32", "--sae.n-latents", "13", "--k", "3"]
RUN_IT = ["experiment", "exp.toml", "--out", "new"]
TREE = {
    "about": "a test",
    "cap": 100,
    "seed": 0,
    "sources": {"own": {"kind": "jsonl", "path": "texts.jsonl"}, "wiki": {"kind": "jsonl", "path": "no.jsonl"}},
    "leaves": [],
}
EXPERIMENT = {
    "name": "exp", "profile": PROFILE, "arms": ["baseline", "strict lam=0.3"], "architectures": ["batchtopk"],
    "ks": [3], "seeds": 2, "extract": [], "train": ["--tokens", "64"], "evaluate": ["--contexts", "2"],
    "latents_seeds": 1,
    "primaries": ["fvu"], "method": "strict lam=0.3", "fvu_margin": 0.02, "bootstrap": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A file and what reads it: command lines, or functions of its path."""

    path: Path
    readers: tuple[list[str] | Callable[[Path], Any], ...]
    whole: Any = None  # where the place has no such file


def _trees(path: Path) -> None:
    for tree in find_trees((str(path),)):
        labelled_texts(tree)


KINDS: dict[str, Kind] = {
    "auto.json": Kind(Path("out/auto.json"), (["inspect", TRAINED, "--out", "out"], ["report", "--out", "out"])),
    "run config.json": Kind(RUN / "config.json", (INSPECT, EXPORT, REPORT, UPLOAD, [*TRAIN[:-4], "--seed", "7"])),
    "config of --config": Kind(Path("config.json"), (["train", *OUT, "--config", "config.json"],), "run"),
    "run.json": Kind(RUN / "run.json", (INSPECT, EXPORT, REPORT, UPLOAD, ["tau", "--baseline", TRAINED, *OUT])),
    "metrics.jsonl": Kind(RUN / "metrics.jsonl", (INSPECT, REPORT)),
    "manifest.json": Kind(O / "store/train/manifest.json", (["verify", str(O / "store/train")], TRAIN, REPORT, SAVED)),
    "heldout manifest.json": Kind(O / "store/heldout/manifest.json", (["evaluate", *OUT], REPORT)),
    "timing.json": Kind(O / "store/train/timing.json", (REPORT,)),
    "documents.jsonl": Kind(O / "store/train/documents.jsonl", (["verify", str(O / "store/train")],)),
    "cfg.json": Kind(RUN / "sae/cfg.json", (["import-sae", SAE, "new"], [*TRAIN, "--init-from", SAE], UPLOAD)),
    "checksums.json": Kind(RUN / "sae/checksums.json", (["import-sae", SAE, "new"], EXPORT, UPLOAD)),
    "dictionary config.json": Kind(RUN / "dictionary_learning/trainer_0/config.json",
                                   (["import-sae", str(RUN / "dictionary_learning/trainer_0"), "new"],)),
    "core.json": Kind(EVAL / "core.json", (REPORT, SAVED)),
    "latents.json": Kind(EVAL / "latents.json", (REPORT, SAVED, LABEL, ["explore", *OUT])),
    "probing.json": Kind(EVAL / "probing.json", (REPORT,)),
    "hierarchy.json": Kind(EVAL / "hierarchy.json", (REPORT,)),
    "domains.json": Kind(EVAL / "domains.json", (REPORT,)),
    "tokens.json": Kind(EVAL / "tokens.json", (REPORT,)),
    "first_letter.json": Kind(EVAL / "first_letter.json", (REPORT,)),
    "llm probing.json": Kind(O / "eval/llm/probing.json", (REPORT,)),
    "llm tokens.json": Kind(O / "eval/llm/tokens.json", (REPORT,)),
    "seconds.json": Kind(O / "eval/seconds.json", (REPORT,)),
    "summary.json": Kind(O / "experiment/summary.json", (REPORT,)),
    "stability.json": Kind(O / "eval/stability.json", (REPORT,),
                           {"runs": {RUNS[0]: {"stability": 0.5}}, "pairs": [{"a": RUNS[0], "mean": 0.5}]}),
    "experiment.toml": Kind(Path("exp.toml"), (RUN_IT, [*RUN_IT, "--stages", "table"]), EXPERIMENT),
    "label tree": Kind(Path("tree.json"), (_trees,), TREE),
    "labelled texts": Kind(Path("texts.jsonl"), (lambda path: _trees(path.with_name("own.json")),),
                           [{"text": f"text {n}", "label": f"a/{n % 2}", "group": n} for n in range(60)]),
    "labels.csv": Kind(O / LABELS, (REPORT, LABEL, read_labels),
                       "variant,latent,label,source\nbaseline,3,months,person\nadaptive-s0,8,\"a, b\",\n"),
    "lexicon": Kind(Path("words.txt"), (read_lexicon,), "# words\nmay\nJune\n"),
}  # fmt: skip


def documents(place: Place) -> st.SearchStrategy[tuple[str, int, bytes]]:
    """(the kind, which of its readers, the file's bytes)."""
    pools = {name: _bytes(whole(place, kind), kind.path.suffix) for name, kind in KINDS.items()}
    return st.sampled_from(sorted(KINDS)).flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, len(KINDS[name].readers) - 1), pools[name])
    )


def _bytes(found: Any, suffix: str) -> st.SearchStrategy[bytes]:
    if isinstance(found, str):
        return damaged(found.encode())
    return toml_texts(found) if suffix == ".toml" else json_texts(found, lines=suffix == ".jsonl")


def whole(place: Place, kind: Kind) -> Any:
    """The file's value, without checksums, which would only tell that it was changed."""
    path = place.here / kind.path
    if kind.whole == "run":
        path = place.here / RUN / "config.json"
    elif kind.whole is not None:
        return kind.whole
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [{key: item for key, item in json.loads(line).items() if key != LINE_KEY} for line in text.splitlines()]
    return {key: item for key, item in json.loads(text).items() if key != KEY}


def case(place: Place, example: tuple[str, int, bytes]) -> str | None:
    """What is wrong with how a reader of the file ends; None where it is as it should be."""
    name, number, written = example
    kind = KINDS[name]
    reader = kind.readers[number]
    path = place.here / kind.path
    path.write_bytes(written)
    try:
        if name == "labelled texts":
            (place.here / "own.json").write_text(json.dumps({**TREE, "sources": {"own": TREE["sources"]["own"]}}))
        ended = place.command(reader) if isinstance(reader, list) else place.call(lambda: reader(path))
    finally:
        place.restore()
    wrong = problem(ended) if not (isinstance(reader, list) and reader[0] == "verify") else of_verify(ended)
    wrong = wrong or _nonsense(ended)
    return wrong and f"{name} of {written[:300]!r}, {reader}: {wrong}"


def of_verify(ended: Ended) -> str | None:
    """`hafs verify` answers with exit code 1, and a line for each problem."""
    return None if ended.code == 1 and ended.err and "Traceback" not in ended.err else problem(ended)


def _nonsense(ended: Ended) -> str | None:
    """A figure that is none, in what a command printed."""
    found = re.search(r"(?<![\w./-])(nan|inf)\b", ended.out) if ended.code == 0 else None
    return found and f"prints {found[0]}: {ended.out[max(0, found.start() - 80) : found.end() + 20]!r}"
