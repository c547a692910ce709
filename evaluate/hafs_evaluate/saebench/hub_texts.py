"""SAE-Bench's datasets on the hub, each in one commit: only the files that are read are fetched. No torch, no jax.

`HubTexts.load` stands for `datasets.load_dataset` in SAE-Bench, which would fetch every split of the newest commit.
Small datasets are fetched and checked whole, their splits train and test; the two large ones are streamed, and only
their first rows are read.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hafs_extract.hub.files import Fetch, plan_split, repository
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json
from hafs_jax.base.hub import hub_errors

GITHUB_CODE = "codeparrot/github-code"
GITHUB_CODE_FILES = "hf://datasets/codeparrot/github-code@{commit}/data/train-*.parquet"
STREAMED = (GITHUB_CODE, "Helsinki-NLP/europarl")
SPLITS = ("train", "test")
LANGUAGES = {
    "C": (".c", ".h"),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
    "Python": (".py",),
}
"""The endings of file names that tell a file's language, for the five languages that SAE-Bench asks for."""


def hub_name(dataset: str) -> str:
    """The hub's name of what SAE-Bench calls `dataset`: it has two or three of some."""
    return dataset.split("_class_set")[0].removesuffix("_sentiment")


class HubTexts:
    """The datasets in the commits that the file `note` names; what is not in there is noted at its first use."""

    def __init__(self, note: Path) -> None:
        self._note = note

    def commits(self, datasets: Sequence[str]) -> dict[str, str]:
        """The commits of those of `datasets` that were read."""
        noted = self._noted()
        return {name: noted[name] for name in dict.fromkeys(map(hub_name, datasets)) if name in noted}

    def plans(self, datasets: Sequence[str]) -> list[Fetch]:
        """What is to be fetched whole for `datasets`; `UserError` where the hub refuses one of them."""
        plans = []
        for name in dict.fromkeys(map(hub_name, datasets)):
            with _named(name):
                if name in STREAMED:
                    repository("dataset", name, self._noted().get(name))
                else:
                    plans += [self._plan(name, split) for split in SPLITS]
        for plan in plans:
            with _named(plan.name):
                plan.check_access()
        return plans

    def load(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """As `datasets.load_dataset`, of the pinned commit. GitHub's code comes from its parquet files, with the
        language that its script would have added."""
        with _named(name):
            if kwargs.get("streaming"):
                return _streamed(name, self._rows(name, *args, **kwargs))
            return {split: self._frame(self._plan(name, split).run(), split) for split in SPLITS}

    def _rows(self, name: str, *args: Any, **kwargs: Any) -> Any:
        import datasets

        commit = self._pinned(name) or repository("dataset", name)[0]
        self._pin(name, commit)
        with hub_errors("dataset", name):
            if name != GITHUB_CODE:
                return datasets.load_dataset(name, *args, revision=commit, **kwargs)
            files = GITHUB_CODE_FILES.format(commit=commit)
            return _with_language(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))

    def _frame(self, fetch: Fetch, split: str) -> Any:
        """The rows of a split as pandas has them."""
        import pandas

        self._pin(fetch.name, fetch.commit)
        with hub_errors("dataset", fetch.name):
            if fetch.files and all(path.suffix == ".parquet" for path in fetch.paths):
                return pandas.concat([pandas.read_parquet(path) for path in fetch.paths], ignore_index=True)
            import datasets

            return datasets.load_dataset(fetch.name, split=split, revision=fetch.commit)

    def _plan(self, name: str, split: str) -> Fetch:
        return plan_split(name, None, split, self._pinned(name))

    def _noted(self) -> dict[str, str]:
        return read_json(self._note, "a note of datasets' commits") if self._note.exists() else {}

    def _pinned(self, name: str) -> str | None:
        return self._noted().get(name)

    def _pin(self, name: str, commit: str | None) -> None:
        noted = self._noted()
        if commit is not None and name not in noted:
            write_json(self._note, noted | {name: commit})


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds to what the hub refuses what else can be done."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; or take --suite sae_probes, whose tasks need no hub") from error


def _streamed(name: str, rows: Any) -> Iterator[Mapping[str, Any]]:
    """The rows, whose reading asks the hub."""
    with _named(name), hub_errors("dataset", name):
        yield from rows


def _with_language(rows: Any) -> Iterator[Mapping[str, str]]:
    of_ending = {ending: language for language, endings in LANGUAGES.items() for ending in endings}
    for row in rows:
        language = of_ending.get("." + row["path"].rsplit(".", 1)[-1])
        if language:
            yield {"language": language, "code": row["content"]}
