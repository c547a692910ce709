"""Values that nobody would give, as strategies of hypothesis: scalars, JSON, its texts, bytes of files."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 2, 3, 7, 64, 0.5, -0.5, 1e-9, 1e-320, 1e308, 2**31 - 1, 2**31, 2**63, 10**30, float("nan"),
           float("inf"), float("-inf"), True, False)  # fmt: skip
TEXTS = ("", " ", "a", "none", "null", "true", "\n", "a\x00b", "\x1b[31m", "\u202e\u2028", "\ud83d", "é", "日本",
         "../..", "/dev/zero", "..", ".", "x" * 3000, "%s{0}{x}", "<b>|`*_$", "1e400", "9" * 5000, "-", "--", "a/b",
         "~", "adam", "topk", "relu", "baseline", "adaptive", "float16", "blocks.0.hook", "2020")  # fmt: skip
NAMES = ("a", "k", "name", "step", "", "sae", "config", "x" * 300, "é", "sha256_of_above")

scalars = st.one_of(
    st.none(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(), st.text(max_size=9)
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
deep = st.sampled_from(("[", '{"a":')).flatmap(
    lambda opening: st.sampled_from((50, 5_000, 100_000)).map(opening.__mul__)
)


@st.composite
def mutated(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """The document with one to `most` of its values replaced, removed, renamed or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        holder = document
        for _ in range(draw(st.integers(0, 6))):
            inner = [value for value in _values(holder) if isinstance(value, (dict, list)) and value]
            if not inner:
                break
            holder = draw(st.sampled_from(inner))
        if not holder:
            return draw(documents)
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        way = draw(st.sampled_from(("scalar", "scalar", "document", "remove", "rename", "wrap", "swap")))
        if way == "scalar":
            holder[key] = draw(scalars)
        elif way == "document":
            holder[key] = draw(documents)
        elif way == "wrap":
            holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]})))
        elif way == "swap":
            holder[key] = copy.deepcopy(draw(st.sampled_from(_values(holder))))
        else:
            value = holder.pop(key)
            if way == "rename" and isinstance(holder, dict):
                holder[draw(st.sampled_from(NAMES))] = value
    return document


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


def json_bytes(value: Any) -> bytes:
    """The value as JSON text, as a careless writer has it: NaN, lone surrogates and control characters included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def json_texts(draw: st.DrawFn, document: Any, lines: bool = False) -> bytes:
    """Bytes in the place of a file that holds the JSON `document`, or of its lines."""
    way = draw(st.sampled_from(("mutated",) * 8 + ("any", "bytes", "bytes", "encoded", "deep", "twice")))
    whole = b"".join(json_bytes(line) + b"\n" for line in document) if lines else json_bytes(document)
    if way == "mutated":
        changed = draw(mutated(document))
        if lines:
            return b"".join(json_bytes(line) + b"\n" for line in (changed if isinstance(changed, list) else [changed]))
        return json_bytes(changed)
    if way == "any":
        return json_bytes(draw(documents))
    if way == "bytes":
        return draw(damaged(whole))
    if way == "encoded":
        text = whole.decode("utf-8", "replace")
        return text.encode(draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-32", "latin-1"))), "replace")
    if way == "deep":
        return b'{"a": ' + draw(deep).encode()
    place = whole.find(b"{") + 1  # a key that is there twice
    return whole[:place] + b'"a": 1, "a": null, "config": 3, "name": [],' + whole[place:]


INSERTED = (
    b"9" * 5000,
    b"[" * 20_000,
    b"\0",
    b"\xff",
    b"-",
    b"NaN",
    b"{",
    b'"',
    b"\n",
    b"null",
    b"1e999",
    b"\xef\xbb\xbf",
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with some of them changed, cut out, doubled or replaced, or cut short."""
    start = draw(st.integers(0, max(0, len(whole) - 1)))
    stop = min(len(whole), start + draw(st.sampled_from((1, 1, 4, 40))))
    way = draw(st.sampled_from(("other", "bit", "cut", "remove", "double", "insert", "any")))
    if way == "other":
        return whole[:start] + draw(st.binary(min_size=stop - start, max_size=stop - start)) + whole[stop:]
    if way == "bit":
        return whole[:start] + bytes([whole[start] ^ 1 << draw(st.integers(0, 7))]) + whole[start + 1 :]
    if way == "cut":
        return whole[:start]
    if way == "remove":
        return whole[:start] + whole[stop:]
    if way == "double":
        return whole[:stop] + whole[start:]
    if way == "insert":
        return whole[:start] + draw(st.sampled_from(INSERTED)) + whole[stop:]
    return draw(st.binary(max_size=200))


def toml_bytes(value: Any) -> bytes:
    """The table as TOML; what TOML does not have (null) as an empty text."""

    def written(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (int, float)):
            return repr(value)
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(written, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {written(item)}" for key, item in value.items()) + "}"
        return json.dumps(value or "")

    if not isinstance(value, dict):
        value = {"a": value}
    return "".join(f"{json.dumps(key)} = {written(item)}\n" for key, item in value.items()).encode()


@st.composite
def toml_texts(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """Bytes in the place of a TOML file of `document`."""
    way = draw(st.sampled_from(("mutated",) * 8 + ("any", "bytes", "bytes", "encoded", "deep")))
    if way == "mutated":
        return toml_bytes(draw(mutated(document)))
    if way == "any":
        return toml_bytes(draw(documents))
    if way == "bytes":
        return draw(damaged(toml_bytes(document)))
    if way == "encoded":
        return toml_bytes(document).decode().encode(draw(st.sampled_from(("utf-8-sig", "utf-16", "latin-1"))))
    return b"a = " + draw(deep).replace('{"a":', "{a=").encode()
