"""Reads sources of text (local files, hub datasets, packaged data) as streams of documents.

Must not import torch. Imports the hub's `datasets` library only where a source comes from the hub.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafs_extract import packaged
from hafs_extract.config import SourceConfig
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import jsonl_records
from hafs_jax.base.options import did_you_mean

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet", ".txt")
LABELS = ("title", "topic", "label", "answer")
"""Columns that are copied to documents.jsonl where a record has them."""

_ARTICLE = re.compile(r" = (?!= )(.+?)(?<! =) = \n?")
"""The line ` = Title = ` that begins an article of WikiText. A section's title has more signs: ` = = Title = = `."""


@dataclass(frozen=True)
class Document:
    """One text and what is known of it."""

    text: str
    labels: dict[str, Any] = field(default_factory=dict)


def documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source, in its order. Texts that are only white space are left out."""
    read = _READERS[source.kind]
    for document in read(source, _kept(source, _records(source))):
        if document.text.strip():
            text = document.text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
            yield Document(text, document.labels)


def _rows(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    for record in records:
        try:
            text = source.template.format_map({key: "" if value is None else value for key, value in record.items()})
        except KeyError as error:
            raise _no_column(source, error.args[0], record) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"source {source.name}: template {source.template!r} cannot be filled in ({error})"
            ) from None
        yield Document(text, _labels(record))


def _wikitext(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    """WikiText's articles. Each record is one line; an article begins with the line of its title."""
    lines: list[str] = []
    title: str | None = None
    for record in records:
        line = _column(source, record, "text")
        if found := _ARTICLE.fullmatch(line):
            yield Document("".join(lines), {"title": title} if title else {})
            lines, title = [], found[1]
        lines.append(line if line.endswith("\n") else line + "\n")
    yield Document("".join(lines), {"title": title} if title else {})


def _multiple_choice(source: SourceConfig, records: Iterator[Record]) -> Iterator[Document]:
    """A question and its choices, lettered, as one text. Which choice is right is not in the text but in the labels."""
    for record in records:
        question, choices = _column(source, record, "question"), _column(source, record, "choices")
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        options = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        yield Document("\n".join([question, *options]), _labels(record))


_READERS: dict[str, Callable[[SourceConfig, Iterator[Record]], Iterator[Document]]] = {
    "rows": _rows,
    "wikitext": _wikitext,
    "multiple_choice": _multiple_choice,
}


def _labels(record: Record) -> Record:
    return {key: record[key] for key in LABELS if isinstance(record.get(key), str | int | float)}


def _kept(source: SourceConfig, records: Iterator[Record]) -> Iterator[Record]:
    if source.keep is None:
        yield from records
        return
    column, operator, value = re.fullmatch(r"(\w+)(!?=)(.*)", source.keep).groups()  # type: ignore[union-attr]
    for record in records:
        if (str(_column(source, record, column)) == value) == (operator == "="):
            yield record


def _column(source: SourceConfig, record: Record, name: str) -> Any:
    if name not in record:
        raise _no_column(source, name, record)
    return record[name]


def _no_column(source: SourceConfig, name: str, record: Record) -> UserError:
    return UserError(
        f"source {source.name} ({source.path}): kind {source.kind} expects a column {name!r}, found"
        f" {', '.join(record)}; name the column with --text {source.name}={source.path},template={{COLUMN}}"
    )


def _records(source: SourceConfig) -> Iterator[Record]:
    if source.path in packaged.TEXTS:
        return iter(packaged.read_records(packaged.TEXTS[source.path]))
    if Path(source.path).exists():
        return _local_records(source)
    return _hub_records(source)


def _local_records(source: SourceConfig) -> Iterator[Record]:
    for path in local_files(source):
        if path.suffix == ".jsonl":
            yield from (record for _, record in jsonl_records(path))
        elif path.suffix == ".parquet":
            yield from _parquet_records(path)
        else:
            yield from _txt_records(path)


def local_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted by path: the file itself, or those of the folder.

    A folder may be laid out like the hub's (`<subset>/<split>-00000-of-00001.parquet`): then only the subset's files
    whose names begin with `split` are read. Where there is no such subset, or no such names, all files are.
    """
    root = Path(source.path)
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise UserError(f"source {source.name}: {root} is no {', '.join(SUFFIXES)} file")
        return [root]
    if source.subset and (root / source.subset).is_dir():
        root = root / source.subset
    found = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"source {source.name}: no {', '.join(SUFFIXES)} file in {root}")
    return [path for path in found if path.name.startswith(source.split)] or found


def _txt_records(path: Path) -> Iterator[Record]:
    """The documents of a text file, divided by blank lines or by `<|endoftext|>`."""
    part = ""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                *ended, rest = line.split("<|endoftext|>")
                for piece in ended:
                    yield {"text": (part + piece).strip()}
                    part = ""
                part += rest
                if not rest.strip():
                    yield {"text": part.strip()}
                    part = ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text ({error})") from None
    yield {"text": part.strip()}


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file that can be read ({error})") from None


def _hub_records(source: SourceConfig) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    try:
        loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        near = did_you_mean(source.path, packaged.TEXTS)
        raise UserError(f"source {source.name}: dataset {source.path!r} does not load: {reason}{near}") from error
    return iter(loaded)
