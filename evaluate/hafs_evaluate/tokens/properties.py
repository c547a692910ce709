"""Properties that a token's id decides, as masks over a tokenizer's ids. Standard library and numpy only.

Three kinds: the form of a token's text (case, digits, punctuation, ...), its letters (the first one, suffixes), and
lists of words (`lexicons/*.txt`). Letters, suffixes and lists are of English.

A lexicon is a text file with one word a line; `#` starts a comment. A word in lower case is matched in any case, one
with a capital only as it is written.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from hafs_evaluate.latents.token_text import BYTE_OF
from hafs_jax.base.errors import UserError
from hafs_jax.base.foreign import reading

LEXICONS = Path(__file__).parent / "lexicons"

SUFFIXES = (
    "ing", "ed", "ly", "tion", "s", "er", "est", "ness", "ment", "al", "ous", "able", "ity", "ive", "ist", "ism", "ic",
    "ian", "ful", "less", "ence", "ance", "ship", "y",
)  # fmt: skip
"""English suffixes; a word has one where at least two more letters stand before it."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte that no piece holds
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Vocabulary:
    """The texts of a tokenizer's V ids. A leading space says that a token starts a word, however its tokenizer does."""

    texts: tuple[str | None, ...]  # None: a special token, an id without a token, or a fragment
    is_fragment_V: Bool[np.ndarray, "V"]  # bytes that are no text on their own: a part of a UTF-8 character

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def words(self) -> list[str]:
        """For each id, its text without spaces and without case; "" where it has no text of its own.

        Ids that differ only in case or in a leading space are forms of one word.
        """
        return [(text or "").strip().casefold() for text in self.texts]


def vocabulary(tokenizer: Any, size: int = 0) -> Vocabulary:
    """The texts of a transformers tokenizer's ids, at least `size` of them: models pad their vocabulary.

    Byte-level BPE ("Ġthe"), SentencePiece ("▁the", "<0x0A>") and WordPiece ("the", "##ing") are told apart by which of
    the marks most pieces begin with; without any, a piece is its text.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    kinds: dict[str, Callable[[str], str | None]] = {"Ġ": _byte_level, "▁": _sentencepiece, "##": _wordpiece}
    counts = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in kinds}
    mark = max(counts, key=lambda mark: counts[mark])
    text_of = kinds[mark] if counts[mark] else str
    length = max(size, max(pieces.values(), default=-1) + 1)
    texts: list[str | None] = [None] * length
    is_fragment_V = np.zeros(length, bool)
    for piece, index in pieces.items():
        if index not in special:
            texts[index] = text_of(piece)
            is_fragment_V[index] = texts[index] is None
    return Vocabulary(tuple(texts), is_fragment_V)


def token_properties(vocabulary: Vocabulary, folders: Sequence[Path | str] = ()) -> dict[str, Bool[np.ndarray, "V"]]:
    """{property: which ids have it}. Every lexicon is one, those in `folders` too, by their files' names.

    An id without text has none of them, but `fragment` where its bytes are no text. Names are unique, so a lexicon of
    one's own may not be called as one that is there. `UserError` where a lexicon can't be read.
    """
    lexicons, tests = _Lexicons(folders), {**_forms(), **_letters()}
    masks = {name: np.zeros(len(vocabulary), bool) for name in (*tests, *lexicons.names)}
    for index, text in enumerate(vocabulary.texts):
        if text:
            for name in (*(name for name, test in tests.items() if test(text)), *lexicons.of(text)):
                masks[name][index] = True
    return {**masks, "fragment": vocabulary.is_fragment_V}


def read_lexicon(path: Path) -> list[str]:
    """The words of a lexicon; `UserError` where it is no UTF-8 text or holds no word."""
    with reading(path, "a lexicon (UTF-8, one word a line)", ValueError, fault="is not UTF-8"):
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    words = [line for line in lines if line]
    if not words:
        raise UserError(f"{path}: expected one word a line, found none; add some or take the file away")
    return words


def lexicon_files(folders: Sequence[Path | str] = ()) -> dict[str, Path]:
    """{name: file} of the lexicons that are bundled and of all `.txt` files in `folders`.

    `UserError` where a folder has none, or a name is taken or has other characters than letters, digits, - and _.
    """
    found = {path.stem: path for path in sorted(LEXICONS.glob("*.txt"))}
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise UserError(f"expected a folder of lexicons (*.txt, one word a line) at {folder}, found no such file")
        for path in files:
            if not _NAME.fullmatch(path.stem):
                raise UserError(f"{path}: expected a name of letters, digits, - and _; rename the file")
            if path.stem in {*found, *_forms(), *_letters(), "fragment"}:
                raise UserError(f"{path}: there is a property {path.stem!r} already; rename the file")
            found[path.stem] = path
    return found


class _Lexicons:
    """The lexicons that a token's word is in."""

    def __init__(self, folders: Sequence[Path | str]) -> None:
        self.names = lexicon_files(folders)
        self._any_case: dict[str, set[str]] = {}  # {word: lexicons}
        self._as_written: dict[str, set[str]] = {}
        for name, path in self.names.items():
            for word in read_lexicon(path):
                known = self._any_case if word == word.lower() else self._as_written
                known.setdefault(word, set()).add(name)

    def of(self, text: str) -> set[str]:
        """A token is a whole word, as far as its id tells, where it starts one or has a capital as its first."""
        word = text.strip()
        if text[0] != " " and not text[0].isupper():
            return set()
        return self._any_case.get(word.lower(), set()) | self._as_written.get(word, set())


def _forms() -> dict[str, Callable[[str], bool]]:
    """Properties of the form of a token's text."""
    return {
        "leading_space": lambda text: text[0] == " " and text.strip() != "",
        "continuation": lambda text: text.isalpha() and text.islower(),
        "lower_case": lambda text: text.strip().isalpha() and text.islower(),
        "capitalised": lambda text: len(text.strip()) > 1 and text.strip().isalpha() and _is_capitalised(text.strip()),
        "all_caps": lambda text: len(text.strip()) > 1 and text.strip().isalpha() and text.isupper(),
        "single_letter": lambda text: len(text.strip()) == 1 and text.strip().isalpha(),
        "accented": lambda text: any(_is_accented(character) for character in text),
        "other_script": lambda text: any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in text),
        "digits": lambda text: _is_number(text),
        "digits_1": lambda text: _is_number(text) and len(text.strip()) == 1,
        "digits_2": lambda text: _is_number(text) and len(text.strip()) == 2,
        "digits_3_or_more": lambda text: _is_number(text) and len(text.strip()) >= 3,
        "white_space": lambda text: text.strip() == "",
        "line_break": lambda text: "\n" in text or "\r" in text,
        "punctuation": lambda text: text.strip() != "" and all(_is_mark(c) for c in text.strip()),
        "sentence_end": _is_marks_with(".!?…"),
        "comma_or_colon": _is_marks_with(",;:"),
        "opening_bracket": _is_marks_with("([{<"),
        "closing_bracket": _is_marks_with(")]}>"),
        "quotation_mark": _is_marks_with("\"'“”‘’«»`"),
        "dash": _is_marks_with("-–—‐‑−"),
        "symbol": lambda text: text.strip() != "" and all(unicodedata.category(c)[0] == "S" for c in text.strip()),
    }


def _letters() -> dict[str, Callable[[str], bool]]:
    """The first letter, in either case, and the suffix of a token of letters."""
    tests: dict[str, Callable[[str], bool]] = {}
    for letter in string.ascii_lowercase:
        tests[f"first_letter_{letter}"] = _begins_with(letter)
    for suffix in SUFFIXES:
        tests[f"suffix_{suffix}"] = _ends_with(suffix)
    return tests


def _begins_with(letter: str) -> Callable[[str], bool]:
    return lambda text: text.strip().isalpha() and text.strip()[0].lower() == letter


def _ends_with(suffix: str) -> Callable[[str], bool]:
    """Two letters or more before the suffix, or the suffix alone inside of a word; -s is not -ss, -us and -is."""

    def test(text: str) -> bool:
        word = text.strip().lower()
        if not word.isalpha() or not word.endswith(suffix) or (suffix == "s" and word[-2:] in ("ss", "us", "is")):
            return False
        return len(word) >= len(suffix) + 2 or (word == suffix and text[0] != " ")

    return test


def _is_marks_with(wanted: str) -> Callable[[str], bool]:
    """Punctuation and symbols alone, one of `wanted` among them."""
    return lambda text: all(_is_mark(c) for c in text.strip()) and any(c in wanted for c in text)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _is_number(text: str) -> bool:
    return text.strip().isdecimal()


def _is_capitalised(word: str) -> bool:
    return word[0].isupper() and word[1:].islower()


def _is_accented(character: str) -> bool:
    return character.isalpha() and not character.isascii() and unicodedata.name(character, "").startswith("LATIN")


def _byte_level(piece: str) -> str | None:
    if not all(character in BYTE_OF for character in piece):
        return piece  # an added token, kept as written
    try:
        return bytes(BYTE_OF[character] for character in piece).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _sentencepiece(piece: str) -> str | None:
    byte = _BYTE.fullmatch(piece)
    if byte is None:
        return piece.replace("▁", " ")
    return chr(int(byte[1], 16)) if int(byte[1], 16) < 0x80 else None


def _wordpiece(piece: str) -> str:
    """ "##ing" goes on with a word, other letters and digits start one; marks have no spaces in WordPiece."""
    if piece.startswith("##") and len(piece) > 2:
        return piece[2:]
    return f" {piece}" if piece[:1].isalnum() else piece


def children_of(vocabulary: Vocabulary) -> np.ndarray:
    """[V] the child of each id: a number of its own for each of `Vocabulary.words`, and for each id without text."""
    numbers: dict[Any, int] = {}
    keys: list[Any] = [word or index for index, word in enumerate(vocabulary.words)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
