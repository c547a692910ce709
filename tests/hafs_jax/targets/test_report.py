"""What `hafs plan` says: of a program compiled for this machine's CPU in the GPU's place, and without a compiler."""

import jax
import pytest

from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.targets import report
from hafs_jax.targets.deviceless import NoCompiler, arguments_on, devices_of
from hafs_jax.targets.gpus import GPUS
from hafs_jax.targets.report import described

D, B = 16, 32


def config_of(variant: str = "baseline") -> TrainConfig:
    sae = {"n_latents": 64, "k": 2, "expansion": 4}
    return with_fields(preset(variant, "topk"), {"sae": sae, "batch_size": B, "sparsity": {"aux_k": 4}})


def test_the_memory_the_time_and_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's compiler stands in for CUDA's: the text is of another target, and read in the same way."""
    monkeypatch.setattr(report, "devices_of", lambda gpu, count: jax.devices()[:count])
    lines = described(config_of("adaptive"), GPUS["h100"], D)
    assert lines[0].startswith("topk D=16 F=64 k=2, 32 rows a step, float32, dense products; compiled for h100, no")
    assert "of 86 GB (state and rows" in lines[1]
    assert "ms, so at most" in lines[2] and "by roofline" in lines[2]
    assert any("product" in line and "TFLOP" in line for line in lines[4:])
    assert "  all else" in "\n".join(lines)


def test_without_the_cuda_wheels_the_extra_is_named_and_the_memory_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("Unknown backend: 'cuda' requested")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", none)
    first, second = described(config_of(), GPUS["a100"], D)
    assert "pip install 'hafs-jax[gpu-check]'" in first and first.count("\n") == 0
    assert second.startswith("without it, by an estimate: ") and "parameters" in second
    with pytest.raises(NoCompiler):
        devices_of(GPUS["a100"])


def test_a_transcoders_program_takes_two_rows() -> None:
    config = with_fields(config_of("strict"), {"sae": {"transcode": True}})
    state, batches, scale, _, resolved = arguments_on(jax.devices()[:1], config, D, d_out=7, steps=2)
    assert [batch.shape for batch in batches] == [(2, B, D), (2, B, 7)]
    assert scale.target is not None and state.params["W_dec"].shape == (64, 7)
    assert resolved.penalty.mu0 is not None and resolved.tokens is not None
