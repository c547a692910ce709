"""What all benchmarks share: rows of the table, interleaved timing, and files of tables.

A suite is a module with a function `measure(quick: bool) -> Iterator[Row]`.
"""

import dataclasses
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hafs_jax.base.files import write_json

PACKAGES = ("jax", "jaxlib", "torch", "sae-lens", "dictionary-learning", "eai-sparsify", "transformers", "numpy")


@dataclass(frozen=True)
class Row:
    """One comparison. Its target is met if `ratio` `sense` `target` holds; without a target it is for information."""

    name: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    target: float | None
    sense: str = ">="  # ">=" or "<="
    sizes: Mapping[str, Any] = field(default_factory=dict)
    spread: tuple[float, float] | None = None  # smallest and largest value of `ours`, in `unit`
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.sense == ">=" else self.ratio <= self.target

    def plain(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {**dataclasses.asdict(self), "met": self.met}


@dataclass(frozen=True)
class Times:
    """The seconds of each round of one case."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def rate(self, amount: float) -> tuple[float, tuple[float, float]]:
        """`amount` per second: of the median round, and of the slowest and the fastest one."""
        return amount / self.median, (amount / max(self.seconds), amount / min(self.seconds))


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warm_ups: int = 2) -> dict[str, Times]:
    """The times of cases that run in turn, `rounds` times, after `warm_ups` calls of each.

    They run in turn so that other work of the machine slows all of them alike. A case must return only when its work is
    done.
    """
    for case in cases.values():
        for _ in range(warm_ups):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def in_fresh_process(arguments: Iterable[str], environment: Mapping[str, str] | None = None) -> tuple[str, float]:
    """The standard output and the seconds of `python ARGUMENTS`. Raises `RuntimeError` with its errors if it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - started


def device() -> str:
    """A name of the device that can be a file's name: the accelerator's, or the CPU's with its number of cores."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"{_model_name()} {len(os.sched_getaffinity(0))} cores"
    return "-".join(re.findall(r"[a-z0-9]+", re.sub(r"\(r\)|\(tm\)", "", kind.lower())))


def versions() -> dict[str, str]:
    """The version of Python and of each package that is compared, "absent" if it is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_table(path: Path, rows: Iterable[Row], command: str, limits: Mapping[str, float]) -> None:
    """Writes the rows as JSON, with the command, the machine, the versions and the limits that they depend on."""
    write_json(
        path,
        {
            "command": command,
            "device": device(),
            "processor": processor(),
            "versions": versions(),
            "limits": dict(limits),
            "rows": [row.plain() for row in rows],
        },
    )


def processor() -> str:
    """The CPU's name and those of its instruction sets that matter here."""
    found = _cpuinfo().get("flags", "").split()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in found]
    return f"{_model_name()} ({', '.join(flags)})" if flags else _model_name()


def _model_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or "cpu"


def _cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo for the first processor; empty if there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def show(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| what | against | ours | theirs | unit | ratio | target | met |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"{row.sense} {row.target:g}"
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        cells = (row.name, row.peer, number(row.ours), number(row.theirs), row.unit, f"{row.ratio:.2f}", target, met)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """The number with three significant digits or, from 100 on, as an integer with commas between thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
