"""`hafs label`: names for latents from a language model behind an OpenAI-compatible endpoint."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from hafs_evaluate.labels.labels_file import LABELS
from hafs_evaluate.workspace import finished_runs, open_workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.flags import Parser

KEY = "OPENAI_API_KEY"


def label_parser() -> Parser:
    parser = Parser(
        prog="hafs label",
        description="Ask a language model what the latents of finished runs are active on, and test each name: shown"
        " texts without marks, the model must say which of them the latent is active on (balanced accuracy; 0.5 is"
        " chance). The names are added to OUT/<profile>/labels.csv with their source, and `hafs report` shows"
        " them. A latent that has a label, a person's above all, is left as it is, so the same command goes on"
        " where an interrupted one stopped. Contexts of your texts are sent to the endpoint.",
    )
    parser.add_argument("--endpoint", required=True, metavar="URL", help="an OpenAI-compatible server, up to /v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the server's name of the model")
    parser.add_argument("--latents", type=int, default=50, help="latents a run, the most selective first [50]")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all finished ones]")
    parser.add_argument("--no-score", action="store_true", help="only name, which halves the requests")
    parser.add_argument("--key-from", default=KEY, metavar="VARIABLE", help=f"environment variable of the key [{KEY}]")
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument(
        "--profile", default="auto", help="profile's folder in OUT; auto is the one extracted last [auto]"
    )
    return parser


def label(arguments: list[str]) -> int:
    options = label_parser().parse_args(arguments)
    if urlsplit(options.endpoint).scheme not in ("http", "https") or not urlsplit(options.endpoint).netloc:
        raise UserError(f"--endpoint {options.endpoint}: expected an address such as http://localhost:11434/v1")
    if options.latents < 1:
        raise UserError(f"--latents {options.latents}: expected at least 1")
    key = os.environ.get(options.key_from, "")
    if not key and options.key_from != KEY:
        raise UserError(f"--key-from {options.key_from}: expected a key in that environment variable, found none")
    workspace = open_workspace(options.out, options.profile)
    runs = [run.name for run in finished_runs(workspace, options.runs)]

    from hafs_evaluate.labels.endpoint import Endpoint
    from hafs_evaluate.labels.label_runs import label_runs

    endpoint = Endpoint(options.endpoint, options.model, key)
    written, useless = label_runs(workspace, runs, endpoint, options.latents, not options.no_score)
    print(
        f"{workspace.folder / LABELS}: {written} labels added" + (f"; {useless} answers held none" if useless else "")
    )
    return 0
