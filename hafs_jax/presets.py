"""The named presets: a variant is an arm of the method, an architecture a form of autoencoder; every pair composes.

A new arm or architecture joins by one line here.
"""

import dataclasses
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.config import TrainConfig

Fields = dict[str, Any]
"""Field of TrainConfig -> value, or part of TrainConfig -> fields of that part."""

VARIANTS: dict[str, Fields] = {
    "baseline": {},
    "strict": {"penalty": {"kind": "hinge"}},
    "adaptive": {"penalty": {"kind": "hinge", "ramp": True, "gate": True}},
    "ramp_only": {"penalty": {"kind": "hinge", "ramp": True}},
    "gate_only": {"penalty": {"kind": "hinge", "gate": True}},
    "ortsae": {"penalty": {"kind": "ortsae", "lam_max": 0.25, "chunk_size": 8192}},
    "frob": {"penalty": {"kind": "frob", "lam_max": 0.1}},
    "random_init": {"frozen": "everything"},
    "frozen_decoder": {"frozen": "decoder"},
}
"""The arms: no penalty; constant pressure; alpha(t) and the gate; each of them alone; OrtSAE's penalty at its published
weight; all squared cosines; and two references whose SAE or decoder never trains."""

ARCHITECTURES: dict[str, Fields] = {
    "batchtopk": {},
    "topk": {},
    "relu": {"optimizer": {"learning_rate": 2e-3}},
    "jumprelu": {"sparsity": {"coefficient": 1000.0, "match_l0": False}},
    "gated": {},
    "matryoshka": {},
    "matryoshka_relu": {"sparsity": {"coefficient_fractions": (0.0, 0.2, 1.0)}},  # a steeper rise kills the last bands
}
"""What an architecture changes from the defaults."""


def preset(variant: str = "baseline", architecture: str = "batchtopk") -> TrainConfig:
    """The default config of a variant on an architecture; `UserError` names the known ones."""
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}{did_you_mean(variant, VARIANTS)}")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    config = TrainConfig(variant=variant)
    config = with_fields(config, {"sae": {"architecture": architecture}})
    return with_fields(with_fields(config, ARCHITECTURES[architecture]), VARIANTS[variant])


def with_fields(config: TrainConfig, fields: Fields) -> TrainConfig:
    """`config` with fields replaced, those of its parts included; validated anew."""
    changes = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(config, **changes)
