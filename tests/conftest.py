"""Shared set-up of the tests: array shapes are checked at run time, rank promotion raises, JAX stays on the CPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import flax.struct
import pytest
from jaxtyping import install_import_hook

# JAX rebuilds pytrees with shardings, shapes and placeholders for leaves: their constructors can't be checked.
flax.struct.PyTreeNode.__no_type_check__ = True

install_import_hook("hafs_jax", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Hundreds of configs compile hundreds of programs: kept for the whole session they take gigabytes."""
    yield
    jax.clear_caches()
