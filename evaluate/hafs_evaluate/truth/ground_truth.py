"""What is true of a synthetic world: its features, their hierarchy, and which fire on each held-out row.

`hafs_extract.synthetic.samples` writes it; `load_truth` reads it.

Imports no torch.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.base.foreign import read_npz

TRUTH, TRUTH_ARRAYS, TRUTH_VERSION = "truth.json", "truth.npz", 1


@dataclass(frozen=True)
class Truth:
    """The n features of a world and its held-out rows; see `hafs_extract.synthetic.samples` for each array.

    A row is the sum of the features' directions, each times its coefficient, plus the bias.
    """

    directions_ND: Float[np.ndarray, "n D"]  # unit vectors
    bias_D: Float[np.ndarray, "D"]
    parents_N: Int[np.ndarray, "n"]  # the feature above; -1 for a root
    levels_N: Int[np.ndarray, "n"]  # 0 for a root
    coefficients: csr_array  # [rows, n], without explicit zeros
    heldout_fingerprint: str | None = None  # of the store that holds these rows; None: of any
    sha256: str = ""  # of truth.npz

    @property
    def n(self) -> int:
        """The number of features."""
        return len(self.directions_ND)

    @property
    def rows(self) -> int:
        """The number of held-out rows."""
        return self.coefficients.shape[0]

    @cached_property
    def edges(self) -> tuple[Int[np.ndarray, "E"], Int[np.ndarray, "E"]]:
        """(parents, children) of all edges of the hierarchy, ordered by child."""
        children_E = np.flatnonzero(self.parents_N >= 0)
        return self.parents_N[children_E], children_E

    def acts(self, start: int, stop: int) -> Float[np.ndarray, "B D"]:
        """The activations of the rows from `start` to `stop`, float32."""
        return (self.coefficients[start:stop] @ self.directions_ND + self.bias_D).astype(np.float32)


def load_truth(folder: Path) -> Truth:
    """The truth in OUT/<profile>; `UserError` where there is none or its arrays are not those that were written."""
    path, arrays_path = folder / TRUTH, folder / TRUTH_ARRAYS
    record = read_json(path, "a synthetic world's truth (hafs synth-world)")
    if record.get("format_version") != TRUTH_VERSION:
        found = record.get("format_version")
        raise UserError(f"{path}: expected format_version {TRUTH_VERSION}, found {found!r}; sample the world again")
    wanted, stores = record.get("arrays_sha256"), record.get("stores")
    if not isinstance(wanted, str) or not isinstance(stores, dict):
        raise UserError(f"{path}: expected arrays_sha256 and stores in a world's truth; sample the world again")
    digest = sha256_of(arrays_path) if arrays_path.exists() else "no file"
    if digest != wanted:
        raise UserError(f"{arrays_path}: expected sha256 {wanted[:12]}..., found {digest[:12]}; sample the world again")
    names = ("directions_ND", "bias_D", "parents_N", "levels_N")
    arrays = read_npz(arrays_path, "a synthetic world's truth", (*names, "values", "indices", "indptr"))
    shape = (len(arrays["indptr"]) - 1, len(arrays["parents_N"]))
    coefficients = csr_array((arrays["values"], arrays["indices"], arrays["indptr"]), shape=shape)
    known = {name: arrays[name] for name in names}
    return Truth(**known, coefficients=coefficients, heldout_fingerprint=stores.get("heldout"), sha256=digest)
