"""The commands `hafs extract`, `import`, `verify` and `synth-world`. Imports torch only to extract."""

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path

from hafs_extract.config import TEXT_SYNTAX, ExtractConfig, parse_source
from hafs_extract.hub.presence import prepare_hub
from hafs_extract.journal import WORK, is_complete, profile_names, store_folders, work_root
from hafs_extract.parts.engine import Engine
from hafs_extract.profiles import DATASETS, OFFLINE, PROFILES, PYTHIA70M, Resolved, resolve
from hafs_jax.base.errors import disk_errors, one_line_errors
from hafs_jax.base.files import read_json, write_json
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.log import shown
from hafs_jax.store.holding import as_it_is
from hafs_jax.store.manifest import TIMING, read_manifest
from hafs_jax.store.rolling.windows import rolling_at
from hafs_jax.store.verify import verify

DESCRIPTION = """\
Run a language model over text and store its activations at one hook point, in
shuffled order, as two stores that share no document:

  OUT/PROFILE/store/train
  OUT/PROFILE/store/heldout

If a run is interrupted, give the same command again: it goes on from there.

Several hook points, divided by commas, are read in one pass of the model. Each
has a profile of its own, PROFILE/HOOK_POINT. All of them have the same rows in
the same order.

`hafs import` makes stores of any activations, without a model. `hafs verify`
checks a store.
"""

EPILOG = """\
profiles (--profile NAME):
{profiles}
A flag overrides its profile's value. The defaults in [] are those of offline.

datasets (--text NAME):
{datasets}
--text {syntax}
  A source of text. It may be repeated. The sources named replace all of the
  profile's.
  PATH     a dataset's name; a .jsonl, .json, .txt (each also with .gz or .zst)
           or .parquet file; a folder of such files; or a dataset of the model
           hub. Documents in a .txt file are divided by blank lines. A .json
           file is a list of records, or has one a line.
  NAME     what the store calls the source. With the name of one of the
           profile's sources, PATH replaces that source's path and its other
           fields stay, so that it can be read from a local copy.
  WEIGHT   share of the tokens, relative to the other sources [1]
  KEY      subset, revision (a commit, say), split, kind (rows, wikitext or
           multiple_choice), template (for example {{text}}), chat (the column of
           chat messages, for the tokenizer's chat template), keep (COLUMN=VALUE
           or COLUMN!=VALUE)
  examples:
    --text books.jsonl --text code=/data/code@0.2,template={{source}}
    --text wikitext@0.9 --text wmdp-bio@0.1
    --text wmdp=cais/wmdp,subset=wmdp-cyber,split=test,kind=multiple_choice

To add a profile or a dataset, call register_profile(...) or
register_dataset(...) in a module of your own and name that module in the
environment variable HAFS_PLUGINS; `pydoc hafs_extract.profiles` has an example.
"""


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
        description="Check a whole activation store: files, shapes, checksums, rows against contexts, statistics.",
        epilog="Prints one line about the store and exits 0, or a line for each problem and exits 1.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="a store's folder, such as OUT/offline/store/train")
    folder = parser.parse_args(arguments).store
    with as_it_is(folder, "a check"):
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
    with disk_errors(options.out):
        import_arrays(options)
    _note_profile(options.out, Resolved(options.profile, options.profile, "imported from arrays"))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="hafs extract",
        description=DESCRIPTION,
        epilog=_epilog(),
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument(
        "--profile", default="auto", metavar="NAME", help="one of the profiles below [auto]", dest="requested"
    )
    parser.add_argument("--text", action="append", default=[], metavar="SOURCE", help="a source of text, see below")
    parser.add_argument("--force", action="store_true", help="replace a store of another config, or extract anew")
    add_flags(parser, Engine())
    add_flags(parser, OFFLINE, skip=("profile", "sources"))
    return parser


def _epilog() -> str:
    """The help's second half, with every profile and dataset that is registered."""
    auto = "pythia70m where the model hub answers or its cache serves, else offline; decided within 5 seconds"
    profiles = {"auto": auto, **{name: profile.help for name, profile in PROFILES.items()}}
    datasets = {}
    for name, source in DATASETS.items():
        datasets[name] = ", ".join(filter(None, [source.path, source.subset, source.keep]))
    return EPILOG.format(profiles=_listed(profiles), datasets=_listed(datasets), syntax=TEXT_SYNTAX)


def _listed(entries: dict[str, str]) -> str:
    """A line or more for each entry: its name, and its description in a column of its own, at most 79 wide."""
    width = 4 + max(map(len, entries))
    wrap = textwrap.TextWrapper(79, subsequent_indent=" " * width, break_long_words=False, break_on_hyphens=False)
    lines = []
    for name, description in entries.items():
        wrap.initial_indent = f"  {name}".ljust(width)
        lines.append(wrap.fill(description) or f"  {name}")
    return "".join(f"{line}\n" for line in lines)


def _note_profile(out: Path, resolved: Resolved) -> None:
    """Writes `out`/auto.json: `--profile auto` of later commands is the profile that was extracted last."""
    write_json(out / "auto.json", {"profile": resolved.resolved, "reason": resolved.reason})


def _extract(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    engine = with_flags(Engine(), options)
    wanted = _config(PYTHIA70M, options) if options.requested == "auto" else PYTHIA70M
    resolved = resolve(options.requested, wanted)
    config = _config(PROFILES[resolved.resolved].config, options)
    place = options.out / resolved.resolved / "store"
    said = f"profile {resolved.resolved} ({resolved.reason}): store {place}"
    there = "the stores are there already, from this very config"

    def placed() -> None:
        """The stores are there: says so, and notes the profile for later commands."""
        first, *_ = profile_names(config).values()
        _note_profile(options.out, dataclasses.replace(resolved, resolved=first))
        for folders in store_folders(config, options.out).values():
            _report(folders)
        _report_timing(folders)

    is_there = not options.force and is_complete(config, options.out)
    is_left = (work_root(config, options.out) / WORK).exists()
    is_rolling = any(rolling_at(folders["train"]) for folders in store_folders(config, options.out).values())
    if is_there and not is_left and not is_rolling:
        print(f"{said}\n{there}", file=sys.stderr)
        placed()
        return 0
    from hafs_extract.models import pick_device  # torch

    print(f"{said}, device {pick_device(config.device)}", file=sys.stderr, flush=True)
    if is_there:
        print(there, file=sys.stderr)
    prepare_hub(config)
    from hafs_extract.run import extract  # torch, and the hub libraries

    with disk_errors(options.out):
        extract(config, resolved, options.out, options.force, placed, engine)
    return 0


def _config(preset: ExtractConfig, options: argparse.Namespace) -> ExtractConfig:
    config = with_flags(preset, options)
    if options.text:
        sources = tuple(parse_source(text, preset.sources, DATASETS) for text in options.text)
        config = dataclasses.replace(config, sources=sources)
    return config


def _report(folders: dict[str, Path]) -> None:
    for split, folder in folders.items():
        manifest = read_manifest(folder)
        dropped = manifest.norm_filter.summary(manifest.rows)
        print(f"{split}: {manifest.rows:,} rows of {manifest.d_model} {manifest.dtype}; {dropped}; {folder}")


def _report_timing(folders: dict[str, Path]) -> None:
    timing = read_json(folders["train"] / TIMING, "a store's timing")
    print(
        f"{timing['tokens']:,} tokens in {timing['seconds_by_stage']['model']:.0f} s"
        f" ({timing['tokens_per_second']:,.0f} tokens/s, {timing['padding_share']:.1%} padding),"
        f" {timing['seconds']:.0f} s in all"
    )
