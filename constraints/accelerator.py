"""Which of cpu, cuda12 and cuda13 suits this machine; `make setup ACCEL=auto` asks. Standard library only."""

import re
import shutil
import subprocess
import sys

CUDA13 = 580  # the oldest driver for CUDA 13, by NVIDIA's CUDA Toolkit Release Notes
CUDA12 = 525  # the same of CUDA 12
TURING = 7.5  # the oldest compute capability that CUDA 13 compiles for
VOLTA = 7.0  # the oldest that the wheel of torch 2.10 has kernels for
QUERY = ("--query-gpu=driver_version,compute_cap", "--format=csv,noheader")


def gpus() -> "list[tuple[str, float]] | str":
    """The driver's version and the compute capability of each GPU, or why there is none."""
    if (program := shutil.which("nvidia-smi")) is None:
        return "no nvidia-smi was found"
    try:
        done = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run ({error})"
    found = re.findall(r"^(\d[\d.]*), *(\d+\.\d+)\s*$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        return f"nvidia-smi names no GPU ({' '.join((done.stdout + done.stderr).split())[:100] or 'it prints nothing'})"
    return [(driver, float(capability)) for driver, capability in found]


def choice(found: "list[tuple[str, float]] | str") -> "tuple[str, str]":
    """The accelerator and the reason. CUDA 13 where driver and all GPUs have it, else CUDA 12, else the CPU."""
    if isinstance(found, str):
        return "cpu", found
    driver, oldest = found[0][0], min(capability for _, capability in found)
    gpu = f"a GPU of compute capability {oldest}"
    release = int(driver.split(".")[0])
    if release < CUDA12:
        return "cpu", f"the NVIDIA driver {driver} is older than {CUDA12}, the first for CUDA 12"
    if oldest < VOLTA:
        return "cpu", f"{gpu} is older than {VOLTA}, the first that torch has kernels for"
    if release < CUDA13:
        return "cuda12", f"the NVIDIA driver {driver} is older than {CUDA13}, the first for CUDA 13"
    if oldest < TURING:
        return "cuda12", f"{gpu} is older than {TURING}, the first for CUDA 13"
    return "cuda13", f"the NVIDIA driver {driver} has CUDA 13"


if __name__ == "__main__":
    accelerator, why = choice(gpus())
    print(accelerator)
    print(f"ACCEL=auto takes {accelerator}: {why}", file=sys.stderr)
