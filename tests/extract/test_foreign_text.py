"""Text as people have it: every format, what is no text, chats, folders with other things in them, damaged files."""

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from hafs_extract.config import SourceConfig, parse_source
from hafs_extract.contexts import mixed
from hafs_extract.text.documents import Chat, documents
from hafs_extract.text.files import text_fingerprint
from hafs_jax.base.errors import UserError
from tests.support.fuzz import Fuzz, damaged
from tests.support.tiny_models import save_jsonl, save_parquet

RECORDS = [{"text": "one"}, {"text": "two\n\nlines \u00e9"}, {"text": "  "}]
TEXTS = ["one", "two\n\nlines \u00e9"]
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]


def _source(path: Path, **fields: Any) -> SourceConfig:
    return SourceConfig(**{"name": "s", "path": str(path), **fields})


def _texts(path: Path, **fields: Any) -> list[str]:
    return [document.text for document in documents(_source(path, **fields))]


def _zstd(data: bytes) -> bytes:
    """The data in two frames, as tools that compress in parallel write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
CONTENTS = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "lines.json": b"\n\n" + LINES,
    "list.json": json.dumps(RECORDS, indent=1).encode(),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "a.Txt": b"\xef\xbb\xbfone<|endoftext|>two\r\n",
}


@pytest.mark.parametrize("compression", ["", ".gz", ".GZ", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_in_any_case_and_compressed(tmp_path: Path, name: str, compression: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": _zstd}[compression.lower()]
    path = tmp_path / (name + compression)
    path.write_bytes(pack(CONTENTS[name]))
    assert _texts(path) == (["one", "two"] if name == "a.Txt" else TEXTS)
    assert _texts(tmp_path) == _texts(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 9])
    if compression:
        with pytest.raises(UserError, match=rf"expected a whole \.\w+{compression.lower()} file at .*{name}"):
            _texts(path)


def test_what_a_folder_holds_besides_text_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0.jsonl", "b/train-1.jsonl.gz", "test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for name in (
        ".ipynb_checkpoints/a.jsonl",
        "._train-0.jsonl",
        ".a.txt",
        "readme.md",
        "b/x.MD",
        "a.tar.gz",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not to be read")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    with caplog.at_level(logging.INFO, "hafs_extract"):
        assert _texts(tmp_path) == ["b/train-1.jsonl.gz", "train-0.jsonl"]
    (line,) = caplog.messages
    assert line == (
        f"source s: 2 of 11 in {tmp_path} are read; left out: 3 hidden, 2 .md, 1 without a suffix, 1 .tar.gz,"
        " 1 linked folders, 1 whose names do not begin with 'train'"
    )
    caplog.clear()
    hidden = tmp_path / ".ipynb_checkpoints"  # what is named itself is read, hidden or not
    (hidden / "a.jsonl").write_text('{"text": "named"}')
    assert _texts(hidden) == _texts(hidden / "a.jsonl") == ["named"] and not caplog.messages
    (hidden / "a.jsonl").rename(hidden / "a.md")
    with pytest.raises(UserError, match=r"no \.jsonl.* file in .*checkpoints \(found: 1 \.md\)"):
        _texts(hidden)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (CHAT, r"found a list of chat messages; for the tokenizer's chat template say --text s=.*a\.jsonl,chat=text"),
        (["a", "b"], r"found a list; say --text .*,template=\{text\[0\]\} for its first element"),
        (
            {"en": "a", "fr": "b"},
            r"found a struct; say --text .*,template=\{text\[en\]\} for one of its fields \(en, fr\)",
        ),
        (7, r"found a number; to take it as it is written say --text .*,template=\{text!s\}"),
        (1.5, "found a number"),
        (True, "found true or false"),
        (None, r"found null; to leave such records out say --text .*,keep=text!=None"),
    ],
)
def test_text_that_is_no_string_is_refused_by_its_place_column_and_type(
    tmp_path: Path, value: Any, message: str
) -> None:
    path = save_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": value}])
    match = r"a\.jsonl, line 2: column 'text' of source s: expected text, " + message
    with pytest.raises(UserError, match=match) as raised:
        _texts(path)
    advice = str(raised.value).rpartition("say --text ")[2].split(" for ")[0]
    if not isinstance(value, bool | float) and "chat=" not in advice:  # what it says to do is right
        source = parse_source(advice, ())
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in [value, value]))
        expected = {list: "a", dict: "a", int: "7"}.get(type(value))
        assert [document.text for document in documents(source)] == ([expected] * 2 if expected else [])


def test_other_values_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "a.parquet", [{"text": b"bytes", "n": 5, "e": None}])
    with pytest.raises(UserError, match=r"a\.parquet, record 1: column 'text' .* found bytes; store it as a string"):
        _texts(path)
    with pytest.raises(UserError, match="found bytes"):
        _texts(path, template="{n}: {text}")
    assert _texts(path, template="n={n}, e={e}.") == ["n=5, e=."]
    with pytest.raises(UserError, match=r"column 'text' .*: expected text, found bytes; mend the record"):
        _texts(path, kind="wikitext")
    path = save_jsonl(tmp_path / "q.jsonl", [{"question": "a?", "choices": "abcd"}])
    with pytest.raises(
        UserError, match=r"q\.jsonl, line 1: column 'choices' .*: expected a list of texts, found a str"
    ):
        _texts(path, kind="multiple_choice")


@pytest.mark.parametrize("template", ["{text[role]}", "{text[0][no]}", "{text.no}", "{text[9]}", "{text:d}"])
def test_a_template_that_does_not_fit_is_named(tmp_path: Path, template: str) -> None:
    path = save_jsonl(tmp_path / "a.jsonl", [{"text": "s" if template == "{text:d}" else CHAT}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: template .* of source s cannot be filled in"):
        _texts(path, template=template)
    assert _texts(save_jsonl(path, [{"text": CHAT}]), template="{text[1][content]}") == ["Ho."]


def test_a_template_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template='body': expected a column in braces; say template=\{COLUMN\}"):
        parse_source("a.jsonl,template=body", ())


def test_a_record_without_the_column_is_named_by_its_line(tmp_path: Path) -> None:
    records = [{"text": f"text {number}"} for number in range(200)]
    records[137] = {"txt": "x"}
    path = save_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=r"a\.jsonl, line 138: .* expects a column 'text', found txt; .* or mend that"):
        _texts(path)


def test_chats_become_text_by_the_tokenizers_template(tmp_path: Path) -> None:
    def render(messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] == "tool":
            raise UserError("the chat template does not take these messages")
        assert all(value is not None for message in messages for value in message.values())
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    chat = Chat(render, lambda texts: [np.full(len(text), 7, np.int32) for text in texts])
    path = save_parquet(
        tmp_path / "a.parquet", [{"messages": [{**message, "calls": None} for message in CHAT], "topic": "t"}]
    )
    source = parse_source(f"s={path}@0.5,chat=messages", ())
    assert source.chat == "messages" and source.weight == 0.5
    (document,) = documents(source, chat)
    assert document.text == "<user>Hi?<assistant>Ho." and document.labels == {"topic": "t"}
    plain = _source(save_jsonl(tmp_path / "b.jsonl", [{"text": "x"}]), name="p")
    found = list(mixed((source, plain), lambda texts: [np.zeros(1, np.int32) for _ in texts], [], chat))
    assert [(number, ids.tolist()) for number, _, ids in found] == [(0, [7] * 23), (1, [0])]
    for messages, message in (
        ([{"role": "tool", "content": ""}], "line 1: the chat template does not take these messages"),
        ([{"role": "user", "content": None}], "column 'messages' .* expected a list of messages, .* found a list"),
        ([{"from": "human", "value": "x"}], "each with a role and a content that are strings, found a list"),
        ([], "found a list"),
        ("text", "found a string"),
    ):
        path = save_jsonl(tmp_path / "c.jsonl", [{"messages": messages}])
        with pytest.raises(UserError, match=message):
            list(documents(_source(path, chat="messages"), chat))
    with pytest.raises(UserError, match="chat=messages: expected no template and kind rows beside it"):
        parse_source("a.jsonl,chat=messages,template={x}", ())


def test_pointers_and_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.zst"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n")
        with pytest.raises(UserError, match=rf"{name}, found a Git-LFS pointer"):
            _texts(tmp_path / name)
    for path in (str(tmp_path / "no.jsonl"), "no.json.gz", "./no", "~/no", "/" + "x" * 3000):
        with pytest.raises(UserError, match=r"source s: expected a file or a folder at .*, found none"):
            _texts(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("read", [_texts, lambda path: text_fingerprint(_source(path))])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "b.txt").write_text("a text")
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name}, found a pipe, a device or a socket"):
            read(given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{\n "text": "x"\n}', r"a\.json, line 1: expected a list of records, or one JSON object a line"),
        ("a.json", '[{"text": "x"}, 7]', r"a\.json, record 2: expected a JSON object, found a number"),
        ("a.json", '[{"text": ', r"a\.json: expected a list of records \("),
        ("a.json", "[" * 100_000, r"a\.json: expected a list of records \(nested too deeply\)"),
        ("a.jsonl", '\n{"text": ' + "9" * 5000 + "}", r"a\.jsonl, line 2: .* \(an integer of over 4,300 digits\)"),
        ("a.jsonl", '{"text": "\udcff"}', r"a\.jsonl, line 1: expected one JSON object a line \(.* can't decode"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        _texts(tmp_path / name)


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "a.parquet", [{"text": f"some text {number}"} for number in range(500)])
    data = bytearray(path.read_bytes())
    data[40:400] = b"\xff" * 360
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"expected a parquet file at .*a\.parquet, found a file that cannot be read"):
        _texts(path)


VALUES = ("text", "", " ", "\ud83d", None, 7, -0.5, True, [], ["a"], {}, {"a": "b"}, CHAT, [CHAT], [None], 10**30)
TEMPLATES = ("{text}", "{text}", "{a}: {text}", "{text!s}", "{text[0]}", "{text[a]}", "{text.x}", "{text:>9}", "{0}")


def test_any_records_are_text_or_refused(tmp_path: Path, fuzz: Fuzz) -> None:
    """Records of any values, and damaged files: the texts are strings that were meant, or there is a `UserError`."""
    count, read = 0, 0
    files = {
        "a.jsonl": LINES,
        "a.json": json.dumps(RECORDS).encode(),
        "a.json.gz": gzip.compress(LINES),
        "a.jsonl.zst": _zstd(LINES),
        "a.txt": CONTENTS["a.Txt"],
        "a.parquet": save_parquet(tmp_path / "a.parquet", RECORDS).read_bytes(),
    }
    chat = Chat(lambda messages: " ".join(message["content"] for message in messages), lambda texts: [])
    for rng in fuzz("text records"):
        count += 1
        name = rng.choice(list(files))
        fields: dict[str, Any] = {}
        meant: set[str] | None = None
        if count % 2:
            data = damaged(files[name], rng)
        else:
            name = rng.choice(("a.jsonl", "a.json"))
            records = [{key: rng.choice(VALUES) for key in ("text", "a") if rng.random() < 0.9} for _ in range(3)]
            fields = rng.choice(({"template": rng.choice(TEMPLATES)}, {"chat": "text"}, {"keep": "a!=7"}))
            lines = name == "a.jsonl" or rng.random() < 0.5
            data = ("\n".join(map(json.dumps, records)) if lines else json.dumps(records)).encode()
            if fields.get("template") == "{text}" or "keep" in fields:
                meant = {"text", "?"}
        (tmp_path / name).write_bytes(data)
        try:
            found = list(documents(_source(tmp_path / name, **fields), chat))
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path / name) in str(error)
        except BaseException as error:
            raise AssertionError(f"{name} {fields} {data[:300]!r}") from error
        else:
            read += 1
            assert all(isinstance(document.text, str) and document.text.strip() for document in found)
            assert meant is None or {document.text for document in found} <= meant
    assert count < 50 or 0.1 * count < read < 0.9 * count
