"""The loss and its gradient as training takes them, against autodiff of the plain loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.fast.plan import choose
from hafs_jax.method.loss import Weights, loss
from hafs_jax.method.sae import init_params
from hafs_jax.presets import ARCHITECTURES, preset, with_fields

B, D, F, K = 24, 16, 200, 5


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_plain_loss_and_its_gradient(architecture: str, products: str) -> None:
    config = with_fields(preset("baseline", architecture), {"sae": {"n_latents": F, "k": K}, "batch_size": B})
    config = dataclasses.replace(config, products=products)
    if products == "sparse" and choose(config).products == "dense":
        pytest.skip("the architecture has no sparse form")
    params = init_params(config.sae, D, jax.random.key(0))
    params = {name: value + 0.05 * jax.random.normal(jax.random.key(3), value.shape) for name, value in params.items()}
    if architecture in ("relu", "matryoshka_relu"):
        params["b_enc"] -= 1.0  # so that there is capacity for every active latent
    acts = jax.random.normal(jax.random.key(1), (B, D))
    weights = Weights(jnp.int32(K), jnp.float32(1.0), jnp.arange(F) % 3 == 0)
    given = (acts, acts, weights, jnp.float32(D), jax.random.key(5), config)
    (value, left), gradients = jax.value_and_grad(loss, has_aux=True)(params, *given)
    (ours, found), grads = loss_and_gradients(params, *given, choose(config))
    assert float(value) > 0 and float(left.parts["loss_aux"]) > 0
    assert float(ours) == pytest.approx(float(value), rel=1e-5)
    for name, part in left.parts.items():
        np.testing.assert_allclose(found.parts[name], part, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found.firing_F, left.firing_F)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-4, atol=1e-7, err_msg=name)
