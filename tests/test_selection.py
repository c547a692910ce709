"""The threshold that keeps exactly n entries, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.selection import count_threshold


@pytest.mark.parametrize("count", [1, 7, 300, 4999, 89_999])
@pytest.mark.parametrize("shape", ["normal", "heavy", "tiny", "scales"])
def test_keeps_exactly_the_largest(shape: str, count: int) -> None:
    random = np.random.default_rng(3)
    values = {
        "normal": np.abs(random.normal(size=90_000)),
        "heavy": np.exp(5 * random.normal(size=90_000)),
        "tiny": 1e-30 * random.uniform(size=90_000),
        "scales": np.abs(random.normal(size=(300, 300))) * np.exp(random.normal(size=(300, 1)) * 3),
    }[shape].astype(np.float32)
    kept = values >= float(jax.jit(count_threshold, static_argnums=1)(jnp.asarray(values), count))
    ordered = np.sort(values.reshape(-1))
    if ordered[-count] != ordered[-count - 1]:
        assert kept.sum() == count
    assert kept.sum() >= count and (values[kept].min() == ordered[-count])


def test_ties_are_all_kept_and_few_positives_give_zero() -> None:
    assert (
        np.array([1.0, 2.0, 2.0, 2.0, 3.0]) >= float(count_threshold(jnp.array([1.0, 2.0, 2.0, 2.0, 3.0]), 2))
    ).sum() == 4
    assert float(count_threshold(jnp.array([0.0, 0.0, 0.0, 5.0]), 2)) <= np.finfo(np.float32).tiny
    assert float(count_threshold(jnp.array([1.0, 2.0]), 2)) == 0.0


def test_under_vmap_each_member_gets_its_own() -> None:
    values = jnp.abs(jax.random.normal(jax.random.key(0), (3, 40, 17)))
    together = jax.vmap(lambda v: count_threshold(v, 50))(values)
    apart = jnp.stack([count_threshold(v, 50) for v in values])
    np.testing.assert_array_equal(together, apart)


def test_the_count_may_be_traced() -> None:
    values = jnp.abs(jax.random.normal(jax.random.key(0), (40, 17)))
    kept = jax.jit(lambda count: jnp.sum(values >= count_threshold(values, count)))
    assert [int(kept(count)) for count in (1, 50, 679, 680, 900)] == [1, 50, 679, 680, 680]
