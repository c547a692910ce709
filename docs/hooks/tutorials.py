"""Tutorials: notebooks kept as text (jupytext's percent format), run, and shown with their outputs.

    python -m docs.hooks.tutorials              # run all and write their outputs

docs/tutorials/NAME.py is the notebook, docs/tutorials/outputs/NAME.json what each of its code cells printed. A test
runs each again and compares.
"""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parents[1] / "tutorials"
NAMES = ("train", "compare", "own_activations")

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")


def cells(name: str) -> list[Any]:
    """The notebook's cells."""
    return jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells


def run(name: str, folder: Path) -> list[str]:
    """What each code cell prints, when all are run in turn in `folder`."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with contextlib.chdir(folder):
        for cell in cells(name):
            if cell.cell_type == "code":
                buffer = io.StringIO()
                with contextlib.redirect_stdout(buffer):
                    exec(compile(cell.source, f"{name}.py", "exec"), scope)
                printed.append(buffer.getvalue())
    return printed


def outputs(name: str) -> list[str]:
    """What each code cell printed when the tutorial was written."""
    return json.loads((FOLDER / "outputs" / f"{name}.json").read_text())


def differences(found: list[str], expected: list[str], relative: float = 0.1, absolute: float = 0.03) -> list[str]:
    """Where what was printed differs: in a word, or in a number by more than both tolerances."""
    if len(found) != len(expected):
        return [f"{len(found)} cells, expected {len(expected)}: python -m docs.hooks.tutorials"]
    problems = []
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        numbers = [[float(number.replace(",", "")) for number in _NUMBER.findall(text)] for text in (one, other)]
        words = [" ".join(_NUMBER.sub("#", text).split()) for text in (one, other)]
        far = [
            (a, b) for a, b in zip(*numbers, strict=False) if abs(a - b) > max(absolute, relative * max(abs(a), abs(b)))
        ]
        if words[0] != words[1] or far:
            problems.append(f"cell {index}: {one!r}, expected {other!r} {far}")
    return problems


def page(name: str) -> str:
    """The tutorial as a page: its text, its code, and what the code printed."""
    lines, printed = [], iter(outputs(name))
    for cell in cells(name):
        if cell.cell_type == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        if text := next(printed).rstrip():
            lines += ['```text title="prints"', text, "```", ""]
    lines += [
        f"*This page is the notebook `docs/tutorials/{name}.py`: `jupytext --to ipynb` makes a Jupyter one of it.*"
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    (FOLDER / "outputs").mkdir(exist_ok=True)
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found = run(name, Path(folder))
        (FOLDER / "outputs" / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {sum(map(len, found))} characters")


if __name__ == "__main__":
    main()
