"""Records that carry their own checksum, so that one flipped bit is noticed. Standard library only.

A sealed JSON file ends with the key `sha256_of_above`: the SHA-256 of the file's bytes before that key. A line of a
sealed JSON-lines file ends with the key `crc32`: that of the line's bytes before it. Files of earlier versions have
neither key and are read as they are; so is a file that a person edits, once the key is removed.

`folder` files of another format have their checksums beside them in `checksums.json`, which is itself sealed.
"""

import difflib
import hashlib
import json
import re
import zlib
from typing import Any

KEY, LINE_KEY = "sha256_of_above", "crc32"

_SEAL = re.compile(rb'"%s": ?"([0-9a-f]{64})"\s*\}\s*' % KEY.encode())
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_SEAL = re.compile(rb'"%s": "([0-9a-f]{8})"\}\s*' % LINE_KEY.encode())


class Broken(ValueError):
    """The bytes are not those that were sealed."""


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that UTF-8 can hold. Raises ValueError for NaN and infinity, which JSON does not have."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, separators=separators)
    if _SURROGATE.search(text):  # half of a pair, which another program may have escaped: so do we
        text = json.dumps(value, indent=indent, allow_nan=False, separators=separators)
    return text


def sealed(values: dict[str, Any], indent: int | None = 2) -> bytes:
    """`values` as JSON text, sealed. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json_text(values, indent)
    end = "\n" if indent else ""
    above = text.removesuffix("}").removesuffix("\n") + ("," if values else "") + end + " " * (indent or 0)
    found = hashlib.sha256(above.encode()).hexdigest()
    return f'{above}"{KEY}": "{found}"{end}}}\n'.encode()


def unsealed(data: bytes, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, which `data` is the text of, without its seal; `Broken` where that does not match."""
    if KEY not in values:
        last = next(reversed(values), "")
        if isinstance(values.get(last), str) and len(values[last]) == 64 and _is_nearly(last, KEY):
            raise Broken(f"it is damaged: its last key is {last!r}, expected {KEY}")
        return values
    start = data.rfind(b'"%s"' % KEY.encode())
    seal = _SEAL.fullmatch(data, start) if start >= 0 else None
    if seal is None or hashlib.sha256(data[:start]).hexdigest() != seal[1].decode():
        raise Broken(f"it is damaged or was edited: its SHA-256 is not the one in its last key, {KEY}")
    return {name: value for name, value in values.items() if name != KEY}


def _is_nearly(name: str, key: str) -> bool:
    return difflib.SequenceMatcher(None, name, key).ratio() > 0.8


def sealed_line(values: dict[str, Any]) -> str:
    """`values` as one line of JSON, sealed, with its line end."""
    above = json.dumps(values)[:-1] + (", " if values else "")
    return f'{above}"{LINE_KEY}": "{zlib.crc32(above.encode()):08x}"}}\n'


def unsealed_line(line: bytes, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, which `line` is the text of, without its seal; `Broken` where that does not match."""
    if LINE_KEY not in values:
        return values
    start = line.rfind(b'"%s"' % LINE_KEY.encode())
    seal = _LINE_SEAL.fullmatch(line, start) if start >= 0 else None
    if seal is None or zlib.crc32(line[:start]) != int(seal[1], 16):
        raise Broken(f"it is damaged or was edited: its checksum is not the one in its key {LINE_KEY}")
    return {name: value for name, value in values.items() if name != LINE_KEY}
