"""Command lines of every command, drawn from its own parser: wrong types, missing values, odd names and places."""

import argparse
import math
import re
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import strategies as st

from hafs_jax import cli
from hafs_jax.base.flags import Parser
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.torture.fuzz.place import PROFILE, TRAINED, Place, problem

OUT = ["--out", "out", "--profile", PROFILE]
RUN = f"out/{PROFILE}/runs/{TRAINED}"
SMALL = ["--tokens", "64", "--batch-size", "32", "--sae.n-latents", "13", "--k", "3"]
MODEL = ["--model", "model", "--text", "text.jsonl", "--context-length", "16", "--heldout-fraction", "0.2",
         "--hook-point", "blocks.2.hook_resid_post"]  # fmt: skip
NEW = ["--out", "new", "--profile", "q"]
BASES: dict[str, tuple[list[str], ...]] = {
    "extract": (["--out", "new", "--profile", "pythia70m", *MODEL],),
    "import": (["acts.npy", *NEW], ["acts.npy", *NEW, "--groups", "groups.npy"]),
    "verify": ([f"out/{PROFILE}/store/train"],),
    "train": ([*OUT, *SMALL], [*OUT, "--config", RUN]),
    "sweep": ([*OUT, *SMALL, "--grid", "seed=0..1"],),
    "tau": (["--baseline", TRAINED, *OUT],),
    "inspect": ([TRAINED, *OUT], [RUN]),
    "plan": (["--d-model", "64", *SMALL],),
    "synth": (["--out", "new"],),
    "synth-world": (["--out", "new"],),
    "synth-score": (OUT,),
    "agreement": (OUT,),
    "evaluate": (OUT, [*OUT, "--sae", f"{RUN}/sae"]),
    "report": (OUT,),
    "explore": (OUT,),
    "label": (["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", *OUT, "--runs", "baseline-s0"],),
    "experiment": (["exp.toml", "--out", "new"],),
    "export": ([TRAINED, *OUT],),
    "import-sae": ([f"{RUN}/sae", "new"], [f"{RUN}/dictionary_learning/trainer_0/ae.pt", "new"]),
    "neuronpedia": ([f"out/{PROFILE}/runs/baseline-s0", "--out", "new"],),
    "upload": ([TRAINED, *OUT, "--repo-id", "a/b", "--dry-run", "new"],),
}  # fmt: skip
"""What each command takes, where it does its work or starts it."""
assert set(BASES) == set(cli.COMMANDS)

WORDS = (
    *("inf", "nan", "-inf", "1e400", "-1", "0", "1", "3", "0.5", "1e-9", "2147483648", "18446744073709551616", "none"),
    *("", " ", "a", "é", "\n", "x" * 3000, "../..", "[x]", "adam", "lbfgs", "topk", "adaptive", "true", "9" * 5000),
    *(
        "a\x00b",
        "\x1b[31m",
        "\u202e",
        "\ud83d",
        "日本",
        "-",
        "--",
        "=",
        "a=b",
        "a,b",
        "0..3",
        "3..0",
        "@",
        "%",
        "~",
        "*",
    ),
    *(
        "NaN",
        "1_000",
        "0x10",
        "１",
        "1e3",
        "+1",
        "auto",
        "cpu",
        "cuda",
        "meta",
        "float32",
        "int8",
        "1/0",
        "None",
        "None ",
    ),
)
PLACES = (
    *("folder", "empty", "pipe", "pipe.jsonl", "zero", "socket", "secret", "acts.npy", "text.jsonl", "exp.toml"),
    *("out", f"out/{PROFILE}", f"out/{PROFILE}/runs", RUN, f"{RUN}/sae", f"{RUN}/sae/cfg.json", f"out/{PROFILE}/store"),
    *(".", "..", "../../..", "/", "/dev/null", "/proc/self/mem", "/dev/fd/0", "x" * 300, "a/" * 2000, "model"),
    *("acts.npy/a", "other.npy", "no/such"),
)  # fmt: skip
READ_ONLY = ("/", "..", "../../..", ".", "/dev/null", "/proc/self/mem", "/dev/fd/0")
"""Places that no command is told to write to here: the rest of this machine."""
GRIDS = (
    *("arch=relu l1=inf", "seed=0..3", "seed=7 k=2,3", "variant=baseline,strict", "arch=relu l1=0.1,1", "seed=3..0"),
    *("seed=0..1000000000000", "seed=0..99 k=1..99 lr=1,2,3,4,5,6,7,8,9", "k=1,1", "k=", "=", ";", "variant=a"),
    *("lr=1e400", "k=2 k=3", "a b", "seed=-1", "seed=1e3", "tag=../..", "out=x", "k=2;" * 2000, "lr=nan", "seed=\x00"),
)
SOURCES = ("text.jsonl@", "text.jsonl@0", "text.jsonl@inf", "text.jsonl@nan", "text.jsonl@1e400",
           "text.jsonl,keep=n!=3",
           "text.jsonl,keep=", "text.jsonl,template={n}", "text.jsonl,template={", "text.jsonl,kind=a", "text.jsonl,=",
           "a=text.jsonl", "=text.jsonl", "text.jsonl,revision=../..", "a/b", "text.jsonl,chat=text")  # fmt: skip
SPECIAL = {"grid": GRIDS, "text": SOURCES}
ELSEWHERE = {"--target", "--dry-run", "--init-from"}
"""Flags that name folders beside OUT, in which a command may write."""
_LEFT_OUT = {"help", "compile", "wandb", "open", "tensorboard"}


class _Caught(BaseException):
    pass


@cache
def actions(command: str) -> list[argparse.Action]:
    """The flags and arguments of a command: those of its parser, and of `train` where it takes these too."""
    found: list[argparse.Action] = []

    def catch(parser: Parser, *_: object, **__: object) -> None:
        found.extend(parser._actions)
        raise _Caught

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Caught):
        patch.setattr(Parser, "parse_known_args", catch)
        cli.main([command])
    if command in ("sweep", "plan", "synth"):
        found += actions("train")
    return [action for action in found if action.dest not in _LEFT_OUT]


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command line: a base with one to three flags more, or with words replaced, removed or doubled."""
    command = draw(st.sampled_from(sorted(BASES)))
    words = list(draw(st.sampled_from(BASES[command])))
    own = actions(command)
    for action in draw(st.lists(st.sampled_from(own), max_size=3, unique_by=lambda action: action.dest)):
        words += draw(_given(action))
    way = draw(st.sampled_from(("as it is",) * 6 + ("replace", "remove", "insert", "alone")))
    if way == "alone":
        return [command, *draw(st.lists(st.sampled_from(WORDS + PLACES[:8]), max_size=3))]
    place = draw(st.integers(0, max(0, len(words) - 1)))
    if way in ("replace", "remove") and words:
        words.pop(place)
    if way in ("replace", "insert"):
        words.insert(place, draw(st.sampled_from(WORDS) | st.sampled_from(PLACES)))
    return [command, *words]


@st.composite
def _given(draw: st.DrawFn, action: argparse.Action) -> list[str]:
    """A flag with a value, or without one; or an argument."""
    pool = [st.sampled_from(WORDS), st.sampled_from(PLACES)]
    if action.choices:
        pool = [st.sampled_from(sorted(map(str, action.choices))), *pool[:1]]
    elif action.dest in SPECIAL:
        pool = [st.sampled_from(SPECIAL[action.dest])] * 3 + pool[:1]
    elif getattr(action.type, "__name__", "") in ("int", "float"):
        pool = [pool[0], pool[0], st.integers().map(str), st.floats().map(str)]
    if draw(st.integers(0, 9)) == 0:
        pool = [st.text(st.characters(codec=None), max_size=6)]
    least, most = (0, 2) if action.nargs in ("+", "*", "?") else (1, 1)
    values = draw(st.lists(st.one_of(pool), min_size=least, max_size=most))
    if not action.option_strings:
        return values
    flag = draw(st.sampled_from(action.option_strings))
    if action.nargs == 0 or draw(st.integers(0, 9)) == 0:
        return [flag]
    if len(values) == 1 and draw(st.booleans()):
        return [f"{flag}={values[0]}"]
    return [flag, *values]


def is_safe(line: list[str]) -> bool:
    """Whether a line does not tell a command to write to the rest of this machine."""
    words = [part for word in line for part in (word, word.partition("=")[2])]
    return not any(word in READ_ONLY or word.startswith(("/", "~")) for word in words) or line[0] in _READERS


_READERS = ("verify", "inspect", "tau", "plan", "agreement")


def case(place: Place, line: list[str]) -> str | None:
    """What is wrong with how the command ends; None where it is as it should be."""
    if not is_safe(line):
        line = [word for word in line if is_safe([word])]
    ended = place.command(line)
    wrong = None if line[0] == "verify" and ended.code == 1 and "Traceback" not in ended.err else problem(ended)
    if wrong is None and ended.code == 0:
        wrong = senseless(line) or _made_wrong(place, line)
    strange = [path for path in place.restore() if (place.here / "new") not in path.parents]
    if wrong is None and strange and _same_out(line):
        wrong = f"wrote {strange[0].relative_to(place.root)} outside of OUT"
    return wrong and f"{_shown(line)}: {wrong}"


def _same_out(line: list[str]) -> bool:
    """Whether the line names no other OUT than its base."""
    named = {flag.partition("=")[0] for flag in line if flag.startswith("--")}
    outs = [word for before, word in pairwise(line) if before == "--out"]
    outs += [word.removeprefix("--out=") for word in line if word.startswith("--out=")]
    return outs in (["out"], ["new"]) and line[0] != "import-sae" and not named & ELSEWHERE


def senseless(line: list[str]) -> str | None:
    """A number that is none, or not finite, and was taken all the same."""
    for action in actions(line[0]):
        kind = getattr(action.type, "__name__", "")
        if kind not in ("int", "float") or action.nargs not in (None, "?"):
            continue
        for at, word in enumerate(line):
            flag, equals, value = word.partition("=")
            if flag not in action.option_strings or (not equals and at + 1 == len(line)):
                continue
            value = value if equals else line[at + 1]
            if value.lower() == "none" or (action.nargs == "?" and value.startswith("-")):
                continue
            try:
                number = float(value)
            except ValueError:
                return f"took {value[:50]!r} for {flag}"
            if not math.isfinite(number) or (kind == "int" and not re.fullmatch(r"\s*[-+]?\d[\d_]*\s*", value)):
                return f"took {value[:50]!r} for {flag}"
    return None


def _made_wrong(place: Place, line: list[str]) -> str | None:
    """What is wrong with stores that were made."""
    if line[0] not in ("import", "extract"):
        return None
    for manifest in place.here.glob("new/**/store/*/manifest.json"):
        if found := verify(manifest.parent):
            return f"made a store with {found[0]}"
        Store(manifest.parent).read(0)
    return None


def _shown(line: list[str]) -> str:
    return "hafs " + " ".join(word if len(word) < 60 else f"{word[:20]}...({len(word)})" for word in map(repr, line))
