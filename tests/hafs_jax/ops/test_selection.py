"""The threshold that keeps exactly n entries, and the largest of each row, against a sort."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.ops import selection
from hafs_jax.ops.selection import (
    count_threshold,
    kth_largest_of_rows,
    threshold_by_digits,
    top_of_groups,
    top_of_rows,
)


@pytest.fixture(params=["of this machine", "of accelerators"])
def threshold(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    """`count_threshold` in either form."""
    if request.param == "of this machine":
        return count_threshold
    return lambda values, count: threshold_by_digits(values.astype(jnp.float32).reshape(-1), jnp.int32(count))


@pytest.mark.parametrize("count", [1, 7, 300, 4999, 89_999])
@pytest.mark.parametrize("shape", ["normal", "heavy", "tiny", "scales"])
def test_keeps_exactly_the_largest(shape: str, count: int, threshold: Callable[..., jax.Array]) -> None:
    random = np.random.default_rng(3)
    values = {
        "normal": np.abs(random.normal(size=90_000)),
        "heavy": np.exp(5 * random.normal(size=90_000)),
        "tiny": 1e-30 * random.uniform(size=90_000),
        "scales": np.abs(random.normal(size=(300, 300))) * np.exp(random.normal(size=(300, 1)) * 3),
    }[shape].astype(np.float32)
    kept = values >= float(jax.jit(threshold, static_argnums=1)(jnp.asarray(values), count))
    ordered = np.sort(values.reshape(-1))
    if ordered[-count] != ordered[-count - 1]:
        assert kept.sum() == count
    assert kept.sum() >= count and (values[kept].min() == ordered[-count])


def test_ties_are_all_kept_and_few_positives_give_zero(threshold: Callable[..., jax.Array]) -> None:
    tied = np.array([1.0, 2.0, 2.0, 2.0, 3.0])
    assert (tied >= float(threshold(jnp.asarray(tied), 2))).sum() == 4
    assert float(threshold(jnp.array([0.0, 0.0, 0.0, 5.0]), 2)) <= np.finfo(np.float32).tiny
    assert float(threshold(jnp.array([1.0, 2.0]), 2)) == 0.0
    largest = np.finfo(np.float32).max
    assert float(threshold(jnp.array([largest, 1.0, 0.0]), 1)) > 1.0


def test_under_vmap_each_member_gets_its_own() -> None:
    values = jnp.abs(jax.random.normal(jax.random.key(0), (3, 40, 17)))
    together = jax.vmap(lambda v: count_threshold(v, 50))(values)
    apart = jnp.stack([count_threshold(v, 50) for v in values])
    np.testing.assert_array_equal(together, apart)


def test_the_count_may_be_traced() -> None:
    values = jnp.abs(jax.random.normal(jax.random.key(0), (40, 17)))
    kept = jax.jit(lambda count: jnp.sum(values >= count_threshold(values, count)))
    assert [int(kept(count)) for count in (1, 50, 679, 680, 900)] == [1, 50, 679, 680, 680]


@pytest.mark.parametrize("k", [1, 3, 17, 40])
def test_the_kth_largest_of_each_row_is_that_of_a_sort(k: int) -> None:
    values = np.maximum(np.random.default_rng(0).normal(size=(50, 40)), 0).astype(np.float32)
    values[3] = 0.0
    values[4] = np.round(values[4])  # ties
    values[5] *= 1e30
    values[6] *= 1e-30
    np.testing.assert_array_equal(jax.jit(kth_largest_of_rows, static_argnums=1)(values, k), np.sort(values)[:, -k])


def test_a_part_of_the_largest_does_not_cost_a_sort_of_whole_rows() -> None:
    def compiled(last: Callable[[jax.Array], jax.Array]) -> str:
        return jax.jit(last).lower(jnp.zeros((8, 300))).compile().as_text()

    assert "sort(" in compiled(lambda values: jax.lax.top_k(values, 40)[0][:, -1]), "what it is kept from"
    assert "sort(" not in compiled(lambda values: top_of_rows(values, 40)[0][:, -1])
    assert "sort(" not in compiled(lambda values: top_of_rows(values, 3)[0][:, -1])


@pytest.mark.parametrize(("width", "most"), [(700, 5), (1_000, 512), (5_003, 64), (3_000, 3), (2_048, 600)])
def test_the_largest_of_groups_of_groups_are_those_of_a_sort(width: int, most: int) -> None:
    """With ties: the first of equal entries are taken, as `lax.top_k` does. 5,003 is no multiple of any group."""
    values = np.round(np.random.default_rng(1).normal(size=(9, width)), 1).astype(np.float32)
    values[2] = 0.0
    values[3] = -np.arange(width)
    for found, expected in zip(top_of_groups(jnp.asarray(values), most), jax.lax.top_k(values, most), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_accelerators_sort_no_wide_rows() -> None:
    """The widths of what a program sorts that is lowered for one, on a machine that has none."""
    shape = jax.ShapeDtypeStruct((4, 65_536), jnp.float32)

    def widest(platform: str) -> int:
        lowered = jax.jit(lambda values: top_of_rows(values, 64)).trace(shape).lower(lowering_platforms=(platform,))
        return max(int(width) for width in re.findall(r"chlo.top_k.*tensor<4x(\d+)xf32> ->", lowered.as_text()))

    assert (widest("cpu"), widest("cuda")) == (4_096, selection._WIDEST)
