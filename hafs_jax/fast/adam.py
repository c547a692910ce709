"""One update of the optimizer: gradients in, parameters and the optimizer's state out. Pure functions.

`plain_update` is the plain form, by optax alone; tests hold `update` to it. An update only reads and writes memory, so
it is fast where XLA overwrites arrays in place. On a CPU we wrap it in `lax.cond`, Adam's moments and parameters each
in one of their own, so that XLA does. Other optimizers copy what they read twice. Elsewhere, and under `vmap`, which
turns branches into selections, we use `jnp.where`.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.config import TrainConfig
from hafs_jax.fast.plan import Plan
from hafs_jax.method.sae import unit_rows
from hafs_jax.ops.products import Params

Tree = TypeVar("Tree")


def optimizer(config: TrainConfig, d_out: int) -> optax.GradientTransformation:
    """Gradient clipping and the named optax optimizer at a learning rate of 1: the step multiplies by the rate.

    The loss is in FVU, a squared error over `d_out`, and so is the norm at which its gradient is clipped.

    Raises `UserError` where optax has no optimizer of that name.
    """
    settings = config.optimizer
    make: Any = getattr(optax, settings.name, None)
    takes = inspect.signature(make).parameters if callable(make) else {}
    if "learning_rate" not in takes:
        known = [name for name in dir(optax) if name.islower()]
        raise UserError(
            f"optimizer.name={settings.name}: expected an optimizer of optax that takes a learning rate"
            f"{did_you_mean(settings.name, known)}"
        )
    given = {"b1": settings.beta1, "b2": settings.beta2, "eps": settings.epsilon}
    update = make(1.0, **{name: value for name, value in given.items() if name in takes})
    if settings.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm / d_out), update)


def update(
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    gradient_norm: Float[Array, ""],
    learning_rate: Float[Array, ""],
    ok: Bool[Array, ""],
    config: TrainConfig,
    plan: Plan,
) -> tuple[Params, optax.OptState]:
    """The parameters after one update, within their bounds, and the optimizer's state; as they were if not `ok`.

    `gradient_norm` is that of all of `grads`.
    """
    if config.optimizer.name == "adam":
        params, opt_state = _adam(params, opt_state, grads, gradient_norm, learning_rate, ok, config, plan)
    else:
        old = (params, opt_state)
        params, opt_state = _if_ok(ok, lambda: plain_update(*old, grads, learning_rate, config), old, plan)
    return params, opt_state


def plain_update(
    params: Params, opt_state: optax.OptState, grads: Params, learning_rate: Float[Array, ""], config: TrainConfig
) -> tuple[Params, optax.OptState]:
    """`update` of any optimizer by optax's own."""
    changes, opt_state = optimizer(config, params["W_dec"].shape[-1]).update(grads, opt_state, params)
    return _within_bounds(params, cast(Params, changes), learning_rate, config), opt_state


def _adam(
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    gradient_norm: Float[Array, ""],
    learning_rate: Float[Array, ""],
    ok: Bool[Array, ""],
    config: TrainConfig,
    plan: Plan,
) -> tuple[Params, optax.OptState]:
    """`plain_update` of clipped Adam: first the moments, then, from them alone, the parameters."""
    settings, clip = config.optimizer, jnp.ones(())
    if settings.clip_norm is not None:
        clip = jnp.minimum(1.0, settings.clip_norm / params["W_dec"].shape[-1] / gradient_norm)
    old = optax.tree.get(opt_state, "mu"), optax.tree.get(opt_state, "nu")
    count = optax.tree.get(opt_state, "count")

    def moments() -> tuple[Params, Params]:
        clipped = optax.tree.scale(clip, grads)
        mu = optax.tree.update_moment(clipped, old[0], settings.beta1, 1)
        return mu, optax.tree.update_moment_per_elem_norm(clipped, old[1], settings.beta2, 2)

    mu, nu = _if_ok(ok, moments, old, plan)
    count = jnp.where(ok, optax.safe_increment(count), count)

    def updated() -> Params:
        mean = optax.tree.bias_correction(mu, settings.beta1, count)
        square = optax.tree.bias_correction(nu, settings.beta2, count)
        changes = jax.tree.map(lambda m, v: -m / (jnp.sqrt(v) + settings.epsilon), mean, square)
        return _within_bounds(params, changes, learning_rate, config)

    return _if_ok(ok, updated, params, plan), optax.tree.set(opt_state, mu=mu, nu=nu, count=count)


def _within_bounds(params: Params, changes: Params, learning_rate: Float[Array, ""], config: TrainConfig) -> Params:
    """The changed parameters: decoder rows of norm 1, thresholds not negative, what is frozen as it was."""
    if config.frozen == "everything":
        return params
    new = jax.tree.map(lambda value, change: value + learning_rate * change, params, changes)
    new["W_dec"] = params["W_dec"] if config.frozen == "decoder" else unit_rows(new["W_dec"])
    if "threshold" in new:  # below zero the gate would let negative pre-activations through
        new["threshold"] = jnp.maximum(new["threshold"], 0.0)
    return new


def _if_ok(ok: Bool[Array, ""], new: Callable[[], Tree], old: Tree, plan: Plan) -> Tree:
    """`new()` where `ok`, else `old`: on a CPU by a branch, elsewhere, where nothing was measured, by selection."""
    if plan.on_cpu:
        return cast(Tree, jax.lax.cond(ok, new, lambda: old))
    return cast(Tree, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new(), old))
