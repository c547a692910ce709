"""Files of other programs: arrays, SAEs of other libraries, models, texts. What is taken is checked."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from safetensors.numpy import save

from hafs_extract.config import SourceConfig
from hafs_extract.text.documents import Chat, documents
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.torture.fuzz.commands import MODEL
from tests.torture.fuzz.documents import TRAIN, O, of_verify
from tests.torture.fuzz.place import PROFILE, TRAINED, Place, problem
from tests.torture.fuzz.values import damaged, json_bytes, json_texts, mutated, scalars

SAE = Path(f"out/{PROFILE}/runs/{TRAINED}/sae")
OF_LIBRARY = SAE.parent / "dictionary_learning/trainer_0"
EXTRACT = ["extract", "--out", "new", "--profile", "pythia70m", *MODEL]
FILES: dict[str, tuple[list[str], ...]] = {
    "acts.npy": (["import", "acts.npy", "--out", "new", "--profile", "q"],),
    "groups.npy": (["import", "acts.npy", "--out", "new", "--profile", "q", "--groups", "groups.npy"],),
    "acts.safetensors": (["import", "acts.safetensors", "--out", "new", "--profile", "q"],),
    f"{SAE}/sae_weights.safetensors": (["import-sae", str(SAE), "new"], [*TRAIN, "--init-from", str(SAE)]),
    f"{SAE}/cfg.json": (["import-sae", str(SAE), "new"], [*TRAIN, "--init-from", str(SAE)]),
    f"{SAE}/sparsity.safetensors": (["import-sae", str(SAE), "new"],),
    f"{OF_LIBRARY}/ae.pt": (["import-sae", f"{OF_LIBRARY}/ae.pt", "new"],),
    "model/config.json": (EXTRACT,),
    "model/tokenizer.json": (EXTRACT,),
    "model/tokenizer_config.json": (EXTRACT,),
    "model/model.safetensors": (EXTRACT,),
    f"{O}/store/train/shard-00000.npy": (["verify", f"{O}/store/train"],),
    f"{O}/store/train/contexts.npy": (["verify", f"{O}/store/train"],),
    **{f"text{suffix}": () for suffix in (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.zst", ".parquet")},
}
"""Each file, and the commands that read it; texts are read by a function."""
FIELDS: tuple[dict[str, Any], ...] = (
    {}, {}, {"template": "{text}"}, {"template": "{n}: {text}"}, {"template": "{text[0]}"}, {"keep": "n!=7"},
    {"chat": "text"}, {"kind": "wikitext"}, {"kind": "multiple_choice"}, {"template": "{text.x}"},
)  # fmt: skip
RECORDS = [{"text": "one", "n": 1}, {"text": "two\n\nlines é", "n": 7}, {"text": "  ", "n": None}]


def files(place: Place) -> st.SearchStrategy[tuple[str, int, bytes, dict[str, Any]]]:
    """(the file, which of its readers, its bytes, the fields of a source of text)."""
    pools = {name: _bytes(name, place.here / name) for name in FILES}
    return st.sampled_from(sorted(FILES)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.integers(0, max(0, len(FILES[name]) - 1)), pools[name], st.sampled_from(FIELDS)
        )
    )


def _bytes(name: str, path: Path) -> st.SearchStrategy[bytes]:
    if name.startswith("text"):
        return _texts(path.suffixes)
    if path.name == "acts.safetensors":
        return _safetensors(save({"acts": np.load(path.with_suffix(".npy"))}))
    if path.name == "sparsity.safetensors":
        return _safetensors(save({"sparsity": np.zeros(13, np.float32)}))
    data = path.read_bytes()
    if path.suffix == ".json":
        return json_texts(json.loads(data))
    if path.suffix == ".safetensors":
        return _safetensors(data)
    return st.one_of(damaged(data), _npy(data)) if path.suffix == ".npy" else damaged(data)


def _texts(suffixes: list[str]) -> st.SearchStrategy[bytes]:
    lines = st.one_of(json_texts(RECORDS, lines=True), mutated(RECORDS).map(_lines))
    if suffixes[0] == ".parquet":
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
        return damaged(file.getvalue().to_pybytes())
    if suffixes[-1] == ".gz":
        return st.one_of(lines.map(gzip.compress), damaged(gzip.compress(_lines(RECORDS))))
    if suffixes[-1] == ".zst":
        return json_texts(RECORDS).map(lambda data: pyarrow.compress(data, "zstd", asbytes=True))
    if suffixes == [".txt"]:
        return damaged("one\n\ntwo é\nlines\n".encode())
    return st.one_of(lines, json_texts(RECORDS))


def _lines(records: Any) -> bytes:
    return b"".join(json_bytes(record) + b"\n" for record in (records if isinstance(records, list) else [records]))


@st.composite
def _npy(draw: st.DrawFn, whole: bytes) -> bytes:
    """An npy file with another header."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (60, 6)}
    values = (*("<f4", "<f8", ">f2", "<i4", "|O", "<U9", "<M8[s]", "<c8", "V9", "|S3", "float8"),
              True, None, 0, (), (0, 6), (60,), (360, 1), (1, 360), (2**40, 6), (60, 0), (-60, 6), (2**63, 2**63),
              (60.0, 6),
              ((60,), 6), [("a", "<f4")])  # fmt: skip
    for _ in range(draw(st.integers(1, 2))):
        header[draw(st.sampled_from((*header, "more")))] = draw(st.sampled_from(values) | scalars)
    text = draw(st.sampled_from((repr(header), repr(header) + " " * 70_000, "{" * 5000, "[" * 300 + "]" * 300)))
    data = text.encode("utf-8", "surrogatepass") + b"\n"
    version = draw(st.sampled_from((b"\1\0", b"\2\0", b"\3\0", b"\4\0")))
    size = struct.pack("<H", len(data) % 65_536) if version == b"\1\0" else struct.pack("<I", len(data))
    return b"\x93NUMPY" + version + size + data + whole[-1440:]


@st.composite
def _safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with another header, or with other bytes."""
    if draw(st.booleans()):
        return draw(damaged(whole))
    (size,) = struct.unpack("<Q", whole[:8])
    data = draw(json_texts(json.loads(whole[8 : 8 + size])))
    return (
        struct.pack("<Q", draw(st.sampled_from((len(data), len(data), len(data), 2**63, 0)))) + data + whole[8 + size :]
    )


def case(place: Place, example: tuple[str, int, bytes, dict[str, Any]]) -> str | None:
    """What is wrong with how a reader of the file ends; None where it is as it should be."""
    name, number, data, fields = example
    path = place.here / name
    path.write_bytes(data)
    wrong = None
    try:
        if FILES[name]:
            reader: Any = FILES[name][number]
            ended = place.command(reader)
            wrong = of_verify(ended) if reader[0] == "verify" else problem(ended)
            if wrong is None and ended.code == 0:
                wrong = _made_wrong(place.here / "new")
        else:
            reader = fields
            wrong = problem(place.call(lambda: _read_texts(path, fields)))
    finally:
        place.restore()
    return wrong and f"{name} of {data[:300]!r}, {reader}: {wrong}"


def _read_texts(path: Path, fields: dict[str, Any]) -> None:
    chat = Chat(lambda messages: " ".join(message["content"] for message in messages), lambda texts: [])
    for document in documents(SourceConfig(**{"name": "s", "path": str(path), **fields}), chat):
        assert isinstance(document.text, str) and document.text.strip()


def _made_wrong(folder: Path) -> str | None:
    """What is wrong with stores or an SAE that were made."""
    for manifest in folder.glob("**/store/*/manifest.json"):
        if found := verify(manifest.parent):
            return f"made a store with {found[0]}"
        if not np.isfinite(Store(manifest.parent).read(0).astype(np.float32)).all():
            return "made a store of what is not finite"
    return None
