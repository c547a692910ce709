"""The command `hafs import`: stores of activations that are in npy or safetensors files already. No torch here."""

import argparse
import logging
from pathlib import Path

from tqdm import tqdm

from hafs_extract.profiles import PROFILES
from hafs_jax.base.errors import UserError
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.log import bar_options
from hafs_jax.store.arrays import ArrayConfig, ArrayImport
from hafs_jax.store.manifest import read_manifest

LOG = logging.getLogger(__name__)

DESCRIPTION = """\
Make stores of activations of anything: vision, audio, protein embeddings. They
are OUT/NAME/store/train and OUT/NAME/store/heldout; later commands take
--profile NAME. The files are read in blocks, so that they may be larger than
memory, and their rows are stored in shuffled order.
"""

EPILOG = """\
ACTS is a .npy file, or a .safetensors file that holds one array. The array is
[rows, D] in float16, float32 or float64. If it has more dimensions, all but the
last are flattened to rows. Several files are read one after another.

--groups is for rows that belong together, such as the patches of an image or
the residues of a protein: a group is either in train or in heldout.

Rows whose norm is far above the median are not stored (--norm-multiple): few of
them would own the variance. Of targets, too: both lose the row.

--target is for transcoders: OUT/NAME/target/train and OUT/NAME/target/heldout
get the targets, in the order of the rows of the store.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options. Raises `UserError` where the profile's name cannot be used."""
    parser = Parser(
        prog="hafs import",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("acts", nargs="+", metavar="ACTS", help="activations, .npy or .safetensors")
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--profile", required=True, metavar="NAME", help="name of the folder in OUT")
    parser.add_argument("--target", nargs="+", metavar="T", help="targets, as many rows as activations")
    parser.add_argument("--groups", metavar="G", help="one integer for each row: the group it belongs to")
    parser.add_argument("--force", action="store_true", help="replace other stores, or import these again")
    add_flags(parser, ArrayConfig())
    options = parser.parse_args(arguments)
    name = Path(options.profile)
    if options.profile in ("auto", *PROFILES) or name.is_absolute() or ".." in name.parts or not name.parts:
        raise UserError(
            f"--profile {options.profile}: expected a name of your own for these activations' folder in OUT"
        )
    return options


def import_arrays(options: argparse.Namespace) -> None:
    """Makes the stores, unless they are there already, and prints what they hold."""
    config = with_flags(ArrayConfig(), options)
    job = ArrayImport(options.out / options.profile, config, options.acts, options.target, options.groups)
    bars = _Bars()
    try:
        made = job.make(options.force, bars.advance)
    finally:
        bars.close()
    if not made:
        LOG.info("the stores are there already, made of these very activations")
    for name, folder in job.folders.items():
        manifest = read_manifest(folder)
        documents = sum(source.documents for source in manifest.sources)
        what = f" in {documents:,} groups" if options.groups else ""
        dropped = manifest.norm_filter.summary(manifest.rows)
        print(f"{name}: {manifest.rows:,} rows of {manifest.d_model} {manifest.dtype}{what}; {dropped}; {folder}")


class _Bars:
    """Progress bars, one for each thing that is done, one after another."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: tqdm | None = None

    def advance(self, what: str, rows: int, total: int) -> None:
        """Moves the bar of `what` on by `rows` of `total`."""
        if what != self._what or self._bar is None:
            self.close()
            self._bar = tqdm(total=total, desc=what, unit="row", unit_scale=True, **bar_options(LOG))
            self._what = what
        self._bar.update(rows)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
