"""Token ids as readable strings."""

from types import SimpleNamespace

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hafs_evaluate.latents.token_text import TokenText, visible


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte alphabet as the whole vocabulary, one token a byte, and a few merged ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ċ", "Ċ")]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "Ġa", "ĊĊ", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def test_token_text_is_readable_for_byte_level_bpe():
    tokenizer = byte_level_tokenizer()
    text = TokenText(tokenizer)
    ids = tokenizer(" a\n\n\t<|end|>")["input_ids"]
    assert [text(index) for index in ids] == [" a", "↵↵", "⇥", "<|end|>"]
    assert [text(index) for index in tokenizer("é")["input_ids"]] == ["\\xc3", "\\xa9"]
    assert text(len(tokenizer) + 5).startswith("⟨")


def test_token_text_keeps_a_sentencepiece_tokens_space():
    pieces = ["▁the", "ory", "▁"]
    fake = SimpleNamespace(
        get_vocab=lambda: {piece: n for n, piece in enumerate(pieces)}, convert_ids_to_tokens=pieces.__getitem__
    )
    assert [TokenText(fake)(n) for n in range(3)] == [" the", "ory", " "]


def test_characters_that_would_reorder_or_hide_text_are_spelt_out():
    assert visible("a\u202eb\u200bc\r\u2028\x00") == "a⟨U+202E⟩b⟨U+200B⟩c␍⟨U+2028⟩⟨U+0000⟩"
    assert visible("naïve Ωμέγα 漢字 <b>&") == "naïve Ωμέγα 漢字 <b>&"
