"""Who may import whom, between the rooms and inside them, and proof that the check can fail."""

import importlib.util
import sys

import pytest

from benchmarks import accelerator
from tests.support.sources import PACKAGES, ROOT, imports, modules

FOREIGN = {
    "hafs_extract": {"jax", "flax", "optax", "orbax"},
    "hafs_jax": {"torch", "transformers", "transformer_lens", "sae_lens", "datasets"},
    "hafs_evaluate": {"jax", "flax", "optax", "orbax"},
}
"""Libraries that a room never imports."""
ACROSS = {
    "hafs_extract": {"hafs_jax.base", "hafs_jax.store"},
    "hafs_jax": set[str](),
    "hafs_evaluate": {
        "hafs_jax.base", "hafs_jax.store", "hafs_jax.config", "hafs_jax.presets", "hafs_jax.runs", "hafs_jax.health",
        "hafs_jax.saelens", "hafs_jax.api", "hafs_extract.models", "hafs_extract.hub", "hafs_extract.packaged",
    },
}  # fmt: skip
"""What of the other rooms a room may import."""
INSIDE_FUNCTIONS = {"hafs_jax.saelens", "hafs_jax.api"}
"""What hafs_evaluate may import only inside functions: they bring JAX."""
LAZILY = {"hafs_jax.base.hub": {"huggingface_hub"}}
"""What a module of the ground may import besides, inside functions."""
LAYERS = (
    {"base"},
    {"store"},
    {"config", "presets", "runs", "health", "saelens_files", "sources"},
    {"ops"},
    {"method"},
    {"fast"},
    {"saelens_format"},
    {"training"},
    {"saelens", "api", "registry", "targets"},
    {"commands", "cli", "__main__", "__init__"},
)
"""hafs_jax from the ground up: a module imports its own layer and those below."""
NO_JAX = {
    "base", "store", "config", "presets", "runs", "health", "saelens_files", "sources", "cli", "__main__", "__init__",
}  # fmt: skip
WINGS = (
    "core", "latents", "saebench", "hierarchy", "tokens", "truth", "exchange", "results", "experiment", "report",
    "explore",
)  # fmt: skip
MOST_MODULES = 11


def violations(module: str, source: str) -> list[str]:
    """What the rules forbid to `module`, such as "hafs_jax.method.sae", of its source."""
    package, *inner = module.split(".")
    at_import = imports(source, in_functions=False)
    problems = []
    for name in sorted(imports(source)):
        top, *rest = name.split(".")
        if top in FOREIGN[package]:
            problems.append(f"{module} imports {name}")
        elif top in PACKAGES and top != package:
            if not any(name == known or name.startswith(known + ".") for known in ACROSS[package]):
                if not any(known.startswith(name + ".") for known in ACROSS[package]):
                    problems.append(f"{module} imports {name}")
            elif name in at_import and any(name == lazy or name.startswith(lazy + ".") for lazy in INSIDE_FUNCTIONS):
                problems.append(f"{module} imports {name} outside a function")
        elif top == package == "hafs_jax" and inner and rest:
            problems += _upward(module, inner[0], name, rest[0])
        elif top == package == "hafs_evaluate" and inner and rest:
            problems += _between_wings(module, inner, name, rest[0])
        if package == "hafs_jax" and inner:
            known = {*sys.stdlib_module_names, "numpy", "hafs_jax"} | LAZILY.get(module, set()) - at_import
            if inner[0] in ("base", "store") and top not in known:
                problems.append(f"{module} imports {name}: the ground needs only the standard library and numpy")
            if inner[0] in NO_JAX and top in ("jax", "flax", "optax", "orbax"):
                problems.append(f"{module} imports {name}: {inner[0]} needs no JAX")
            if inner[0] == "method" and top in ("os", "pathlib", "platform"):
                problems.append(f"{module} imports {name}: the method asks for no machine and no file")
    if package == "hafs_jax" and inner[:1] == ["method"]:
        for word in ("default_backend", "local_devices", "device_count", "sched_getaffinity", "cpu_count", "open("):
            if word in source:
                problems.append(f"{module} says {word}: the method asks for no machine and no file")
    return problems


def _upward(module: str, own: str, name: str, other: str) -> list[str]:
    heights = {part: height for height, layer in enumerate(LAYERS) for part in layer}
    if other not in heights or heights.get(own, len(LAYERS)) >= heights[other]:
        return []
    return [f"{module} imports {name}, which is above it"]


def _between_wings(module: str, inner: list[str], name: str, other: str) -> list[str]:
    own = inner[0] if inner[0] in WINGS else None
    if own is None or own == other:
        return []
    if other in ("stages", "cli"):
        return [f"{module} imports {name}: wings never import the stages"]
    if own == "results" and other in ("experiment", "report"):
        return [f"{module} imports {name}, which is above it"]
    return []


def test_every_module_keeps_to_its_room_and_its_layer() -> None:
    every = modules()
    assert len(every) > 100
    found = [problem for module, source in every.items() for problem in violations(module, source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hafs_extract.run", "import jax"),
        ("hafs_extract.run", "def f():\n    from hafs_jax.method.sae import SAE"),
        ("hafs_extract.run", "import hafs_evaluate"),
        ("hafs_jax.training.step", "import torch.nn as nn"),
        ("hafs_jax.training.step", "from hafs_extract.run import extract"),
        ("hafs_jax.training.loop", "from hafs_jax.saelens import export_saelens"),
        ("hafs_jax.saelens_format", "from hafs_jax.training.checkpoint import load_checkpoint"),
        ("hafs_jax.method.sae", "from hafs_jax.fast.entries import find"),
        ("hafs_jax.method.sae", "from hafs_jax.training import step"),
        ("hafs_jax.method.sae", "import os"),
        ("hafs_jax.method.sae", "cpu = jax.default_backend() == 'cpu'"),
        ("hafs_jax.ops.products", "from hafs_jax.method.sae import SAE"),
        ("hafs_jax.runs", "import jax"),
        ("hafs_jax.runs", "from hafs_jax.training.train import train"),
        ("hafs_jax.base.files", "import tqdm"),
        ("hafs_jax.base.hub", "import huggingface_hub"),
        ("hafs_jax.base.files", "def f():\n    import huggingface_hub"),
        ("hafs_jax.store.manifest", "import torch"),
        ("hafs_evaluate.core.splice", "def f():\n    import jax"),
        ("hafs_evaluate.core.splice", "from hafs_jax.saelens import read_saelens"),
        ("hafs_evaluate.core.splice", "def f():\n    from hafs_jax.saelens_format import read_saelens"),
        ("hafs_evaluate.core.splice", "from hafs_jax.method import sae"),
        ("hafs_evaluate.core.splice", "import hafs_extract.run"),
        ("hafs_evaluate.core.splice", "from hafs_evaluate.stages import Evaluation"),
        ("hafs_evaluate.results.arms", "from hafs_evaluate.report import tables"),
    ],
)
def test_the_check_can_fail(module: str, source: str) -> None:
    assert violations(module, source)


def test_the_check_lets_pass_what_is_allowed() -> None:
    assert not violations("hafs_evaluate.core.splice", "def f():\n    from hafs_jax.saelens import read_saelens")
    assert not violations("hafs_evaluate.core.splice", "from hafs_extract import packaged")
    assert not violations("hafs_jax.training.step", "from hafs_jax.method.sae import SAE\nimport jax")


def test_no_folder_holds_more_modules_than_a_listing_can_tell() -> None:
    for folder in PACKAGES.values():
        for place in (ROOT / folder, *(path for path in (ROOT / folder).rglob("*") if path.is_dir())):
            found = [path.stem for path in place.glob("*.py") if not path.stem.startswith("__")]
            most = 13 if place == ROOT / PACKAGES["hafs_extract"] else MOST_MODULES
            assert len(found) <= most, f"{place} holds {len(found)} modules: {', '.join(sorted(found))}"


def test_the_report_needs_no_torch_and_no_jax() -> None:
    """Nor does anything that it imports, however indirectly, as it is itself imported."""
    every = modules()
    waiting = {module for module in every if module.startswith(("hafs_evaluate.report.", "hafs_evaluate.results."))}
    seen = set[str]()
    while waiting - seen:
        seen.add(module := (waiting - seen).pop())
        for name in imports(every[module], in_functions=False):
            assert name.split(".")[0] not in ("torch", "jax", "sae_lens"), f"{module} imports {name}"
            waiting |= {known for known in (name, f"{name}.__init__") if known in every}
    assert "hafs_jax.base.files" in seen


def test_the_accelerators_suite_needs_no_other_library() -> None:
    """It is carried to machines that have JAX and little else: what the peers need, it imports once it found them."""
    known = {*sys.stdlib_module_names, "jax", "numpy", "tqdm", "hafs_jax", "benchmarks"}
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


def circles(packages: dict[str, str]) -> list[list[str]]:
    """Modules that import each other in a loop, in functions too. A package's own __init__ only hands names on."""
    arrows = {module: imports(source) & set(packages) - {module} for module, source in packages.items()}
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for name in sorted(arrows[module]):
                walk(name, [*path, module])
            done.add(module)

    for module in sorted(arrows):
        walk(module, [])
    return found


def test_no_modules_import_each_other_in_a_loop() -> None:
    assert circles(modules()) == []
    looped = {"a.x": "import a.y", "a.y": "def f():\n    from a import z", "a.z": "from a.x import g"}
    assert circles(looped) == [["a.x", "a.y", "a.z"]]
    assert circles({**looped, "a.z": "import a.w"}) == []
