"""What docs/extending.md shows works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_all_that_it_adds_is_known_to_the_commands(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "extending.md").read_text(), flags=re.M | re.S)
    assert len(blocks) >= 4
    (tmp_path / "my_additions.py").write_text("\n".join(blocks))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HAFS_PLUGINS": "my_additions", "PYTHONPATH": path, "COLUMNS": "300"}

    def help_of(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hafs_jax", *command, "--help"],
            env=environment, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = help_of("train", "--variant", "centred", "--arch", "swish")
    assert "swish" in train and "[centred]" in train
    assert "abstracts" in help_of("extract")
    evaluate = help_of("evaluate")
    assert "widest" in evaluate and "reviews: stars of a product review" in evaluate
