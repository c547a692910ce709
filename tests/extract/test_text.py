"""Sources to documents to contexts: the hub's schemas from disk, the mix, the split, the windows, the batches."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hafs_extract import packaged
from hafs_extract.config import ExtractConfig, SourceConfig, difference, parse_source
from hafs_extract.contexts import is_heldout, mixed, plan_batches, write_contexts
from hafs_extract.profiles import OFFLINE, PROFILES, PYTHIA70M
from hafs_extract.text.documents import documents
from hafs_extract.text.files import local_files
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import from_dict, to_dict
from hafs_jax.store.reader import Contexts
from tests.support.tiny_models import save_jsonl, save_parquet, save_wikitext, save_wmdp, sentence

WIKITEXT, WMDP = PYTHIA70M.sources


def _bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


def _source(path: Path, **fields) -> SourceConfig:
    return SourceConfig(**{"name": "s", "path": str(path), **fields})


def _texts(source: SourceConfig) -> list[str]:
    return [document.text for document in documents(source)]


def test_wikitexts_lines_become_articles(tmp_path: Path) -> None:
    source = parse_source(f"wikitext={save_wikitext(tmp_path / 'w', 9)}", PYTHIA70M.sources)
    assert (source.kind, source.subset, source.weight) == ("wikitext", "wikitext-103-raw-v1", WIKITEXT.weight)
    found = list(documents(source))
    assert [document.labels["title"] for document in found] == [f"Article {n}" for n in range(9)]
    for number, document in enumerate(found):
        assert document.text.startswith(f" = Article {number} = \n")
        assert " = = History = = \n" in document.text and sentence(number + 50, 7) in document.text
        assert document.text.count(" = Article") == 1


def test_only_a_title_of_one_equals_sign_begins_an_article(tmp_path: Path) -> None:
    lines = [
        " a preface \n",
        " = One = \n",
        " text \n",
        " = = Part = = \n",
        " = = = Sub = = = \n",
        " = = odd = \n",
        " x = 1 \n",
        " = E = mc = \n",
    ]
    source = _source(save_parquet(tmp_path / "w.parquet", [{"text": line} for line in lines]), kind="wikitext")
    assert [document.labels for document in documents(source)] == [{}, {"title": "One"}, {"title": "E = mc"}]


def test_wmdps_questions_become_text_without_their_answers(tmp_path: Path) -> None:
    source = parse_source(f"wmdp-bio={save_wmdp(tmp_path / 'w', 3)}@0.5", PYTHIA70M.sources)
    assert (source.split, source.subset, source.weight) == ("test", "wmdp-bio", 0.5)
    found = list(documents(source))
    choices = "\n".join(f"{letter}. {sentence(1 + n, 3)}" for n, letter in enumerate("ABCD"))
    assert found[1].text == f"{sentence(2001, 9)}?\n{choices}"
    assert [document.labels for document in found] == [{"answer": 0}, {"answer": 1}, {"answer": 2}]


def test_local_files_of_each_kind(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two\n\nlines"}, {"text": "  "}]
    expected = ["one", "two\n\nlines"]
    assert _texts(_source(save_jsonl(tmp_path / "a.jsonl", records))) == expected
    assert _texts(_source(save_parquet(tmp_path / "a.parquet", records))) == expected
    (tmp_path / "a.txt").write_text("one\nmore\n\n \ntwo<|endoftext|>three\n<|endoftext|>\nfour\nmore")
    assert _texts(_source(tmp_path / "a.txt")) == ["one\nmore", "two", "three", "four\nmore"]


def test_a_folders_files_are_chosen_by_subset_and_split(tmp_path: Path) -> None:
    for name in ("b/train-1.jsonl", "b/train-0.jsonl", "b/test-0.jsonl", "c/other.jsonl", "c/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_jsonl(tmp_path / name, [{"text": name}])
    assert _texts(_source(tmp_path, subset="b")) == ["b/train-0.jsonl", "b/train-1.jsonl"]
    assert _texts(_source(tmp_path, subset="b", split="test")) == ["b/test-0.jsonl"]
    assert _texts(_source(tmp_path, subset="c", split="train")) == ["c/other.jsonl"]
    assert [path.name for path in local_files(_source(tmp_path, split="t"))] == [
        "test-0.jsonl",
        "train-0.jsonl",
        "train-1.jsonl",
    ]


def test_templates_and_filters(tmp_path: Path) -> None:
    path = save_jsonl(
        tmp_path / "a.jsonl", [{"title": "T", "body": "x", "topic": "A=B"}, {"title": "U", "body": "y", "topic": "C"}]
    )
    source = _source(path, template="{title}: {body}", keep="topic=A=B")
    assert [(document.text, document.labels) for document in documents(source)] == [
        ("T: x", {"title": "T", "topic": "A=B"})
    ]
    assert _texts(_source(path, template="{body}", keep="topic!=A=B")) == ["y"]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.jsonl", '{"body": 1}\n', {}, r"expects a column 'text', found body; name the column with --text"),
        ("a.jsonl", '{"body": 1}\n', {"kind": "multiple_choice"}, r"expects a column 'question', found body"),
        ("a.jsonl", '{"body": 1}\n', {"keep": "topic=x"}, r"expects a column 'topic', found body"),
        ("a.jsonl", '{"text": 1}\n', {"template": "{text"}, r"template '\{text' cannot be filled in"),
        ("a.jsonl", '{"text": "x"}\n{"te', {}, r"a.jsonl, line 2: expected one JSON object a line"),
        ("a.jsonl", "[1]\n", {}, r"a.jsonl, line 1: expected a JSON object, found a list"),
        ("a.parquet", "no", {}, r"expected a parquet file at .*a.parquet, found a file that cannot be read whole"),
        ("a.csv", "no", {}, r"a.csv is no .jsonl, .json, .txt \(each also with .gz or .zst\) or .parquet file"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: str, fields: dict, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        _texts(_source(tmp_path / name, **fields))


def test_bad_text_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a.txt: expected UTF-8 text"):
        _texts(_source(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .jsonl, .json, .txt .* file in .*empty"):
        _texts(_source(tmp_path / "empty"))


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    assert _texts(_source(tmp_path / "a.jsonl")) == ["a ? b"]


def test_text_flags() -> None:
    assert parse_source("/a/books.jsonl", ()) == SourceConfig(name="books", path="/a/books.jsonl")
    source = parse_source("code=me/code@0.25,subset=py,split=test,template={a}, {b}\\n{c},keep=a=b", ())
    assert source == SourceConfig(
        name="code", path="me/code", subset="py", split="test", template="{a}, {b}\n{c}", keep="a=b", weight=0.25
    )
    assert parse_source("x=me@here/data", ()).path == "me@here/data"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("a.txt,sbset=x", r"--text a.txt,sbset=x: unknown key 'sbset'; did you mean 'subset'\?"),
        ("a.txt,kind=row", r"kind='row': expected one of rows, wikitext, multiple_choice; did you mean 'rows'\?"),
        ("a.txt@0", r"source a: weight=0.0: expected above 0"),
        ("a.txt@1e", r"weight '1e' is not a number"),
        ("a.txt,keep=topic", r"keep='topic': expected COLUMN=VALUE or COLUMN!=VALUE"),
        ("", r"expected \[NAME=\]PATH"),
    ],
)
def test_wrong_text_flags_are_named(flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source(flag, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 1}, r"context_length=1: expected 2 to 65,535"),
        ({"context_length": 70_000}, r"context_length=70000: expected 2 to 65,535"),
        ({"heldout_fraction": 0.0}, r"heldout_fraction=0.0: expected above 0 and below 1"),
        ({"norm_multiple": 0.0}, r"norm_multiple=0.0: expected above 0, or none"),
        ({"dtype": "float8"}, r"dtype='float8': expected one of float16, bfloat16, float32"),
        ({"hook_point": ""}, r"the extraction's config lacks hook_point"),
        ({"seed": -1}, r"seed=-1: expected 0 to"),
        ({"sources": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, r"sources a, a: two have one name"),
        ({"sources": [{"name": "a"}]}, r"source 'a': expected a name and a path"),
    ],
)
def test_wrong_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(ExtractConfig, {**to_dict(OFFLINE), **changes}, "here")


def test_presets_survive_json_and_differences_are_found() -> None:
    for preset in (profile.config for profile in PROFILES.values()):
        values = json.loads(json.dumps(to_dict(preset)))
        assert from_dict(ExtractConfig, values, "here") == preset and difference(values, to_dict(preset)) is None
        values["sources"][1]["weight"] = 9.5
        assert difference(values, to_dict(preset)) == f"sources[1].weight=9.5, not {preset.sources[1].weight}"
    assert difference({"a": 1}, {"a": 1, "b": None, "c": 2}) == "c=None, not 2"


def test_the_split_is_by_seed_and_text_alone() -> None:
    texts = [sentence(n, 5) for n in range(2000)]
    held = [is_heldout(text, 0, 0.1) for text in texts]
    # a binomial(2000, .1) lies within 5 standard deviations of its mean all but once in two million
    assert abs(sum(held) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert held == [is_heldout(text, 0, 0.1) for text in texts] != [is_heldout(text, 1, 0.1) for text in texts]
    assert all(is_heldout(text, 0, 0.2) for text, was in zip(texts, held, strict=True) if was)


def test_sources_are_mixed_by_weight_and_run_out(tmp_path: Path) -> None:
    sources = tuple(
        _source(save_jsonl(tmp_path / f"{name}.jsonl", [{"text": "x" * 10}] * count), name=name, weight=weight)
        for name, count, weight in (("a", 90, 6.0), ("b", 100, 3.0), ("c", 5, 1.0))
    )
    notes: list[str] = []
    order = [number for number, _, _ in mixed(sources, _bytes, notes)]
    assert [order[:40].count(number) for number in range(3)] == [24, 12, 4]
    # c ends first; the others go on at their own 6 to 3
    middle = order[60:120]
    assert middle.count(0) == 40 and middle.count(1) == 20
    assert len(order) == 195 and order[-40:] == [1] * 40
    assert notes == [f"source {name} ran out after {n:,} tokens" for name, n in (("c", 50), ("a", 900), ("b", 1000))]
    assert order == [number for number, _, _ in mixed(sources, _bytes, [])]


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(UserError, match=r"source s \(.*a.jsonl\) holds no text"):
        list(mixed((_source(path),), _bytes, []))


Written = Callable[..., dict[str, Contexts]]


def _write(tmp_path: Path, bos: int | None = 0, count: int = 60, **changes) -> dict[str, Contexts]:
    path = save_jsonl(tmp_path / "a.jsonl", [{"text": sentence(n, 3 + n % 11)} for n in range(count)])
    sources = [{"name": "a", "path": str(path)}]
    values = {**to_dict(OFFLINE), "sources": sources, "context_length": 17, "heldout_fraction": 0.25, **changes}
    folder = tmp_path / "out"
    write_contexts(from_dict(ExtractConfig, values, "here"), _bytes, bos, folder)
    return {
        split: Contexts(np.load(folder / split / "contexts.npy"), np.load(folder / split / "tokens.npy"))
        for split in ("train", "heldout")
    }


@pytest.mark.parametrize("bos", [0, None])
def test_contexts_are_windows_of_one_document_and_lose_no_token(tmp_path: Path, bos: int | None) -> None:
    made = _write(tmp_path, bos)
    texts = {}
    for split, contexts in made.items():
        documents_here = (tmp_path / "out" / split / "documents.jsonl").read_text().splitlines()
        pieces: dict[int, bytes] = {}
        for index in range(len(contexts)):
            entry, tokens = contexts.table[index], contexts[index]
            assert 2 <= len(tokens) <= 17 or bos is None
            if bos is not None:
                assert tokens[0] == bos
                tokens = tokens[1:]
            before = pieces.get(entry["document"], b"")
            assert entry["offset"] == len(before)
            pieces[entry["document"]] = before + bytes(tokens.astype(np.uint8))
        assert sorted(pieces) == list(range(len(documents_here)))
        assert [json.loads(line)["tokens"] for line in documents_here] == [len(pieces[n]) for n in sorted(pieces)]
        texts[split] = {piece.decode() for piece in pieces.values()}
    assert texts["train"] | texts["heldout"] == {sentence(n, 3 + n % 11) for n in range(60)}
    assert not texts["train"] & texts["heldout"] and texts["heldout"]


def test_max_rows_is_exact_for_the_training_split(tmp_path: Path) -> None:
    full = _write(tmp_path)["train"]
    made = _write(tmp_path, max_rows=123)["train"]
    assert len(made.tokens) - len(made) == 123 < len(full.tokens) - len(full)
    np.testing.assert_array_equal(made.tokens[:100], full.tokens[:100])


def test_a_split_without_documents_is_an_error(tmp_path: Path) -> None:
    single = r"split: the text is a single document of \d+ tokens, .* divide it into several \(in a .txt file, by blank"
    with pytest.raises(UserError, match=r"no document fell into the heldout " + single):
        _write(tmp_path, count=1, heldout_fraction=1e-9)
    with pytest.raises(UserError, match=r"no document fell into the train " + single):
        _write(tmp_path, count=1, heldout_fraction=1 - 1e-9)
    with pytest.raises(UserError, match=r"heldout split: max_rows=5 was reached after 1 document; raise it, or change"):
        _write(tmp_path, max_rows=5, heldout_fraction=1e-9)
    with pytest.raises(UserError, match=r"split: there are only 9 documents of \d+ tokens in all; give more documents"):
        _write(tmp_path, count=9, heldout_fraction=1e-9)


def test_a_tokenizer_that_makes_no_token_is_named(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(
        UserError, match=r"makes no token of any of the 3 documents of source s; check that the model's"
    ):
        list(mixed((_source(path),), lambda texts: [np.zeros(0, np.int32) for _ in texts], []))


def test_batches_hold_every_context_once_within_their_size_and_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 5000).astype(np.int32)
    batches = plan_batches(lengths, 1000)
    assert sorted(np.concatenate([batches[i] for i in range(len(batches))])) == list(range(5000))
    assert all(lengths[batches[i]].max() * len(batches[i]) <= 1000 for i in range(len(batches)))
    assert batches.positions == sum(lengths[batches[i]].max() * len(batches[i]) for i in range(len(batches)))
    assert 1 - lengths.sum() / batches.positions < 0.02
    assert [len(plan_batches(np.array([7, 7, 7]), 3)[i]) for i in range(3)] == [1, 1, 1]


def test_packaged_text_is_read_from_its_checked_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "hafs-jax" / "wheels" / "tiny_text-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    records = {"A": {"extract": "about A", "topic": "x", "title": "A"}, "B": {"extract": "about B", "topic": "y"}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.json", json.dumps(records))
    wheel = packaged.Wheel("tiny-text", "1.0", packaged.sha256_of(path), "CC0")
    monkeypatch.setitem(packaged.TEXTS, "packaged/tiny", packaged.PackagedText(wheel, "data.json"))
    assert _texts(SourceConfig(name="t", path="packaged/tiny", template="{extract}", keep="topic=x")) == ["about A"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        UserError, match=rf"expected sha256 {wheel.sha256}, found .*; delete the file to fetch it again"
    ):
        packaged.fetch(wheel)


def test_a_registry_that_cannot_be_reached_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    wheel = packaged.Wheel("hafs-jax-no-such-wheel", "1.0", "0" * 64, "none")
    with pytest.raises(
        UserError, match=r"pip could not download hafs-jax-no-such-wheel==1.0 .*put the wheel at"
    ) as error:
        packaged.fetch(wheel)
    assert "\n" not in str(error.value) and list((tmp_path / "hafs-jax" / "wheels").iterdir()) == []
