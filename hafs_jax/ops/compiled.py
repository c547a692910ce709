"""JAX's persistent cache of compiled programs, whose entries are checked before JAX reads them.

JAX runs what an entry holds. It has no checksum, so a damaged one ends the process, at every start anew. Here each
entry has its SHA-256 beside it, in the file `<key>-sha256`. One that has another, or none, counts as missing: the
program is compiled and its entry replaced. This wraps the class behind JAX's own cache, which is not public. Where a
version of JAX has another one, there is no cache.
"""

import hashlib
from pathlib import Path
from typing import Any

from jax._src import compilation_cache as private
from jax._src.compilation_cache_interface import CacheInterface

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic


class CheckedCache(CacheInterface):
    """Entries of `base`, a cache of the files `<path>/<key>-cache`, that are what their checksums say."""

    def __init__(self, base: CacheInterface, path: str) -> None:
        self._base, self._path = base, base._path
        self._folder = Path(path)

    def get(self, key: str) -> bytes | None:
        """The entry; None where there is none, or one that is damaged."""
        value = self._base.get(key)
        if value is None:
            return None
        try:
            noted = self._checksum(key).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        return value if noted == hashlib.sha256(value).hexdigest() else None

    def put(self, key: str, value: bytes) -> None:
        """Keeps the entry, in place of one that is damaged. Where that cannot be done there is none."""
        try:
            (self._folder / f"{key}-cache").unlink(missing_ok=True)
            self._base.put(key, value)
            write_atomic(self._checksum(key), lambda file: file.write(hashlib.sha256(value).hexdigest().encode()))
        except (OSError, UserError):
            return

    def _checksum(self, key: str) -> Path:
        return self._folder / f"{key}-sha256"


def check_entries() -> bool:
    """Has JAX check the entries of its persistent cache from now on; False where this version of JAX has another."""
    real = getattr(private, "get_file_cache", None)
    if real is None:
        return False
    if getattr(real, "checks", False):
        return True

    def checked(path: str) -> Any:
        found = real(path)
        if found is None or "://" in path:  # of a bucket, whose store has checksums
            return found
        return CheckedCache(found[0], found[1]), found[1]

    checked.checks = True  # type: ignore[attr-defined]
    private.get_file_cache = checked
    return True


def is_checked() -> bool:
    """Whether the cache that JAX uses now, if any, is checked."""
    return private._cache is None or isinstance(private._cache, CheckedCache)
