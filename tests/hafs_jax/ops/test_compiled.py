"""The persistent cache of compiled programs: a damaged entry is compiled anew, and never run."""

import random
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hafs_jax.ops import compiled
from hafs_jax.ops.compiled import CheckedCache, check_entries


class Files:
    """A cache as JAX's is: it never replaces an entry."""

    def __init__(self, folder: Path) -> None:
        self._path = folder

    def get(self, key: str) -> bytes | None:
        path = self._path / f"{key}-cache"
        return path.read_bytes() if path.exists() else None

    def put(self, key: str, value: bytes) -> None:
        if not (self._path / f"{key}-cache").exists():
            (self._path / f"{key}-cache").write_bytes(value)


def test_only_whole_entries_are_given_out(tmp_path: Path) -> None:
    cache = CheckedCache(Files(tmp_path), str(tmp_path))  # type: ignore[arg-type]
    assert cache.get("k") is None
    cache.put("k", b"a program")
    assert cache.get("k") == b"a program"
    entry, rng = tmp_path / "k-cache", random.Random(0)
    for path in (entry, tmp_path / "k-sha256"):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-1], whole + b"x", bytes(len(whole)), _flipped(whole, rng)):
            path.write_bytes(damaged)
            assert cache.get("k") is None
        path.write_bytes(whole)
    (tmp_path / "k-sha256").unlink()
    assert cache.get("k") is None  # of an earlier version
    entry.write_bytes(b"damaged")
    cache.put("k", b"a program")
    assert cache.get("k") == b"a program"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """JAX's own cache, in a folder of its own."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    assert check_entries()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_flipped_bytes_in_real_entries_crash_nothing(cache: Path) -> None:
    rng = random.Random(0)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)

    def value() -> np.ndarray:
        jax.clear_caches()  # so that the programs come from the files
        return np.asarray(jax.jit(lambda x: jnp.tanh(x) @ x.T)(x))

    expected = value()
    entries = sorted(cache.glob("*-cache"))
    assert entries and isinstance(compiled.private._cache, CheckedCache)
    whole = {path: path.read_bytes() for path in entries}
    for _ in range(10):
        for path in entries:
            path.write_bytes(_flipped(whole[path], rng))
        np.testing.assert_array_equal(value(), expected)
        for path in entries:  # each was compiled anew and replaced
            assert compiled.private._cache.get(path.name.removesuffix("-cache")) is not None


def _flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
