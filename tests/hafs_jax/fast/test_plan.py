"""What is chosen from the machine: once, into the run's config; and programs for a machine that is not there."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax import load
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json
from hafs_jax.config import TrainConfig
from hafs_jax.fast import plan
from hafs_jax.fast.plan import Machine, choose, resolve_products
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run
from hafs_jax.training import train as training
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters
from hafs_jax.training.train import train
from tests.support.steps import batch, fresh, small
from tests.support.stores import planted, write_store


def config_of(architecture: str, **sae: object) -> TrainConfig:
    return with_fields(preset("baseline", architecture), {"sae": sae, "batch_size": 24, "tokens": 2400})


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize(
    ("architecture", "dtype", "amx", "cores", "least"),
    [
        ("topk", "float32", True, 1, 220),
        ("topk", "float32", True, 2, 330),
        ("relu", "float32", False, 2, 495),
        ("topk", "float32", False, 16, 1870),
        ("topk", "bfloat16", True, 2, 2550),
        ("topk", "bfloat16", False, 2, 330),
    ],
)
def test_from_which_ratio_sparse_products_are_chosen(
    architecture: str, dtype: str, amx: bool, cores: int, least: int, faster: bool
) -> None:
    machine = Machine("cpu", cores, amx)
    config = config_of(architecture, n_latents=least - (not faster), k=10, compute_dtype=dtype)
    assert resolve_products(config, machine) == ("sparse" if faster else "dense")
    unmatched = with_fields(config, {"sparsity": {"match_l0": False}})
    assert resolve_products(unmatched, machine) == ("sparse" if faster and architecture == "topk" else "dense")
    assert resolve_products(dataclasses.replace(unmatched, products="sparse"), machine) == "sparse"
    assert resolve_products(config, dataclasses.replace(machine, platform="tpu")) == "dense"


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize(
    ("architecture", "dtype", "least"),
    [("topk", "bfloat16", 7680), ("topk", "float32", 5120), ("relu", "bfloat16", 11520), ("gated", "bfloat16", None)],
)
def test_from_which_ratio_sparse_products_are_chosen_on_a_gpu(
    architecture: str, dtype: str, least: int | None, faster: bool
) -> None:
    config = config_of(architecture, n_latents=(least or 10**6) - (not faster), k=10, compute_dtype=dtype)
    expected = "sparse" if faster and least else "dense"
    assert resolve_products(config, Machine("gpu", 1, False, adds_rows=True)) == expected
    assert resolve_products(config, Machine("gpu", 1, False)) == "dense"  # before Hopper


def test_what_has_no_sparse_form_is_dense_whatever_is_asked_for() -> None:
    machine = Machine("cpu", 1, False)
    for config in (
        config_of("gated", n_latents=5000, k=10),
        with_fields(config_of("relu", n_latents=5000, k=10), {"sparsity": {"pre_activation": 0.1}}),
    ):
        asked = dataclasses.replace(config, products="sparse")
        assert resolve_products(asked, machine) == "dense" and choose(asked, "cpu").products == "dense"


def test_a_program_for_a_gpu_is_written_on_a_machine_without_one() -> None:
    """It differs from the CPU's: no loop over chunks or entries, no branch around the update."""
    config = dataclasses.replace(small("strict", "topk"), products="sparse")
    state, scale = fresh(config)
    given = (state, jnp.stack([batch(0), batch(1)]), scale, hyperparameters(config), config)
    texts = {}
    for platform, lowered in (("cpu", "cpu"), ("gpu", "cuda")):
        program = compile_steps(platform=platform).trace(*given).lower(lowering_platforms=(lowered,))
        texts[platform] = program.as_text()
    assert texts["cpu"].count("stablehlo.while") > texts["gpu"].count("stablehlo.while")
    assert texts["cpu"].count("stablehlo.case") > texts["gpu"].count("stablehlo.case")
    assert texts["gpu"].count("stablehlo.scatter") > texts["cpu"].count("stablehlo.scatter")


def test_only_one_module_asks_what_machine_this_is() -> None:
    folder = Path(plan.__file__).parents[1]
    asking = [path for path in folder.rglob("*.py") if "default_backend()" in path.read_text()]
    assert asking == [Path(plan.__file__)]


class TestProductsOfARun:
    @pytest.fixture(scope="class")
    def store(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        acts = planted(600, 6, 12, 2, seed=2)[0]
        return write_store(tmp_path_factory.mktemp("plan") / "store", acts, shard_rows=300)

    def config(self, **fields: object) -> TrainConfig:
        own = {"tokens": 32 * 24, "batch_size": 32, "steps_per_dispatch": 4, "checkpoint_every_steps": 8, **fields}
        return with_fields(preset("baseline", "topk"), {**own, "sae": {"n_latents": 66, "k": 2}})

    def test_are_resolved_into_the_config_before_anything_compiles(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for cores, products in ((1, "sparse"), (2, "sparse"), (3, "dense")):
            monkeypatch.setattr(plan, "_cores", lambda cores=cores: cores)
            run = train(self.config(tag=str(cores)), store, tmp_path)
            assert run.config().products == products

    def test_stay_what_they_were_when_a_run_goes_on_elsewhere(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "_cores", lambda: 1)
        whole = load(train(self.config(tag="whole"), store, tmp_path).folder)
        seen: list[str] = []

        class Killed(Exception):
            pass

        def killed(self: object, step: int, metrics: object) -> None:
            if step > 12:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("hafs_jax.training.runlog.Progress.advance", killed)
            train(self.config(), store, tmp_path)
        monkeypatch.setattr(plan, "_cores", lambda: 16)
        fit = training.fit

        def noted(members: list[Any], *rest: Any, **options: Any) -> Any:
            seen.append(members[0].config.products)
            return fit(members, *rest, **options)

        monkeypatch.setattr(training, "fit", noted)
        again = train(self.config(), store, tmp_path)
        assert seen == ["sparse"] and again.config().products == "sparse"
        for name, value in whole.params.items():
            np.testing.assert_array_equal(load(again.folder).params[name], value)
        with pytest.raises(UserError, match="products=sparse, this one has dense"):
            train(self.config(products="dense"), store, tmp_path)
        assert train(self.config(), store, tmp_path, force=True).config().products == "dense"

    def test_of_an_earlier_version_that_wrote_auto_go_on(self, store: Path, tmp_path: Path) -> None:
        run = train(self.config(), store, tmp_path)
        record = run.record()
        assert record["config"]["products"] != "auto"
        write_json(run.config_path, {**record, "config": {**record["config"], "products": "auto"}})
        assert train(self.config(), store, tmp_path).config().products == "auto"

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
    def test_one_core_and_two_give_the_same_weights_or_say_why_not(self, store: Path, tmp_path: Path) -> None:
        script = (
            "import os, sys\n"
            "os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))\n"
            "from hafs_jax.cli import main\n"
            "main(['train', '--store', sys.argv[2], '--out', sys.argv[3], *sys.argv[4:]])\n"
        )
        flags = ["--tokens", "768", "--batch-size", "32", "--sae.n-latents", "66", "--sae.k", "2", "--arch", "topk"]
        runs = []
        for cores in (1, 2):
            out = tmp_path / str(cores)
            command = [sys.executable, "-c", script, str(cores), str(store), str(out), *flags]
            subprocess.run(command, check=True, capture_output=True, timeout=240)
            runs.append(Run(out / "runs" / "baseline-topk-s0"))
        configs = [run.config() for run in runs]
        assert [config.products for config in configs] == [
            resolve_products(self.config(), Machine("cpu", cores, False)) for cores in (1, 2)
        ]
        if configs[0] == configs[1]:
            for name, value in load(runs[0].folder).params.items():
                np.testing.assert_array_equal(load(runs[1].folder).params[name], value)
