"""The sources of the three packages, and what each imports, for tests that read them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"hafs_extract": "extract/hafs_extract", "hafs_jax": "hafs_jax", "hafs_evaluate": "evaluate/hafs_evaluate"}


def imports(source: str, in_functions: bool = True) -> set[str]:
    """The absolute names of all modules that the source imports, wherever in it or only as it is itself imported."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if in_functions or not isinstance(node, ast.FunctionDef):
            nodes += _children(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _children(node: ast.AST) -> list[ast.AST]:
    """A node's children; of `if TYPE_CHECKING:` none, as what is imported there never runs."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return list(node.orelse)
    return list(ast.iter_child_nodes(node))


def modules() -> dict[str, str]:
    """The source of every module of the three packages, by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts)] = path.read_text()
    return found
