"""The commands `hafs extract`, `import`, `verify` and `synth-world`. Imports torch only to extract."""

import argparse
import contextlib
import dataclasses
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

from hafs_extract.config import TEXT_SYNTAX, ExtractConfig, parse_source
from hafs_extract.journal import is_complete, profile_names, store_folders
from hafs_extract.profiles import OFFLINE, PRESETS, Resolved, prepare_hub, resolve
from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.files import read_json, write_json
from hafs_jax.base.log import shown
from hafs_jax.base.options import Parser, add_flags, with_flags
from hafs_jax.store.manifest import TIMING, read_manifest
from hafs_jax.store.verify import verify

DESCRIPTION = """\
Run a language model over text and store its activations at one hook point, shuffled, as two stores:
OUT/<profile>/store/train and OUT/<profile>/store/heldout, which share no document. A run that was
interrupted goes on when the same command is given again. Of several hook points, divided by commas, the model runs
once and each has its own profile, <profile>/<hook point>, with the same rows in the same order.
`hafs import ACTS.npy` makes stores of any activations, without a model; `hafs verify STORE` checks a store.
"""

EPILOG = f"""\
profiles:
  auto       pythia70m where the hub answers or its cache serves, else offline; decided within 5 seconds
  pythia70m  EleutherAI/pythia-70m-deduped at blocks.3.hook_resid_post; WikiText-103 and WMDP-bio from the hub
  offline    SmolLM2-135M at blocks.8.hook_resid_post; Wikipedia extracts; both from package registries
A flag overrides its profile's value. Defaults in [] are those of the offline profile.

--text {TEXT_SYNTAX}
  may be repeated; the sources named are then all there are. PATH is a .jsonl, .parquet or .txt file, a folder of
  them, or a hub dataset. WEIGHT is its share of tokens relative to the others'. KEYs: subset, split, kind (rows,
  wikitext, multiple_choice), template ({{text}}), keep (COLUMN=VALUE or COLUMN!=VALUE). A NAME of the profile's
  (wikitext, wmdp-bio; wikipedia, biology) keeps that source's other fields, so it can be read from a local copy.
  A .txt file's documents are divided by blank lines.
    --text books.jsonl --text code=/data/code@0.2,template={{source}}
    --text wmdp=cais/wmdp@0.1,subset=wmdp-cyber,split=test,kind=multiple_choice
"""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EFBIG}
"""What a write fails with that the user can mend."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    with one_line_errors(), shown():
        return {"extract": _extract, "import": _import, "verify": _verify, "synth-world": _synth_world}[arguments[0]](
            arguments[1:]
        )


def _synth_world(arguments: list[str]) -> int:
    from hafs_extract.synthetic.samples import main  # torch and sae_lens, when they are needed

    return main(arguments)


def _verify(arguments: list[str]) -> int:
    parser = Parser(
        prog="hafs verify",
        description="Check everything of an activation store: files, shapes, checksums, rows against contexts.",
        epilog="Exits 0 with a line of facts, or 1 naming what is wrong.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="a store's folder, such as OUT/offline/store/train")
    folder = parser.parse_args(arguments).store
    problems = verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    manifest = read_manifest(folder)
    print(
        f"{folder}: {manifest.rows:,} rows of {manifest.d_model} {manifest.dtype} in {len(manifest.shards)} shards,"
        f" {manifest.split} split, {manifest.model.name} at {manifest.hook_point}, fingerprint {manifest.fingerprint}"
    )
    return 0


def _import(arguments: list[str]) -> int:
    from hafs_extract.importing import import_arrays, parse

    options = parse(arguments)
    with _disk_errors(options.out):
        import_arrays(options)
    _note_profile(options.out, Resolved(options.profile, options.profile, "imported from arrays"))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="hafs extract",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--profile", default="auto", help="auto, pythia70m or offline [auto]", dest="requested")
    parser.add_argument("--text", action="append", default=[], metavar="SOURCE", help="a source of text, see below")
    parser.add_argument("--force", action="store_true", help="replace a store of another config, or extract anew")
    add_flags(parser, OFFLINE, skip=("profile", "sources"))
    return parser


def _note_profile(out: Path, resolved: Resolved) -> None:
    """Notes in `out`/auto.json which profile `--profile auto` of the later stages stands for: the last extracted."""
    write_json(out / "auto.json", {"profile": resolved.resolved, "reason": resolved.reason})


def _extract(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    resolved = resolve(options.requested)
    config = _config(resolved, options)
    print(f"profile {resolved.resolved} ({resolved.reason})", file=sys.stderr, flush=True)
    if not options.force and is_complete(config, options.out):
        print("the stores are there already, from this very config", file=sys.stderr)
    else:
        prepare_hub(config)
        from hafs_extract.run import extract  # torch, and the hub libraries

        with _disk_errors(options.out):
            extract(config, resolved, options.out, options.force)
    first, *_ = profile_names(config).values()
    _note_profile(options.out, dataclasses.replace(resolved, resolved=first))
    for folders in store_folders(config, options.out).values():
        _report(folders)
    _report_timing(folders)
    return 0


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turns what a disk refuses into a `UserError`; any other OSError is our bug and passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or out
        raise UserError(f"{where}: {error.strerror}; mend it and give the same command, or another --out") from None


def _config(resolved: Resolved, options: argparse.Namespace) -> ExtractConfig:
    preset = PRESETS[resolved.resolved]
    config = with_flags(preset, options)
    if options.text:
        sources = tuple(parse_source(text, preset.sources) for text in options.text)
        config = dataclasses.replace(config, sources=sources)
    return config


def _report(folders: dict[str, Path]) -> None:
    for split, folder in folders.items():
        manifest = read_manifest(folder)
        norms = manifest.norm_filter
        total = manifest.rows + norms.dropped_rows
        dropped = "no norm filter"
        if norms.multiple is not None:
            dropped = f"{norms.dropped_rows:,} ({norms.dropped_rows / total:.2%}) over {norms.multiple:g} x the median"
            dropped += f" norm {norms.median_norm:.4g} dropped"
        print(f"{split}: {manifest.rows:,} rows of {manifest.d_model} {manifest.dtype}; {dropped}; {folder}")


def _report_timing(folders: dict[str, Path]) -> None:
    timing = read_json(folders["train"] / TIMING, "a store's timing")
    print(
        f"{timing['tokens']:,} tokens in {timing['seconds_by_stage']['model']:.0f} s"
        f" ({timing['tokens_per_second']:,.0f} tokens/s, {timing['padding_share']:.1%} padding),"
        f" {timing['seconds']:.0f} s in all"
    )
