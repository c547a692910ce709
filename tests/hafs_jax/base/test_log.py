"""The library's notes: silent by default, shown by a command, silenced by the user; library modules never print."""

import ast
import logging
import sys

import pytest

from hafs_jax.base.log import PACKAGES, bar_options, shown
from tests.support.sources import modules

LOG = logging.getLogger("hafs_jax.some.module")
PRINTERS = {
    "hafs_evaluate.labels.command": None,
    "hafs_evaluate.explore.serve": None,
    "hafs_evaluate.explore.command": None,
    "hafs_jax.cli": None,
    "hafs_jax.commands.training": None,
    "hafs_jax.commands.runs": None,
    "hafs_jax.commands.plan": None,
    "hafs_jax.commands.streaming": {"_pass_on"},
    "hafs_jax.base.errors": {"one_line_errors"},
    "hafs_jax.ops.hosts": {"_said"},
    "hafs_jax.base.flags": {"error"},
    "hafs_jax.base.log": {"emit"},
    "hafs_extract.cli": None,
    "hafs_extract.importing": {"import_arrays"},
    "hafs_extract.synthetic.samples": {"main"},
    "hafs_evaluate.cli": None,
}
"""The modules of commands, which may print, and the functions in them that do; None: all."""


def printing(source: str, allowed: set[str] = frozenset()) -> list[int]:  # type: ignore[assignment]
    """The lines that print outside of the functions `allowed`."""
    found, nodes = [], [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef) and node.name in allowed:
            continue
        nodes += list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            found.append(node.lineno)
    return found


def test_only_commands_print() -> None:
    for module, source in modules().items():
        allowed = PRINTERS.get(module, set())
        assert allowed is None or not printing(source, allowed), f"{module} prints; use logging"
    assert printing("print(1)") and printing("def f():\n    sys.stderr.write('a')") == [2]
    assert not printing("def main():\n    print(1)", {"main"})


def test_notes_are_silent_until_a_command_shows_them(capsys: pytest.CaptureFixture) -> None:
    LOG.info("unseen")
    with shown("stdout"):
        LOG.info("100%s of it")
        LOG.debug("unseen")
        LOG.warning("beware")
    with shown():
        logging.getLogger("hafs_evaluate.stages").info("measured")
    LOG.info("unseen")
    said = capsys.readouterr()
    assert said.out == "100%s of it\n" and said.err == "beware\nmeasured\n"
    for name in PACKAGES:
        assert not logging.getLogger(name).handlers and logging.getLogger(name).level == logging.NOTSET


def test_a_handler_that_a_library_gives_the_root_does_not_show_notes_twice(capsys: pytest.CaptureFixture) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with shown():
            LOG.info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "once\n"
    assert all(logging.getLogger(name).propagate for name in PACKAGES)


def test_a_user_can_silence_the_notes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("hafs_jax"), "level", logging.ERROR)
    logging.getLogger("hafs_jax").manager._clear_cache()  # type: ignore[attr-defined]
    with shown("stdout"):
        LOG.info("unseen")
        LOG.warning("unseen")
    said = capsys.readouterr()
    assert not said.out and not said.err
    monkeypatch.undo()
    logging.getLogger("hafs_jax").manager._clear_cache()  # type: ignore[attr-defined]


def test_bars_follow_the_level_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_options(LOG)["disable"] and not bar_options(LOG, True)["disable"]
    with shown():
        assert not bar_options(LOG)["disable"] and bar_options(LOG, False)["disable"]
    for terminal, seconds in ((True, 0.5), (False, 15.0)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert bar_options(LOG)["mininterval"] == seconds


def test_every_bar_takes_its_options_from_here() -> None:
    bars = 0
    for module, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
                bars += 1
                assert any("bar_options" in ast.unparse(word.value) for word in node.keywords), f"{module}: {bars}"
    assert bars > 8
