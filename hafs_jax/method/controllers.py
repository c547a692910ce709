"""The two feedback loops of training: lambda follows the reconstruction error, the sparsity coefficient follows L0.

Both are small pytrees with a pure update; what they return is a constant of the *next* step's loss, never
differentiated. A leading axis, where there is one, is of many SAEs trained in one program.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hafs_jax.config import PenaltyConfig, SparsityConfig

_WINSOR_AFTER, _WINSOR_AT = 100, 3.0  # updates before a spike is clipped, and at how many times the average
_RISE, _FALL = 0.02, 0.1  # largest moves of lambda per step, as fractions of lam_max


class ErrorGate(struct.PyTreeNode):
    """The state of lambda(e): the FVU's moving average and the weight that the next step will use."""

    ema: Float[Array, "..."]  # uncorrected
    count: Int[Array, "..."]
    lam: Float[Array, "..."]
    bad: Int[Array, "..."]  # non-finite batches so far
    reached: Array  # bool: e has been at or below tau

    def error(self, decay: float) -> Float[Array, ""]:
        """e: the bias-corrected moving average of FVU; 1 before the first update."""
        return jnp.where(self.count > 0, self.ema / _correction(decay, self.count), 1.0)


def init_gate(config: PenaltyConfig, lam_max: Float[Array, ""] | float) -> ErrorGate:
    """lambda starts at lam_min under the gate, at lam_max for constant pressure, at 0 without a penalty."""
    start = 0.0 if config.kind == "none" else (config.lam_min if config.gate else lam_max)
    return ErrorGate(
        ema=jnp.zeros(()),
        count=jnp.zeros((), jnp.int32),
        lam=jnp.array(start, jnp.float32),
        bad=jnp.zeros((), jnp.int32),
        reached=jnp.zeros((), bool),
    )


def update_gate(
    gate: ErrorGate,
    fvu: Float[Array, ""],
    config: PenaltyConfig,
    tau: Float[Array, ""] | float,
    lam_max: Float[Array, ""] | float,
) -> ErrorGate:
    """One step of the error-adaptive weight.

    e is the bias-corrected average of FVU, a finite value winsorised at 3 x the average after 100 updates. lambda moves
    towards lam_min + (lam_max - lam_min) sigmoid((tau - e) / (w tau)), by at most +0.02 or -0.1 lam_max. A batch that
    is not finite freezes the average and halves lambda. Without the gate only the average and the counters move.
    """
    ok = jnp.isfinite(fvu)
    value = jnp.where(ok, fvu, 0.0)
    beta, count = config.ema_decay, gate.count
    reference = jnp.where(count > 0, gate.ema / _correction(beta, jnp.maximum(count, 1)), value)
    limit = jnp.where(count > _WINSOR_AFTER, _WINSOR_AT * reference, jnp.maximum(1.0, value))
    value = jnp.minimum(value, limit)
    ema = jnp.where(ok, beta * gate.ema + (1 - beta) * value, gate.ema)
    count = jnp.where(ok, count + 1, count)
    gate = gate.replace(ema=ema, count=count, bad=gate.bad + ~ok)
    if config.kind == "none" or not config.gate:
        return gate
    error = gate.error(beta)
    target = config.lam_min + (lam_max - config.lam_min) * jax.nn.sigmoid((tau - error) / (config.gate_width * tau))
    moved = gate.lam + jnp.clip(target - gate.lam, -_FALL * lam_max, _RISE * lam_max)
    reached = gate.reached | (ok & (count > 0) & (error <= tau))
    return gate.replace(lam=jnp.where(ok, moved, 0.5 * gate.lam), reached=reached)


class SparsityControl(struct.PyTreeNode):
    """The sparsity coefficient in force and the moving average of L0."""

    coefficient: Float[Array, "..."]
    l0_ema: Float[Array, "..."]


def init_sparsity(coefficient: Float[Array, ""] | float, target_l0: float | int) -> SparsityControl:
    """Starts at `coefficient` with the average at its target, so that nothing moves before L0 is known."""
    return SparsityControl(jnp.array(coefficient, jnp.float32), jnp.array(target_l0, jnp.float32))


def update_sparsity(
    control: SparsityControl,
    l0: Float[Array, ""],
    config: SparsityConfig,
    target_l0: Array | float | int,
    active: Array,
) -> SparsityControl:
    """Multiplies the coefficient by (L0 / target)^gain while `active`; the average of L0 always moves.

    Integral control in the logarithm, with the present L0 and not its average in the loop: the average's lag makes the
    loop ring. One step moves the coefficient by at most a factor 2^gain up and 2^(3 gain) down: an L0 far over its
    target is still falling, and a coefficient that overshoots kills latents.
    """
    ratio = jnp.clip(jnp.log2(jnp.maximum(l0, 1e-3) / target_l0), -3.0, 1.0)
    moved = control.coefficient * jnp.exp2(config.match_gain * ratio)
    ok = jnp.isfinite(l0)
    return SparsityControl(
        jnp.where(active & ok, moved, control.coefficient),
        jnp.where(ok, 0.98 * control.l0_ema + 0.02 * l0, control.l0_ema),
    )


def _correction(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    return 1.0 - jnp.asarray(decay, jnp.float32) ** count.astype(jnp.float32)
