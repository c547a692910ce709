"""Reads sources of text (local files, hub datasets, packaged data) as streams of documents.

Must not import torch. Imports the hub's `datasets` library only where a source comes from the hub.
"""

import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hafs_extract import packaged
from hafs_extract.config import TEXT_SYNTAX, SourceConfig
from hafs_extract.hub.files import plan_dataset
from hafs_extract.hub.presence import is_offline
from hafs_extract.text.files import Record, format_of, local_files, read_file
from hafs_jax.base.errors import UserError
from hafs_jax.base.hub import hub_errors

LABELS = ("title", "topic", "label", "answer")
"""Columns that are copied to documents.jsonl where a record has them."""

_ARTICLE = re.compile(r" = (?!= )(.+?)(?<! =) = \n?")
"""The line ` = Title = ` that begins an article of WikiText. A section's title has more signs: ` = = Title = = `."""

_FORMATTER = string.Formatter()


@dataclass(frozen=True)
class Chat:
    """What a tokenizer knows of chats."""

    render: Callable[[list[dict[str, Any]]], str]  # messages to text, by its chat template
    tokenize: Callable[[list[str]], list[np.ndarray]]  # such texts, in which special tokens' names stand for the tokens


@dataclass(frozen=True)
class Document:
    """One text and what is known of it."""

    text: str
    labels: dict[str, Any] = field(default_factory=dict)


def documents(source: SourceConfig, chat: Chat | None = None) -> Iterator[Document]:
    """The documents of a source, in its order. Texts that are only white space are left out.

    `chat` is needed where the source has a column of chat messages. Raises `UserError` for a record without the columns
    that are asked for, and for one whose text is no string.
    """
    records = _kept(source, _records(source))
    found = _chats(source, records, chat) if source.chat else _READERS[source.kind](source, records)
    for document in found:
        if document.text.strip():
            yield Document(_clean(document.text), document.labels)


def _clean(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _rows(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    parts = list(_FORMATTER.parse(source.template))
    alone = source.template.strip() == f"{{{next(name for _, name, _, _ in parts if name is not None)}}}"
    for record in records:
        try:
            text = "".join(_filled(source, record, *part, alone) for part in parts)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"{record.place}: template {source.template!r} of source {source.name} cannot be filled in"
                f" ({type(error).__name__}: {error})"
            ) from None
        yield Document(text, _labels(record))


def _filled(
    source: SourceConfig,
    record: Record,
    literal: str,
    name: str | None,
    spec: str | None,
    conversion: str | None,
    alone: bool,
) -> str:
    """One part of a template: its literal text, and the column after it. `alone`: the column is all of the template.

    Within other text, a number stands for its digits, and null for nothing.
    """
    if name is None:
        return literal
    column = re.split(r"[.\[]", name, maxsplit=1)[0]
    value = _column(source, record, column)
    if name != column:
        value, _ = _FORMATTER.get_field("value" + name[len(column) :], (), {"value": value})
    if conversion:
        value = _FORMATTER.convert_field(value, conversion)
    elif not alone and value is None:
        value = ""
    elif not isinstance(value, str) and (alone or not isinstance(value, int | float)):
        raise _no_text(source, record, name, value)
    return literal + format(value, spec or "")


def _chats(source: SourceConfig, records: Iterator[Record], chat: Chat | None) -> Iterator[Document]:
    """Each record's chat messages as one text, by the tokenizer's chat template."""
    assert source.chat is not None
    if chat is None:
        raise UserError(f"source {source.name}: chat={source.chat} needs a tokenizer with a chat template")
    for record in records:
        messages = _column(source, record, source.chat)
        if not _is_chat(messages):
            raise UserError(
                f"{record.place}: column {source.chat!r} of source {source.name}: expected a list of messages, each"
                f" with a role and a content that are strings, found {_type(messages)}"
            )
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            text = chat.render(given)
        except UserError as error:
            raise UserError(f"{record.place}: {error}") from None
        yield Document(text, _labels(record))


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) for message in value)
        and all(isinstance(message.get(key), str) for message in value for key in ("role", "content"))
    )


def _wikitext(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    """WikiText's articles. Each record is one line; an article begins with the line of its title."""
    lines: list[str] = []
    title: str | None = None
    for record in records:
        line = _text(source, record, "text")
        if found := _ARTICLE.fullmatch(line):
            yield Document("".join(lines), {"title": title} if title else {})
            lines, title = [], found[1]
        lines.append(line if line.endswith("\n") else line + "\n")
    yield Document("".join(lines), {"title": title} if title else {})


def _multiple_choice(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    """A question and its choices, lettered, as one text. Which choice is right is not in the text but in the labels."""
    for record in records:
        question, choices = _text(source, record, "question"), _column(source, record, "choices")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise _no_text(source, record, "choices", choices, "a list of texts")
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        options = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        yield Document("\n".join([question, *options]), _labels(record))


_READERS: dict[str, Callable[[SourceConfig, Iterator[Record]], Iterator[Document]]] = {
    "rows": _rows,
    "wikitext": _wikitext,
    "multiple_choice": _multiple_choice,
}


def _labels(record: Record) -> dict[str, Any]:
    found = {key: record.values[key] for key in LABELS if isinstance(record.values.get(key), str | int | float)}
    return {key: _clean(value) if isinstance(value, str) else value for key, value in found.items()}


def _kept(source: SourceConfig, records: Iterator[Record]) -> Iterator[Record]:
    if source.keep is None:
        yield from records
        return
    column, operator, value = re.fullmatch(r"(\w+)(!?=)(.*)", source.keep).groups()  # type: ignore[union-attr]
    for record in records:
        if (str(_column(source, record, column)) == value) == (operator == "="):
            yield record


def _text(source: SourceConfig, record: Record, name: str) -> str:
    value = _column(source, record, name)
    if not isinstance(value, str):
        raise _no_text(source, record, name, value)
    return value


def _column(source: SourceConfig, record: Record, name: str) -> Any:
    if name not in record.values:
        columns = list(record.values)
        found = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") or "no column"
        raise UserError(
            f"{record.place}: kind {source.kind} of source {source.name} expects a column {name!r}, found {found};"
            f" name the column with --text {source.name}={source.path},template={{COLUMN}}, or mend that record"
        )
    return record.values[name]


def _no_text(source: SourceConfig, record: Record, name: str, value: Any, wanted: str = "text") -> UserError:
    """The error for a value that is no text. It says which template, or which other key of --text, takes it."""
    flag = f"say --text {source.name}={source.path},"
    if source.kind != "rows":
        mend = f"mend the record, or {flag}template={{COLUMN}} with another column"
    elif _is_chat(value):
        mend = f"for the tokenizer's chat template {flag}chat={name}"
    elif isinstance(value, dict) and value:
        mend = f"{flag}template={{{name}[{next(iter(value))}]}} for one of its fields ({', '.join(map(str, value))})"
    elif isinstance(value, Sequence) and not isinstance(value, bytes | str):
        mend = f"{flag}template={{{name}[0]}} for its first element"
    elif value is None:
        mend = f"to leave such records out {flag}keep={re.split(r'[.[]', name)[0]}!=None"
    elif isinstance(value, bytes):
        mend = "store it as a string, or name another column with template={COLUMN}"
    else:
        mend = f"to take it as it is written {flag}template={{{name}!s}}"
    return UserError(
        f"{record.place}: column {name!r} of source {source.name}: expected {wanted}, found {_type(value)}; {mend}"
    )


def _type(value: Any) -> str:
    """The type of a record's value in words."""
    if isinstance(value, list):
        return "a list of chat messages" if _is_chat(value) else "a list"
    names = {dict: "a struct", str: "a string", bytes: "bytes", bool: "true or false", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _records(source: SourceConfig) -> Iterator[Record]:
    if source.path in packaged.TEXTS:
        return _numbered(source, packaged.read_records(packaged.TEXTS[source.path]))
    if os.path.exists(source.path):
        return (record for path in local_files(source) for record in read_file(path))
    if Path(source.path).is_absolute() or source.path.startswith((".", "~")) or format_of(Path(source.path)):
        raise UserError(
            f"source {source.name}: expected a file or a folder at {source.path}, found none; see --text {TEXT_SYNTAX}"
        )
    return _hub_records(source)


def _numbered(source: SourceConfig, records: Iterable[dict[str, Any]]) -> Iterator[Record]:
    return (Record(values, source.path, number) for number, values in enumerate(records, start=1))


def _hub_records(source: SourceConfig) -> Iterator[Record]:
    """The records of a hub dataset: from its own files where they are parquet or JSON lines, else by `datasets`."""
    fetched = plan_dataset(source).run()
    formats = {format_of(path) for path in fetched.paths}
    is_whole = re.fullmatch(r"[\w.-]+", source.split) is not None  # "train[:10%]" is part of a split
    if formats and is_whole and all(found and found[0] in (".parquet", ".jsonl") for found in formats):
        for file, path in zip(fetched.files, fetched.paths, strict=True):
            for record in read_file(path):
                yield record._replace(where=f"{source.path}/{file.path}")
        return
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    with hub_errors("dataset", source.path):
        revision = None if is_offline() else fetched.commit
        loaded = datasets.load_dataset(source.path, source.subset, split=source.split, revision=revision)
    yield from _numbered(source, loaded)
