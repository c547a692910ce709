"""What a JSON file must look like, declared in one place and checked where it is read. Standard library only.

A shape is one of

    NUMBER, WHOLE, TEXT, FLAG    a number, a whole number, a text, true or false
    ANY                          any value
    {"key": shape, ...}          an object; keys that are not named may be there; "key!" is one that must be
    {str: shape}                 an object of any keys; {NUMERAL: shape} of numbers in digits
    [shape]                      a list
    (shape, shape, ...)          a list of just these

null may stand for a number, a text, or the value of a key without "!"; for an object or a list in a list, or under any
key, it may not. Of numbers, NaN and infinity are taken: older files hold them.
"""

import re
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import json_type

NUMBER, WHOLE, TEXT, FLAG, ANY = "a number", "a whole number", "a text", "true or false", "any value"
NUMERAL = "a number in digits"

_TYPES: dict[str, tuple[type, ...]] = {NUMBER: (int, float), WHOLE: (int,), TEXT: (str,), FLAG: (bool,)}
_MOST = 2**63  # of a whole number: counts and places in arrays are less


def check_shape(value: Any, shape: Any, where: str, mend: str) -> None:
    """Raises `UserError` where `value`, which was read at `where`, has another shape; `mend` says what to do then."""
    if problem := _problem(value, shape, ""):
        place, expected, found = problem
        at = f" at {_short(place)}" if place else ""
        raise UserError(f"{where}: expected {expected}{at}, found {found}; {mend}")


def _problem(value: Any, shape: Any, place: str) -> tuple[str, str, str] | None:
    """(where, what is expected, what was found) of the first value that does not fit; None where all do."""
    if shape is ANY or (value is None and not isinstance(shape, dict | list | tuple)):
        return None
    if isinstance(shape, dict):
        return _of_object(value, shape, place) if isinstance(value, dict) else (place, "an object", json_type(value))
    if isinstance(shape, list | tuple):
        if not isinstance(value, list):
            return place, "a list", json_type(value)
        if isinstance(shape, tuple) and len(shape) != len(value):
            return place, f"a list of {len(shape)}", f"one of {len(value)}"
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        items = zip(value, shapes, strict=True)
        return next(
            (found for n, (item, of) in enumerate(items) if (found := _problem(item, of, f"{place}[{n}]"))), None
        )
    if not isinstance(value, _TYPES[shape]) or (isinstance(value, bool) and shape is not FLAG):
        return place, shape, json_type(value)
    if isinstance(value, int) and abs(value) >= _MOST:
        return place, f"{shape} below 2^63", "a larger one"
    return None


def _of_object(value: dict[str, Any], shape: dict[Any, Any], place: str) -> tuple[str, str, str] | None:
    def inner(key: str) -> str:
        return f"{place}.{key}" if place else key

    for key, of in shape.items():
        if key is str or key is NUMERAL:
            for name, item in value.items():
                if key is NUMERAL and not re.fullmatch(r"\d{1,9}", name, re.ASCII):
                    return place, f"keys that are {NUMERAL}", f"the key {_short(name)!r}"
                if found := _problem(item, of, inner(name)):
                    return found
        else:
            name = key.removesuffix("!")
            if name != key and value.get(name) is None:
                return place, f"a value of the key {name}", "null" if name in value else "none"
            if value.get(name) is not None and (found := _problem(value[name], of, inner(name))):
                return found
    return None


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}"
