"""The command `hafs explore`."""

import shlex
import socket
import sys
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hafs_evaluate.explore.ports import HOST, PORT, listening_socket
from hafs_evaluate.workspace import FinishedRun, Workspace, finished_runs, open_workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.flags import Parser
from hafs_jax.runs import Run
from hafs_jax.store.holding import reading

LATENTS = "latents.json"


def main(arguments: list[str]) -> int:
    """Serves the explorer until Ctrl-C."""
    options = explore_parser().parse_args(arguments)
    workspace = open_workspace(options.out, options.profile)
    runs = _evaluated(workspace, finished_runs(workspace, options.runs))

    with ExitStack() as held:
        listening = held.enter_context(listening_socket(options.port))  # before the seconds that a model takes
        held.enter_context(reading([workspace.heldout], "an explorer"))
        for run in runs:
            held.enter_context(Run(run.folder).held("an explorer"))
        return _serve(workspace, runs, listening, options)


def _serve(workspace: Workspace, runs: list[FinishedRun], listening: socket.socket, options: Any) -> int:
    port = listening.getsockname()[1]
    if options.port is None and port != PORT:
        _say(f"port {PORT} is taken: this is {port}")
    if not (workspace.report / "index.html").exists():
        _say(f"no report in {workspace.report}: `make report` writes one, which the explorer then shows too")

    from hafs_evaluate.explore.app import make_app
    from hafs_evaluate.explore.explorer import Explorer
    from hafs_evaluate.explore.serve import serve

    _say(f"loading {workspace.heldout.manifest.model.name}, which takes some seconds")
    explorer = Explorer(workspace, runs, options.device)
    address = f"http://{HOST}:{port}/"

    def started() -> None:
        print(f"{address}  (Ctrl-C stops it)", flush=True)
        if options.open:
            webbrowser.open(address)

    serve(make_app(explorer, workspace.report, port, _command(workspace, port)), listening, started)
    return 0


def explore_parser() -> Parser:
    """The flags of `hafs explore`, and its help."""
    parser = Parser(
        prog="hafs explore",
        description="Type a text and see which latents of the finished runs fire on it, search them, steer the model"
        " with them, compare runs. A page at http://127.0.0.1, which only this machine can open, and which needs no"
        " network. The runs must have been evaluated.",
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--profile", default="auto", help="profile's folder in OUT; auto is the last extracted [auto]")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that are evaluated]"
    )
    parser.add_argument("--port", type=_port, help=f"port of 127.0.0.1 [{PORT}, or if taken any other]")
    parser.add_argument("--device", default="auto", help="torch device; auto takes CUDA where there is one [auto]")
    parser.add_argument("--open", action="store_true", help="open the page in the browser [off]")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65_535:
        raise UserError(f"--port {text!r}: expected a number from 1 to 65,535")
    return int(text)


def _evaluated(workspace: Workspace, runs: list[FinishedRun]) -> list[FinishedRun]:
    """Those of the runs whose latents were evaluated; `UserError` where there are none, a line for each other one."""
    found = [run for run in runs if workspace.result(run.name, LATENTS).exists()]
    others = [run.name for run in runs if run not in found]
    if not found:
        raise UserError(f"expected evaluated latents in {workspace.eval}/<run>/{LATENTS}, found none; run `make eval`")
    if others:
        _say(f"left out, since their latents are not evaluated: {', '.join(others)}; run `make eval`")
    return found


def _command(workspace: Workspace, port: int) -> str:
    out = str(workspace.folder.parent)
    return shlex.join(["hafs", "explore", "--out", out, "--profile", workspace.profile, "--port", str(port)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
