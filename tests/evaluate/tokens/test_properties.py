"""Which properties a token's id decides, for the three ways in which tokenizers mark words."""

from pathlib import Path

import numpy as np
import pytest

from hafs_evaluate.tokens.properties import (
    LEXICONS,
    children_of,
    lexicon_files,
    read_lexicon,
    token_properties,
    vocabulary,
)
from hafs_jax.base.errors import UserError


class Pieces:
    """A tokenizer of these pieces, whose ids are their places."""

    def __init__(self, pieces: list[str], special: tuple[int, ...] = ()) -> None:
        self.pieces, self.all_special_ids = pieces, list(special)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}


def properties_of(texts: list[str], folders: tuple[Path, ...] = ()) -> list[set[str]]:
    """The properties of each text, by a byte-level tokenizer."""
    pieces = [text.replace(" ", "Ġ").replace("\n", "Ċ") for text in texts]
    masks = token_properties(vocabulary(Pieces([*pieces, "Ġfiller"])), folders)
    return [{name for name, mask in masks.items() if mask[index]} for index in range(len(texts))]


def test_the_three_marks_of_words_give_the_same_texts() -> None:
    byte_level = vocabulary(Pieces(["<s>", "Ġthe", "ing", ".", "Ċ", "Ã©", "Ã", "##"], special=(0,)), size=10)
    assert byte_level.texts == (None, " the", "ing", ".", "\n", "é", None, "##", None, None)
    assert np.flatnonzero(byte_level.is_fragment_V).tolist() == [6]
    sentencepiece = vocabulary(Pieces(["<s>", "▁the", "ing", ".", "<0x0A>", "é", "<0xC3>", "Ġ", "▁a"], special=(0,)))
    assert sentencepiece.texts == (None, " the", "ing", ".", "\n", "é", None, "Ġ", " a")
    assert np.flatnonzero(sentencepiece.is_fragment_V).tolist() == [6]
    wordpiece = vocabulary(Pieces(["[CLS]", "the", "##ing", ".", "##s", "é", "7", "##"], special=(0,)))
    assert wordpiece.texts == (None, " the", "ing", ".", "s", " é", " 7", "##")
    assert not wordpiece.is_fragment_V.any()
    assert vocabulary(Pieces(["the", "ing"])).texts == ("the", "ing")


def test_a_real_tokenizers_vocabulary_is_read(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.support.tiny_models import save_model

    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
    found = vocabulary(tokenizer, 410)
    assert len(found) == 410 and found.texts[tokenizer.eos_token_id] is None
    for word in ("the", " cell", "s", "7"):
        (index,) = tokenizer(word)["input_ids"]
        assert found.texts[index] == word
    assert found.is_fragment_V.sum() == 128  # the bytes above ASCII
    masks = token_properties(found)
    assert all(mask.shape == (410,) and mask.dtype == bool for mask in masks.values())
    assert masks["fragment"].sum() == 128 and not any(
        mask[found.is_fragment_V].any() for name, mask in masks.items() if name != "fragment"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", {"leading_space", "lower_case", "first_letter_t", "determiners", "articles"}),
        ("the", {"continuation", "lower_case", "first_letter_t"}),  # as in "leather"
        ("The", {"capitalised", "first_letter_t", "determiners", "articles"}),
        (" THE", {"leading_space", "all_caps", "first_letter_t", "determiners", "articles"}),
        (" may", {"leading_space", "lower_case", "first_letter_m", "suffix_y", "modals"}),
        (" May", {"leading_space", "capitalised", "first_letter_m", "suffix_y", "modals", "months"}),
        ("ing", {"continuation", "lower_case", "first_letter_i", "suffix_ing"}),
        (" ing", {"leading_space", "lower_case", "first_letter_i"}),
        (" king", {"leading_space", "lower_case", "first_letter_k", "titles", "government"}),  # one letter before -ing
        (" moving", {"leading_space", "lower_case", "first_letter_m", "suffix_ing"}),
        (" glass", {"leading_space", "lower_case", "first_letter_g", "materials"}),
        (" x", {"leading_space", "lower_case", "single_letter", "first_letter_x"}),
        ("7", {"digits", "digits_1"}),
        (" 42", {"leading_space", "digits", "digits_2"}),
        ("1984", {"digits", "digits_3_or_more"}),
        (").", {"punctuation", "closing_bracket", "sentence_end"}),
        (" (", {"leading_space", "punctuation", "opening_bracket"}),
        (' "', {"leading_space", "punctuation", "quotation_mark"}),
        ("$", {"punctuation", "symbol"}),
        ("\n\n", {"white_space", "line_break"}),
        (" ", {"white_space"}),
        ("a1", set()),
    ],
)  # fmt: skip
def test_what_an_id_decides(text: str, expected: set[str]) -> None:
    assert properties_of([text]) == [expected]


def test_other_alphabets_and_accents() -> None:
    masks = token_properties(vocabulary(Pieces(["▁été", "▁мир", "字", "▁summer", "▁x"])))
    assert np.flatnonzero(masks["accented"]).tolist() == [0]
    assert np.flatnonzero(masks["other_script"]).tolist() == [1, 2]
    assert masks["capitalised"].sum() == 0


def test_forms_of_a_word_are_one_child_and_ids_without_text_are_their_own() -> None:
    pieces = ["Ġthe", "the", "The", "ĠTHE", "Ġof", "Ã", "Ä", "<s>"]
    children = children_of(vocabulary(Pieces(pieces, special=(7,))))
    assert len(set(children[:4])) == 1 and len(set(children)) == 5


def test_the_bundled_lexicons_say_what_they_are_and_repeat_nothing() -> None:
    files = lexicon_files()
    assert len(files) >= 30 and {path.parent for path in files.values()} == {LEXICONS}
    for path in files.values():
        assert path.read_text().startswith("# "), path
        words = read_lexicon(path)
        assert len(words) == len(set(words)) >= 3, path
        assert all(word == word.strip() and " " not in word for word in words), path


def test_a_folder_of_own_lexicons_is_added(tmp_path: Path) -> None:
    (tmp_path / "gems.txt").write_text("# precious stones\nruby  # red\n\nOpal\n", encoding="utf-8-sig")
    found = properties_of([" ruby", " Ruby", " opal", " Opal", "ruby"], (tmp_path,))
    assert [("gems" in names) for names in found] == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("months.txt", b"a", "there is a property 'months' already; rename the file"),
        ("digits.txt", b"a", "there is a property 'digits' already; rename the file"),
        ("my.words.txt", b"a", "expected a name of letters, digits, - and _; rename the file"),
        ("gems.txt", b"# nothing\n", "expected one word a line, found none"),
        ("gems.txt", b"\xff\xfe", "expected a lexicon (UTF-8, one word a line)"),
        ("gems.csv", b"a", "expected a folder of lexicons (*.txt, one word a line)"),
    ],
)
def test_a_lexicon_that_does_not_do_is_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        properties_of([" a"], (tmp_path,))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
