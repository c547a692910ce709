"""A tiny random-weight model of Pythia's architecture, and small files in the hub datasets' schemas."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

D, LAYERS = 20, 5
TEXT = "the cell of a membrane was seen in small rooms under glass while rivers carried salt and iron to seas"
WORDS = TEXT.split(" ")


def save_model(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Saves a GPTNeoX of 5 layers, D=20, rotary on a quarter of each head as Pythia's, with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=401,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=44,
        max_position_embeddings=64,
        rotary_pct=0.25,
        use_parallel_residual=True,
        **(sizes or {}),
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def sentence(seed: int, words: int) -> str:
    """Some words, the same for the same seed."""
    return " ".join(WORDS[(seed * 7 + index * (seed % 5 + 1)) % len(WORDS)] for index in range(words)) + f" {seed}."


def wikitext_lines(articles: int) -> list[str]:
    """Rows of the hub's Salesforce/wikitext: a line each, articles set apart by their titles' lines."""
    lines: list[str] = []
    for article in range(articles):
        lines += ["", f" = Article {article} = \n", "", f" {sentence(article, 20 + article % 9)} \n", ""]
        lines += [" = = History = = \n", "", f" {sentence(article + 1000, 13)} \n", f" {sentence(article + 50, 7)} \n"]
    return lines


def save_wikitext(folder: Path, articles: int) -> Path:
    """A folder laid out as the hub's Salesforce/wikitext, with its one column."""
    lines = wikitext_lines(articles)
    half = len(lines) // 2  # an article may begin in one file and end in the next, as on the hub
    for index, part in enumerate((lines[:half], lines[half:])):
        name = f"wikitext-103-raw-v1/train-0000{index}-of-00002.parquet"
        save_parquet(folder / name, [{"text": line} for line in part])
    save_parquet(folder / "wikitext-103-raw-v1/test-00000-of-00001.parquet", [{"text": " = Unwanted = \n"}])
    return folder


def save_wmdp(folder: Path, questions: int) -> Path:
    """A folder laid out as the hub's cais/wmdp, with its three columns."""
    records = [
        {"answer": n % 4, "question": f"{sentence(n + 2000, 9)}?", "choices": [sentence(n + i, 3) for i in range(4)]}
        for n in range(questions)
    ]
    save_parquet(folder / "wmdp-bio/test-00000-of-00001.parquet", records)
    save_parquet(folder / "wmdp-cyber/test-00000-of-00001.parquet", [{**records[0], "question": "unwanted"}])
    return folder


def save_parquet(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def save_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
