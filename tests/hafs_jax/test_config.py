"""Every field of the training config changes behaviour; presets; validation at construction."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import from_dict, to_dict
from hafs_jax.config import OptimizerConfig, PenaltyConfig, SAEConfig, SparsityConfig, TrainConfig, run_name
from hafs_jax.presets import preset, with_fields
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from tests.support.steps import B, D, batch, fresh, small

STEPS = 24  # of 24: the whole of a training, so that decay and freezing count

# field -> (variant, architecture, other value). What is not here is tested where it acts, see ELSEWHERE.
CHANGES: dict[str, tuple[str, str, Any]] = {
    "seed": ("strict", "batchtopk", 1),
    "sae.architecture": ("baseline", "batchtopk", "relu"),
    "sae.n_latents": ("baseline", "batchtopk", 13),
    "sae.k": ("baseline", "batchtopk", 2),
    "sae.encoder_scale": ("baseline", "batchtopk", 0.5),
    "sae.compute_dtype": ("baseline", "batchtopk", "bfloat16"),
    "penalty.kind": ("strict", "batchtopk", "none"),
    "penalty.lam_max": ("strict", "batchtopk", 1.0),
    "penalty.lam_min": ("gate_only", "batchtopk", 0.5),
    "penalty.ramp": ("strict", "batchtopk", True),
    "penalty.alpha_fractions": ("ramp_only", "batchtopk", (0.0, 0.05, 0.2, 0.8, 1.0)),
    "penalty.alpha_values": ("ramp_only", "batchtopk", (1.0, 0.5, 0.5, 0.0, 0.0)),
    "penalty.gate": ("strict", "batchtopk", True),
    "penalty.tau": ("gate_only", "batchtopk", 0.9),
    "penalty.gate_width": ("gate_only", "batchtopk", 0.9),
    "penalty.ema_decay": ("gate_only", "batchtopk", 0.5),
    "penalty.mu0": ("strict", "batchtopk", 0.3),
    "penalty.chunk_size": ("strict", "batchtopk", 4),
    "penalty.sharing": ("ramp_only", "batchtopk", "cofiring"),
    "sparsity.coefficient": ("baseline", "relu", 0.4),
    "sparsity.coefficient_fractions": ("baseline", "relu", (0.0, 0.5, 1.0)),
    "sparsity.coefficient_values": ("baseline", "relu", (0.5, 1.0, 1.0)),
    "sparsity.pre_activation": ("baseline", "relu", 0.5),
    "sparsity.resample_every_steps": ("baseline", "batchtopk", 4),
    "sparsity.resample_until": ("baseline", "batchtopk", 0.1),
    "sae.k_fractions": ("baseline", "batchtopk", (0.0, 0.2, 1.0)),
    "sae.k_values": ("baseline", "batchtopk", (2.0, 1.0)),
    "sae.encoder": ("baseline", "batchtopk", "random"),
    "sae.prefixes": ("baseline", "matryoshka", (0.5, 1.0)),
    "sae.sampled_prefixes": ("baseline", "matryoshka", 3),
    "sae.budgets": ("baseline", "hierarchical_topk", (0.5, 1.0)),
    "sae.first_threshold": ("baseline", "jumprelu", 0.9),
    "sae.bandwidth": ("baseline", "jumprelu", 1.1),
    "sae.threshold_gradient_to_input": ("baseline", "jumprelu", True),
    "sae.l0_loss": ("baseline", "jumprelu", "tanh"),
    "frozen": ("baseline", "batchtopk", "decoder"),
    "optimizer.name": ("baseline", "batchtopk", "lion"),
    "optimizer.decay_shape": ("baseline", "batchtopk", "cosine"),
    "optimizer.average": ("baseline", "batchtopk", 0.5),
    "penalty.yielding": ("strict", "batchtopk", "later"),
    "penalty.every_steps": ("strict", "batchtopk", 2),
    "penalty.parents": ("ramp_only", "batchtopk", 2),
    "penalty.regroup_every_steps": ("ramp_only", "batchtopk", 4),
    "sparsity.match_l0": ("baseline", "relu", False),
    "sparsity.match_gain": ("baseline", "relu", 0.1),
    "sparsity.freeze_fraction": ("baseline", "relu", 0.6),
    "sparsity.aux": ("baseline", "batchtopk", 0.5),
    "sparsity.aux_k": ("baseline", "batchtopk", 1),
    "sparsity.dead_after_tokens": ("baseline", "batchtopk", 10**6),
    "sparsity.threshold_decay": ("baseline", "batchtopk", 0.5),
    "optimizer.learning_rate": ("baseline", "batchtopk", 0.02),
    "optimizer.warmup": ("baseline", "batchtopk", 0.5),
    "optimizer.decay": ("baseline", "batchtopk", 0.6),
    "optimizer.beta1": ("baseline", "batchtopk", 0.5),
    "optimizer.beta2": ("baseline", "batchtopk", 0.9),
    "optimizer.epsilon": ("baseline", "batchtopk", 1e-2),
    "optimizer.clip_norm": ("baseline", "batchtopk", 1e-6),
    "tokens": ("ramp_only", "batchtopk", 40 * B),
}
ELSEWHERE = {
    "variant": "names the run: test_train",
    "batch_size": "shapes the batches: test_data",
    "steps_per_dispatch": "test_step: several steps per dispatch equal single steps",
    "checkpoint_every_steps": "test_train: a run on bad data keeps the checkpoint",
    "log_every_steps": "test_train: logging does not change training",
    "coherence_every_steps": "test_train: logging does not change training",
    "tensorboard": "test_runlog: sinks do not change training",
    "wandb": "test_runlog: sinks do not change training",
    "max_bad_fraction": "test_train: a run on bad data stops",
    "mesh": "test_devices: steps on meshes, and a run that goes on with another",
    "products": "test_entries: the sparse step is the dense one",
    "kernels": "test_kernels: a training step with kernels is the plain one",
    "passes": "below",
    "data_seed": "test_sweeps: members share the order of the batches",
    "init_from": "test_train: a run starts from a SAELens folder",
    "tag": "below",
    "arm": "below",
    "evaluate_every_steps": "test_train: held-out measurements",
    "heldout_rows": "test_train: held-out measurements",
    "patience": "test_train: held-out measurements",
    "sae.centre": "test_train: where b_dec starts",
    "sae.transcode": "test_train: a transcoder",
    "sae.expansion": "below",
    "penalty.tau_factor": "test_train: tau comes from the baseline",
    "penalty.noise_floor": "below",
    "penalty.group_size": "below",
}


def replaced(config: TrainConfig, field: str, value: Any) -> TrainConfig:
    part, _, name = field.rpartition(".")
    if not part:
        return dataclasses.replace(config, **{field: value})
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})


@functools.cache
def outcome(config: TrainConfig) -> list[np.ndarray]:
    """What training leaves behind: weights, the inference threshold, the controllers. Fields share the run before."""
    hyper = hyperparameters(config)
    state = init_state(config, D, jax.random.key(config.seed), hyper)
    acts = jnp.stack([batch(seed) for seed in range(STEPS)])
    state, _ = compile_steps()(state, acts, fresh(config)[1], hyper, config)
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves((state.weights(), state.threshold_ema, state.gate, state.sparsity))
    ]


def base(variant: str, architecture: str) -> TrainConfig:
    config = small(variant, architecture, sparsity={"dead_after_tokens": B, "coefficient": 0.2}, sae={"k": 2})
    penalty = dataclasses.replace(config.penalty, lam_max=3.0, group_size=3)
    return dataclasses.replace(config, penalty=penalty, tokens=STEPS * B)


@pytest.mark.parametrize("field", CHANGES)
def test_field_changes_the_outcome(field: str) -> None:
    variant, architecture, value = CHANGES[field]
    config = base(variant, architecture)
    if field == "sae.k":
        config = replaced(config, "sae.k", 3)
    if field == "penalty.gate":
        config = replaced(config, "penalty.tau", 0.4)
    if field in ("penalty.parents", "penalty.regroup_every_steps"):
        config = replaced(replaced(config, "penalty.sharing", "parent"), "penalty.parents", 4)
    if field == "sparsity.resample_until":
        config = replaced(config, "sparsity.resample_every_steps", 4)
    if field == "sae.k_fractions":
        knots = {"k_fractions": (0.0, 0.7, 1.0), "k_values": (2.0, 1.0, 1.0)}
        config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, **knots))
    before, after = outcome(config), outcome(replaced(config, field, value))
    same = len(before) == len(after) and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not same, f"{field}={value} changed nothing"


def test_every_field_is_covered() -> None:
    def leaves(config: Any, prefix: str = "") -> set[str]:
        names: set[str] = set()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            inner = dataclasses.is_dataclass(value)
            names |= leaves(value, f"{prefix}{field.name}.") if inner else {prefix + field.name}
        return names

    assert leaves(TrainConfig()) == set(CHANGES) | set(ELSEWHERE)


def test_fields_resolved_from_the_store(tmp_path: Any) -> None:
    from hafs_jax.store.reader import Store
    from hafs_jax.training.train import resolve
    from tests.support.stores import planted, write_store

    store = Store(write_store(tmp_path / "store", planted(300, 24, 20, 3)[0]))
    config = preset("strict")
    config = dataclasses.replace(config, batch_size=10)
    base_config, notes = resolve(config, store, tmp_path)
    assert base_config.sae.n_latents == 4 * 24 and base_config.tokens == int(config.passes * 300)
    assert 0 < base_config.penalty.mu0 < 1 and "mu0" in notes
    assert resolve(replaced(config, "sae.expansion", 8), store, tmp_path)[0].sae.n_latents == 8 * 24
    assert resolve(replaced(config, "passes", 3.0), store, tmp_path)[0].tokens == 900
    tighter = resolve(replaced(config, "penalty.noise_floor", 0.1), store, tmp_path)[0]
    assert tighter.penalty.mu0 > base_config.penalty.mu0


def test_group_size_decides_who_may_share() -> None:
    config = replaced(base("ramp_only", "batchtopk"), "penalty.sharing", "contiguous")
    before, after = outcome(config), outcome(replaced(config, "penalty.group_size", 6))
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_round_trip_through_json_and_run_names() -> None:
    config = preset("adaptive", "relu")
    assert from_dict(TrainConfig, to_dict(config), "config.json") == config
    assert config.run_name == "adaptive-relu-s0" and preset("strict").run_name == "strict-s0"
    assert dataclasses.replace(preset("strict"), seed=3, tag="k=16").run_name == "strict-s3-k=16"
    assert run_name("strict", "relu", 3, "k=16") == "strict-relu-s3-k=16"
    with pytest.raises(UserError, match=r"config.json: penalty: unknown key 'taau'; did you mean 'tau'\?"):
        from_dict(TrainConfig, {"penalty": {"taau": 1.0}}, "config.json")


def test_an_arm_is_what_was_said_or_the_variant_and_the_tag_without_k() -> None:
    config = with_fields(preset("strict"), {"sae": {"k": 16}, "tag": "mine,lam=0.3,k=16"})
    assert config.arm_name == "strict mine lam=0.3" and preset("baseline").arm_name == "baseline"
    assert dataclasses.replace(config, tag="k=160").arm_name == "strict k=160"
    assert dataclasses.replace(config, arm="strict penalty.yielding=rarer").arm_name == "strict penalty.yielding=rarer"
    with pytest.raises(UserError, match="expected one line of text"):
        dataclasses.replace(config, arm="two\nlines")


def test_whole_dispatches_only() -> None:
    config = dataclasses.replace(TrainConfig(), batch_size=10, steps_per_dispatch=8)
    assert [dataclasses.replace(config, tokens=t).steps for t in (10, 79, 80, 239, 240)] == [1, 7, 8, 16, 24]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAEConfig(k=0), r"sae\.k=0: expected at least 1$"),
        (lambda: SAEConfig(n_latents=5, k=6), r"sae\.k=6: expected at most sae.n_latents=5"),
        (
            lambda: SAEConfig(compute_dtype="bfloat61"),
            r"sae\.compute_dtype='bfloat61': expected one of .*did you mean 'bfloat16'",
        ),
        (lambda: PenaltyConfig(alpha_fractions=(0.0, 0.5)), "expected rising fractions"),
        (
            lambda: PenaltyConfig(alpha_fractions=(0.0, 1.0), alpha_values=(2.0, 0.0)),
            r"penalty\.alpha_values\[0\]=2\.0: expected 0 to 1",
        ),
        (lambda: SAEConfig(prefixes=(0.5, 0.9)), "rising fractions of F, the last of them 1"),
        (lambda: SAEConfig(k_values=(1.0, -1.0)), r"sae\.k_values\[1\]=-1\.0: expected at least 0"),
        (lambda: TrainConfig(patience=2), "evaluate_every_steps above 0"),
        (lambda: TrainConfig(tag="a/b"), "expected letters, digits"),
        (lambda: TrainConfig(frozen="encoder"), "expected one of nothing, decoder, everything"),
        (lambda: OptimizerConfig(average=1.0), r"optimizer\.average=1\.0"),
        (lambda: PenaltyConfig(lam_min=4.0), r"penalty\.lam_min=4\.0: expected at most penalty.lam_max=3\.0"),
        (lambda: PenaltyConfig(tau=-1.0), r"penalty\.tau=-1\.0: expected above 0, or none"),
        (lambda: PenaltyConfig(mu0=1.0), r"penalty\.mu0=1\.0"),
        (lambda: SparsityConfig(freeze_fraction=2.0), r"sparsity\.freeze_fraction=2\.0: expected 0 to 1"),
        (lambda: OptimizerConfig(warmup=0.9, decay=0.2), "expected fractions that add up to at most 1"),
        (lambda: TrainConfig(tokens=5), r"tokens=5: expected at least one batch, batch_size=1024"),
        (lambda: TrainConfig(max_bad_fraction=1.0), r"max_bad_fraction=1\.0: expected at least 0 and below 1"),
        (lambda: preset("adaptiv"), "did you mean 'adaptive'"),
        (lambda: preset("strict", "rellu"), "did you mean 'relu'"),
    ],
)
def test_a_bad_value_is_refused_at_construction(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_config_of_an_earlier_version_is_read_without_its_number_of_shards() -> None:
    values = to_dict(TrainConfig())
    assert from_dict(TrainConfig, {**values, "dictionary_shards": 4}, "config.json") == TrainConfig()
    with pytest.raises(UserError, match="unknown key 'dictionary_shard'"):
        from_dict(TrainConfig, {**values, "dictionary_shard": 4}, "config.json")
