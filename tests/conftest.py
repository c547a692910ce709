"""Shared set-up of the tests: array shapes are checked at run time, rank promotion raises, JAX stays on the CPU."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


def _keep_to_own_cores() -> None:
    """Gives each xdist worker its share of the cores: threads of several programs on the same ones wait for each other,
    which makes the tests several times slower."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if not worker.startswith("gw") or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[int(worker[2:]) % count :: count]) or {cores[int(worker[2:]) % len(cores)]})


def _hear_signals() -> None:
    """Tests that were started in the background or by nohup would pass on to commands that signals are ignored."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


_keep_to_own_cores()
_hear_signals()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling is a third of the tests' time: programs are kept for the next run where the command line keeps them too.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafs-jax" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# XLA's programs are those of users, but their machine code is made the quick way, which halves the tests' time: without
# LLVM's costly passes, by the older emitters of loops, in one piece. `make demo` and the benchmarks take the usual one.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import flax.struct
import pytest
from jaxtyping import install_import_hook

from tests.support import fuzz as fuzzing
from tests.support.sources import modules

# JAX rebuilds pytrees with shardings, shapes and placeholders for leaves: their constructors can't be checked.
flax.struct.PyTreeNode.__no_type_check__ = True

# Modules without arrays are left out: checked, options and configs are ten times as slow.
ARRAYS = [name for name, source in modules().items() if name.startswith("hafs_jax.") and "jaxtyping" in source]
install_import_hook(ARRAYS, "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

from hafs_jax.base import plugins

plugins.load()  # so that the contract suite takes what a module in HAFS_PLUGINS adds


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Hundreds of configs compile hundreds of programs: kept for the whole session they take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny synthetic world, made once; not to be written to."""
    from hafs_extract.synthetic.samples import generate
    from tests.support.worlds import TINY

    return generate(TINY, tmp_path_factory.mktemp("out"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases", type=int, default=fuzzing.TOTAL, help=f"random and damaged inputs to try [{fuzzing.TOTAL}]"
    )


@pytest.fixture
def fuzz(pytestconfig: pytest.Config, record_property: Callable[[str, object], None]) -> fuzzing.Fuzz:
    """Yields the random numbers of each case of a kind (of part `part` of `parts`), and notes how many were tried."""

    def cases(kind: str, part: int = 0, parts: int = 1) -> Iterator[random.Random]:
        numbered = range(part, fuzzing.count(kind, pytestconfig.getoption("fuzz_cases")), parts)
        for case in numbered:
            print(f"fuzz: case {case} of the {kind}")  # shown where it fails
            yield fuzzing.numbers(kind, case)
        record_property("fuzz", [kind, len(numbered)])

    return cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line with the cases that were tried, by kind."""
    tried: dict[str, int] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()) if report.when == "call" else ():
            if name == "fuzz":
                tried[value[0]] = tried.get(value[0], 0) + value[1]
    if tried:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tried.items()))
        terminalreporter.write_line(f"fuzz: {sum(tried.values()):,} cases ({listed})")
