"""The command `hafs`: one entry for all rooms. A room is imported when one of its commands is named."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hafs_jax import __version__
from hafs_jax.base import plugins
from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.options import did_you_mean
from hafs_jax.base.process import children, signals


@dataclass(frozen=True)
class Command:
    """A command, the module whose `main([name, *arguments])` runs it, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "extract": Command("hafs_extract.cli", "run a language model over text and store its activations"),
    "import": Command("hafs_extract.cli", "make an activation store of .npy files, without a model"),
    "verify": Command("hafs_extract.cli", "check everything of an activation store"),
    "train": Command("hafs_jax.commands", "train one SAE, or go on with an interrupted run"),
    "sweep": Command("hafs_jax.commands", "train a grid of SAEs over one pass of the data"),
    "tau": Command("hafs_jax.commands", "print the threshold tau that a finished baseline run gives"),
    "inspect": Command("hafs_jax.commands", "print what a run is, how far it got and how healthy it is"),
    "plan": Command("hafs_jax.commands", "print what a training would cost on a GPU, without one"),
    "synth": Command("hafs_jax.commands", "train and score SAEs on a world of known features"),
    "synth-world": Command("hafs_extract.cli", "only sample the activations of such a world"),
    "synth-score": Command("hafs_evaluate.cli", "only score the finished runs of such a world"),
    "agreement": Command("hafs_evaluate.cli", "compare measures with such a world's truth"),
    "evaluate": Command("hafs_evaluate.cli", "measure all finished runs, or an SAE of another library"),
    "report": Command("hafs_evaluate.cli", "write the report of all that was measured"),
    "explore": Command("hafs_evaluate.cli", "a page to try latents on your text, search, steer and compare"),
    "label": Command("hafs_evaluate.cli", "name latents by a language model, for the report"),
    "experiment": Command("hafs_evaluate.cli", "train, measure and compare every SAE of an experiment"),
    "export": Command("hafs_evaluate.cli", "write one run for SAELens or dictionary_learning"),
    "import-sae": Command("hafs_evaluate.cli", "write another library's SAE as a SAELens folder"),
    "neuronpedia": Command("hafs_evaluate.cli", "write a run's latents for Neuronpedia and SAEDashboard"),
    "upload": Command("hafs_evaluate.cli", "put one run on the model hub"),
}
"""Every command, in the order in which the help lists them."""

EXTRAS = {
    "extract": ("torch", "transformers", "transformer_lens", "datasets", "gguf", "pyarrow"),
    "evaluate": (
        "sae_lens", "pandas", "sklearn", "scipy", "huggingface_hub", "xgboost", "zstandard", "seaborn", "tabulate",
        "openai", "beartype", "jinja2", "matplotlib",
    ),
    "explore": ("starlette", "uvicorn"),
}  # fmt: skip
"""The optional packages that the rooms import, by the extra that installs them."""

WITHOUT_DEPENDENCIES = {"sae_bench": "sae-bench==0.6.0", "sae_probes": "sae-probes==0.4.2"}
"""What no extra installs: these packages declare limits that they do not need (see pyproject.toml)."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. A user's mistake is one line and exit code 2.

    Plugins are imported before the command, so that what they add is known to it.
    """
    if arguments is None:  # the process is this command
        signals.of_a_command()
        children.end_with_parent()
        try:
            return _run(sys.argv[1:])
        finally:
            signals.done()
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"hafs-jax {__version__}")
        return 0
    # On busy cores, OpenMP threads that spin while they wait cost more than they save. torch reads it at its import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # a pickle runs code: no library opens one, ours or another's
    with one_line_errors():
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; `hafs --help` lists them")
        with _named_extras(name):
            plugins.load()
            return importlib.import_module(COMMANDS[name].module).main(arguments) or 0


@contextmanager
def _named_extras(command: str) -> Iterator[None]:
    """Turns the absence of an optional package into a `UserError` that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if package in WITHOUT_DEPENDENCIES:
            install = f"--no-deps {WITHOUT_DEPENDENCIES[package]}"
        elif extra is None:
            raise
        else:  # evaluating needs what extracting does
            extras = "extract,evaluate" if COMMANDS[command].module == "hafs_evaluate.cli" else extra
            extras += ",explore" if command == "explore" else ""
            install = f"'hafs-jax[{extras}]'"
        raise UserError(
            f"`hafs {command}` needs the package {package}, which is not installed: pip install {install}"
        ) from None


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hafs COMMAND [options]",
            "",
            "Sparse autoencoders (SAEs) on language-model activations.",
            "",
            *lines,
            "",
            "`hafs COMMAND --help` lists a command's options, `hafs --version` prints the",
            f"version. The environment variable {plugins.VARIABLE} names modules, divided by commas,",
            "that every command imports first: architectures, penalties, datasets and",
            "profiles of your own.",
        ]
    )
