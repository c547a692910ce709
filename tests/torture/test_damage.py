"""A reduced form of `tests.torture.damage`."""

from collections import Counter

from tests.torture.damage import faults, run


def test_damage_is_named_or_harmless() -> None:
    found = run(200, seed=0)
    total = sum(found.values(), Counter())
    assert total["named"] > 100 and faults(found) == 0, found
