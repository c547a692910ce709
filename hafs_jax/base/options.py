"""Frozen dataclasses as configs: their options, checks, JSON, fields by name. Standard library only.

Each field is declared once by `option`, with its default, its bounds and a line of help that carries the unit. A field
of a nested dataclass has a dotted name, such as `penalty.lam_max`. `hafs_jax.base.flags` makes flags of them.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hafs_jax.base.errors import UserError, arg

C = TypeVar("C")
Number = int | float
_MOST = 2**31 - 1  # of a whole number whose option has no `most`: arrays count with 32 bits


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that an option allows. `least` and `most` are themselves allowed, `above` and `below` are not."""

    least: Number | None = None
    most: Number | None = None
    above: Number | None = None
    below: Number | None = None

    def __contains__(self, value: Number) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """'at least 1', '0 to 1', 'above 0 and below 1', ...; empty where every number is allowed."""
        if self.least is not None and self.most is not None:
            return f"{_number(self.least)} to {_number(self.most)}"
        named = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {_number(bound)}" for words, bound in named.items() if bound is not None)

    @property
    def in_help(self) -> str:
        """The words for a line of help.

        They leave out a limit of over a billion, and are empty where no more than negative numbers and 0 are ruled out.
        """
        shown = dataclasses.replace(self, most=None) if self.most is not None and self.most > 10**9 else self
        return "" if shown in (Bounds(), Bounds(least=0), Bounds(least=1), Bounds(above=0)) else str(shown)


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    least: Number | None = None,
    most: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
) -> Any:
    """A dataclass field with its default, one line of help (meaning and unit) and what it allows.

    `choices` are the allowed values of a string; it may be a list that grows later. `least`, `most`, `above` and
    `below` bound a number (see `Bounds`). For a tuple they hold for each element. All this is only declared here: call
    `check` in `__post_init__` to enforce it.
    """
    bounds = Bounds(least, most, above, below)
    metadata = {"help": help, "choices": choices, "bounds": bounds}
    if dataclasses.is_dataclass(default) or isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, prefix: str = "") -> None:
    """Raises `UserError` for the first field of `config` whose value its `option` does not allow.

    NaN and infinity are refused everywhere, since JSON has neither, and whole numbers above 2^31 - 1 where the option
    has no `most`, since arrays count with 32 bits. `prefix` stands before the field's name in the
    message: `check(self, "sae.")` says "sae.k=0: expected at least 1".
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices, bounds = field.metadata.get("choices"), field.metadata.get("bounds", Bounds())
        takes_none = is_optional(hints[field.name])[1]
        for place, value in _values(getattr(config, field.name)):
            if value is None and takes_none:
                continue
            found = arg(f"{prefix}{field.name}{place}", value)
            if choices and value not in choices:
                raise UserError(f"{found}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}")
            wanted = str(bounds)
            if not wanted or (isinstance(value, numbers.Real) and value in bounds):
                if isinstance(value, int) and bounds.most is None and abs(value) > _MOST:
                    wanted = f"at most {_number(_MOST)}"
                elif isinstance(value, float) and not math.isfinite(value):
                    wanted = "a finite number"
                else:
                    continue
            raise UserError(f"{found}: expected {wanted}{', or none' if takes_none else ''}")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[C], values: Any, where: str) -> C:
    """A `cls` from plain JSON values. `where` names the file or flag in errors.

    Keys that `cls.FORMER` lists, of earlier versions, are left out.
    Raises `UserError` for an unknown key (with the nearest known one), a missing one and a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with {cls.__name__}'s keys, found {values!r}")
    former = getattr(cls, "FORMER", ())
    values = {key: value for key, value in values.items() if key not in former}
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
    missing = [name for name, field in fields.items() if name not in values and not _has_default(field)]
    if missing:
        raise UserError(f"{where}: {cls.__name__} lacks {', '.join(missing)}")
    return cls(**{key: _coerce(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def replace_fields(config: C, values: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> C:
    """The config with the fields that `values` names replaced, and validated again.

    A name is a field, a dotted field of a part ("sae.k"), an alias, or a part, whose value is a mapping of its fields.
    Numbers of numpy and lists are taken too. Raises `UserError` for a name that there is not, with the nearest one, and
    for a value of another type.
    """
    known, aliases = field_names(config), aliases or {}
    changes: dict[str, Any] = {}

    def note(name: Any, value: Any) -> None:
        path = aliases.get(str(name), str(name)).replace("-", "_")
        if isinstance(value, Mapping) and any(field.startswith(path + ".") for field in known):
            for inner, item in value.items():
                note(f"{path}.{inner}", item)
        elif path in known:
            changes[path] = value
        elif any(field.startswith(path + ".") for field in known):
            part = config
            for step in path.split("."):
                part = getattr(part, step)
            if not isinstance(value, type(part)):
                raise UserError(f"{path}: expected a mapping of its fields, found {value!r}")
            changes[path] = value
        else:
            ends = [field for field in known if field.endswith("." + path)]
            near = f"; did you mean {ends[0]!r}?" if ends else did_you_mean(path, [*known, *aliases])
            raise UserError(f"unknown field {str(name)!r}{near}")

    for name, value in values.items():
        note(name, value)
    return _replaced(config, changes, "")


def field_names(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config that are no parts themselves."""
    names: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        names += field_names(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return names


def _replaced(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    hints, own = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if name in changes:
            given = changes[name]
            if isinstance(given, numbers.Number) and hasattr(given, "item"):
                given = given.item()
            own[field.name] = given if dataclasses.is_dataclass(value) else _coerce(hints[field.name], given, name)
        elif dataclasses.is_dataclass(value) and any(path.startswith(name + ".") for path in changes):
            own[field.name] = value
        if dataclasses.is_dataclass(value) and field.name in own:
            own[field.name] = _replaced(own[field.name], changes, name + ".")
    return dataclasses.replace(config, **own)


def did_you_mean(word: Any, known: Any) -> str:
    """The end of an error message that suggests the nearest of `known`; empty where nothing is near.

    It is empty too where the word itself is known, and something else is wrong with it.
    """
    names = [str(item) for item in known]
    near = [] if str(word) in names else difflib.get_close_matches(str(word), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    """The value, or of a tuple its elements, each with its place: "" or "[index]"."""
    if isinstance(value, tuple):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        yield "", value


def _number(value: Number) -> str:
    """The number as a person writes it: 0.05, 65,535, 2^63 - 1."""
    if not isinstance(value, int):
        return f"{value:g}"
    for less, words in ((0, "2^{}"), (1, "2^{} - 1")):
        power = value + less
        if power > 10**6 and power.bit_count() == 1:
            return words.format(power.bit_length() - 1)
    return f"{value:,}"


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def is_optional(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None was one of its alternatives."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(kind))
    return kind, False


def _coerce(kind: Any, value: Any, where: str) -> Any:
    inner, optional = is_optional(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(inner):
        return from_dict(inner, value, where)  # type: ignore[arg-type]
    origin = typing.get_origin(inner)
    if origin is tuple and isinstance(value, (list, tuple)):
        item = typing.get_args(inner)[0]
        return tuple(_coerce(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(inner)[1]
        return {key: _coerce(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or inner
    if expected is Any or (isinstance(value, expected) and not (expected is int and isinstance(value, bool))):
        return value
    raise UserError(f"{where}: expected {getattr(inner, '__name__', inner)}, found {value!r}")
