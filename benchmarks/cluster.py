"""Where training on many GPUs stops to scale: arithmetic of a step, and a simulation of loader and network.

    python -m benchmarks.cluster                                    # the tables of docs/scaling.md
    python -m benchmarks.cluster --d-model 4096 --n-latents 131072 --k 64 --batch-size 32768 --disk 3e9

Nothing is measured. A step's time on a device is a roofline by the formula of `compute_seconds`; messages are those of
`hafs_jax.targets.traffic`, which a test holds to the compiled program; bandwidths are public numbers. The simulation
adds what arithmetic leaves out: reads and messages that take now longer and now less, and hosts that wait for the
slowest of them.
"""

import argparse
import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hafs_jax.config import TrainConfig
from hafs_jax.ops.axes import Axes
from hafs_jax.presets import preset, with_fields
from hafs_jax.targets.gpus import GPUS, Gpu
from hafs_jax.targets.traffic import messages

_ROW_BYTES = 2  # a number of a stored row
_DISPATCH = 4  # steps that a device makes in one call
_DISPATCHES = 300  # that are simulated
_AHEAD = 2  # dispatches that the loader has ready at most


@dataclass(frozen=True)
class Cluster:
    """Machines of `per_host` GPUs. Rates are bytes a second, of one GPU where they are the network's."""

    gpu: Gpu = GPUS["h100"]
    per_host: int = 8
    inside: float = 450e9  # NVLink 4, one direction
    between: float = 50e9  # 400 Gbit/s InfiniBand for each GPU
    disk: float = 6e9  # of a host
    spread: float = 0.3  # standard deviation of the logarithm of a read's and a message's time


@dataclass(frozen=True)
class Outcome:
    """What was simulated. Seconds are of a step."""

    axes: Axes
    compute: float
    network: float
    rows_per_second: float
    waiting: float  # share of the time in which no device computes, as rows are not there yet


def compute_seconds(config: TrainConfig, d_model: int, axes: Axes, gpu: Gpu) -> float:
    """The roofline of a step on one device, with sparse products by kernels and bfloat16 factors.

    Products: the encoder. Traffic: the weights cast, the pre-activations written and read, a row of W_dec for each
    entry for decoding and again for the entries' gradients, a row of the residual and of the batch for each entry for
    the two matrices' gradients, and for each of a parameter's 28 bytes in the optimizer (value, two moments read and
    written, gradient) and 8 more for norms.
    """
    rows, latents, owned = config.batch_size // axes.data, config.sae.F // axes.latent, config.sae.F // axes.devices
    entries = rows * config.sae.k / axes.latent
    product = 2 * rows * latents * d_model / gpu.bfloat16
    traffic = 2 * latents * d_model * 6 + 2 * rows * latents * 4 + entries * d_model * (2 * 2 + 2 * 4)
    return product + (traffic + owned * 2 * d_model * 36) / gpu.bandwidth


def network_seconds(config: TrainConfig, d_model: int, axes: Axes, cluster: Cluster) -> float:
    """The time of a step's messages, one after the other. Devices of one place along `data` lie together."""
    seconds = 0.0
    for message in messages(config, d_model, d_model, axes):
        near = axes.latent if message.along == "latent" else axes.devices
        seconds += message.received / (cluster.inside if near <= cluster.per_host else cluster.between)
    return seconds


def simulate(config: TrainConfig, d_model: int, axes: Axes, cluster: Cluster, seed: int = 0) -> Outcome:
    """Dispatches one after the other: each begins when the one before is done and all hosts have its rows.

    A host reads its part of a dispatch's rows once a place for it is free. All wait for the slowest host and message.
    """
    random, hosts = np.random.default_rng(seed), math.ceil(axes.devices / cluster.per_host)
    compute = _DISPATCH * compute_seconds(config, d_model, axes, cluster.gpu)
    network = _DISPATCH * network_seconds(config, d_model, axes, cluster)
    read = _DISPATCH * config.batch_size * d_model * _ROW_BYTES / min(hosts, axes.data) / cluster.disk
    noise = lambda count: np.exp(cluster.spread * random.standard_normal(count) - cluster.spread**2 / 2)  # noqa: E731
    free, read_until = deque([0.0] * _AHEAD), np.zeros(hosts)
    done = waited = 0.0
    for _ in range(_DISPATCHES):
        read_until = np.maximum(read_until, free.popleft()) + read * noise(hosts)
        begins = max(done, float(read_until.max()))
        waited += begins - done
        done = begins + compute + network * float(noise(axes.devices).max())
        free.append(begins)
    rows = _DISPATCHES * _DISPATCH * config.batch_size / done
    return Outcome(axes, compute / _DISPATCH, network / _DISPATCH, rows, waited / done)


def best(config: TrainConfig, d_model: int, devices: int, cluster: Cluster) -> Outcome:
    """The fastest of the meshes of so many devices."""
    each = [Axes(devices // latent, latent) for latent in range(1, devices + 1) if devices % latent == 0]
    return max((simulate(config, d_model, axes, cluster) for axes in each), key=lambda found: found.rows_per_second)


def table(config: TrainConfig, d_model: int, cluster: Cluster) -> Iterator[str]:
    """The rows of a table in Markdown, one for each number of devices."""
    yield "| GPUs | mesh | computing, ms | messages, ms | waiting for rows | rows/s | efficiency |"
    yield "|---:|---|---:|---:|---:|---:|---:|"
    alone = best(config, d_model, 1, cluster).rows_per_second
    for devices in (1, 2, 4, 8, 16, 32, 64):
        found = best(config, d_model, devices, cluster)
        mesh = f"data={found.axes.data},latent={found.axes.latent}"
        times = f"{1e3 * found.compute:.2f} | {1e3 * found.network:.2f} | {found.waiting:.0%}"
        rate = found.rows_per_second
        yield f"| {devices} | {mesh} | {times} | {rate:,.0f} | {rate / devices / alone:.0%} |"


def config_of(n_latents: int, k: int, batch_size: int, variant: str = "baseline") -> TrainConfig:
    """A TopK SAE in bfloat16."""
    sae = {"n_latents": n_latents, "k": k, "compute_dtype": "bfloat16"}
    return with_fields(preset(variant, "topk"), {"sae": sae, "batch_size": batch_size})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=4_096)
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8_192, 32_768])
    parser.add_argument("--disk", type=float, nargs="+", default=[6e9, 1e9], help="bytes a second of a host [6e9 1e9]")
    given = parser.parse_args()
    for batch_size in given.batch_size:
        for disk in given.disk:
            print(
                f"\nD={given.d_model}, F={given.n_latents:,}, k={given.k}, B={batch_size:,}, disk {disk / 1e9:g} GB/s\n"
            )
            config = config_of(given.n_latents, given.k, batch_size)
            print("\n".join(table(config, given.d_model, dataclasses.replace(Cluster(), disk=disk))))


if __name__ == "__main__":
    main()
