"""Token ids as strings that a person can read. Knows tokenizers by their methods alone; imports no library."""

import unicodedata
from collections.abc import Iterable
from typing import Any

SHOWN_AS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
INVISIBLE = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Zl",
    "Zp",
}  # Unicode categories: controls, bidi marks, joiners, line ends


class TokenText:
    """`TokenText(tokenizer)(id)` is the text of a token, with its leading space, a newline as ↵ and a tab as ⇥.

    `tokenizer` is a transformers tokenizer. Bytes that are only a part of a UTF-8 character, which byte-level BPE may
    split, are shown as `\\xe2\\x80`. Characters that would be invisible or reorder the line are shown as `⟨U+202E⟩`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = any(piece.startswith("Ġ") for piece in tokenizer.get_vocab())
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = visible(self._text(token_id))
        return self._known[token_id]

    def each(self, token_ids: Iterable[int]) -> list[str]:
        """The text of each token."""
        known = self._known
        return [known[token_id] if token_id in known else self(token_id) for token_id in token_ids]

    def _text(self, token_id: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id past the vocabulary: models pad their embedding
            return f"⟨{token_id}⟩"
        if self._is_byte_level:
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece).decode("utf-8", errors="backslashreplace")
            return piece  # an added token, kept as written
        return piece.replace("▁", " ")


def visible(text: str) -> str:
    """`text` on one line, with every control, bidirectional and zero-width character spelt out."""
    return "".join(
        SHOWN_AS.get(c) or (f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in INVISIBLE else c) for c in text
    )


def _byte_alphabet() -> dict[str, int]:
    """The byte that each printable character of GPT-2's byte-level alphabet stands for."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
