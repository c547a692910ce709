"""Training on several devices: four virtual ones of the host, in processes of their own, as their number is fixed."""

import os
import subprocess
import sys
from pathlib import Path

STEPS = """
import jax, numpy as np, jax.numpy as jnp, dataclasses
from tests.support.steps import small, fresh, batch
from hafs_jax.training.state import BATCHES, make_mesh, state_shardings
from hafs_jax.fast import plan
from hafs_jax.fast.objective import blocks_of_rows
from hafs_jax.training.state import hyperparameters
from hafs_jax.training.programs import compile_steps
acts = jnp.stack([batch(0), batch(1)])
def check(config, over, shift=0.0):
    outs = []
    for split in (False, True):
        state, scale = fresh(config)
        state.params['b_enc'] += shift
        block, spread = acts, None
        if split:
            mesh = make_mesh(over)
            spread = state_shardings(state, mesh)
            state = jax.device_put(state, spread)
            block = jax.device_put(acts, jax.NamedSharding(mesh, BATCHES))
            assert state.params['W_dec'].addressable_shards[0].data.shape == (12 // over, 5)
        state, metrics = compile_steps(spread)(state, block, scale, hyperparameters(config), config)
        outs.append(jax.device_get((state.params, metrics)))
    for one, other in zip(jax.tree.leaves(outs[0]), jax.tree.leaves(outs[1])):
        np.testing.assert_allclose(one, other, atol=2e-5)
    return float(outs[0][1]['l0'][0])
check(small('adaptive', sae={'n_latents': 12, 'k': 3}), 2)
relu = small('adaptive', 'relu', sae={'n_latents': 12, 'k': 3})
by_active = dataclasses.replace(relu, products='sparse')
assert check(by_active, 1) > 4.5 > check(by_active, 1, shift=-1.0) > 0
plan._BLOCK_BYTES['cpu'] = 4 * 12 * 4
assert blocks_of_rows(relu, acts.shape[1], plan.choose(relu)) > 1
check(dataclasses.replace(relu, products='dense'), 1)
check(by_active, 1, shift=-1.0)
print('equal on', jax.device_count())
"""

RESUMED = """
import shutil, sys, numpy as np
from pathlib import Path
from hafs_jax.store.arrays import write_array_store
from hafs_jax import load, preset, train, with_fields
folder = Path(sys.argv[1])
acts = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
store = write_array_store(folder / 'made', acts)["train"]
for shards in (1, 2):
    fields = {"tokens": 64 * 20, "batch_size": 64, "steps_per_dispatch": 5, "checkpoint_every_steps": 10}
    fields |= {"dictionary_shards": shards, "sae": {"n_latents": 16, "k": 2}, "tag": str(shards)}
    config = with_fields(preset("baseline"), fields)
    run = train(config, store, folder / "runs")
    whole = {name: np.asarray(value) for name, value in load(run.folder).params.items()}
    steps = sorted(int(path.name) for path in run.checkpoints.iterdir())
    assert steps == [10, 20], steps
    shutil.rmtree(run.checkpoints / "20")
    run.result_path.unlink()
    train(config, store, folder / "runs")
    for name, value in load(run.folder).params.items():
        np.testing.assert_array_equal(value, whole[name])
print("resumed")
"""


def on_four_devices(script: str, *arguments: str) -> str:
    """What the script prints."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_sharded_step_equals_the_step_on_one_device() -> None:
    """Batch and dictionary both split; and the batch alone, by active latents (where they fit their slots and where
    they do not) and by blocks of rows."""
    assert "equal on 4" in on_four_devices(STEPS)


def test_a_training_on_several_devices_resumes_with_the_same_weights(tmp_path: Path) -> None:
    assert "resumed" in on_four_devices(RESUMED, str(tmp_path))
