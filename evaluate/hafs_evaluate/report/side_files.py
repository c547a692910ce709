"""The latents that are not in the page: scripts in report/latents/, which the page loads when one of them is asked for.

A page that is opened from disk may load scripts, but may not read files. So each file is a call of `hafsLatents`, which
the page defines, with its own name and a value. Of each variant there is

- a list, of the numbers and the top tokens of all its latents that are not in the page;
- a part for each PART indices that hold any, with a table of strings and a record as `embedded` makes them.

The names hold a mark of the contents, so that a page never takes another report's files for its own.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hafs_evaluate.report.embedded import arms_by_run, record_of, table_of_strings
from hafs_evaluate.report.page import script_json
from hafs_jax.base.files import write_text

FOLDER = "latents"
PART = 256  # indices of a part: some 300 kB
MARK = 10  # hexadecimal digits
TOP_TOKENS = 4  # of a latent, in the list


def side_files(
    others: Mapping[str, dict[str, Any]], run_names: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(what the page must know of the files, {file name: its text}) of {arm: what latents_others.json holds}.

    The former is {arm: {"name": the common start of its files' names, "part": PART, "indices": those that they hold}}.
    """
    arm_of = arms_by_run(run_names)
    known: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name, values in others.items():
        latents = values["latents"]
        if not latents:
            continue
        bodies = {"list": _list(name, latents, arm_of)}
        parts: dict[int, list[dict[str, Any]]] = {}
        for latent in latents:
            parts.setdefault(latent["index"] // PART, []).append(latent)
        for number, own in parts.items():
            strings, numbers = table_of_strings(own)
            bodies[str(number)] = {"strings": strings, **record_of(name, own, numbers, arm_of)}
        written = {key: script_json(body) for key, body in bodies.items()}
        mark = hashlib.sha256("".join(written.values()).encode()).hexdigest()[:MARK]
        start = f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{mark}"
        for key, text in written.items():
            texts[f"{start}-{key}.js"] = f"hafsLatents({script_json(f'{start}-{key}')}, {text});\n"
        known[name] = {"name": start, "part": PART, "indices": _steps([latent["index"] for latent in latents])}
    return known, texts


def write_side_files(report: Path, texts: Mapping[str, str]) -> None:
    """Writes report/latents/, and removes what an earlier report left there."""
    folder = report / FOLDER
    if folder.exists():
        for path in folder.glob("*.js"):
            if path.name not in texts:
                path.unlink()
    for name, text in texts.items():
        write_text(folder / name, text)
    if folder.exists() and not any(folder.iterdir()):
        shutil.rmtree(folder)


def _list(name: str, latents: list[dict[str, Any]], arm_of: dict[str, str]) -> dict[str, Any]:
    bare = [{**latent, "contexts": [], "random_contexts": []} for latent in latents]
    strings, numbers = table_of_strings(bare)
    record = record_of(name, bare, numbers, arm_of)
    top = [[token for token, _ in tokens][:TOP_TOKENS] for tokens in record["top"]]
    used = sorted({token for tokens in top for token in tokens})
    place = {token: n for n, token in enumerate(used)}
    return {
        "strings": [strings[token] for token in used],
        "columns": record["columns"],
        "top": [[place[token] for token in tokens] for tokens in top],
    }


def _steps(indices: list[int]) -> list[int]:
    """The ascending indices as runs, [start, length, start, length, ...], which for most dictionaries are short."""
    runs: list[int] = []
    for index in indices:
        if runs and index == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [index, 1]
    return runs
