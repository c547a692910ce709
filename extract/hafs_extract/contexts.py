"""From documents to contexts: the mix of sources, the held-out split, the cutting, the batches. No torch here.

A context is at most `context_length` tokens of one document, BOS first where the model has one. This module writes the
contexts.npy, tokens.npy and documents.jsonl of both splits, as they will lie in the stores.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.text.documents import Chat, Document, documents
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic, write_npy
from hafs_jax.base.places import make_folder
from hafs_jax.store.manifest import CONTEXT

SPLITS = ("train", "heldout")

Tokenize = Callable[[list[str]], list[np.ndarray]]

_DOCUMENTS_AT_ONCE = 64


def is_heldout(text: str, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: whether a hash of `seed` and its text, from 0 to 1, < fraction.

    Equal texts of different sources fall into the same split, so that the splits share no document.
    """
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def mixed(
    sources: tuple[SourceConfig, ...], tokenize: Tokenize, notes: list[str], chat: Chat | None = None
) -> Iterator[tuple[int, Document, np.ndarray]]:
    """Documents of all sources in one stream: the number of the source, the document and its token ids.

    The next document is always of the source that is furthest behind its share, which is the one with the least
    tokens / weight (of equals, the first named). When a source runs out, a line is added to `notes`, and the others go
    on in their own proportions.
    """
    read = [0] * len(sources)
    streams = {number: _tokenised(source, tokenize, chat) for number, source in enumerate(sources)}
    tokens = [0] * len(sources)
    while streams:
        number = min(streams, key=lambda n: tokens[n] / sources[n].weight)
        try:
            document, ids = next(streams[number])
        except StopIteration:
            del streams[number]
            if not tokens[number]:
                raise _no_tokens(sources[number], read[number]) from None
            notes.append(f"source {sources[number].name} ran out after {tokens[number]:,} tokens")
            continue
        read[number] += 1
        tokens[number] += len(ids)
        if len(ids):
            yield number, document, ids


def _no_tokens(source: SourceConfig, read: int) -> UserError:
    if read:
        return UserError(
            f"the tokenizer makes no token of any of the {read:,} documents of source {source.name};"
            " check that the model's folder holds its tokenizer's files"
        )
    return UserError(f"source {source.name} ({source.path}) holds no text")


def _tokenised(source: SourceConfig, tokenize: Tokenize, chat: Chat | None) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents of a source and their token ids, of which there may be none."""
    encode = chat.tokenize if source.chat and chat else tokenize
    waiting: list[Document] = []

    def flush() -> Iterator[tuple[Document, np.ndarray]]:
        yield from zip(waiting, encode([document.text for document in waiting]), strict=True)
        waiting.clear()

    for document in documents(source, chat):
        waiting.append(document)
        if len(waiting) == _DOCUMENTS_AT_ONCE:
            yield from flush()
    if waiting:
        yield from flush()


class SplitText:
    """Writes one split's contexts, tokens and documents into `folder`, in bounded memory."""

    def __init__(self, folder: Path, config: ExtractConfig, bos: int | None) -> None:
        make_folder(folder)
        self.folder, self.bos, self.context_length = folder, bos, config.context_length
        self.source_names = [source.name for source in config.sources]
        self.rows = 0  # tokens without BOS
        self._bin = folder / ".tokens.bin"
        self._tokens = open(self._bin, "wb")  # noqa: SIM115 - closed by close()
        self._documents = open(folder / "documents.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._n_documents = self._n_tokens = 0
        self._contexts: list[np.ndarray] = []

    def add(self, source: int, document: Document, ids: np.ndarray) -> None:
        """Cuts a document's token ids into contexts. Writes these, and the document's line in documents.jsonl."""
        room = self.context_length - (self.bos is not None)
        starts = range(0, len(ids), room)
        table = np.zeros(len(starts), CONTEXT)
        table["document"], table["source"], table["offset"] = self._n_documents, source, starts
        for index, start in enumerate(starts):
            piece = ids[start : start + room]
            if self.bos is not None:
                piece = np.concatenate([[self.bos], piece])
            self._tokens.write(piece.astype("<i4").tobytes())
            table["start"][index], table["length"][index] = self._n_tokens, len(piece)
            self._n_tokens += len(piece)
        record = {
            "document": self._n_documents,
            "source": self.source_names[source],
            "tokens": len(ids),
            "sha256": hashlib.sha256(document.text.encode()).hexdigest(),
            "labels": document.labels,
        }
        self._documents.write(json.dumps(record) + "\n")
        self._n_documents += 1
        self._contexts.append(table)
        self.rows += len(ids)

    def close(self) -> None:
        """Closes the open files, finished or not."""
        self._tokens.close()
        self._documents.close()

    def finish(self) -> None:
        """Completes the three files and puts them on disk.

        tokens.npy is copied from a raw file, since its header needs a size that is only known now.
        """
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        write_npy(self.folder / "contexts.npy", np.concatenate([np.zeros(0, CONTEXT), *self._contexts]))
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, "<i4")) | {"shape": (self._n_tokens,)}

        def write(file: IO[bytes]) -> None:  # not through a mapping, which a full disk would end without a word
            np.lib.format.write_array_header_1_0(file, header)
            with open(self._bin, "rb") as raw:
                shutil.copyfileobj(raw, file)

        write_atomic(self.folder / "tokens.npy", write)
        self._bin.unlink()


def write_contexts(
    config: ExtractConfig, tokenize: Tokenize, bos: int | None, folder: Path, chat: Chat | None = None
) -> list[str]:
    """Writes the contexts of both splits into `folder`/train and /heldout. Returns lines for the user about the mix.

    `chat` is for sources of chat messages. Ends when every source has run out, or when the training split has
    `max_rows` tokens, BOS not counted.
    """
    tokens, notes = [0] * len(config.sources), list[str]()
    with contextlib.ExitStack() as files:
        writers = {}
        for split in SPLITS:
            writers[split] = files.enter_context(contextlib.closing(SplitText(folder / split, config, bos)))
        _fill(writers, config, mixed(config.sources, tokenize, notes, chat), tokens)
    if len(notes) == len(config.sources):
        notes = ["all the text of every source is used"]
    total, weights = sum(tokens), sum(source.weight for source in config.sources)
    shares = [
        f"{source.name} {count / total:.1%} ({source.weight / weights:.1%} asked)"
        for source, count in zip(config.sources, tokens, strict=True)
    ]
    return [*notes, f"{total:,} tokens: {', '.join(shares)}"]


def _fill(
    writers: dict[str, SplitText],
    config: ExtractConfig,
    stream: Iterator[tuple[int, Document, np.ndarray]],
    tokens: list[int],
) -> None:
    """Deals the documents out to the splits' `writers` and finishes these. Adds up each source's `tokens`."""
    train, documents_read = writers["train"], 0
    for number, document, ids in stream:
        documents_read += 1
        split, kept = "train", ids
        if is_heldout(document.text, config.seed, config.heldout_fraction):
            split = "heldout"
        elif config.max_rows is not None:
            kept = ids[: config.max_rows - train.rows]
        writers[split].add(number, document, kept)
        tokens[number] += len(kept)
        if train.rows == config.max_rows:
            break
    for split, writer in writers.items():
        writer.finish()
        if not writer.rows:
            raise _empty_split(split, config, documents_read, sum(tokens), train.rows == config.max_rows)


def _empty_split(split: str, config: ExtractConfig, documents_read: int, tokens: int, is_cut: bool) -> UserError:
    """The error for a split without a document, by its cause. `is_cut`: reading ended at `max_rows`."""
    said = f"no document fell into the {split} split: "
    fraction = f"change heldout_fraction={config.heldout_fraction}"
    count = "1 document" if documents_read == 1 else f"{documents_read:,} documents"
    if is_cut:
        return UserError(f"{said}max_rows={config.max_rows:,} was reached after {count}; raise it, or {fraction}")
    if documents_read == 1:
        return UserError(
            f"{said}the text is a single document of {tokens:,} tokens, and a document is never divided between the"
            " splits; divide it into several (in a .txt file, by blank lines)"
        )
    return UserError(f"{said}there are only {count} of {tokens:,} tokens in all; give more documents, or {fraction}")


@dataclass(frozen=True)
class Batches:
    """Contexts in batches: batch i holds the contexts `order[starts[i]:starts[i+1]]`, longest first."""

    order: np.ndarray
    starts: np.ndarray
    positions: int  # in all batches together, padding included

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.order[self.starts[index] : self.starts[index + 1]]


def plan_batches(lengths: np.ndarray, batch_tokens: int) -> Batches:
    """Puts contexts of similar length into batches of at most `batch_tokens` positions, padding included.

    The longest come first. A context that is longer than `batch_tokens` is a batch of its own. The plan depends on the
    lengths alone, so that a resumed run has the same batches.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    starts, positions = [0], 0
    while starts[-1] < len(order):
        longest = int(lengths[order[starts[-1]]])
        stop = min(len(order), starts[-1] + max(1, batch_tokens // longest))
        positions += longest * (stop - starts[-1])
        starts.append(stop)
    return Batches(order, np.asarray(starts), positions)
