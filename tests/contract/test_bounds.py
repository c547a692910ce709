"""Every bound of every config is kept: a value just outside is refused by name, one just inside is taken."""

import dataclasses
import importlib
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from hafs_evaluate.explore import requests
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.profiles import OFFLINE
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import Bounds
from tests.support.sources import modules

EXAMPLES: dict[type, Any] = {
    ExtractConfig: OFFLINE,
    SourceConfig: SourceConfig("text", "text.jsonl"),
    requests.ReadRequest: requests.ReadRequest("text", ("run",)),
    requests.LatentRequest: requests.LatentRequest("run"),
    requests.SearchRequest: requests.SearchRequest("text", "run"),
    requests.CompareRequest: requests.CompareRequest("text", ("run", "other")),
    requests.SteerRequest: requests.SteerRequest("text", "run"),
}
"""An instance of each config whose defaults alone make none."""

ALONGSIDE: dict[str, dict[str, Any]] = {
    "OptimizerConfig.warmup": {"decay": 0.0},
    "OptimizerConfig.decay": {"warmup": 0.0},
    "PenaltyConfig.lam_max": {"lam_min": 0.0},
    "SAEConfig.n_latents": {"k": 1},
    "TrainConfig.patience": {"evaluate_every_steps": 1},
    "TrainConfig.tokens": {"batch_size": 1},
}
"""What must be changed with a field, so that the checks between fields let its extreme values pass."""


def configs() -> Iterator[type]:
    """Every config class of the three packages: found in the modules that declare a field by `option`."""
    for name, source in modules().items():
        if "= option(" in source:
            for value in vars(importlib.import_module(name.removesuffix(".__init__"))).values():
                if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == name:
                    yield value


def bounded() -> Iterator[Any]:
    for config in configs():
        for field in dataclasses.fields(config):
            if "bounds" in field.metadata and field.metadata["bounds"] != Bounds():
                yield pytest.param(config, field, id=f"{config.__name__}.{field.name}")


def edges(bounds: Bounds, is_int: bool) -> Iterator[tuple[bool, float, float]]:
    """(whether it is a lower one, the last value inside, the first value outside) of every bound."""

    def next_to(bound: float, towards: float) -> float:
        return bound + math.copysign(1, towards) if is_int else math.nextafter(bound, towards)

    for low, bound, is_inside in (
        (True, bounds.least, True),
        (True, bounds.above, False),
        (False, bounds.most, True),
        (False, bounds.below, False),
    ):
        if bound is not None:
            if is_inside:
                inside, outside = bound, next_to(bound, -math.inf if low else math.inf)
            else:
                inside, outside = next_to(bound, math.inf if low else -math.inf), bound
            yield (low, int(inside), int(outside)) if is_int else (low, float(inside), float(outside))


@pytest.mark.parametrize(("config", "field"), bounded())
def test_the_bounds_are_kept(config: type, field: dataclasses.Field) -> None:
    base, bounds = EXAMPLES.get(config) or config(), field.metadata["bounds"]
    kind, value = typing.get_type_hints(config)[field.name], getattr(base, field.name)
    several = typing.get_origin(kind) is tuple
    items = typing.get_args(kind)
    is_int = int in (kind, *items)
    assert is_int or float in (kind, *items)
    changes = ALONGSIDE.get(f"{config.__name__}.{field.name}", {})

    def changed(low: bool, item: float) -> Any:
        whole: Any = item
        if several:
            whole = (item, *value[1:]) if low else (*value[:-1], item)
        return dataclasses.replace(base, **changes, **{field.name: whole})

    for low, inside, outside in edges(bounds, is_int):
        changed(low, inside)
        with pytest.raises(UserError) as refused:
            changed(low, outside)
        place = f"[{0 if low else len(value) - 1}]" if several else ""
        assert f"{field.name}{place}={outside!r}: expected {bounds}" in str(refused.value)
    for bad in () if is_int else (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=rf"{field.name}(\[0\])?={bad}: expected"):
            changed(True, bad)
    if type(None) in items:
        assert getattr(dataclasses.replace(base, **changes, **{field.name: None}), field.name) is None


def test_the_configs_are_found() -> None:
    found = {config.__name__ for config in configs()}
    ours = {"TrainConfig", "PenaltyConfig", "ArrayConfig", "ExtractConfig", "SourceConfig", "EvalConfig"}
    assert ours <= found and len(list(bounded())) > 70
