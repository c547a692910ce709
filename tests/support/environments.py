"""Environments of the processes that tests start."""

import os
from pathlib import Path


def importing(*folders: Path, **more: str) -> dict[str, str]:
    """This process's environment, and in it folders that a new Python looks into before all others; and `more`."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
