"""One update of the optimizer: gradients in, parameters and the optimizer's state out. Pure functions.

`plain_update` is the plain form, by optax alone, to which tests hold `update`. An update only reads and writes memory,
so it is fast if XLA updates the arrays in place. On a CPU we wrap the update in `lax.cond`, Adam's moments and the
parameters each in one of their own, so that XLA does. Optimizers other than Adam copy the arrays that they read twice.
Elsewhere, and under `vmap`, which turns branches into selections, we use `jnp.where`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.config import TrainConfig
from hafs_jax.fast.plan import Plan
from hafs_jax.method.latent_axes import latent_axis
from hafs_jax.method.sae import unit_rows
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params

Tree = TypeVar("Tree")


def optimizer(config: TrainConfig, d_out: int, axes: Axes = Axes()) -> optax.GradientTransformation:
    """Gradient clipping and the named optax optimizer, at a learning rate of 1: the step multiplies by the rate.

    The loss is in units of FVU, a squared error over `d_out`. So the gradient is clipped at `clip_norm` over `d_out`.
    Raises `UserError` if optax has no optimizer of that name.
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
    return optax.chain(_clipping(settings.clip_norm / d_out, axes), update)


def _clipping(limit: float, axes: Axes) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`; on several devices, each with the gradients that it owns, by the norm of all."""
    plain = optax.clip_by_global_norm(limit)
    if axes.devices == 1:
        return plain

    def clipped(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optax.tree.scale(jnp.minimum(1.0, limit / axes.norm(grads)), grads), state

    return optax.GradientTransformation(plain.init, clipped)


def check_optimizer(config: TrainConfig, devices: int = 1) -> None:
    """Raises `UserError` where the optimizer cannot do what a step asks of it: an update from gradients alone.

    Some of optax's need more, such as the loss (`lbfgs`, `polyak_sgd`), or keep arrays that are not of the parameters'
    shapes (`adafactor`). On several devices each updates the latents that it owns, so the update of a latent must not
    depend on the others (as with `lamb`). It is tried on a few numbers.
    """
    name = config.optimizer.name
    if name == "adam":  # `update` has a form of its own for it
        return
    params = {"W_enc": jnp.ones((3, 5)), "W_dec": jnp.ones((5, 3)), "b_enc": jnp.ones(5)}

    def refuse(reason: str) -> UserError:
        return UserError(
            f"optimizer.name={name}: expected an optimizer of optax that updates from gradients and a learning rate "
            f"alone, found that {reason}; choose another, such as adam, adamw, lion or sgd"
        )

    try:
        made = optimizer(config, 3)
        before = made.init(params)
        changes, after = made.update(jax.tree.map(lambda value: 0.1 * value, params), before, params)
        same = jax.tree.map(_kind, (params, before)) == jax.tree.map(_kind, (changes, after))
    except UserError:
        raise
    except Exception as error:  # another package's code, with arguments that it may not take
        raise refuse(f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from error
    if not same:
        raise refuse("its update changes shapes or dtypes")
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        axis, shape = latent_axis(path), jnp.shape(leaf)
        if shape not in {(), *map(jnp.shape, params.values())} or (axis is not None and len(shape) <= axis):
            raise refuse(f"it keeps an array of shape {shape}, which is no parameter's")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(changes)):
        raise refuse("its update is not finite")
    if devices > 1 and not _by_number(config):
        raise refuse(f"its update of a number depends on others, which {devices} devices would have to tell each other")


def _by_number(config: TrainConfig) -> bool:
    """Whether the optimizer, apart from clipping, updates parts of an array as it updates the whole."""
    made = optimizer(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=None)), 3)
    whole = {"W_dec": jnp.arange(1.0, 13.0).reshape(4, 3)}
    parts = [{"W_dec": whole["W_dec"][:1]}, {"W_dec": whole["W_dec"][1:]}]

    def changes(params: Params) -> Array:
        return made.update({"W_dec": 0.1 * params["W_dec"] ** 2}, made.init(params), params)[0]["W_dec"]

    return bool(jnp.allclose(jnp.concatenate(list(map(changes, parts))), changes(whole), rtol=1e-5))


def _kind(leaf: Any) -> tuple[Any, ...]:
    return jnp.shape(leaf), jnp.result_type(leaf)


def update(
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    gradient_norm: Float[Array, ""],
    learning_rate: Float[Array, ""],
    ok: Bool[Array, ""],
    config: TrainConfig,
    plan: Plan,
    turns: bool = False,
) -> tuple[Params, optax.OptState]:
    """The parameters after one update, within their bounds, and the optimizer's state; both unchanged if not `ok`.

    `gradient_norm` is the global norm of `grads`. `turns` (only where `by_rows` holds): W_dec's gradient still has what
    it has along the rows, which is to be taken out.
    """
    if config.optimizer.name == "adam":
        params, opt_state = _adam(params, opt_state, grads, gradient_norm, learning_rate, ok, config, plan, turns)
    else:
        old = (params, opt_state)
        new = partial(plain_update, *old, grads, learning_rate, config, plan.axes)
        params, opt_state = _if_ok(ok, new, old, plan)
    return params, opt_state


def plain_update(
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    learning_rate: Float[Array, ""],
    config: TrainConfig,
    axes: Axes = Axes(),
) -> tuple[Params, optax.OptState]:
    """The same as `update`, for any optimizer, by optax's own update."""
    changes, opt_state = optimizer(config, params["W_dec"].shape[-1], axes).update(grads, opt_state, params)
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
    turns: bool,
) -> tuple[Params, optax.OptState]:
    """The same as `plain_update` for clipped Adam: first the moments, then the parameters from the moments alone."""
    settings, clip = config.optimizer, jnp.ones(())
    if settings.clip_norm is not None:
        clip = jnp.minimum(1.0, settings.clip_norm / params["W_dec"].shape[-1] / gradient_norm)
    old = [optax.tree.get(opt_state, name) for name in ("mu", "nu")]
    before = optax.tree.get(opt_state, "count")
    count = jnp.where(ok, optax.safe_increment(before), before)
    rows: tuple[Params, ...] = ({}, {}, {})
    if by_rows(config, plan, params["W_dec"].shape[-1]):
        rows = _decoder_by_rows(params, grads, old[0], old[1], clip, learning_rate, count, ok, config, plan, turns)
        params, grads, *old = map(_without_decoder, (params, grads, *old))

    def moments() -> tuple[Params, Params]:
        clipped = optax.tree.scale(clip, grads)
        mu = optax.tree.update_moment(clipped, old[0], settings.beta1, 1)
        return mu, optax.tree.update_moment_per_elem_norm(clipped, old[1], settings.beta2, 2)

    mu, nu = _if_ok(ok, moments, (old[0], old[1]), plan)

    def updated() -> Params:
        mean = optax.tree.bias_correction(mu, settings.beta1, count)
        square = optax.tree.bias_correction(nu, settings.beta2, count)
        changes = jax.tree.map(lambda m, v: -m / (jnp.sqrt(v) + settings.epsilon), mean, square)
        return _within_bounds(params, changes, learning_rate, config)

    params, mu, nu = (rest | own for rest, own in zip((_if_ok(ok, updated, params, plan), mu, nu), rows, strict=True))
    return params, optax.tree.set(opt_state, mu=mu, nu=nu, count=count)


def by_rows(config: TrainConfig, plan: Plan, D: int) -> bool:
    """Whether a kernel updates W_dec, a row at a time."""
    if plan.kernels == "off" or config.optimizer.name != "adam" or config.frozen in ("decoder", "everything"):
        return False
    from hafs_jax.fast.kernels.update import takes

    return takes(D, plan.kernels == "interpreted")


def _decoder_by_rows(
    params: Params,
    grads: Params,
    mu: Params,
    nu: Params,
    clip: Float[Array, ""],
    learning_rate: Float[Array, ""],
    count: Int[Array, ""],
    ok: Bool[Array, ""],
    config: TrainConfig,
    plan: Plan,
    turns: bool,
) -> tuple[Params, Params, Params]:
    """W_dec and its moments after the update `count`, by a kernel."""
    from hafs_jax.fast.kernels.update import adam_of_rows

    settings, decays = config.optimizer, (config.optimizer.beta1, config.optimizer.beta2)
    corrections = [1 / (1 - jnp.float32(decay) ** count) for decay in decays]
    scalars_S = jnp.stack([clip, learning_rate, *corrections, ok.astype(jnp.float32)])
    W_FD, gradient_FD, mu_FD, nu_FD = (tree["W_dec"] for tree in (params, grads, mu, nu))
    interpret = plan.kernels == "interpreted"
    made = adam_of_rows(W_FD, gradient_FD, mu_FD, nu_FD, scalars_S, decays, settings.epsilon, interpret, turns)
    return {"W_dec": made[0]}, {"W_dec": made[1]}, {"W_dec": made[2]}


def _without_decoder(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "W_dec"}


def _within_bounds(params: Params, changes: Params, learning_rate: Float[Array, ""], config: TrainConfig) -> Params:
    """The changed parameters: decoder rows have norm 1, thresholds are at least 0, what is frozen is unchanged."""
    if config.frozen == "everything":
        return params
    new = jax.tree.map(lambda value, change: value + learning_rate * change, params, changes)
    if "W_dec" in new:
        new["W_dec"] = params["W_dec"] if config.frozen == "decoder" else unit_rows(new["W_dec"])
    if "threshold" in new:  # below 0, negative pre-activations would count as active
        new["threshold"] = jnp.maximum(new["threshold"], 0.0)
    return new


def _if_ok(ok: Bool[Array, ""], new: Callable[[], Tree], old: Tree, plan: Plan) -> Tree:
    """`new()` if `ok`, else `old`: by a branch on a CPU, by selection elsewhere, where nothing was measured."""
    if plan.on_cpu:
        return cast(Tree, jax.lax.cond(ok, new, lambda: old))
    return cast(Tree, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new(), old))
