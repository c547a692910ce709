"""Checks of a run's health from its metrics: sparsity, dead latents, bad batches, progress, gate. It imports no JAX."""

from typing import Any

from hafs_jax.config import TrainConfig

DEAD_SHARE, L0_OFF = 0.05, 0.02  # a run above one of these should be looked at
# If FVU never reached tau and the last lambda is below this, the penalty did not act. Above it, the penalty did act.
INACTIVE_LAMBDA = 0.05


def health(config: TrainConfig, metrics: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """(whether it passed, one line about it) for each check of the logged steps `metrics`, which must not be empty."""
    last, recent = metrics[-1], metrics[-max(1, len(metrics) // 20) :]

    def mean(name: str, records: list[dict[str, Any]] = recent) -> float:
        values = [record[name] for record in records if record.get(name) is not None]
        return sum(values) / max(len(values), 1)

    l0, dead, bad = mean("l0"), last["dead_fraction"], last["bad_batches"]
    found = [
        (abs(l0 / config.sae.k - 1) <= L0_OFF, f"L0 {l0:.2f}, {l0 / config.sae.k - 1:+.1%} from k={config.sae.k}"),
        (dead <= DEAD_SHARE, f"{dead:.1%} of latents dead (not fired in {config.sparsity.dead_after_tokens:,} rows)"),
        (bad == 0, f"{bad} batches skipped because their loss was not finite"),
    ]
    half = metrics[len(metrics) // 2 :]
    falls = mean("loss_reconstruction") <= 1.05 * mean("loss_reconstruction", half[: max(1, len(half) // 10)])
    found.append(
        (falls, f"reconstruction loss {mean('loss_reconstruction'):.4f}, " + ("falling" if falls else "rising"))
    )
    if config.penalty.kind != "none":
        share = mean("penalty_gradient_share")
        found.append((share < 0.95, f"the penalty's share of W_dec's gradient is {share:.0%}"))
    if config.penalty.kind != "none" and config.penalty.gate:
        reached = bool(last["tau_reached"])
        inactive = not reached and last["lambda"] < INACTIVE_LAMBDA
        said = "reached" if reached else f"never reached{': adaptive inactive' if inactive else ''}"
        found.append((reached, f"tau {config.penalty.tau} {said}; lambda {last['lambda']:.2f}"))
    held = [record["heldout_fvu"] for record in metrics if record.get("heldout_fvu") is not None]
    if held:
        found.append((held[-1] <= 1.05 * min(held), f"held-out FVU {held[-1]:.4f}, best {min(held):.4f}"))
    return found
