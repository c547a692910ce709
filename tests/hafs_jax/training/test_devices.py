"""Training on several devices: four virtual ones of the host, in processes of their own, as their number is fixed."""

import functools
import json

import pytest

from tests.support.meshes import on_devices

GROUPS = (
    ("steps_by_active_latents", "steps_with_kernels", "steps_with_resampling", "ties"),
    ("lanes_that_overflow", "traffic", "shards", "other_meshes"),
)
"""Checks that share a process, which takes about 35 seconds of one core."""

EVERY = """
import json, sys
from tests.support.meshes import compare, config_of
for given in sys.argv[2:]:
    variant, products = given.split("-")
    config = config_of(variant, sys.argv[1], products=products)
    print(json.dumps([given, sorted(compare(config))]))
"""
"""What is given of an architecture is compared. `compare` raises where it differs."""


@functools.cache
def outcomes(group: tuple[str, ...]) -> dict[str, str]:
    """What each check of the group raised."""
    script = "import sys; from tests.support.mesh_checks import run; run(*sys.argv[1:])"
    return json.loads(on_devices(script, *group).splitlines()[-1])


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("check", "group"), [(check, group) for group in GROUPS for check in group])
def test_on_four_devices(check: str, group: tuple[str, ...]) -> None:
    """See the function of that name in tests/support/mesh_checks.py."""
    assert outcomes(group)[check] == ""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_steps_in_blocks_of_rows() -> None:
    assert outcomes(("steps_in_blocks_of_rows",)) == {"steps_in_blocks_of_rows": ""}


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("architecture", "sparse"),
    [
        *((name, True) for name in ("topk", "batchtopk", "relu", "matryoshka", "matryoshka_relu")),
        *((name, False) for name in ("hierarchical_topk", "jumprelu", "gated")),
    ],
)
def test_five_steps_on_each_mesh_equal_those_of_one_device(architecture: str, sparse: bool) -> None:
    """With and without a penalty; with sparse products too, where there are any."""
    every = ["baseline-dense", "adaptive-dense", *(["adaptive-sparse"] if sparse else [])]
    lines = on_devices(EVERY, architecture, *every).splitlines()
    assert [json.loads(line) for line in lines if line.startswith("[")] == [
        [one, ["1x4", "2x2", "4x1"]] for one in every
    ]
