"""The two feedback controllers of training: lambda follows the reconstruction error, the sparsity coefficient L0.

Each is a small pytree with a pure update. The value that it returns is a constant in the loss of the *next* step and
is never differentiated. If one program trains many SAEs, the leaves have a leading axis over them.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hafs_jax.config import PenaltyConfig, SparsityConfig

_WINSOR_AFTER, _WINSOR_AT = 100, 3.0  # after 100 updates, FVU is clipped at 3 times its moving average
_RISE, _FALL = 0.02, 0.1  # largest changes of lambda per step, as fractions of lam_max


class ErrorGate(struct.PyTreeNode):
    """The state of lambda(e): the moving average of FVU and the lambda that the next step will use."""

    ema: Float[Array, "..."]  # without bias correction
    count: Int[Array, "..."]  # of finite batches
    lam: Float[Array, "..."]
    bad: Int[Array, "..."]  # number of non-finite batches so far
    reached: Array  # bool: e was at or below tau at some step

    def error(self, decay: float) -> Float[Array, ""]:
        """e: the bias-corrected moving average of FVU; 1 before the first update."""
        return jnp.where(self.count > 0, self.ema / _correction(decay, self.count), 1.0)


def init_gate(config: PenaltyConfig, lam_max: Float[Array, ""] | float) -> ErrorGate:
    """The initial state: lambda is lam_min with the gate, lam_max without it, and 0 without a penalty."""
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
    """The state after one step with the batch's FVU.

    e is the bias-corrected moving average of FVU. After 100 updates a value is winsorised at 3 times the average.
    lambda changes towards

        lam_min + (lam_max - lam_min) sigmoid((tau - e) / (w tau))

    by at most +0.02 lam_max or -0.1 lam_max. A non-finite batch leaves the average as it is and halves lambda. Without
    the gate only the average and the counters change.
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
    nearer = gate.lam + jnp.clip(target - gate.lam, -_FALL * lam_max, _RISE * lam_max)
    reached = gate.reached | (ok & (count > 0) & (error <= tau))
    return gate.replace(lam=jnp.where(ok, nearer, 0.5 * gate.lam), reached=reached)


class SparsityControl(struct.PyTreeNode):
    """The current sparsity coefficient and the moving average of L0."""

    coefficient: Float[Array, "..."]
    l0_ema: Float[Array, "..."]


def init_sparsity(coefficient: Float[Array, ""] | float, target_l0: float | int) -> SparsityControl:
    """The initial state: the given coefficient, and the average of L0 at its target."""
    return SparsityControl(jnp.array(coefficient, jnp.float32), jnp.array(target_l0, jnp.float32))


def update_sparsity(
    control: SparsityControl,
    l0: Float[Array, ""],
    config: SparsityConfig,
    target_l0: Array | float | int,
    active: Array,
) -> SparsityControl:
    """The state after one step: the coefficient times (L0 / target)^gain while `active`, and the new average of L0.

    This is integral control of the logarithm. It reads the present L0, because the lag of an average makes the loop
    oscillate. The factor of one step is limited to between 2^(-3 gain) and 2^gain: an L0 far above its target is still
    falling, and a coefficient that overshoots kills latents. The average of L0 is updated even if not `active`.
    """
    ratio = jnp.clip(jnp.log2(jnp.maximum(l0, 1e-3) / target_l0), -3.0, 1.0)
    updated = control.coefficient * jnp.exp2(config.match_gain * ratio)
    ok = jnp.isfinite(l0)
    return SparsityControl(
        jnp.where(active & ok, updated, control.coefficient),
        jnp.where(ok, 0.98 * control.l0_ema + 0.02 * l0, control.l0_ema),
    )


def _correction(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    return 1.0 - jnp.asarray(decay, jnp.float32) ** count.astype(jnp.float32)
