"""The named presets of the training config: variants and architectures.

A variant says which penalty acts on the decoder. An architecture says what kind of SAE it is. Every pair of them
works. A new one is one line here, or a call of `hafs_jax.register_variant` or `hafs_jax.register_architecture`.
"""

from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean, replace_fields
from hafs_jax.config import ALIASES, TrainConfig

Fields = dict[str, Any]
"""Name of a field of TrainConfig -> its value, as `with_fields` takes it."""

VARIANTS: dict[str, Fields] = {
    "baseline": {},
    "strict": {"penalty": {"kind": "hinge"}},
    "adaptive": {"penalty": {"kind": "hinge", "ramp": True, "gate": True}},
    "yielding": {
        "penalty": {"kind": "hinge", "ramp": True, "gate": True, "yielding": "rarer", "lam_max": 0.3},
    },
    "ramp_only": {"penalty": {"kind": "hinge", "ramp": True}},
    "gate_only": {"penalty": {"kind": "hinge", "gate": True}},
    "ortsae": {"penalty": {"kind": "ortsae", "lam_max": 0.25, "chunk_size": 8192}},
    "frob": {"penalty": {"kind": "frob", "lam_max": 0.1}},
    "random_init": {"frozen": "everything"},
    "frozen_decoder": {"frozen": "decoder"},
}
"""What each variant changes from the defaults.

- baseline: no penalty.
- strict: the hinge at constant strength.
- adaptive: the hinge with the schedule alpha(t) and the error gate.
- yielding: adaptive at a tenth of its strength, and of a pair only the latent that fires less is turned.
- ramp_only, gate_only: the hinge with only one of the two.
- ortsae: OrtSAE's penalty at its published weight.
- frob: the squared cosines of all pairs.
- random_init, frozen_decoder: references, whose parameters or whose decoder never train.
"""

ARCHITECTURES: dict[str, Fields] = {
    "batchtopk": {},
    "topk": {},
    "hierarchical_topk": {},
    "relu": {"optimizer": {"learning_rate": 2e-3}},
    "jumprelu": {"sparsity": {"coefficient": 1000.0, "match_l0": False}},
    "gated": {},
    "matryoshka": {},
    "matryoshka_relu": {"sparsity": {"coefficient_fractions": (0.0, 0.2, 1.0)}},  # a steeper one kills the last bands
}
"""What each architecture changes from the defaults."""


def preset(variant: str = "baseline", architecture: str = "batchtopk", **fields: Any) -> TrainConfig:
    """The default config of a variant on an architecture, with `fields` replaced as `with_fields` does: `k=8`.

    Raises `UserError` for an unknown name.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}{did_you_mean(variant, VARIANTS)}")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    config = TrainConfig(variant=variant)
    config = with_fields(config, {"sae": {"architecture": architecture}})
    config = with_fields(with_fields(config, ARCHITECTURES[architecture]), VARIANTS[variant])
    return with_fields(config, fields)


def with_fields(config: TrainConfig, fields: Fields | None = None, **named: Any) -> TrainConfig:
    """`config` with some fields replaced. The new config is validated.

    A field of a part of the config is named by its path, by its short name in `hafs_jax.config.ALIASES`, or within a
    mapping that stands for the part. These four are the same:

        with_fields(config, k=8)
        with_fields(config, {"k": 8})
        with_fields(config, {"sae.k": 8})
        with_fields(config, {"sae": {"k": 8}})

    Raises `UserError` for an unknown name or a value that the field cannot have.
    """
    return replace_fields(config, {**(fields or {}), **named}, ALIASES)
