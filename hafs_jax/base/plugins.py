"""Modules from outside the project that add to it: architectures, penalties, variants, datasets, profiles, evaluations.

Such a module registers what it adds when it is imported, with functions such as `hafs_jax.register_architecture`. Every
command imports it first where it is named, with commas between several, in the environment variable HAFS_PLUGINS, or
where an installed package declares it:

    [project.entry-points."hafs_jax.plugins"]
    mine = "my_package.my_module"

Commands that a command starts inherit the variable. Standard library only.
"""

import importlib
import os
import sys
from importlib import metadata

from hafs_jax.base.errors import UserError

VARIABLE = "HAFS_PLUGINS"
GROUP = "hafs_jax.plugins"

_loaded: set[str] = set()


def load() -> None:
    """Imports the modules that HAFS_PLUGINS and installed packages name, each once.

    The working directory is searched after all other places. Raises `UserError` where a module cannot be found; any
    other exception of a plugin passes.
    """
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    found = {name: f"the environment variable {VARIABLE}" for name in named if name}
    for point in metadata.entry_points(group=GROUP):
        package = "an installed package" if point.dist is None else f"the installed package {point.dist.name}"
        found.setdefault(point.module, package)
    if found and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a command's own script has only its folder there
    for module, source in found.items():
        if module not in _loaded:
            _import(module, source)
            _loaded.add(module)


def _import(module: str, source: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise UserError(
                f"the plugin {module!r}, which {source} names, needs the module {error.name!r}, which is not installed"
            ) from error
        raise UserError(
            f"{source} names the plugin {module!r}, of which there is no module {error.name!r}; correct the name, or "
            "put its folder on PYTHONPATH"
        ) from None
