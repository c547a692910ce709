"""A synthetic world small enough for tests; the fixture `tiny` holds it on disk."""

from pathlib import Path

from hafs_extract.synthetic.samples import SyntheticConfig

TINY = SyntheticConfig("tiny", samples=3_000, heldout_samples=700, shard_rows=512)
D, N_FEATURES = 16, 28


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
