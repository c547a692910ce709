"""The simulation of a cluster: its limits are those that arithmetic gives, and its step is near the compiled one."""

import dataclasses

import pytest

from benchmarks.cluster import Cluster, best, compute_seconds, config_of, network_seconds, simulate, table
from hafs_jax.ops.axes import Axes
from hafs_jax.targets.gpus import GPUS

D, B = 2_048, 8_192
CONFIG = config_of(131_072, 64, B)
CALM = dataclasses.replace(Cluster(), spread=0.0)


def test_a_step_is_near_the_one_that_was_compiled_for_the_gpu() -> None:
    """15.9 ms without a penalty and 19.2 with one, by the roofline of the compiled kernels of `make gpu-check`."""
    assert 15.9e-3 < compute_seconds(CONFIG, D, Axes(), GPUS["h100"]) < 19.2e-3


def test_without_noise_and_with_a_fast_disk_nothing_waits() -> None:
    found = simulate(CONFIG, D, Axes(data=2, latent=4), dataclasses.replace(CALM, disk=1e15))
    step = found.compute + found.network
    assert found.waiting < 1e-4 and found.rows_per_second == pytest.approx(B / step, rel=1e-3)


def test_a_slow_disk_is_the_limit() -> None:
    found = simulate(CONFIG, D, Axes(latent=8), dataclasses.replace(CALM, disk=1e8))
    assert found.rows_per_second == pytest.approx(1e8 / (2 * D), rel=0.02) and found.waiting > 0.9
    two_hosts = simulate(CONFIG, D, Axes(data=2, latent=8), dataclasses.replace(CALM, disk=1e8))
    assert two_hosts.rows_per_second == pytest.approx(2 * found.rows_per_second, rel=0.02)  # each reads its half


def test_hosts_wait_for_the_slowest_of_them() -> None:
    even, uneven = (
        simulate(CONFIG, D, Axes(data=8, latent=8), dataclasses.replace(CALM, disk=1e9, spread=spread))
        for spread in (0.0, 0.6)
    )
    assert uneven.rows_per_second < 0.95 * even.rows_per_second


def test_messages_within_a_host_take_its_fast_links() -> None:
    """By the table of docs/scaling.md: along `latent` an all-reduce of the reconstruction, and the largest values."""
    expected = (2 * B * D * 4 + B * 64 * 8 * 4) * 7 / 8
    assert network_seconds(CONFIG, D, Axes(latent=8), CALM) == pytest.approx(expected / CALM.inside, rel=1e-3)
    far = dataclasses.replace(CALM, per_host=4)
    assert network_seconds(CONFIG, D, Axes(latent=8), far) == pytest.approx(expected / CALM.between, rel=1e-3)
    parameters = network_seconds(CONFIG, D, Axes(data=16), CALM)  # of all latents, to each
    assert parameters == pytest.approx((2 * 2 + 2 * 4) * CONFIG.sae.F * D * 15 / 16 / CALM.between, rel=1e-3)


def test_the_best_mesh_is_no_slower_than_any_other() -> None:
    found = best(CONFIG, D, 4, CALM)
    every = [simulate(CONFIG, D, axes, CALM).rows_per_second for axes in (Axes(4, 1), Axes(2, 2), Axes(1, 4))]
    assert found.rows_per_second == max(every) > min(every)
    lines = list(table(CONFIG, D, CALM))
    assert len(lines) == 9 and lines[2].endswith("| 100% |")
