"""Checks of a run's health from its metrics: sparsity, dead latents, bad batches, progress, gate. It imports no JAX."""

import math
from typing import Any

from hafs_jax.config import TrainConfig
from hafs_jax.runs import Run

DEAD_SHARE, L0_OFF = 0.05, 0.02  # a run above one of these should be looked at
# If FVU never reached tau and the last lambda is below this, the penalty did not act. Above it, the penalty did act.
INACTIVE_LAMBDA = 0.05
HELDOUT_L0_OFF = 0.1  # batches are fewer rows than the held-out ones, and the threshold is a moving average
DEAD_L0 = 0.1  # an SAE with fewer active latents per row than this is dead
_LEARN_THRESHOLD = ("batchtopk", "matryoshka")  # those of `method.architectures`, which imports JAX


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
        return f"{said}; no L1 coefficient explains it (optimizer.learning_rate may)"
    source, target = run.manifests()
    rows = target or source
    raw = c * math.sqrt(rows.variance / rows.d_model)
    remedy = "lower sparsity.match_gain" if config.sparsity.match_l0 else "lower it, or leave sparsity.match_l0 on"
    return (
        f"{said}; the L1 coefficient kills it: it pulls latents to 0 with {c:.3g}, while the error pushes with 2 along "
        f"a random vector and at most {2 * math.sqrt(rows.d_model):.3g} on an average row (on unscaled activations it "
        f"is an L1 of {raw:.3g} beside a squared error, {raw / rows.d_model:.3g} beside its mean over D); {remedy}"
    )


def checks(run: Run) -> list[tuple[bool, str]]:
    """(whether it passed, one line about it) for each check of a run of which a step was logged."""
    dead = death(run)
    return [*([(False, dead)] if dead else []), *health(run.config(), run.metrics())]


def health(config: TrainConfig, metrics: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """The checks of the logged steps `metrics`, which must not be empty."""
    last, recent = metrics[-1], metrics[-max(1, len(metrics) // 20) :]

    def mean(name: str, records: list[dict[str, Any]] = recent) -> float:
        values = [record[name] for record in records if record.get(name) is not None]
        return sum(values) / max(len(values), 1)

    l0, k, dead, bad = mean("l0"), config.sae.k, last["dead_fraction"], last["bad_batches"]
    found = [
        (abs(l0 / k - 1) <= L0_OFF, f"L0 {l0:.2f} in training, {l0 / k - 1:+.1%} from k={k}"),
        (dead <= DEAD_SHARE, dead_latents(config, last)),
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
        found.append(_gate(config, last))
    return found + _heldout(config, metrics) + _averages(config, int(last.get("step", 0)))


def dead_latents(config: TrainConfig, last: dict[str, Any]) -> str:
    """The share of dead latents at the logged step `last`, in words that say what dead means in training.

    An evaluation counts others: those that are active on no held-out row.
    """
    window, rows = config.sparsity.dead_after_tokens, last.get("tokens", math.inf)
    if rows < window:
        return f"no latent counts as dead yet: training had {rows:,} rows, and a dead one is silent for {window:,}"
    return f"{last['dead_fraction']:.1%} of latents dead: silent on the last {window:,} training rows"


def _gate(config: TrainConfig, last: dict[str, Any]) -> tuple[bool, str]:
    reached = bool(last["tau_reached"])
    inactive = not reached and last["lambda"] < INACTIVE_LAMBDA
    said = "reached" if reached else "never reached"
    tau = "unknown" if config.penalty.tau is None else f"{config.penalty.tau:.4g}"
    line = f"tau {tau} {said} by FVU's moving average; lambda {last['lambda']:.2f}"
    return reached, line + (": adaptive inactive" if inactive else "")


def _heldout(config: TrainConfig, metrics: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """The checks of what was measured on held-out rows, where anything was."""
    found = []
    fvus = [record["heldout_fvu"] for record in metrics if record.get("heldout_fvu") is not None]
    if fvus:
        found.append((fvus[-1] <= 1.05 * min(fvus), f"held-out FVU {fvus[-1]:.4f}, best {min(fvus):.4f}"))
    l0s = [record["heldout_l0"] for record in metrics if record.get("heldout_l0") is not None]
    if l0s:
        off = l0s[-1] / config.sae.k - 1
        said = f"held-out L0 {l0s[-1]:.2f} at inference, {off:+.1%} from k={config.sae.k}"
        if abs(off) > HELDOUT_L0_OFF:
            said += ": the threshold of inference is not that of training; train for more steps"
        found.append((abs(off) <= HELDOUT_L0_OFF, said))
    return found


def _averages(config: TrainConfig, steps: int) -> list[tuple[bool, str]]:
    """A check that fails where moving averages still remember how training began."""
    named = {"FVU": config.penalty.ema_decay}
    if config.sae.architecture in _LEARN_THRESHOLD:
        named["the threshold of inference"] = config.sparsity.threshold_decay
    if config.optimizer.average is not None:
        named["the weights"] = config.optimizer.average
    needed = max(3 / (1 - decay) for decay in named.values())
    if steps >= needed:
        return []
    late = " and ".join(name for name, decay in named.items() if steps < 3 / (1 - decay))
    return [(False, f"{steps:,} steps, under the {needed:,.0f} after which the moving average of {late} has settled")]
