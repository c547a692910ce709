"""The texts of sae-probes' tasks that no probe of ours is trained or tested on, as text to train on. No torch here.

A task of sae-probes is a table of labelled texts. Sparse probing and the label trees use those of `PROBED`. The other
tasks hold millions of tokens, but they have texts in common with these, whole or in part, and with each other (the news
of AG News are in seven tasks). What probes see must not be trained on, and what stands there several times is trained
on once.
"""

import hashlib
import logging
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, count

import numpy as np

LOG = logging.getLogger(__name__)

PROBED = (
    "21_headline_istrump",
    "22_headline_isobama",
    "23_headline_ischina",
    "24_headline_isiran",
    "59_wikidata_occupation_isjournalist",
    "60_wikidata_occupation_isathlete",
    "61_wikidata_occupation_isactor",
    "62_wikidata_occupation_ispolitician",
    "63_wikidata_occupation_issinger",
    "64_wikidata_occupation_isresearcher",
    "92_glue_sst2",
    "95_toxic_is",
    "96_spam_is",
    "105_click_bait",
    "113_movie_sent",
    "123_world_country_United_Kingdom",
    "139_news_class_Politics",
    "141_news_class_Entertainment",
    "149_twt_emotion_happiness",
    "150_twt_emotion_sadness",
    "157_amazon_5star",
    "158_code_C",
    "159_code_Python",
    "160_code_HTML",
    "161_agnews_0",
    "162_agnews_1",
    "163_agnews_2",
)
"""The tasks of the probing suite sae_probes and of the bundled label trees. A test compares them with `evaluate`."""

RUN_WORDS = 13
"""Texts that share this many words in a row count as overlapping, as in GPT-3's appendix C (2005.14165)."""

_WORD = re.compile(r"\w+")


def unprobed_records(archive: zipfile.ZipFile, folder: str) -> list[dict[str, str]]:
    """The records {"text", "topic"} of the tasks in `folder` that are not `PROBED`; the topic is the task's name.

    Left out are

    - texts of fewer than RUN_WORDS words (names and headlines, mostly), since their overlap cannot be told;
    - texts that have RUN_WORDS words in a row in common with a text of a task in `PROBED`;
    - texts of which more than half of all such runs stand in an earlier text.

    The order is that of the texts' SHA-256, so that the first texts are a fair sample of all.
    """
    tasks = _tasks(archive, folder)
    probed = list(dict.fromkeys(text for task in PROBED for text in tasks.get(task, ())))
    topic = {text: task for task, texts in tasks.items() if task not in PROBED for text in texts}
    others = sorted(topic, key=lambda text: hashlib.sha256(text.encode()).digest())
    LOG.info(f"comparing {len(others):,} texts of sae-probes with {len(probed):,} that probes use, for their overlap")
    return [{"text": text, "topic": topic[text]} for text in without_overlap(others, probed)]


def without_overlap(texts: Sequence[str], probed: Sequence[str]) -> list[str]:
    """Those of `texts` that share no run of RUN_WORDS words with one of `probed`, and at most half of their runs with
    `texts` before them. A word is a run of letters, digits and _, in any case. Texts shorter than a run are left out.
    """
    runs_N, owner_N = _runs(chain(probed, texts))
    is_probed_N = owner_N < len(probed)
    shares_N = np.isin(runs_N, runs_N[is_probed_N])
    shared_T = np.bincount(owner_N, shares_N, minlength=len(probed) + len(texts))
    left_N = shared_T[owner_N] == 0
    runs_N, owner_N = runs_N[left_N], owner_N[left_N]
    is_first_N = np.zeros(len(runs_N), bool)
    is_first_N[np.unique(runs_N, return_index=True)[1]] = True
    total_T = np.bincount(owner_N, minlength=len(shared_T))
    is_kept_T = (total_T > 0) & (2 * np.bincount(owner_N, is_first_N, minlength=len(shared_T)) >= total_T)
    return [text for text, kept in zip(texts, is_kept_T[len(probed) :], strict=True) if kept]


def _runs(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """([N] uint64, [N] int64): a hash of every run of RUN_WORDS words within one text, and the number of its text."""
    number = defaultdict[str, int](count(1).__next__)
    found = [np.fromiter(map(number.__getitem__, _WORD.findall(text.lower())), np.uint64) for text in texts]
    owner_W = np.repeat(np.arange(len(found)), [len(words) for words in found])
    if len(owner_W) < RUN_WORDS:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    # the random bits of each word, times powers of an odd number: sums modulo 2^64
    bits_V = np.random.default_rng(0).integers(0, 2**64, len(number) + 1, np.uint64)
    hashed_W = bits_V[np.concatenate(found)]
    starts = len(owner_W) - RUN_WORDS + 1
    runs_S = np.zeros(starts, np.uint64)
    for place in range(RUN_WORDS):
        runs_S = runs_S * np.uint64(0x9E3779B97F4A7C15) + hashed_W[place : place + starts]
    is_within_S = owner_W[:starts] == owner_W[RUN_WORDS - 1 :]
    return runs_S[is_within_S], owner_W[:starts][is_within_S]


def _tasks(archive: zipfile.ZipFile, folder: str) -> dict[str, list[str]]:
    """{task: its texts}, of every task in `folder`."""
    import pyarrow
    from pyarrow import csv

    tasks = {}
    for member in sorted(name for name in archive.namelist() if name.startswith(f"{folder}/")):
        with pyarrow.input_stream(pyarrow.BufferReader(archive.read(member)), compression="zstd") as file:
            table = csv.read_csv(
                file,
                csv.ReadOptions(block_size=1 << 26),  # a text must fit into a block
                csv.ParseOptions(newlines_in_values=True),
                csv.ConvertOptions(include_columns=["prompt"], column_types={"prompt": pyarrow.string()}),
            )
        tasks[member.removeprefix(f"{folder}/").removesuffix(".csv.zst")] = table.column("prompt").to_pylist()
    return tasks
