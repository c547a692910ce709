"""An architecture and a penalty from outside the repository: one function and one record each, and nothing else.

The contract suite itself is run on them, in a process that loads the module as any `hafs` command does.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hafs_jax import preset, presets
from hafs_jax.base.errors import UserError
from hafs_jax.config import PENALTY_KINDS
from hafs_jax.fast.forms import FORMS
from hafs_jax.method.architectures import ARCHITECTURES, Architecture, l0, relu, topk
from hafs_jax.method.penalties import PENALTIES, Penalty, hinge_penalty
from hafs_jax.registry import register_architecture, register_penalty, register_variant
from tests.support.environments import importing

ROOT = Path(__file__).parents[2]
MODULE = '''
"""An architecture and a penalty of somebody else's."""

import jax
import jax.numpy as jnp

from hafs_jax import register_architecture, register_penalty
from hafs_jax.method.architectures import Architecture, l1
from hafs_jax.method.penalties import Penalty


def swish(pre_BF, params, config, at):
    """pre sigmoid(4 pre) where pre > 0, else 0."""
    return jax.nn.relu(pre_BF) * jax.nn.sigmoid(4.0 * pre_BF)


def centred(W_dec, alpha, structure, mu0, config, key):
    """|mean of the dictionary vectors|^2 F: they are to cancel out."""
    return (1.0 - alpha) * len(W_dec) * jnp.sum(jnp.mean(W_dec, axis=0) ** 2)


register_architecture("swish", Architecture(swish, cost=l1, starts_dense=True))
register_penalty("centred", Penalty(centred), {"penalty": {"lam_max": 0.1}})
'''


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "theirs.py").write_text(MODULE)
    return importing(tmp_path, HAFS_PLUGINS="theirs", PYTEST_ADDOPTS="-p no:cacheprovider")


@pytest.mark.slow
def test_the_contract_suite_holds_for_them(environment: dict[str, str]) -> None:
    chosen = "(adaptive and swish) or (centred and (swish or batchtopk)) or (near_float32 and swish)"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/contract/test_architectures.py", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " 8 passed" in done.stdout, done.stdout[-300:]


def test_every_command_knows_them(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "hafs_jax", "train", "--help", "--variant", "centred", "--arch", "swish"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "swish" in done.stdout and "[centred]" in done.stdout  # as an architecture, and as penalty.kind's default


class TestRegister:
    @pytest.fixture(autouse=True)
    def restored(self) -> Iterator[None]:
        """What a test adds goes again."""
        tables = (ARCHITECTURES, PENALTIES, FORMS, presets.ARCHITECTURES, presets.VARIANTS)
        before, kinds = [dict(table) for table in tables], list(PENALTY_KINDS)
        yield
        for table, known in zip(tables, before, strict=True):
            table.clear()
            table.update(known)
        PENALTY_KINDS[:] = kinds

    def test_a_preset_comes_with_an_architecture_and_a_variant_with_a_penalty(self) -> None:
        register_architecture("plain", Architecture(relu), {"optimizer": {"learning_rate": 0.5}})
        assert preset("baseline", "plain").optimizer.learning_rate == 0.5
        register_penalty("weak", Penalty(hinge_penalty, has_margin=True), {"penalty": {"lam_max": 0.01, "gate": True}})
        config = preset("weak", "plain")
        assert (config.penalty.kind, config.penalty.lam_max, config.penalty.gate) == ("weak", 0.01, True)
        register_variant("late", {"penalty": {"kind": "hinge", "alpha_values": (1.0, 1.0, 1.0, 1.0, 0.0)}})
        assert preset("late").penalty.alpha_values[3] == 1.0

    def test_a_name_that_is_taken_or_is_none_is_refused(self) -> None:
        register_architecture("topk", ARCHITECTURES["topk"])  # the same again: a module that is imported twice
        with pytest.raises(UserError, match="architecture 'topk': expected a new name"):
            register_architecture("topk", Architecture(topk))
        with pytest.raises(UserError, match="penalty 'hinge': expected a new name"):
            register_penalty("hinge", Penalty(hinge_penalty))
        with pytest.raises(UserError, match="variant 'strict': expected a new name"):
            register_variant("strict", {})
        with pytest.raises(UserError, match="expected a name of lower-case letters"):
            register_architecture("My SAE", Architecture(relu))
        with pytest.raises(UserError, match="expected cost l1, or none, with a form"):
            register_architecture("other", Architecture(relu, cost=l0), form=FORMS["relu"])
