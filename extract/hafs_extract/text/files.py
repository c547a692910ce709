"""The local files of a source of text: which of a folder are read, and the records in each. Must not import torch.

A file's format is told by its suffix, in any case. JSON and plain text may be compressed. pyarrow is imported where a
file needs it: for parquet, and for zstd.
"""

import gzip
import hashlib
import io
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from hafs_extract.config import SourceConfig
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import json_lines, json_type, sha256_of
from hafs_jax.base.foreign import parse_json, reading, reason, refuse_pointer, refuse_special

LOG = logging.getLogger(__name__)

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
ENDINGS = ".jsonl, .json, .txt (each also with .gz or .zst) or .parquet"

_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space, and the mark of UTF-8 that some editors put first


class Record(NamedTuple):
    """One record and where it stands."""

    values: dict[str, Any]
    where: str  # a file or a dataset
    number: int
    unit: str = "record"  # what is counted: lines of JSON lines, else records

    @property
    def place(self) -> str:
        return f"{self.where}, {self.unit} {self.number}"


def format_of(path: Path) -> tuple[str, str] | None:
    """The file's format and compression (or ""), by its name; None where it is none that can be read."""
    name, compression = path.name.lower(), ""
    if name.endswith(COMPRESSIONS):
        name, compression = name.rpartition(".")[0], path.suffix.lower()
    suffix = Path(name).suffix
    return (suffix, compression) if suffix in FORMATS and not (suffix == ".parquet" and compression) else None


def local_files(source: SourceConfig, quiet: bool = False) -> list[Path]:
    """The files of a local source, sorted by path: the file itself, or those of the folder.

    A folder may be laid out like the hub's (`<subset>/<split>-00000-of-00001.parquet`): then only the subset's files
    whose names begin with `split` are read. Where there is no such subset, or no such names, all files are. Hidden
    files and folders are not read. Unless `quiet`, what is left out is logged, in one line.
    """
    root = Path(source.path)
    if not root.is_dir():
        if format_of(root) is None:
            raise UserError(f"source {source.name}: {root} is no {ENDINGS} file")
        refuse_special(root, "a text file")
        return [root]
    if source.subset and (root / source.subset).is_dir():
        root = root / source.subset
    found, left = _readable(root)
    for path in found:
        refuse_special(path, "a text file")
    if not found:
        raise UserError(f"source {source.name}: no {ENDINGS} file in {root}{_listed(' (found: ', left, ')')}")
    named = [path for path in found if path.name.startswith(source.split)] or found
    if len(named) < len(found):
        left[f"whose names do not begin with {source.split!r}"] = len(found) - len(named)
    if left and not quiet:
        total = len(named) + left.total()
        LOG.info(f"source {source.name}: {len(named)} of {total} in {root} are read{_listed('; left out: ', left)}")
    return named


def text_fingerprint(source: SourceConfig) -> str | None:
    """A SHA-256 of the names and contents of a local source's files; None where nothing local lies at its path."""
    if not (root := Path(source.path)).exists():
        return None
    paths = local_files(source, quiet=True)
    with ThreadPoolExecutor(4) as threads:
        shas = threads.map(sha256_of, paths)
        lines = [f"{sha}  {path.relative_to(root)}\n" for path, sha in zip(paths, shas, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _readable(root: Path) -> tuple[list[Path], Counter[str]]:
    """The files in `root` and below it that can be read, sorted; and how many others there are of each kind."""
    found: list[Path] = []
    left: Counter[str] = Counter()
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            left["hidden"] += not path.is_dir()
        elif path.is_dir():
            left["linked folders"] += path.is_symlink()  # not followed
        elif format_of(path):
            found.append(path)
        else:
            left["".join(path.suffixes[-2:]).lower() or "without a suffix"] += 1
    return found, +left


def _listed(before: str, left: Counter[str], after: str = "") -> str:
    """The counts in words, the most frequent first; empty where there are none."""
    counts = [f"{count} {what}" for what, count in left.most_common(8)]
    if len(left) > len(counts):
        counts.append("others")
    return f"{before}{', '.join(counts)}{after}" if counts else ""


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file; `UserError` naming what in it cannot be read."""
    known = format_of(path)
    assert known is not None
    suffix, compression = known
    refuse_pointer(path, f"a {suffix} file")
    if suffix == ".parquet":
        yield from _parquet_records(path)
        return
    read = {".txt": _txt_records, ".json": _json_records, ".jsonl": _jsonl_records}[suffix]
    what = f"a whole {suffix}{compression} file"
    with reading(path, what, EOFError, zlib.error), _opened(path, compression) as file:
        yield from read(file, path)


def _opened(path: Path, compression: str) -> BinaryIO:
    """The file, opened for reading what it holds."""
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if compression == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return open(path, "rb")


def _lines(numbered: Iterator[tuple[int, dict[str, Any]]], path: Path) -> Iterator[Record]:
    return (Record(values, str(path), number, "line") for number, values in numbered)


def _jsonl_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    return _lines(json_lines(file, path), path)


def _json_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    """The records of a JSON list, which is read whole, or of one object a line."""
    skipped = 0
    while (first := file.read(1)) and first in _BLANK:
        skipped += first == b"\n"
    if first != b"[":
        lines = itertools.chain(itertools.repeat(b"\n", skipped), [first + file.readline()], file)
        yield from _lines(json_lines(lines, path, expected="a list of records, or one JSON object a line"), path)
        return
    try:
        values = parse_json(first + file.read())
    except ValueError as error:
        raise UserError(f"{path}: expected a list of records ({reason(error)})") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise UserError(f"{path}, record {number}: expected a JSON object, found {json_type(value)}")
        yield Record(value, str(path), number)


def _txt_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    """The documents of a text file, divided by blank lines or by `<|endoftext|>`."""
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
            for number, text in enumerate(_txt_documents(lines), start=1):
                yield Record({"text": text}, str(path), number)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text ({error})") from None


def _txt_documents(lines: io.TextIOWrapper) -> Iterator[str]:
    part = ""
    for line in lines:
        *ended, rest = line.split("<|endoftext|>")
        for piece in ended:
            yield (part + piece).strip()
            part = ""
        part += rest
        if not rest.strip():
            yield part.strip()
            part = ""
    yield part.strip()


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    errors = (pyarrow.ArrowException, ValueError, OverflowError)  # the last two of values that Python does not have
    with (
        reading(path, "a parquet file", *errors, fault="cannot be read whole"),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        rows = (values for batch in file.iter_batches(batch_size=1024) for values in batch.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Record(values, str(path), number)
