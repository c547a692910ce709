"""The named presets: a variant is a setting of the penalty, an architecture a setting of the autoencoder's fields.

A new arm or architecture joins by one line here.
"""

import dataclasses
from typing import Any

from extract.format.config import did_you_mean
from extract.format.errors import UserError
from hafs_jax.config import TrainConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"kind": "none"},
    "strict": {"kind": "hinge", "ramp": False, "gate": False},
    "adaptive": {"kind": "hinge", "ramp": True, "gate": True},
    "ramp_only": {"kind": "hinge", "ramp": True, "gate": False},
    "gate_only": {"kind": "hinge", "ramp": False, "gate": True},
}
"""The arms as fields of PenaltyConfig: no penalty; constant pressure; alpha(t) and the gate; each of them alone."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "topk": {},
    "relu": {"optimizer": {"learning_rate": 2e-3}},
}
"""Fields of TrainConfig that an architecture changes from the defaults."""


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
    changes: dict[str, dict[str, Any]] = {"penalty": VARIANTS[variant], "sae": {"architecture": architecture}}
    for part, values in ARCHITECTURES[architecture].items():
        changes[part] = {**changes.get(part, {}), **values}
    parts = {part: dataclasses.replace(getattr(config, part), **values) for part, values in changes.items()}
    return dataclasses.replace(config, **parts)
