"""`make gpu-check`: every architecture's step, compiled for GPUs without one, against rules and stated limits.

It needs JAX's CUDA wheels (the extra gpu-check, 5.6 GB) and no GPU; without them it says so and does nothing. Nothing
is timed: milliseconds are those of a roofline. The limits are the table "Schedules for GPUs" in benchmarks/README.md;
of a program without a row there only the rules are checked (hafs_jax/targets/rules.py).
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

D, B, K = 2_048, 8_192, 64
_README = Path(__file__).parent / "README.md"
_HEADING = "## Schedules for GPUs"


@dataclass(frozen=True)
class Case:
    """One program."""

    target: str
    architecture: str
    variant: str
    latents: int
    kernels: bool = False  # sparse products by this package's own kernels

    def __str__(self) -> str:
        kernels = ", kernels" if self.kernels else ""
        return f"{self.target}: {self.architecture}, {self.variant}, F={self.latents:,}{kernels}"


def cases(targets: list[str], architectures: list[str], variants: list[str], latents: list[int]) -> Iterator[Case]:
    """Every combination, and with kernels those that can have them."""
    from hafs_jax.fast.forms import FORMS
    from hafs_jax.targets.gpus import GPUS

    form = {name: FORMS.get(name) for name in architectures}
    for target in targets:
        for F in latents:
            for architecture in architectures:
                yield from (Case(target, architecture, variant, F) for variant in variants)
                sparse = (found := form[architecture]) is not None and found.select is not None
                if sparse and GPUS[target].machine.runs_kernels:
                    yield from (Case(target, architecture, variant, F, kernels=True) for variant in variants)


def stated(text: str) -> dict[str, tuple[float, float, float, int]]:
    """The limits of a README by program: GB moved, GB of temporary memory, ms by roofline, reads of one array."""
    section = text.partition(_HEADING)[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    found = {}
    for name, *numbers in (row for row in rows if re.fullmatch(r"\w+: \w+, \w+, F=[\d,]+(, kernels)?", row[0])):
        gigabytes, temporary, milliseconds, reads = numbers[-4:]
        found[name] = float(gigabytes), float(temporary), float(milliseconds), int(reads)
    return found


def main() -> int:
    """Compiles and checks; 1 if a program breaks a rule or a limit, else 0."""
    from hafs_jax.presets import ARCHITECTURES
    from hafs_jax.targets.gpus import GPUS

    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--target", nargs="+", default=list(GPUS), choices=list(GPUS), help="the GPUs [all]")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="the architectures [all]")
    parser.add_argument("--variant", nargs="+", default=["baseline", "adaptive"], help="[baseline adaptive]")
    parser.add_argument("--latents", nargs="+", type=int, default=[32_768, 131_072], help="F [32768 131072]")
    parser.add_argument(
        "--kernels", nargs="+", default=["off", "on"], choices=["off", "on"], help="without our kernels, and with them"
    )
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the folder of XLA's dumps: one program, in this process
    asked = parser.parse_args()
    if importlib.util.find_spec("jax_plugins") is None or ptxas() is None:
        print("skipped: JAX's CUDA wheels are not installed; pip install 'hafs-jax[gpu-check]' (5.6 GB, no GPU needed)")
        return 0
    every = cases(asked.target, asked.arch, asked.variant, asked.latents)
    programs = [case for case in every if ("on" if case.kernels else "off") in asked.kernels]
    if asked.here is not None:
        return int(not check(programs[0], stated(_README.read_text(encoding="utf-8")), Path(asked.here)))
    return int(any([_in_its_own_process(case) for case in programs]))


def _in_its_own_process(case: Case) -> int:
    """The exit code of a program's check: each has its own compiler and its own dumps."""
    with tempfile.TemporaryDirectory(prefix="hafs-ptx-") as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["MOSAIC_GPU_DUMP_TO"] = folder  # our kernels, which XLA does not dump
        one = ["--target", case.target, "--arch", case.architecture, "--variant", case.variant]
        one += ["--latents", str(case.latents), "--kernels", "on" if case.kernels else "off"]
        command = [sys.executable, "-m", "benchmarks.schedules", *one, "--here", folder]
        done = subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE, text=True)
        missing = "nvdisasm invocation failed"  # a tool for one of the dumps, which is not asked for
        print(*(line for line in done.stderr.splitlines() if missing not in line), sep="\n", end="", file=sys.stderr)
        return done.returncode


def check(case: Case, limits: dict[str, tuple[float, float, float, int]], folder: Path) -> bool:
    """Whether a program keeps to the rules and its limits; prints a line on it and one on each fault."""
    from hafs_jax.fast.kernels.calls import PREFIX
    from hafs_jax.targets.cost import schedule
    from hafs_jax.targets.deviceless import arguments_on, compiled_for, devices_of
    from hafs_jax.targets.gpus import gpu
    from hafs_jax.targets.hlo import parse
    from hafs_jax.targets.rules import Limits, facts, problems

    on, started = gpu(case.target), time.monotonic()
    places = devices_of(on)
    config = config_of(case)
    compiled = compiled_for(places, arguments_on(places, config, D))
    texts, own = dumped(folder, "module_*.ptx"), dumped(folder, f"{PREFIX}*.ptx")
    temporary = compiled.memory_analysis().temp_size_in_bytes
    counts = [spills(text, on.architecture) for text in texts]
    counts += map(spilled_bytes, dumped(folder, f"{PREFIX}*.ptxas"))
    parts = schedule(parse(compiled.as_text()), on.cache)
    found = facts(parts, on, temporary, block_entries(config), "\n".join(texts + own), max(counts, default=0))
    limit = limits.get(str(case))
    said = problems(found, None if limit is None else Limits(*limit), any_order=not case.kernels)
    if bool(own) != case.kernels:
        said.append(f"found {len(own)} kernels of our own; expected {'some' if case.kernels else 'none'}")
    print(
        f"{case} ({config.products}): {found.gigabytes:.1f} GB, {found.temporary:.2f} GB temporary, "
        f"{found.milliseconds:.1f} ms by roofline, {found.launches:,} kernels, {found.most_reads} reads of an array of "
        f"pre-activations, compiled in {time.monotonic() - started:.0f} s{'' if limit else '; no limit is stated'}",
        *(f"  FAILED {problem}" for problem in said),
        sep="\n",
        flush=True,
    )
    return not said


def dumped(folder: Path, pattern: str) -> list[str]:
    """The texts of a folder's files."""
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob(pattern))]


def config_of(case: Case):  # type: ignore[no-untyped-def]  # TrainConfig, imported inside
    """The config of a program, with `products` as `auto` chooses them for a GPU, and sparse ones for kernels."""
    import dataclasses

    from hafs_jax.fast.plan import resolve_products
    from hafs_jax.presets import preset, with_fields
    from hafs_jax.targets.gpus import gpu

    sae = {"n_latents": case.latents, "k": K, "compute_dtype": "bfloat16", "encoder_scale": 1.0}
    config = with_fields(preset(case.variant, case.architecture), {"sae": sae, "batch_size": B, "tokens": 1000 * B})
    if case.kernels:
        return dataclasses.replace(config, products="sparse", kernels="on")
    return dataclasses.replace(config, products=resolve_products(config, gpu(case.target).machine))


def block_entries(config) -> int:  # type: ignore[no-untyped-def]
    """The entries of the pre-activations of one block of rows."""
    from hafs_jax.fast.objective import blocks_of_rows
    from hafs_jax.fast.plan import choose

    return B * config.sae.F // blocks_of_rows(config, B, choose(config, "gpu"))


def ptxas() -> Path | None:
    """NVIDIA's assembler, of the wheel nvidia-cuda-nvcc."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found else None
    tools = [tool for place in places or () for tool in Path(place).glob("*/bin/ptxas")]
    return tools[0] if tools else None


def spills(ptx: str, architecture: str) -> int:
    """The bytes of registers that the kernel of a file spills, by the assembler."""
    tool = ptxas()
    assert tool is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"-arch={architecture}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return spilled_bytes(said)


def spilled_bytes(said: str) -> int:
    """The bytes of registers that ptxas says it spilled."""
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


if __name__ == "__main__":
    sys.exit(main())
