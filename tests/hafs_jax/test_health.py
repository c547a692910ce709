"""What `inspect` says of healthy and ill runs."""

import dataclasses

import pytest

from hafs_jax.health import health
from hafs_jax.presets import preset, with_fields

GOOD = {
    "l0": 40.1, "dead_fraction": 0.01, "bad_batches": 0, "loss_reconstruction": 0.2, "penalty_gradient_share": 0.3,
    "tau_reached": True, "lambda": 2.0, "heldout_fvu": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"l0": 43.0}, r"L0 43.00, +7.5% from k=40"),
        ({"dead_fraction": 0.2}, "20.0% of latents dead"),
        ({"bad_batches": 3}, "3 batches"),
        ({"loss_reconstruction": 0.4}, "reconstruction loss 0.4000, rising"),
        ({"penalty_gradient_share": 0.99}, "gradient is 99%"),
        ({"tau_reached": False}, "never reached; lambda 2.00"),
        ({"tau_reached": False, "lambda": 0.01}, "never reached: adaptive inactive; lambda 0.01"),
        ({"heldout_fvu": 0.3}, "held-out FVU 0.3000, best 0.2000"),
    ],
)
def test_each_illness_is_named_and_nothing_else(changes: dict, said: str) -> None:
    config = with_fields(preset("adaptive"), {"penalty": {"tau": 0.3}})
    well = health(config, [GOOD] * 40)
    assert len(well) == 7 and all(verdict for verdict, _ in well)
    ill = [text for verdict, text in health(config, [GOOD] * 38 + [{**GOOD, **changes}] * 2) if not verdict]
    assert len(ill) == 1 and said in ill[0]


def test_a_baseline_without_heldout_rows_has_fewer_checks() -> None:
    record = {name: value for name, value in GOOD.items() if name != "heldout_fvu"}
    assert len(health(dataclasses.replace(preset()), [record])) == 4
