"""The rooms and the direction of imports, and proof that the check can fail."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "extract": {"jax", "flax", "optax", "orbax", "hafs_jax", "evaluate"},
    "hafs_jax": {"torch", "transformers", "transformer_lens", "sae_lens", "datasets", "evaluate"},
}
ALLOWED_ACROSS = {
    "hafs_jax": {"hafs_jax.store"},
    "evaluate": {"hafs_jax.store", "hafs_extract.models", "hafs_extract.packaged", "hafs_extract.hub", "hafs_jax"},
}


def imports(source: str, in_functions: bool = True) -> set[str]:
    """The absolute names of all modules that the source imports, wherever in it or only as it is itself imported."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if in_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(room: str, source: str, path: str) -> list[str]:
    """Imports that the rules forbid to a file of `room`."""
    problems = []
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        across = top in ("extract", "hafs_jax", "evaluate") and top != room
        known = any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED_ACROSS.get(room, set()))
        package = name in ("extract", "hafs_jax")  # the package itself, in `from extract import models`
        if top in FORBIDDEN.get(room, set()) or (across and not known and not package):
            problems.append(f"{path} imports {name}")
        if path.startswith("extract/format/") and top not in {*sys.stdlib_module_names, "numpy", "extract"}:
            problems.append(f"{path} imports {name}: the format needs only the standard library and numpy")
        if room == "evaluate" and top in ("jax", "hafs_jax") and path != "evaluate/bridge.py":
            problems.append(f"{path} imports {name}: only the bridge may")
    return problems


def test_every_file_keeps_to_its_room() -> None:
    files = [path for room in ("extract", "hafs_jax", "evaluate") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 25
    found = []
    for path in files:
        relative = path.relative_to(ROOT).as_posix()
        found += violations(relative.split("/")[0], path.read_text(), relative)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "path", "source"),
    [
        ("extract", "extract/run.py", "import jax"),
        ("extract", "extract/run.py", "def f():\n    from hafs_jax.method.sae import SAE"),
        ("hafs_jax", "hafs_jax/step.py", "import torch.nn as nn"),
        ("hafs_jax", "hafs_jax/step.py", "from hafs_extract.run import extract"),
        ("evaluate", "evaluate/core.py", "from hafs_jax import sae"),
        ("evaluate", "evaluate/core.py", "import hafs_extract.run"),
        ("extract", "extract/format/store.py", "import torch"),
    ],
)
def test_the_check_can_fail(room: str, path: str, source: str) -> None:
    assert violations(room, source, path)


def test_the_accelerators_suite_needs_no_other_library() -> None:
    """It is carried to machines that have JAX and little else: what the peers need, it imports once it found them."""
    known = {*sys.stdlib_module_names, "jax", "numpy", "tqdm", "extract", "hafs_jax", "benchmarks"}
    waiting, seen = {"__main__", "accelerator"}, set[str]()
    while waiting - seen:
        seen.add(module := (waiting - seen).pop())
        for name in imports((ROOT / "benchmarks" / f"{module}.py").read_text(), in_functions=False):
            assert name.split(".")[0] in known, f"benchmarks/{module}.py imports {name}"
            waiting |= {name.split(".")[1]} if name.startswith("benchmarks.") else set()
    assert {"harness", "workloads"} <= seen
    assert imports("import a\ndef f():\n    import b\nif x:\n    import c", in_functions=False) == {"a", "c"}


def test_the_accelerators_suite_compares_with_no_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in ("torch", "benchmarks.peer_steps"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    assert accelerator._installed(accelerator._config("topk", 128)) == []


def test_our_evaluate_and_extract_are_the_ones_that_run() -> None:
    import evaluate
    import extract

    assert Path(evaluate.__file__).parent == ROOT / "evaluate"
    assert Path(extract.__file__).parent == ROOT / "extract"
