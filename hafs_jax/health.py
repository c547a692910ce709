"""Checks of a run's health from its metrics: sparsity, dead latents, bad batches, progress, gate. It imports no JAX."""

import math
from typing import Any

from hafs_jax.config import TrainConfig
from hafs_jax.runs import Run

DEAD_SHARE, L0_OFF = 0.05, 0.02  # a run above one of these should be looked at
# If FVU never reached tau and the last lambda is below this, the penalty did not act. Above it, the penalty did act.
INACTIVE_LAMBDA = 0.05
DEAD_L0 = 0.1  # an SAE with fewer active latents per row than this is dead


def death(run: Run) -> str | None:
    """How a dead SAE shows and which setting killed it, in words; None if the SAE lives or no step was logged.

    In scaled units (rows of mean square D, see `method.sae`) the loss of a row is |r|^2 + c f for a residual r, an L1
    coefficient c, and a latent f with a unit row d of W_dec. L1 pulls f to 0 with c. The error pushes it up with 2 r.d:
    with 2 in root mean square for a random d, and with at most 2 sqrt(D) on a row of average norm. A latent on which L1
    is the stronger one for every row falls to 0. Then it has no gradient any more, and it stays there.
    """
    config, metrics = run.config(), run.metrics()
    recent = [record["l0"] for record in metrics[-max(1, len(metrics) // 20) :] if record.get("l0") is not None]
    if not recent or (l0 := sum(recent) / len(recent)) >= DEAD_L0:
        return None
    said = f"dead: L0 {l0:.2g}, rows are reconstructed as b_dec, and probes of its latents are at chance"
    c = max(record.get("sparsity_coefficient") or 0.0 for record in metrics)
    if config.sae.architecture == "jumprelu" or c < 2.0:
        return f"{said}; no L1 coefficient explains it (--optimizer.learning-rate may)"
    source, target = run.manifests()
    rows = target or source
    raw = c * math.sqrt(rows.variance / rows.d_model)
    remedy = "lower --sparsity.match-gain" if config.sparsity.match_l0 else "lower it, or leave --sparsity.match-l0 on"
    return (
        f"{said}; the L1 coefficient kills it: it pulls latents to 0 with {c:.3g}, while the error pushes with 2 along "
        f"a random vector and at most {2 * math.sqrt(rows.d_model):.3g} on an average row (on unscaled activations it "
        f"is an L1 of {raw:.3g} beside a squared error, {raw / rows.d_model:.3g} beside its mean over D); {remedy}"
    )


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
